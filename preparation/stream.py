"""Documents that are never stored: read, shuffled, cleaned and encoded while a model trains on them.

Each lane of a stream (see `training.stream_loader`) reads its share of the sources in blocks, and permutes each block.
When all has been read, the lane's next epoch begins, in another order.
"""

import itertools
import math
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from preparation.cleaning.cleaning import CleaningOptions, clean_documents
from preparation.lane_reader import EpochReader, OpenedSource, Taken, open_source, order_options
from preparation.recipe import CleaningConfig, PrepareConfig, resolve_sources
from preparation.selection.deduplication import digest, is_validation
from preparation.sources.inventory import describe_files
from preparation.stages import hash_json
from preparation.tokenizer.encoding import Encoder, build_encoder
from preparation.tokenizer.tokenization import load_tokenizer
from training.stream_loader import EncodedDocument, Position
from utils.cli import UserError
from utils.data.order import permute
from utils.data.token_dataset import open_split

ENCODED_DOCUMENTS = 64  # cleaned and encoded at a time, or
ENCODED_CHARACTERS = 1 << 17
SAMPLE_DOCUMENTS, SAMPLE_TOKENS = 300, 5_000  # on which the encoder is tried
BEGINNING = {"epoch": 0, "block": 0, "document": 0, "reader": None, "broken": 0, "last_broken": None}


class TextStream:
    """The sources of a recipe as lanes of encoded documents: a `training.stream_loader.DocumentStream`."""

    def __init__(self, options: dict[str, Any], dataset: Path, num_lanes: int, seed: int) -> None:
        """`options` is a PrepareConfig as the manifest of the folder `dataset` has it; the tokenizer is there too.

        `UserError` if a source is not there.
        """
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
        self.dataset, self.num_lanes, self.seed = dataset, num_lanes, seed
        self.files = describe_files(self.sources, [], read_again=False, by_size_only=True)
        contents = [[file["source"], file["name"], file["content"]] for file in self.files]
        self.identity = hash_json(contents, order_options())

    def documents(self, lane: int, position: Position | None) -> Iterator[EncodedDocument]:
        """The lane's training documents without end; `UserError` if there is none.

        A position is the lane's epoch, the number of its block, where the reader stood at the block's beginning (None:
        at the epoch's), and how many documents of the permuted block are done with. For a person, it also says how many
        broken records have been passed over so far, and which was the last.
        """
        at: Position = dict(position or BEGINNING)
        while True:
            epoch, resumed = at["epoch"], at["reader"] is not None
            lane_seed, block_seed = (
                np.random.SeedSequence([self.seed, epoch, lane]).generate_state(2, np.uint64).tolist()
            )
            epoch_seed = int(np.random.SeedSequence([self.seed, epoch]).generate_state(1)[0] >> 1)
            reader = EpochReader(
                self._opened, lane, self.num_lanes, epoch_seed=epoch_seed, lane_seed=lane_seed, state=at["reader"]
            )
            read, used = 0, resumed
            for number in itertools.count(at["block"]):
                start = reader.state()
                block = reader.read_block()
                if not resumed:  # else these have been counted
                    at["broken"] += len(reader.broken)
                    at["last_broken"] = reader.broken[-1] if reader.broken else at["last_broken"]
                resumed = False
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
                why = (
                    f"its {read} documents are all dropped or held out for validation"
                    if read
                    else "no document is left"
                )
                raise UserError(
                    f"data.stream_lanes {self.num_lanes}: lane {lane} has nothing to train on ({why}); lower "
                    "data.stream_lanes, or give more text"
                )
            at |= {"epoch": epoch + 1, "block": 0, "reader": None}

    def _encode(self, block: list[Taken], first: int) -> Iterator[tuple[int, np.ndarray]]:
        """(number in the block, input_ids) of each document to train on, from number `first` on."""
        start = first
        while start < len(block):
            stop, characters = start, 0
            while stop < min(start + ENCODED_DOCUMENTS, len(block)) and characters < ENCODED_CHARACTERS:
                characters += len(block[stop].document.text)
                stop += 1
            part = block[start:stop]
            cleaned = clean_documents(
                {
                    "text": [taken.document.text for taken in part],
                    "source": [taken.source.name for taken in part],
                    "id": [taken.document.id for taken in part],
                },
                self.cleaning,
            )
            used = [
                number
                for number, reason in enumerate(cleaned["reason"])
                if not reason and self._is_used(cleaned["text"][number], part[number])
            ]
            if used:
                input_ids, offsets = self._encoder([cleaned["text"][number] for number in used])
                yield from zip((start + number for number in used), np.split(input_ids, offsets[1:-1]), strict=True)
            start = stop

    def _is_used(self, text: str, taken: Taken) -> bool:
        """Whether a cleaned text is for training, and this time again if the epoch reads its source several times."""
        value = digest(text)
        chance = np.float32(int.from_bytes(value[8:], "big") / 2**64)
        times = math.floor(taken.source.weight) + bool(chance < taken.source.weight % 1)
        return taken.again < times and not is_validation(value, self.validation_fraction)

    @cached_property
    def _encoder(self) -> Encoder:
        tokenizer = load_tokenizer(str(self.dataset / "tokenizer"))
        tokens = open_split(self.dataset, "validation")  # always the same sample, so that all lanes decide alike
        pairs = itertools.pairwise(tokens.offsets[: SAMPLE_DOCUMENTS + 1].tolist())
        documents = [tokens.read(start, min(stop, start + SAMPLE_TOKENS)) for start, stop in pairs]
        return build_encoder(tokenizer, tokenizer.batch_decode(documents, skip_special_tokens=True))

    @cached_property
    def _opened(self) -> list[OpenedSource]:  # in the process that reads them
        return [
            open_source(source, [file for file in self.files if file["source"] == source.name], self.num_lanes)
            for source in self.sources
        ]
