"""Context parallelism: the positions of each row are shared out over the ranks of a group, for rows too long for one.

A row is cut into two pieces per rank, and rank r of n holds the pieces r and 2n - 1 - r: as a causal query reads what is
before it, every rank has the same work. In each layer the ranks gather all keys and values of the row; each computes the
attention of its own queries. As Llama 3 was trained (Grattafiori et al., 2024, arXiv 2407.21783, section 3.3.2): unlike a
ring, it allows any mask, by which packed documents are kept apart. Every other operation of a decoder is done position by
position. The loss is a sum over targets, so a rank's part of a row adds to it like a row of its own.
"""

import os
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from accelerate.utils import parse_flag_from_env
from torch import nn
from torch.nn.attention.bias import causal_lower_right
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from utils.batches.collation import Collator
from utils.batches.packing import Batch
from utils.cli import UserError
from utils.training.kernels.head_loss import product_dtype

# What some models hand to their attention, and this one cannot heed.
UNKNOWN_TO_IT = ("sliding_window", "softcap", "position_bias", "s_aux")


def context_parallel_size() -> int:
    """Over how many ranks the launch shares out each row, as accelerate's ParallelismConfig reads it."""
    asked = parse_flag_from_env("ACCELERATE_USE_PARALLELISM_CONFIG")
    return int(os.environ.get("PARALLELISM_CONFIG_CP_SIZE", "1")) if asked else 1


def columns_of(rank: int, size: int, length: int) -> np.ndarray:
    """The positions that rank `rank` of `size` holds of a row of `length`, (length / size,)."""
    pieces = np.arange(length).reshape(2 * size, -1)
    return pieces[[rank, 2 * size - 1 - rank]].reshape(-1)


def collate_columns(
    collate: Collator, rank: int, size: int, rows: Batch, generators: Sequence[np.random.Generator]
) -> Batch:
    """What `collate` makes of rows, of which this rank's positions: (B, T / size).

    And `row_position_ids` (B, T), all of the row's, where it holds several documents. Padding needs no mask, as it stands
    at the end.
    """
    batch = collate(rows, generators)
    columns = columns_of(rank, size, batch["input_ids"].shape[1])
    part = {name: batch[name][:, columns] for name in ("input_ids", "targets")}
    if "position_ids" not in batch:
        return part | {"position_ids": np.tile(columns, (len(part["targets"]), 1))}
    return part | {"position_ids": batch["position_ids"][:, columns], "row_position_ids": batch["position_ids"]}


class ContextGroup:
    """The ranks that share the positions of their rows.

    Attributes:
        rank: this one's number in the group.
        size: ranks in it.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group, self.rank, self.size = group, dist.get_rank(group), dist.get_world_size(group)

    def visible_keys(self, row_position_ids: torch.Tensor | None) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """For the queries of each of this rank's pieces, (B, 1, L, E): which keys of the row they read.

        E is where the piece ends. None, in the place of both, where a row is one document: then all up to the query's own.

        Args:
            row_position_ids: (B, T); they restart at 0 with each document.
        """
        if row_position_ids is None:
            return None, None
        columns = torch.arange(row_position_ids.shape[1], device=row_position_ids.device)
        documents = columns - row_position_ids  # where each one begins
        masks = []
        for start, end in self.pieces(len(columns)):
            same = documents[:, start:end, None] == documents[:, None, :end]
            masks.append((same & (columns[start:end, None] >= columns[:end]))[:, None])
        return masks[0], masks[1]

    def pieces(self, length: int) -> list[tuple[int, int]]:
        """Begin and end of the two that this rank holds of a row."""
        size = length // (2 * self.size)
        return [(piece * size, (piece + 1) * size) for piece in (self.rank, 2 * self.size - 1 - self.rank)]

    def attention(
        self, module: nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor,
        attention_mask: torch.Tensor | None, dropout: float = 0.0, scaling: float | None = None,
        is_causal: bool | None = None, visible_keys: tuple[torch.Tensor | None, ...] = (), **kwargs: Any,
    ) -> tuple[torch.Tensor, None]:  # fmt: skip
        """Attention as transformers asks for it, over the keys of all ranks (which all call).

        Args:
            query, key, value: (B, H, T / size, D), with fewer heads of keys and values perhaps.
            visible_keys: as this object's method gives them. Without them the row is this rank's alone: a text that is
                being written.

        Returns:
            (B, T / size, H, D), and no weights.
        """
        if not visible_keys:
            return sdpa_attention_forward(
                module, query, key, value, attention_mask, dropout, scaling, is_causal, **kwargs
            )  # type: ignore[no-any-return]
        if unheeded := [name for name in UNKNOWN_TO_IT if kwargs.get(name) is not None]:
            raise UserError(
                f"context parallelism has no {unheeded[0]}, which {type(module).__name__} asks for; choose another "
                "architecture, or launch without parallelism_config_cp_size"
            )
        dtype = product_dtype(query)
        query, pair = query.to(dtype), torch.cat([key.to(dtype), value.to(dtype)], dim=-1)
        keys, values = _GatherColumns.apply(pair, self.group).split([key.shape[-1], value.shape[-1]], dim=-1)
        outputs = []
        for part, (_, end), visible in zip(
            query.chunk(2, dim=2), self.pieces(keys.shape[2]), visible_keys, strict=True
        ):
            outputs.append(F.scaled_dot_product_attention(
                part, keys[:, :, :end], values[:, :, :end],
                attn_mask=causal_lower_right(part.shape[2], end) if visible is None else visible,
                dropout_p=dropout, scale=scaling, enable_gqa=query.shape[1] != key.shape[1],
            ))  # fmt: skip
        return torch.cat(outputs, dim=2).transpose(1, 2).contiguous(), None


class _GatherColumns(torch.autograd.Function):
    """(B, H, T / size, D) of each rank → (B, H, T, D) in the row's order; the gradients are summed over the ranks in fp32."""

    @staticmethod
    def forward(ctx: Any, part: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:  # type: ignore[override]
        ctx.group, size = group, dist.get_world_size(group)
        parts = torch.empty(size, *part.shape, dtype=part.dtype, device=part.device)
        dist.all_gather_into_tensor(parts, part.contiguous()[None], group)
        first, last = parts.chunk(2, dim=3)
        return torch.cat([*first, *last.flip(0)], dim=2)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:  # type: ignore[override]
        size = dist.get_world_size(ctx.group)
        pieces = gradient.float().chunk(2 * size, dim=2)
        parts = torch.stack([torch.cat([pieces[rank], pieces[2 * size - 1 - rank]], dim=2) for rank in range(size)])
        part = torch.empty_like(parts[:1])
        dist.reduce_scatter_tensor(part, parts, group=ctx.group)
        return part[0].to(gradient.dtype), None


def use_context_parallel(objective: Any, group: dist.ProcessGroup) -> None:
    """Let `objective`, not yet prepared, take batches of `collate_columns` from here on; all ranks call.

    `UserError` if its model's logits would not be those of a whole row.
    """
    context = ContextGroup(group)
    device = next(objective.parameters()).device
    length = 16 * context.size
    ids = 5 + torch.arange(length, device=device)[None] % min(90, objective.model.config.vocab_size - 5)
    positions = torch.arange(length, device=device)[None] % (5 * context.size)  # four documents, some in several pieces
    columns = torch.from_numpy(columns_of(context.rank, context.size, length)).to(device)
    was_training = objective.training
    objective.eval()
    with torch.no_grad():
        wanted = objective.logits(input_ids=ids, position_ids=positions)[:, columns]
        # transformers need make no mask: documents are kept apart in the attention, and a text is written by itself.
        AttentionMaskInterface.register("context_parallel", lambda **_: None)
        AttentionInterface.register("context_parallel", context.attention)
        objective.model.set_attn_implementation("context_parallel")
        objective.context = context
        found = objective.logits(
            input_ids=ids[:, columns], position_ids=positions[:, columns], row_position_ids=positions
        )
    objective.train(was_training)
    difference = (found - wanted).abs().max()
    dist.all_reduce(difference, dist.ReduceOp.MAX, group)
    if not float(difference) <= 1e-3 * float(wanted.std()):
        raise UserError(
            f"context parallelism does not suit {type(objective.model).__name__}: it computes other logits than on whole "
            "rows; choose another architecture, or launch without parallelism_config_cp_size"
        )
