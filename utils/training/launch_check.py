"""What the launch asked for against what is active: refuses silent differences, before any training."""

import os

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType

from utils.batches.batch_plan import BatchPlan
from utils.cli import UserError

SUPPORTED = (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU)


def check_launch(accelerator: Accelerator, plan: BatchPlan) -> None:
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
    if accelerator.distributed_type not in SUPPORTED:
        raise UserError(
            f"distributed_type {accelerator.distributed_type.value} is not supported yet; "
            f"use one of {', '.join(kind.value for kind in SUPPORTED)}"
        )


def describe_launch(accelerator: Accelerator, plan: BatchPlan) -> list[str]:
    """Lines that say what is active, and what the machine could do beside it."""
    lines = [
        f"launch: {accelerator.num_processes} process(es) on {accelerator.device.type}, "
        f"{accelerator.distributed_type.value}, precision {accelerator.mixed_precision}, "
        f"{torch.get_num_threads()} thread(s) each",
        f"global batch: {plan.global_batch_size} sequences = {plan.data_parallel_size} process(es) × "
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


def fast_bf16(device: torch.device) -> bool:
    """Whether matrix products in bf16 are faster than in fp32: by the CPU's instructions or the GPU's generation."""
    if device.type == "cpu":
        return any(
            present for name, present in getattr(torch.cpu, "get_capabilities", dict)().items() if "bf16" in name
        )
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)
