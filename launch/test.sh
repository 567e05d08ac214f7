#!/usr/bin/env bash
# Set-up, lint and tests, from a bare Python, on the CPU.
# usage: launch/test.sh [PYTEST ARGUMENTS]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash launch/install.sh test
.venv/bin/python -m ruff check .
exec .venv/bin/python -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder "$@"  # As conftest.py orders.
