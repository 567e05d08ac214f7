#!/usr/bin/env bash
# One training run on TPU slices of a GKE cluster, by xpk (pip install xpk). docs/pods.md tells the whole way.
# usage: launch/gke_xpk.sh [--dry-run] VERB [ARGUMENTS]
#   create [XPK ARGUMENTS]      make the cluster, for example with --spot
#   train [TRAIN ARGUMENTS]     start the run NAME; it is started again up to 50 times, and resumes by itself
#   state                       the cluster's runs
#   stop                        end the run NAME
#   delete                      delete the cluster
# CLUSTER, ZONE, PROJECT, TPU_TYPE (v5litepod-16), NUM_SLICES (default 1) and NAME (of the run) are environment variables.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
dry_run=${1:-}
[ "$dry_run" != --dry-run ] || shift
verb=${1:?"usage: launch/gke_xpk.sh [--dry-run] create|train|state|stop|delete"}
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
  train)
    printf -v train '%q ' dmm-jax train --distributed "$@"
    # xpk starts a run again whose exit code is 127 or more. One that was stopped by SIGTERM has saved its state and ends
    # with 0, as if it had been finished: here it ends with 143.
    train="pip install --quiet --constraint launch/requirements.txt '.[tpu,gcs]' && { $train & child=\$!; \
trap 'stopped=143; kill -TERM \$child' TERM; \
while kill -0 \$child 2>/dev/null; do wait \$child; status=\$?; done; exit \${stopped:-\$status}; }"
    run xpk workload create "${place[@]}" --workload="${NAME:?"set NAME"}" --tpu-type="${TPU_TYPE:?"set TPU_TYPE"}" \
      --num-slices="$slices" --max-restarts=50 --base-docker-image=python:3.12 --script-dir=. --command="$train"
    ;;
  state) run xpk workload list "${place[@]}" ;;
  stop) run xpk workload delete "${place[@]}" --workload="${NAME:?"set NAME"}" ;;
  delete) run xpk cluster delete "${place[@]}" ;;
  *)
    echo "gke_xpk.sh: there is no verb $verb: create, train, state, stop, delete" >&2
    exit 2
    ;;
esac
