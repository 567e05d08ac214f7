"""`dmm-jax sample`: draws prompts in styles as PNGs, a grid and a page."""

import argparse
import functools
import pathlib
import secrets

from dmm_jax.runtime.errors import UsageError
from dmm_jax.verbs import options

EXAMPLES = (
    'dmm-jax sample demo --prompt "a large red circle" --out pictures',
    'dmm-jax sample runs/sd15 --prompt "a lighthouse" --prompt "a cat, (ink:1.2)" --out pictures',
    "dmm-jax sample runs/sd15 --lora detail.safetensors*0.6 --prompts prompts.txt --out pictures",
    'dmm-jax sample runs/sd15 --prompts prompts.txt --style anime --style "anime=0.5,photo=0.5" --out pictures',
)
RANDOM_SEED = -1  # As in other programs.


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of the verb."""
    options.add_model(parser)
    parser.add_argument(
        "--prompt",
        action="append",
        default=[],
        metavar="TEXT",
        help="what to draw; repeat for one row each; default: none",
    )
    parser.add_argument(
        "--prompts", type=pathlib.Path, metavar="FILE", help="one prompt per line; - is standard input; default: none"
    )
    parser.add_argument(
        "--style",
        action="append",
        default=[],
        help="NAME, mix, or schedule: photo:600:anime is photo down to timestep 600, then anime; photo:800-400:anime "
        "fades; repeat for one column each; default: all styles",
    )
    parser.add_argument("--out", required=True, type=pathlib.Path, metavar="FOLDER", help="new, or to be continued")
    parser.add_argument(
        "--name",
        default="",
        metavar="PATTERN",
        help="of the files, with {number}, {row}, {column}, {seed}, {style}, {prompt}; default: {number}_seed{seed}",
    )
    parser.add_argument(
        "--lora",
        action="append",
        default=[],
        metavar="FILE",
        help="a LoRA that is folded into the model, or FILE*0.8 with a weight; repeat; default: none",
    )
    _add_drawing(parser)


def _add_drawing(parser: argparse.ArgumentParser) -> None:
    """Adds the options of drawing."""
    parser.add_argument("--negative-prompt", default=None, help="default: none, which for SDXL differs from ''")
    parser.add_argument(
        "--seed",
        type=int,
        default=0,
        help="of the first prompt; the next has seed + 1; the same for all styles; -1 takes a random one and prints it",
    )
    of_run = "default: as the run drew that made the model"
    parser.add_argument(
        "--steps", type=int, dest="num_inference_steps", metavar="N", help=f"of the solver; {of_run}, otherwise 25"
    )
    parser.add_argument("--guidance-scale", type=float, help=f"1 turns guidance off; {of_run}, otherwise 7")
    parser.add_argument(
        "--guidance-rescale",
        type=float,
        help=f"0 to 1; 0.7 for models with zero terminal SNR; {of_run}, otherwise 0",
    )
    parser.add_argument(
        "--solver", help=f"such as euler, or 'DPM++ 2M Karras' (`dmm-jax list solvers`); {of_run}, otherwise dpmpp_2m"
    )
    parser.add_argument(
        "--mixing",
        default="rows",
        choices=("rows", "predictions"),
        help="what of a mix is averaged: rows of the style table, free; or predictions of its styles: every image of a "
        "batch then costs as many as its largest mix has styles, and unlike styles mix more evenly",
    )
    parser.add_argument("--height", type=int, default=0, help="pixels; default: the model's")
    parser.add_argument("--width", type=int, default=0, help="pixels; default: the model's")
    parser.add_argument("--batch-size", type=int, default=8, help="images computed at once")


def main(args: argparse.Namespace) -> None:
    """Draws the pictures, one row per prompt and one column per style, and prints the path of the page."""
    from tqdm import tqdm

    from dmm_jax.checkpoints.formats.lora import PLUS
    from dmm_jax.config.styles import parse_style
    from dmm_jax.diffusion import solvers
    from dmm_jax.diffusion.guidance import ADVICE
    from dmm_jax.gallery.gallery import NAME, check_folder, write_gallery
    from dmm_jax.runtime import terminal
    from dmm_jax.runtime.processes import say

    check_folder(args.out)
    prompts = _prompts(args)
    if args.solver:
        solvers.canonical(args.solver)
    if args.seed == RANDOM_SEED:
        args.seed = secrets.randbelow(2**31)
        say(f"--seed {RANDOM_SEED} is random: these pictures are those of --seed {args.seed}")
    args.model = PLUS.join([args.model, *args.lora])
    pipeline = options.open_pipeline(args)
    given = {name: getattr(args, name) for name in pipeline.sampling}
    sampling = pipeline.sampling | {name: value for name, value in given.items() if value is not None}
    if pipeline.schedule.rescale_betas_zero_snr and not sampling["guidance_rescale"]:
        say(ADVICE)
    num_pictures = len(prompts) * len(args.style or pipeline.styles or [None])
    say(f"Compiling, then drawing {num_pictures} pictures, {args.batch_size} at once, into {args.out}")
    page = write_gallery(
        pipeline,
        args.out,
        prompts,
        [parse_style(text, pipeline.schedule.num_train_timesteps) for text in args.style],
        name=args.name or NAME,
        negative_prompt=args.negative_prompt,
        seed=args.seed,
        height=args.height,
        width=args.width,
        mixing=args.mixing,
        batch_size=args.batch_size,
        **sampling,
        progress=functools.partial(tqdm, desc="drawing", unit="batch", disable=terminal.is_quiet() or None),
    )
    print(page)


def _prompts(args) -> list[str]:
    """Returns the prompts of --prompt, and those of the file or of standard input."""
    from dmm_jax.data.prompts import read_prompts

    prompts = [text.strip() for text in args.prompt]
    if not args.prompts and not prompts:
        raise UsageError("give --prompt TEXT, once or several times, or --prompts FILE (- for standard input).")
    if not all(prompts):
        raise UsageError("--prompt is empty: give a text.")
    return prompts + (read_prompts(args.prompts) if args.prompts else [])
