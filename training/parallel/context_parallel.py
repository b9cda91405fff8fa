"""Context parallelism: the ranks of a group share the positions of each row, for rows too long for one device.

A row is cut into two pieces per rank, and rank r of n holds the pieces r and 2n - 1 - r. Since a causal query reads
only what precedes it, this gives every rank the same work. In each layer the ranks gather all keys and values of the
row, and each computes the attention of its own queries. Llama 3 was trained this way (Grattafiori et al., 2024, arXiv
2407.21783, section 3.3.2). Unlike ring attention it allows any mask, which packed documents need. All other operations
of a decoder work position by position. The loss is a sum over targets, so a rank's part counts like a row of its own.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.attention.bias import causal_lower_right
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward

from utils.cli import UserError
from utils.data.loaders import Collator
from utils.data.packing import Batch
from utils.kernels.head_loss import product_dtype
from utils.model.build import evaluating

# Arguments that some models pass to their attention and this attention ignores.
UNSUPPORTED_ARGUMENTS = ("softcap", "position_bias", "s_aux")
REMEDY = "choose another architecture, or launch without parallelism_config_cp_size"


def columns_of(rank: int, size: int, length: int) -> np.ndarray:
    """The positions that rank `rank` of `size` holds of a row of `length`, (length / size,)."""
    pieces = np.arange(length).reshape(2 * size, -1)
    return pieces[[rank, 2 * size - 1 - rank]].reshape(-1)


def collate_columns(
    collate: Collator, rank: int, size: int, rows: Batch, generators: Sequence[np.random.Generator]
) -> Batch:
    """This rank's positions, (B, T / size), of what `collate` makes of rows.

    If a row holds several documents, also `row_position_ids` (B, T) of the whole row. Padding needs no mask, because it
    stands at the end.
    """
    batch = collate(rows, generators)
    columns = columns_of(rank, size, batch["input_ids"].shape[1])
    part = {name: batch[name][:, columns] for name in ("input_ids", "targets")}
    if "position_ids" not in batch:
        return part | {"position_ids": np.tile(columns, (len(part["targets"]), 1))}
    return part | {"position_ids": batch["position_ids"][:, columns], "row_position_ids": batch["position_ids"]}


class ContextGroup:
    """The ranks that share the positions of their rows; this one is number `rank` of `size`."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group, self.rank, self.size = group, dist.get_rank(group), dist.get_world_size(group)

    def masks(self, row_position_ids: torch.Tensor | None) -> list[torch.Tensor] | list[None]:
        """The additive masks of this rank's two pieces, (B, 1, L, E) with E where the piece ends; once for all layers.

        0 where a query reads the key, else the lowest number, in autocast's precision. torch would convert a boolean
        mask in every layer and keep each copy. `row_position_ids` (B, T) restart at 0 with each document; without them
        a row is one document, and both masks are None.
        """
        if row_position_ids is None:
            return [None, None]
        columns = torch.arange(row_position_ids.shape[1], device=row_position_ids.device)
        documents = columns - row_position_ids  # where each document begins
        none = torch.zeros((), device=columns.device)
        none = none.to(product_dtype(none))
        found = []
        for start, end in self.pieces(len(columns)):
            reads = documents[:, start:end, None] == documents[:, None, :end]
            reads &= columns[start:end, None] >= columns[:end]
            found.append(torch.where(reads, none, torch.finfo(none.dtype).min)[:, None])
        return found

    def pieces(self, length: int) -> list[tuple[int, int]]:
        """Begin and end of the two pieces that this rank holds of a row."""
        size = length // (2 * self.size)
        return [(piece * size, (piece + 1) * size) for piece in (self.rank, 2 * self.size - 1 - self.rank)]

    def attention(
        self, module: nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor,
        attention_mask: torch.Tensor | None, dropout: float = 0.0, scaling: float | None = None,
        is_causal: bool | None = None, context_masks: Sequence[torch.Tensor | None] = (), **kwargs: Any,
    ) -> tuple[torch.Tensor, None]:  # fmt: skip
        """Attention as transformers asks for it, over the keys of all ranks (which all call).

        `query`, `key` and `value` are (B, H, T / size, D), keys and values perhaps with fewer heads; the result is
        (B, T / size, H, D), without attention weights. `context_masks` are those of `masks`; without them this rank has
        the whole row, a text that is being generated.
        """
        if not context_masks:
            given = (query, key, value, attention_mask, dropout, scaling, is_causal)
            return sdpa_attention_forward(module, *given, **kwargs)
        if unsupported := [name for name in UNSUPPORTED_ARGUMENTS if kwargs.get(name) is not None]:
            raise UserError(f"context parallelism: {type(module).__name__} asks for {unsupported[0]}; {REMEDY}")
        dtype = product_dtype(query)
        query, pair = query.to(dtype), torch.cat([key.to(dtype), value.to(dtype)], dim=-1)
        keys, values = _GatherColumns.apply(pair, self.group).split([key.shape[-1], value.shape[-1]], dim=-1)
        groups, outputs = query.shape[1] // key.shape[1], []
        for part, (_, end), mask in zip(query.chunk(2, dim=2), self.pieces(keys.shape[2]), context_masks, strict=True):
            some_keys, some_values = keys[:, :, :end], values[:, :, :end]
            if mask is not None:  # GPU kernels take either a mask or grouped heads
                some_keys, some_values = repeat_kv(some_keys, groups), repeat_kv(some_values, groups)
            outputs.append(F.scaled_dot_product_attention(
                part, some_keys, some_values, dropout_p=dropout, scale=scaling, enable_gqa=mask is None and groups > 1,
                attn_mask=causal_lower_right(part.shape[2], end) if mask is None else mask.to(dtype),
            ))  # fmt: skip
        return torch.cat(outputs, dim=2).transpose(1, 2).contiguous(), None


class _GatherColumns(torch.autograd.Function):
    """(B, H, T / size, D) of each rank → (B, H, T, D) in the row's order. The backward pass sums over ranks in fp32."""

    @staticmethod
    def forward(ctx: Any, part: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:  # type: ignore[override]
        ctx.group, size = group, dist.get_world_size(group)
        parts = torch.empty(size, *part.shape, dtype=part.dtype, device=part.device)
        dist.all_gather_single(parts, part.contiguous()[None], group)
        first, last = parts.chunk(2, dim=3)
        return torch.cat([*first, *last.flip(0)], dim=2)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:  # type: ignore[override]
        size = dist.get_world_size(ctx.group)
        pieces = gradient.float().chunk(2 * size, dim=2)
        parts = torch.stack([torch.cat([pieces[rank], pieces[2 * size - 1 - rank]], dim=2) for rank in range(size)])
        part = torch.empty_like(parts[:1])
        dist.reduce_scatter_single(part, parts, group=ctx.group)
        return part[0].to(gradient.dtype), None


def use_context_parallel(objective: Any, group: dist.ProcessGroup) -> None:
    """Let `objective`, not yet prepared, take batches of `collate_columns` from here on. All ranks call.

    `UserError` if the logits of its model would differ from those of a whole row.
    """
    model = objective.model
    _check_architecture(model.config.get_text_config())
    # The model is still in the host's memory, for which the launch may have no backend.
    host_group = dist.new_group(dist.get_process_group_ranks(group), backend="gloo", use_local_synchronization=True)
    context = ContextGroup(host_group)
    length = 8 * context.size
    ids = 5 + torch.arange(length)[None] % min(90, model.config.vocab_size - 5)
    several = torch.arange(length)[None] % (3 * context.size)  # documents, some in several pieces
    rows = [(several, {"row_position_ids": several}), (torch.arange(length)[None], {})]
    columns = torch.from_numpy(columns_of(context.rank, context.size, length))
    with evaluating(objective), torch.no_grad():
        wanted = [objective.logits(input_ids=ids, position_ids=positions)[:, columns] for positions, _ in rows]
        # transformers makes no mask: the attention keeps documents apart, and a generated text is alone in its row.
        AttentionMaskInterface.register("context_parallel", lambda **_: None)
        AttentionInterface.register("context_parallel", context.attention)
        model.set_attn_implementation("context_parallel")
        objective.context = context
        for (positions, extra), logits in zip(rows, wanted, strict=True):
            found = objective.logits(input_ids=ids[:, columns], position_ids=positions[:, columns], **extra)
            wrong = torch.tensor(float(not (found - logits).abs().max() <= 1e-3 * logits.std()))
            dist.all_reduce(wrong, dist.ReduceOp.MAX, host_group)  # all ranks raise, or none
            if wrong:
                raise UserError(
                    f"context parallelism: {type(model).__name__} computes other logits than on whole rows; {REMEDY}"
                )
    context.group = group


def _check_architecture(config: Any) -> None:
    """`UserError` for differences that the short rows of the check would not show."""
    windows = "sliding_attention" if getattr(config, "sliding_window", None) else "full_attention"
    kinds = set(getattr(config, "layer_types", None) or [windows])
    if others := sorted(kinds - {"full_attention"}):
        raise UserError(f"context parallelism: {config.model_type} has layers of {others[0]}; {REMEDY}")
    rotation = getattr(config, "rope_parameters", None) or {}
    for part in [rotation, *rotation.values()]:
        kind = part.get("rope_type", "") if isinstance(part, dict) else ""
        if kind == "longrope" or "dynamic" in kind:  # each rank would choose by its own positions
            raise UserError(f"context parallelism: {config.model_type} has rotations of the kind {kind}; {REMEDY}")
