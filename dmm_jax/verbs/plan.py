"""`dmm-jax plan`: computes the memory, work, hours and chip-hours of a run, without its devices."""

import argparse
import json
import sys

from dmm_jax.config.files import read_config

EXAMPLES = (
    "dmm-jax plan --config=sd15 --topology gpu:1x80GB",
    "dmm-jax plan --config=sd15 --topology v5e:4x4 --config.mesh.teacher=8",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of the verb."""
    parser.add_argument(
        "--config", required=True, metavar="CONFIG", help="an experiment; its checkpoints need not exist"
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
    group = parser.add_mutually_exclusive_group()
    group.add_argument("--no-compile", action="store_true", help="estimate in seconds, even if libtpu is installed")
    group.add_argument("--full-effort", action="store_true", help="compile exactly as train does; takes longer")


def main(args: argparse.Namespace) -> int:
    """Prints the plan; returns 1 if it does not fit, with the smallest change that makes it fit."""
    from dmm_jax.planning.plan import plan, smallest_change
    from dmm_jax.planning.text import render

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


def _print_progress(line):
    print(line, file=sys.stderr, flush=True)
