"""Trains mixes: a share of the images is asked of two teachers, and the student learns the mean of both predictions.

A mix is a weighted sum of style rows (DMM, arXiv:2504.12364, 3.2). The paper trains single styles alone, so nothing
says what the student draws between them. Here every `mix_every`-th image of a teacher i is asked of a second teacher j
too, with a weight w in [0, 1]: the style is w e_i + (1 - w) e_j, and the target w t_i + (1 - w) t_j, features included.

In one step all images of a teacher have the same second one, `shift` rows further. Each teacher predicts one batch: its
own images, then those that have it as their second teacher.

Shapes: T teachers, b images of each, k = b / mix_every of them mixed.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

MIX_KEY = 5  # A sample's other random numbers are split from its key, and not folded into it.


class Mix(NamedTuple):
    """The mixes of a step."""

    shift: Int[Array, ""]  # From a row to that of its second teacher, 1 to T - 1.
    own_share: Float[Array, "T k"]  # The weight of the row's own teacher.


def draw_mix(step_key: jax.Array, step_id: int, sample_ids: Int[Array, "T b"], mix_every: int) -> Mix:
    """Draws a step's second teacher, and each mixed image's weight, uniform in [0, 1).

    Args:
      step_id: names the random number that all samples share; no sample has this id.
    """
    shift = jax.random.randint(jax.random.fold_in(step_key, step_id), (), 1, sample_ids.shape[0])

    def draw(sample_id):
        return jax.random.uniform(jax.random.fold_in(jax.random.fold_in(step_key, sample_id), MIX_KEY))

    return Mix(shift, jax.vmap(jax.vmap(draw))(sample_ids[:, ::mix_every]))


def style_weights(style_ids: Int[Array, "T b"], num_styles: int, mix: Mix | None) -> Float[Array, "T b N"]:
    """Returns the weights of the student's styles for every image."""
    weights = jax.nn.one_hot(style_ids, num_styles)
    if mix is None:
        return weights
    return _mixed(weights, _moved(weights[:, :: _every(style_ids, mix)], -mix.shift), mix)


def with_second_rows(tree, mix: Mix | None):
    """Returns arrays (T, b, ...) with the images (T, k, ...) that their teachers are asked as second ones behind."""
    if mix is None:
        return tree
    return jax.tree.map(lambda leaf: jnp.concatenate([leaf, _moved(leaf[:, :: _every(leaf, mix)], mix.shift)], 1), tree)


def own_styles(style_ids: Int[Array, "T b"], mix: Mix | None) -> Int[Array, "T n"]:
    """Returns the style that each row of `with_second_rows` asks its teacher for: always one of the teacher's own."""
    return style_ids if mix is None else jnp.concatenate([style_ids, style_ids[:, :: _every(style_ids, mix)]], 1)


def mean_of_both(tree, mix: Mix | None):
    """Returns the targets (T, b, ...) of predictions (T, b + k, ...) for `with_second_rows`."""
    if mix is None:
        return tree
    num_mixed = mix.own_share.shape[1]

    def mean(leaf):
        own, second = leaf[:, :-num_mixed].astype(jnp.float32), leaf[:, -num_mixed:].astype(jnp.float32)
        return _mixed(own, _moved(second, -mix.shift), mix).astype(leaf.dtype)

    return jax.tree.map(mean, tree)


def of_either(is_true: Bool[Array, " T"], per_teacher: int, mix: Mix | None) -> Bool[Array, "T b"]:
    """Returns whether something is true of an image's own teacher or of its second one."""
    rows = jnp.broadcast_to(is_true[:, None], (len(is_true), per_teacher))
    if mix is None:
        return rows
    every = _every(rows, mix)
    return rows.at[:, ::every].set(rows[:, ::every] | _moved(rows[:, ::every], -mix.shift))


def _mixed(own: Float[Array, "T b ..."], second: Float[Array, "T k ..."], mix: Mix) -> Float[Array, "T b ..."]:
    every = _every(own, mix)
    share = mix.own_share.reshape(mix.own_share.shape + (1,) * (own.ndim - 2))
    return own.at[:, ::every].set(share * own[:, ::every] + (1.0 - share) * second)


def _moved(rows: Array, shift: Int[Array, ""]) -> Array:
    return jnp.roll(rows, shift, axis=0)


def _every(rows: Array, mix: Mix) -> int:
    return rows.shape[1] // mix.own_share.shape[1]
