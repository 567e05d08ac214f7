#!/usr/bin/env bash
# Makes .venv and installs the locked versions once; demo.sh and test.sh run it.
# usage: launch/install.sh [EXTRA]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
extra=${1:-}
python=${PYTHON:-python3}
"$python" - <<'PY' || exit 1
import sys
if sys.version_info < (3, 11):
    sys.exit(f"dmm_jax needs Python 3.11 or newer; this is {sys.version.split()[0]}. Set PYTHON=/path/to/python3.11.")
PY
[ -x .venv/bin/python ] || "$python" -m venv .venv
expected="$(cat setup.py launch/requirements* | cksum) ${extra}"
if [ "$(cat ".venv/installed-${extra:-runtime}" 2>/dev/null)" != "$expected" ]; then
  echo "Installing into .venv (about two minutes, once) ..." >&2
  .venv/bin/python -m pip install --quiet --disable-pip-version-check --require-hashes -r launch/requirements.lock
  more=(-r launch/requirements.txt -r "launch/requirements-$extra.txt")
  [ -z "$extra" ] || .venv/bin/python -m pip install --quiet --disable-pip-version-check "${more[@]}"
  alone="launch/requirements-$extra-alone.txt" # Packages whose dependencies are not wanted.
  [ ! -f "$alone" ] || .venv/bin/python -m pip install --quiet --disable-pip-version-check --no-deps -r "$alone"
  .venv/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable .
  echo "$expected" > ".venv/installed-${extra:-runtime}"
fi
