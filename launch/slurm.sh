#!/usr/bin/env bash
# Runs one training on Slurm, one process per GPU; two minutes before the time limit SIGTERM makes it save and end.
# usage: launch/slurm.sh [--dry-run] NODES GPUS_PER_NODE [prepare] --config=X [ARGUMENTS OF THE VERB]
# With "prepare" it prepares the data instead.
# SBATCH_ARGUMENTS: further arguments of sbatch (partition, account, time). Jobs submitted repeatedly run one by one.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
dry_run=${1:-}
[ "$dry_run" != --dry-run ] || shift
usage="usage: launch/slurm.sh [--dry-run] NODES GPUS_PER_NODE [prepare] --config=... --workdir=..."
nodes=${1:?"$usage"}
gpus=${2:?"$usage"}
shift 2
verb=train
if [ "${1:-}" = prepare ]; then
  verb=prepare
  shift
fi
read -ra more <<< "${SBATCH_ARGUMENTS:-}"
printf -v program '%q ' .venv/bin/python -m dmm_jax "$verb" --distributed "$@"
command=(sbatch --job-name=dmm-jax --dependency=singleton --nodes="$nodes" --ntasks-per-node="$gpus"
  --gpus-per-node="$gpus" --signal=TERM@120 --output=slurm-%j.log "${more[@]}" --wrap="srun --kill-on-bad-exit=1 $program")
if [ "$dry_run" = --dry-run ]; then
  printf '%q ' "${command[@]}"
  echo
else
  "${command[@]}"
fi
