"""Runs the command line: `python -m dmm_jax VERB` is `dmm-jax VERB`."""

import sys

from dmm_jax.verbs.main import main

if __name__ == "__main__":
    sys.exit(main())
