"""The launch: refuses what accelerate would silently ignore or misread, and says what is active.

    python -m training.launch FILE...     # checks configuration files of `accelerate launch` before they are used

accelerate decides processes, devices, precision and sharding. Nothing here changes them.
"""

import dataclasses
import math
import os
import sys
from argparse import Namespace
from pathlib import Path
from typing import Any

import psutil
import torch
from accelerate import Accelerator, PartialState
from accelerate.commands.config.config_args import ClusterConfig, default_config_file, load_config_from_file
from accelerate.commands.launch import launch_command_parser
from accelerate.utils import DistributedType, PrecisionType, parse_flag_from_env
from transformers import AutoModelForCausalLM

from training.optimization.optimizers import OPTIMIZERS, check_optimizer
from utils.cli import LAUNCHER_PID, UserError, nearest, run_script
from utils.config import TrainConfig
from utils.files import read_yaml
from utils.objectives import objective_module

SUPPORTED = (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU, DistributedType.FSDP)
# The variables in which Slurm's srun and the MPI launchers say how many tasks they started.
TASK_COUNTS = ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE")
PARALLEL = ("dp_replicate", "dp_shard", "cp", "sp", "tp")  # the sizes in parallelism_config
# Section of a launch file → its group of options in accelerate's parser, and the prefix that a key may leave out.
SECTIONS = {
    "fsdp_config": ("FSDP Arguments", "fsdp_"),
    "deepspeed_config": ("DeepSpeed Arguments", ""),
    "parallelism_config": ("ParallelismConfig Arguments", ""),
    "fp8_config": ("FP8 Arguments", "fp8_"),
    "megatron_lm_config": ("Megatron-LM Arguments", ""),
    "mpirun_config": ("MPI Arguments", ""),
    "dynamo_config": ("Resource Selection Arguments", "dynamo_"),
}
NEEDS_FSDP2 = "fsdp_config.fsdp_version must be 2: version 1 silently trains nothing without use_orig_params"
UNSUPPORTED = "distributed_type {} is not supported; use NO, MULTI_GPU or FSDP"


@dataclasses.dataclass
class BatchPlan:
    """The split of the global batch: accumulation × data_parallel_size × micro_batch = global_batch_size."""

    global_batch_size: int
    micro_batch: int
    data_parallel_size: int
    accumulation: int
    context_parallel_size: int = 1  # ranks that read the same rows, each its part of their positions

    @property
    def num_processes(self) -> int:
        return self.data_parallel_size * self.context_parallel_size


def plan_batches(
    global_batch_size: int, per_device_batch_size: int | None, num_processes: int, context_parallel_size: int = 1
) -> BatchPlan:
    """Split the global batch (sequences) over ranks and micro-batches; `UserError` names sizes that would fit."""
    data_parallel_size = num_processes // context_parallel_size
    ranks = "processes" if context_parallel_size == 1 else f"groups of {context_parallel_size} processes"
    share, remainder = divmod(global_batch_size, data_parallel_size)
    if remainder:
        fitting = " or ".join(str(number * data_parallel_size) for number in (share, share + 1) if number)
        raise UserError(
            f"batch.global_batch_size {global_batch_size} cannot be split evenly over {data_parallel_size} {ranks}; "
            f"{fitting} would fit"
        )
    micro_batch = per_device_batch_size or share
    if share % micro_batch:
        fitting = ", ".join(str(size) for size in range(1, share + 1) if share % size == 0)
        raise UserError(
            f"batch.per_device_batch_size {micro_batch} does not divide each process's share of {share} sequences "
            f"(batch.global_batch_size {global_batch_size} over {data_parallel_size}); {fitting} would fit"
        )
    return BatchPlan(global_batch_size, micro_batch, data_parallel_size, share // micro_batch, context_parallel_size)


def check_launch(accelerator: Accelerator, plan: BatchPlan, config: TrainConfig) -> None:
    """Raise `UserError` for a launch that would train something else than it says."""
    asked, active = os.environ.get("ACCELERATE_MIXED_PRECISION", "no"), accelerator.distributed_type
    if asked == "fp16" and accelerator.device.type == "cpu":
        raise UserError("fp16 with loss scaling needs a GPU; on a CPU launch with --mixed_precision bf16 or no")
    if asked != accelerator.mixed_precision:
        raise UserError(f"the launch asked for precision {asked}, active is {accelerator.mixed_precision}")
    accumulation = os.environ.get("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "1")
    if accumulation != "1":
        raise UserError(
            f"the launch sets gradient_accumulation_steps {accumulation}: leave it out; train.py accumulates by itself "
            f"({plan.accumulation} micro-batches, from batch.global_batch_size and batch.per_device_batch_size)"
        )
    for kind in ("FSDP", "DEEPSPEED", "MEGATRON_LM"):  # asked for by a variable; accelerate may do something else
        if parse_flag_from_env(f"ACCELERATE_USE_{kind}") and active.value != kind:
            raise UserError(
                f"the launch asked for {kind}, active is {active.value}: accelerate does not shard on "
                f"{accelerator.device.type}; launch without it"
            )
    check_process_count(accelerator.num_processes)
    if active not in SUPPORTED:
        raise UserError(UNSUPPORTED.format(active.value))
    if active == DistributedType.FSDP:
        check_sharding(accelerator, config)


def check_sharding(accelerator: Accelerator, config: TrainConfig) -> None:
    """`UserError` naming everything that does not work with sharded parameters."""
    plugin, parallelism = accelerator.state.fsdp_plugin, accelerator.parallelism_config
    problems = []
    if plugin.fsdp_version != 2:
        problems.append(NEEDS_FSDP2)
    if plugin.activation_checkpointing:
        problems.append("fsdp_activation_checkpointing redraws dropout masks; use model.activation_checkpointing")
    if parallelism is not None and parallelism.cp_enabled:
        problems += context_problems(config, parallelism.cp_size)
    if config.objective.name == "captioning":  # a rank without a picture would not gather what reads pictures
        problems.append("objective.name captioning is not supported; use DDP")
    check_optimizer(config.optimizer)
    if not OPTIMIZERS[config.optimizer.name].shards:
        sharding = ", ".join(name for name, entry in OPTIMIZERS.items() if entry.shards)
        problems.append(f"optimizer.name {config.optimizer.name} does not shard its state; use one of {sharding}")
    if config.model.lora.rank:
        problems.append("model.lora is not supported; its memory is small: use DDP")
    if problems:
        raise UserError(f"with FSDP, {'; '.join(problems)}")


def context_problems(config: TrainConfig, size: int) -> list[str]:
    """What does not work if `size` ranks share the positions of each row."""
    found = []
    if objective_module(config.objective.name).AUTO_MODEL is not AutoModelForCausalLM:
        found.append(f"parallelism_config_cp_size: objective.name {config.objective.name} is not supported")
    if config.data.sequence_length % (8 * size):
        found.append(f"parallelism_config_cp_size {size}: data.sequence_length must be a multiple of {8 * size}")
    if config.data.layout == "padded" and config.data.pad_to != "max_length":
        found.append("parallelism_config_cp_size: padded rows must have one length, --data.pad_to max_length")
    if config.model.attention not in ("auto", "sdpa"):
        found.append("parallelism_config_cp_size has its own attention: leave model.attention auto")
    return found


def context_parallel_size(launch: PartialState) -> int:
    """How many ranks share each row, by accelerate's parallelism_config; `UserError` for sizes that do not work.

    Call it before the Accelerator is made, whose own errors do not name the option.
    """
    if not parse_flag_from_env("ACCELERATE_USE_PARALLELISM_CONFIG"):
        return 1
    sizes = {name: int(os.environ.get(f"PARALLELISM_CONFIG_{name.upper()}_SIZE") or 1) for name in PARALLEL}
    sharded = parse_flag_from_env("ACCELERATE_USE_FSDP")
    if problem := find_size_problem(sizes, sharded=sharded, num_processes=launch.num_processes):
        raise UserError(problem)
    if sharded and max(sizes.values()) == 1:
        raise UserError("parallelism_config: all its sizes are 1; leave it out, and FSDP shards over all processes")
    if sharded and launch.distributed_type == DistributedType.MULTI_CPU:
        raise UserError(
            "parallelism_config: accelerate shards on GPUs only; on CPUs use accelerate_configs/cpu_2_processes.yaml"
        )
    return sizes["cp"]


def check_process_count(num_processes: int) -> None:
    """`UserError` if accelerate started fewer processes than asked for, or a scheduler several that are alone."""
    asked = asked_processes()
    if asked is not None and asked != num_processes:
        raise UserError(
            f"the launch asked for {asked} processes and got {num_processes}: on CPUs accelerate starts several only "
            f"with --config_file accelerate_configs/cpu_2_processes.yaml --num_processes {asked}, on GPUs with "
            "--multi_gpu; for one process give --num_processes 1"
        )
    for name in TASK_COUNTS:
        if num_processes == 1 and int(os.environ.get(name) or 1) > 1:
            raise UserError(
                f"{os.environ[name]} tasks were started ({name}), and each would train by itself: start one task per "
                "machine, and in it `accelerate launch` with --num_machines, --machine_rank and --num_processes"
            )


def asked_processes() -> int | None:
    """The number of processes that `accelerate launch` was asked for; None if it was not asked.

    Only its command line tells: accelerate passes nothing on if it starts one process in place of several.
    """
    if (options := launcher_options()) is None:
        return None
    count, file = options.num_processes, options.config_file
    if count is None and (file or (not options.cpu and os.path.isfile(default_config_file))):
        count = load_config_from_file(file).num_processes
    return int(count) if count and count > 0 else None


def launcher_options() -> Namespace | None:
    """The options of `accelerate launch`, if it is our parent process."""
    try:
        words = psutil.Process(LAUNCHER_PID).cmdline()
    except psutil.Error:
        return None
    names = [os.path.basename(word) for word in words]
    ends = ("accelerate launch", "accelerate-launch", "accelerate.commands.launch")
    start = next((index for index in range(1, 5) if " ".join(names[:index]).endswith(ends)), None)
    return None if start is None else launch_command_parser().parse_args(words[start:])


def describe_launch(accelerator: Accelerator, plan: BatchPlan) -> list[str]:
    """Lines that say what is active."""
    context = plan.context_parallel_size
    each = "process(es)" if context == 1 else f"group(s) of {context} processes, which share each row,"
    return [
        f"launch: {accelerator.num_processes} process(es) on {accelerator.device.type}, "
        f"{accelerator.distributed_type.value}, precision {accelerator.mixed_precision}, "
        f"{torch.get_num_threads()} thread(s) each",
        f"batch: {plan.global_batch_size} sequences = {plan.data_parallel_size} {each} × "
        f"{plan.accumulation} micro-batch(es) × {plan.micro_batch}",
    ]


def check_launch_file(path: Path) -> None:
    """`UserError` naming everything that is wrong with a file for `accelerate launch --config_file`."""
    if problems := find_problems(read_yaml(path)):
        raise UserError(f"{path}: {'; '.join(problems)}")


def find_size_problem(sizes: dict[str, Any], *, sharded: bool, num_processes: int | None) -> str | None:
    """What is unsupported or inconsistent in accelerate's parallelism_config; None if nothing is.

    `sizes` have the names in `PARALLEL`. `sharded`: whether the launch asks for FSDP. `num_processes`: None if unknown.
    """
    asked = {name: size for name, size in sizes.items() if size != 1}
    for name, size in asked.items():
        if type(size) is not int or size < 1:
            return f"parallelism_config_{name}_size {size} must be a whole number, 1 or more"
        if name in ("tp", "sp"):
            return f"parallelism_config_{name}_size {size} is not supported; leave it out"
        if not sharded:
            return f"parallelism_config_{name}_size {size} needs distributed_type: FSDP with fsdp_version: 2"
    if sizes["dp_replicate"] > 1 and sizes["dp_shard"] == 1:
        return (
            "parallelism_config_dp_replicate_size needs a dp_shard_size above 1; for DDP leave parallelism_config out"
        )
    product = math.prod(sizes.values())
    if asked and num_processes not in (None, product):
        named = " × ".join(f"{name}_size {size}" for name, size in asked.items())
        return (
            f"parallelism_config: {named} must equal the number of processes, {num_processes}; change the sizes, or "
            f"launch with --num_processes {product}"
        )
    return None


def find_problems(file: dict[str, Any]) -> list[str]:
    """What is wrong with the values of a launch file, each with the key and what to write."""
    known = [*(field.name for field in dataclasses.fields(ClusterConfig)), "fp16", "dynamo_backend"]  # two old ones
    found = [_unknown(name, known) for name in file if name not in known]
    groups = {group.title: group for group in launch_command_parser()._action_groups}
    sections = {section: file.get(section) or {} for section in SECTIONS}
    for section, (title, prefix) in SECTIONS.items():
        if not isinstance(sections[section], dict):
            found.append(f"{section} must hold `key: value` lines")
            sections[section] = {}
        options = [action.dest for action in groups[title]._group_actions]
        unknown = (key for key in sections[section] if prefix + key.removeprefix(prefix) not in options)
        found += [_unknown(key, options, f"{section}.") for key in unknown]
    precision, precisions = file.get("mixed_precision", "no"), [each.value for each in PrecisionType]
    if not isinstance(precision, str):
        found.append("mixed_precision must be in quotes: 'no', 'bf16', 'fp16' or 'fp8'; YAML reads a bare no as false")
    elif precision not in precisions:
        found.append(_unknown(precision, precisions, "mixed_precision "))
    processes = file.get("num_processes", 1)
    if type(processes) is not int:
        found.append(f"num_processes {processes} must be a whole number")
    if "distributed_type" not in file:
        return [*found, "distributed_type is missing; for one process write distributed_type: 'NO'"]
    chosen, types = str(file["distributed_type"]), [each.value for each in DistributedType]
    sizes = {name: sections["parallelism_config"].get(f"parallelism_config_{name}_size", 1) for name in PARALLEL}
    if problem := find_size_problem(sizes, sharded=chosen == "FSDP", num_processes=file.get("num_processes")):
        found.append(problem)
    if chosen not in types:
        found.append(_unknown(chosen, types, "distributed_type "))
    elif chosen == "FSDP" and sections["fsdp_config"].get("fsdp_version") != 2:
        found.append(NEEDS_FSDP2)
    elif chosen not in [each.value for each in SUPPORTED]:
        found.append(UNSUPPORTED.format(chosen))
    if chosen in ("NO", "MULTI_CPU") and processes != 1:
        found.append(
            f"accelerate starts one process for distributed_type {chosen}, not {processes}; for several on CPUs write "
            "distributed_type: MULTI_GPU and use_cpu: true, as accelerate_configs/cpu_2_processes.yaml does"
        )
    return found


def _unknown(name: str, known: list[str], where: str = "") -> str:
    return f"{where}{name} is unknown to accelerate, which may ignore it{nearest(str(name), known)}"


def main(files: list[str]) -> None:
    if not files or files[0].startswith("-"):
        raise UserError("usage: python -m training.launch FILE..., files of accelerate_configs/ or your own")
    found = []
    for file in files:
        try:
            check_launch_file(Path(file))
            print(f"{file}: no problems found")
        except UserError as error:
            found.append(str(error))
    if found:
        raise UserError("\n".join(found))


if __name__ == "__main__":
    run_script(main, sys.argv[1:])
