#!/usr/bin/env bash
# One node or several, for longer than the time limit: warned before it, the run saves and ends, and the job queues again.
#   sbatch launch/slurm_requeue.sh CONFIG RUN [OPTIONS]     in this folder, environment active: Slurm keeps both
#   LAUNCH=accelerate_configs/multi_gpu.yaml sbatch --gpus-per-node=8 launch/slurm_requeue.sh …      on more GPUs
#   LAUNCH=accelerate_configs/multi_node.yaml sbatch --nodes=4 --gpus-per-node=8 launch/slurm_requeue.sh …   on more nodes
# To end the job for good: scancel. What sbatch is given wins over these lines:
#SBATCH --job-name=plainloop
#SBATCH --nodes=1 --ntasks-per-node=1 --cpus-per-task=8
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
nodes=$SLURM_JOB_NUM_NODES gpus=${SLURM_GPUS_ON_NODE:-}
read -r head < <(scontrol show hostnames "$SLURM_JOB_NODELIST") # node 0, on which this shell runs, too
port=$((20000 + job % 10000)) # the same on all nodes, another for each job, below those that Linux gives away itself
shift 2

mkdir -p "$run"
rm -f "$run/stop"      # asked of an earlier launch, which ended before it looked
touch "$run/.launched" # a summary.json that is older is an earlier launch's
trap 'echo "the time is nearly up: asking $run to stop"; touch "$run/stop"' USR1

# A launcher on each node: only there is $SLURM_NODEID known. When one ends in an error, Slurm ends the others; after the
# loss of a node it queues the whole job again. The GPUs are those that Slurm gave, whatever the file says.
# shellcheck disable=SC2016
task='exec accelerate launch --machine_rank "$SLURM_NODEID" "$@"'
# In the background, since bash runs a trap only between commands. srun does not take over --cpus-per-task.
srun --kill-on-bad-exit=1 --cpus-per-task="$SLURM_CPUS_PER_TASK" bash -c "$task" bash --config_file "$launch" \
  --num_machines "$nodes" --main_process_ip "$head" --main_process_port "$port" \
  ${gpus:+--num_processes "$((nodes * gpus))"} --gpu_ids all \
  train.py --config "$config" --output "$run" --checkpoint.resume auto "$@" &
launcher=$!
while kill -0 "$launcher" 2> /dev/null; do
  wait "$launcher" || true # a trap ends `wait`, too; the launcher's exit code says nothing, summary.json does
done

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
