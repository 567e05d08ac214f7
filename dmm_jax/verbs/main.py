"""The command line: `dmm-jax VERB`. Arguments in, one function called, errors as one line and an exit code."""

import argparse
import contextlib
import sys
import warnings
from collections.abc import Iterator, Sequence

from dmm_jax.config.files import UsageError
from dmm_jax.runtime.errors import UserError
from dmm_jax.verbs.verbs import EXIT_ERROR, EXIT_OK, VERBS

EXIT_USAGE, EXIT_INTERRUPTED = 2, 130


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one verb; returns 0 for success, 1 for an error said on stderr, 2 for wrong usage, 130 for Ctrl-C."""
    parser = build_parser()
    args, rest = parser.parse_known_args(sys.argv[1:] if argv is None else list(argv))
    if rest and not args.takes_config:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    args.rest = rest
    with _plainly_said(args.verb):
        try:
            return args.run(args) or EXIT_OK
        except KeyboardInterrupt:
            print(f"dmm-jax {args.verb}: interrupted", file=sys.stderr)
            return EXIT_INTERRUPTED
        except Exception as error:
            if (said := _message(error)) is None:
                raise  # A fault of ours, which its traceback tells best.
            print(f"dmm-jax {args.verb}: error: {said}", file=sys.stderr)
            return EXIT_USAGE if isinstance(error, UsageError) else EXIT_ERROR


def _message(error) -> str | None:
    """Returns what is said of an error that has its cause in what was given, or on the machine; None of any other."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    if isinstance(error, (UserError, OSError, FloatingPointError)):
        return str(error)
    first = " ".join((str(error).splitlines() or [""])[0].split())
    if "Vmem" in str(error):
        return f"a kernel does not fit the chip's fast memory: {first[:300]} Without it: --config.attention=xla."
    if isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error):
        return f"out of memory: {first[:300]} Compute fewer images at once (batch size), or smaller ones."
    if type(error).__name__ == "JaxRuntimeError":
        return f"the device cannot go on: {first[:300]}"
    return None


@contextlib.contextmanager
def _plainly_said(verb: str) -> Iterator[None]:
    """Says warnings in one line, without the code that gave them; leaves out a line of Orbax's that means nothing."""
    from absl import logging as absl_logging

    absl_logging.get_absl_logger().addFilter(_is_worth_saying)
    with warnings.catch_warnings():
        other = warnings.showwarning

        def show(message, category, *where, **more):
            if issubclass(category, UserWarning):
                print(f"dmm-jax {verb}: warning: {message}", file=sys.stderr, flush=True)
            else:
                other(message, category, *where, **more)

        warnings.showwarning = show
        yield


def _is_worth_saying(record) -> bool:
    return "Metadata file does not exist" not in record.getMessage()


def build_parser() -> argparse.ArgumentParser:
    """Describes every verb and its arguments."""
    parser = argparse.ArgumentParser(
        prog="dmm-jax", description="Merge Stable Diffusion checkpoints by distillation, in JAX."
    )
    parsers = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    for verb in VERBS:
        described = parsers.add_parser(verb.name, help=verb.about, description=verb.about)
        described.set_defaults(run=verb.run, takes_config=verb.takes_config)
        verb.add_arguments(described)
    return parser
