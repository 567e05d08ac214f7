"""`dmm-jax export`: writes a trained student as PyTorch safetensors, in one or several formats."""

import argparse
import contextlib
import functools
import pathlib
import re
import tempfile
from collections.abc import Iterator

from dmm_jax.runtime.errors import UserError
from dmm_jax.verbs import options

EXAMPLES = (
    "dmm-jax export runs/sd15 out --format dmm",
    'dmm-jax export runs/sd15 out --format diffusers,single-file --style "anime=0.7,photo=0.3"',
    "dmm-jax export runs/sd15 anime.safetensors --format single-file --style anime",
    "dmm-jax export runs/sd15 out --format single-file --all-styles --name merged",
    "dmm-jax export runs/sd15 out --format lora --rank 64",
    "dmm-jax export runs/sd15 out --format dmm --examples pictures --trigger anime=anime,cel --push OWNER/NAME",
)
OPTIONS_OF_VERB = ("style", "name", "all_styles", "verify")  # `export` does not take these, or takes them by place.
FILE = "model.safetensors"
FOLDER_OPTIONS = ("all_styles", "name", "trigger", "examples", "push")  # They need a folder as OUT.


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of the verb."""
    parser.add_argument(
        "workdir",
        type=pathlib.Path,
        metavar="WORKDIR",
        help="a training run, or a DMM folder; for lora, any checkpoint",
    )
    parser.add_argument(
        "out",
        type=pathlib.Path,
        metavar="OUT",
        help="a new or empty folder, for one file or folder per format and a model card; or a new .safetensors file",
    )
    parser.add_argument("--format", required=True, help="comma list of names from `dmm-jax list formats`")
    parser.add_argument(
        "--style", default="", help='the style to fold in: NAME, or a mix such as "anime=0.7,photo=0.3"; default: none'
    )
    parser.add_argument(
        "--all-styles", action="store_true", help="fold in every style by itself, each in a folder of its own"
    )
    parser.add_argument("--name", default="", help="of the single file, without .safetensors; default: model")
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
    parser.add_argument(
        "--lora-for",
        default="",
        help="comma list of comfyui, diffusers (0.40 or later), a1111 (adds 3.3 MB, loses biases); default: comfyui",
    )
    parser.add_argument(
        "--rank",
        default="",
        help="of a lora's layers, or auto:0.98 to keep this share of each; default: 64, or a LoRA student's own ranks",
    )
    parser.add_argument("--exact", action="store_true", help="decompose a lora exactly; slower")
    parser.add_argument("--base", default="", help="the checkpoint that a lora changes; default: the run's base")
    options.add_vae(parser)
    parser.add_argument(
        "--license",
        action="append",
        default=[],
        metavar="NAME=LICENCE",
        help="for base or a teacher whose files state none, or a wrong one; repeat; default: as stated",
    )
    parser.add_argument("--no-recipe", action="store_true", help="omit the recipe from the files' metadata")
    group = parser.add_argument_group("the model card and the hub")
    group.add_argument(
        "--trigger",
        action="append",
        default=[],
        metavar="STYLE=WORDS",
        help="words that a style's prompts need; repeat; default: those that the teachers' files state",
    )
    group.add_argument(
        "--examples", type=pathlib.Path, metavar="FOLDER", help="a folder of `dmm-jax sample`; default: no pictures"
    )
    group.add_argument(
        "--push", default="", metavar="OWNER/NAME", help="upload to a private repository on the hub; default: none"
    )
    parser.add_argument("--dry-run", action="store_true", help="check everything, print the paths; write nothing")
    parser.add_argument("--verify", action="store_true", help="compare with stock diffusers; needs the [torch] extra")


def main(args: argparse.Namespace) -> None:
    """Writes every format, compares them with diffusers if asked to, and prints their paths."""
    from tqdm import tqdm

    from dmm_jax.checkpoints import export_lora
    from dmm_jax.checkpoints.card_additions import add_to_cards, read_triggers
    from dmm_jax.checkpoints.export import base_of, export, open_student, planned_paths
    from dmm_jax.checkpoints.formats import hub
    from dmm_jax.checkpoints.provenance import triggers_of_workdir
    from dmm_jax.runtime.storage import check_output, check_output_file, part_of, staged_folder

    formats = list(dict.fromkeys(args.format.split(",")))
    _check(args, formats)
    if args.push:
        hub.check_repository(args.push)
    is_file = args.out.suffix == ".safetensors"
    (check_output_file if is_file else check_output)(args.out)
    student = open_student(args.workdir, args.extra_style, args.keep, allow_stock=formats == ["lora"])
    if is_file:
        _check_file(args, planned_paths(args.out.parent, formats, student, args.style, _tools(args)))
    triggers = triggers_of_workdir(args.workdir, student, args.keep) | read_triggers(args.trigger, student.styles or ())
    examples = _examples(args.examples) if args.examples else []
    paths = []
    staged = _staged_file if is_file else staged_folder
    with contextlib.nullcontext(part_of(args.out)) if args.dry_run else staged(args.out) as stage:
        for folder, some_formats, style, name in _parts(args, formats, student.styles):
            written = export(
                args.workdir,
                stage / folder,
                some_formats,
                style,
                args.dtype,
                recipe=not args.no_recipe,
                keep=args.keep,
                extra_styles=args.extra_style,
                stated_licenses=args.license,
                dry_run=args.dry_run,
                **_own_options(args, some_formats),
                progress=functools.partial(tqdm, disable=None, desc="lora"),
            )
            written = [path if args.dry_run else _renamed(path, name) for path in written]
            paths += [args.out if is_file else args.out / path.relative_to(stage) for path in written]
        if args.dry_run:
            print("\n".join(map(str, paths)))
            return
        add_to_cards(stage, triggers, examples)
    if args.verify:
        from dmm_jax.evaluation.verify_export import verify_folder

        print("\n".join(verify_folder(args.out, args.workdir, student)))
    if "lora" in formats:
        from dmm_jax.evaluation.lora_error import print_lora_errors

        names = export_lora.places(args.out, student, args.style, _tools(args))
        names = {args.out: next(iter(names.values()))} if is_file else names
        print_lora_errors(student, base_of(args.workdir, student, args.base), names, args.style)
    print("\n".join(map(str, paths)))
    if args.push:
        print(hub.push_folder(paths[0] if len(paths) == 1 and paths[0].is_dir() else args.out, args.push))


def _check(args, formats) -> None:
    from dmm_jax.checkpoints.export import OPTION_FORMATS, check_options
    from dmm_jax.checkpoints.write import FLOAT8

    check_options(formats, args.dtype, {name: getattr(args, name) for name in OPTION_FORMATS})
    if args.all_styles and args.style:
        raise UserError("--all-styles folds in each style by itself: leave --style out.")
    if args.name and not re.fullmatch(r"\w[\w .-]*", args.name):
        raise UserError(f"--name is a file name of letters, digits, '_', '-', '.' and blanks; got {args.name!r}.")
    if args.verify and "single-file" in formats and "diffusers" not in formats:
        raise UserError("--verify compares a single file with a diffusers folder: add diffusers to --format.")
    if args.verify and args.dtype == FLOAT8:
        raise UserError(f"--verify compares with diffusers, which does not read {FLOAT8} with scales.")


def _check_file(args, paths: list[pathlib.Path]) -> None:
    """Refuses what cannot be written as the one file OUT.

    Args:
      paths: what would be written into a folder.

    Raises:
      UserError: names it.
    """
    names = [path.name for path in paths]
    advice = f"Give a folder as OUT, for example {args.out.with_suffix('')}"
    if len(names) != 1 or not names[0].endswith(".safetensors"):
        raise UserError(f"{args.out} is the name of one file, and this export writes {', '.join(names)}. {advice}.")
    if options := [f"--{name.replace('_', '-')}" for name in FOLDER_OPTIONS if getattr(args, name)]:
        raise UserError(f"{', '.join(options)} needs a folder, and {args.out} is one file. {advice}, or leave it out.")


@contextlib.contextmanager
def _staged_file(path: pathlib.Path) -> Iterator[pathlib.Path]:
    """Yields a temporary folder, whose one .safetensors file becomes `path` at the end of the block."""
    from dmm_jax.runtime.storage import errors_name

    with tempfile.TemporaryDirectory(dir=path.absolute().parent, prefix=f".{path.name}.") as stage:
        with errors_name(path, stage):
            yield pathlib.Path(stage)
        (file,) = pathlib.Path(stage).glob("*.safetensors")
        file.rename(path)


def _own_options(args, formats) -> dict:
    """Returns those options of `export` that belong to some of the formats."""
    from dmm_jax.checkpoints.export import OPTION_FORMATS

    options = {name: getattr(args, name) for name, owners in OPTION_FORMATS.items() if set(owners) & set(formats)}
    tools = {"lora_for": _tools(args)} if "lora_for" in options else {}
    return {name: value for name, value in options.items() if name not in OPTIONS_OF_VERB} | tools


def _tools(args) -> list[str]:
    return args.lora_for.split(",") if args.lora_for else ["comfyui"]


def _parts(args, formats, styles):
    """Yields (subfolder, formats, style, name of the single file) for each export that is written."""
    if not args.all_styles:
        yield "", formats, args.style, args.name or "model"
        return
    from dmm_jax.gallery.gallery import word

    once = [fmt for fmt in formats if fmt in ("dmm", "lora")]  # These are made for all styles together.
    if once:
        yield "", once, "", ""
    stock, names = [fmt for fmt in formats if fmt not in once], set()
    for number, style in enumerate(styles if stock else ()):
        name = word(style)  # Not the style itself, which a file may have named.
        name = f"{name}_{number}" if name in names or name == "dmm" else name
        names.add(name)
        yield name, stock, style, f"{args.name}_{name}" if args.name else name


def _renamed(path: pathlib.Path, name: str) -> pathlib.Path:
    """Gives a single file its name, in the model card, too."""
    if path.name != FILE or name == "model":
        return path
    card = path.parent / "README.md"
    card.write_text(card.read_text(encoding="utf-8").replace(f"`{FILE}`", f"`{name}.safetensors`"), encoding="utf-8")
    return path.rename(path.with_name(f"{name}.safetensors"))


def _examples(folder: pathlib.Path) -> list:
    """Returns the pictures of a gallery.

    Raises:
      UserError: the folder holds none.
    """
    from dmm_jax.checkpoints.card_additions import MAX_EXAMPLES, Example
    from dmm_jax.config.styles import style_text
    from dmm_jax.gallery.png import read_parameters

    files = [path for path in sorted(folder.glob("*.png")) if path.name != "grid.png"][:MAX_EXAMPLES]
    if not files:
        raise UserError(f"{folder} holds no pictures. Give a folder that `dmm-jax sample` wrote.")
    pictures = [(path.read_bytes(), read_parameters(path)) for path in files]
    return [Example(png, picture.prompt, style_text(picture.styles) or "none") for png, picture in pictures]
