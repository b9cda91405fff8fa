"""Attention over documents laid end to end, by torch's variable-length kernel (`torch.nn.attention.varlen`).

The documents' places, `cu_seqlens`, replace the mask: nothing of size (T, T) is made, heads may be grouped, and a GPU
runs flash attention. Without `cu_seqlens` this attention raises; `masked_attention` then lets `sdpa` and its masks do
the work. On a CPU a plain loop over the documents computes the same, to check a model before it goes to its device.
"""

import contextlib
import functools
import itertools
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import AttentionInterface

from utils.kernels.head_loss import product_dtype

try:
    from torch.nn.attention import varlen
except ImportError:  # torch before 2.10
    varlen = None  # type: ignore[assignment]

UNSUPPORTED = ("softcap", "position_bias", "s_aux", "cache")  # what some models pass and the kernel cannot do
LARGEST_HEAD = 256  # flash attention 2


def varlen_attention(
    module: nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor,
    attention_mask: torch.Tensor | None, dropout: float = 0.0, scaling: float | None = None,
    is_causal: bool | None = None, cu_seqlens: torch.Tensor | None = None, sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:  # fmt: skip
    """Attention by transformers' interface within each document; `ValueError` for what the kernel cannot compute.

    query: (B, H, T, D); key, value: (B, G, T, D), G dividing H. cu_seqlens: (N,) int32 as `document_places` makes it.
    Returns (B, T, H, D), and no weights.
    """
    if cu_seqlens is None or attention_mask is not None:
        raise ValueError("varlen attention needs the places of the documents, cu_seqlens, and takes no mask")
    if asked := [name for name in UNSUPPORTED if kwargs.get(name) is not None]:
        raise ValueError(f"varlen attention has no {asked[0]}")
    causal = getattr(module, "is_causal", None) if is_causal is None else is_causal
    if dropout:
        raise ValueError("the kernel has no dropout of attention, which model.dropout sets")
    if causal is None or query.shape[2:] != key.shape[2:] or key.shape != value.shape:
        raise ValueError("varlen attention takes queries, keys and values of one size")
    window = -1 if sliding_window is None else sliding_window - 1
    if (sliding_window is not None) != has_window(module):
        raise ValueError("varlen attention does not know which positions this layer sees")
    (batch, heads, length, size), groups = query.shape, key.shape[1]
    dtype = product_dtype(value)  # rotary positions leave query and key in fp32 even under autocast
    parts = [part.transpose(1, 2).reshape(batch * length, -1, size).to(dtype) for part in (query, key, value)]
    output: Any = varlen.varlen_attn(
        parts[0], parts[1], parts[2], cu_seqlens, cu_seqlens, length, length, scale=size**-0.5 if scaling is None else scaling,
        window_size=(window, 0 if causal else window), enable_gqa=groups != heads,
    )  # fmt: skip
    return output.view(batch, length, heads, size), None


def has_window(module: nn.Module) -> bool:
    """Whether this layer sees only a window, by its model's configuration; `ValueError` for other kinds of layers."""
    config: Any = getattr(module, "config", None)
    kinds, number = getattr(config, "layer_types", None), getattr(module, "layer_idx", None)
    if kinds is None or number is None:
        return getattr(config, "sliding_window", None) is not None
    if kinds[number] not in ("full_attention", "sliding_attention"):
        raise ValueError(f"varlen attention has no {kinds[number]}")
    return bool(kinds[number] == "sliding_attention")


@contextlib.contextmanager
def masked_attention(model: Any) -> Iterator[None]:
    """Within the block a model with varlen attention runs `sdpa` with masks: for samples, caches and left padding."""
    if model.config._attn_implementation != "varlen":
        yield
        return
    model.set_attn_implementation("sdpa")
    try:
        yield
    finally:
        model.set_attn_implementation("varlen")


def kernel_fault(config: Any, device: torch.device, dtype: torch.dtype) -> str | None:
    """Why the kernel of `device` cannot be used for heads of this size: it does not run, or differs from plain products.
    None if it can. Four rows of documents, one of a single token, at lengths that no block size divides."""
    text = config.get_text_config()
    heads = text.num_attention_heads
    groups = getattr(text, "num_key_value_heads", None) or heads
    size = getattr(text, "head_dim", None) or text.hidden_size // heads
    if size > LARGEST_HEAD or size % 8:
        return f"heads have {size} numbers; the kernel takes multiples of 8 up to {LARGEST_HEAD}"
    lengths = torch.tensor([1, 190, 67, 124, 191, 191])  # 4 rows of 191
    places = F.pad(lengths, (1, 2)).cumsum(0).int()  # the last two documents have no tokens
    generator = torch.Generator().manual_seed(0)
    shapes = [(int(lengths.sum()), count, size) for count in (heads, groups, groups, heads)]
    tensors = [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]
    options: dict[str, Any] = {"scale": size**-0.5, "window_size": (-1, 0), "enable_gqa": groups != heads}
    found = []
    use_on_cpu()
    try:
        for place, kind in ((device, dtype), (torch.device("cpu"), torch.float32)):
            query, key, value, gradient = (tensor.to(place, kind) for tensor in tensors)
            inputs, ends = [tensor.requires_grad_() for tensor in (query, key, value)], places.to(place)
            output: Any = varlen.varlen_attn(query, key, value, ends, ends, 191, 191, **options)
            found.append([output, *torch.autograd.grad(output, inputs, gradient)])
    except RuntimeError as error:
        return str(error).splitlines()[0]
    for left, right in zip(*found, strict=True):
        left, right = left.detach().cpu().float(), right.detach()
        if not float((left - right).abs().max()) <= 0.05 * float(right.abs().max()):
            return "the kernel of this device computes other numbers than plain products"
    return None


@functools.cache
def use_on_cpu() -> None:
    """Give torch's operation, which has kernels for GPUs only, plain ones on a CPU."""
    varlen._varlen_attn.register_kernel("cpu")(_forward_on_cpu)
    varlen._varlen_attn_backward.register_kernel("cpu")(_backward_on_cpu)


def _documents(places: torch.Tensor, window: list[int]) -> Iterator[tuple[slice, torch.Tensor]]:
    """The places of each document of n tokens, and which queries do not read which keys, (n, n)."""
    bounds = places.tolist()
    for start, end in itertools.pairwise(bounds):
        if start == end:
            continue
        columns = torch.arange(end - start)
        after = columns - columns[:, None]  # how far a key is behind its query
        left, right = ((size if size >= 0 else end - start) for size in window)
        yield slice(start, end), (after > right) | (after < -left)


def _probabilities(query: torch.Tensor, key: torch.Tensor, hidden: torch.Tensor, scale: float) -> Any:
    """(H, n, n) probabilities and (H, n) log-sums of one document, in fp32."""
    scores = torch.einsum("qhd,khd->hqk", query, key) * scale
    scores = scores.masked_fill(hidden, -torch.inf)
    return scores.softmax(-1), scores.logsumexp(-1)


def _forward_on_cpu(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, cu_seq_q: torch.Tensor, cu_seq_k: Any,
    max_q: int, max_k: int, is_causal: bool = False, scale: float | None = None,
    window_size: list[int] | None = None, *options: Any,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    repeats = query.shape[1] // key.shape[1]
    output, sums = torch.empty_like(query), torch.zeros(query.shape[1], len(query))
    for part, hidden in _documents(cu_seq_q, window_size or [-1, -1]):
        keys, values = (tensor[part].float().repeat_interleave(repeats, 1) for tensor in (key, value))
        probability, sums[:, part] = _probabilities(query[part].float(), keys, hidden, scale)
        output[part] = torch.einsum("hqk,khd->qhd", probability, values).to(output.dtype)
    return output, sums, torch.zeros(2, dtype=torch.uint64)


def _backward_on_cpu(
    grad_out: torch.Tensor, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, out: torch.Tensor,
    lse: torch.Tensor, cu_seq_q: torch.Tensor, cu_seq_k: Any, max_q: int, max_k: int, is_causal: bool,
    rng_state: torch.Tensor, scale: float | None = None, window_size: list[int] | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    (_, heads, size), groups = query.shape, key.shape[1]
    d_query, d_key, d_value = (torch.empty_like(tensor) for tensor in (query, key, value))
    for part, hidden in _documents(cu_seq_q, window_size or [-1, -1]):
        keys, values = (tensor[part].float().repeat_interleave(heads // groups, 1) for tensor in (key, value))
        queries, gradient = query[part].float(), grad_out[part].float()
        probability, _ = _probabilities(queries, keys, hidden, scale)
        d_probability = torch.einsum("qhd,khd->hqk", gradient, values)
        d_scores = probability * (d_probability - (probability * d_probability).sum(-1, keepdim=True)) * scale
        d_query[part] = torch.einsum("hqk,khd->qhd", d_scores, keys).to(d_query.dtype)
        by_group = (len(queries), groups, heads // groups, size)
        d_key[part] = torch.einsum("hqk,qhd->khd", d_scores, queries).view(by_group).sum(2).to(d_key.dtype)
        d_value[part] = torch.einsum("hqk,qhd->khd", probability, gradient).view(by_group).sum(2).to(d_value.dtype)
    return d_query, d_key, d_value


# Without a mask function, so that transformers makes no mask. `varlen_attention` raises where one would be needed.
AttentionInterface.register("varlen", varlen_attention)
