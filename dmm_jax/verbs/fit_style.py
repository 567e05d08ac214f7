"""`dmm-jax fit-style`: learns one new style vector from a handful of images; everything else is frozen."""

import argparse
import pathlib

from dmm_jax.runtime.errors import UserError
from dmm_jax.runtime.storage import check_writable
from dmm_jax.verbs import options

EXAMPLES = ("dmm-jax fit-style runs/sd15 --images FOLDER --name mine --out mine.safetensors",)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of the verb."""
    parser.add_argument("model", metavar="MODEL", help="a merged model: a workdir, a DMM folder, or demo or emoji")
    parser.add_argument("--images", required=True, type=pathlib.Path, metavar="FOLDER", help="images with captions")
    parser.add_argument("--name", required=True, help="name of the new style")
    parser.add_argument("--out", required=True, type=pathlib.Path, metavar="FILE", help="a new .safetensors file")
    parser.add_argument("--base", default=None, metavar="CKPT", help="provides what MODEL lacks; default: none")
    parser.add_argument("--from", dest="start", default="", help="NAME or mix to start from; default: equal parts")
    parser.add_argument("--mix-only", action="store_true", help="learn only the weights of a mix of existing styles")
    parser.add_argument("--steps", type=int, default=500, help="length of the training")
    parser.add_argument("--batch-size", type=int, default=8, help="images per step")
    parser.add_argument("--learning-rate", type=float, default=0.03, help="of AdamW; falls to 0 as a cosine")
    parser.add_argument("--prompt-dropout", type=float, default=0.1, help="share of images whose prompt becomes empty")
    parser.add_argument("--resolution", type=int, default=0, help="pixels per side; default: the model's")
    parser.add_argument("--seed", type=int, default=0, help="fixes noise, timesteps and prompt drops")
    options.add_dtype(parser)


def main(args: argparse.Namespace) -> None:
    """Learns the style, writes it, and prints the losses before and after."""
    from dmm_jax.config import arguments
    from dmm_jax.data.sources import FolderSource
    from dmm_jax.distill.fit_style import check_arguments, fit_style
    from dmm_jax.models.unet_config import per_axis
    from dmm_jax.pipeline import Pipeline, default_dtype
    from dmm_jax.runtime import compilation
    from dmm_jax.runtime.processes import say

    learning = {
        name: getattr(args, name) for name in ("steps", "batch_size", "learning_rate", "prompt_dropout", "seed")
    }
    check_arguments(**learning)
    arguments.whole_number("resolution", args.resolution, 0)
    _check_out(args.out)
    compilation.use_cache()
    say(f"Reading {args.model}")
    pipeline = Pipeline.from_pretrained(args.model, dtype=args.dtype or default_dtype(), base=args.base)
    side = args.resolution or per_axis(pipeline.unet.merged().config["sample_size"])[0] * pipeline.vae_scale_factor
    images = FolderSource(args.images, arguments.pixels("resolution", side, pipeline.vae_scale_factor))
    for line in images.unused.lines():
        say(line)
    say(f"Compiling, then learning for {args.steps} steps")
    fitted = fit_style(pipeline, images, args.name, start=args.start, mix_only=args.mix_only, **learning)
    fitted.save(args.out)
    print(fitted.summary())


def _check_out(out: pathlib.Path) -> None:
    if out.exists():
        raise UserError(f"{out} exists; nothing is overwritten. Give a new file.")
    if out.suffix != ".safetensors":
        raise UserError(f"--out must be a .safetensors file; got {out}.")
    check_writable(out)
