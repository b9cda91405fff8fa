"""Attention on a CPU: matrix products by blocks of queries, which skip most of what a causal mask hides."""

from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from utils.kernels.head_loss import product_dtype

RANDOM_VALUES = 1 << 16  # of the 16 bits that decide whether dropout keeps a number
QUERIES_AT_ONCE = 128
LONGEST_BLOCKED = 1024  # positions; from here on sdpa is faster and keeps less, measured on a CPU with AVX2


def blocked_attention(
    module: nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor,
    attention_mask: torch.Tensor | None, dropout: float = 0.0, scaling: float | None = None,
    is_causal: bool | None = None, **kwargs: Any,
) -> tuple[torch.Tensor, None]:  # fmt: skip
    """Attention by transformers' interface; if causal, each block of queries reads only the keys up to its end.

    query: (B, H, T, D); key, value: (B, G, S, D), (B, G, S, E), G dividing H; attention_mask: (B or 1, H or 1, T, S),
    added to the scores (for a causal module it hides later positions); returns (B, T, H, E), and no weights.

    `sdpa` computes long rows, evaluations, and features of only some models. Under autocast to bf16 the scores are
    rounded to bf16 before the softmax, as in transformers' eager attention.
    """
    causal = getattr(module, "is_causal", None) if is_causal is None else is_causal
    length, seen, mask = query.shape[2], key.shape[2], attention_mask
    usual = mask is None or (mask.is_floating_point() and not mask.requires_grad and mask.shape[2:] == (length, seen))
    usual = usual and all(kwargs.get(name) is None for name in ("position_bias", "softcap", "cache"))
    known = causal is not None and (length == seen or not causal)
    # Without gradients sdpa keeps nothing. But a pass with dropout may be recomputed with gradients: same kernel.
    pays = (torch.is_grad_enabled() or dropout > 0) and max(length, seen) < LONGEST_BLOCKED
    if not (usual and known and pays):
        return sdpa_attention_forward(module, query, key, value, mask, dropout, scaling, is_causal, **kwargs)  # type: ignore[no-any-return]
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    dtype = product_dtype(query)  # rotary positions leave query and key in fp32 even under autocast
    query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    mask = None if mask is None else mask.to(dtype)
    with torch.autocast(query.device.type, enabled=False):
        return _BlockedAttention.apply(query, key, value, mask, scaling, causal, dropout), None


class _BlockedAttention(torch.autograd.Function):
    """One autograd function: in a chain of torch's own, the gradient of each slice would be as large as the whole."""

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
                lowest = query.new_full((end - start, end - start), torch.finfo(query.dtype).min)
                by_head[..., start:] += lowest.triu(1)  # where the key comes after the query
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
            probability, seen = saved[number], saved[number].shape[-1]
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


def random_mask(like: torch.Tensor, probability: float) -> torch.Tensor:
    """Which numbers are kept, a bool each; from torch's own generator, which activation checkpointing restores."""
    quarter = -(-like.numel() // 4)
    if torch.compiler.is_compiling():  # `random_` would break the graph
        bits = torch.randint(-(2**63), 2**63 - 1, (quarter,), device=like.device)
    else:
        bits = torch.empty(quarter, dtype=torch.int64, device=like.device).random_(-(2**63), None)  # type: ignore[call-overload]
    kept = bits.view(torch.int16)[: like.numel()] >= round(probability * RANDOM_VALUES) - RANDOM_VALUES // 2
    return kept.view(like.shape)


def scale_kept(values: torch.Tensor, kept: torch.Tensor, probability: float) -> torch.Tensor:
    """`values` where `kept`, divided by the share that is kept, else 0."""
    return values * kept * (RANDOM_VALUES / (RANDOM_VALUES - round(probability * RANDOM_VALUES)))


def additive_mask(*, dtype: torch.dtype, device: torch.device, **kwargs: Any) -> torch.Tensor | None:
    """transformers' mask for `sdpa`, as numbers to add to the scores; made once for all layers."""
    mask = sdpa_mask(dtype=dtype, device=device, **kwargs)
    return None if mask is None else as_numbers(mask, dtype)


def as_numbers(reads: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """A boolean mask as numbers to add to the scores: 0 where it is true, else the lowest number of the type that
    autocast gives products of `dtype`."""
    zero = torch.zeros((), dtype=dtype, device=reads.device)
    zero = zero.to(product_dtype(zero))
    return torch.where(reads, zero, torch.finfo(zero.dtype).min)


# transformers silently drops every mask for an attention without its own mask function.
AttentionInterface.register("blocked", blocked_attention)
AttentionMaskInterface.register("blocked", additive_mask)
# Of a boolean mask torch would make such numbers anew in every layer, and keep all of them for the backward pass.
AttentionInterface.register("sdpa_shared_mask", sdpa_attention_forward)
AttentionMaskInterface.register("sdpa_shared_mask", additive_mask)
