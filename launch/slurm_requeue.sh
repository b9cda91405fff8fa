#!/usr/bin/env bash
# Trains on one or more nodes for longer than the time limit: before the limit, the run saves and the job is requeued.
#   sbatch launch/slurm_requeue.sh CONFIG RUN [OPTIONS]     in this folder, with the environment active
#   LAUNCH=accelerate_configs/multi_gpu.yaml sbatch --gpus-per-node=8 launch/slurm_requeue.sh …      on more GPUs
#   LAUNCH=accelerate_configs/multi_node.yaml sbatch --nodes=4 --gpus-per-node=8 launch/slurm_requeue.sh …  on nodes
# To end the job for good, use scancel. Options of sbatch override these lines:
#SBATCH --job-name=plainloop
#SBATCH --nodes=1 --ntasks-per-node=1 --cpus-per-task=8
#SBATCH --gpus-per-node=1
#SBATCH --time=24:00:00
# Signal only this shell (B), 300 s before the limit (up to a minute earlier): enough for a step and a save.
#SBATCH --signal=B:USR1@300
#SBATCH --requeue
#SBATCH --output=%x-%j.out --open-mode=append
set -euo pipefail

job=${SLURM_JOB_ID:?"is not set: start this with sbatch"}
config=${1:?"CONFIG, a recipe"} run=${2:?"RUN, its run folder"}
launch=${LAUNCH:-accelerate_configs/single_gpu.yaml} restarts=${SLURM_RESTART_COUNT:-0}
max_restarts=20 # of this job; after that, a killed launch is not requeued
nodes=$SLURM_JOB_NUM_NODES gpus=${SLURM_GPUS_ON_NODE:-}
read -r head < <(scontrol show hostnames "$SLURM_JOB_NODELIST") # node 0; this shell runs there too
port=$((20000 + job % 10000)) # the same on all nodes, different for each job, below Linux's ephemeral ports
shift 2

mkdir -p "$run"
rm -f "$run/stop"      # left over if an earlier launch ended before it saw it
touch "$run/.launched" # an older summary.json belongs to an earlier launch
trap 'echo "the time limit is near: asking $run to stop"; touch "$run/stop"' USR1

# One launcher per node, because only there $SLURM_NODEID is known. If one fails, Slurm ends the others; if a node is
# lost, Slurm requeues the whole job. The launch uses the GPUs that Slurm allocated, whatever the file says.
# shellcheck disable=SC2016
task='exec accelerate launch --machine_rank "$SLURM_NODEID" "$@"'
# In the background, because bash runs traps only between commands. srun does not inherit --cpus-per-task.
srun --kill-on-bad-exit=1 --cpus-per-task="$SLURM_CPUS_PER_TASK" bash -c "$task" bash --config_file "$launch" \
  --num_machines "$nodes" --main_process_ip "$head" --main_process_port "$port" \
  ${gpus:+--num_processes "$((nodes * gpus))"} --gpu_ids all \
  train.py --config "$config" --output "$run" --checkpoint.resume auto "$@" &
launcher=$!
while kill -0 "$launcher" 2> /dev/null; do
  wait "$launcher" || true # a trap also ends `wait`; summary.json, not the exit code, says how the run ended
done

reason=nothing # killed, or refused at startup before it wrote to its folder
[[ "$run/environment.json" -nt "$run/.launched" ]] || reason=refused
if [[ "$run/summary.json" -nt "$run/.launched" ]]; then
  read_end='import json, sys; end = json.load(sys.stdin); print("finished" if end["finished"] else end["reason"])'
  reason=$(python -c "$read_end" < "$run/summary.json")
fi
echo "job $job, restart $restarts, ended with: $reason"
case $reason in
  finished) exit 0 ;;
  error | refused) exit 1 ;; # would fail again
  nothing | rank_gone) ((restarts < max_restarts)) || exit 1 ;; # killed
esac
scontrol requeue "$job" # also ends this shell
