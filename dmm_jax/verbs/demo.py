"""`dmm-jax demo`: every step on the embedded world, from inspecting checkpoints to the report."""

import argparse
import contextlib
import pathlib
import shutil
import time

from dmm_jax.runtime.terminal import table
from dmm_jax.verbs import options

MIX = "comic=0.5,neon=0.5"
EVALUATION = {"num_images": 200, "num_inference_steps": 8, "weight_merges": ("average", "ties")}
EXAMPLES = (
    "dmm-jax demo",
    "dmm-jax demo --workdir demo-gpu --config=demo_gpu",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of the verb."""
    parser.add_argument(
        "--workdir", type=pathlib.Path, default=pathlib.Path("demo-run"), metavar="FOLDER", help="for all files"
    )
    parser.add_argument("--config", default="", help="an experiment file; default: one that fits two CPU cores")


def main(args: argparse.Namespace) -> None:
    """Inspects, prepares, trains, exports, samples and evaluates in the workdir; resumes a demo that was stopped."""
    from dmm_jax import train
    from dmm_jax.checkpoints.export import export
    from dmm_jax.checkpoints.inspect import inspect
    from dmm_jax.checkpoints.inspect_text import render
    from dmm_jax.config import checks
    from dmm_jax.data.prepare import prepare_images
    from dmm_jax.evaluation.evaluate import evaluate
    from dmm_jax.evaluation.options import Options
    from dmm_jax.runtime.processes import say
    from dmm_jax.runtime.storage import check_output
    from dmm_jax.world import demo_config

    config = options.read_experiment(args.config or demo_config.__file__, args.overrides)
    workdir = args.workdir
    if not (workdir / "config.json").is_file() and not (workdir / "cache").is_dir():
        check_output(workdir)
    config.data.cache = str(workdir / "cache")
    checks.check(config)
    with _step("Inspect: one base and five fine-tuned teachers, one of them a LoRA, in formats found in the wild"):
        print(render(inspect([pathlib.Path(config.base), *(pathlib.Path(path) for _, path in config.teachers)])))
    with _step("Prepare: pictures and captions become latents and token ids"):
        prepare_images(config)
    with _step("Merge: distil the teachers into one student with one style vector per teacher"):
        train.run(config, workdir)
    with _step(f"Export: DMM folder, stock diffusers folder, stock single file (style {MIX})"):
        shutil.rmtree(workdir / "export", ignore_errors=True)
        for path in export(workdir, workdir / "export", ("dmm", "diffusers", "single-file"), MIX):
            print(path)
    with _step("Sample: every style, and a mix, in one batch"):
        shutil.rmtree(workdir / "samples" / "gallery", ignore_errors=True)
        print(_sample(config, workdir))
    with _step("Evaluate: compare the student with its teachers, the base and merged weights"):
        evaluation = evaluate(workdir, Options(**EVALUATION))
    say(f"\n{_numbers(evaluation.results)}\n\nOpen {evaluation.page}\n\nNext:")
    say(f'  dmm-jax sample {workdir} --prompt "a small blue star" --style "{MIX}" --out pictures')
    say(f"  dmm-jax evaluate {workdir} --n 2000")
    say("  dmm-jax config sd15")


def _numbers(results) -> str:
    """Returns a table of the distance to each teacher, and how much of the way from the base the student comes."""
    rows = [("style", "base", "average", "student", "floor", "gap closed")]
    for k, name in enumerate(results["styles"]):
        distances = (results["base"][k], results["average"][k], results["matrix"][k][k], results["floor"][k])
        closed = results["gap_closed"][k]
        rows.append((name, *(f"{distance:.2f}" for distance in distances), f"{closed:.0%}" if closed else "-"))
    return f"{results['distance']} to each teacher; smaller is nearer\n{table(rows)}"


def _sample(config, workdir: pathlib.Path) -> pathlib.Path:
    from dmm_jax.config.options import solver_options
    from dmm_jax.config.styles import parse_style
    from dmm_jax.gallery.gallery import write_gallery
    from dmm_jax.pipeline import Pipeline, default_dtype

    prompts, styles = list(config.samples.prompts), [*(name for name, _ in config.teachers), MIX]
    pipeline = Pipeline.from_pretrained(workdir / "export" / "dmm", dtype=default_dtype())
    options = solver_options(config) | {"negative_prompt": "", "batch_size": len(styles) * len(prompts)}
    return write_gallery(pipeline, workdir / "samples" / "gallery", prompts, list(map(parse_style, styles)), **options)


@contextlib.contextmanager
def _step(title: str):
    from dmm_jax.runtime.processes import say

    say(f"\n== {title}")
    start = time.perf_counter()
    yield
    say(f"   {time.perf_counter() - start:.0f} s")
