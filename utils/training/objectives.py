"""Objectives: an `nn.Module` around the model whose forward returns the summed loss of a batch.

The objective is what `accelerator.prepare` wraps, so autocast, DDP and sharding see every use of the parameters.
"""

import torch
import torch.nn.functional as F
from torch import nn

from utils.batches.packing import IGNORED


class CausalObjective(nn.Module):
    """Next-token prediction."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(
        self,
        input_ids: torch.Tensor,
        shift_labels: torch.Tensor,
        position_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Summed cross-entropy in nats, an fp32 scalar.

        Args:
            input_ids: (B, T).
            shift_labels: (B, T); the token that follows each position, -100 where there is no target.
            position_ids: (B, T), packed rows; they restart at 0 with each document. Without a mask and without a
                cache, transformers then keeps the documents of a row apart.
            attention_mask: (B, T), padded rows; 1 on tokens, 0 on padding.
        """
        logits = self.model(
            input_ids=input_ids, position_ids=position_ids, attention_mask=attention_mask, use_cache=False
        ).logits
        return F.cross_entropy(
            logits.float().flatten(0, 1), shift_labels.flatten(), ignore_index=IGNORED, reduction="sum"
        )


def document_mask(position_ids: torch.Tensor) -> torch.Tensor:
    """The attention mask of packed rows for an encoder, (B, T) → (B, 1, T, T) fp32; a document begins at each 0.

    A decoder in transformers keeps documents apart by their restarting `position_ids`, an encoder does not: give it
    this as `attention_mask`, along with `position_ids`. The mask is added to the scores: 0 where two positions belong
    to one document, else the lowest fp32 number. transformers passes a mask of four dimensions on as it is, and eager
    attention would add a boolean one as 0 and 1: the documents of a row would see each other without a word.
    """
    documents = (position_ids == 0).cumsum(-1)
    same = documents[:, None, :, None] == documents[:, None, None, :]
    return torch.where(same, 0.0, torch.finfo(torch.float32).min)


def count_targets(batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Positions of the batch that have a target; a scalar on the batch's device."""
    return (batch["shift_labels"] != IGNORED).sum()
