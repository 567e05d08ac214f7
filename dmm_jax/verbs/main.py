"""The command line `dmm-jax VERB`: finds the verb's file, runs it, and turns errors into a line and an exit code.

A verb is one file with `EXAMPLES` (command lines for --help), `add_arguments(parser)` and `main(args)`, which returns
an exit code, or None for 0. The file is imported when the verb is named, and imports the library inside `main`:
`--help` and usage errors come at once.
"""

import argparse
import contextlib
import faulthandler
import importlib
import os
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence

from dmm_jax.planning import devices
from dmm_jax.runtime import terminal
from dmm_jax.runtime.errors import FULL_DISK, INTERRUPTED, REPORT, Preempted, UsageError, meant, message, visible
from dmm_jax.runtime.home import expand_home
from dmm_jax.runtime.terminal import paint
from dmm_jax.verbs import suggestions

VERBS = {  # In the order of --help. The file of `fit-style` is fit_style.py.
    "demo": "run every step on the embedded world and write report/index.html",
    "inspect": "show what checkpoints contain and whether they can be merged",
    "prepare": "turn images and captions into a cache of latents and token ids",
    "train": "distil the teachers into one student; resumes a run that was stopped",
    "plan": "compute the memory, work, hours and chip-hours of a run, without its devices",
    "export": "write a trained student as PyTorch safetensors",
    "verify": "compare an export with stock diffusers, and with the student that it was made from",
    "average": "write a weight average of checkpoints as one stock checkpoint; no training",
    "fit-style": "learn one new style vector from a handful of images; everything else is frozen",
    "sample": "draw prompts in styles: PNGs, grid.png, index.html",
    "serve": "keep one model resident: OpenAI and A1111 interfaces, and a page; styles differ per request",
    "evaluate": "measure fidelity, the style matrix, FD or FID; writes metrics.json and a report",
    "bench": "measure images/s and TFLOP/s on random data and compare with the device's peak",
    "config": "print every option of an experiment: its value and its meaning",
    "list": "print names: configs, solvers, formats, devices, models that ship, their styles and prompts",
    "completion": "print the completion script of a shell",
}
CONFIG_HELP = "--config.help"
MAX_LINE_CHARS = 1000
# Parts of Orbax's log that mean nothing to the user, or that the error of this command says again, without tracebacks.
NOISE = ("Metadata file does not exist", *FULL_DISK)
EXIT_OK, EXIT_ERROR, EXIT_USAGE, EXIT_PIPE = 0, 1, 2, 141


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one verb; returns its exit code: 0 success, 1 an error, 2 wrong usage, 130 Ctrl-C, 141 a closed pipe."""
    with contextlib.suppress(OSError, RuntimeError):  # A stderr without a descriptor, as in notebooks.
        faulthandler.enable()  # A mapped file that is cut short while it is read ends the process; this says where.
    argv = [expand_home(argument) for argument in (sys.argv[1:] if argv is None else argv)]
    verb = next((argument for argument in argv if not argument.startswith("-")), "")

    def run():
        parser = build_parser(verb)
        if verb and verb not in VERBS:
            parser.error(f"there is no verb {verb!r}{meant(verb, VERBS)} `dmm-jax --help` lists them.")
        if CONFIG_HELP in argv:
            return _print_options(verb, argv)
        if verb:
            words = argv[argv.index(verb) + 1 :]
            suggestions.check(_parser_of(parser, verb), words)
        args, overrides = parser.parse_known_args(argv)
        if overrides and "config" not in args:
            others = " ".join(overrides)
            _parser_of(parser, verb).error(
                f"unrecognized arguments: {others}; `dmm-jax {verb} --help` lists the options"
            )
        terminal.set_verbosity(args.verbosity)
        _set_environment(args)
        args.overrides = overrides  # --config.NAME=VALUE
        with suggestions.options_named_as_typed(_parser_of(parser, verb), words, dict(vars(args))):
            return _module(verb).main(args)

    return exit_code(verb, run)


def build_parser(*verbs: str) -> argparse.ArgumentParser:
    """Describes all verbs, and the arguments of those that are named."""
    parser = suggestions.Parser(
        prog="dmm-jax",
        description="Merge Stable Diffusion checkpoints by distillation, in JAX.",
        epilog="`dmm-jax VERB --help` lists the options of a verb; `dmm-jax config` lists those of a training run.",
    )
    parser.add_argument("--version", action="version", version=_version(), help="print the versions of dmm_jax and JAX")
    parsers = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    for name, description in VERBS.items():
        verb_parser = parsers.add_parser(
            name, help=description, description=description, formatter_class=HelpFormatter, allow_abbrev=False
        )
        if name in verbs:
            _module(name).add_arguments(verb_parser)
            _add_verbosity(verb_parser)
            verb_parser.epilog = "\n".join(["examples:", *(f"  {line}" for line in _module(name).EXAMPLES)])
    return parser


class HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Ends the help text of an option with its default, unless the text states one; calls numbers N and X."""

    def _get_default_metavar_for_optional(self, action):
        return {int: "N", float: "X"}.get(action.type) or action.option_strings[-1].lstrip("-").upper()

    def _get_help_string(self, action):
        text, value = action.help or "", action.default
        states_it = "default" in text or value in (None, "", [], argparse.SUPPRESS)
        if not action.option_strings or action.required or action.nargs == 0 or states_it:
            return text
        return f"{text}; default: %(default)s"


def _add_verbosity(parser):
    group = parser.add_mutually_exclusive_group()
    options = {"dest": "verbosity", "action": "store_const", "default": terminal.NORMAL}
    group.add_argument(
        "-q", "--quiet", const=terminal.QUIET, help="print results, warnings and errors alone", **options
    )
    group.add_argument(
        "-v", "--verbose", const=terminal.VERBOSE, help="print tracebacks of errors, and the logs of JAX", **options
    )


def _version():
    from importlib import metadata

    import dmm_jax

    return f"dmm_jax {dmm_jax.__version__} (jax {metadata.version('jax')}, Python {sys.version.split()[0]})"


def _print_options(verb, argv):
    """Prints what `dmm-jax config` prints, for the experiment that the command line names."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--config", default="")
    args, others = parser.parse_known_args(argv)
    args.overrides = [word for word in others if word.startswith("--config.") and word != CONFIG_HELP]
    return _module("config").main(args)


def _parser_of(parser, verb) -> argparse.ArgumentParser:
    (verbs,) = [action for action in parser._actions if action.dest == "verb"]
    return verbs.choices[verb]


def _set_environment(args):
    """Sets what JAX reads when it starts: variables of the environment that the user has not set.

    JAX alone takes three quarters of a GPU's memory, less than `plan` counts on. XLA's alarms about slow compilations
    are kept off the terminal; in a run of several processes its log stays.
    """
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", str(devices.GPU_SHARE))
    alone = not getattr(args, "distributed", False) and getattr(args, "coordinator", None) is None
    if alone and not terminal.is_verbose() and "jaxlib" not in sys.modules:
        os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # Fatal errors alone.


def _module(verb: str):
    return importlib.import_module(f"dmm_jax.verbs.{verb.replace('-', '_')}")


def exit_code(verb: str, function: Callable[[], int | None]) -> int:
    """Calls a verb's function and returns the exit code; prints errors and warnings on stderr, one line each.

    A fault of this package prints its traceback, and a line that asks for a report.
    """
    try:
        try:
            with _warnings_in_one_line(verb):
                return _call(verb, function)
        finally:
            for stream in filter(None, (sys.stdout, sys.stderr)):
                stream.flush()
    except OSError as error:  # The output itself cannot be written. Python would try again at its end, and complain.
        if not isinstance(error, BrokenPipeError):
            with contextlib.suppress(OSError):
                os.write(2, f"dmm-jax {verb}: error: the output cannot be written: {error.strerror}\n".encode())
        for stream in filter(None, (sys.__stdout__, sys.__stderr__)):
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
        return EXIT_PIPE if isinstance(error, BrokenPipeError) else EXIT_ERROR


def _call(verb, function) -> int:
    try:
        return function() or EXIT_OK
    except KeyboardInterrupt:
        print(f"dmm-jax {verb}: interrupted", file=sys.stderr)
        return INTERRUPTED
    except Preempted as stopped:
        print(f"dmm-jax {verb}: {stopped} Run it again to resume.", file=sys.stderr)
        return stopped.exit_code
    except BrokenPipeError:
        raise
    except Exception as error:
        text = message(error)
        if text is None or terminal.is_verbose():
            traceback.print_exc()
        label = paint(f"dmm-jax {verb}: error:", "red", sys.stderr)
        print(f"{label} {_shortened(text or REPORT)}", file=sys.stderr)
        return EXIT_USAGE if isinstance(error, UsageError) else EXIT_ERROR


@contextlib.contextmanager
def _warnings_in_one_line(verb: str) -> Iterator[None]:
    """Prints user warnings without file and source line; drops the `NOISE` of Orbax."""
    from absl import logging as absl_logging

    if not terminal.is_verbose():
        absl_logging.get_absl_logger().addFilter(_is_useful)
    with warnings.catch_warnings():
        show_others = warnings.showwarning

        def show(text, category, *place, **options):
            if issubclass(category, UserWarning):
                label = paint(f"dmm-jax {verb}: warning:", "yellow", sys.stderr)
                print(f"{label} {_shortened(visible(str(text)))}", file=sys.stderr, flush=True)
            else:
                show_others(text, category, *place, **options)

        warnings.showwarning = show
        yield


def _shortened(text: str) -> str:
    """Returns a message whose lines are at most MAX_LINE_CHARS long: some quote what the user wrote."""
    lines = text.split("\n")
    return "\n".join(line if len(line) <= MAX_LINE_CHARS else f"{line[:MAX_LINE_CHARS]} …" for line in lines)


def _is_useful(record) -> bool:
    text = f"{record.getMessage()} {record.exc_info and record.exc_info[1]}"
    return not any(part in text for part in NOISE)
