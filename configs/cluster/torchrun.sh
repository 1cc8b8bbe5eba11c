#!/usr/bin/env bash
# One node's part of a training on several nodes, a process for each of its GPUs; the same command on every node:
#   HEAD=node1:29500 NODES=2 configs/cluster/torchrun.sh configs/pretrain/albef_base.yaml --data.workers 8
# HEAD: where the nodes meet, a port of one of them. NODES: how many there are; 1:4 goes on with fewer where some are lost, and data.streams must
# then be divisible by every number of GPUs that may come of it. Data and runs lie on a file system that all nodes see.
#
# Where a process dies, all start anew, at most three times, from the last state that was saved (train.save_every).
# SIGUSR1 to this script, on one of the nodes, stops the training of all: it saves, and every node ends with status 3; the same command goes on.
set -uo pipefail
here=$(dirname "$0")
stopped=$(mktemp -u)

torchrun --no-python --nnodes "$NODES" --nproc-per-node auto --max-restarts 3 \
    --rdzv-backend c10d --rdzv-endpoint "$HEAD" --rdzv-id "${ID:-vlm}" \
    bash "$here/worker.sh" "$stopped" "$@" --resume auto &
torchrun=$!
# To the workers: torchrun itself gives them half a minute, too short to save a large model.
trap 'pkill -USR1 -P "$torchrun"' USR1
trap 'kill -TERM "$torchrun"' TERM INT

wait "$torchrun"
status=$?
while kill -0 "$torchrun" 2>/dev/null; do # a signal has ended `wait`
    wait "$torchrun"
    status=$?
done
if [ -e "$stopped" ]; then
    rm -f "$stopped"
    exit 3
fi
exit "$status"
