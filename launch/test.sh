#!/usr/bin/env bash
# Installs dmm_jax and its tests into .venv, then runs lint and tests on the CPU; needs only Python.
# usage: launch/test.sh [--fast] [PYTEST ARGUMENTS]
# --fast skips tests that train or start processes.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
selected=()
if [ "${1:-}" = --fast ]; then
  selected=(-m "not slow")
  shift
fi
bash launch/install.sh test
.venv/bin/python -m ruff check .
# These options keep the order of tests/conftest.py.
exec .venv/bin/python -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder "${selected[@]}" "$@"
