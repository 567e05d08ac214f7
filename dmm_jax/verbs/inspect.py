"""`dmm-jax inspect`: shows what checkpoints contain and whether they can be merged."""

import argparse
import json
import pathlib
import sys

from dmm_jax.verbs import options

EXAMPLES = (
    "dmm-jax inspect BASE A.safetensors B.safetensors",
    'dmm-jax inspect BASE "BASE + LORA.safetensors*0.8"',
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of the verb."""
    parser.add_argument(
        "checkpoints",
        nargs="+",
        type=pathlib.Path,
        metavar="CKPT",
        help="diffusers folders, .safetensors files, or hf:OWNER/NAME",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--deep", action="store_true", help="read large files completely: finds all damage, and hashes")
    parser.add_argument("--hash", action="store_true", help="also hash files above 3 GB")
    options.add_prediction_type(parser)


def main(args: argparse.Namespace) -> int:
    """Prints the report; returns 1 if the checkpoints cannot be merged, with the reasons on stderr next to JSON.

    A single sound adapter ends with 0, although it needs a base.
    """
    from dmm_jax.checkpoints.inspect import inspect
    from dmm_jax.checkpoints.inspect_text import render
    from dmm_jax.runtime.errors import visible

    report = inspect(args.checkpoints, args.deep, args.hash, args.prediction_type)
    print(json.dumps(report, indent=2) if args.json else visible(render(report)))
    if args.json and not report["sound"]:  # The text ends with them.
        for problem in report["obstacles"]:
            print(visible(f"dmm-jax inspect: error: {problem}"), file=sys.stderr)
    return 0 if report["sound"] else 1
