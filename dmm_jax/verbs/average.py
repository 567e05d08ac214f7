"""`dmm-jax average`: writes a weight average of checkpoints as one stock checkpoint, without training."""

import argparse
import pathlib

from dmm_jax.verbs import options

EXAMPLES = ("dmm-jax average out.safetensors --base BASE --teachers A.safetensors B.safetensors --method ties",)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of the verb."""
    parser.add_argument("out", type=pathlib.Path, metavar="OUT", help="a new NAME.safetensors, or a new folder")
    parser.add_argument(
        "--base",
        required=True,
        type=pathlib.Path,
        metavar="CKPT",
        help="the common ancestor; provides everything that is not merged",
    )
    parser.add_argument(
        "--teachers", required=True, nargs="+", type=pathlib.Path, metavar="CKPT", help="what is merged"
    )
    parser.add_argument(
        "--method", required=True, choices=("average", "task_arithmetic", "ties", "dare"), help="the rule"
    )
    parser.add_argument("--components", default="unet,text_encoder", help="networks to merge")
    parser.add_argument("--weights", nargs="+", type=float, metavar="W", help="one per teacher; default: all 1")
    parser.add_argument("--scale", type=float, help="factor of the merged difference; default: 1 for ties, else 0.4")
    parser.add_argument("--density", type=float, help="share of a difference that is kept; default: ties 0.2, dare 0.1")
    parser.add_argument("--seed", type=int, help="for what dare drops; default: 0")
    options.add_vae(parser)
    options.add_prediction_type(parser)
    options.add_file_dtype(parser)


def main(args: argparse.Namespace) -> None:
    """Writes the average; prints its path, and on stderr how each network was made."""
    from dmm_jax.checkpoints.average import average
    from dmm_jax.runtime.processes import say

    say(f"Reading the base and {len(args.teachers)} checkpoints")
    result = average(**options.keywords(args))
    for note in result.notes:
        say(note)
    print(result.path)
