"""`dmm-jax evaluate`: measures fidelity, the style matrix, and FD or FID of a trained student."""

import argparse
import pathlib

from dmm_jax.verbs import options


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of the verb."""
    parser.add_argument("workdir", type=pathlib.Path, metavar="WORKDIR")
    parser.add_argument(
        "--n",
        dest="num_images",
        type=int,
        default=0,
        help="images per style and model, at least 2; default: the config's",
    )
    parser.add_argument(
        "--prompts",
        dest="prompts_file",
        default="",
        metavar="FILE",
        help="one prompt per line; default: the config's, or the captions that the run was trained on",
    )
    parser.add_argument("--negative-prompt", default="", help="for every picture; default: the config's")
    parser.add_argument(
        "--features",
        default="shapes",
        help="shapes (for the embedded world, default), inception:PATH or clean-inception:PATH (FID's weights), "
        "clip:PATH (folder of a CLIP: CMMD with ViT-L/14 at 336 pixels, else MMD)",
    )
    parser.add_argument(
        "--clip", dest="clip_folder", default="", metavar="PATH", help="folder of a CLIP: adds CLIPScore"
    )
    parser.add_argument(
        "--lpips", dest="lpips_file", default="", metavar="PATH", help="weights of LPIPS: adds it to the fidelity"
    )


def main(args: argparse.Namespace) -> None:
    """Writes metrics.json and the report, and prints the path of its page."""
    from dmm_jax.evaluation.evaluate import evaluate
    from dmm_jax.runtime import compilation

    compilation.use_cache()
    print(evaluate(**options.keywords(args)).page)
