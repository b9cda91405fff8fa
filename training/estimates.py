"""Floating-point operations and memory of a training step, estimated without running it.

The loop's step runs on fake tensors, which have shape, type and device but no memory. Its operations are counted, and its
tensors followed through forward pass, backward pass and update. This takes seconds for a model of seven billion parameters.
Models whose operations depend on values cannot be estimated.
"""

import weakref
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from training.optimization.optimizers import OPTIMIZERS, build_optimizer
from utils.config import OptimizerConfig
from utils.model.adapters import without_adapters
from utils.model.modules import fake_copy
from utils.objectives import Objective

# A batch: name → a tensor, or only its shape (int64).
BatchShapes = Mapping[str, torch.Tensor | Sequence[int]]
# glibc takes blocks of up to 32 MiB (DEFAULT_MMAP_THRESHOLD_MAX in its malloc.c) from a heap that fragments and is not
# given back; larger blocks are. benchmarks/memory.py measured a heap 6 to 76 % larger than its blocks.
HEAP_BLOCK_BYTES = 32 * 2**20
HEAP_HOLES = 0.3
LIBRARY_BYTES = 64 * 2**20  # a CPU's math libraries with their threads and scratch, measured by the same benchmark


def fake_batch(batch: BatchShapes, device: str) -> dict[str, torch.Tensor]:
    shapes = {name: value.shape if isinstance(value, torch.Tensor) else value for name, value in batch.items()}
    return {name: torch.empty(*shape, dtype=torch.int64, device=device) for name, shape in shapes.items()}


def count_flops(objective: Objective, batch: BatchShapes) -> int:
    """Floating-point operations of the matrix products in one forward and backward pass of a micro-batch.

    A multiplication and an addition count as two. Attention counts in full, T² per row, as is usual (Chowdhery et al.,
    2022, arXiv 2204.02311, appendix B), although kernels may skip what a causal mask hides. Its backward pass includes
    the recomputed scores; activation checkpointing adds a second forward pass. The result agrees with 6 × parameters ×
    tokens + attention.

    Args:
        batch: `targets` (B, T) and what `Objective.forward` takes, or their shapes.
    """
    aten = torch.ops.aten
    cpu_attention = {  # the CPU's kernels, which torch's counter does not know
        aten._scaled_dot_product_flash_attention_for_cpu: lambda *shapes, **_: sdpa_flop_count(*shapes[:3]),
        aten._scaled_dot_product_flash_attention_for_cpu_backward: lambda *shapes, **_: sdpa_backward_flop_count(
            *shapes[:4]
        ),
    }
    with FakeTensorMode(allow_non_fake_inputs=True):
        fake, inputs = fake_copy(objective, "cpu").train(), fake_batch(batch, "cpu")
        model = without_adapters(fake.model)
        if model.config._attn_implementation == "blocked":  # it computes less
            model.set_attn_implementation("sdpa")
        with FlopCounterMode(display=False, custom_mapping=cpu_attention) as counter:
            fake(**inputs).backward()
    return counter.get_total_flops()


class LiveTensors(TorchDispatchMode):
    """Bytes of the live tensors, by kind, now and at their peak."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes: Counter[str] = Counter()
        self.heap, self.mapped = 0, 0  # of all kinds, in small blocks (from the heap) and in larger ones
        self.answer_items = False
        self._storages: dict[int, tuple[str, int, weakref.ref]] = {}
        self.restart()

    def restart(self) -> None:
        """Forget the peaks, not the tensors."""
        self.peak = Counter(self.bytes)
        self.heap_peak, self.mapped_peak = self.heap, self.mapped

    def mark(self, tensor: torch.Tensor, kind: str) -> None:
        """Count `tensor` as one of `kind`, whatever it counted as before."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._storages:
            self._forget(key, None)
        reference = weakref.ref(storage, partial(self._forget, key))
        self._count(kind, storage.nbytes(), 1)
        self._storages[key] = (kind, storage.nbytes(), reference)

    def _forget(self, key: int, _: Any) -> None:
        kind, size, _ = self._storages.pop(key)
        self._count(kind, size, -1)

    def _count(self, kind: str, size: int, sign: int) -> None:
        self.bytes[kind] += sign * size
        if size < HEAP_BLOCK_BYTES:
            self.heap += sign * size
        else:
            self.mapped += sign * size
        self.heap_peak, self.mapped_peak = max(self.heap_peak, self.heap), max(self.mapped_peak, self.mapped)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self.answer_items and func is torch.ops.aten._local_scalar_dense.default:
            return 1.0  # an optimizer reads a number; the memory does not depend on it
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage()._cdata not in self._storages:
                self.mark(tensor, "activations")
        if self.heap + self.mapped > self.peak.total():
            self.peak = Counter(self.bytes)
        return result


def estimate_memory(
    objective: Objective, batch: BatchShapes, optimizer_config: OptimizerConfig, *, num_processes: int = 1,
    accumulation: int = 1, mixed_precision: str = "no", device: str = "cpu",
) -> dict[str, int]:  # fmt: skip
    """Bytes on one device at the peak of a training step, by what they hold; their sum is the peak.

    The peak is that of steps after the first one, when the optimizer has its state. It excludes what a process holds
    before it builds a model: on a CPU some 0.6 GB of libraries, on a GPU its context.

    Args:
        batch: a micro-batch of one device, as in `count_flops`.
        mixed_precision: accelerate's: no, bf16 or fp16.
        device: a type of device, which decides what kernels keep. Compared with real steps on a CPU only.

    Returns:
        weights (with buffers), gradients, activations (with logits, autocast's casts and temporary tensors), optimizer
        state, moving average, communication (DDP's buckets), and for a CPU libraries and heap (fragmentation).
    """
    with FakeTensorMode(allow_non_fake_inputs=True):
        fake, inputs = fake_copy(objective, device).train(), fake_batch(batch, device)
        trainable = [parameter for parameter in fake.parameters() if parameter.requires_grad]
        live = LiveTensors()
        for tensor in [*fake.parameters(), *fake.buffers()]:
            live.mark(tensor, "weights")
        for parameter in trainable:
            parameter.register_post_accumulate_grad_hook(lambda parameter: live.mark(parameter.grad, "gradients"))
        update = _prepare_update(fake, live, optimizer_config, mixed_precision)
        live.restart()
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
    inside = 0 if accumulation > 1 else parts["gradients"]
    parts["communication"] = copies - inside if num_processes > 1 else 0
    parts["libraries"] = LIBRARY_BYTES if device == "cpu" else 0
    heap = (1 + HEAP_HOLES) * live.heap_peak + live.mapped_peak - live.peak.total()
    parts["heap"] = int(heap) if device == "cpu" else 0
    return parts


def share_out(parts: dict[str, int], model: torch.nn.Module, ranks: int, itemsize: int) -> dict[str, int]:
    """`estimate_memory`'s parts on one of `ranks` that shard the parameters (FSDP2).

    A rank gathers two layers at a time (one is prefetched) and everything outside of layers, in `itemsize` bytes per
    number, and holds a layer's gradients before they are reduced. Not measured on a GPU.
    """
    kept = ("weights", "gradients", "optimizer state", "moving average")
    names = set(getattr(model, "_no_split_modules", None) or ())
    layers = [sum(value.numel() for value in module.parameters()) for module in model.modules()
              if type(module).__name__ in names]  # fmt: skip
    outside = sum(value.numel() for value in model.parameters()) - sum(layers)
    largest = max(layers, default=0)
    shared = {name: -(-size // ranks) if name in kept else size for name, size in parts.items()}
    return shared | {"communication": (outside + 3 * largest) * itemsize}


def _prepare_update(
    fake: Objective, live: LiveTensors, config: OptimizerConfig, mixed_precision: str
) -> Callable[[], Any]:
    """Make the optimizer's state by a first update; returns a function that makes another, to be called under `live`."""
    trainable = [parameter for parameter in fake.parameters() if parameter.requires_grad]
    if OPTIMIZERS[
        config.name
    ].library:  # bitsandbytes' kernels take no fake tensors: a byte per number, a scale per 256
        sizes = [parameter.numel() for parameter in trainable]
        blocks = [size + 4 * -(-size // 256) if size >= 4096 else 4 * size for size in sizes]
        state = [torch.empty(size, dtype=torch.uint8) for size in blocks for _ in range(2)]
        for tensor in state:
            live.mark(tensor, "optimizer state")
        return partial(len, state)  # keeps it
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
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        fake, inputs = fake_copy(objective, device).eval(), fake_batch(batch, device)
        live = LiveTensors()
        for tensor in [*fake.parameters(), *fake.buffers()]:
            live.mark(tensor, "weights")
        with live, autocast(device, mixed_precision):
            fake(**inputs)
    return live.peak["activations"]


def autocast(device: str, mixed_precision: str) -> torch.autocast:
    """The context that accelerate puts around the forward pass."""
    dtype = torch.float16 if mixed_precision == "fp16" else torch.bfloat16
    return torch.autocast(device, dtype, enabled=mixed_precision != "no")
