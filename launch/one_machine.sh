#!/usr/bin/env bash
# One machine, all its devices, one process. Starts again after a crash; stops when the run is complete, was asked to
# stop, or cannot work at all.
#
#   launch/one_machine.sh --config chatpose_13b --init out/llava-13b --out out/13b
#
# TRIES (20): how often to start again. PAUSE (10): seconds in between.
set -u
tries=${TRIES:-20}

for ((try = 1; try <= tries; try++)); do
  chatpose train "$@"
  status=$?
  case $status in
    0) exit 0 ;;                            # complete
    2 | 130 | 143) exit "$status" ;;        # bad input; Ctrl-C; SIGTERM, after which everything is saved
  esac
  echo "one_machine.sh: status $status, start $try of $tries; the next one resumes" >&2
  sleep "${PAUSE:-10}"
done
exit "$status"
