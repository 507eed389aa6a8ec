#!/usr/bin/env bash
# One machine, all its devices, one process. Restarts after a crash. Stops when the run is complete, was asked to
# stop, or cannot work at all.
#
#   launch/one_machine.sh --config chatpose_13b --init out/llava-13b --out out/13b
#
# TRIES (20): number of starts. PAUSE (10): seconds between two starts.
[[ $# -gt 0 ]] || { sed -n '2,7p' "$0"; exit 2; }
set -um                                     # m: the program has its own process group, so a Ctrl-C reaches it once, by the trap
tries=${TRIES:-20}
child=
stopping=
# Pass signals on to the program, so that it saves and stops. Without the trap bash would wait until the program ends.
trap 'stopping=yes; kill -TERM "$child" 2>/dev/null' TERM INT

for ((try = 1; try <= tries; try++)); do
  chatpose train "$@" &
  child=$!
  wait "$child"
  status=$?
  while kill -0 "$child" 2>/dev/null; do    # a trapped signal ends wait, not the program
    wait "$child"
    status=$?
  done
  case $status in
    0) exit 0 ;;                            # complete
    2 | 130 | 143) exit "$status" ;;        # bad input; Ctrl-C; SIGTERM, after which everything is saved
    126 | 127) exit "$status" ;;            # no such program: activate the environment that has it
  esac
  echo "one_machine.sh: status $status, start $try of $tries" >&2
  ((try == tries)) || sleep "${PAUSE:-10}"  # the next start resumes
  [[ -z $stopping ]] || exit "$status"
done
exit "$status"
