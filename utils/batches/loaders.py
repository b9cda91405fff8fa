"""DataLoaders over a layout: accelerate hands each rank its slice of every batch."""

from functools import partial

import numpy as np
import torch
from torch.utils.data import DataLoader

from utils.batches.batch_plan import BatchPlan, EvaluationBatchSampler, TrainBatchSampler
from utils.batches.packing import PackedLayout, PaddedLayout, Row, collate
from utils.batches.token_dataset import TokenDataset
from utils.cli import UserError

Layout = PackedLayout | PaddedLayout


def build_layout(tokens: TokenDataset, layout: str, sequence_length: int, pad_token_id: int) -> Layout:
    """`packed` or `padded` rows of `sequence_length` positions; `UserError` if there is nothing to predict."""
    if not (np.diff(tokens.offsets) > 1).any():
        raise UserError("no document of the dataset has a token to predict: each is one token long; prepare other text")
    if layout == "packed":
        return PackedLayout(tokens, sequence_length)
    return PaddedLayout(tokens, sequence_length, pad_token_id)


def build_train_loader(
    layout: Layout, plan: BatchPlan, *, samples_seen: int, seed: int, pad_token_id: int, num_workers: int
) -> DataLoader:
    """Endless micro-batches from position `samples_seen`, `plan.accumulation` of them per step."""
    batch_size = plan.micro_batch * plan.data_parallel_size
    sampler = TrainBatchSampler(len(layout), batch_size, seed, samples_seen)
    return _build_loader(layout, sampler, pad_token_id, num_workers)


def build_evaluation_loader(layout: Layout, batch_size: int, pad_token_id: int) -> DataLoader:
    """Every row once, `batch_size` rows over all ranks at a time."""
    return _build_loader(layout, EvaluationBatchSampler(len(layout), batch_size), pad_token_id, num_workers=0)


def _build_loader(layout: Layout, sampler, pad_token_id: int, num_workers: int) -> DataLoader:
    return DataLoader(
        layout,  # type: ignore[arg-type] # a map-style dataset by its methods
        batch_sampler=sampler,
        collate_fn=partial(_collate_tensors, pad_token_id=pad_token_id),
        num_workers=num_workers,
        pin_memory=torch.cuda.is_available(),
    )


def _collate_tensors(rows: list[Row], pad_token_id: int) -> dict[str, torch.Tensor]:
    """(B, T) int64 tensors."""
    return {name: torch.from_numpy(values) for name, values in collate(rows, pad_token_id).items()}
