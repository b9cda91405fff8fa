"""What a training will need, before it starts: parameters, data, memory, work and time.

The step of the loop runs on fake tensors, which have shape, type and device but no memory. Its operations are counted,
and its tensors followed through forward pass, backward pass and update. This takes seconds for seven billion
parameters. Models whose operations depend on values cannot be estimated.
"""

import contextlib
import copy
import logging
import os
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from accelerate import Accelerator
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count
from transformers.activations import GELUTanh

from training.data import TrainingData
from training.fp8 import check_fp8, fp8_layers
from training.hardware import (
    HARDWARE,
    blend_peaks,
    measure_flops_per_second,
    memory_bytes,
    precision_of,
    resolve_matmul_precision,
)
from training.launch import BatchPlan, describe_launch
from training.model import check_length, describe_initialization, describe_model
from training.monitoring.console import duration
from training.monitoring.hints import hints_on_data, hints_on_launch
from training.optimization.optimizers import OPTIMIZERS, build_optimizer
from training.optimization.schedule import warn_of_warmup
from training.parallel.sharding import ranks_per_copy
from utils.config import OptimizerConfig, TrainConfig
from utils.files import readable, short
from utils.kernels import FastDropout
from utils.model.adapters import without_adapters
from utils.model.build import build_model, count_parameters, fake_copy
from utils.objectives import Objective, build_objective, objective_module

# A batch: name → a tensor, or only its shape (int64; of pictures and sounds, with more than two dimensions, fp32).
BatchShapes = Mapping[str, torch.Tensor | Sequence[int]]
LIBRARY_BYTES = 64 * 2**20  # a CPU's math libraries with their threads and scratch, measured by benchmarks/memory.py
# Share of the peak that training reaches. Llama 3 reached 38 to 43 % (Grattafiori et al., 2024, arXiv 2407.21783),
# PaLM 46 % (Chowdhery et al., 2022, arXiv 2204.02311); small models and short rows stay below.
UTILISATION = 0.4
UNCHECKED = "TRANSFORMERS_DISABLE_TORCH_CHECK"
FITS = 0.9  # share of a device's memory that a step may need by the estimate; the allocator and the context take more
# torch logs a traceback for an operation that fake tensors lack. Our own line says what that means.
logging.getLogger("torch._subclasses.fake_tensor").setLevel(logging.CRITICAL)


@contextlib.contextmanager
def fake_tensors() -> Iterator[None]:
    """Within the block, tensors are fake, and transformers does not compare numbers of pictures that they do not hold."""
    before = os.environ.get(UNCHECKED)
    os.environ[UNCHECKED] = "1"
    try:
        with FakeTensorMode(allow_non_fake_inputs=True):
            yield
    finally:
        os.environ.pop(UNCHECKED)
        if before is not None:
            os.environ[UNCHECKED] = before


def build_without_weights(config: TrainConfig, device: torch.device, tokenizer: Any) -> Objective:
    """The objective that this recipe trains on `device`, on the meta device."""
    with torch.device("meta"):
        model = build_model(config.model, tokenizer, objective_module(config.objective.name).AUTO_MODEL, weights=False)
    check_length(model, config.data.sequence_length)
    return build_objective(model, config.objective, config.model.attention, config.kernels, device)


def print_dry_run(config: TrainConfig, accelerator: Accelerator, data: TrainingData, tokenizer: Any) -> None:
    """Print what this launch would train and need; the model is built without weights (main process prints)."""
    objective = build_without_weights(config, accelerator.device, tokenizer)
    if accelerator.mixed_precision == "fp8":
        check_fp8(objective.model)
    if accelerator.is_main_process:
        print(
            *describe_launch(accelerator, data.plan),
            *hints_on_launch(accelerator),
            *hints_on_data(config, data),
            sep="\n",
        )
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
        ranks_per_copy: the number of ranks that share each parameter.
        measure: also estimate the time on this machine, by half a second of matrix products.
    """
    longest = config.data.sequence_length if config.data.layout == "padded" else None
    rows, length, share = plan.global_batch_size * max_steps, config.data.sequence_length, plan.context_parallel_size
    epochs = "" if num_rows is None else f", {rows / num_rows:.2f} epochs of {num_rows:,} rows"
    lines = [
        *describe_model(objective.model),
        f"data: {max_steps:,} steps of {plan.global_batch_size} rows of {length}: {rows:,} rows, "
        f"{rows * length:,} positions{epochs}",
    ]
    if warning := warn_of_warmup(config.schedule, max_steps):
        lines.append(f"warning: {warning}")
    precision = precision_of(mixed_precision, resolve_matmul_precision(config.matmul_precision, device))
    processes, evaluation_rows = plan.num_processes, config.evaluation.per_device_batch_size
    try:
        memory = estimate_step(
            objective, example, config, plan, plan.micro_batch, mixed_precision, device.type, ranks_per_copy
        )
        evaluation = estimate_evaluation_activations(
            objective, resized(example, evaluation_rows, longest, share), mixed_precision=mixed_precision,
            device=device.type,
        )  # fmt: skip
        flops = count_step_flops(objective, example, config, plan)
        in_fp8 = count_fp8_share(objective, example) if precision == "fp8" else 1.0
    except Exception as error:  # an operation needs values, which fake tensors lack, or the sizes make no model
        return [*lines, f"memory and time: no estimate for this model: {short(error)}"]
    evaluation += sum(memory.values()) - memory["gradients"] - memory["activations"]
    step = sum(memory.values())
    lines += [
        f"memory on each device: {readable(step)} at the peak of a step (micro-batch {plan.micro_batch}, "
        f"precision {mixed_precision}), {readable(evaluation)} in an evaluation (batch {evaluation_rows})",
        *(f"  {part:<15} {readable(size, of=step):>10}" for part, size in memory.items() if size),
        f"work: {flops:.3g} FLOPs a step, {flops * max_steps:.3g} in all",
        f"time on {processes} device(s) at {UTILISATION:.0%} of the peak in {precision}"
        f"{f' ({in_fp8:.0%} of the work) and bf16' if precision == 'fp8' else ''}; small models do not reach it:",
    ]
    for name, figures in HARDWARE.items():
        if precision not in figures:
            lines.append(f"  {name:<15} has no {precision}")
            continue
        peak, size = blend_peaks(figures[precision], figures["bf16"], in_fp8), figures["memory"]
        seconds = estimate_time(flops * max_steps, peak, processes)
        few = f"; its {size:.0f} GB are too few" if max(step, evaluation) >= size * 1e9 else ""
        lines.append(f"  {name:<15} {duration(seconds):>10}{few}")
    if measure:
        speed = measure_flops_per_second(device, mixed_precision)
        if precision == "fp8":
            speed = blend_peaks(speed, measure_flops_per_second(device, "bf16"), in_fp8)
        seconds = estimate_time(flops * max_steps, speed, processes)
        lines.append(f"  {'this machine':<15} {duration(seconds):>10}; {speed / 1e12:.2g} TFLOP/s measured")
    return lines


def estimate_step(
    objective: Objective, example: BatchShapes, config: TrainConfig, plan: BatchPlan, micro_batch: int,
    mixed_precision: str, device: str, ranks: int,
) -> dict[str, int]:  # fmt: skip
    """`estimate_memory` of a step that computes the plan's global batch in micro-batches of `micro_batch` rows; `ranks`
    share each parameter."""
    longest = config.data.sequence_length if config.data.layout == "padded" else None
    memory = estimate_memory(
        objective, resized(example, micro_batch, longest, plan.context_parallel_size), config.optimizer,
        num_processes=plan.num_processes, accumulation=plan.micro_batch * plan.accumulation // micro_batch,
        mixed_precision=mixed_precision, device=device,
    )  # fmt: skip
    return share_out(memory, objective.model, ranks, 4 if mixed_precision == "no" else 2) if ranks > 1 else memory


def find_fitting_micro_batch(
    config: TrainConfig, accelerator: Accelerator, data: TrainingData, tokenizer: Any
) -> str | None:
    """What a step of this launch needs, what the device has, and the largest micro-batch that fits, in words.

    The global batch stays. By estimates on fake tensors, which need no memory of the device; seconds each. None if the
    model cannot be estimated.
    """
    plan, device = data.plan, accelerator.device
    total, share = memory_bytes(device), plan.micro_batch * plan.accumulation
    try:
        objective = build_without_weights(config, device, tokenizer)
        needed = None
        for size in [size for size in range(plan.micro_batch, 0, -1) if share % size == 0]:
            memory = estimate_step(
                objective, data.example, config, plan, size, accelerator.mixed_precision, device.type,
                ranks_per_copy(accelerator),
            )  # fmt: skip
            step = sum(memory.values())
            if needed is None:
                needed = f"a micro-batch of {size} needs about {readable(step)}, and this device has {readable(total)}"
            elif step < FITS * total:
                return (
                    f"{needed}; --batch.per_device_batch_size {size} needs {readable(step)}, with the same global batch"
                )
    except Exception:  # an operation needs values, which fake tensors lack
        return None
    return f"{needed}; no smaller one fits: try model.activation_checkpointing true or a shorter data.sequence_length"


def count_step_flops(objective: Objective, example: BatchShapes, config: TrainConfig, plan: BatchPlan) -> int:
    """`count_flops` of one step on all devices."""
    longest = config.data.sequence_length if config.data.layout == "padded" else None
    micro_batch = resized(example, plan.micro_batch, longest)
    return count_flops(objective, micro_batch) * plan.accumulation * plan.data_parallel_size


def shapes_of(batch: BatchShapes) -> dict[str, Sequence[int]]:
    return {name: value.shape if isinstance(value, torch.Tensor) else value for name, value in batch.items()}


def resized(batch: BatchShapes, rows: int, longest: int | None = None, share: int = 1) -> dict[str, tuple[int, ...]]:
    """The shapes of `batch` with `rows` rows; with `longest`, scaled to that many positions. Pictures and sounds keep their
    sizes, and their number per row.

    `share` devices share the positions, and the shapes are those of one of them. The keys and values that it gathers
    from the others do not count.
    """
    shapes = shapes_of(batch)
    length = max(shape[1] for shape in shapes.values() if len(shape) == 2)
    return {
        name: (rows, -(-shape[1] * (longest or length) // (length * share))) if len(shape) == 2
        else (rows * shape[0] // shapes["targets"][0], *shape[1:])
        for name, shape in shapes.items()
    }  # fmt: skip


def describe_objective(
    objective: Objective, config: TrainConfig, data: TrainingData, *, new: bool
) -> tuple[list[str], int | None, float]:
    """Lines on the model and its kernels; the FLOPs of a step on all devices, None if they cannot be counted; the share of
    them in the launch's precision, the rest being in bf16. Call it before `prepare`, on the main process only."""
    model: Any = objective.model
    modules = {type(module) for module in objective.modules() if getattr(module, "p", 1)}  # not a dropout of 0
    is_fp8 = data.accelerator.mixed_precision == "fp8"
    lines, flops, share = [describe_model(model)[0]], None, 1.0
    try:
        flops = count_step_flops(objective, data.example, config, data.plan)
        share = count_fp8_share(objective, data.example) if is_fp8 else 1.0
        lines.append(f"work: {flops:.3g} FLOPs a step")
    except (RuntimeError, ValueError) as error:  # an operation of this model needs values, which fake tensors lack
        lines.append(f"work: not counted for this model: {short(error)}")
    if new:
        lines.append(describe_initialization(model))
    matmul, on_cuda = torch.get_float32_matmul_precision(), data.accelerator.device.type == "cuda"
    lines.append(
        f"kernels: attention {model.config._attn_implementation}, head "
        f"{'chunked' if objective.chunked_head else 'with all logits'}"
        f"{', activation fused' if GELUTanh in modules else ''}{', dropout fast' if FastDropout in modules else ''}, "
        f"fp32 products {matmul}{' (TF32)' if on_cuda and matmul != 'highest' else ''}"
    )
    if is_fp8:
        linear = sum(isinstance(module, torch.nn.Linear) for module in model.modules())
        lines.append(f"fp8: {len(fp8_layers(model))} of {linear} linear layers, {share:.0%} of the work")
    return lines, flops, share


def fake_batch(batch: BatchShapes, device: str) -> dict[str, torch.Tensor]:
    return {
        name: torch.empty(*shape, dtype=torch.int64 if len(shape) == 2 else torch.float32, device=device)
        for name, shape in shapes_of(batch).items()
    }


def count_flops(objective: Objective, batch: BatchShapes) -> int:
    """Floating-point operations of the matrix products in one forward and backward pass of a micro-batch.

    A multiplication and an addition count as two. Attention counts in full, T² per row, as is usual (Chowdhery et al.,
    2022, arXiv 2204.02311, appendix B), although kernels may skip what a causal mask hides. Its backward pass includes
    the recomputed scores; activation checkpointing adds a second forward pass. The result agrees with 6 × parameters ×
    tokens + attention. `batch` holds `targets` (B, T) and what `Objective.forward` takes, or their shapes.
    """
    return _counted(objective, batch, backward=True).get_total_flops()


def count_fp8_share(objective: Objective, batch: BatchShapes) -> float:
    """The share of a forward pass's operations in the linear layers that fp8 will convert. A backward pass has about the
    same, and torch's counter does not tell its layers apart."""
    counts = _counted(objective, batch, backward=False).get_flop_counts()
    names = [f"{type(objective).__name__}.{name}" for name in fp8_layers(objective)]
    return sum(sum(counts[name].values()) for name in names) / sum(counts["Global"].values())


def _counted(objective: Objective, batch: BatchShapes, *, backward: bool) -> FlopCounterMode:
    aten = torch.ops.aten
    cpu_attention = {  # the CPU's kernels, which torch's counter does not know
        aten._scaled_dot_product_flash_attention_for_cpu: lambda *shapes, **_: sdpa_flop_count(*shapes[:3]),
        aten._scaled_dot_product_flash_attention_for_cpu_backward:
            lambda *shapes, **_: sdpa_backward_flop_count(*shapes[:4]),
    }  # fmt: skip
    with fake_tensors():
        whole = copy.copy(objective)
        whole.context = None  # under context parallelism it holds a process group, and rows are in parts
        fake, inputs = fake_copy(whole, "cpu").train(), fake_batch(batch, "cpu")
        model = without_adapters(fake.model)
        if model.config._attn_implementation in ("blocked", "varlen", "context_parallel"):  # they compute less
            model.set_attn_implementation("sdpa")
        count = FlopCounterMode(display=False, custom_mapping=cpu_attention)
        with count as counter, torch.set_grad_enabled(backward):
            loss = fake(**inputs)
            if backward:
                loss.backward()
    return counter


class LiveTensors(TorchDispatchMode):
    """Bytes of the live tensors, by kind, now and at their peak."""

    def __init__(self, module: torch.nn.Module) -> None:
        super().__init__()
        self.bytes: Counter[str] = Counter()
        self.peak: Counter[str] = Counter()
        self.answer_items = False
        self._storages: dict[int, tuple[str, int, weakref.ref]] = {}
        for tensor in [*module.parameters(), *module.buffers()]:
            self.mark(tensor, "weights")

    def mark(self, tensor: torch.Tensor, kind: str) -> None:
        """Count `tensor` as one of `kind`, whatever it counted as before."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._storages:
            self._forget(key, None)
        reference = weakref.ref(storage, partial(self._forget, key))
        self.bytes[kind] += storage.nbytes()
        self._storages[key] = (kind, storage.nbytes(), reference)

    def _forget(self, key: int, _: Any) -> None:
        kind, size, _ = self._storages.pop(key)
        self.bytes[kind] -= size

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self.answer_items and func is torch.ops.aten._local_scalar_dense.default:
            return 1.0  # an optimizer reads a number; the memory does not depend on it
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage()._cdata not in self._storages:
                self.mark(tensor, "activations")
        if self.bytes.total() > self.peak.total():
            self.peak = Counter(self.bytes)
        return result


def estimate_memory(
    objective: Objective, batch: BatchShapes, optimizer_config: OptimizerConfig, *, num_processes: int = 1,
    accumulation: int = 1, mixed_precision: str = "no", device: str = "cpu",
) -> dict[str, int]:  # fmt: skip
    """Bytes on one device at the peak of a training step, by what they hold; their sum is the peak.

    The peak is that of steps after the first one, when the optimizer has its state. It excludes what a process holds
    before it builds a model (on a CPU some 0.6 GB of libraries, on a GPU its context), and what the allocator holds
    beside live tensors: glibc's heap fragments by 6 to 76 % of the small ones (benchmarks/memory.py).

    The parts are weights (with buffers), gradients, activations (with logits, autocast's casts and temporary tensors),
    optimizer state, moving average, communication (DDP's buckets), and for a CPU libraries.

    Args:
        batch: a micro-batch of one device, as in `count_flops`.
        mixed_precision: accelerate's: no, bf16 or fp16.
        device: a type of device, which decides what kernels keep. Compared with real steps on a CPU only.
    """
    with fake_tensors():
        fake, inputs = fake_copy(objective, device).train(), fake_batch(batch, device)
        trainable = [parameter for parameter in fake.parameters() if parameter.requires_grad]
        live = LiveTensors(fake)
        for parameter in trainable:
            parameter.register_post_accumulate_grad_hook(lambda parameter: live.mark(parameter.grad, "gradients"))
        update = _prepare_update(fake, live, optimizer_config, mixed_precision)
        live.peak.clear()
        with live:
            for _ in range(min(accumulation, 2)):  # the second finds gradients, and so do all later ones
                with autocast(device, mixed_precision):
                    loss = fake(**inputs)
                loss.backward()
            update()
    copies = 4 * sum(parameter.numel() for parameter in trainable)
    parts = {name: live.peak[name] for name in ("weights", "gradients", "activations", "optimizer state")}
    parts["moving average"] = copies if optimizer_config.ema_decay else 0
    # The gradients of a step's only micro-batch lie in DDP's buffers; several micro-batches add theirs outside of them.
    parts["communication"] = copies - (0 if accumulation > 1 else parts["gradients"]) if num_processes > 1 else 0
    parts["libraries"] = LIBRARY_BYTES if device == "cpu" else 0
    return parts


def share_out(parts: dict[str, int], model: torch.nn.Module, ranks: int, itemsize: int) -> dict[str, int]:
    """`estimate_memory`'s parts on one of `ranks` that shard the parameters (FSDP2).

    A rank gathers two layers at a time (one is prefetched) and everything outside of layers, in `itemsize` bytes per
    number, and holds a layer's gradients before they are reduced. Not measured on a GPU.
    """
    kept = ("weights", "gradients", "optimizer state", "moving average")
    names = set(getattr(model, "_no_split_modules", None) or ())
    layers = [count_parameters(module) for module in model.modules() if type(module).__name__ in names]
    gathered = count_parameters(model) - sum(layers) + 3 * max(layers, default=0)
    shared = {name: -(-size // ranks) if name in kept else size for name, size in parts.items()}
    return shared | {"communication": gathered * itemsize}


def _prepare_update(
    fake: Objective, live: LiveTensors, config: OptimizerConfig, mixed_precision: str
) -> Callable[[], Any]:
    """Make the optimizer's state by a first update; returns a function that makes another, to call under `live`."""
    trainable = [parameter for parameter in fake.parameters() if parameter.requires_grad]
    if OPTIMIZERS[config.name].library:  # bitsandbytes takes no fake tensors: a byte per number, a scale per 256
        sizes = [parameter.numel() for parameter in trainable]
        blocks = [size + 4 * -(-size // 256) if size >= 4096 else 4 * size for size in sizes]
        live.bytes["optimizer state"] = 2 * sum(blocks)
        return lambda: None
    optimizer = build_optimizer(fake.model, config, fused=mixed_precision != "fp16")

    def update() -> None:
        torch.nn.utils.clip_grad_norm_(trainable, config.max_grad_norm)
        live.answer_items = True
        optimizer.step()
        live.answer_items = False

    for parameter in trainable:
        parameter.grad = torch.empty_like(parameter)
    with live:
        update()
    for tensor in tree_leaves([list(state.values()) for state in optimizer.state.values()]):
        if isinstance(tensor, torch.Tensor):
            live.mark(tensor, "optimizer state")
    optimizer.zero_grad()
    return update


def estimate_evaluation_activations(
    objective: Objective, batch: BatchShapes, *, mixed_precision: str = "no", device: str = "cpu"
) -> int:
    """Bytes at the peak of an evaluation's forward pass, without weights and optimizer state."""
    with fake_tensors(), torch.no_grad():
        fake, inputs = fake_copy(objective, device).eval(), fake_batch(batch, device)
        live = LiveTensors(fake)
        with live, autocast(device, mixed_precision):
            fake(**inputs)
    return live.peak["activations"]


def autocast(device: str, mixed_precision: str) -> torch.autocast:
    """The context that accelerate puts around the forward pass."""
    dtype = torch.float16 if mixed_precision == "fp16" else torch.bfloat16
    return torch.autocast(device, dtype, enabled=mixed_precision != "no")


def estimate_time(flops: float, flops_per_second: float, num_devices: int = 1) -> float:
    """Seconds for `flops` in all on `num_devices`, at `UTILISATION` of their peak of `flops_per_second` each."""
    return flops / (flops_per_second * num_devices * UTILISATION)
