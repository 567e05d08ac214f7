"""`dmm-jax demo`: the whole road on the embedded world, each stretch by the function behind its own verb."""

import contextlib
import pathlib
import shutil
import sys
import time

from dmm_jax import train
from dmm_jax.checkpoints.export import export
from dmm_jax.checkpoints.inspect import inspect, render
from dmm_jax.config import checks
from dmm_jax.config.styles import parse_style
from dmm_jax.data.prepare import prepare_images
from dmm_jax.evaluation.evaluate import evaluate
from dmm_jax.gallery.gallery import write_gallery
from dmm_jax.gallery.sample import sample
from dmm_jax.pipeline import Pipeline, default_dtype
from dmm_jax.runtime.storage import check_output

MIX = "comic=0.5,neon=0.5"


def demo(workdir: pathlib.Path, config) -> pathlib.Path:
    """Inspects, merges, evaluates, exports and samples below `workdir`; returns the path of the report's page.

    A demo that was broken off goes on where it stopped.

    Raises:
      ValueError: the workdir holds something else.
    """
    workdir = pathlib.Path(workdir)
    if not (workdir / "config.json").is_file() and not (workdir / "cache").is_dir():
        check_output(workdir)
    config.data.cache = str(workdir / "cache")
    checks.check(config)
    with _stretch("Inspect: one base, five fine-tuned teachers, one of them a LoRA, in the formats found in the wild"):
        print(render(inspect([pathlib.Path(config.base), *(pathlib.Path(path) for _, path in config.teachers)])))
    with _stretch("Prepare: pictures and captions to latents and token ids"):
        prepare_images(config)
    with _stretch("Merge: distil the teachers into one student with a style vector each"):
        train.run(config, workdir)
    with _stretch("Evaluate: student against teachers, base and merged weights"):
        page = evaluate(workdir)
    with _stretch(f"Export: DMM folder, stock diffusers folder, stock single file (style {MIX})"):
        shutil.rmtree(workdir / "export", ignore_errors=True)
        for path in export(workdir, workdir / "export", ("dmm", "diffusers", "single-file"), MIX):
            print(path)
    with _stretch("Sample: every style, and a mix, in one batch"):
        shutil.rmtree(workdir / "samples" / "gallery", ignore_errors=True)
        print(_sample(config, workdir))
    print(f"\nOpen {page}", file=sys.stderr)
    return page


def _sample(config, workdir: pathlib.Path) -> pathlib.Path:
    prompts, styles = list(config.samples.prompts), [*(name for name, _ in config.teachers), MIX]
    pipeline = Pipeline.from_pretrained(workdir / "export" / "dmm", dtype=default_dtype())
    samples = sample(
        pipeline,
        prompts,
        list(map(parse_style, styles)),
        negative_prompt="",
        num_inference_steps=config.samples.num_inference_steps,
        guidance_scale=config.samples.guidance_scale,
        solver=config.samples.solver,
        batch_size=len(styles) * len(prompts),
    )
    return write_gallery(workdir / "samples" / "gallery", *samples, row_labels=prompts, column_labels=styles)


@contextlib.contextmanager
def _stretch(title: str):
    print(f"\n== {title}", file=sys.stderr, flush=True)
    started = time.perf_counter()
    yield
    print(f"   {time.perf_counter() - started:.0f} s", file=sys.stderr, flush=True)
