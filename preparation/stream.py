"""Documents that are never stored: read, shuffled, cleaned and encoded while a model trains on them.

A stream has a fixed number of lanes (see `training.stream_loader`). Each lane reads its share of the sources in blocks,
and permutes each block. When it has read everything, its next epoch begins, in another order.

A source is a `datasets.IterableDataset`. Lanes share its files or shards if that gives all lanes about the same amount
of text. Otherwise every lane reads all of it, and takes the records whose number modulo the number of lanes is its own.
"""

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import numpy as np
from numpy.random import SeedSequence

from preparation.cleaning.steps import clean_documents
from preparation.recipe import CleaningConfig, PrepareConfig, SourceConfig, resolve_sources
from preparation.selection.duplicates import digest_documents
from preparation.selection.splits import count_uses, draw_chance, is_held_out
from preparation.sources.documents import OPENERS, Broken, Document, Skipped, iter_records, load_table, make_document
from preparation.sources.files import describe_files, find_all, is_saved_dataset
from preparation.stages import hash_json, iter_slices
from preparation.tokenizer.build import load_tokenizer
from preparation.tokenizer.encoding import Encoder, build_encoder
from utils.cli import UserError
from utils.data.order import permute
from utils.data.token_dataset import open_split

# These decide the order of the documents, so they are part of the stream's identity.
READ_RECORDS = 8  # read at a time from one source
OPEN_SOURCES = 8  # that a lane alternates between
BLOCK_DOCUMENTS = 1000  # or
BLOCK_CHARACTERS = 4 << 20  # every lane holds one block in memory
UNEVEN = 1.1  # a source is divided if the largest share is at most this many times the smallest
COMPRESSION = 4  # rough ratio of the size of text to that of its compressed file
TABLE_PARTS = 16  # per lane, of a table with random access

ENCODED_DOCUMENTS = 64  # cleaned and encoded at a time, or
ENCODED_CHARACTERS = 1 << 17
SAMPLE_DOCUMENTS, SAMPLE_TOKENS = 300, 5_000  # to test the encoder on

# A place in a lane, as JSON: the epoch, the number of the block, the state of the EpochReader at the beginning of the
# block (None at the beginning of the epoch), how many documents of the permuted block are done; how many
# records have been read and how many broken ones skipped so far, and the last one; the files lost in this epoch.
Position = dict[str, Any]
BEGINNING: Position = {
    "epoch": 0, "block": 0, "document": 0, "reader": None, "read": 0, "broken": 0, "last_broken": None, "lost_files": 0
}  # fmt: skip
CHECKED_RECORDS = 1000  # before which a lane does not judge the share of broken ones


class EncodedDocument(NamedTuple):
    input_ids: np.ndarray  # (n,) with n ≥ 1
    here: Position  # from which `documents` begins with this document
    after: Position  # from which it begins with the next one


class TextStream:
    """The sources of a recipe as lanes of encoded documents, for `training.stream_loader.StreamLoader`.

    It is sent to the loader's workers, so it opens nothing before `documents` is called. `identity` changes with the
    documents or their order; a position is valid only in a stream of the same identity.
    """

    def __init__(self, options: dict[str, Any], dataset: Path, num_lanes: int, seed: int) -> None:
        """`options` is the PrepareConfig in the manifest of the folder `dataset`, which also holds the tokenizer.
        `UserError` if a source does not exist."""
        self.cleaning = CleaningConfig(**options["cleaning"])
        recipe = PrepareConfig(sources=options["sources"], text_column=options["text_column"])
        self.sources = [source for source in resolve_sources(recipe) if source.weight]
        self.code_sources = {str(source.name) for source in self.sources if source.kind == "code"}
        # Datasets of earlier versions, whose options lack it, were encoded with true.
        self.parse_special_tokens: bool = options["tokenizer"].get("parse_special_tokens", True)
        self.validation_fraction: float = options["validation_fraction"]
        self.max_broken_share: float = options.get("max_broken_share", recipe.max_broken_share)
        self.dataset, self.num_lanes, self.seed = dataset, num_lanes, seed
        self.files = describe_files(self.sources, find_all(self.sources), [], read_again=False, by_size_only=True)
        contents = [[file["source"], file["name"], file["content"]] for file in self.files]
        order = [READ_RECORDS, OPEN_SOURCES, BLOCK_DOCUMENTS, BLOCK_CHARACTERS, UNEVEN, COMPRESSION, TABLE_PARTS]
        self.identity = hash_json(contents, order)

    def documents(self, lane: int, position: Position | None) -> Iterator[EncodedDocument]:
        """The lane's training documents without end, from a position or the beginning; `UserError` if it has none, or
        if more of what it reads is broken or lost than the recipe's `max_broken_share`."""
        at: Position = BEGINNING | (position or {})
        while True:
            epoch, resumed = at["epoch"], at["reader"] is not None
            lane_seed, block_seed = SeedSequence([self.seed, epoch, lane]).generate_state(2, np.uint64).tolist()
            epoch_seed = int(SeedSequence([self.seed, epoch]).generate_state(1)[0] >> 1)
            reader = EpochReader(self._opened, lane, self.num_lanes, epoch_seed, lane_seed, at["reader"])
            read, used = 0, resumed
            for number in itertools.count(at["block"]):
                start = reader.state()
                block = reader.read_block()
                if not resumed:  # otherwise they are already counted
                    at["read"] += len(block)
                    at["broken"] += len(reader.broken)
                    at["lost_files"] += reader.lost_files
                    at["last_broken"] = reader.broken[-1] if reader.broken else at["last_broken"]
                resumed = False
                self._check_broken(at, reader.files)
                if not block:
                    break
                read += len(block)
                place = at | {"block": number, "reader": start}
                order = permute(np.arange(len(block)), len(block), block_seed, number)
                for done, input_ids in self._encode([block[index] for index in order], at["document"]):
                    used = True
                    yield EncodedDocument(input_ids, place | {"document": done}, place | {"document": done + 1})
                at["document"] = 0
            if not used:
                reason = f"its {read} documents are all dropped or held out" if read else "no document is left"
                problem = f"lane {lane} has nothing to train on ({reason}); use fewer lanes, or more text"
                raise UserError(f"data.stream_lanes {self.num_lanes}: {problem}")
            at |= {"epoch": epoch + 1, "block": 0, "reader": None, "lost_files": 0}

    def _check_broken(self, at: Position, files: float) -> None:
        """`files` is the number that the lane reads in an epoch. Three standard deviations above the share are allowed,
        as a lane sees a part of the records, and the head of each source is checked during preparation."""
        share, records = self.max_broken_share, at["read"] + at["broken"]
        limit = share * records
        if (records >= CHECKED_RECORDS and at["broken"] > limit + 3 * limit**0.5) or at["lost_files"] > share * files:
            raise UserError(
                f"{at['last_broken']}; {at['broken']:,} of {records:,} records and {at['lost_files']:,} of about "
                f"{files:,.0f} files are broken, more than max_broken_share {share:g} allows; repair or remove the "
                "files, or prepare the dataset again with a larger max_broken_share"
            )

    def _encode(self, block: list["Taken"], first: int) -> Iterator[tuple[int, np.ndarray]]:
        """(number in the block, input_ids) of each document to train on, beginning with number `first`."""
        characters = np.array([len(taken.document.text) for taken in block[first:]])
        for start, stop in iter_slices(characters, ENCODED_CHARACTERS, ENCODED_DOCUMENTS):
            part = block[first + start : first + stop]
            texts, ids = zip(*((taken.document.text, taken.document.id) for taken in part), strict=True)
            batch = {"text": list(texts), "id": list(ids), "source": [taken.source.name for taken in part]}
            cleaned = clean_documents(batch, self.cleaning, self.code_sources)
            kept = [number for number, reason in enumerate(cleaned["reason"]) if not reason]
            digests = digest_documents([cleaned["text"][number] for number in kept])
            uses = count_uses(np.array([part[number].source.weight for number in kept]), draw_chance(digests))
            uses[is_held_out(digests, self.validation_fraction)] = 0
            used = [number for number, times in zip(kept, uses, strict=True) if part[number].again < times]
            if used:
                input_ids, offsets = self._encoder([cleaned["text"][number] for number in used])
                for number, document in zip(used, np.split(input_ids, offsets[1:-1]), strict=True):
                    yield first + start + number, document

    @cached_property
    def _encoder(self) -> Encoder:
        tokenizer = load_tokenizer(str(self.dataset / "tokenizer"))
        tokens = open_split(self.dataset, "validation")  # the same sample for all lanes, so that they decide alike
        pairs = itertools.pairwise(tokens.offsets[: SAMPLE_DOCUMENTS + 1].tolist())
        documents = [tokens.read(start, min(stop, start + SAMPLE_TOKENS)) for start, stop in pairs]
        sample = tokenizer.batch_decode(documents, skip_special_tokens=True)
        return build_encoder(tokenizer, sample, parse_special_tokens=self.parse_special_tokens)

    @cached_property
    def _opened(self) -> list["OpenedSource"]:  # opened in the process that reads them
        return [open_source(source, self.files, self.num_lanes) for source in self.sources]


class OpenedSource(NamedTuple):
    config: SourceConfig
    dataset: datasets.IterableDataset  # rows of a table, or {"record": Document | Broken} from files
    is_table: bool
    is_divided: bool
    bytes: int  # approximate, which decides the order of reading; 0 if unknown
    files: int


def open_source(config: SourceConfig, files: list[dict[str, Any]], num_lanes: int) -> OpenedSource:
    """`files` are the records of `describe_files`; `UserError` if a table cannot be opened."""
    is_table = config.hub is not None or is_saved_dataset(Path(str(config.path)))
    if is_table:
        table = load_table(config)
        total = table.dataset_size or 0
        if isinstance(table, datasets.Dataset):
            table = table.to_iterable_dataset(num_shards=max(1, min(len(table), TABLE_PARTS * num_lanes)))
        sizes = [1] * table.num_shards
        files = []
    else:
        # From large to small and back, so that the shares, every num_lanes-th file, have about the same size.
        files = [file for file in files if file["source"] == config.name]
        pairs = sorted(((file["bytes"], file["path"]) for file in files), reverse=True)
        rounds = [pairs[start : start + num_lanes] for start in range(0, len(pairs), num_lanes)]
        pairs = [pair for number, part in enumerate(rounds) for pair in (reversed(part) if number % 2 else part)]
        sizes = [size * (COMPRESSION if Path(path).suffix.lower() in OPENERS else 1) for size, path in pairs]
        total = sum(sizes)
        paths = [path for _, path in pairs]
        table = datasets.IterableDataset.from_generator(_iter_rows, gen_kwargs={"source": config, "paths": paths})
    shares = [sum(sizes[lane::num_lanes]) for lane in range(num_lanes)]
    return OpenedSource(config, table, is_table, 0 < max(shares) <= UNEVEN * min(shares), total, len(files))


def _iter_rows(source: SourceConfig, paths: list[str]) -> Iterator[dict[str, Any]]:
    records = iter_records(source, map(Path, paths))
    yield from ({"record": record} for record in records if not isinstance(record, Skipped))


class Taken(NamedTuple):
    document: Document
    source: SourceConfig
    again: int  # how often this epoch has read the source before; documents of weight 1 are used only when it is 0


@dataclass
class _Reading:
    """A source that is being read."""

    number: int
    again: int
    dataset: datasets.IterableDataset
    batches: Iterator[dict[str, list]]
    position: dict[str, Any] | None  # `dataset.state_dict()` after the last batch; None before the first
    records: int
    characters: int


class EpochReader:
    """Reads a lane's shares of the sources once, or as often as a source's weight requires. The next source to read is
    drawn in proportion to how much of each is left, so every part of an epoch mixes them."""

    def __init__(
        self, sources: list[OpenedSource], lane: int, num_lanes: int, epoch_seed: int, lane_seed: int, state: Any
    ) -> None:
        """`state` is an earlier `state()` with the same sources and seeds; None is the beginning of the epoch.
        `epoch_seed` (31 bits) orders files and shards; all lanes share it, as lanes may count the same records."""
        self.sources, self.lane, self.num_lanes = sources, lane, num_lanes
        self.epoch_seed, self.lane_seed = epoch_seed, lane_seed
        self.broken: list[str] = []
        self.lost_files = 0
        self.files = sum(source.files / (num_lanes if source.is_divided else 1) for source in sources)
        self._order = permute(np.arange(len(sources)), len(sources), lane_seed, 0).tolist()
        typical = max(source.bytes for source in sources) or 1
        self._sizes = [(source.bytes or typical) * math.ceil(source.config.weight) / num_lanes for source in sources]
        state = state or {"begun": 0, "draws": 0, "reading": []}
        self._begun, self._draws = state["begun"], state["draws"]
        self._reading = [self._begin(*saved) for saved in state["reading"]]

    def _begin(
        self, number: int, again: int = 0, records: int = 0, characters: int = 0, position: Any = None
    ) -> _Reading:
        source = self.sources[number]
        share = (self.num_lanes, self.lane) if source.is_divided else (1, 0)
        dataset = source.dataset.shard(*share, contiguous=False)  # always a copy, as an IterableDataset has one state
        dataset.set_epoch((self.epoch_seed + again) % 2**31)  # this orders its files or shards
        dataset.load_state_dict(position)
        # Not `iter(dataset)`, which yields only a part in a loader's worker, by the number of workers.
        return _Reading(number, again, dataset, dataset.iter(READ_RECORDS), position, records, characters)

    def state(self) -> dict[str, Any]:
        """JSON: where to continue. Exact, because `datasets` neither shuffles the records nor divides them."""
        reading = [[item.number, item.again, item.records, item.characters, item.position] for item in self._reading]
        return {"begun": self._begun, "draws": self._draws, "reading": reading}

    def read_block(self) -> list[Taken]:
        """The documents of the next block, none at the end of the epoch; `broken` lists the skipped records."""
        block: list[Taken] = []
        self.broken, self.lost_files = [], 0
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
        chance = SeedSequence([self.lane_seed, self._draws]).generate_state(1)[0] / 2**32
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
                self.lost_files += isinstance(record, Broken) and record.is_file
        return found
