"""The multi-class adversarial term on one-step predictions of the clean latents (DMM, arXiv:2504.12364, Algorithm 1).

Both predictions are noised again, with the same noise to the same timestep, so that the discriminator compares them at
every noise level (DMD2, arXiv:2405.14867, 4.3). Its own error moves no parameter of the student, and the student's term
moves none of the discriminator.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
from flax import nnx
from jaxtyping import Array, Float, Int

from dmm_jax.diffusion.schedule import add_noise
from dmm_jax.distill import losses


class Renoising(NamedTuple):
    """The noise and timesteps that predicted clean latents get before the discriminator sees them."""

    noise: Float[Array, "*B h w C"]
    timesteps: Int[Array, "*B"]


def draw(key: jax.Array, shape: tuple[int, ...], num_timesteps: int) -> Renoising:
    """Draws the noise, of one latent's shape, and the timestep of one sample."""
    noise_key, timestep_key = jax.random.split(key)
    timestep = jax.random.randint(timestep_key, (), 0, num_timesteps)
    return Renoising(jax.random.normal(noise_key, shape), timestep)


def judge(graph: nnx.GraphDef, renoising: Renoising, alphas_cumprod: Array, text, added_cond) -> Callable:
    """Returns `f(params, clean latents) -> logits (B, 2 N)`: the discriminator under each sample's prompt."""

    def logits(params, clean):
        noisy = add_noise(clean, renoising.noise, renoising.timesteps, alphas_cumprod)
        return nnx.merge(graph, params)(noisy, renoising.timesteps, text.encoder_hidden_states, added_cond)

    return logits


def errors(
    judge: Callable,
    params,
    student: Float[Array, "B h w C"],
    teacher: Float[Array, "B h w C"],
    style_ids: Int[Array, " B"],
    num_styles: int,
) -> dict[str, Float[Array, " B"]]:
    """Returns "adversarial", low where the student passes for its teacher, and "discriminator", its adversary's error.

    Class k is teacher k, class N + k the student in style k (eq. 11, 12).

    Args:
      judge: as `judge` returns it; `params` are the discriminator's.
      student, teacher: predicted clean latents, float32.
    """
    student_as_student = losses.cross_entropy(judge(params, jax.lax.stop_gradient(student)), num_styles + style_ids)
    teacher_as_teacher = losses.cross_entropy(judge(params, jax.lax.stop_gradient(teacher)), style_ids)
    return {
        "adversarial": losses.cross_entropy(judge(jax.lax.stop_gradient(params), student), style_ids),
        "discriminator": student_as_student + teacher_as_teacher,
    }
