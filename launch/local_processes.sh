#!/usr/bin/env bash
# One training run in N processes of this machine.
# usage: launch/local_processes.sh [--dry-run] [--one-gpu-each] N --config=configs/X.py --workdir=DIR [TRAIN ARGUMENTS]
# --one-gpu-each gives process K the GPU K alone; without it every process takes all that there are.
# PORT (default 9310) is where process 0 listens; SIGTERM to this script reaches all processes.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
dry_run=${1:-}
[ "$dry_run" != --dry-run ] || shift
one_gpu_each=${1:-}
[ "$one_gpu_each" != --one-gpu-each ] || shift
processes=${1:?"usage: launch/local_processes.sh [--dry-run] [--one-gpu-each] N --config=... --workdir=..."}
shift
children=()
trap 'kill -TERM "${children[@]}" 2>/dev/null' TERM INT
for ((process = 0; process < processes; process++)); do
  command=(.venv/bin/python -m dmm_jax train "$@" --coordinator "localhost:${PORT:-9310}"
    --num-processes "$processes" --process-id "$process")
  [ "$one_gpu_each" != --one-gpu-each ] || command=(env "JAX_LOCAL_DEVICE_IDS=$process" "${command[@]}")
  if [ "$dry_run" = --dry-run ]; then
    printf '%q ' "${command[@]}"
    echo "&"
  else
    "${command[@]}" &
    children+=($!)
  fi
done
status=0
for child in "${children[@]}"; do
  while kill -0 "$child" 2>/dev/null; do wait "$child" || true; done # A signal ends a wait early.
  wait "$child" || status=$?
done
exit "$status"
