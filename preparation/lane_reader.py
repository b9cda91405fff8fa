"""How a lane of a stream reads its sources: its own share of each, several sources by turns, in blocks.

A source is a `datasets.IterableDataset`. It is divided by its files or shards where these give all lanes about the same;
else every lane reads all of it and takes the records whose number modulo the lanes is its own.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import numpy as np

from preparation.sources.readers import Document, Skipped, make_document
from preparation.sources.source_config import SourceConfig
from preparation.sources.sources import OPENERS, is_saved_dataset, iter_records
from preparation.sources.tables import load_hub, load_saved
from utils.data.order import permute

READ_RECORDS = 8  # at a time, from one source
OPEN_SOURCES = 8  # that a lane reads by turns
BLOCK_DOCUMENTS = 1000  # or
BLOCK_CHARACTERS = 4 << 20  # every lane has one block in memory
UNEVEN = 1.1  # a source is divided if the largest share is at most this many times the smallest
COMPRESSION = 4  # text by the size of its compressed file, roughly
TABLE_PARTS = 16  # per lane, of a table that can be read from anywhere


def order_options() -> list[float]:
    """The numbers above: a position that was reached with others would be that of another document."""
    return [
        READ_RECORDS, OPEN_SOURCES, BLOCK_DOCUMENTS, BLOCK_CHARACTERS, UNEVEN, COMPRESSION, TABLE_PARTS
    ]  # fmt: skip


@dataclass
class OpenedSource:
    config: SourceConfig
    dataset: datasets.IterableDataset
    """Rows of a table, or {"record": Document | Broken} from files."""
    is_table: bool
    is_divided: bool
    bytes: int
    """How much it is, roughly, for the order in which sources are read; 0 if that is not known."""


def open_source(config: SourceConfig, files: list[dict[str, Any]], num_lanes: int) -> OpenedSource:
    """`files` are the source's as `describe_files` has them; `UserError` if a table cannot be opened."""
    is_table = config.hub is not None or is_saved_dataset(Path(str(config.path)))
    if is_table:
        table = load_hub(config) if config.hub is not None else load_saved(Path(str(config.path)), config.split)
        total = table.dataset_size or 0
        if isinstance(table, datasets.Dataset):
            table = table.to_iterable_dataset(num_shards=max(1, min(len(table), TABLE_PARTS * num_lanes)))
        sizes = [1] * table.num_shards
    else:
        # From large to small and back, so that the shares, every num_lanes-th file, are of about the same size.
        pairs = sorted(((file["bytes"], file["path"]) for file in files), reverse=True)
        rounds = [pairs[start : start + num_lanes] for start in range(0, len(pairs), num_lanes)]
        pairs = [pair for number, part in enumerate(rounds) for pair in (reversed(part) if number % 2 else part)]
        sizes = [size * (COMPRESSION if Path(path).suffix.lower() in OPENERS else 1) for size, path in pairs]
        total = sum(sizes)
        options = {"source": config, "paths": [path for _, path in pairs]}
        table = datasets.IterableDataset.from_generator(_iter_rows, gen_kwargs=options)
    shares = [sum(sizes[lane::num_lanes]) for lane in range(num_lanes)]
    return OpenedSource(config, table, is_table, 0 < max(shares) <= UNEVEN * min(shares), total)


def _iter_rows(source: SourceConfig, paths: list[str]) -> Iterator[dict[str, Any]]:
    for record in iter_records(source, map(Path, paths)):
        if not isinstance(record, Skipped):
            yield {"record": record}


class Taken(NamedTuple):
    """A document of the lane."""

    document: Document
    source: SourceConfig
    again: int
    """How often the epoch has read the source before: documents of weight 1 are used when this is 0."""


@dataclass
class _Reading:
    """A source that is being read."""

    number: int
    again: int
    dataset: datasets.IterableDataset
    batches: Iterator[dict[str, list]]
    position: dict[str, Any] | None
    """`dataset.state_dict()` after the last batch; None before the first."""
    records: int
    characters: int


class EpochReader:
    """Reads a lane's shares of the sources once, or as often as a source's weight asks for.

    Which source is read next is drawn by how much of each is left, so that every part of an epoch has something of all.
    """

    def __init__(
        self, sources: list[OpenedSource], lane: int, num_lanes: int, *, epoch_seed: int, lane_seed: int,
        state: dict[str, Any] | None,
    ) -> None:  # fmt: skip
        """`state` is an earlier `state()` with the same sources and seeds; None: the epoch's beginning.

        `epoch_seed` (31 bits) orders files and shards: alike in all lanes, as these may number the same records.
        """
        self.sources, self.lane, self.num_lanes = sources, lane, num_lanes
        self.epoch_seed, self.lane_seed = epoch_seed, lane_seed
        self.broken: list[str] = []
        self._order = permute(np.arange(len(sources)), len(sources), lane_seed, 0).tolist()
        typical = max(source.bytes for source in sources) or 1
        self._sizes = [(source.bytes or typical) * math.ceil(source.config.weight) / num_lanes for source in sources]
        state = state or {"begun": 0, "draws": 0, "reading": []}
        self._begun, self._draws = state["begun"], state["draws"]
        self._reading = [self._begin(*saved) for saved in state["reading"]]

    def _begin(
        self, number: int, again: int = 0, records: int = 0, characters: int = 0, position: dict[str, Any] | None = None
    ) -> _Reading:
        source = self.sources[number]
        if source.is_divided:
            dataset = source.dataset.shard(self.num_lanes, self.lane, contiguous=False)
        else:
            dataset = source.dataset.shard(1, 0)  # all of it; a copy, as an IterableDataset holds one state
        dataset.set_epoch((self.epoch_seed + again) % 2**31)  # by which it orders its files or shards
        dataset.load_state_dict(position)
        # Not `iter(dataset)`, which in a loader's worker yields a part only, cut by the number of workers.
        return _Reading(number, again, dataset, dataset.iter(READ_RECORDS), position, records, characters)

    def state(self) -> dict[str, Any]:
        """JSON: where to go on. Exact, as `datasets` is asked neither to shuffle records nor to share them out."""
        reading = [[item.number, item.again, item.records, item.characters, item.position] for item in self._reading]
        return {"begun": self._begun, "draws": self._draws, "reading": reading}

    def read_block(self) -> list[Taken]:
        """The documents of the next block, none at the epoch's end; `broken` has the records that were passed over."""
        block: list[Taken] = []
        self.broken = []
        characters = 0
        while len(block) < BLOCK_DOCUMENTS and characters < BLOCK_CHARACTERS:
            while len(self._reading) < OPEN_SOURCES and self._begun < len(self._order):
                self._reading.append(self._begin(self._order[self._begun]))
                self._begun += 1
            if not self._reading:
                break
            documents = self._read(self._draw())
            block += documents
            characters += sum(len(taken.document.text) for taken in documents)
        return block

    def _draw(self) -> int:
        if len(self._reading) == 1:
            return 0
        sizes = [self._sizes[item.number] for item in self._reading]
        left = [max(size - item.characters, size / 10) for size, item in zip(sizes, self._reading, strict=True)]
        chance = np.random.SeedSequence([self.lane_seed, self._draws]).generate_state(1)[0] / 2**32
        self._draws += 1
        return int(np.searchsorted(np.cumsum(left), chance * sum(left), side="right"))

    def _read(self, index: int) -> list[Taken]:
        """The lane's own documents among the next few records of a source."""
        item = self._reading[index]
        source = self.sources[item.number]
        batch = next(item.batches, None)
        if batch is None:
            del self._reading[index]
            if item.again + 1 < math.ceil(source.config.weight):
                self._reading.append(self._begin(item.number, item.again + 1, 0, item.characters))
            return []
        item.position = item.dataset.state_dict()
        found = []
        for values in zip(*batch.values(), strict=True):
            own = source.is_divided or item.records % self.num_lanes == self.lane
            item.records += 1
            if not own:
                continue
            row = dict(zip(batch, values, strict=True))
            if source.is_table:
                record = make_document(row, str(source.config.name), item.records, "record", source.config)
            else:
                record = row["record"]
            if isinstance(record, Document):
                found.append(Taken(record, source.config, item.again))
                item.characters += len(record.text)
            else:
                self.broken.append(f"{record.file}, {record.why}")
        return found
