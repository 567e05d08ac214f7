"""The multi-class adversarial term on one-step predictions of the clean latents (DMM, arXiv:2504.12364, Algorithm 1).

Both predictions are diffused anew, with the same noise to the same timestep, so that the discriminator compares them at
every scale (DMD2, arXiv:2405.14867, 4.3). It moves no parameter of the student, nor the student's term one of its own.
"""

from collections.abc import Callable

import jax
from flax import nnx
from jaxtyping import Array, Float, Int

from dmm_jax.diffusion.schedule import add_noise
from dmm_jax.distill import losses


def draw(key: jax.Array, shape: tuple[int, ...], num_timesteps: int) -> dict:
    """Draws the noise and the timestep to which one sample's predictions are diffused."""
    for_noise, for_time = jax.random.split(key)
    timestep = jax.random.randint(for_time, (), 0, num_timesteps)
    return {"noise": jax.random.normal(for_noise, shape), "timesteps": timestep}


def judge(graph: nnx.GraphDef, drawn: dict, alphas_cumprod: Array, text, added_cond) -> Callable:
    """Returns `f(params, x0) -> logits (B, 2 N)` of clean latents, diffused as `drawn` says, under their prompts."""

    def logits(params, x0):
        noisy = add_noise(x0, drawn["noise"], drawn["timesteps"], alphas_cumprod)
        return nnx.merge(graph, params)(noisy, drawn["timesteps"], text.encoder_hidden_states, added_cond)

    return logits


def errors(
    judge: Callable,
    params,
    student: Float[Array, "B h w C"],
    teacher: Float[Array, "B h w C"],
    style_ids: Int[Array, " B"],
    num_styles: int,
) -> dict[str, Float[Array, " B"]]:
    """Returns "adversarial", which the student lowers by passing for its teacher, and "discriminator", its adversary's.

    Args:
      judge: as `judge` returns it; `params` are the discriminator's.
      student, teacher: predicted clean latents, float32.
    """
    fixed = jax.lax.stop_gradient(params)
    told_apart = losses.cross_entropy(judge(params, jax.lax.stop_gradient(student)), num_styles + style_ids)
    known = losses.cross_entropy(judge(params, jax.lax.stop_gradient(teacher)), style_ids)
    return {
        "adversarial": losses.cross_entropy(judge(fixed, student), style_ids),
        "discriminator": told_apart + known,
    }
