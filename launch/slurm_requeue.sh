#!/usr/bin/env bash
# One node, for longer than the time limit: warned before it, the run saves and ends, and the job queues again.
#   sbatch launch/slurm_requeue.sh CONFIG RUN [OPTIONS]     in this folder, environment active: Slurm keeps both
#   LAUNCH=accelerate_configs/multi_gpu.yaml sbatch --gpus-per-node=8 launch/slurm_requeue.sh …      on more GPUs
# To end the job for good: scancel. What sbatch is given wins over these lines:
#SBATCH --job-name=plainloop
#SBATCH --nodes=1 --ntasks=1 --cpus-per-task=8
#SBATCH --gpus-per-node=1
#SBATCH --time=24:00:00
# Seconds before the limit (Slurm may be a minute early), to this shell alone (B): enough for a step and a save.
#SBATCH --signal=B:USR1@300
#SBATCH --requeue
#SBATCH --output=%x-%j.out --open-mode=append
set -euo pipefail

job=${SLURM_JOB_ID:?"is not set: start this with sbatch"}
config=${1:?"CONFIG, a recipe"} run=${2:?"RUN, its run folder"}
launch=${LAUNCH:-accelerate_configs/single_gpu.yaml} restarts=${SLURM_RESTART_COUNT:-0}
max_restarts=20 # of this job, beyond which a launch that was killed is not tried again
shift 2

mkdir -p "$run"
rm -f "$run/stop"      # asked of an earlier launch, which ended before it looked
touch "$run/.launched" # a summary.json that is older is an earlier launch's
trap 'echo "the time is nearly up: asking $run to stop"; touch "$run/stop"' USR1

# In the background, since bash runs a trap only between commands. The GPUs are the ones that Slurm gave, whatever the
# file says; the port is a free one, as another job may be on the node.
accelerate launch --config_file "$launch" ${SLURM_GPUS_ON_NODE:+--num_processes "$SLURM_GPUS_ON_NODE"} \
  --gpu_ids all --main_process_port 0 \
  train.py --config "$config" --output "$run" --checkpoint.resume auto "$@" &
launcher=$!
while kill -0 "$launcher" 2> /dev/null; do
  wait "$launcher" || true # a trap ends `wait`, too; the launcher's exit code says nothing, summary.json does
done
while pgrep -f -- "--output $run --checkpoint" > /dev/null; do sleep 1; done # of a killed launcher: they save

reason=nothing # killed; or refused at its start, before it wrote of itself in its folder
[[ "$run/environment.json" -nt "$run/.launched" ]] || reason=refused
if [[ "$run/summary.json" -nt "$run/.launched" ]]; then
  read_end='import json, sys; end = json.load(sys.stdin); print("finished" if end["finished"] else end["reason"])'
  reason=$(python -c "$read_end" < "$run/summary.json")
fi
echo "job $job, restart $restarts, ended with: $reason"
case $reason in
  finished) exit 0 ;;
  error | refused) exit 1 ;; # it would come again
  nothing | rank_gone) ((restarts < max_restarts)) || exit 1 ;; # killed
esac
scontrol requeue "$job" # ends this shell
