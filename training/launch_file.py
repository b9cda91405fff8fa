"""accelerate's configuration files: what accelerate would ignore or misread without a word."""

import dataclasses
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from accelerate.commands.config.config_args import ClusterConfig
from accelerate.commands.launch import launch_command_parser
from accelerate.utils import DistributedType, PrecisionType

from utils.cli import UserError, nearest
from utils.files import read_yaml

SUPPORTED = (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU, DistributedType.FSDP)
# Section → its options' group in the parser of `accelerate launch`, and what accelerate puts before a key that lacks it.
SECTIONS = {
    "fsdp_config": ("FSDP Arguments", "fsdp_"),
    "deepspeed_config": ("DeepSpeed Arguments", ""),
    "parallelism_config": ("ParallelismConfig Arguments", ""),
    "fp8_config": ("FP8 Arguments", "fp8_"),
    "megatron_lm_config": ("Megatron-LM Arguments", ""),
    "mpirun_config": ("MPI Arguments", ""),
    "dynamo_config": ("Resource Selection Arguments", "dynamo_"),
}
OLD_KEYS = ("fp16", "dynamo_backend")  # accelerate still reads them
PARALLEL = ("dp_replicate", "dp_shard", "cp", "sp", "tp")  # the sizes in parallelism_config
PRECISIONS = [each.value for each in PrecisionType]


def check_launch_file(path: Path, *, alone: bool = False) -> None:
    """`UserError` naming all that is wrong with the file of `accelerate launch --config_file`.

    `alone`: it is launched as it is, without options that change the number of processes.
    """
    file = read_yaml(path)
    problems = find_problems(file)
    if alone and not problems:
        sizes = sizes_of(file)
        problems += filter(None, [find_size_problem(sizes, sharded=True, num_processes=file.get("num_processes"))])
    if problems:
        raise UserError(f"{path}: {'; '.join(problems)}")


def sizes_of(file: dict[str, Any]) -> dict[str, Any]:
    """Those of its parallelism_config, by the names in `PARALLEL`."""
    section = file.get("parallelism_config") or {}
    return {name: section.get(f"parallelism_config_{name}_size", 1) for name in PARALLEL}


def find_size_problem(sizes: dict[str, Any], *, sharded: bool, num_processes: int | None) -> str | None:
    """What is not supported, or does not fit, in the sizes of accelerate's parallelism_config; None: nothing.

    Args:
        sizes: by the names in `PARALLEL`.
        sharded: whether the launch asks for FSDP.
        num_processes: in all; None where that is not known.
    """
    for name, size in sizes.items():
        if type(size) is not int or size < 1:
            return f"parallelism_config_{name}_size {size} must be a whole number, 1 or more"
    asked = {name: size for name, size in sizes.items() if size != 1}
    for name in asked:
        if name in ("tp", "sp"):
            return f"parallelism_config_{name}_size {sizes[name]} is not supported; leave it out"
        if not sharded:
            return (f"parallelism_config_{name}_size {sizes[name]} needs distributed_type: FSDP with fsdp_version: 2, as in "
                    "accelerate_configs/fsdp2_context_parallel.yaml")  # fmt: skip
    if sizes["dp_replicate"] > 1 and sizes["dp_shard"] == 1:
        return ("parallelism_config_dp_replicate_size needs a parallelism_config_dp_shard_size of 2 or more; for plain DDP "
                "leave parallelism_config out")  # fmt: skip
    product = math.prod(sizes.values())
    if asked and num_processes not in (None, product):
        named = " × ".join(f"{name}_size {size}" for name, size in asked.items())
        return (f"parallelism_config: {named} must make the number of processes, {num_processes}; change the sizes, or "
                f"launch with --num_processes {product}")  # fmt: skip
    return None


def find_problems(file: dict[str, Any]) -> list[str]:
    """What is wrong with the values of such a file, in words that name the key and say what to write."""
    known = [field.name for field in dataclasses.fields(ClusterConfig)]
    found = [_unknown(name, [*known, *OLD_KEYS]) for name in file if name not in (*known, *OLD_KEYS)]
    groups = {group.title: group for group in launch_command_parser()._action_groups}
    for section, (title, prefix) in SECTIONS.items():
        values = file.get(section)
        if not isinstance(values, dict):
            found += [f"{section} must hold `key: value` lines"] if values else []
            continue
        options = [action.dest for action in groups[title]._group_actions]
        for key in values:
            if (key if key.startswith(prefix) else prefix + key) not in options:
                found.append(_unknown(key, options, f"{section}."))
    if not isinstance(file.get("mixed_precision", "no"), str):
        found.append("mixed_precision must be in quotes: 'no', 'bf16' or 'fp16'; YAML reads a bare no as false")
    elif file.get("mixed_precision", "no") not in PRECISIONS:
        found.append(_unknown(file["mixed_precision"], PRECISIONS, "mixed_precision "))
    if type(file.get("num_processes", 1)) is not int:
        found.append(f"num_processes {file['num_processes']} must be a whole number")
    if "distributed_type" not in file:
        return [*found, "distributed_type is missing; for one process write distributed_type: 'NO'"]
    kind = str(file["distributed_type"])
    found += filter(None, [find_size_problem(sizes_of(file), sharded=kind == "FSDP", num_processes=None)])
    if kind not in [each.value for each in DistributedType]:
        found.append(_unknown(kind, [each.value for each in DistributedType], "distributed_type "))
    elif kind == "FSDP" and (file.get("fsdp_config") or {}).get("fsdp_version") != 2:
        found.append("fsdp_config.fsdp_version must be 2: version 1 trains nothing without use_orig_params, silently")
    elif kind not in [each.value for each in SUPPORTED]:
        found.append(f"distributed_type {kind} is not supported yet; use NO, MULTI_GPU or FSDP")
    processes = file.get("num_processes", 1)
    if kind in ("NO", "MULTI_CPU") and processes != 1:
        found.append(
            f"accelerate starts one process for distributed_type {kind}, not {processes}; for several on CPUs write "
            "distributed_type: MULTI_GPU and use_cpu: true, as accelerate_configs/cpu_2_processes.yaml has it"
        )
    return found


def _unknown(name: str, known: Iterable[str], where: str = "") -> str:
    return f"{where}{name} is unknown to accelerate, which may ignore it{nearest(name, known)}"
