"""`dmm-jax verify`: compares an export with stock diffusers, and with the student that it was made from."""

import argparse
import pathlib

EXAMPLES = ("dmm-jax verify exported", "dmm-jax verify exported --against runs/sd15")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of the verb."""
    parser.add_argument("folder", type=pathlib.Path, metavar="FOLDER", help="what `dmm-jax export` wrote")
    parser.add_argument(
        "--against",
        default="",
        metavar="MODEL",
        help="the student of the export: compares the tensors of a DMM folder bit for bit; default: none",
    )


def main(args: argparse.Namespace) -> None:
    """Prints one line per file that agrees; raises an error that names those that do not."""
    from dmm_jax.evaluation.verify_export import verify_folder
    from dmm_jax.runtime import compilation
    from dmm_jax.runtime.processes import say

    compilation.use_cache()
    say(f"Comparing {args.folder} with stock diffusers")
    print("\n".join(verify_folder(args.folder, args.against)))
