#!/usr/bin/env bash
# Installs dmm_jax with its server into .venv and serves a model until SIGTERM; needs only Python.
# usage: launch/serve.sh [--dry-run] MODEL [SERVE ARGUMENTS], by default emoji, a student that comes with dmm_jax
# Two programs share a machine if each has its own PORT (default 8000).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
dry_run=${1:-}
[ "$dry_run" != --dry-run ] || shift
[ $# -gt 0 ] || set -- emoji
command=(.venv/bin/python -m dmm_jax serve "$@")
case " $* " in *" --port"*) ;; *) command+=(--port "${PORT:-8000}") ;; esac
if [ "$dry_run" = --dry-run ]; then
  printf '%q ' "${command[@]}"
  echo
  exit
fi
bash launch/install.sh serve
exec "${command[@]}" # The server receives signals itself.
