#!/usr/bin/env bash
# Runs torchrun, which restarts all processes when one dies; they resume from the run's newest checkpoint.
#   launch/torchrun_elastic.sh CONFIG RUN [OPTIONS]                       all GPUs of this machine
#   NODES=2:4 HEAD=10.0.0.1 launch/torchrun_elastic.sh CONFIG RUN …       each of 2 to 4 machines; HEAD is one
#   ACCELERATE_USE_CPU=true PROCESSES=2 launch/torchrun_elastic.sh …      on CPUs
# Machines may join and leave between restarts. The global batch stays: the number of processes must divide it.
set -euo pipefail

config=${1:?"CONFIG, a recipe"} run=${2:?"RUN, its run folder"}
shift 2

# Otherwise a restarted rank may find the store of the previous launch (torch 2.13).
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
export ACCELERATE_MIXED_PRECISION=${ACCELERATE_MIXED_PRECISION:-no}

if [[ -n ${HEAD:-} ]]; then
  meeting=(--nnodes "${NODES:?"MIN:MAX machines"}" --rdzv_backend c10d --rdzv_endpoint "$HEAD:${PORT:-29400}" --rdzv_id "$run")
else
  meeting=(--standalone --local_addr 127.0.0.1)
fi
exec torchrun "${meeting[@]}" --nproc_per_node "${PROCESSES:-gpu}" --max_restarts "${RESTARTS:-20}" \
  train.py --config "$config" --output "$run" --checkpoint.resume auto "$@"
