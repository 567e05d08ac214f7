#!/usr/bin/env bash
# Installs dmm_jax into .venv and runs `dmm-jax demo`; needs only Python.
# usage: launch/demo.sh [--workdir DIR]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash launch/install.sh
exec .venv/bin/python -m dmm_jax demo "$@"
