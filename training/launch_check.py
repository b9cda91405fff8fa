"""What the launch asked for against what is active: refuses silent differences, before any training.

python -m training.launch_check FILE     # a configuration file of accelerate, before it is used
"""

import os
import sys
from pathlib import Path

import psutil
import torch
from accelerate import Accelerator, PartialState
from accelerate.commands.config.config_args import default_config_file, load_config_from_file
from accelerate.commands.launch import launch_command_parser
from accelerate.utils import DistributedType, parse_flag_from_env
from transformers import AutoModelForCausalLM

from training.batch_plan import BatchPlan
from training.hardware import fast_bf16
from training.launch_file import PARALLEL, SUPPORTED, check_launch_file, find_size_problem
from utils.cli import LAUNCHER_PID, UserError, run_script
from utils.config import TrainConfig
from utils.objectives import objective_module

# What the launch asks for by a variable, and what is then active.
ASKED_BY_VARIABLE = {
    "ACCELERATE_USE_FSDP": DistributedType.FSDP,
    "ACCELERATE_USE_DEEPSPEED": DistributedType.DEEPSPEED,
    "ACCELERATE_USE_MEGATRON_LM": DistributedType.MEGATRON_LM,
}
# Where Slurm's srun and the MPI launchers say how many tasks they have started.
TASK_COUNTS = ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE")


def check_launch(accelerator: Accelerator, plan: BatchPlan, config: TrainConfig) -> None:
    """Raise `UserError` for a launch that would train something else than it says."""
    asked = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if asked == "fp16" and accelerator.device.type == "cpu":
        raise UserError(
            "fp16 with loss scaling needs a GPU: on a CPU accelerate would train in fp32 without saying so; "
            "launch with --mixed_precision bf16 or no"
        )
    if asked != accelerator.mixed_precision:
        raise UserError(f"the launch asked for precision {asked}, active is {accelerator.mixed_precision}")
    accumulation = os.environ.get("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "1")
    if accumulation not in ("1", str(plan.accumulation)):
        raise UserError(
            f"the launch sets gradient_accumulation_steps {accumulation}, the recipe needs {plan.accumulation}: leave "
            "it out of the launch; it follows from batch.global_batch_size and batch.per_device_batch_size"
        )
    for variable, kind in ASKED_BY_VARIABLE.items():
        if parse_flag_from_env(variable) and accelerator.distributed_type != kind:
            raise UserError(
                f"the launch asked for {kind.value}, active is {accelerator.distributed_type.value}: accelerate does not "
                f"shard on {accelerator.device.type}; launch without it"
            )
    check_process_count(accelerator.num_processes)
    if accelerator.distributed_type not in SUPPORTED:
        raise UserError(
            f"distributed_type {accelerator.distributed_type.value} is not supported yet; "
            f"use one of {', '.join(kind.value for kind in SUPPORTED)}"
        )
    if accelerator.distributed_type == DistributedType.FSDP:
        check_sharding(accelerator, config)


def check_sharding(accelerator: Accelerator, config: TrainConfig) -> None:
    """`UserError` for what is not right with parameters that are shared out over the ranks."""
    plugin, parallelism = accelerator.state.fsdp_plugin, accelerator.parallelism_config
    problems = []
    if plugin.fsdp_version != 2:
        problems.append("fsdp_version must be 2: version 1 trains nothing without use_orig_params, silently")
    if plugin.activation_checkpointing:
        problems.append("fsdp_activation_checkpointing draws other dropout in the backward pass; use "
                        "--model.activation_checkpointing true")  # fmt: skip
    if parallelism is not None and parallelism.cp_enabled:
        problems += context_problems(config, parallelism.cp_size)
    if config.optimizer.name in ("adafactor", "adamw_8bit"):
        problems.append(f"optimizer.name {config.optimizer.name} does not share out its state; use adamw, muon or sgd")
    if config.model.lora.rank:
        problems.append("model.lora is not supported; its memory is small: use DDP")
    if problems:
        raise UserError(f"with FSDP, {'; '.join(problems)}")


def context_problems(config: TrainConfig, size: int) -> list[str]:
    """What does not go with rows whose positions are shared out over `size` ranks."""
    found = []
    if objective_module(config.objective.name).AUTO_MODEL is not AutoModelForCausalLM:
        found.append(f"parallelism_config_cp_size: objective.name {config.objective.name} does not go with it")
    if config.data.sequence_length % (8 * size):
        found.append(f"parallelism_config_cp_size {size}: data.sequence_length must be a multiple of {8 * size}")
    if config.data.layout == "padded" and config.data.pad_to != "max_length":
        found.append("parallelism_config_cp_size: padded rows must be of one length, --data.pad_to max_length")
    if config.model.attention not in ("auto", "sdpa"):
        found.append("parallelism_config_cp_size has its own attention: leave model.attention auto")
    return found


def context_parallel_size(launch: PartialState) -> int:
    """Over how many ranks the launch shares out each row, by accelerate's parallelism_config.

    `UserError` for sizes in it that are not supported, or do not fit the launch. To be called before the Accelerator is
    made, which raises whatever they lead to.
    """
    if not parse_flag_from_env("ACCELERATE_USE_PARALLELISM_CONFIG"):
        return 1
    sizes = {name: int(os.environ.get(f"PARALLELISM_CONFIG_{name.upper()}_SIZE") or 1) for name in PARALLEL}
    sharded = parse_flag_from_env("ACCELERATE_USE_FSDP")
    if problem := find_size_problem(sizes, sharded=sharded, num_processes=launch.num_processes):
        raise UserError(problem)
    if sharded and max(sizes.values()) == 1:
        raise UserError("parallelism_config: all its sizes are 1; leave it out, and FSDP shares out over all processes")
    if sharded and launch.distributed_type == DistributedType.MULTI_CPU:
        raise UserError("parallelism_config: accelerate shards on GPUs only, and this launch is on CPUs; take "
                        "accelerate_configs/cpu.yaml or cpu_2_processes.yaml")  # fmt: skip
    return sizes["cp"]


def check_launcher_file() -> None:
    """`UserError` if the file that the launcher has read says something that accelerate ignores or misreads.

    To be called before accelerate looks at the machine, which raises whatever an option leads to.
    """
    if (file := launch_file()) is not None:
        check_launch_file(file)


def check_process_count(num_processes: int) -> None:
    """`UserError` if the launcher was asked for another number of processes, or started several that are each alone."""
    asked = asked_processes()
    if asked is not None and asked != num_processes:
        raise UserError(
            f"the launch asked for {asked} processes and got {num_processes}: on CPUs accelerate starts several only with "
            f"--config_file accelerate_configs/cpu_2_processes.yaml --num_processes {asked}, on GPUs with --multi_gpu; "
            "for one process give --num_processes 1"
        )
    for name in TASK_COUNTS:
        if num_processes == 1 and int(os.environ.get(name) or 1) > 1:
            raise UserError(
                f"{os.environ[name]} tasks were started ({name}), and each would train by itself: start one task per "
                "machine, and in it `accelerate launch` with --num_machines, --machine_rank and --num_processes"
            )


def launcher_command() -> list[str] | None:
    """The command line of the parent process, if it is `accelerate launch` or `torchrun`; empty if that has died."""
    if os.getppid() != LAUNCHER_PID:
        started = any(name in os.environ for name in ("TORCHELASTIC_RUN_ID", "ACCELERATE_MIXED_PRECISION"))
        return [] if started else None
    try:
        words = psutil.Process(LAUNCHER_PID).cmdline()
    except psutil.Error:
        return None
    is_torchrun = any(os.path.basename(word) == "torchrun" or word == "torch.distributed.run" for word in words[:4])
    return words if is_torchrun or _after_accelerate_launch(words) is not None else None


def asked_processes() -> int | None:
    """How many processes `accelerate launch` was asked for, by a flag or its file; None: nothing was said."""
    arguments = _after_accelerate_launch(launcher_command() or [])
    if arguments is None:  # torchrun starts what it is asked for
        return None
    count = launch_command_parser().parse_args(arguments).num_processes
    if count is None and (file := launch_file()) is not None:
        count = load_config_from_file(str(file)).num_processes
    return None if count is None or count < 1 else int(count)


def launch_file() -> Path | None:
    """The file that `accelerate launch` has read, by its flag or where `accelerate config` writes it."""
    arguments = _after_accelerate_launch(launcher_command() or [])
    if arguments is None:
        return None
    options = launch_command_parser().parse_args(arguments)
    if options.config_file is None and (options.cpu or not os.path.isfile(default_config_file)):
        return None
    return Path(options.config_file or default_config_file)


def _after_accelerate_launch(words: list[str]) -> list[str] | None:
    """The arguments of `accelerate launch` in a command line; None if it is another command."""
    for index, word in enumerate(words[:4]):
        if os.path.basename(word) == "accelerate-launch" or word == "accelerate.commands.launch":
            return words[index + 1 :]
        if os.path.basename(word) == "accelerate" and words[index + 1 : index + 2] == ["launch"]:
            return words[index + 2 :]
    return None


def describe_launch(accelerator: Accelerator, plan: BatchPlan) -> list[str]:
    """Lines that say what is active, and what the machine could do beside it."""
    context = plan.context_parallel_size
    each = "process(es)" if context == 1 else f"group(s) of {context} processes, which share each row,"
    lines = [
        f"launch: {accelerator.num_processes} process(es) on {accelerator.device.type}, "
        f"{accelerator.distributed_type.value}, precision {accelerator.mixed_precision}, "
        f"{torch.get_num_threads()} thread(s) each",
        f"global batch: {plan.global_batch_size} sequences = {plan.data_parallel_size} {each} × "
        f"{plan.accumulation} micro-batch(es) × {plan.micro_batch}",
    ]
    threads, cores = torch.get_num_threads(), os.cpu_count() or 1
    if accelerator.device.type == "cpu" and threads * accelerator.num_processes < cores:
        lines.append(
            f"hint: {threads * accelerator.num_processes} of {cores} cores in use; --num_cpu_threads_per_process "
            f"{cores // accelerator.num_processes} after `accelerate launch` uses them all"
        )
    if accelerator.mixed_precision == "no" and fast_bf16(accelerator.device):
        lines.append("hint: this machine computes bf16 fast; --mixed_precision bf16 after `accelerate launch` uses it")
    return lines


def main(files: list[str]) -> None:
    if not files or files[0].startswith("-"):
        raise UserError("usage: python -m training.launch_check FILE..., files of accelerate_configs/ or your own")
    found = []
    for file in files:
        try:
            check_launch_file(Path(file), alone=True)
            print(f"{file}: nothing is wrong with it")
        except UserError as error:
            found.append(str(error))
    if found:
        raise UserError("\n".join(found))


if __name__ == "__main__":
    run_script(main, sys.argv[1:])
