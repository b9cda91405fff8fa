"""The costly parts of a training step, computed with less work or memory than in the plain way, to the same result.

Each has its plain twin in torch or transformers, which the tests compare it with, and a switch in `KernelConfig`.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.activations import GELUTanh, NewGELUActivation
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from utils.batches.packing import IGNORED
from utils.cli import UserError
from utils.config import KernelConfig

# Rows of the head's logits that are held at a time, and how many logits at most (fp32: 64 MB). On a CPU more rows leave its
# caches, fewer make its products slow.
ROWS_AT_ONCE, LOGITS_AT_ONCE = 1024, 1 << 24
QUERIES_AT_ONCE = 128
LONGEST_BLOCKED = 1024  # positions; measured on a CPU with AVX2, sdpa trains faster from here on, and keeps less
RANDOM_VALUES = 1 << 16  # of the 16 bits that decide whether dropout keeps a number


# ---- The head: cross-entropy without all logits.


def head_loss(
    hidden: torch.Tensor, head: nn.Linear, targets: torch.Tensor, *, label_smoothing: float = 0.0, z_loss: float = 0.0
) -> torch.Tensor:
    """Summed cross-entropy of `head(hidden)` in nats, an fp32 scalar, of which some rows' logits exist at a time.

    Args:
        hidden: (N, D).
        targets: (N,); -100 where there is none.
        label_smoothing, z_loss: as in `Objective.forward`.

    The gradients are computed along with the loss, so that nothing of size (N, V) is kept or computed twice, as in
    Liger-Kernel (Hsu et al., 2024, arXiv 2410.10989). Products are in autocast's precision, loss and softmax in fp32;
    under fp16 the gradients' products too, which are made before the scaler's factor could keep them in fp16's range.
    May be differentiated once.
    """
    with_gradients = torch.is_grad_enabled()
    dtype = product_dtype(hidden)
    with torch.autocast(hidden.device.type, enabled=False):
        return _HeadLoss.apply(hidden, head.weight, head.bias, targets, label_smoothing, z_loss, dtype, with_gradients)  # type: ignore[no-any-return]


def product_dtype(tensor: torch.Tensor) -> torch.dtype:
    """What autocast would make of matrix products of `tensor`."""
    kind = tensor.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else tensor.dtype


class _HeadLoss(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, targets: torch.Tensor,
        label_smoothing: float, z_loss: float, dtype: torch.dtype, with_gradients: bool,
    ) -> torch.Tensor:  # fmt: skip
        rows = max(1, min(ROWS_AT_ONCE, LOGITS_AT_ONCE // weight.shape[0]))
        inputs, matrix = hidden.to(dtype), weight.to(dtype)
        loss = torch.zeros((), device=hidden.device)
        d_hidden = torch.empty_like(hidden) if with_gradients else None
        d_weight = torch.zeros_like(weight, dtype=torch.float32) if with_gradients and weight.requires_grad else None
        d_bias = torch.zeros_like(bias) if with_gradients and bias is not None and bias.requires_grad else None
        wide = torch.float32 if dtype == torch.float16 else dtype
        matrix_back = weight.to(wide)
        for start in range(0, len(inputs), rows):
            part, target = inputs[start : start + rows], targets[start : start + rows, None]
            logits = part @ matrix.T
            if bias is not None:
                logits += bias
            log_probability = F.log_softmax(logits.float(), dim=-1)
            has_target = target != IGNORED
            index = target.where(has_target, 0)
            chosen = log_probability.gather(1, index)
            each = (label_smoothing - 1) * chosen
            if label_smoothing:
                each -= label_smoothing * log_probability.mean(-1, keepdim=True)
            log_normaliser = logits.gather(1, index).float() - chosen
            if z_loss:
                each += z_loss * log_normaliser.square()
            loss += each.masked_fill(~has_target, 0).sum()
            if d_hidden is None:
                continue
            d_logits = log_probability.exp_()
            if z_loss:
                d_logits *= 1 + 2 * z_loss * log_normaliser
            if label_smoothing:
                d_logits -= label_smoothing / weight.shape[0]
            d_logits.scatter_add_(1, index, torch.full_like(chosen, label_smoothing - 1))
            d_logits = d_logits.mul_(has_target).to(wide)
            d_hidden[start : start + rows] = d_logits @ matrix_back
            if d_weight is not None and wide == d_weight.dtype:
                d_weight.addmm_(d_logits.T, part.to(wide))
            elif d_weight is not None:
                d_weight += d_logits.T @ part
            if d_bias is not None:
                d_bias += d_logits.sum(0)
        ctx.gradients = (d_hidden, d_weight, d_bias)
        return loss

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # type: ignore[override]
        gradients, ctx.gradients = ctx.gradients, None
        d_hidden, d_weight, d_bias = (None if part is None else part.mul_(gradient) for part in gradients)
        return d_hidden, d_weight, d_bias, None, None, None, None, None


# ---- Attention on a CPU: plain matrix products, of which the causal ones leave out most of what is masked.


def blocked_attention(
    module: nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor,
    attention_mask: torch.Tensor | None, dropout: float = 0.0, scaling: float | None = None,
    is_causal: bool | None = None, **kwargs: Any,
) -> tuple[torch.Tensor, None]:  # fmt: skip
    """Attention as transformers asks for it; where causal, each block of queries reads only the keys up to its end.

    Args:
        query: (B, H, T, D).
        key, value: (B, G, S, D) and (B, G, S, E), G dividing H.
        attention_mask: (B or 1, H or 1, T, S), added to the scores; of a causal module it hides what is to come.

    Returns:
        (B, T, H, E), and no weights.

    What only some models need, long rows, reading a cache and evaluation are left to `sdpa`. Under autocast to bf16 the scores
    are rounded to it before the softmax, as transformers' eager attention does and sdpa does not.
    """
    causal = getattr(module, "is_causal", None) if is_causal is None else is_causal
    length, seen = query.shape[2], key.shape[2]
    plain_mask = attention_mask is None or (
        attention_mask.is_floating_point()
        and not attention_mask.requires_grad
        and attention_mask.shape[2:] == (length, seen)
    )
    usual = plain_mask and all(kwargs.get(name) is None for name in ("position_bias", "softcap", "cache"))
    known = causal is not None and (length == seen or not causal)
    # Without gradients sdpa keeps nothing; but a pass that drops numbers may be made once more with them.
    pays = (torch.is_grad_enabled() or dropout > 0) and max(length, seen) < LONGEST_BLOCKED
    if not (usual and known and pays):
        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, is_causal, **kwargs)  # type: ignore[no-any-return]
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    dtype = product_dtype(query)  # rotary positions leave query and key in fp32 also under autocast
    query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    if attention_mask is not None:
        attention_mask = attention_mask.to(dtype)
    with torch.autocast(query.device.type, enabled=False):
        return _BlockedAttention.apply(query, key, value, attention_mask, scaling, causal, dropout), None


class _BlockedAttention(torch.autograd.Function):
    """One function, not a chain of torch's: the gradients of slices would each be as large as the whole."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None,
        scaling: float, causal: bool, dropout: float,
    ) -> torch.Tensor:  # fmt: skip
        (batch, heads, length, size), groups = query.shape, key.shape[1]
        keys, values = key.flatten(0, 1), value.flatten(0, 1)
        output = torch.empty(batch, length, heads, value.shape[3], dtype=query.dtype, device=query.device)
        probabilities, kept = [], []
        for start in range(0, length, QUERIES_AT_ONCE):
            end = min(start + QUERIES_AT_ONCE, length)
            seen = end if causal else key.shape[2]
            queries = query[:, :, start:end].reshape(batch * groups, -1, size)
            scores = torch.bmm(queries, keys[:, :seen].transpose(1, 2)).mul_(scaling)
            by_head = scores.view(batch, heads, end - start, seen)
            if mask is not None:
                by_head += mask[:, :, start:end, :seen]
            elif causal:
                by_head[..., start:] += causal_mask(end - start, query)
            probability = torch.softmax(scores, dim=-1)
            probabilities.append(probability)
            if dropout:
                kept.append(random_mask(probability, dropout))
                probability = scale_kept(probability, kept[-1], dropout)
            block = torch.bmm(probability, values[:, :seen]).view(batch, heads, end - start, -1)
            output[:, start:end] = block.transpose(1, 2)
        ctx.save_for_backward(query, key, value, *probabilities, *kept)
        ctx.scaling, ctx.dropout = scaling, dropout
        return output

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # type: ignore[override]
        query, key, value, *saved = ctx.saved_tensors
        (batch, heads, length, size), groups = query.shape, key.shape[1]
        keys, values = key.flatten(0, 1), value.flatten(0, 1)
        d_query = torch.empty(query.shape, dtype=query.dtype, device=query.device)
        d_keys, d_values = torch.zeros_like(keys), torch.zeros_like(values)
        blocks = range(0, length, QUERIES_AT_ONCE)
        for number, start in enumerate(blocks):
            end = min(start + QUERIES_AT_ONCE, length)
            probability = saved[number]
            seen = probability.shape[-1]
            queries = query[:, :, start:end].reshape(batch * groups, -1, size)
            d_output = gradient[:, start:end].transpose(1, 2).reshape(batch * groups, -1, value.shape[3])
            weights, d_weights = probability, torch.bmm(d_output, values[:, :seen].transpose(1, 2))
            if ctx.dropout:
                kept = saved[len(blocks) + number]
                weights = scale_kept(probability, kept, ctx.dropout)
                d_weights = scale_kept(d_weights, kept, ctx.dropout)
            d_values[:, :seen].baddbmm_(weights.transpose(1, 2), d_output)
            d_scores = torch._softmax_backward_data(d_weights, probability, -1, probability.dtype)
            d_keys[:, :seen].baddbmm_(d_scores.transpose(1, 2), queries, alpha=ctx.scaling)
            block = torch.bmm(d_scores, keys[:, :seen]).mul_(ctx.scaling)
            d_query[:, :, start:end] = block.view(batch, heads, end - start, size)
        return d_query, d_keys.view(key.shape), d_values.view(value.shape), None, None, None, None


def causal_mask(length: int, like: torch.Tensor) -> torch.Tensor:
    """(T, T), to be added to scores: the lowest number where the key comes after the query."""
    return torch.full((length, length), torch.finfo(like.dtype).min, dtype=like.dtype, device=like.device).triu(1)


def additive_mask(*, dtype: torch.dtype, device: torch.device, **kwargs: Any) -> torch.Tensor | None:
    """transformers' mask of `sdpa`, in the form that scores are added to, made once for all layers."""
    mask = sdpa_mask(dtype=dtype, device=device, **kwargs)
    if mask is None:
        return None
    dtype = product_dtype(torch.empty(0, dtype=dtype, device=device))
    return torch.where(mask, 0.0, torch.finfo(dtype).min).to(dtype)


# Without its own mask function every mask would be dropped without a word.
AttentionInterface.register("blocked", blocked_attention)
AttentionMaskInterface.register("blocked", additive_mask)


# ---- Dropout on a CPU: one draw of 64 bits decides for four numbers.


def random_mask(like: torch.Tensor, probability: float) -> torch.Tensor:
    """Which of the numbers are kept; drawn from torch's own generator, which activation checkpointing restores."""
    quarter = -(-like.numel() // 4)
    if torch.compiler.is_compiling():  # which would break its graph at `random_`
        bits = torch.randint(-(2**63), 2**63 - 1, (quarter,), device=like.device)
    else:
        bits = torch.empty(quarter, dtype=torch.int64, device=like.device).random_(-(2**63), None)  # type: ignore[call-overload]
    kept = bits.view(torch.int16)[: like.numel()] >= round(probability * RANDOM_VALUES) - RANDOM_VALUES // 2
    return kept.view(like.shape)


def scale_kept(values: torch.Tensor, kept: torch.Tensor, probability: float) -> torch.Tensor:
    """`values` where `kept`, divided by the share that is kept, else 0."""
    return values * kept * (RANDOM_VALUES / (RANDOM_VALUES - round(probability * RANDOM_VALUES)))


class FastDropout(nn.Dropout):
    """`nn.Dropout`, whose probability is rounded to 1/65,536; on other devices than a CPU, and to 0 or 1, torch's own."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        if not self.training or not 0 < round(self.p * RANDOM_VALUES) < RANDOM_VALUES or input.device.type != "cpu":
            return super().forward(input)
        return scale_kept(input, random_mask(input, self.p), self.p)


def use_kernels(model: Any, attention: str, config: KernelConfig, device: torch.device) -> None:
    """Choose `model`'s attention for `device`, and replace modules without parameters by faster ones of one function.

    Args:
        model: of transformers, built with its default attention where `attention` is auto or blocked.

    Raises `UserError` for an attention that the model lacks.
    """
    wanted = attention == "blocked" or (attention == "auto" and device.type == "cpu")
    if wanted and model.config._attn_implementation == "sdpa":
        model.set_attn_implementation("blocked")
    if attention == "blocked" and model.config._attn_implementation != "blocked":
        raise UserError(f"model.attention blocked: {type(model).__name__} has its own attention; use auto or eager")
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if config.fused_activation and type(child) is NewGELUActivation:
                setattr(module, name, GELUTanh())
            if config.fast_dropout and device.type == "cpu" and type(child) is nn.Dropout:
                setattr(module, name, FastDropout(child.p).train(child.training))


def resolve_matmul_precision(name: str, device: torch.device) -> str:
    """The name for torch of `matmul_precision`.

    With "medium" torch leaves fp32 products on a CPU with AVX-512 to oneDNN, twice as fast as MKL on AMD's and as exact;
    only with AMX would that round to bf16. Without AVX-512 it changes nothing (torch, aten/src/ATen/native/mkldnn).
    """
    if name != "auto":
        return name
    has = torch.cpu.get_capabilities()
    return "medium" if device.type == "cpu" and has.get("avx512_bw") and not has.get("amx_bf16") else "highest"


def describe_kernels(objective: Any) -> str:
    """A line: what is in use."""
    modules = {type(module) for module in objective.modules() if getattr(module, "p", 1)}  # but for dropout of 0
    parts = [
        f"attention {objective.model.config._attn_implementation}",
        f"head {'chunked' if objective.chunked_head else 'with all logits'}",
        *(["activation fused"] if GELUTanh in modules else []), *(["dropout fast"] if FastDropout in modules else []),
        f"fp32 products {torch.get_float32_matmul_precision()}",
    ]  # fmt: skip
    return f"kernels: {', '.join(parts)}"
