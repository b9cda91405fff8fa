"""What a training step will need, before it is made: floating-point operations and memory.

The loop's own step runs on fake tensors, which have a shape, a type and a device but no memory: its operations are
counted and its tensors followed through forward pass, backward pass and update, and nothing is computed. Seconds for
a model of seven billion parameters on the meta device. Whatever the model and the optimizer do, the estimate does too.
"""

import copy
import weakref
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from utils.optimizer_config import OptimizerConfig
from utils.training.objectives import Objective
from utils.training.optimization import build_optimizer

# A batch by name: tensors, or only their shapes (int64).
BatchShapes = Mapping[str, torch.Tensor | Sequence[int]]
# glibc takes blocks of up to 32 MiB (DEFAULT_MMAP_THRESHOLD_MAX in its malloc.c) from a heap, which comes to be full of
# holes; larger ones cost what they hold. Measured by benchmarks/memory.py: 0.3 to 0.55 of the blocks alive at the peak.
HEAP_BLOCK_BYTES = 32 * 2**20
HEAP_HOLES = 0.4
LIBRARY_BYTES = 64 * 2**20  # a CPU's math libraries and their threads, measured likewise


def fake_copy(objective: Objective, device: str) -> Objective:
    """`objective` in training mode, its parameters and buffers without memory. To be called in a `FakeTensorMode`."""
    memo: dict[int, Any] = {}  # what stands here is not copied: nothing is read, and shared parameters stay shared
    for tensor in [*objective.parameters(), *objective.buffers()]:
        fake = torch.empty(tensor.shape, dtype=tensor.dtype, device=device)
        memo[id(tensor)] = nn.Parameter(fake, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else fake
    return copy.deepcopy(objective, memo).train()


def fake_batch(batch: BatchShapes, device: str) -> dict[str, torch.Tensor]:
    shapes = {name: value.shape if isinstance(value, torch.Tensor) else value for name, value in batch.items()}
    return {name: torch.empty(*shape, dtype=torch.int64, device=device) for name, shape in shapes.items()}


def count_flops(objective: Objective, batch: BatchShapes) -> int:
    """Floating-point operations of the matrix products in one forward and backward pass of a micro-batch.

    A multiplication and an addition are two. Attention counts in full, T² per row, as is usual (Chowdhery et al., 2022,
    arXiv 2204.02311, appendix B), though kernels may skip what a causal mask hides; its backward pass includes the
    scores that it computes again, and activation checkpointing a second forward pass. Agrees with 6 × parameters ×
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
        fake, inputs = fake_copy(objective, "cpu"), fake_batch(batch, "cpu")
        with FlopCounterMode(display=False, custom_mapping=cpu_attention) as counter:
            fake(**inputs).backward()
    return counter.get_total_flops()


class LiveTensors(TorchDispatchMode):
    """Bytes of the tensors that are alive, by kind; a copy of them at their peak."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes: Counter[str] = Counter()
        self.heap_bytes = 0  # of them in blocks that a CPU takes from the heap
        self.answer_items = False
        self._storages: dict[int, tuple[str, int, weakref.ref]] = {}
        self.restart()

    def restart(self) -> None:
        """Forget the peak, not the tensors."""
        self.peak, self.peak_heap_bytes = Counter(self.bytes), self.heap_bytes

    def mark(self, tensor: torch.Tensor, kind: str) -> None:
        """Follow `tensor` as one of `kind`, whatever it was before."""
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
        self.heap_bytes += sign * size * (size < HEAP_BLOCK_BYTES)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self.answer_items and func is torch.ops.aten._local_scalar_dense.default:
            return 1.0  # an optimizer that looks at a number: whatever it is, the memory is the same
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage()._cdata not in self._storages:
                self.mark(tensor, "activations")
        if self.bytes.total() > self.peak.total():
            self.restart()
        return result


def estimate_memory(
    objective: Objective, batch: BatchShapes, optimizer_config: OptimizerConfig, *, num_processes: int = 1,
    accumulation: int = 1, mixed_precision: str = "no", device: str = "cpu",
) -> dict[str, int]:  # fmt: skip
    """Bytes on one device at the peak of a training step, by what they hold; their sum is the peak.

    The peak is that of steps after the first, when the optimizer's state is there. Not in it: what the process has
    before a model is built (on a CPU some 0.6 GB of libraries, on a GPU its context).

    Args:
        batch: a micro-batch of one device, as in `count_flops`.
        mixed_precision: accelerate's: no, bf16 or fp16.
        device: a type of device, which decides what kernels keep. Measured against real steps on the CPU only.

    Returns:
        weights (buffers too), gradients, activations (all that the passes keep for each other or for a moment, logits
        and autocast's casts of the weights among them), optimizer state, moving average, communication (DDP's buckets)
        and allocator (what a CPU's heap and math libraries take beside the tensors).
    """
    with FakeTensorMode(allow_non_fake_inputs=True):
        fake, inputs = fake_copy(objective, device), fake_batch(batch, device)
        trainable = [parameter for parameter in fake.parameters() if parameter.requires_grad]
        live = LiveTensors()
        for tensor in [*fake.parameters(), *fake.buffers()]:
            live.mark(tensor, "weights")
        for parameter in trainable:
            parameter.register_post_accumulate_grad_hook(lambda parameter: live.mark(parameter.grad, "gradients"))
        with live:
            for _ in range(min(accumulation, 2)):  # the second one finds gradients, as all further ones do
                with autocast(device, mixed_precision):
                    loss = fake(**inputs)
                loss.backward()
        passes, passes_heap = live.peak, live.peak_heap_bytes
        live.restart()
        state, state_heap = _update(fake, live, optimizer_config, mixed_precision)
    passes["optimizer state"], passes_heap = state, passes_heap + state_heap
    peak, heap = max((passes, passes_heap), (live.peak, live.peak_heap_bytes), key=lambda found: found[0].total())
    copies = sum(parameter.numel() for parameter in trainable)
    parts = {name: peak[name] for name in ("weights", "gradients", "activations", "optimizer state")}
    parts["moving average"] = 4 * copies if optimizer_config.ema_decay else 0
    parts["communication"] = 4 * copies if num_processes > 1 else 0
    parts["allocator"] = LIBRARY_BYTES + int(HEAP_HOLES * heap) if device == "cpu" else 0
    return parts


def _update(fake: Objective, live: LiveTensors, config: OptimizerConfig, mixed_precision: str) -> tuple[int, int]:
    """Clip and update under `live`; bytes of the optimizer's state, in all and in the heap."""
    trainable = [parameter for parameter in fake.parameters() if parameter.requires_grad]
    if config.name == "adamw_8bit":  # its kernels take no fake tensors. One byte a number, a scale per 256 of them
        sizes = [parameter.numel() for parameter in trainable]
        blocks = [2 * size + 8 * -(-size // 256) if size >= 4096 else 8 * size for size in sizes]
        state = [size // 2 for size in blocks for _ in range(2)]
        live.bytes["optimizer state"] += sum(state)
        live.restart()
    else:
        optimizer = build_optimizer(fake.model, config, fused=mixed_precision != "fp16")
        live.answer_items = True
        with live:
            torch.nn.utils.clip_grad_norm_(trainable, config.max_grad_norm)
            optimizer.step()
        tensors = [value for values in optimizer.state.values() for value in values.values()]
        state = [value.untyped_storage().nbytes() for value in tensors if isinstance(value, torch.Tensor)]
        # Within the step they were counted as activations.
        live.peak["optimizer state"] = sum(state)
        live.peak["activations"] -= sum(state)
    return sum(state), sum(size for size in state if size < HEAP_BLOCK_BYTES)


def estimate_evaluation_activations(
    objective: Objective, batch: BatchShapes, *, mixed_precision: str = "no", device: str = "cpu"
) -> int:
    """Bytes at the peak of an evaluation's forward pass beside all that stays between steps (no gradients then)."""
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        fake, inputs = fake_copy(objective, device).eval(), fake_batch(batch, device)
        live = LiveTensors()
        for tensor in [*fake.parameters(), *fake.buffers()]:
            live.mark(tensor, "weights")
        resident = live.heap_bytes
        with live, autocast(device, mixed_precision):
            fake(**inputs)
    holes = HEAP_HOLES * (live.peak_heap_bytes - resident) if device == "cpu" else 0
    return live.peak["activations"] + int(holes)


def autocast(device: str, mixed_precision: str) -> torch.autocast:
    """As accelerate does it around the forward pass."""
    dtype = torch.float16 if mixed_precision == "fp16" else torch.bfloat16
    return torch.autocast(device, dtype, enabled=mixed_precision != "no")
