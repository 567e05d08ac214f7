#!/usr/bin/env bash
# Runs one training on a Cloud TPU slice, requested as a queued resource; docs/pods.md has every step.
# usage: launch/tpu_pod.sh [--dry-run] VERB [ARGUMENTS]
#   create [GCLOUD ARGUMENTS]   request the slice, for example with --spot
#   state                       print the state of the request
#   install                     copy this folder to every host and install it; mount SHARED, if set, at /mnt/runs
#   one VERB [ARGUMENTS]        run `dmm-jax VERB` on the first host only, with its four chips
#   prepare [ARGUMENTS]         start `dmm-jax prepare --distributed` on every host, in the background
#   train [TRAIN ARGUMENTS]     start `dmm-jax train --distributed` on every host, in the background
#   log                         print the last lines of every host
#   stop                        send SIGTERM to every host: the run saves its step and ends
#   delete                      delete the slice
# Environment variables: TPU_NAME, ZONE, ACCELERATOR_TYPE (v5litepod-16), RUNTIME_VERSION (v2-alpha-tpuv5-lite) and, if
# all hosts share a folder, SHARED (SERVER:/SHARE, NFS).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
dry_run=${1:-}
[ "$dry_run" != --dry-run ] || shift
verb=${1:?"usage: launch/tpu_pod.sh [--dry-run] create|state|install|one|prepare|train|log|stop|delete"}
shift
name=${TPU_NAME:?"set TPU_NAME"}
place=(--zone "${ZONE:?"set ZONE"}")

run() {
  if [ "$dry_run" = --dry-run ]; then
    printf '%q ' "$@"
    echo
  else
    "$@"
  fi
}

on_every_host() {
  run gcloud compute tpus tpu-vm ssh "$name" "${place[@]}" --worker=all --command="$1"
}

case $verb in
  create)
    run gcloud compute tpus queued-resources create "$name" --node-id="$name" "${place[@]}" \
      --accelerator-type="${ACCELERATOR_TYPE:?"set ACCELERATOR_TYPE"}" \
      --runtime-version="${RUNTIME_VERSION:?"set RUNTIME_VERSION"}" "$@"
    ;;
  state) run gcloud compute tpus queued-resources describe "$name" "${place[@]}" --format="value(state.state)" ;;
  install)
    run git archive --format=tar.gz --output=/tmp/dmm_jax.tar.gz HEAD
    run gcloud compute tpus tpu-vm scp /tmp/dmm_jax.tar.gz "$name": "${place[@]}" --worker=all
    # The hosts have Python 3.10, which is too old; uv installs another.
    on_every_host "mkdir -p dmm_jax && tar -xzf dmm_jax.tar.gz -C dmm_jax && cd dmm_jax && \
python3 -m pip install --quiet --user uv && python3 -m uv venv --quiet --clear --python 3.11 .venv && \
python3 -m uv pip install --quiet --constraint launch/requirements.txt --python .venv '.[tpu,gcs]'"
    [ -z "${SHARED:-}" ] || on_every_host "sudo apt-get install --yes nfs-common && sudo mkdir -p /mnt/runs && \
sudo mount -t nfs $SHARED /mnt/runs && sudo chmod a+rwx /mnt/runs"
    ;;
  one)
    # Without these variables JAX waits for the remaining hosts.
    alone="TPU_PROCESS_BOUNDS=1,1,1 TPU_CHIPS_PER_PROCESS_BOUNDS=2,2,1 TPU_VISIBLE_DEVICES=0,1,2,3"
    printf -v command '%q ' .venv/bin/python -m dmm_jax "$@"
    run gcloud compute tpus tpu-vm ssh "$name" "${place[@]}" --worker=0 --command="cd dmm_jax; $alone $command"
    ;;
  prepare | train)
    printf -v program '%q ' .venv/bin/python -m dmm_jax "$verb" --distributed "$@"
    on_every_host "cd dmm_jax; nohup $program > run.log 2>&1 < /dev/null & echo \$! > run.pid"
    ;;
  log) on_every_host "tail -n 20 dmm_jax/run.log" ;;
  stop) on_every_host "kill -TERM \$(cat dmm_jax/run.pid)" ;;
  delete) run gcloud compute tpus queued-resources delete "$name" "${place[@]}" --force ;;
  *)
    echo "tpu_pod.sh: unknown verb $verb; the verbs are create, state, install, one, prepare, train, log, stop, delete" >&2
    exit 2
    ;;
esac
