#!/usr/bin/env bash
# Runs one training on TPU slices of a GKE cluster with xpk (pip install xpk); docs/pods.md has every step.
# usage: launch/gke_xpk.sh [--dry-run] VERB [ARGUMENTS]
#   create [XPK ARGUMENTS]      make the cluster, for example with --spot
#   prepare [ARGUMENTS]         prepare the data as the workload NAME, which resumes like a run
#   train [TRAIN ARGUMENTS]     start the run NAME; xpk restarts it up to 50 times, and it resumes
#   state                       list the cluster's runs
#   stop                        end the run NAME
#   delete                      delete the cluster
# Environment variables: CLUSTER, ZONE, PROJECT, TPU_TYPE (v5litepod-16), NUM_SLICES (default 1), NAME (of the run).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
dry_run=${1:-}
[ "$dry_run" != --dry-run ] || shift
verb=${1:?"usage: launch/gke_xpk.sh [--dry-run] create|prepare|train|state|stop|delete"}
shift
place=(--cluster="${CLUSTER:?"set CLUSTER"}" --zone="${ZONE:?"set ZONE"}" --project="${PROJECT:?"set PROJECT"}")

slices=${NUM_SLICES:-1}

run() {
  if [ "$dry_run" = --dry-run ]; then
    printf '%q ' "$@"
    echo
  else
    "$@"
  fi
}

case $verb in
  create) run xpk cluster create "${place[@]}" --tpu-type="${TPU_TYPE:?"set TPU_TYPE"}" --num-slices="$slices" "$@" ;;
  prepare | train)
    printf -v program '%q ' dmm-jax "$verb" --distributed "$@"
    # xpk restarts a run whose exit code is 127 or more. A run that SIGTERM stops has saved its state and exits with 0,
    # like a finished run. Here it exits with 143.
    program="pip install --quiet --constraint launch/requirements.txt '.[tpu,gcs]' && { $program & child=\$!; \
trap 'stopped=143; kill -TERM \$child' TERM; \
while wait \$child; status=\$?; kill -0 \$child 2>/dev/null; do :; done; exit \${stopped:-\$status}; }"
    run xpk workload create "${place[@]}" --workload="${NAME:?"set NAME"}" --tpu-type="${TPU_TYPE:?"set TPU_TYPE"}" \
      --num-slices="$slices" --max-restarts=50 --base-docker-image=python:3.12 --script-dir=. --command="$program"
    ;;
  state) run xpk workload list "${place[@]}" ;;
  stop) run xpk workload delete "${place[@]}" --workload="${NAME:?"set NAME"}" ;;
  delete) run xpk cluster delete "${place[@]}" ;;
  *)
    echo "gke_xpk.sh: unknown verb $verb; the verbs are create, prepare, train, state, stop, delete" >&2
    exit 2
    ;;
esac
