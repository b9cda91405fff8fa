"""Documents that are never stored: read, shuffled, cleaned and encoded while a model trains on them.

Each lane of a stream (see `utils.batches.streaming`) reads its own share of every source, as a
`datasets.IterableDataset`: files of its own where there are enough of them to give all lanes about the same, else every
file, of which it takes the records whose number modulo the lanes is its own. What it reads it permutes block by block.
When all has been read, the lane's next epoch begins, in another order.
"""

import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import numpy as np

from utils.batches.batch_plan import permute
from utils.batches.streaming import EncodedDocument, Position
from utils.cli import UserError
from utils.text.cleaning import CleaningOptions, clean_documents
from utils.text.deduplication import digest, is_validation
from utils.text.inventory import describe_files
from utils.text.readers import Broken, Document, make_document
from utils.text.recipe import CleaningConfig, PrepareConfig, SourceConfig, resolve_sources
from utils.text.sources import iter_records, load_hub, load_saved, reading_units
from utils.text.stages import hash_json
from utils.text.tokenization import load_tokenizer

READ_RECORDS = 8  # at a time, from one source
OPEN_SOURCES = 8  # which a lane reads by turns
BLOCK_DOCUMENTS = 1000  # permuted at a time, or
BLOCK_CHARACTERS = 4 << 20  # every lane has one block in memory
ENCODED_DOCUMENTS = 64  # cleaned and encoded at a time, or
ENCODED_CHARACTERS = 1 << 20
UNEVEN = 1.1  # lanes get their own files if the largest share is at most this many times the smallest
TABLE_PARTS = 16  # per lane, of a table that can be read from anywhere


class TextStream:
    """The sources of a recipe as lanes of encoded documents: a `utils.batches.streaming.DocumentStream`."""

    def __init__(self, options: dict[str, Any], tokenizer: Path, num_lanes: int, seed: int) -> None:
        """`options` is a PrepareConfig as a manifest has it. `UserError` if a source is not there."""
        cleaning = CleaningConfig(**options["cleaning"])
        recipe = PrepareConfig(sources=options["sources"], text_column=options["text_column"], cleaning=cleaning)
        self.sources = [source for source in resolve_sources(recipe) if source.weight]
        self.cleaning = CleaningOptions(
            steps=tuple(cleaning.steps), languages=tuple(cleaning.languages),
            min_language_score=cleaning.min_language_score, min_characters=cleaning.min_characters,
            max_characters=cleaning.max_characters, licences=tuple(cleaning.licences),
            code_sources=frozenset(str(source.name) for source in self.sources if source.kind == "code"),
        )  # fmt: skip
        self.validation_fraction: float = options["validation_fraction"]
        self.tokenizer, self.num_lanes, self.seed = tokenizer, num_lanes, seed
        files = describe_files(self.sources, [], read_again=False, by_size_only=True)
        self.identity = hash_json([[file["source"], file["name"], file["content"]] for file in files])

    def documents(self, lane: int, position: Position | None) -> Iterator[EncodedDocument]:
        """The lane's training documents without end; `UserError` if there is none.

        A position is the lane's epoch, the number of its block, where the reader stood at the block's beginning (None:
        at the epoch's), and how many documents of the permuted block have been used. For a person, it also says how
        many broken records have been passed over so far, and which was the last.
        """
        at = position or {"epoch": 0, "block": 0, "document": 0, "reader": None, "broken": 0, "last_broken": None}
        epoch, first, broken, last_broken = at["epoch"], at["document"], at["broken"], at["last_broken"]
        shares = self._shares(lane)
        while True:
            reader_seed, seed = np.random.SeedSequence([self.seed, epoch, lane]).generate_state(2, np.uint64).tolist()
            reader = _EpochReader(shares, reader_seed, at["reader"])
            read, used = 0, at["reader"] is not None  # an epoch that goes on has had documents
            for number in itertools.count(at["block"]):
                start = reader.state()
                block = reader.read_block()
                if at["reader"] is None:  # those of the block in which a resume begins have been counted
                    broken, last_broken = broken + len(reader.broken), [last_broken, *reader.broken][-1]
                at["reader"] = None
                if not block:
                    break
                read += len(block)
                place = {"epoch": epoch, "block": number, "reader": start, "broken": broken, "last_broken": last_broken}
                order = permute(np.arange(len(block)), len(block), seed, number)
                for done, input_ids in self._encode(block, order, first):
                    yield EncodedDocument(input_ids, {**place, "document": done}, {**place, "document": done + 1})
                    used = True
                first = 0
            if not used:
                raise UserError(
                    f"data.stream_lanes {self.num_lanes}: lane {lane} has nothing to train on ({read} documents read, "
                    "the others broken, dropped or held out for validation); lower data.stream_lanes or give more text"
                )
            epoch, at = epoch + 1, {"block": 0, "reader": None}

    def _encode(self, block: list["_Text"], order: np.ndarray, first: int) -> Iterator[tuple[int, np.ndarray]]:
        """(its number in the order, input_ids) of each document to train on, from number `first` of the order on."""
        start = first
        while start < len(block):
            stop, characters = start, 0
            while stop < min(start + ENCODED_DOCUMENTS, len(block)) and characters < ENCODED_CHARACTERS:
                characters += len(block[order[stop]].text)
                stop += 1
            chosen = [block[index] for index in order[start:stop]]
            cleaned = clean_documents(
                {"text": [item.text for item in chosen], "source": [str(item.share.source.name) for item in chosen],
                 "id": [item.id for item in chosen]}, self.cleaning,
            )  # fmt: skip
            kept = [
                number
                for number, (text, reason) in enumerate(zip(cleaned["text"], cleaned["reason"], strict=True))
                if not reason and self._is_used(text, chosen[number].share)
            ]
            encoded = self._encoder([cleaned["text"][number] for number in kept])
            yield from zip((start + number for number in kept), encoded, strict=True)
            start = stop

    def _is_used(self, text: str, share: "_Share") -> bool:
        """Whether a cleaned text is for training, in this one of the passes that its source's weight asks for."""
        value = digest(text)
        if is_validation(value, self.validation_fraction):
            return False
        chance = np.float32(int.from_bytes(value[8:], "big") / 2**64)
        return share.again < math.floor(share.source.weight) + bool(chance < share.source.weight % 1)

    @cached_property
    def _encoder(self) -> Callable[[list[str]], list[np.ndarray]]:
        tokenizer = load_tokenizer(str(self.tokenizer))
        eos = tokenizer.eos_token_id

        def encode(texts):
            out = []
            for encoding in tokenizer.backend_tokenizer.encode_batch_fast(texts):
                ids = encoding.ids
                out.append(np.asarray(ids if len(ids) > 1 and ids[-1] == eos else [*ids, eos]))
            return out

        return encode

    @cached_property
    def _datasets(self) -> list[tuple[datasets.IterableDataset, list[int] | None]]:
        """Of each source, opened in the process that reads it: its records, and the bytes of its files or shards."""
        return [_open_source(source, self.num_lanes) for source in self.sources]

    def _shares(self, lane: int) -> list["_Share"]:
        """What the lane reads in an epoch: of each source its share, once for each pass that the weight asks for."""
        shares = []
        for source, (dataset, sizes) in zip(self.sources, self._datasets, strict=True):
            totals = [sum((sizes or [1] * dataset.num_shards)[index :: self.num_lanes]) for index in range(self.num_lanes)]
            divided = 0 < max(totals) <= UNEVEN * min(totals)
            for again in range(math.ceil(source.weight)):
                # A dataset holds one state, so that each share has a dataset of its own.
                part = dataset.shard(self.num_lanes, lane, contiguous=False) if divided else dataset.shard(1, 0)
                every, offset = (1, 0) if divided else (self.num_lanes, lane)
                size = max(1, sum(sizes) // self.num_lanes) if sizes else 0
                shares.append(_Share(source, part, every, offset, size, again))
        typical = max(share.size for share in shares) or 1
        return [replace(share, size=share.size or typical) for share in shares]


def _open_source(source: SourceConfig, num_lanes: int) -> tuple[datasets.IterableDataset, list[int] | None]:
    units = reading_units(source)
    if _is_table(source):
        table = load_hub(source) if units[0] is None else load_saved(units[0], source.split)
        total = table.dataset_size
        if isinstance(table, datasets.Dataset):
            table = table.to_iterable_dataset(num_shards=max(1, min(len(table), TABLE_PARTS * num_lanes)))
        return table, total and [total // table.num_shards] * table.num_shards
    # From large to small and back, so that the shares, every num_lanes-th file, are of about the same size.
    ordered = sorted(units, key=lambda path: path.stat().st_size, reverse=True)
    rounds = [ordered[start : start + num_lanes] for start in range(0, len(ordered), num_lanes)]
    ordered = [path for number, part in enumerate(rounds) for path in (reversed(part) if number % 2 else part)]
    sizes = [path.stat().st_size * (COMPRESSION if path.suffix.lower() in OPENERS else 1) for path in ordered]
    return datasets.IterableDataset.from_generator(_iter_rows, gen_kwargs={"source": source, "units": ordered}), sizes


def _is_table(source: SourceConfig) -> bool:
    return source.hub is not None or is_saved_dataset(Path(str(source.path)))


def _iter_rows(source: SourceConfig, units: list[Path]) -> Iterator[dict[str, str]]:
    for record in iter_records(source, units):
        if not isinstance(record, Skipped):
            yield {"id": record.id, "text": "", "why": "", **record._asdict()}


def _make_record(row: dict[str, Any], share: "_Share") -> Document | Broken:
    if _is_table(share.source):
        ...
    return Broken(row["id"], row["why"]) if row["why"] else Document(row["text"], row["id"])


@dataclass
class _Share:
    """What a lane reads of a source in one of the passes of an epoch."""

    source: SourceConfig
    dataset: datasets.IterableDataset
    every: int
    """Of the records, those whose number modulo this is `offset` are the lane's own."""
    offset: int
    size: int
    """About how many bytes they are."""
    again: int
    """Number of the pass: documents with a weight of 1 are used in pass 0 only."""


class _Text(NamedTuple):
    text: str
    id: str
    share: _Share


@dataclass
class _Open:
    """A share that is being read."""

    number: int
    share: _Share
    batches: Iterator[dict[str, list]]
    records: int
    characters: int
    position: dict[str, Any] | None
    """`dataset.state_dict()` after the last read; None before the first."""


class _EpochReader:
    """Reads the shares of a lane once, several by turns, so that every part of an epoch has something of all sources.

    Which one is read next is drawn by how much of each is left.
    """

    def __init__(self, shares: list[_Share], seed: int, state: dict[str, Any] | None) -> None:
        """`state` is an earlier `state()` with the same shares and seed; None: the epoch's beginning."""
        self.shares, self.seed = shares, seed
        self.order = permute(np.arange(len(shares)), len(shares), seed, 0).tolist()
        state = state or {"begun": 0, "draws": 0, "open": []}
        self.begun, self.draws = state["begun"], state["draws"]
        self.open = [self._open(*saved) for saved in state["open"]]
        self.broken: list[str] = []

    def _open(self, number: int, records: int, characters: int, position: dict[str, Any] | None) -> _Open:
        share = self.shares[number]
        share.dataset.set_epoch(self.seed % 2**31)  # by which it permutes its files or shards
        share.dataset.load_state_dict(position)
        # Not `iter(dataset)`, which in a loader's worker yields a part only, cut by the number of workers.
        return _Open(number, share, share.dataset.iter(READ_RECORDS), records, characters, position)

    def state(self) -> dict[str, Any]:
        """JSON: where to go on."""
        places = [[item.number, item.records, item.characters, item.position] for item in self.open]
        return {"begun": self.begun, "draws": self.draws, "open": places}

    def read_block(self) -> list[_Text]:
        """The documents of the next block, none at the epoch's end; `broken` says which records were passed over."""
        block: list[_Text] = []
        self.broken = []
        characters = 0
        while len(block) < BLOCK_DOCUMENTS and characters < BLOCK_CHARACTERS:
            while len(self.open) < OPEN_SOURCES and self.begun < len(self.order):
                self.open.append(self._open(self.order[self.begun], 0, 0, None))
                self.begun += 1
            if not self.open:
                break
            texts = self._read(self._draw())
            block += texts
            characters += sum(len(item.text) for item in texts)
        return block

    def _draw(self) -> _Open:
        left = np.array([max(item.share.size - item.characters, item.share.size / 10) for item in self.open])
        chance = np.random.SeedSequence([self.seed, self.draws]).generate_state(1)[0] / 2**32
        self.draws += 1
        return self.open[int(np.searchsorted(left.cumsum(), chance * left.sum(), side="right"))]

    def _read(self, item: _Open) -> list[_Text]:
        """The lane's own documents among the next few records."""
        batch = next(item.batches, None)
        if batch is None:
            self.open.remove(item)
            return []
        item.position = item.share.dataset.state_dict()  # exact, as datasets neither shuffles nor shares out the records
        texts = []
        for values in zip(*batch.values(), strict=True):
            own = item.records % item.share.every == item.share.offset
            item.records += 1
            if not own:
                continue
            record = _make_record(dict(zip(batch, values, strict=True)), item.share)
            if isinstance(record, Document):
                texts.append(_Text(record.text, record.id, item.share))
                item.characters += len(record.text)
            else:
                self.broken.append(f"{record.id}: {record.why}")
        return texts
