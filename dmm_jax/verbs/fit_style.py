"""`dmm-jax fit-style`: learns one new style vector from a handful of images; everything else is frozen."""

import argparse
import pathlib

from dmm_jax.verbs import options


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of the verb."""
    parser.add_argument("model", metavar="MODEL", help="a merged model: a workdir or a DMM folder")
    parser.add_argument("--images", required=True, type=pathlib.Path, help="a folder of images with captions")
    parser.add_argument("--name", required=True, help="name of the new style")
    parser.add_argument("--out", required=True, type=pathlib.Path, metavar="FILE", help="a new .safetensors file")
    parser.add_argument("--base", default=None, help="another checkpoint that provides what MODEL lacks")
    parser.add_argument("--from", dest="start", default="", help="NAME or mix to start from; default: equal parts")
    parser.add_argument("--mix-only", action="store_true", help="learn only the weights of a mix of existing styles")
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--learning-rate", type=float, default=0.03, help="of AdamW; falls to 0 as a cosine")
    parser.add_argument("--prompt-dropout", type=float, default=0.1)
    parser.add_argument("--resolution", type=int, default=0, help="pixels per side; default: the model's")
    parser.add_argument("--seed", type=int, default=0)
    options.add_dtype(parser)


def main(args: argparse.Namespace) -> None:
    """Learns the style, writes it, and prints the losses before and after."""
    from dmm_jax.distill.fit_style import fit_style, report
    from dmm_jax.runtime import compilation

    compilation.use_cache()
    print(report(fit_style(**options.keywords(args))))
