"""Checks of a model before it trains: does it fit the tokenizer, the rows, and packed documents?"""

from pathlib import Path
from typing import Any

import torch

from utils.cli import UserError
from utils.model.build import longest_sequence
from utils.model.modules import evaluating
from utils.objectives import Objective
from utils.pretrained import read_tokenizer


def check_tokenizer(checkpoint: Path, tokenizer: Any) -> None:
    """`UserError` if the dataset's tokenizer is no longer the one that the checkpoint was trained with."""
    trained, present = read_tokenizer(checkpoint).get_vocab(), tokenizer.get_vocab()
    if differing := sorted(trained.items() ^ present.items(), key=lambda entry: entry[1]):
        token, number = differing[0]
        raise UserError(
            f"the dataset's tokenizer ({len(present)} entries) is not the one that {checkpoint} was trained with "
            f"({len(trained)} entries); the first difference is at {number}, {token!r}; restore it, or choose another "
            "--output"
        )


def check_length(model: Any, sequence_length: int) -> None:
    """`UserError` if the model has too few positions for a row."""
    if sequence_length > longest_sequence(model):
        raise UserError(
            f"data.sequence_length ({sequence_length}) is longer than the {longest_sequence(model)} positions of the "
            "model; lower it"
        )


def check_documents_stay_apart(objective: Objective) -> None:
    """`UserError` if a document's logits in a packed row differ from those that it has alone; two short passes.

    A model fails silently if it carries a state along the row, makes its own mask, or does not count positions from 0.
    The passes are made with gradients, as in training: without them attention may compute in another way.
    """
    model: Any = objective.model
    window = getattr(model.config, "sliding_window", None) if objective.is_encoder else None
    length = 8 + (window or 0)  # longer than what a layer with a window sees
    device = next(objective.parameters()).device
    ids = 5 + torch.arange(2 * length, device=device)[None] % min(90, model.config.vocab_size - 5)
    positions = torch.arange(2 * length, device=device)[None] % length
    with evaluating(objective):
        together = objective.logits(input_ids=ids, position_ids=positions)[:, length:]
        alone = model(input_ids=ids[:, length:], use_cache=False).logits.float()
    difference = (together - alone).detach().abs().max()
    if not float(difference) <= 1e-3 * float(alone.detach().std()):
        raise UserError(
            f"{type(model).__name__} does not keep the documents of a packed row apart; choose data.layout padded"
        )
