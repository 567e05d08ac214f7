"""AdamW with a clip by the global norm, and the learning rate's schedule (DMM, arXiv:2504.12364, A.3)."""

import jax
import optax

from dmm_jax.distill import clipping


def learning_rate_schedule(config) -> optax.Schedule:
    """Returns the learning rate by update: a linear warm-up, then a constant or a cosine."""
    rest = optax.constant_schedule(config.learning_rate)
    if config.learning_rate_schedule == "cosine":
        rest = optax.cosine_decay_schedule(config.learning_rate, max(config.num_steps - config.warmup_steps, 1))
    if not config.warmup_steps:
        return rest
    warmup = optax.linear_schedule(0.0, config.learning_rate, config.warmup_steps)
    return optax.join_schedules([warmup, rest], [config.warmup_steps])


def make_optimizers(config) -> dict[str, optax.GradientTransformation]:
    """Returns the optimiser of each trained network: "student", and "discriminator" with an adversarial term."""
    optimizers = {"student": _adamw(config, learning_rate_schedule(config))}
    if config.style_learning_rate_scale != 1.0:
        optimizers["student"] = optax.chain(optimizers["student"], _scale_style(config.style_learning_rate_scale))
    if config.adversarial.weight:
        optimizers["discriminator"] = _adamw(config, config.adversarial.learning_rate)
    return optimizers


def _adamw(config, learning_rate):
    parts = [clipping.clip_by_norm(config.max_grad_norm)] if config.max_grad_norm else []
    betas = {"b1": config.adam_b1, "b2": config.adam_b2}
    adamw = optax.adamw(learning_rate, eps=config.adam_eps, weight_decay=config.weight_decay, **betas)
    return optax.chain(*parts, adamw)


def _scale_style(scale):
    def update(updates, state, params=None):
        del params
        # Where `add_embedding2` exists, it is the style's MLP, and `add_embedding` is SDXL's own.
        mlp = "add_embedding2" if "add_embedding2" in updates else "add_embedding"
        style = {name: updates[name] for name in ("model_embedding", mlp) if name in updates}
        return {**updates, **jax.tree.map(lambda leaf: scale * leaf, style)}, state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)
