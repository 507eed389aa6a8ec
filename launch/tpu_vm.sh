#!/usr/bin/env bash
# A Cloud TPU slice without Kubernetes. From the root of the checkout:
#
#   launch/tpu_vm.sh create                     # request the slice and wait until it is ready
#   launch/tpu_vm.sh install                    # install this checkout and its packages on every worker
#   launch/tpu_vm.sh run    --config chatpose_13b --init gs://my-bucket/llava-13b --out gs://my-bucket/13b \
#     --set train.batch_size=32 --set train.accumulate=1 --set train.mesh.tensor=2          # for 64 chips
#   launch/tpu_vm.sh keep   --config …          # all of the above, again after every preemption, until the run is complete
#   launch/tpu_vm.sh stop                       # let the run save and exit (end `keep` first)
#   launch/tpu_vm.sh delete
#
# The workers must be allowed to use the bucket: docs/training.md. With BUCKET=gs://my-bucket a new slice reuses what the last one
# compiled. Your own data module is copied too, once it is committed at the root of the checkout.
set -euo pipefail
NAME=${NAME:-chatpose}
ZONE=${ZONE:-us-west4-a}
TYPE=${TYPE:-v5litepod-64}                   # gcloud compute tpus accelerator-types list
VERSION=${VERSION:-v2-alpha-tpuv5-lite}      # gcloud compute tpus versions list
SPOT=${SPOT:-yes}
BUCKET=${BUCKET:-}                           # gs://NAME, for compiled programs
PAUSE=${PAUSE:-20}                           # seconds between two polls, and before a retry
TRIES=${TRIES:-20}                           # failures after which `keep` gives up; a run of LASTING seconds resets the count
LASTING=${LASTING:-600}

tpus() { gcloud compute tpus "$@" --zone="$ZONE"; }
everywhere() { tpus tpu-vm ssh "$NAME" --worker=all --command="$1"; }

state() {
  # Other errors than "the slice does not exist", such as no network, are neither a state nor a failure.
  local error
  error=$(mktemp)
  if ! tpus queued-resources describe "$NAME" --format='value(state.state)' 2>"$error"; then
    if grep -q NOT_FOUND "$error"; then echo NONE; else cat "$error" >&2; echo UNKNOWN; fi
  fi
  rm "$error"
}

request() {
  local spot=()
  [[ $SPOT == yes ]] && spot=(--spot)
  tpus queued-resources create "$NAME" --node-id="$NAME" --accelerator-type="$TYPE" --runtime-version="$VERSION" "${spot[@]}"
}

create() {
  request
  until [[ $(state) == ACTIVE ]]; do
    case $(state) in
      FAILED | SUSPENDED) echo "tpu_vm.sh: the request was not met: $(state)" >&2; return 1 ;;
    esac
    sleep "$PAUSE"
  done
}

install() {
  # The image's Python may be older than 3.11, so uv installs one.
  archive=$(mktemp --suffix=.tar.gz)
  trap 'rm "$archive"' EXIT
  git archive --format=tar.gz --output="$archive" HEAD
  tpus tpu-vm scp "$archive" "$NAME":chatpose.tar.gz --worker=all
  everywhere 'mkdir -p chatpose && tar -xzf chatpose.tar.gz -C chatpose && python3 -m pip install -q --user uv && python3 -m uv venv -q --clear --python 3.12 env && python3 -m uv pip install -q --python env/bin/python "./chatpose[tpu,gcs]"'
}

run() {
  # Every worker runs the same command; they find each other through the TPU's metadata.
  everywhere "${BUCKET:+JAX_COMPILATION_CACHE_DIR=$BUCKET/compiled }PYTHONPATH=chatpose env/bin/chatpose train $(printf '%q ' "$@")"
}

stop() { everywhere 'pkill -TERM -f "env/bin/chatpose train" || true'; }

delete() { tpus queued-resources delete "$NAME" --force --quiet; }

keep() {
  # Each round takes one step that depends on the state of the slice. Failed steps are retried, and `keep` itself can be restarted.
  trap 'exit 130' INT
  local failures=0 began status
  while ((failures < TRIES)); do
    case $(state) in
      ACTIVE)
        # Install before every run: a worker may be new. Separate processes, so that `set -e` holds in them.
        began=$SECONDS status=1
        if bash "$0" install; then
          status=0
          bash "$0" run "$@" || status=$?
          [[ $status != 0 && $status != 2 ]] || return "$status"    # complete, or settings, data or weights are wrong
        fi
        if ((SECONDS - began >= LASTING)); then failures=0; else ((++failures)); fi
        ;;
      FAILED) echo "tpu_vm.sh: the request has failed" >&2; ((++failures)); delete || true ;;
      SUSPENDED) delete || ((++failures)) ;;   # preempted
      NONE) request || ((++failures)) ;;
    esac
    sleep "$PAUSE"
  done
  echo "tpu_vm.sh: gave up after $failures failures (TRIES); a remaining slice is still billed: launch/tpu_vm.sh delete" >&2
  return 1
}

case ${1:-} in
  create | install | run | stop | delete | keep) "$@" ;;
  *) sed -n '2,13p' "$0"; exit 2 ;;
esac
