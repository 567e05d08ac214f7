#!/usr/bin/env bash
# The whole road on the embedded world, from a bare Python: inspect, merge, evaluate, export, sample, report.
# usage: launch/demo.sh [--workdir DIR]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash launch/install.sh
exec .venv/bin/python -m dmm_jax demo "$@"
