#!/usr/bin/env bash
# SLURM: one process for each GPU; two nodes of eight here. Change the numbers to yours, then:
#
#   sbatch launch/slurm.sh --config chatpose_13b --init /shared/llava-13b --out /shared/runs/13b
#
# --out and --init must lie on a file system that all nodes share. The run goes on by itself: SIGTERM comes three minutes
# before the time limit (and at a preemption), the run saves and exits with 143, and the job queues again; so it does
# after 1, 75, 134 or 137 (the file system failed, a process crashed or was lost), up to a hundred times. Resuming with other numbers below is fine. To end
# it: scancel --signal=KILL. The environment that has `chatpose` must be active when sbatch is called (it is inherited), or
# activate it below; an account or a partition goes on sbatch's command line. With JAX_COMPILATION_CACHE_DIR=/shared/compiled
# (on the file system of all nodes, where strangers must not write) the next start finds what this one compiled.
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
[[ $# -gt 0 ]] || { sed -n '2,11p' "$0"; exit 2; }
set -u

# Processes find each other through SLURM's variables. One that dies takes the others of this step with it.
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
