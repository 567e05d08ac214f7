"""The compiled programs of a pipeline: prompts to states, noise to latents, latents to images."""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool

from dmm_jax.diffusion import guidance, solvers
from dmm_jax.runtime.errors import UserError


@functools.partial(jax.jit, static_argnums=1)
def unit_noise(keys, shape):
    """Draws the unit noise (B, *shape) that denoising starts from, for each image from its own key."""
    return jax.vmap(lambda key: jax.random.normal(key, shape))(keys)


@functools.partial(jax.jit, static_argnums=0)
def encode(graph, params, input_ids, weights):
    """Returns the conditioning of prompts, float32."""
    text = nnx.merge(graph, params).encode_chunks(input_ids, weights)
    return jax.tree.map(lambda leaf: leaf.astype(jnp.float32), text)


@functools.partial(jax.jit, static_argnums=0)
def decode(graph, params, latents):
    """Returns the images (B, H, W, 3), uint8, of scaled latents, and whether each is finite (B,)."""
    vae = nnx.merge(graph, params)
    images = vae.decode(latents / vae.scaling_factor)
    finite = jnp.isfinite(images).all(axis=(1, 2, 3))
    return jnp.round(jnp.clip(images.astype(jnp.float32) * 127.5 + 127.5, 0.0, 255.0)).astype(jnp.uint8), finite


@functools.partial(jax.jit, static_argnums=(0, 1))
def denoise(graph, guided, params, plan, noise, keys, text, added, weights, guidance_scales, rescales=None):
    """Runs the solver and returns clean latents (B, h, w, C); without rescales it is a program without that work.

    With guidance, `text` holds (negative, prompt) pairs in adjacent rows, so both are on their image's device.
    """
    predict = predictor(graph, guided, params, len(noise), text, added, guidance_scales, rescales)
    return solvers.sample(plan, predict, noise, keys, *_by_evaluation(weights))


@functools.partial(jax.jit, static_argnums=(0, 1))
def denoise_part(graph, guided, params, plan, state, first, keys, text, added, weights, guidance_scales, rescales=None):
    """Returns the solver's state after a part of a plan that begins at evaluation `first`; otherwise as `denoise`."""
    predict = predictor(graph, guided, params, len(state[0]), text, added, guidance_scales, rescales)
    return solvers.advance(plan, predict, state, first, keys, *_by_evaluation(weights))


def denoise_watched(callback, graph, guided, params, plan, noise, keys, text, added, weights, *scales):
    """Returns latents as `denoise`, evaluation by evaluation; stops after one whose callback returns False."""
    state = solvers.start(plan, noise)
    for number, timestep in enumerate(plan.timesteps.tolist()):
        rows = slice(number, number + 1)
        part = jax.tree.map(lambda column, rows=rows: column[rows] if column.ndim else column, plan)
        own_weights = None if weights is None else weights[:, rows]
        conditions = keys, text, added, own_weights, *scales
        state = denoise_part(graph, guided, params, part, state, np.int32(number), *conditions)
        if callback(number, timestep, np.asarray(state[0])) is False:
            break
    return state[0]


def _by_evaluation(weights):
    return [] if weights is None else [jnp.swapaxes(weights, 0, 1)]


def predictor(graph, guided, params, batch_size, text, added, guidance_scales, rescales, num_states=None):
    """Returns the network, with guidance, as a function of latents, timestep () or (B,), and style weights.

    Weights (B, N) mix the rows of the style table. Weights (B, K, N), of which each (N,) has one that is not 0, mix the
    predictions of K styles: the network sees K latents per image.
    """
    unet = nnx.merge(graph, params)
    prompts_per_image = len(text) // batch_size

    def predict(latents, timestep, weights=None):
        shares, num_styles, conditions = None, 1, (text, added, num_states)
        if weights is not None and weights.ndim == 3:
            shares, num_styles = weights.sum(axis=-1), weights.shape[1]
            weights = (weights != 0).astype(jnp.float32).reshape(-1, weights.shape[-1])
            conditions = jax.tree.map(lambda leaf: _repeat_groups(leaf, prompts_per_image, num_styles), conditions)
        # The UNet repeats latents itself at its first cross-attention, but SDXL's prompts also enter with the timestep.
        repeats = 1 if added is None else prompts_per_image
        style = None if weights is None else jnp.repeat(unet.style_embedding(weights), repeats, axis=0)
        timesteps = jnp.repeat(jnp.broadcast_to(timestep, latents.shape[:1]), num_styles * repeats)
        latents = jnp.repeat(latents, num_styles * repeats, axis=0)
        states, *others = conditions
        prediction = unet(latents, timesteps, states, style, *others).sample
        if shares is not None:
            prediction = _weighted_sum(prediction, shares)
        if not guided:
            return prediction
        result = guidance.guide(prediction[0::2], prediction[1::2], guidance_scales)
        return result if rescales is None else guidance.rescale(result, prediction[1::2], rescales)

    return predict


def _repeat_groups(rows, group_size, times):
    """Repeats groups of adjacent rows: (a1, a2, b1, b2) twice is (a1, a2, a1, a2, b1, b2, b1, b2)."""
    groups = rows.reshape(-1, group_size, *rows.shape[1:])
    return jnp.repeat(groups, times, axis=0).reshape(-1, *rows.shape[1:])


def _weighted_sum(predictions, shares):
    """Returns (B R, ...) of predictions (B K R, ...), R prompts of K styles per image, and shares (B, K)."""
    rows = predictions.reshape(*shares.shape, -1, *predictions.shape[1:]).astype(jnp.float32)
    mixed = jnp.einsum("bk...,bk->b...", rows, shares, precision=jax.lax.Precision.HIGHEST)
    return mixed.reshape(-1, *predictions.shape[1:]).astype(predictions.dtype)


def check_finite(values: str, finite: Bool[Array | np.ndarray, " B"], names: Sequence[str]) -> None:
    """Raises UserError that names the images with NaN or infinity, which would be black."""
    if bad := [names[row] if names else f"image {row}" for row in np.flatnonzero(~np.asarray(finite))]:
        raise UserError(
            f"the {values} of {'; '.join(dict.fromkeys(bad))} hold NaN or infinity. Look at the checkpoint with "
            "`dmm-jax inspect --deep`, compute in float32, or take a lower guidance scale."
        )
