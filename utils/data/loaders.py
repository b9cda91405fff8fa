"""DataLoaders over a layout: accelerate hands each rank its slice of every batch."""

import multiprocessing
import signal

import torch
from torch.utils.data import DataLoader

from utils.cli import UserError
from utils.data.batch_plan import BatchPlan, EvaluationBatchSampler, TrainBatchSampler
from utils.data.collation import EVALUATION_SEED, CollatedRows, Collator, Layout
from utils.data.packing import Batch, BestFitLayout, PackedLayout, PaddedLayout, document_windows
from utils.data.token_dataset import TokenDataset


def build_layout(
    tokens: TokenDataset, layout: str, sequence_length: int, *, pad_token_id: int, vocab_size: int,
    fixed_length: bool = False,
) -> Layout:  # fmt: skip
    """Rows of `sequence_length` positions, `layout` as in `DataConfig`; `UserError` if there is nothing to predict, or
    an id that a model with `vocab_size` entries does not have. `fixed_length`: padded rows are no shorter either."""
    if tokens.largest_id >= vocab_size:
        raise UserError(
            f"the dataset holds token id {tokens.largest_id}, its tokenizer has {vocab_size} entries: the folder is "
            "damaged, or put together from two; prepare it again"
        )
    if not any((lengths > 1).any() for _, lengths in document_windows(tokens)):
        raise UserError("no document of the dataset has a token to predict: each is one token long; prepare other text")
    if layout == "padded":
        return PaddedLayout(tokens, sequence_length, pad_token_id, fixed_length=fixed_length)
    return (BestFitLayout if layout == "best_fit" else PackedLayout)(tokens, sequence_length)


def build_train_loader(
    layout: Layout, collate: Collator, plan: BatchPlan, *, samples_seen: int, seed: int, num_workers: int
) -> DataLoader:
    """Endless micro-batches from position `samples_seen`, `plan.accumulation` of them per step."""
    batch_size = plan.micro_batch * plan.data_parallel_size
    sampler = TrainBatchSampler(len(layout), batch_size, seed, samples_seen)
    return _build_loader(CollatedRows(layout, collate, seed), sampler, num_workers)


def build_evaluation_loader(layout: Layout, collate: Collator, batch_size: int) -> DataLoader:
    """Every row once, `batch_size` rows over all ranks at a time."""
    sampler = EvaluationBatchSampler(len(layout), batch_size)
    return _build_loader(CollatedRows(layout, collate, EVALUATION_SEED), sampler, num_workers=0)


def _build_loader(rows: CollatedRows, sampler, num_workers: int) -> DataLoader:
    return DataLoader(
        rows,  # type: ignore[arg-type] # a map-style dataset by its methods
        batch_sampler=sampler,
        worker_init_fn=ignore_signals,
        collate_fn=to_tensors,  # type: ignore[arg-type] # of a batch, as `__getitems__` returns it
        num_workers=num_workers,
        pin_memory=torch.cuda.is_available(),
    )


def ignore_signals(worker: int) -> None:
    """For a loader's worker: Ctrl-C and a launcher's signals are for its parent, which ends it when all is saved."""
    for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(signum, signal.SIG_IGN)


def end_workers() -> None:
    """For the end of a script: workers that are stuck do not keep it, though they heed no other signal."""
    for child in multiprocessing.active_children():
        child.kill()


def to_tensors(batch: Batch) -> dict[str, torch.Tensor]:
    """The arrays' own memory as tensors."""
    return {name: torch.from_numpy(values) for name, values in batch.items()}
