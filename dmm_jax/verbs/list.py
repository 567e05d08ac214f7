"""`dmm-jax list`: prints the names that options take, each with its meaning."""

import argparse
import functools
import itertools

from dmm_jax.checkpoints.shipped import BASE, FOLDER, PROMPTS, STUDENTS

EXAMPLES = ("dmm-jax list configs", "dmm-jax list solvers", "dmm-jax list emoji")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of the verb."""
    parser.add_argument(
        "kind",
        choices=tuple(_KINDS),
        help="configs: for --config; solvers: for --solver and config.sampling.solver; formats: for export --format; "
        "devices: for plan --topology; models: students that come with dmm_jax; a student: its styles and prompts",
    )


def main(args: argparse.Namespace) -> None:
    """Prints the names."""
    from dmm_jax.runtime.terminal import table

    print(table(_KINDS[args.kind](), aligned_left=9))


def _configs():
    from dmm_jax.config.files import shipped_configs, summary

    return [(name, summary(path)) for name, path in shipped_configs().items()]


def _solvers():
    from dmm_jax.diffusion import solvers

    return [("name", "in A1111"), *((name, solvers.a1111_name(name)) for name in solvers.SOLVERS)]


def _formats():
    from dmm_jax.checkpoints.write import FORMATS

    return FORMATS.items()


def _devices():
    from dmm_jax.planning import devices

    return devices.listed()


def _models():
    rows = [(name, ", ".join(_styles(name)), prompt) for name, prompt in STUDENTS.items()]
    return [("model", "styles", "a prompt"), *rows]


def _styles(student):
    from dmm_jax.checkpoints.open import open_checkpoint

    return open_checkpoint(FOLDER / student, BASE).styles


def _prompts(student):
    """Returns a student's prompts; prints its styles on stderr, so that the prompts can go into a file."""
    from dmm_jax.runtime.processes import say
    from dmm_jax.world import scenes

    say(f"Styles, for --style: {', '.join(_styles(student))}")
    file = FOLDER / student / PROMPTS
    if file.is_file():
        say("Prompts, for --prompt:")
        return [(prompt,) for prompt in file.read_text(encoding="utf-8").splitlines()]
    say(f"Prompts, for --prompt, also two of them joined by {', '.join(scenes.RELATIONS)}:")
    return [(f"a {' '.join(words)}",) for words in itertools.product(scenes.SIZES, scenes.COLOURS, scenes.SHAPES)]


_KINDS = {
    "configs": _configs,
    "solvers": _solvers,
    "formats": _formats,
    "devices": _devices,
    "models": _models,
    **{student: functools.partial(_prompts, student) for student in STUDENTS},
}
