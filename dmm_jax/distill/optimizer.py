"""AdamW or Muon after a clip by the global norm, and the learning rate's schedule (DMM, arXiv:2504.12364, A.3)."""

import jax
import optax
from optax import contrib

from dmm_jax.distill import clipping
from dmm_jax.models.block_loops import is_stacked


def learning_rate_schedule(config) -> optax.Schedule:
    """Returns the learning rate by update: a linear warm-up, then a cosine, or a constant that may fall at the end."""
    steps = max(config.num_steps - config.warmup_steps, 1)  # After the warm-up.
    rest = optax.constant_schedule(config.learning_rate)
    if config.learning_rate_schedule == "cosine":
        rest = optax.cosine_decay_schedule(config.learning_rate, steps)
    elif config.decay_share:
        decay_steps = min(max(round(config.decay_share * config.num_steps), 1), steps)
        decay = optax.linear_schedule(config.learning_rate, 0.0, decay_steps)
        rest = optax.join_schedules([rest, decay], [steps - decay_steps])
    if not config.warmup_steps:
        return rest
    warmup = optax.linear_schedule(0.0, config.learning_rate, config.warmup_steps)
    return optax.join_schedules([warmup, rest], [config.warmup_steps])


def make_optimizers(config) -> dict[str, optax.GradientTransformation]:
    """Returns the optimiser of each trained network: "student", and "discriminator" with an adversarial term."""
    make_optimizer = {"adamw": _adamw, "muon": _muon}[config.optimizer]
    optimizers = {"student": _clipped(config, make_optimizer(config, learning_rate_schedule(config)))}
    if config.style_learning_rate_scale != 1.0:
        optimizers["student"] = optax.chain(optimizers["student"], _scale_style(config.style_learning_rate_scale))
    if config.adversarial.weight:
        optimizers["discriminator"] = _clipped(config, _adamw(config, config.adversarial.learning_rate))
    return optimizers


def _clipped(config, optimizer):
    parts = [clipping.clip_by_norm(config.max_grad_norm)] if config.max_grad_norm else []
    return optax.chain(*parts, optimizer)


def _adamw(config, learning_rate):
    options = {"b1": config.adam_b1, "b2": config.adam_b2, "mu_dtype": config.first_moment_dtype}
    return optax.adamw(learning_rate, eps=config.adam_eps, weight_decay=config.weight_decay, **options)


def _muon(config, learning_rate):
    """Returns Muon for kernels, with updates as large as AdamW's (arXiv:2502.16982), and AdamW for the rest."""
    decays = {"weight_decay": config.weight_decay, "adam_weight_decay": config.weight_decay}
    betas = {"adam_b1": config.adam_b1, "adam_b2": config.adam_b2}
    return contrib.muon(
        learning_rate,
        eps=config.adam_eps,
        consistent_rms=0.2,
        mu_dtype=config.first_moment_dtype,
        muon_weight_dimension_numbers=_matrices,
        **decays,
        **betas,
    )


def _matrices(params):
    """Returns how Muon reads each parameter as a matrix from inputs to outputs; None for parameters that AdamW updates.

    A convolution's window counts as inputs, each block of a loop is a matrix of its own. First and last layers, tables
    and vectors are AdamW's.
    """

    def axes(path, leaf):
        first, last = path[0].key, path[-1].key
        if last != "kernel" or first in ("conv_in", "conv_out"):
            return None
        return contrib.MuonDimensionNumbers(tuple(range(is_stacked(path), leaf.ndim - 1)), leaf.ndim - 1)

    return jax.tree.map_with_path(axes, params)


def _scale_style(scale):
    def update(updates, state, params=None):
        del params
        # Where `add_embedding2` exists, it is the style's MLP, and `add_embedding` is SDXL's own.
        mlp = "add_embedding2" if "add_embedding2" in updates else "add_embedding"
        style = {name: updates[name] for name in ("model_embedding", mlp) if name in updates}
        return {**updates, **jax.tree.map(lambda leaf: scale * leaf, style)}, state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)
