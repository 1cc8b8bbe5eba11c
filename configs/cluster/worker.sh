#!/usr/bin/env bash
# One trainer of torchrun.sh: worker.sh FILE CONFIG [--key value ...]
# A stop on request is no failure (torchrun would start it anew): FILE is made, and the status is 0.
set -uo pipefail
stopped=$1
shift

vlm train "$@" &
trainer=$!
trap 'kill -USR1 "$trainer"' USR1 TERM INT

wait "$trainer"
status=$?
while kill -0 "$trainer" 2>/dev/null; do # a signal has ended `wait`; the trainer saves
    wait "$trainer"
    status=$?
done
if [ "$status" = 3 ]; then
    touch "$stopped"
    exit 0
fi
exit "$status"
