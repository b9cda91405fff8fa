"""accelerate's configuration files: what accelerate would ignore or misread without a word."""

import dataclasses
import difflib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from accelerate.commands.config.config_args import ClusterConfig
from accelerate.commands.launch import launch_command_parser
from accelerate.utils import DistributedType

from utils.cli import UserError
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


def check_launch_file(path: Path) -> None:
    """`UserError` naming all that is wrong with the file of `accelerate launch --config_file`."""
    if problems := find_problems(read_yaml(path)):
        raise UserError(f"{path}: {'; '.join(problems)}")


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
        if section == "parallelism_config":
            found += [f"{key} {value} is not supported; leave it out" for key, value in values.items()
                      if str(key).endswith(("_tp_size", "_sp_size")) and value != 1]  # fmt: skip
    if not isinstance(file.get("mixed_precision", "no"), str):
        found.append("mixed_precision must be in quotes: 'no', 'bf16' or 'fp16'; YAML reads a bare no as false")
    if "distributed_type" not in file:
        return [*found, "distributed_type is missing; for one process write distributed_type: 'NO'"]
    kind = str(file["distributed_type"])
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
    near = difflib.get_close_matches(str(name), list(known), n=1)
    return f"{where}{name} is unknown to accelerate, which may ignore it{f' (did you mean {near[0]}?)' if near else ''}"
