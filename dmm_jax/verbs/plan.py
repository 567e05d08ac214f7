"""`dmm-jax plan`: computes the memory, work, hours and chip-hours of a run or a server, without its devices."""

import argparse
import json
import pathlib
import sys

from dmm_jax.config.files import read_config
from dmm_jax.runtime.errors import UsageError
from dmm_jax.verbs.serve import parse_sizes

EXAMPLES = (
    "dmm-jax plan --config=sd15 --topology gpu:1x80GB",
    "dmm-jax plan --config=sd15 --topology v5e:4x4 --config.mesh.teacher=8",
    "dmm-jax plan --serve sd15 --topology gpu:1x24GB --sizes 512x512,768x512 --slots 16",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of the verb."""
    subject = parser.add_mutually_exclusive_group(required=True)
    subject.add_argument(
        "--config", metavar="CONFIG", help="an experiment; its checkpoints need not exist (no default)"
    )
    subject.add_argument(
        "--serve", metavar="MODEL", help="a server instead of a run: a checkpoint, or sd15, sd21, sdxl (no default)"
    )
    parser.add_argument(
        "--topology",
        default="gpu:1x80GB",
        help="v5e:4x4, v5p:2x2x2, v5e:16x16*2 (two slices), gpu:8x80GB, gpu:1xH200, ... (`dmm-jax list devices`)",
    )
    parser.add_argument(
        "--architecture", default="sd15", choices=("sd15", "sd21", "sdxl"), help="if the base does not exist"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    server = parser.add_argument_group("a server")
    server.add_argument("--sizes", default="", metavar="WxH,...", help="as of serve; default: the model's")
    server.add_argument("--slots", type=int, default=8, help="as of serve")
    server.add_argument("--styles", type=int, default=8, help="of a model given by name; 0: a stock one")
    server.add_argument("--steps", type=int, default=25, help="of an image, for images/s")
    server.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"), help="of the arithmetic")
    group = parser.add_mutually_exclusive_group()
    group.add_argument("--no-compile", action="store_true", help="estimate in seconds, even if libtpu is installed")
    group.add_argument("--full-effort", action="store_true", help="compile exactly as train does; takes longer")


def main(args: argparse.Namespace) -> int:
    """Prints the plan; returns 1 if it does not fit, with the smallest change that makes it fit."""
    from dmm_jax.planning.plan import plan, smallest_change
    from dmm_jax.planning.text import render

    if args.serve:
        return _plan_server(args)
    config = read_config(args.config, args.overrides)
    compiled = False if args.no_compile else None  # None: if libtpu is installed.
    options = {"architecture": args.architecture, "compiled": compiled, "full_effort": args.full_effort}
    planned = plan(config, args.topology, **options)
    change = None if planned.fits else smallest_change(config, args.topology, say=_print_progress, **options)
    command, changed_plan = change or (None, None)
    if args.json:
        changed = {"change": command, "changed": changed_plan and changed_plan.to_json()}
        print(json.dumps(planned.to_json() | changed, indent=2))
    else:
        print(render(planned), end="")
    if planned.fits:
        return 0
    _print_progress(
        f"It fits with {command}" if change else "No change that was tried makes it fit: use a larger device."
    )
    return 1


def _plan_server(args: argparse.Namespace) -> int:
    from dmm_jax.checkpoints import published
    from dmm_jax.checkpoints.open import open_checkpoint
    from dmm_jax.planning import serving
    from dmm_jax.planning.text import render_server

    if args.overrides or args.full_effort:
        raise UsageError("--serve takes neither options of a config nor --full-effort.")
    named = args.serve in published.CONFIGS and not pathlib.Path(args.serve).exists()
    checkpoint = published.checkpoint(args.serve) if named else open_checkpoint(args.serve)
    planned = serving.plan(
        checkpoint,
        args.topology,
        parse_sizes(args.sizes),
        args.slots,
        num_styles=args.styles if named else 0,
        num_steps=args.steps,
        dtype=args.dtype,
        compiled=False if args.no_compile else None,
    )
    print(json.dumps(planned.to_json(), indent=2) if args.json else render_server(planned), end="\n" * args.json)
    if not planned.fits:
        _print_progress("It does not fit: take fewer --slots, fewer or smaller --sizes, or a larger device.")
    return int(not planned.fits)


def _print_progress(line):
    print(line, file=sys.stderr, flush=True)
