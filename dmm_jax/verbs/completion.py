"""`dmm-jax completion`: prints the completion script of a shell."""

import argparse

from dmm_jax.runtime.errors import UserError

EXAMPLES = (
    "dmm-jax completion bash > ~/.local/share/bash-completion/completions/dmm-jax",
    "dmm-jax completion zsh > ~/.zsh/completions/_dmm-jax",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of the verb."""
    parser.add_argument("shell", choices=("bash", "zsh", "tcsh"), help="the shell; needs the package shtab")


def main(args: argparse.Namespace) -> None:
    """Prints a script that completes verbs, options, their values and paths."""
    from dmm_jax.verbs.main import VERBS, build_parser

    try:
        import shtab
    except ImportError:
        raise UserError("completion needs the package shtab: pip install shtab.") from None
    parser = build_parser(*VERBS)
    (verbs,) = [action for action in parser._actions if action.dest == "verb"]
    for action in (action for verb in verbs.choices.values() for action in verb._actions):
        if action.choices is None and action.nargs != 0:
            action.complete = shtab.FILE
    print(shtab.complete(parser, args.shell))
