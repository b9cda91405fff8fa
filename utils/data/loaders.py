"""DataLoaders: the rows of a layout, collated by an objective; accelerate gives each rank its slice of every batch.

The order yields draws. A draw is one sample of one epoch: epoch × number of rows + row. Which tokens an objective hides
or moves is a pure function of (seed, draw), however batches are split and wherever a run was resumed.
"""

import gc
import multiprocessing
import signal
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader

from utils.cli import UserError
from utils.data.order import PADDING_SAMPLE, EvaluationBatchSampler, TrainBatchSampler
from utils.data.packing import Batch, BestFitLayout, PackedLayout, PaddedLayout, document_places, document_windows
from utils.data.token_dataset import TokenDataset

Layout = PackedLayout | PaddedLayout
# (rows as a layout gives them, a random generator per row) → what the model reads, and `targets`.
Collator = Callable[[Batch, Sequence[np.random.Generator]], Batch]
EVALUATION_SEED = 0  # independent of the run's seed: the evaluations of all runs hide the same tokens


def with_places(collate: Collator, rows: Batch, generators: Sequence[np.random.Generator]) -> Batch:
    """What `collate` makes of rows, and `cu_seqlens`, the places of their documents, for varlen attention."""
    batch = collate(rows, generators)
    return batch | {"cu_seqlens": document_places(batch)}


def build_layout(
    tokens: TokenDataset, layout: str, sequence_length: int, *, pad_token_id: int, vocab_size: int,
    fixed_length: bool = False, stride: int | None = None,
) -> Layout:  # fmt: skip
    """Rows of `sequence_length` positions, `layout` as in `DataConfig`. With `fixed_length`, padded rows have that many
    positions too; with a `stride`, those of a long document overlap. `UserError` if there is nothing to predict, or a
    token id that is not below `vocab_size`."""
    if tokens.largest_id >= vocab_size:
        mismatch = f"the dataset holds token id {tokens.largest_id}, but its tokenizer has {vocab_size} entries"
        raise UserError(f"{mismatch}: the folder is damaged or mixes two datasets; prepare it again")
    if not any((lengths > 1).any() for _, lengths in document_windows(tokens)):
        raise UserError("no document of the dataset has a token to predict: each is one token long; prepare other text")
    if layout == "padded":
        return PaddedLayout(tokens, sequence_length, pad_token_id, fixed_length=fixed_length, stride=stride)
    return (BestFitLayout if layout == "best_fit" else PackedLayout)(tokens, sequence_length)


class RowGenerators(Sequence[np.random.Generator]):
    """One random generator per draw, made on first use: most objectives need none."""

    def __init__(self, seed: int, draws: Sequence[int]) -> None:
        self.seed, self.draws = seed, draws
        self.made: list[np.random.Generator | None] = [None] * len(draws)

    def __len__(self) -> int:
        return len(self.draws)

    def __getitem__(self, index):  # type: ignore[override] # no slices
        if self.made[index] is None:  # an IndexError ends an iteration
            self.made[index] = np.random.default_rng([self.seed, self.draws[index] + 1])  # a padding row's draw is -1
        return self.made[index]


class CollatedRows:
    """A map-style dataset of draws, whose unit is the batch."""

    def __init__(self, layout: Layout, collate: Collator, seed: int) -> None:
        self.layout, self.collate, self.seed = layout, collate, seed

    def __len__(self) -> int:
        return len(self.layout)

    def __getitems__(self, draws: list[int]) -> Batch:
        """The batch of `draws` (B,); PyTorch's loaders call this name for many samples at once."""
        rows = [PADDING_SAMPLE if draw == PADDING_SAMPLE else draw % len(self.layout) for draw in draws]
        return self.collate(self.layout.__getitems__(rows), RowGenerators(self.seed, draws))


def build_train_loader(
    layout: Layout, collate: Collator, batch_size: int, *, samples_seen: int, seed: int, num_workers: int
) -> DataLoader:
    """Endless micro-batches of `batch_size` rows over all ranks, from position `samples_seen` of the sample order."""
    sampler = TrainBatchSampler(len(layout), batch_size, seed, samples_seen)
    return _build_loader(CollatedRows(layout, collate, seed), sampler, num_workers)


def build_evaluation_loader(
    layout: Layout, collate: Collator, batch_size: int, rows: Sequence[int] | None = None
) -> DataLoader:
    """Each of `rows` once (None: every row), in batches of `batch_size` rows over all ranks."""
    sampler = EvaluationBatchSampler(range(len(layout)) if rows is None else rows, batch_size)
    return _build_loader(CollatedRows(layout, collate, EVALUATION_SEED), sampler, num_workers=0)


def _build_loader(rows: Any, sampler: Any, num_workers: int) -> DataLoader:
    return DataLoader(
        rows, batch_sampler=sampler, num_workers=num_workers, worker_init_fn=ignore_signals,
        collate_fn=to_tensors, pin_memory=torch.cuda.is_available(),  # type: ignore[arg-type] # gets a batch
    )  # fmt: skip


def to_tensors(batch: Batch) -> dict[str, torch.Tensor]:
    """The arrays as tensors that share their memory."""
    return {name: torch.from_numpy(values) for name, values in batch.items()}


def ignore_signals(worker: int) -> None:
    """In a loader's worker: Ctrl-C and a launcher's signals are for its parent, which ends it after the last save."""
    for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(signum, signal.SIG_IGN)


def end_workers() -> None:
    """At the end of a script: kill workers that are stuck, as they ignore every other signal. Loaders that nobody uses any
    more end theirs in order; a worker that was killed before would end this process with an error."""
    gc.unfreeze()
    gc.collect()
    for child in multiprocessing.active_children():
        child.kill()
