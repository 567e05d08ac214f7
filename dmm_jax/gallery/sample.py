"""`dmm-jax sample`: prompts down, styles across; PNGs with their parameters inside, a grid, an index page."""

import pathlib
import sys
from collections.abc import Iterator, Sequence

import jax
import numpy as np
from tqdm import tqdm

from dmm_jax.config.styles import Style, parse_style
from dmm_jax.data.prompts import read_prompts
from dmm_jax.gallery import images
from dmm_jax.pipeline import Pipeline
from dmm_jax.runtime.errors import UserError
from dmm_jax.runtime.storage import check_output


def sample(
    model: str,
    prompts: pathlib.Path,
    style: Sequence[str],
    out: pathlib.Path,
    base: str | None,
    negative_prompt: str | None,
    seed: int,
    steps: int,
    guidance_scale: float,
    solver: str,
    height: int,
    width: int,
    batch_size: int,
    dtype: str,
    extra_style: Sequence[pathlib.Path] = (),
    prediction_type: str = "",
) -> pathlib.Path:
    """Draws every prompt in every style and returns the path of the index page; arguments as on the command line.

    Raises:
      ValueError: the model, a style, the prompts or the output folder cannot be used.
    """
    out = check_output(out)
    lines = read_prompts(prompts)
    if batch_size < 1:
        raise UserError(f"batch_size must be at least 1; got {batch_size}.")
    dtype = dtype or ("float32" if jax.default_backend() == "cpu" else "bfloat16")
    source = {"base": base, "extra_styles": extra_style, "prediction_type": prediction_type}
    pipeline = Pipeline.from_pretrained(model, dtype=dtype, **source)
    for line in pipeline.source.loans:
        print(line, file=sys.stderr, flush=True)
    given = [parse_style(text, pipeline.schedule.num_train_timesteps) for text in style]
    styles: list[Style] = given or list(pipeline.styles) or [None]
    labels = list(style) or list(pipeline.styles) or [pipeline.name]
    # Unknown names, and schedules with gaps, are told before anything is drawn.
    pipeline.style_weights(styles, len(styles), timesteps=np.zeros(1))
    jobs = [(prompt, one, seed + row) for row, prompt in enumerate(lines) for one in styles]
    told = {"solver": solver, "guidance_scale": guidance_scale}
    options = told | {"num_inference_steps": steps, "height": height, "width": width}
    drawn = draw(pipeline, jobs, min(batch_size, len(jobs)), negative_prompts=negative_prompt, **options)
    pictures = np.concatenate([batch for batch, _ in tqdm(drawn, total=-(-len(jobs) // batch_size), disable=None)])
    told |= {"negative_prompt": negative_prompt or "", "steps": steps, "model": pipeline.name}
    told |= {"height": pictures.shape[1], "width": pictures.shape[2], "model_hash": pipeline.source.digest("unet")[:10]}
    parameters = [images.Parameters(prompt=prompt, seed=number, styles=one, **told) for prompt, one, number in jobs]
    return images.write_gallery(out, pictures, parameters, row_labels=lines, column_labels=labels)


def draw(
    pipeline: Pipeline, jobs: Sequence[tuple[str, Style, int]], batch_size: int, **options
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yields pictures uint8 and latents of (prompt, style, seed) jobs, batch by batch.

    The last batch is filled up, so that one compiled program serves all.
    """
    for first in range(0, len(jobs), batch_size):
        part = list(jobs[first : first + batch_size])
        full = part + [part[-1]] * (batch_size - len(part))
        prompts, styles, seeds = zip(*full, strict=True)
        latents = pipeline(list(prompts), styles=list(styles), seeds=list(seeds), output="latents", **options)
        yield np.asarray(pipeline.decode(latents))[: len(part)], latents[: len(part)]
