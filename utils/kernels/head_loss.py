"""Cross-entropy without all logits."""

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from utils.data.packing import IGNORED

# Rows whose logits are held at a time, and the most logits at a time (fp32: 64 MB). On a CPU more rows would not fit
# its caches, and fewer would make its products slow.
ROWS_AT_ONCE, LOGITS_AT_ONCE = 512, 1 << 24
# Where a compiled model calls the loss as it is, because tracing it would unroll its chunks. What is done to the logits of
# a chunk is compiled there by itself.
COMPILED_APART = ("cuda",)
# On CUDA each chunk reads the weights and their gradient from the device's memory, so few large chunks move less.
LOGITS_ON_CUDA, SHARE_OF_MEMORY = 1 << 28, 0.03


def head_loss(
    hidden: torch.Tensor, head: nn.Linear, targets: torch.Tensor, *, label_smoothing: float = 0.0, z_loss: float = 0.0,
    backend: str | None = None,
) -> torch.Tensor:  # fmt: skip
    """Summed cross-entropy of `head(hidden)` in nats, an fp32 scalar; only a chunk of rows has logits at any time.

    hidden: (N, D); targets: (N,), -100 where there is none; label_smoothing, z_loss: as in `Objective.forward`. backend:
    torch.compile's, if the launch compiles.

    The gradients are computed with the loss, so that nothing of size (N, V) is kept or computed twice, as in
    Liger-Kernel (Hsu et al., 2024, arXiv 2410.10989). Products are in autocast's precision, loss and softmax in fp32.
    Under fp16 the gradients' products are in fp32 too, because loss scaling comes later. Can be differentiated once.
    """
    with_gradients = torch.is_grad_enabled()
    dtype = product_dtype(hidden)
    apart = hidden.device.type in COMPILED_APART
    apply: Any = _apply_untraced if apart else _HeadLoss.apply
    options = (label_smoothing, z_loss, dtype, with_gradients, backend if apart else None)
    with torch.autocast(hidden.device.type, enabled=False):
        return apply(hidden, head.weight, head.bias, targets, *options)  # type: ignore[no-any-return]


def rows_at_once(device: torch.device, entries: int) -> int:
    """Rows whose logits over `entries` are held at a time. On CUDA their fp32 numbers take 3 % of the device's memory at
    most; where this machine has no such device, as in a dry run for another one, a large card is assumed."""
    if device.type != "cuda":
        return max(1, min(ROWS_AT_ONCE, LOGITS_AT_ONCE // entries))
    logits = LOGITS_ON_CUDA
    if torch.cuda.is_available():
        logits = min(logits, int(SHARE_OF_MEMORY * torch.cuda.get_device_properties(device).total_memory) // 4)
    return max(1, logits // entries)


def product_dtype(tensor: torch.Tensor) -> torch.dtype:
    """The type that autocast gives matrix products of `tensor`."""
    kind = tensor.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else tensor.dtype


class _HeadLoss(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, targets: torch.Tensor,
        label_smoothing: float, z_loss: float, dtype: torch.dtype, with_gradients: bool, backend: str | None,
    ) -> torch.Tensor:  # fmt: skip
        rows = rows_at_once(hidden.device, weight.shape[0])
        inputs, matrix = hidden.to(dtype), weight.to(dtype)
        loss = torch.zeros((), device=hidden.device)
        d_hidden = torch.empty_like(hidden) if with_gradients else None
        d_weight = torch.zeros_like(weight, dtype=torch.float32) if with_gradients and weight.requires_grad else None
        d_bias = torch.zeros_like(bias) if with_gradients and bias is not None and bias.requires_grad else None
        wide = torch.float32 if dtype == torch.float16 else dtype
        matrix_back = weight.to(wide)
        score = _score if backend is None else _compiled_score(backend)
        for start in range(0, len(inputs), rows):
            part, target = inputs[start : start + rows], targets[start : start + rows, None]
            logits = part @ matrix.T
            if bias is not None:
                logits += bias
            has_target = target != IGNORED
            part_loss, d_logits = score(logits, target, label_smoothing, z_loss, wide if with_gradients else None)
            loss += part_loss
            if d_hidden is None or d_logits is None:
                continue
            # Rows without a target are masked here, where they have D entries, not V.
            d_hidden[start : start + rows] = (d_logits @ matrix_back).mul_(has_target)
            part = part.to(wide) * has_target
            if d_weight is not None and wide == d_weight.dtype:
                d_weight.addmm_(d_logits.T, part)
            elif d_weight is not None and d_weight.is_cuda:  # the sum stays in fp32 inside of the product
                d_weight = torch.addmm(d_weight, d_logits.T, part, out_dtype=torch.float32)
            elif d_weight is not None:
                d_weight += d_logits.T @ part
            if d_bias is not None:
                d_bias += (d_logits * has_target).sum(0)
        ctx.gradients = (d_hidden, d_weight, d_bias)
        return loss

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # type: ignore[override]
        gradients, ctx.gradients = ctx.gradients, None
        d_hidden, d_weight, d_bias = (None if part is None else part.mul_(gradient) for part in gradients)
        return d_hidden, d_weight, d_bias, *[None] * 6


_apply_untraced = torch.compiler.disable(_HeadLoss.apply)


def _score(
    logits: torch.Tensor, target: torch.Tensor, label_smoothing: float, z_loss: float, dtype: torch.dtype | None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The summed loss of logits (n, V) with targets (n, 1), and its gradient (n, V) in `dtype`, if one is given. Of rows
    without a target the gradient is that of target 0."""
    probability = F.softmax(logits, dim=-1, dtype=torch.float32)
    # The likeliest token's probability, unlike the target's, is never too small for a logarithm. Differences to its
    # logit keep the digits that large logits would lose.
    largest, log_sum = logits.amax(-1, keepdim=True).float(), -probability.amax(-1, keepdim=True).log()
    has_target = target != IGNORED
    index = target.where(has_target, 0)
    each = (1 - label_smoothing) * (log_sum + (largest - logits.gather(1, index).float()))
    if label_smoothing:
        each += label_smoothing * (log_sum + (largest - logits.mean(-1, keepdim=True, dtype=torch.float32)))
    if z_loss:
        log_normaliser = largest + log_sum
        each += z_loss * log_normaliser.square()
    loss = each.masked_fill(~has_target, 0).sum()
    if dtype is None:
        return loss, None
    d_logits = probability
    if z_loss:
        d_logits *= 1 + 2 * z_loss * log_normaliser
    if label_smoothing:
        d_logits -= label_smoothing / logits.shape[1]
    if torch.compiler.is_compiling():  # it becomes part of one kernel with all of the above; a scatter does not
        is_target = torch.arange(logits.shape[1], device=logits.device) == index
        d_logits = d_logits + torch.where(is_target, label_smoothing - 1, 0.0)
    else:
        d_logits.scatter_add_(1, index, torch.full_like(each, label_smoothing - 1))
    return loss, d_logits.to(dtype)


@functools.cache
def _compiled_score(backend: str) -> Any:
    return torch.compile(_score, backend=backend)
