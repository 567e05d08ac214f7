"""The jitted steps behind `fit_style`: a row of the style table, or a mix of its rows, learns by the denoising loss."""

import dataclasses
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jaxtyping import Array, Float, Int

from dmm_jax.data.batches import Batch
from dmm_jax.diffusion import prediction
from dmm_jax.diffusion.schedule import add_noise
from dmm_jax.distill.objective import Inputs, Objective, draw_inputs


@dataclasses.dataclass(frozen=True)
class FrozenNetworks:
    """The structure of the networks."""

    unet: nnx.GraphDef
    text_encoders: nnx.GraphDef


def denoising_errors(
    networks: FrozenNetworks, objective: Objective, params, row: Float[Array, "1 E"], inputs: Inputs
) -> Float[Array, " B"]:
    """Returns each sample's mean squared error of the UNet's prediction in one style (DDPM, arXiv:2006.11239, eq. 14).

    Args:
      params: {"unet": ..., "text_encoders": ...}.
      row: of the style table, before the MLP.
      inputs: leaves (B, ...).
    """
    alphas_cumprod = jnp.asarray(objective.alphas_cumprod, jnp.float32)
    text = nnx.merge(networks.text_encoders, params["text_encoders"])(inputs.input_ids)
    noisy = add_noise(inputs.latents, inputs.noise, inputs.timesteps, alphas_cumprod)
    target = inputs.noise
    if objective.prediction_type == "v_prediction":
        target = prediction.velocity(inputs.latents, inputs.noise, alphas_cumprod[inputs.timesteps])
    style = jnp.broadcast_to(row, (len(noisy), row.shape[1]))
    conditions = {"style_embedding": style, "added_cond": text.added_cond(inputs.time_ids)}
    unet = nnx.merge(networks.unet, params["unet"])
    predicted = unet(noisy, inputs.timesteps, text.encoder_hidden_states, **conditions).sample
    return jnp.mean(jnp.square(predicted - target), axis=(1, 2, 3))


def row_of(learned: Float[Array, "1 _"], params, mix_only: bool) -> Float[Array, "1 E"]:
    """Returns the row that learns: `learned` itself (1, E), or the mix of table rows with these weights (1, N)."""
    if not mix_only:
        return learned
    table = params["unet"]["model_embedding"]["embedding"]
    return jnp.matmul(learned, table, precision=jax.lax.Precision.HIGHEST)


def batch_images(seed: int, step: Int[Array, ""], batch_size: int, num_images: int) -> Int[Array, " batch_size"]:
    """Returns the images of a batch, from (seed, step) alone: one shuffled pass over all images after another."""

    def image(position):
        order = jax.random.permutation(jax.random.fold_in(jax.random.key(seed), position // num_images), num_images)
        return order[position % num_images]

    return jax.vmap(image)(step * batch_size + jnp.arange(batch_size))


def build_fit_step(
    networks: FrozenNetworks,
    objective: Objective,
    optimizer: optax.GradientTransformation,
    *,
    batch_size: int,
    mix_only: bool,
    seed: int,
) -> Callable:
    """Returns the jitted `step(state, params, images) -> (state, loss)`; `state` is donated.

    The state is {"step", "learned", "opt_state"}; `images` is a `Batch` with leaves (I, ...).
    """

    def step(state, params, images: Batch):
        image_ids = batch_images(seed, state["step"], batch_size, len(images.latents))
        batch = jax.tree.map(lambda leaf: leaf[image_ids], images)
        key = jax.random.fold_in(jax.random.key(seed + 1), state["step"])
        inputs = draw_inputs(objective, key, jnp.arange(batch_size), jnp.array([0, 1]), batch)

        def loss_of(learned):
            row = row_of(learned, params, mix_only)
            return jnp.mean(denoising_errors(networks, objective, params, row, inputs))

        loss, grads = jax.value_and_grad(loss_of)(state["learned"])
        updates, opt_state = optimizer.update(grads, state["opt_state"], state["learned"])
        learned = optax.apply_updates(state["learned"], updates)
        return {"step": state["step"] + 1, "learned": learned, "opt_state": opt_state}, loss

    return jax.jit(step, donate_argnums=0)


def build_held_out(networks: FrozenNetworks, objective: Objective) -> Callable:
    """Returns the jitted `f(params, row (1, E), inputs) -> mean loss`; inputs have leaves (K, B, ...)."""

    def mean_loss(params, row, inputs):
        return jnp.mean(jax.lax.map(partial(denoising_errors, networks, objective, params, row), inputs))

    return jax.jit(mean_loss)
