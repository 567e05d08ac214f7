"""Joined vectors: they come apart as they were, and every optimiser updates them as it updates single ones."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dmm_jax.config import options
from dmm_jax.distill.optimizer import make_optimizers
from dmm_jax.distill.vectors import JoinedVectors

SHAPES = {
    "add_embedding": {"linear_1": {"kernel": (6, 8), "bias": (8,)}},
    "conv_in": {"kernel": (3, 3, 4, 8), "bias": (8,)},
    "down_blocks": {
        0: {"norm": {"scale": (8,), "bias": (8,)}, "to_q": {"kernel": (8, 8)}},
        1: {"proj": {"bias": (5,)}},
    },
    "model_embedding": {"embedding": (3, 8)},
}


def random_tree(seed):
    rng = np.random.default_rng(seed)
    is_shape = lambda node: isinstance(node, tuple)  # noqa: E731
    return jax.tree.map(lambda shape: jnp.asarray(rng.standard_normal(shape), jnp.float32), SHAPES, is_leaf=is_shape)


def test_the_vectors_of_each_name_are_one_and_come_apart_as_they_were():
    params = random_tree(0)
    vectors, state = JoinedVectors(params), {"params": params, "moments": (random_tree(1), jnp.int32(3))}
    joined = vectors.join(state)
    blocks = joined["moments"][0]["down_blocks"]
    assert [leaf.size for leaf in jax.tree.leaves(blocks) if leaf.ndim == 1] == [21, 0, 0]
    jax.tree.map(np.testing.assert_array_equal, vectors.split(joined), state)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_an_optimiser_updates_joined_vectors_as_single_ones(optimizer):
    config = options.get_config()
    config.optimizer, config.style_learning_rate_scale, config.weight_decay = optimizer, 10.0, 0.1
    update, params = make_optimizers(config)["student"], random_tree(0)
    vectors, state = JoinedVectors(params), update.init(params)
    for seed in (1, 2):
        grads = random_tree(seed)
        expected = update.update(grads, state, params, norm=jnp.float32(2.0))
        got = update.update(*map(vectors.join, (grads, state, params)), norm=jnp.float32(2.0))
        jax.tree.map(np.testing.assert_array_equal, vectors.split(got), expected)
        state = expected[1]
