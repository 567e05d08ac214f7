"""Conversions between predictions of noise, of velocity (arXiv:2202.00512, appendix D) and of clean latents.

All results are float32, whatever the dtype of the prediction.
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
    """Returns the clean latents that a prediction for noisy `latents` implies.

    At alpha_bar 0 a predicted noise does not determine them (the result is not finite); a velocity does.

    Raises:
      ValueError: an unknown prediction type.
    """
    if prediction_type not in PREDICTION_TYPES:
        raise UserError(f"prediction_type must be one of {', '.join(PREDICTION_TYPES)}; got {prediction_type!r}.")
    signal, spread = _signal_and_spread(alpha_bar)
    if prediction_type == "v_prediction":
        return signal * latents - spread * prediction
    return (latents - spread * prediction) / signal


def converted(
    prediction: Float[Array, "B h w C"],
    latents: Float[Array, "B h w C"],
    alpha_bar: Float[Array, " B"] | Float[Array, ""],
    prediction_type: str,
) -> Float[Array, "B h w C"]:
    """Returns a prediction for noisy `latents` as the given type, from the other of the two types.

    With latents = signal x0 + spread noise, a velocity gives noise = spread latents + signal v at every timestep. A
    noise gives v = (noise - spread latents) / signal except at alpha_bar 0, where no noise determines it. The division
    weights its squared error by 1 / alpha_bar.

    Args:
      prediction_type: what is returned: "epsilon" from a velocity, or "v_prediction" from a noise.
    """
    signal, spread = _signal_and_spread(alpha_bar)
    prediction = prediction.astype(jnp.float32)
    if prediction_type == "epsilon":
        return spread * latents + signal * prediction
    return (prediction - spread * latents) / signal


def _signal_and_spread(alpha_bar):
    """Returns the standard deviations of signal and noise, (B or 1, 1, 1, 1)."""
    alpha_bar = alpha_bar.astype(jnp.float32).reshape(-1, 1, 1, 1)
    return jnp.sqrt(alpha_bar), jnp.sqrt(1.0 - alpha_bar)
