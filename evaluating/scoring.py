"""The loss of each unit of a text, from which all totals are made."""

import copy
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.utils.data import DataLoader

from evaluating.texts import Text, Tokens
from utils.cli import UserError
from utils.data.loaders import Layout
from utils.data.packing import IGNORED, Batch, PaddedLayout
from utils.data.token_dataset import TokenDataset
from utils.kernels.head_loss import rows_at_once
from utils.model.adapters import without_adapters
from utils.model.build import evaluating
from utils.objectives import Objective

MOVING = ("span_corruption", "captioning", "transcription")  # their targets do not stand at the row's positions


@dataclass(frozen=True)
class Score:
    """What a model scored on the units of a text, over all ranks."""

    sums: np.ndarray  # (U,) float64, cross-entropy in nats
    counts: np.ndarray  # (U,) int64, target tokens
    unit: str  # "documents", "blocks" or "rows"

    @property
    def num_tokens(self) -> int:
        return int(self.counts.sum())

    @property
    def loss(self) -> float:
        """Mean over all target tokens, in nats."""
        return float(self.sums.sum()) / self.num_tokens if self.num_tokens else math.nan

    def of(self, units: np.ndarray) -> "Score":
        return Score(self.sums[units], self.counts[units], self.unit)


class TokenLosses(Objective):
    """An objective whose forward returns the loss of each target, not their sum."""

    def forward(self, targets: torch.Tensor, **inputs: torch.Tensor) -> torch.Tensor:
        """(B, T) → cross-entropy in nats, (B, T) fp32; 0 where there is no target. As in training, a linear head has the
        logits of some rows only at a time."""
        inputs, wanted = self.model_inputs(inputs), targets.flatten()
        if not self.chunked_head:
            return losses_of(self.model(**inputs).logits.flatten(0, 1), wanted).view(targets.shape)
        hidden = without_adapters(self.model).base_model(**inputs).last_hidden_state.flatten(0, 1)
        head: Any = self.model.get_output_embeddings()  # type: ignore[operator]
        rows = rows_at_once(hidden.device, len(head.weight))
        parts = zip(hidden.split(rows), wanted.split(rows), strict=True)
        return torch.cat([losses_of(head(part), target) for part, target in parts]).view(targets.shape)


def losses_of(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """(N, V), (N,) → (N,) fp32."""
    return F.cross_entropy(logits.float(), targets, ignore_index=IGNORED, reduction="none")


class NumberedLayout:
    """A layout whose batches also have `units`: the unit of each position (B, T), or of each row (B, 1)."""

    def __init__(self, layout: Layout, text: Text, encoded: Tokens, *, by_row: bool) -> None:
        """by_row: targets are not at the positions of their tokens. The unit is then the document of a padded row, else
        the row itself."""
        self.layout, self.by_row, self.rows_are_units = layout, by_row, by_row and not isinstance(layout, PaddedLayout)
        self.unit, self.num_units = ("rows", len(layout)) if self.rows_are_units else (text.unit, encoded.num_units)
        # The same rows of a stream of units in place of ids: whatever a layout does, it does to both.
        self.numbers = copy.copy(layout)
        self.numbers.tokens = TokenDataset([encoded.units], np.diff(layout.tokens.offsets))

    def __len__(self) -> int:
        return len(self.layout)

    def __getitems__(self, indices: list[int]) -> Batch:
        if self.rows_are_units:
            units = np.array(indices)[:, None].clip(min=0)
        else:
            units = self.numbers.__getitems__(indices)["input_ids"]
            units = units[:, :1] if self.by_row else units
        return self.layout.__getitems__(indices) | {"units": units}


def numbered(collate: Any) -> Any:
    """A collator that keeps the units of a `NumberedLayout`."""

    def collate_numbered(rows: Batch, generators: Any) -> Batch:
        units = rows.pop("units")
        batch = collate(rows, generators)
        return batch | {"units": np.broadcast_to(units, batch["targets"].shape).copy()}

    return collate_numbered


@torch.no_grad()
def score_units(accelerator: Accelerator, losses: nn.Module, loader: DataLoader, rows: NumberedLayout) -> Score:
    """The summed loss and the number of targets of each unit, over all ranks; all ranks call this, with `TokenLosses`
    and a loader of `rows`. Sums are fp64 on the host, so that they do not depend on the number of processes."""
    sums, counts = np.zeros(rows.num_units), np.zeros(rows.num_units, np.int64)
    try:
        with evaluating(losses):
            for batch in loader:
                units = batch.pop("units")
                scored = batch["targets"] != IGNORED
                values = losses(**batch)[scored].cpu().double().numpy()
                places = units[scored].cpu().numpy()
                np.add.at(sums, places, values)
                np.add.at(counts, places, 1)
    finally:
        if isinstance(losses, FSDPModule):  # without a backward pass the gathered parameters would stay
            losses.reshard()
    parts = gather_object([(sums, counts)])
    score = Score(sum(part for part, _ in parts), sum(part for _, part in parts), rows.unit)
    if not score.num_tokens:
        raise UserError("the objective finds nothing to predict in the rows to score; score other text")
    return score
