"""What a network predicts, turned into each other: noise, velocity (arXiv:2202.00512, appendix D), clean latents.

All in float32, whatever dtype the network answered in.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float

from dmm_jax.diffusion.schedule import PREDICTION_TYPES
from dmm_jax.runtime.errors import UserError


def velocity(
    latents: Float[Array, "B h w C"], noise: Float[Array, "B h w C"], alpha_bar: Float[Array, " B"] | Float[Array, ""]
) -> Float[Array, "B h w C"]:
    """Returns v = sqrt(alpha_bar) noise - sqrt(1 - alpha_bar) latents, v-prediction's target; `latents` are clean."""
    signal, spread = _signal_and_spread(alpha_bar)
    return signal * noise - spread * latents


def to_x0(
    prediction: Float[Array, "B h w C"],
    latents: Float[Array, "B h w C"],
    alpha_bar: Float[Array, " B"] | Float[Array, ""],
    prediction_type: str,
) -> Float[Array, "B h w C"]:
    """Returns the clean latents that a prediction for noisy `latents` stands for.

    At alpha_bar 0 a predicted noise says nothing of them (the result is not finite); a velocity does.

    Raises:
      ValueError: the prediction type is not known.
    """
    signal, spread = _signal_and_spread(alpha_bar)
    if _is_velocity(prediction_type):
        return signal * latents - spread * prediction
    return (latents - spread * prediction) / signal


def to_epsilon(
    prediction: Float[Array, "B h w C"],
    latents: Float[Array, "B h w C"],
    alpha_bar: Float[Array, " B"] | Float[Array, ""],
    prediction_type: str,
) -> Float[Array, "B h w C"]:
    """Returns the noise that a prediction for noisy `latents` stands for; defined at every alpha_bar.

    Raises:
      ValueError: the prediction type is not known.
    """
    signal, spread = _signal_and_spread(alpha_bar)
    if _is_velocity(prediction_type):
        return spread * latents + signal * prediction
    return prediction.astype(jnp.float32)


def _signal_and_spread(alpha_bar):
    """Returns the standard deviations of signal and noise, (B or 1, 1, 1, 1)."""
    alpha_bar = alpha_bar.astype(jnp.float32).reshape(-1, 1, 1, 1)
    return jnp.sqrt(alpha_bar), jnp.sqrt(1.0 - alpha_bar)


def _is_velocity(prediction_type):
    if prediction_type not in PREDICTION_TYPES:
        raise UserError(f"prediction_type must be one of {', '.join(PREDICTION_TYPES)}; got {prediction_type!r}.")
    return prediction_type == "v_prediction"
