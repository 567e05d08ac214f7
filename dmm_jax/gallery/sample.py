"""Pictures of every prompt in every style, each with the parameters that draw it again."""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from jaxtyping import UInt8

from dmm_jax.config import arguments
from dmm_jax.config.styles import Style, image_names, style_text
from dmm_jax.diffusion import solvers
from dmm_jax.gallery.png import Parameters
from dmm_jax.pipeline import Pipeline


@dataclasses.dataclass(frozen=True)
class Sheet:
    """Every prompt in every style, with the options of drawing: one row per prompt, one column per style.

    Raises:
      UserError: a style or an option does not fit the pipeline. This comes before any drawing.

    Attributes:
      styles: names, mixes or schedules; empty: all styles of the pipeline, and none for a stock checkpoint.
      negative_prompt: for every picture; None is not the same as "" for Stable Diffusion XL.
      seed: the first prompt's; the next prompt has seed + 1. All styles share a prompt's seed.
      height, width: pixels; 0 is the size that the model was trained at.
      mixing: what of a mix is averaged, "rows" or "predictions", as `Pipeline` says.
      num_inference_steps, guidance_scale, guidance_rescale, solver: None is as `Pipeline.sampling` says.
      batch_size: images computed at once.
    """

    pipeline: Pipeline
    prompts: list[str]
    styles: list[Any]
    negative_prompt: str | None = None
    seed: int = 0
    height: int = 0
    width: int = 0
    num_inference_steps: int | None = None
    guidance_scale: float | None = None
    guidance_rescale: float | None = None
    solver: str | None = None
    mixing: str = "rows"
    batch_size: int = 8

    def __post_init__(self):
        arguments.whole_number("batch_size", self.batch_size, 1)
        object.__setattr__(self, "styles", self.styles or list(self.pipeline.styles) or [None])
        for name, value in self.pipeline.sampling.items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)
        self.pipeline.style_weights(self.styles, len(self.styles), timesteps=np.zeros(1))
        solvers.plan(self.solver, self.pipeline.schedule, self.num_inference_steps)

    @property
    def jobs(self) -> list[tuple[str, Style, int]]:
        """The prompt, style and seed of each picture, row after row."""
        return [(prompt, style, self.seed + row) for row, prompt in enumerate(self.prompts) for style in self.styles]

    @property
    def num_batches(self) -> int:
        """The number of batches in which all pictures are drawn."""
        return -(-len(self.prompts) * len(self.styles) // self.batch_size)

    def recipe(self) -> dict:
        """Returns what determines the pictures, ready for JSON."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)[1:]}
        pipeline = self.pipeline
        model = {"model": pipeline.name, "unet": pipeline.source.digest("unet"), "dtype": str(pipeline.dtype)}
        prompts = {"clip_skip": pipeline.source.clip_skip, "prompt_grammar": pipeline.prompt_grammar}
        return values | {"styles": [style_text(style) for style in self.styles]} | model | prompts


def draw_batches(
    sheet: Sheet, is_done: Callable[[range], bool] = lambda numbers: False
) -> Iterator[tuple[range, UInt8[np.ndarray, "n H W 3"], list[Parameters]]]:
    """Yields the pictures of a sheet batch by batch: their numbers, images, and parameters that draw each again.

    Args:
      is_done: tells whether the pictures of a batch exist; such a batch is left out, and the others do not change.
    """
    pipeline, jobs = sheet.pipeline, sheet.jobs
    shared = {
        "solver": sheet.solver,
        "guidance_scale": sheet.guidance_scale,
        "guidance_rescale": sheet.guidance_rescale,
        "mixing": sheet.mixing,
    }
    options = shared | {"num_chunks": pipeline.num_chunks([*sheet.prompts, sheet.negative_prompt])}
    options |= {"negative_prompts": sheet.negative_prompt, "num_inference_steps": sheet.num_inference_steps}
    options |= {"height": sheet.height, "width": sheet.width}
    shared |= {
        "negative_prompt": sheet.negative_prompt or "",
        "steps": sheet.num_inference_steps,
        "clip_skip": pipeline.source.clip_skip,
        "prompt_grammar": pipeline.prompt_grammar,
        "model": pipeline.name,
        "model_hash": pipeline.source.digest("unet")[:10],
    }
    size = min(sheet.batch_size, len(jobs))
    for start in range(0, len(jobs), size):
        numbers = range(start, min(start + size, len(jobs)))
        if is_done(numbers):
            continue
        batch = jobs[numbers.start : numbers.stop]
        ((images, _),) = draw(pipeline, batch, size, **options)
        sides = {"height": images.shape[1], "width": images.shape[2]}
        parameters = [
            Parameters(prompt=text, seed=seed, styles=style, **shared, **sides) for text, style, seed in batch
        ]
        yield numbers, images, parameters


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
