"""`dmm-jax list`: prints the names that options take, each with its meaning."""

import argparse

EXAMPLES = ("dmm-jax list configs", "dmm-jax list solvers", "dmm-jax list emoji")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of the verb."""
    parser.add_argument(
        "kind",
        choices=tuple(_KINDS),
        help="configs: for --config; solvers: for --solver and config.sampling.solver; formats: for export --format; "
        "devices: for plan --topology; models: students that come with dmm_jax; emoji: prompts of the student emoji",
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
    from dmm_jax.checkpoints.open import open_checkpoint
    from dmm_jax.checkpoints.shipped import BASE, FOLDER, STUDENTS

    rows = [(name, ", ".join(open_checkpoint(FOLDER / name, BASE).styles), prompt) for name, prompt in STUDENTS.items()]
    return [("model", "styles", "a prompt"), *rows]


def _emoji():
    from dmm_jax.checkpoints.shipped import EMOJI, FOLDER, PROMPTS

    return [(prompt,) for prompt in (FOLDER / EMOJI / PROMPTS).read_text(encoding="utf-8").splitlines()]


_KINDS = {
    "configs": _configs,
    "solvers": _solvers,
    "formats": _formats,
    "devices": _devices,
    "models": _models,
    "emoji": _emoji,
}
