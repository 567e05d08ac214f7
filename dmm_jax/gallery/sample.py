"""Pictures of every prompt in every style, each with the parameters that draw it again."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import UInt8

from dmm_jax.config import arguments
from dmm_jax.config.styles import Style, image_names
from dmm_jax.gallery.png import Parameters
from dmm_jax.pipeline import Pipeline


class Samples(NamedTuple):
    """Pictures and their parameters, row after row: one row per prompt, one column per style."""

    images: UInt8[np.ndarray, "n H W 3"]
    parameters: list[Parameters]


def sample(
    pipeline: Pipeline,
    prompts: Sequence[str],
    styles: Sequence[Style] = (),
    *,
    negative_prompt: str | None = None,
    seed: int = 0,
    height: int = 0,
    width: int = 0,
    num_inference_steps: int = 25,
    guidance_scale: float = 7.0,
    guidance_rescale: float = 0.0,
    solver: str = "dpmpp_2m",
    batch_size: int = 8,
    progress: Callable[..., Iterable] = lambda batches, total: batches,
) -> Samples:
    """Draws every prompt in every style.

    Args:
      styles: names, mixes or schedules; by default all styles of the pipeline, and none for a stock checkpoint.
      negative_prompt: for every picture; None is not the same as "" for Stable Diffusion XL.
      seed: the first prompt's; the next prompt has seed + 1. All styles share a prompt's seed.
      height, width: pixels; 0 is the size that the model was trained at.
      batch_size: images computed at once.
      progress: wraps the iterator of batches, as `tqdm(batches, total=...)` does.

    Raises:
      ValueError: a style or an option does not fit the pipeline.
    """
    arguments.whole_number("batch_size", batch_size, 1)
    styles = list(styles) or list(pipeline.styles) or [None]
    pipeline.style_weights(styles, len(styles), timesteps=np.zeros(1))  # Refuses wrong styles before any drawing.
    jobs = [(prompt, style, seed + row) for row, prompt in enumerate(prompts) for style in styles]
    options = {"solver": solver, "guidance_scale": guidance_scale, "guidance_rescale": guidance_rescale}
    options_of_all = options | {"num_chunks": pipeline.num_chunks([*prompts, negative_prompt])}
    batches = draw(
        pipeline,
        jobs,
        min(batch_size, len(jobs)),
        negative_prompts=negative_prompt,
        num_inference_steps=num_inference_steps,
        height=height,
        width=width,
        **options_of_all,
    )
    images = np.concatenate([batch for batch, _ in progress(batches, total=-(-len(jobs) // batch_size))])
    shared = options | {
        "negative_prompt": negative_prompt or "",
        "steps": num_inference_steps,
        "height": images.shape[1],
        "width": images.shape[2],
        "clip_skip": pipeline.source.clip_skip,
        "prompt_grammar": pipeline.prompt_grammar,
        "model": pipeline.name,
        "model_hash": pipeline.source.digest("unet")[:10],
    }
    parameters = [
        Parameters(prompt=prompt, seed=prompt_seed, styles=style, **shared) for prompt, style, prompt_seed in jobs
    ]
    return Samples(images, parameters)


def draw(
    pipeline: Pipeline, jobs: Sequence[tuple[str, Style, int]], batch_size: int, **options
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yields images (uint8) and latents of (prompt, style, seed) jobs, batch by batch.

    The last job fills up the last batch, so that all batches share one compiled program.

    Args:
      options: further arguments of the pipeline.
    """
    for start in range(0, len(jobs), batch_size):
        batch = list(jobs[start : start + batch_size])
        padded = batch + [batch[-1]] * (batch_size - len(batch))
        prompts, styles, seeds = map(list, zip(*padded, strict=True))
        latents = pipeline(prompts, styles=styles, seeds=seeds, output="latents", **options)
        yield np.asarray(pipeline.decode(latents, image_names(prompts, styles)))[: len(batch)], latents[: len(batch)]
