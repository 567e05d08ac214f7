"""`dmm-jax export`: writes a trained student as PyTorch safetensors, in one or several formats."""

import argparse
import pathlib

from dmm_jax.runtime.errors import UserError
from dmm_jax.verbs import options

EXAMPLES = (
    "dmm-jax export runs/sd15 out --format dmm",
    'dmm-jax export runs/sd15 out --format diffusers,single-file --style "anime=0.7,photo=0.3"',
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of the verb."""
    parser.add_argument("workdir", type=pathlib.Path, metavar="WORKDIR", help="a training run, or a DMM folder")
    parser.add_argument(
        "out", type=pathlib.Path, metavar="OUT", help="a new or empty folder, for one file or folder per format"
    )
    parser.add_argument("--format", required=True, help="comma list of names from `dmm-jax list formats`")
    parser.add_argument(
        "--style", default="", help='the style to fold in: NAME, or a mix such as "anime=0.7,photo=0.3"; default: none'
    )
    parser.add_argument(
        "--keep",
        action="append",
        default=[],
        metavar="STYLE",
        help="NAME, or NEW_NAME=NAME; repeat for each style that is exported, in this order; default: all",
    )
    parser.add_argument(
        "--extra-style",
        action="append",
        default=[],
        type=pathlib.Path,
        metavar="FILE",
        help="a style of fit-style; repeat; default: none",
    )
    options.add_file_dtype(parser)
    parser.add_argument(
        "--lora-base",
        default="",
        help="NAME or mix of the export that style-lora is applied to; default: equal parts",
    )
    parser.add_argument("--lora-for", default="comfyui", help="comma list of comfyui, diffusers, a1111 (adds 3.3 MB)")
    parser.add_argument(
        "--license",
        action="append",
        default=[],
        metavar="NAME=LICENCE",
        help="for base or a teacher whose files state none, or a wrong one; repeat; default: as stated",
    )
    parser.add_argument("--no-recipe", action="store_true", help="omit the recipe from the files' metadata")
    parser.add_argument("--dry-run", action="store_true", help="check everything, print the paths; write nothing")
    parser.add_argument("--verify", action="store_true", help="compare with stock diffusers; needs the [torch] extra")


def main(args: argparse.Namespace) -> None:
    """Writes every format, compares them with diffusers if asked to, and prints their paths."""
    from dmm_jax.checkpoints.export import export, open_student

    formats = list(dict.fromkeys(args.format.split(",")))
    if args.verify and "single-file" in formats and "diffusers" not in formats:
        raise UserError("--verify compares a single file with a diffusers folder: add diffusers to --format.")
    paths = export(
        args.workdir,
        args.out,
        formats,
        args.style,
        args.dtype,
        recipe=not args.no_recipe,
        keep=args.keep,
        lora_base=args.lora_base,
        lora_for=args.lora_for.split(","),
        extra_styles=args.extra_style,
        stated_licenses=args.license,
        dry_run=args.dry_run,
    )
    if args.verify and not args.dry_run:
        from dmm_jax.evaluation.verify_export import verify_export

        student = open_student(args.workdir, args.extra_style, args.keep)
        print("\n".join(verify_export(student, dict(zip(formats, paths, strict=True)), args.dtype)))
    print("\n".join(map(str, paths)))
