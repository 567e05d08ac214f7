"""The command line: `dmm-jax VERB`. Arguments in, one function called, errors as one line and an exit code."""

import argparse
import contextlib
import itertools
import json
import pathlib
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence

from dmm_jax.config import DTYPES
from dmm_jax.config_files import UsageError, read_config

EXIT_OK, EXIT_ERROR, EXIT_USAGE, EXIT_INTERRUPTED = 0, 1, 2, 130


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one verb; returns 0 for success, 1 for an error said on stderr, 2 for wrong usage, 130 for Ctrl-C."""
    parser = build_parser()
    args, rest = parser.parse_known_args(sys.argv[1:] if argv is None else list(argv))
    if rest and not args.takes_config:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    args.rest = rest
    with _plainly_said(args.verb):
        try:
            return args.run(args) or EXIT_OK
        except KeyboardInterrupt:
            print(f"dmm-jax {args.verb}: interrupted", file=sys.stderr)
            return EXIT_INTERRUPTED
        except Exception as error:
            if (said := _message(error)) is None:
                raise  # A fault of ours, which its traceback tells best.
            print(f"dmm-jax {args.verb}: error: {said}", file=sys.stderr)
            return EXIT_USAGE if isinstance(error, UsageError) else EXIT_ERROR


def _message(error) -> str | None:
    """Returns what is said of an error that has its cause in what was given, or on the machine; None of any other."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    if isinstance(error, (ValueError, OSError, FloatingPointError)):
        return str(error)
    first = " ".join((str(error).splitlines() or [""])[0].split())
    if isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error):
        return f"out of memory: {first[:300]} Compute fewer images at once (batch size), or smaller ones."
    if type(error).__name__ == "JaxRuntimeError":
        return f"the device cannot go on: {first[:300]}"
    return None


@contextlib.contextmanager
def _plainly_said(verb: str) -> Iterator[None]:
    """Says warnings in one line, without the code that gave them; leaves out a line of Orbax's that means nothing."""
    from absl import logging as absl_logging

    absl_logging.get_absl_logger().addFilter(_is_worth_saying)
    with warnings.catch_warnings():
        other = warnings.showwarning

        def show(message, category, *where, **more):
            if issubclass(category, UserWarning):
                print(f"dmm-jax {verb}: warning: {message}", file=sys.stderr, flush=True)
            else:
                other(message, category, *where, **more)

        warnings.showwarning = show
        yield


def _is_worth_saying(record) -> bool:
    return "Metadata file does not exist" not in record.getMessage()


def build_parser() -> argparse.ArgumentParser:
    """Describes every verb and its arguments."""
    parser = argparse.ArgumentParser(
        prog="dmm-jax", description="Merge Stable Diffusion checkpoints by distillation, in JAX."
    )
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")

    verb = _add(verbs, "demo", _demo, "the whole road on the embedded world, to report/index.html", takes_config=True)
    verb.add_argument("--workdir", type=pathlib.Path, default=pathlib.Path("demo-run"), help="default: demo-run")
    verb.add_argument("--config", default="", help="an experiment file; default: the one that fits two CPU cores")

    verb = _add(verbs, "inspect", _inspect, "what checkpoints hold, and whether they can be merged")
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

    verb = _add(
        verbs, "prepare", _prepare, "images and captions to a cache of latents and token ids", takes_config=True
    )
    verb.add_argument("--config", required=True, help="an experiment file, for example configs/sd15.py")

    verb = _add(
        verbs, "train", _train, "distil the teachers into one student; goes on where it stopped", takes_config=True
    )
    verb.add_argument("--config", required=True, help="an experiment file; change an option by --config.NAME=VALUE")
    verb.add_argument("--workdir", required=True, type=pathlib.Path)
    several = verb.add_argument_group("one of several processes")
    several.add_argument("--distributed", action="store_true", help="ask the cluster (Cloud TPU, GKE, Slurm, Open MPI)")
    several.add_argument("--coordinator", metavar="HOST:PORT", help="of process 0, where there is no cluster to ask")
    several.add_argument("--num-processes", type=int, metavar="N")
    several.add_argument("--process-id", type=int, metavar="K", help="0 to N - 1")

    verb = _add(
        verbs, "plan", _plan, "memory, work, hours and chip-hours of a run, without its devices", takes_config=True
    )
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

    verb = _add(verbs, "export", _export, "a trained student as PyTorch safetensors")
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

    verb = _add(verbs, "average", _average, "a weight average of checkpoints as one stock checkpoint; no training")
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

    verb = _add(verbs, "fit-style", _fit_style, "one new style vector from a handful of images; all else is frozen")
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

    verb = _add(verbs, "sample", _sample, "draw prompts in styles: PNGs, grid.png, index.html")
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

    verb = _add(verbs, "evaluate", _evaluate, "fidelity, the style matrix, FD or FID: metrics.json and a report")
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

    verb = _add(
        verbs, "bench", _bench, "images/s and TFLOP/s on random data, beside the device's peak", takes_config=True
    )
    verb.add_argument(
        "job",
        choices=("train", "sample", "host", "fid", "numerics", "scaling"),
        help="host: what a step costs it alone; numerics: errors against float32; scaling: train on 1, 2, 4, ... "
        "devices, divided in every way",
    )
    verb.add_argument(
        "--config", default="", help="an experiment file; default: batch 48, for scaling on each device; eight teachers"
    )
    verb.add_argument(
        "--devices", type=integers, default=[], metavar="N", help="train: on the first N; scaling: on each of 1,2,4,8"
    )
    verb.add_argument("--results", default="", metavar="FILE", help="scaling: rows kept here are not measured again")
    verb.add_argument("--figure", type=pathlib.Path, metavar="PNG", help="scaling: draw it; NAME_dark, too")
    verb.add_argument("--size", default="sd15", help="of the networks: sd15, sd21, sdxl, tiny, narrow")
    verb.add_argument("--num-steps", type=int, default=10, help="timed steps; the median counts")
    verb.add_argument("--batch-size", type=int, default=16, help="images at once, for sample; train has the config's")
    verb.add_argument("--against", choices=("torch",), help="also run the PyTorch peer here; needs the [torch] extra")
    verb.add_argument("--profile", default="", help="a folder for a trace; its kernels are summed up on stderr")
    verb.add_argument("--json", action="store_true", help="print one JSON object a line")
    return parser


def _add(verbs, name: str, run: Callable, about: str, takes_config: bool = False) -> argparse.ArgumentParser:
    verb = verbs.add_parser(name, help=about, description=about)
    verb.set_defaults(run=run, takes_config=takes_config)
    return verb


def _add_prediction_type(verb):
    kinds = ("epsilon", "v_prediction")
    verb.add_argument("--prediction-type", default="", choices=kinds, help="of single files that do not say it")


def _demo(args):
    from dmm_jax.demo import experiment
    from dmm_jax.demo.run import demo

    demo(args.workdir, _config(args.config or experiment.__file__, args.rest))


def _inspect(args):
    from dmm_jax.checkpoints.inspect import inspect, render

    report = inspect(args.checkpoints, args.deep, args.hash, args.prediction_type)
    print(json.dumps(report, indent=2) if args.json else render(report))
    for obstacle in report["obstacles"]:
        print(f"dmm-jax inspect: error: {obstacle}", file=sys.stderr)
    return EXIT_OK if report["mergeable"] else EXIT_ERROR


def _prepare(args):
    from dmm_jax.prepare import prepare_from_config

    prepare_from_config(_config(args.config, args.rest))


def _train(args):
    from dmm_jax import processes

    try:
        with processes.stop_requests():  # First of all: importing and waiting for the others take their time.
            from dmm_jax.train import run

            with processes.joined(args.distributed, args.coordinator, args.num_processes, args.process_id):
                run(_config(args.config, args.rest), args.workdir)
    except processes.Preempted as stopped:
        print(f"dmm-jax train: {stopped} Run it again to go on.", file=sys.stderr)


def _plan(args):
    from dmm_jax.plan import plan, smallest_change
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


def _export(args):
    from dmm_jax.export import export_workdir

    paths = export_workdir(
        args.workdir,
        args.out,
        args.format.split(","),
        args.style,
        args.dtype,
        recipe=not args.no_recipe,
        verify=args.verify,
        keep=args.keep,
        lora_base=args.lora_base,
        lora_for=args.lora_for.split(","),
        extra_styles=args.extra_style,
    )
    print("\n".join(map(str, paths)))


def _average(args):
    from dmm_jax.average import average

    print(average(**_options(args)))


def _sample(args):
    from dmm_jax.sample import sample

    _keep_programs()
    print(sample(**_options(args)))


def _fit_style(args):
    from dmm_jax.fit_style import fit_style, report

    _keep_programs()
    print(report(fit_style(**_options(args))))


def _options(args) -> dict:
    return {name: value for name, value in vars(args).items() if name not in ("verb", "run", "takes_config", "rest")}


def _evaluate(args):
    from dmm_jax.evaluation.evaluate import evaluate

    _keep_programs()
    print(evaluate(**_options(args)))


def integers(text):
    return [int(part) for part in text.split(",")]


def _bench(args):
    from dmm_jax import arguments, bench

    config = _config(args.config or bench.__file__, args.rest)
    arguments.whole("--num-steps", args.num_steps, 1)
    arguments.whole("--batch-size", args.batch_size, 1)
    if args.against and args.job not in ("train", "sample"):
        raise ValueError(f"--against is for `bench train` and `bench sample`; PyTorch has no peer of `{args.job}`.")
    if args.job == "scaling":
        return _bench_scaling(args, config)
    if len(args.devices) > 1:
        raise ValueError(f"--devices of `{args.job}` is one number; `bench scaling` takes several.")
    batch_size = config.batch_size if args.job == "train" else args.batch_size
    others = bench.peer(args.job, args.size, batch_size, args.num_steps, len(config.teachers)) if args.against else []
    measured = bench.bench(
        args.job, config, args.size, args.num_steps, args.batch_size, args.profile, sum(args.devices)
    )
    lines = []
    for line in itertools.chain(others, bench.with_ratios(measured, others) if others else measured):
        lines.append(line)
        if args.json:
            print(json.dumps(line), flush=True)
    if not args.json:
        print(bench.table(lines))


def _bench_scaling(args, config):
    from dmm_jax import bench, bench_scaling

    def say(row):
        print(json.dumps(row), file=sys.stdout if args.json else sys.stderr, flush=True)

    options = {"profile": args.profile, "results": args.results, "say": say}
    rows = bench_scaling.scaling(config, args.size, args.num_steps, args.devices, **options)
    if not args.json:
        print(bench.table(rows, bench_scaling.COLUMNS))
    if args.figure:
        bench_scaling.write_figure(rows, args.figure)
    return EXIT_ERROR if all("failed" in row for row in rows) else EXIT_OK


def _keep_programs(folder=""):
    from dmm_jax import compilation

    compilation.keep(folder)


def _config(path, overrides):
    config = read_config(path, overrides)
    _keep_programs(config.compilation_cache)
    return config


if __name__ == "__main__":
    sys.exit(main())
