#!/usr/bin/env bash
# GKE: a run on several TPU slices that goes on while some of them are missing. Alone, a JobSet waits until all are back.
#
#   SLICES=2 launch/gke_slices.sh launch/jobset_tpu.yaml
#
# It applies the manifest with as many replicas as there are complete slices. When slices are lost or come back and that
# lasts PATIENCE seconds, it stops the run, which saves, and applies the manifest with their new number. It ends with the
# run, and may itself be ended and started again. It takes only numbers that divide SLICES, because train.batch_size must be
# a multiple for each of them: for jobset_tpu.yaml, 32 x SLICES rows. It counts all nodes of the manifest's kind as its own.
[[ $# -eq 1 ]] || { sed -n '2,9p' "$0"; exit 2; }
set -euo pipefail
MANIFEST=$1
SLICES=${SLICES:-2}
PATIENCE=${PATIENCE:-300}
PAUSE=${PAUSE:-20}                           # seconds between two looks

value() { sed -n "s|^ *$1: *\([^ #]*\).*|\1|p" "$MANIFEST" | head -1; }
NAME=$(value name)
HOSTS=$(value parallelism)
KIND=cloud.google.com/gke-tpu-accelerator
SHAPE=cloud.google.com/gke-tpu-topology
NODES="$KIND=$(value $KIND),$SHAPE=$(value $SHAPE)"

# Slices (node pools) whose nodes are all ready.
complete() {
  kubectl get nodes -l "$NODES" -o 'jsonpath={range .items[*]}{.metadata.labels.cloud\.google\.com/gke-nodepool} {.status.conditions[?(@.type=="Ready")].status}{"\n"}{end}' |
    awk -v hosts="$HOSTS" '$2 == "True" { ready[$1]++ } END { for (pool in ready) n += ready[pool] >= hosts; print n + 0 }'
}

field() { kubectl get jobset "$NAME" --ignore-not-found -o "jsonpath={$1}"; }

start() {
  echo "gke_slices.sh: $1 of $SLICES slices" >&2
  sed "s/^\( *replicas:\).*/\1 $1/" "$MANIFEST" | kubectl apply -f -
}

since=                                       # when another number of slices was first seen
while :; do
  # A look that fails, as without a network, says nothing: look again.
  if state=$(field .status.terminalState) && now=$(field '.spec.replicatedJobs[0].replicas') && there=$(complete); then
    case $state in
      Completed) exit 0 ;;
      Failed) echo "gke_slices.sh: the JobSet $NAME has failed: kubectl describe jobset $NAME" >&2; exit 1 ;;
    esac
    fit=$((there < SLICES ? there : SLICES))
    while ((fit > 0 && SLICES % fit)); do fit=$((fit - 1)); done
    if ((fit == 0)) || [[ $fit == "$now" ]]; then
      since=
    elif [[ -z $now ]]; then
      start "$fit" || true
    else
      since=${since:-$SECONDS}
      if ((SECONDS - since >= PATIENCE)) && kubectl delete jobset "$NAME" --cascade=foreground --ignore-not-found; then
        start "$fit" || true
        since=
      fi
    fi
  fi
  sleep "$PAUSE"
done
