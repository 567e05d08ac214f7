"""The verbs of the command line: of each its arguments, and the one function that they are given to.

What a verb needs is imported as it runs, so that `--help` and `inspect` start without JAX.
"""

import argparse
import dataclasses
import functools
import json
import pathlib
import sys
from collections.abc import Callable

from dmm_jax.config.files import read_config
from dmm_jax.config.options import DTYPES
from dmm_jax.runtime.errors import UserError
from dmm_jax.verbs import bench as bench_verb

EXIT_OK, EXIT_ERROR = 0, 1


@dataclasses.dataclass(frozen=True)
class Verb:
    """One verb; `run` is given the parsed arguments, and returns an exit code, or None for success."""

    name: str
    about: str
    add_arguments: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], int | None]
    takes_config: bool = False  # Whether --config.NAME=VALUE may follow: they are in `rest`.


def _demo_arguments(verb):
    verb.add_argument("--workdir", type=pathlib.Path, default=pathlib.Path("demo-run"), help="default: demo-run")
    verb.add_argument("--config", default="", help="an experiment file; default: the one that fits two CPU cores")


def _demo(args):
    from dmm_jax.verbs.demo import demo
    from dmm_jax.world import demo_config

    demo(args.workdir, _config(args.config or demo_config.__file__, args.rest))


def _inspect_arguments(verb):
    verb.add_argument(
        "checkpoints",
        nargs="+",
        type=pathlib.Path,
        metavar="CKPT",
        help="diffusers folders, .safetensors files, or hf:OWNER/NAME",
    )
    verb.add_argument("--json", action="store_true", help="print one JSON object")
    verb.add_argument("--deep", action="store_true", help="read large files whole, too: hashes, and all damage")
    verb.add_argument("--hash", action="store_true", help="hash files above 3 GB, too")
    _add_prediction_type(verb)


def _inspect(args):
    from dmm_jax.checkpoints.inspect import inspect, render

    report = inspect(args.checkpoints, args.deep, args.hash, args.prediction_type)
    print(json.dumps(report, indent=2) if args.json else render(report))
    for obstacle in report["obstacles"]:
        print(f"dmm-jax inspect: error: {obstacle}", file=sys.stderr)
    return EXIT_OK if report["mergeable"] else EXIT_ERROR


def _prepare_arguments(verb):
    verb.add_argument("--config", required=True, help="an experiment file, for example configs/sd15.py")


def _prepare(args):
    from dmm_jax.distill.teacher_samples import prepare_cache

    prepare_cache(_config(args.config, args.rest))


def _train_arguments(verb):
    verb.add_argument("--config", required=True, help="an experiment file; change an option by --config.NAME=VALUE")
    verb.add_argument("--workdir", required=True, type=pathlib.Path)
    several = verb.add_argument_group("one of several processes")
    several.add_argument("--distributed", action="store_true", help="ask the cluster (Cloud TPU, GKE, Slurm, Open MPI)")
    several.add_argument("--coordinator", metavar="HOST:PORT", help="of process 0, where there is no cluster to ask")
    several.add_argument("--num-processes", type=int, metavar="N")
    several.add_argument("--process-id", type=int, metavar="K", help="0 to N - 1")


def _train(args):
    from dmm_jax.runtime import processes

    try:
        with processes.stop_requests():  # First of all: importing and waiting for the others take their time.
            from dmm_jax.train import run

            with processes.joined(args.distributed, args.coordinator, args.num_processes, args.process_id):
                run(_config(args.config, args.rest), args.workdir)
    except processes.Preempted as stopped:
        print(f"dmm-jax train: {stopped} Run it again to go on.", file=sys.stderr)


def _plan_arguments(verb):
    verb.add_argument("--config", required=True, help="an experiment file; its checkpoints need not be there")
    verb.add_argument(
        "--topology",
        default="gpu:1x80GB",
        help="v5e:4x4, v5p:2x2x2, v5e:16x16*2 (two slices), gpu:8x80GB, ...; default: gpu:1x80GB",
    )
    verb.add_argument(
        "--architecture", default="sd15", choices=("sd15", "sd21", "sdxl"), help="of a base that is not there"
    )
    verb.add_argument("--json", action="store_true", help="print one JSON object")
    how = verb.add_mutually_exclusive_group()
    how.add_argument("--no-compile", action="store_true", help="estimate in seconds, even where libtpu is installed")
    how.add_argument("--full-effort", action="store_true", help="compile as train does: to the same code, more slowly")


def _plan(args):
    from dmm_jax.planning.plan import plan, smallest_change
    from dmm_jax.planning.text import render

    config = read_config(args.config, args.rest)
    options = {"architecture": args.architecture, "compiled": False if args.no_compile else None}
    options["full_effort"] = args.full_effort
    planned = plan(config, args.topology, **options)
    change = None if planned.fits else smallest_change(config, args.topology, say=_say, **options)
    if args.json:
        found = {"change": None, "changed": None} if change is None else {"change": change[0], "changed": change[1]}
        changed = found["changed"] and found["changed"].to_json()
        print(json.dumps(planned.to_json() | found | {"changed": changed}, indent=2))
    else:
        print(render(planned), end="")
    if planned.fits:
        return EXIT_OK
    _say(f"It fits with {change[0]}" if change else "Nothing that was tried makes it fit: use a larger device.")
    return EXIT_ERROR


def _say(line):
    print(line, file=sys.stderr, flush=True)


def _export_arguments(verb):
    verb.add_argument("workdir", type=pathlib.Path, metavar="WORKDIR")
    verb.add_argument(
        "out", type=pathlib.Path, metavar="OUT", help="a new or empty folder; each format gets a place in it"
    )
    verb.add_argument("--format", required=True, help="comma list of dmm, diffusers, single-file, style-lora")
    verb.add_argument("--style", default="", help='to fold in: NAME, or a mix such as "anime=0.7,photo=0.3"')
    verb.add_argument(
        "--keep",
        action="append",
        default=[],
        metavar="STYLE",
        help="NAME, or NEW_NAME=NAME; repeat for each style that is exported, in this order; default: all",
    )
    verb.add_argument(
        "--extra-style", action="append", default=[], type=pathlib.Path, metavar="FILE", help="of fit-style; repeat"
    )
    verb.add_argument("--dtype", default="float16", choices=("float32", "float16", "bfloat16"))
    verb.add_argument(
        "--lora-base",
        default="",
        help="NAME or mix of the export that style-lora is used on; default: equal parts",
    )
    verb.add_argument("--lora-for", default="comfyui", help="comma list of comfyui, diffusers, a1111 (adds 3.3 MB)")
    verb.add_argument("--no-recipe", action="store_true", help="leave the recipe out of the files' metadata")
    verb.add_argument("--verify", action="store_true", help="compare with stock diffusers; needs the [torch] extra")


def _export(args):
    from dmm_jax.checkpoints.export import export, open_student

    formats = list(dict.fromkeys(args.format.split(",")))
    if args.verify and "single-file" in formats and "diffusers" not in formats:
        raise UserError("--verify reads a single file beside a diffusers folder: add diffusers to --format.")

    paths = export(
        args.workdir,
        args.out,
        formats,
        args.style,
        args.dtype,
        recipe=not args.no_recipe,
        keep=args.keep,
        lora_base=args.lora_base,
        lora_for=args.lora_for.split(","),
        extra_styles=args.extra_style,
    )
    if args.verify:
        from dmm_jax.evaluation.verify import verify_export

        student = open_student(args.workdir, args.extra_style, args.keep)
        print("\n".join(verify_export(student, dict(zip(formats, paths, strict=True)), args.dtype)))
    print("\n".join(map(str, paths)))


def _average_arguments(verb):
    verb.add_argument("out", type=pathlib.Path, metavar="OUT", help="a new NAME.safetensors, or a new diffusers folder")
    verb.add_argument("--base", required=True, type=pathlib.Path, help="the ancestor; what is not merged is its")
    verb.add_argument("--teachers", required=True, nargs="+", type=pathlib.Path, metavar="CKPT")
    verb.add_argument("--method", required=True, choices=("average", "task_arithmetic", "ties", "dare"))
    verb.add_argument("--components", default="unet,text_encoder", help="what is merged; default: %(default)s")
    verb.add_argument("--weights", nargs="+", type=float, metavar="W", help="one a teacher; default: all 1")
    verb.add_argument("--scale", type=float, help="times the merged difference; default: 1 for ties, else 0.4")
    verb.add_argument("--density", type=float, help="share of a difference that stays; default: ties 0.2, dare 0.1")
    verb.add_argument("--seed", type=int, help="of what dare drops; default: 0")
    _add_prediction_type(verb)
    verb.add_argument("--dtype", default="float16", choices=("float32", "float16", "bfloat16"))


def _average(args):
    from dmm_jax.checkpoints.average import average

    print(average(**_options(args)))


def _options(args) -> dict:
    return {name: value for name, value in vars(args).items() if name not in ("verb", "run", "takes_config", "rest")}


def _fit_style_arguments(verb):
    verb.add_argument("model", metavar="MODEL", help="a merged model: a workdir or a DMM folder")
    verb.add_argument("--images", required=True, type=pathlib.Path, help="a folder of images with captions")
    verb.add_argument("--name", required=True, help="of the new style")
    verb.add_argument("--out", required=True, type=pathlib.Path, metavar="FILE", help="a new .safetensors file")
    verb.add_argument("--base", default=None, help="another checkpoint, for what MODEL lacks")
    verb.add_argument("--from", dest="start", default="", help="NAME or mix to start from; default: equal parts")
    verb.add_argument("--mix-only", action="store_true", help="learn the weights of a mix of existing styles alone")
    verb.add_argument("--steps", type=int, default=500)
    verb.add_argument("--batch-size", type=int, default=8)
    verb.add_argument("--learning-rate", type=float, default=0.03, help="of AdamW, falling to 0 as a cosine")
    verb.add_argument("--prompt-dropout", type=float, default=0.1)
    verb.add_argument("--resolution", type=int, default=0, help="pixels of a side; default: the model's")
    verb.add_argument("--seed", type=int, default=0)
    verb.add_argument("--dtype", default="", choices=DTYPES, help="default: bfloat16 on accelerators, float32 on CPUs")


def _fit_style(args):
    from dmm_jax.distill.fit_style import fit_style, report

    _keep_programs()
    print(report(fit_style(**_options(args))))


def _sample_arguments(verb):
    verb.add_argument("model", metavar="MODEL", help="a workdir, a diffusers or DMM folder, or a single file")
    verb.add_argument("--prompts", required=True, type=pathlib.Path, help="a text file, one prompt a line")
    verb.add_argument(
        "--style",
        action="append",
        default=[],
        help="NAME, mix, or schedule: photo:600:anime is photo down to timestep 600, then anime; photo:800-400:anime "
        "fades; repeat for a column each; default: all styles",
    )
    verb.add_argument(
        "--extra-style", action="append", default=[], type=pathlib.Path, metavar="FILE", help="of fit-style; repeat"
    )
    verb.add_argument("--out", required=True, type=pathlib.Path, help="a new or empty folder")
    verb.add_argument("--base", default=None, help="another checkpoint, for what a single file lacks (VAE, tokenizer)")
    _add_prediction_type(verb)
    verb.add_argument("--negative-prompt", default=None, help="default: none, which for SDXL is not the same as ''")
    verb.add_argument(
        "--seed", type=int, default=0, help="of the first prompt; the next has seed + 1; equal across styles"
    )
    verb.add_argument("--steps", type=int, default=25)
    verb.add_argument("--guidance-scale", type=float, default=7.0)
    verb.add_argument("--solver", default="dpmpp_2m")
    verb.add_argument("--height", type=int, default=0, help="pixels; default: the model's")
    verb.add_argument("--width", type=int, default=0)
    verb.add_argument("--batch-size", type=int, default=8, help="images computed at once")
    verb.add_argument("--dtype", default="", choices=DTYPES, help="default: bfloat16 on accelerators, float32 on CPUs")


def _sample(args):
    from tqdm import tqdm

    from dmm_jax.config.styles import parse_style
    from dmm_jax.data.prompts import read_prompts
    from dmm_jax.gallery.gallery import write_gallery
    from dmm_jax.gallery.sample import sample
    from dmm_jax.pipeline import Pipeline, default_dtype
    from dmm_jax.runtime.storage import check_output

    check_output(args.out)
    prompts = read_prompts(args.prompts)
    _keep_programs()
    pipeline = Pipeline.from_pretrained(
        args.model,
        dtype=args.dtype or default_dtype(),
        base=args.base,
        extra_styles=args.extra_style,
        prediction_type=args.prediction_type,
    )
    for line in pipeline.source.loans:
        _say(line)
    samples = sample(
        pipeline,
        prompts,
        [parse_style(text, pipeline.schedule.num_train_timesteps) for text in args.style],
        negative_prompt=args.negative_prompt,
        seed=args.seed,
        height=args.height,
        width=args.width,
        num_inference_steps=args.steps,
        guidance_scale=args.guidance_scale,
        solver=args.solver,
        batch_size=args.batch_size,
        progress=functools.partial(tqdm, disable=None),
    )
    labels = args.style or list(pipeline.styles) or [pipeline.name]
    print(write_gallery(args.out, *samples, row_labels=prompts, column_labels=labels))


def _evaluate_arguments(verb):
    verb.add_argument("workdir", type=pathlib.Path, metavar="WORKDIR")
    verb.add_argument(
        "--n",
        dest="num_images",
        type=int,
        default=0,
        help="images per style and model, at least 2; default: the config's",
    )
    verb.add_argument(
        "--prompts",
        default="",
        metavar="FILE",
        help="one a line; default: the config's, or what the run was trained on",
    )
    verb.add_argument("--negative-prompt", default="", help="of every picture; default: the config's")
    verb.add_argument(
        "--features",
        default="shapes",
        help="shapes (the embedded world's, default), inception:PATH or clean-inception:PATH (FID's weights), "
        "clip:PATH (a CLIP's folder: CMMD of ViT-L/14 at 336 pixels, else MMD)",
    )
    verb.add_argument("--clip", dest="clip_folder", default="", metavar="PATH", help="a CLIP's folder: adds CLIPScore")
    verb.add_argument(
        "--lpips", dest="lpips_file", default="", metavar="PATH", help="LPIPS's weights: adds it to the fidelity"
    )


def _evaluate(args):
    from dmm_jax.evaluation.evaluate import evaluate

    _keep_programs()
    print(evaluate(**_options(args)))


def _add_prediction_type(verb):
    kinds = ("epsilon", "v_prediction")
    verb.add_argument("--prediction-type", default="", choices=kinds, help="of single files that do not say it")


def _keep_programs(folder=""):
    from dmm_jax.runtime import compilation

    compilation.keep(folder)


def _config(path, overrides):
    from dmm_jax.verbs import experiment

    return experiment.read(path, overrides)


VERBS = (
    Verb(
        "demo", "the whole road on the embedded world, to report/index.html", _demo_arguments, _demo, takes_config=True
    ),
    Verb("inspect", "what checkpoints hold, and whether they can be merged", _inspect_arguments, _inspect),
    Verb(
        "prepare",
        "images and captions to a cache of latents and token ids",
        _prepare_arguments,
        _prepare,
        takes_config=True,
    ),
    Verb(
        "train",
        "distil the teachers into one student; goes on where it stopped",
        _train_arguments,
        _train,
        takes_config=True,
    ),
    Verb(
        "plan",
        "memory, work, hours and chip-hours of a run, without its devices",
        _plan_arguments,
        _plan,
        takes_config=True,
    ),
    Verb("export", "a trained student as PyTorch safetensors", _export_arguments, _export),
    Verb(
        "average", "a weight average of checkpoints as one stock checkpoint; no training", _average_arguments, _average
    ),
    Verb(
        "fit-style",
        "one new style vector from a handful of images; all else is frozen",
        _fit_style_arguments,
        _fit_style,
    ),
    Verb("sample", "draw prompts in styles: PNGs, grid.png, index.html", _sample_arguments, _sample),
    Verb(
        "evaluate", "fidelity, the style matrix, FD or FID: metrics.json and a report", _evaluate_arguments, _evaluate
    ),
    Verb(
        "bench",
        "images/s and TFLOP/s on random data, beside the device's peak",
        bench_verb.add_arguments,
        bench_verb.run,
        takes_config=True,
    ),
)
