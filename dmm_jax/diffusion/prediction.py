"""What a network predicts, turned into each other: noise, velocity (arXiv:2202.00512, appendix D), clean latents."""

import jax.numpy as jnp
from jaxtyping import Array, Float


def _roots(alpha_bar):
    alpha_bar = jnp.asarray(alpha_bar, jnp.float32).reshape(-1, 1, 1, 1)
    return jnp.sqrt(alpha_bar), jnp.sqrt(1.0 - alpha_bar)


def velocity(
    latents: Float[Array, "B h w C"], noise: Float[Array, "B h w C"], alpha_bar: Float[Array, "*B"]
) -> Float[Array, "B h w C"]:
    """Returns v = sqrt(alpha_bar) noise - sqrt(1 - alpha_bar) latents, for clean `latents`."""
    signal, spread = _roots(alpha_bar)
    return signal * noise - spread * latents


def to_x0(
    prediction: Float[Array, "B h w C"], noisy: Float[Array, "B h w C"], alpha_bar: Float[Array, "*B"], prediction_type: str
) -> Float[Array, "B h w C"]:
    """Returns the clean latents that a prediction stands for; from noise they are undefined at alpha_bar = 0."""
    signal, spread = _roots(alpha_bar)
    if prediction_type == "epsilon":
        return (noisy - spread * prediction) / signal
    return signal * noisy - spread * prediction


def to_epsilon(
    prediction: Float[Array, "B h w C"], noisy: Float[Array, "B h w C"], alpha_bar: Float[Array, "*B"], prediction_type: str
) -> Float[Array, "B h w C"]:
    """Returns the noise that a prediction stands for."""
    if prediction_type == "epsilon":
        return prediction
    signal, spread = _roots(alpha_bar)
    return spread * noisy + signal * prediction
