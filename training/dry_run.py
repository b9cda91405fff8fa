"""What a training will need, before it starts: parameters, memory, data, work and time."""

from collections.abc import Sequence
from typing import Any

import torch
from accelerate import Accelerator
from transformers.activations import GELUTanh

from training.batch_plan import BatchPlan
from training.data import TrainingData
from training.estimates import (
    BatchShapes,
    count_flops,
    estimate_evaluation_activations,
    estimate_memory,
    share_out,
)
from training.hardware import (
    HARDWARE,
    UTILISATION,
    duration,
    estimate_time,
    measure_flops_per_second,
    precision_of,
    resolve_matmul_precision,
)
from training.launch import describe_launch
from training.model import check_length, describe_initialization, describe_model
from training.parallel.sharding import ranks_per_copy
from utils.config import TrainConfig
from utils.files import readable
from utils.kernels.dropout import FastDropout
from utils.model.build import build_model
from utils.objectives import Objective, build_objective, objective_module


def print_dry_run(config: TrainConfig, accelerator: Accelerator, data: TrainingData, tokenizer: Any) -> None:
    """Print what this launch would train and need; the model is built without weights (main process prints)."""
    with torch.device("meta"):
        model = build_model(config.model, tokenizer, objective_module(config.objective.name).AUTO_MODEL, weights=False)
    check_length(model, config.data.sequence_length)
    objective = build_objective(model, config.objective, config.model.attention, config.kernels, accelerator.device)
    if accelerator.is_main_process:
        print(*describe_launch(accelerator, data.plan), sep="\n")
        print(*dry_run_report(
            objective, data.example, config, data.plan, max_steps=data.max_steps, device=accelerator.device,
            num_rows=data.num_rows, mixed_precision=accelerator.mixed_precision,
            ranks_per_copy=ranks_per_copy(accelerator),
        ), sep="\n")  # fmt: skip


def dry_run_report(
    objective: Objective, example: BatchShapes, config: TrainConfig, plan: BatchPlan, *, max_steps: int,
    num_rows: int | None, mixed_precision: str, device: torch.device, ranks_per_copy: int = 1, measure: bool = True,
) -> list[str]:  # fmt: skip
    """Lines on parameters, data, memory, work and time. Takes seconds and little memory.

    Args:
        objective: not yet prepared by accelerate, on any device.
        example: a batch of any number of rows, as the collator makes it, or its shapes.
        num_rows: training rows; None for a stream.
        mixed_precision: accelerate's: no, bf16 or fp16.
        device: the device of each process.
        ranks_per_copy: the number of ranks that share each parameter.
        measure: also estimate the time on this machine, by half a second of matrix products.
    """
    longest = config.data.sequence_length if config.data.layout == "padded" else None
    rows = plan.global_batch_size * max_steps
    positions = rows * config.data.sequence_length
    epochs = "" if num_rows is None else f", {rows / num_rows:.2f} epochs of {num_rows:,} rows"
    lines = [
        *describe_model(objective.model),
        f"data: {max_steps:,} steps of {plan.global_batch_size} rows of {config.data.sequence_length}: {rows:,} rows, "
        f"{positions:,} positions{epochs}",
    ]
    micro_batch = resized(example, plan.micro_batch, longest)
    share = plan.context_parallel_size
    precision = precision_of(mixed_precision, resolve_matmul_precision(config.matmul_precision, device))
    processes = plan.num_processes
    try:
        memory = estimate_memory(
            objective, resized(example, plan.micro_batch, longest, share), config.optimizer, num_processes=processes,
            accumulation=plan.accumulation, mixed_precision=mixed_precision, device=device.type,
        )  # fmt: skip
        if ranks_per_copy > 1:
            memory = share_out(memory, objective.model, ranks_per_copy, 4 if mixed_precision == "no" else 2)
        evaluation = estimate_evaluation_activations(
            objective, resized(example, config.evaluation.per_device_batch_size, longest, share),
            mixed_precision=mixed_precision, device=device.type,
        )  # fmt: skip
        flops = count_flops(objective, micro_batch) * plan.accumulation * plan.data_parallel_size
    except RuntimeError as error:  # an operation of this model needs values, which fake tensors lack
        return [*lines, f"memory and time: no estimate for this model: {' '.join(str(error).split())[:150]}"]
    evaluation += sum(memory.values()) - memory["gradients"] - memory["activations"]
    step = sum(memory.values())
    lines += [
        f"memory on each device: {readable(step)} at the peak of a step (micro-batch {plan.micro_batch}, precision "
        f"{mixed_precision}), {readable(evaluation)} in an evaluation (batch {config.evaluation.per_device_batch_size})",
        *(f"  {part:<15} {readable(size, of=step):>10}" for part, size in memory.items() if size),
        f"work: {flops:.3g} FLOPs a step, {flops * max_steps:.3g} in all",
        f"time on {processes} device(s) at {UTILISATION:.0%} of the peak in {precision}, which small models do not reach:",
    ]
    for name, figures in HARDWARE.items():
        fits = (
            "" if max(step, evaluation) < figures["memory"] * 1e9 else f"; its {figures['memory']:.0f} GB are too few"
        )
        seconds = estimate_time(flops * max_steps, figures[precision], processes)
        lines.append(f"  {name:<15} {duration(seconds):>10}{fits}")
    if measure:
        speed = measure_flops_per_second(device, mixed_precision)
        seconds = estimate_time(flops * max_steps, speed, processes)
        lines.append(f"  {'this machine':<15} {duration(seconds):>10}; {speed / 1e12:.2g} TFLOP/s measured")
    return lines


def describe_work(objective: Objective, example: BatchShapes, config: TrainConfig, plan: BatchPlan) -> str:
    """A line with the floating-point operations of one step on all devices, counted without computing anything."""
    longest = config.data.sequence_length if config.data.layout == "padded" else None
    try:
        flops = count_flops(objective, resized(example, plan.micro_batch, longest))
    except RuntimeError as error:
        return f"work: not counted for this model: {' '.join(str(error).split())[:150]}"
    return f"work: {flops * plan.accumulation * plan.data_parallel_size:.3g} FLOPs a step"


def resized(
    batch: BatchShapes, rows: int, longest: int | None = None, share: int = 1
) -> dict[str, tuple[int, ...]]:  # fmt: skip
    """The shapes of `batch` with `rows` rows; with `longest`, scaled to that many positions.

    `share` devices share the positions, and the shapes are those of one of them. The keys and values that it gathers from
    the others do not count.
    """
    shapes: dict[str, Sequence[int]] = {
        name: value.shape if isinstance(value, torch.Tensor) else value for name, value in batch.items()
    }
    length = max(shape[1] for shape in shapes.values())
    return {name: (rows, -(-shape[1] * (longest or length) // (length * share))) for name, shape in shapes.items()}


def describe_objective(objective: Objective, config: TrainConfig, data: TrainingData, *, new: bool) -> list[str]:
    """Lines on the model and its kernels. Call it before FSDP shards the parameters, on the main process only."""
    lines = [*describe_model(objective.model), describe_work(objective, data.example, config, data.plan)]
    if new:
        lines.append(describe_initialization(objective.model))
    return [*lines, describe_kernels(objective)]


def describe_kernels(objective: Any) -> str:
    """The kernels in use, on one line."""
    modules = {type(module) for module in objective.modules() if getattr(module, "p", 1)}  # not a dropout of 0
    parts = [
        f"attention {objective.model.config._attn_implementation}",
        f"head {'chunked' if objective.chunked_head else 'with all logits'}",
        *(["activation fused"] if GELUTanh in modules else []), *(["dropout fast"] if FastDropout in modules else []),
        f"fp32 products {torch.get_float32_matmul_precision()}",
    ]  # fmt: skip
    return f"kernels: {', '.join(parts)}"
