"""Next-token prediction."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from transformers import AutoModelForCausalLM

from utils.config import ObjectiveConfig
from utils.data.loaders import Collator
from utils.data.packing import Batch

AUTO_MODEL = AutoModelForCausalLM


def build_collator(config: ObjectiveConfig, tokenizer: Any) -> Collator:
    return collate


def collate(rows: Batch, generators: Sequence[np.random.Generator]) -> Batch:
    """The layouts' own targets, the next tokens."""
    return {name: values for name, values in rows.items() if name not in ("lengths", "loss_mask")}
