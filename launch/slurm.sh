#!/usr/bin/env bash
# SLURM: one process for each GPU; here two nodes of eight. Change the numbers to yours, then:
#
#   sbatch launch/slurm.sh --config chatpose_13b --init /shared/llava-13b --out /shared/runs/13b
#
# --out and --init must be on a file system that all nodes share, or on a bucket (gs://…, s3://…). SIGTERM comes three minutes
# before the time limit and at a preemption; the run then saves and exits with 143, and the job is queued again. The same happens
# after 1, 75, 134 or 137 (the file system failed, a process crashed or was lost), up to a hundred times. The next start may use
# other numbers below. To end the run: scancel --signal=KILL. The environment with `chatpose` must be active when sbatch is called
# (the job inherits it), or activate it below. Give an account or a partition on sbatch's command line. Set
# JAX_COMPILATION_CACHE_DIR to a shared folder or bucket that strangers cannot write to, and the next start reuses what this one
# compiled.
#SBATCH --job-name=chatpose
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --mem=0
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@180
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.txt
[[ $# -gt 0 ]] || { sed -n '2,12p' "$0"; exit 2; }
set -u

# Processes find each other through SLURM's variables. If one dies, SLURM ends the others of this step.
srun --kill-on-bad-exit=1 chatpose train "$@"
status=$?
case $status in
  1 | 75 | 134 | 137 | 143)
    ((${SLURM_RESTART_COUNT:-0} < 100)) || exit "$status"
    echo "slurm.sh: status $status; queueing again" >&2
    scontrol requeue "$SLURM_JOB_ID"
    ;;
esac
exit "$status"
