"""Batches of documents that are not stored: a state determines the next global batch, as it does for stored data.

A stream has a fixed number of lanes, each an endless sequence of documents. Every global batch takes the same number
of rows from each lane. So its rows depend neither on the number of processes (each packs the lanes with number %
processes == rank) nor on the number of loader workers (which split the lanes of their process in the same way). A
lane's cursor is where its next row begins; a checkpoint holds the cursors of all lanes.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import fsspec.asyn
import numpy as np
import torch
from accelerate.utils import gather_object, send_to_device
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from training.launch import BatchPlan
from utils.cli import UserError
from utils.config import TrainConfig
from utils.data.loaders import Collator, RowGenerators, ignore_signals
from utils.data.packing import IGNORED, Row

if TYPE_CHECKING:
    from preparation.stream import EncodedDocument, TextStream

# A document's position, and `token`, the number of its tokens in earlier rows.
Cursor = dict[str, Any]


def check_stream_options(config: TrainConfig, plan: BatchPlan) -> None:
    """`UserError` if the options do not work with a stream; it names numbers of lanes that would fit."""
    if config.data.layout != "packed":
        raise UserError(f"data.layout {config.data.layout} needs stored documents; a stream is always packed")
    lanes, ranks, rows = config.data.stream_lanes, plan.data_parallel_size, plan.global_batch_size
    if lanes % ranks or rows % lanes:
        fitting = ", ".join(str(size) for size in range(ranks, rows + 1, ranks) if rows % size == 0)
        raise UserError(
            f"data.stream_lanes {lanes} must be a multiple of the number of processes, {ranks}, and divide "
            f"batch.global_batch_size {rows}; {fitting} would fit"
        )


def iter_rows(documents: Iterator[EncodedDocument], sequence_length: int, token: int) -> Iterator[tuple[Row, Cursor]]:
    """Documents end to end, cut every T tokens: rows like `PackedLayout`'s, each with the cursor of the next row.

    The first `token` tokens of the first document are in earlier rows.
    """
    document = next(documents)
    while True:
        ids = np.empty(sequence_length, np.int64)
        labels = np.full(sequence_length, IGNORED, np.int64)
        positions = np.empty(sequence_length, np.int64)
        filled = 0
        while filled < sequence_length:
            if token == len(document.input_ids):
                document, token = next(documents), 0
            stop = min(token + sequence_length - filled, len(document.input_ids))
            end = filled + stop - token
            targets = document.input_ids[token + 1 : stop + 1]  # if the row cuts the document, also the next token
            ids[filled:end] = document.input_ids[token:stop]
            labels[filled : filled + len(targets)] = targets
            positions[filled:end] = np.arange(end - filled)
            filled, token = end, stop
        cursor = {**document.here, "token": token}
        if token == len(document.input_ids):  # does not read the next document, which may need another block of text
            cursor = {**document.after, "token": 0}
        row = {"input_ids": ids, "targets": labels, "position_ids": positions, "lengths": np.array(sequence_length)}
        yield row, cursor


class LaneRows(NamedTuple):
    """The rows of one lane for one optimizer step, and where its next row begins."""

    lane: int
    rows: list[Row]
    cursor: Cursor


class _Lanes(IterableDataset):
    """Per step, the `LaneRows` of this worker's lanes; or an error in their place."""

    def __init__(
        self, stream: TextStream, lanes: Sequence[int], cursors: dict[int, Cursor], num_rows: int, sequence_length: int
    ) -> None:
        """`num_rows` of each lane per step."""
        self.stream, self.lanes, self.cursors = stream, lanes, cursors
        self.num_rows, self.sequence_length = num_rows, sequence_length

    def __iter__(self) -> Iterator[list[LaneRows | Exception]]:
        worker = get_worker_info()
        lanes = self.lanes[worker.id :: worker.num_workers] if worker else self.lanes
        try:
            parts = [self._iter_lane(lane) for lane in lanes]
            while True:
                yield [next(part) for part in parts]
        except (UserError, OSError) as error:  # as an item: if raised, the loader would turn it into a traceback's text
            yield [error]

    def _iter_lane(self, lane: int) -> Iterator[LaneRows]:
        position = dict(self.cursors.get(lane, {}))
        token = position.pop("token", 0)
        rows = iter_rows(self.stream.documents(lane, position or None), self.sequence_length, token)
        while True:
            taken, cursors = zip(*itertools.islice(rows, self.num_rows), strict=True)
            yield LaneRows(lane, list(taken), cursors[-1])


class StreamLoader:
    """Endless micro-batches of this process's share of each global batch, on `device`.

    `accelerator.prepare` leaves it as it is: the lanes already split the batch over the processes. `cursors` say where
    each lane's next step begins, after the one whose micro-batches were handed out last.
    """

    def __init__(
        self, stream: TextStream, collate: Collator, plan: BatchPlan, *, rank: int, sequence_length: int,
        num_workers: int, device: torch.device, state: dict[str, Any] | None, samples_seen: int, seed: int,
    ) -> None:  # fmt: skip
        """Read the first step (all ranks call); `state` is an earlier `state()`, or None for the beginning.

        Raises `UserError` for a source that cannot be read, a lane without documents, or the state of another stream.
        """
        if state is not None and state["identity"] != stream.identity:
            raise UserError(
                "the stream differs from the checkpoint's: files were added, removed or changed in size, or this code "
                "reads them in another order; restore them, or start again with another --output"
            )
        self.identity, self.device, self.collate = stream.identity, device, collate
        self.plan, self.samples_seen, self.seed = plan, samples_seen, seed
        self.rows_per_lane = plan.global_batch_size // stream.num_lanes
        lanes = range(rank, stream.num_lanes, plan.data_parallel_size)
        self.cursors: dict[int, Cursor] = {lane: state["lanes"][lane] for lane in lanes} if state else {}
        num_workers = min(num_workers, len(lanes))
        dataset = _Lanes(stream, lanes, self.cursors, self.rows_per_lane, sequence_length)
        loader = DataLoader(
            dataset, batch_size=None, num_workers=num_workers, collate_fn=list, worker_init_fn=_start_worker,
            generator=torch.Generator(),  # else it draws from dropout's random numbers
        )  # fmt: skip
        steps = _iter_steps(iter(loader), num_workers)
        problems: list[str] = []
        # All ranks must know of an unreadable lane before the run claims its folder.
        try:
            self._steps = itertools.chain([next(steps)], steps)
        except (UserError, OSError) as error:
            problems = [str(error)]
        if problems := gather_object(problems):
            raise UserError(problems[0])

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        for step in self._steps:
            self.cursors = {part.lane: part.cursor for part in step}
            rows = [row for part in step for row in part.rows]
            # A row's draw is its number among all rows of the run, on any process.
            firsts = [self.samples_seen + part.lane * self.rows_per_lane for part in step]
            draws = [first + number for first in firsts for number in range(self.rows_per_lane)]
            for start in range(0, len(rows), self.plan.micro_batch):
                micro_batch = slice(start, start + self.plan.micro_batch)
                batch = {name: np.stack([row[name] for row in rows[micro_batch]]) for name in rows[0]}
                collated = self.collate(batch, RowGenerators(self.seed, draws[micro_batch]))
                tensors = {name: torch.from_numpy(values) for name, values in collated.items()}
                if self.device.type == "cuda":  # else the copy would wait for the device
                    tensors = {name: values.pin_memory() for name, values in tensors.items()}
                yield send_to_device(tensors, self.device, non_blocking=True)
            self.samples_seen += self.plan.global_batch_size

    def state(self) -> dict[str, Any]:
        """JSON: the cursors of the lanes of all processes (all ranks call)."""
        cursors = dict(gather_object(list(self.cursors.items())))
        return {"identity": self.identity, "lanes": [cursors[lane] for lane in sorted(cursors)]}


def _iter_steps(items: Iterator[list[LaneRows | Exception]], num_workers: int) -> Iterator[list[LaneRows]]:
    """The lanes of each step, in order, for any number of workers, which take turns with one item per step.

    It is no method of the loader, which would create a reference cycle: torch stops workers at once when their last
    reference goes, but takes 5 seconds for each if the garbage collector finds them.
    """
    while True:
        step: list[LaneRows] = []
        for part in itertools.chain(*itertools.islice(items, max(1, num_workers))):
            if isinstance(part, Exception):
                del items
                raise part
            step.append(part)
        yield sorted(step, key=lambda part: part.lane)


def describe_stream(state: dict[str, Any]) -> str:
    """A line on how far the lanes are and what they could not read."""
    epochs = sorted({cursor["epoch"] + 1 for cursor in state["lanes"]})
    line = f"stream: the lanes are in epoch {' to '.join(map(str, epochs[:: max(1, len(epochs) - 1)]))}"
    if broken := sum(cursor["broken"] for cursor in state["lanes"]):
        last = next(cursor["last_broken"] for cursor in state["lanes"] if cursor["broken"])
        line += f"; broken records skipped: {broken:,}, such as {last}"
    return line


def _start_worker(worker: int) -> None:
    ignore_signals(worker)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the workers are the parallelism
    fsspec.asyn.reset_lock()  # as datasets does for its workers: a fork with an open connection would hang
