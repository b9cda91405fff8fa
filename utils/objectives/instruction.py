"""Instruction tuning: next-token prediction within the assistant's turns."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from utils.cli import UserError
from utils.config import ObjectiveConfig
from utils.data.loaders import Collator
from utils.data.packing import IGNORED, Batch
from utils.objectives import causal

AUTO_MODEL = causal.AUTO_MODEL


def build_collator(config: ObjectiveConfig, tokenizer: Any) -> Collator:
    return collate


def collate(rows: Batch, generators: Sequence[np.random.Generator]) -> Batch:
    """The layouts' targets, without those that the dataset's loss mask excludes."""
    if "loss_mask" not in rows:
        raise UserError("objective.name instruction needs conversations; prepare some with --messages_column messages")
    return causal.collate(rows, generators) | {"targets": np.where(rows["loss_mask"], rows["targets"], IGNORED)}
