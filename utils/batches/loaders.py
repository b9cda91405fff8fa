"""DataLoaders over a layout: accelerate hands each rank its slice of every batch."""

from functools import partial

import torch
from torch.utils.data import DataLoader, Dataset

from utils.batches.batch_plan import PADDING_SAMPLE, BatchPlan, EvaluationBatchSampler, TrainBatchSampler
from utils.batches.packing import Layout, PackedLayout, PaddedLayout, Row, collate
from utils.batches.token_dataset import TokenDataset


class RowDataset(Dataset):
    """A layout as a map-style dataset; `PADDING_SAMPLE` is the row without a target."""

    def __init__(self, layout: Layout) -> None:
        self.layout = layout

    def __len__(self) -> int:
        return len(self.layout)

    def __getitem__(self, index: int) -> Row:
        return self.layout.padding_row() if index == PADDING_SAMPLE else self.layout.row(index)


def build_layout(tokens: TokenDataset, layout: str, sequence_length: int, pad_token_id: int) -> Layout:
    """`packed` or `padded` rows of `sequence_length` positions."""
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


def build_evaluation_loader(layout: Layout, batch_size: int, pad_token_id: int, num_workers: int = 0) -> DataLoader:
    """Every row once, `batch_size` rows over all ranks at a time."""
    return _build_loader(layout, EvaluationBatchSampler(len(layout), batch_size), pad_token_id, num_workers)


def _build_loader(layout: Layout, sampler, pad_token_id: int, num_workers: int) -> DataLoader:
    return DataLoader(
        RowDataset(layout),
        batch_sampler=sampler,
        collate_fn=partial(_collate_tensors, pad_token_id=pad_token_id),
        num_workers=num_workers,
        pin_memory=torch.accelerator.is_available(),
        persistent_workers=False,
    )


def _collate_tensors(rows: list[Row], pad_token_id: int) -> dict[str, torch.Tensor]:
    """(B, T) int64 tensors."""
    return {name: torch.from_numpy(values) for name, values in collate(rows, pad_token_id).items()}
