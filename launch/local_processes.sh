#!/usr/bin/env bash
# Runs one training, or with "prepare" one preparation of data, in N processes on this machine.
# usage: launch/local_processes.sh [--dry-run] [--one-gpu-each] N [prepare] --config=X [ARGUMENTS OF THE VERB]
# --one-gpu-each gives GPU K to process K; without it, every process uses all GPUs.
# Process 0 listens on PORT (default 9310). SIGTERM to this script reaches all processes.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
dry_run=${1:-}
[ "$dry_run" != --dry-run ] || shift
one_gpu_each=${1:-}
[ "$one_gpu_each" != --one-gpu-each ] || shift
processes=${1:?"usage: launch/local_processes.sh [--dry-run] [--one-gpu-each] N [prepare] --config=... --workdir=..."}
shift
verb=train
if [ "${1:-}" = prepare ]; then
  verb=prepare
  shift
fi
if ! [[ $processes =~ ^[1-9][0-9]{0,4}$ ]]; then
  echo "local_processes.sh: the number of processes must be a positive whole number; got '$processes'." >&2
  exit 2
fi
port=${PORT:-9310}
if [ "$dry_run" != --dry-run ] && (exec 3<> "/dev/tcp/localhost/$port") 2> /dev/null; then
  echo "local_processes.sh: port $port is in use, perhaps by another run. Set PORT to a free port." >&2
  exit 1
fi
children=()
trap 'kill -TERM "${children[@]}" 2>/dev/null' TERM INT
for ((process = 0; process < processes; process++)); do
  command=(.venv/bin/python -m dmm_jax "$verb" "$@" --coordinator "localhost:$port"
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
  while kill -0 "$child" 2>/dev/null; do wait "$child" || true; done # A signal ends `wait` before the child ends.
  wait "$child" || status=$?
done
exit "$status"
