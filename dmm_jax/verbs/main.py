"""The command line `dmm-jax VERB`: finds the verb's file, runs it, and turns errors into a line and an exit code.

A verb is one file with `add_arguments(parser)` and `main(args)`, which returns an exit code, or None for 0. The file is
imported when the verb is named, and imports the library inside `main`: `--help` and usage errors come at once.
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

from dmm_jax.runtime.errors import FULL_DISK, INTERRUPTED, REPORT, Preempted, UsageError, message, visible
from dmm_jax.runtime.home import expand_home

VERBS = {  # In the order of --help. The file of `fit-style` is fit_style.py.
    "demo": "run every step on the embedded world and write report/index.html",
    "inspect": "show what checkpoints contain and whether they can be merged",
    "prepare": "turn images and captions into a cache of latents and token ids",
    "train": "distil the teachers into one student; resumes a run that was stopped",
    "plan": "compute the memory, work, hours and chip-hours of a run, without its devices",
    "export": "write a trained student as PyTorch safetensors",
    "average": "write a weight average of checkpoints as one stock checkpoint; no training",
    "fit-style": "learn one new style vector from a handful of images; everything else is frozen",
    "sample": "draw prompts in styles: PNGs, grid.png, index.html",
    "evaluate": "measure fidelity, the style matrix, FD or FID; writes metrics.json and a report",
    "bench": "measure images/s and TFLOP/s on random data and compare with the device's peak",
}
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
        args, overrides = parser.parse_known_args(argv)
        if overrides and "config" not in args:
            parser.error(f"unrecognized arguments: {' '.join(overrides)}")
        args.overrides = overrides  # --config.NAME=VALUE
        return _module(verb).main(args)

    return exit_code(verb, run)


def build_parser(verb: str = "") -> argparse.ArgumentParser:
    """Describes all verbs, and the arguments of the one that is named."""
    parser = argparse.ArgumentParser(
        prog="dmm-jax", description="Merge Stable Diffusion checkpoints by distillation, in JAX."
    )
    parsers = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    for name, description in VERBS.items():
        verb_parser = parsers.add_parser(name, help=description, description=description)
        if name == verb:
            _module(name).add_arguments(verb_parser)
    return parser


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
        if text is None:
            traceback.print_exc()
        print(f"dmm-jax {verb}: error: {_shortened(text or REPORT)}", file=sys.stderr)
        return EXIT_USAGE if isinstance(error, UsageError) else EXIT_ERROR


@contextlib.contextmanager
def _warnings_in_one_line(verb: str) -> Iterator[None]:
    """Prints user warnings without file and source line; drops the `NOISE` of Orbax."""
    from absl import logging as absl_logging

    absl_logging.get_absl_logger().addFilter(_is_useful)
    with warnings.catch_warnings():
        show_others = warnings.showwarning

        def show(text, category, *place, **options):
            if issubclass(category, UserWarning):
                print(f"dmm-jax {verb}: warning: {_shortened(visible(str(text)))}", file=sys.stderr, flush=True)
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
