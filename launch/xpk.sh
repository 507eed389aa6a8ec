#!/usr/bin/env bash
# GKE by XPK (pip install xpk): it writes a JobSet like jobset_tpu.yaml and queues it by Kueue. SLICES=2: two slices.
#
#   CLUSTER=my-cluster IMAGE=REGISTRY/chatpose:tpu launch/xpk.sh --config chatpose_13b --init /runs/llava-13b --out /runs/13b \
#     --set train.batch_size=32 --set train.accumulate=1 --set train.mesh.tensor=2          # for 64 chips
#
# Once before: xpk cluster create --cluster my-cluster --tpu-type=v5litepod-64 --num-slices=1
#              xpk storage attach runs …    (a file system that all pods share, at /runs)
[[ $# -gt 0 ]] || { sed -n '2,8p' "$0"; exit 2; }
set -euo pipefail
: "${CLUSTER:?name of the cluster}" "${IMAGE:?made by launch/Dockerfile}"

# Status 143 (saved at a preemption) and 75 (a process was lost) count as failures of the program, so those restart too.
exec xpk workload create \
  --cluster="$CLUSTER" \
  --workload="${NAME:-chatpose}" \
  --docker-image="$IMAGE" \
  --tpu-type="${TYPE:-v5litepod-64}" \
  --num-slices="${SLICES:-1}" \
  --storage="${STORAGE:-runs}" \
  --max-restarts="${RESTARTS:-100}" \
  --restart-on-user-code-failure \
  --command="exec env JAX_COMPILATION_CACHE_DIR=/runs/compiled chatpose train $(printf '%q ' "$@")"
