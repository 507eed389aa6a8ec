#!/usr/bin/env bash
# GKE by XPK (pip install xpk): it writes a JobSet like jobset_tpu.yaml and queues it by Kueue. SLICES=2: two slices.
#
#   CLUSTER=my-cluster IMAGE=REGISTRY/chatpose:tpu BUCKET=gs://my-bucket launch/xpk.sh \
#     --config chatpose_13b --init gs://my-bucket/llava-13b --out gs://my-bucket/13b \
#     --set train.batch_size=32 --set train.accumulate=1 --set train.mesh.tensor=2          # for 64 chips
#
# Once before: xpk cluster create --cluster my-cluster --tpu-type=v5litepod-64 --num-slices=1
#              its pods must be allowed to use the bucket: docs/training.md
[[ $# -gt 0 ]] || { sed -n '2,9p' "$0"; exit 2; }
set -euo pipefail
: "${CLUSTER:?name of the cluster}" "${IMAGE:?made by launch/Dockerfile}" "${BUCKET:?gs://NAME, for compiled programs}"

# Status 143 (saved at a preemption) and 75 (a process was lost) count as failures of the program, so those restart too.
exec xpk workload create \
  --cluster="$CLUSTER" \
  --workload="${NAME:-chatpose}" \
  --docker-image="$IMAGE" \
  --tpu-type="${TYPE:-v5litepod-64}" \
  --num-slices="${SLICES:-1}" \
  --max-restarts="${RESTARTS:-100}" \
  --restart-on-user-code-failure \
  --command="exec env JAX_COMPILATION_CACHE_DIR=$BUCKET/compiled chatpose train $(printf '%q ' "$@")"
