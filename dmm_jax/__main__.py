"""Runs the command line: `python -m dmm_jax VERB` is `dmm-jax VERB`."""

import sys


def main() -> None:
    """Runs one verb and exits with its code; Ctrl-C is one line even while the command line itself is imported."""
    try:
        from dmm_jax.verbs.main import main as run_verb

        sys.exit(run_verb())
    except KeyboardInterrupt:
        print("dmm-jax: interrupted", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
