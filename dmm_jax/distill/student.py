"""The student: the base's UNet with a style table, and the optimiser's state around it.

A style is a row of `model_embedding`; a two-layer MLP maps it to a vector that is added to the timestep embedding
(DMM, arXiv:2504.12364, A.1). With the MLP's last layer at zero, step 0 is the start exactly.
"""

from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from dmm_jax.checkpoints.abstract import abstract_params
from dmm_jax.distill import clipping
from dmm_jax.models.unet_2d_condition import style_mlp_name
from dmm_jax.runtime import sharding


def style_params(config: Mapping, style_init: str, seed: int) -> dict:
    """Draws the style table, N(0, 1), and its MLP as host arrays; "zero" clears the MLP's last layer."""
    abstract, mlp = abstract_params("unet", config), style_mlp_name(config)
    rng = np.random.default_rng(seed)

    def uniform(leaf, fan_in):  # PyTorch's initial weights and biases.
        return rng.uniform(-(fan_in**-0.5), fan_in**-0.5, leaf.shape).astype(np.float32)

    params = {
        "model_embedding": {
            "embedding": rng.standard_normal(abstract["model_embedding"]["embedding"].shape, np.float32)
        }
    }
    params[mlp] = {}
    for layer in ("linear_1", "linear_2"):
        leaves = abstract[mlp][layer]
        fan_in = leaves["kernel"].shape[0]
        params[mlp][layer] = {name: uniform(leaf, fan_in) for name, leaf in sorted(leaves.items())}
    if style_init == "zero":
        params[mlp]["linear_2"] = jax.tree.map(np.zeros_like, params[mlp]["linear_2"])
    return params


def put_student(sources: Sequence[Mapping], style: Mapping, config: Mapping, mesh: Mesh):
    """Places the student's float32 parameters: the mean of `sources` (the base, or the teachers) and the style rows."""
    abstract = abstract_params("unet", config)
    names = set(style)

    def one(path, leaf):
        keys = [part.key for part in path]
        trees = [style] if keys[0] in names else sources
        leaves = [_at(tree, keys) for tree in trees]

        def read(index):
            return sum(np.asarray(source[index], np.float32) for source in leaves) / np.float32(len(leaves))

        return _put(leaf.shape, read, mesh)

    return jax.tree.map_with_path(one, abstract)


def put_trained(params: Mapping, mesh: Mesh):
    """Places host parameters as the student's are: float32, sharded."""
    return jax.tree.map(lambda leaf: _put(leaf.shape, leaf.__getitem__, mesh), params)


def _put(shape, read, mesh):
    return sharding.make_array(shape, jnp.float32, mesh, sharding.parameter_spec(shape, mesh), read)


def _at(tree, keys):
    for key in keys:
        tree = tree[key]
    return tree


def learning_rate_schedule(config) -> optax.Schedule:
    """Returns the learning rate by update: a linear warm-up, then a constant or a cosine."""
    warmup = optax.linear_schedule(0.0, config.learning_rate, config.warmup_steps) if config.warmup_steps else None
    rest = optax.constant_schedule(config.learning_rate)
    if config.learning_rate_schedule == "cosine":
        rest = optax.cosine_decay_schedule(config.learning_rate, max(config.num_steps - config.warmup_steps, 1))
    return optax.join_schedules([warmup, rest], [config.warmup_steps]) if warmup else rest


def make_optimizers(config) -> dict[str, optax.GradientTransformation]:
    """Returns AdamW behind a global-norm clip for each network that is trained: "student", perhaps "discriminator"."""
    optimizers = {"student": _adamw(config, learning_rate_schedule(config))}
    if config.style_learning_rate_scale != 1.0:
        optimizers["student"] = optax.chain(optimizers["student"], _scale_style(config.style_learning_rate_scale))
    if config.adversarial.weight:
        optimizers["discriminator"] = _adamw(config, config.adversarial.learning_rate)
    return optimizers


def _adamw(config, learning_rate):
    parts = [clipping.clip_by_norm(config.max_grad_norm)] if config.max_grad_norm else []
    parts.append(
        optax.adamw(
            learning_rate,
            b1=config.adam_b1,
            b2=config.adam_b2,
            eps=config.adam_eps,
            weight_decay=config.weight_decay,
        )
    )
    return optax.chain(*parts)


def _scale_style(scale):
    style = ("model_embedding", "add_embedding", "add_embedding2")

    def update(updates, state, params=None):
        del params
        # `add_embedding` is SDXL's own, not the style's, where `add_embedding2` exists.
        named = [name for name in style if name in updates]
        named = [name for name in named if not (name == "add_embedding" and "add_embedding2" in named)]
        scaled = {name: jax.tree.map(lambda leaf: scale * leaf, updates[name]) for name in named}
        return {**updates, **scaled}, state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


def make_state(trained: Mapping, optimizers: Mapping, mesh: Mesh, ema_decay: float) -> dict:
    """Returns the training state: counters, the student's params and moments, the average and discriminator if any.

    Args:
      trained: parameters on the mesh: "student", perhaps "discriminator".
    """
    specs = sharding.state_specs(abstract_state(trained, optimizers, ema_decay), mesh)

    def init(trained):
        return _fresh(trained, optimizers, ema_decay)

    return jax.jit(init, out_shardings=sharding.shardings(mesh, specs))(trained)


def abstract_state(trained: Mapping, optimizers: Mapping, ema_decay: float) -> dict:
    """Returns the training state around arrays or shapes of what is trained, as shapes."""
    return jax.eval_shape(lambda trained: _fresh(trained, optimizers, ema_decay), trained)


def _fresh(trained, optimizers, ema_decay):
    counters = {name: jnp.int32(0) for name in ("step", "skipped_steps", "skipped_in_a_row")}
    held = {name: {"params": net, "opt_state": optimizers[name].init(net)} for name, net in trained.items()}
    average = {"ema": jax.tree.map(jnp.copy, trained["student"])} if ema_decay else {}
    return counters | held.pop("student") | average | held
