#!/usr/bin/env bash
# Ctrl-C saves, waits for the save and exits with 0, whatever launches the processes: accelerate and torchrun return at
# once or after 30 seconds, with a traceback. SIGTERM and a closed terminal do the same.
#   launch/interruptible.sh RUN accelerate launch --config_file accelerate_configs/multi_gpu.yaml train.py --config CONFIG
# It adds `--output RUN`. The terminal signals this script alone, which asks for the end by the file RUN/stop.
set -euo pipefail
set -m # a background job is a process group of its own

if (($# < 2)); then
  echo "usage: launch/interruptible.sh RUN COMMAND..., as in: launch/interruptible.sh runs/mine python train.py" >&2
  exit 2
fi
run=$1
shift

"$@" --output "$run" &
launcher=$!
trap 'mkdir -p "$run" && touch "$run/stop" && echo "stopping: saving after this step, then ending" >&2' INT TERM HUP

while code=0; wait "$launcher" || code=$?; kill -0 "$launcher" 2>/dev/null; do :; done
exit "$code"
