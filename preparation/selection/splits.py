"""Which documents are kept, and for which split: exact and near duplicates, the held-out share, contamination."""

import functools
import itertools
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute

from preparation.recipe import DeduplicationConfig
from preparation.selection.duplicates import build_index, find_contaminated, find_near_duplicates, first_of_each
from preparation.sources.conversations import without_system
from preparation.stages import iter_slices

EXACT, SAME_WORDS = "exact duplicate", "equal but for case and punctuation"
NEAR, CONTAMINATED = "near duplicate", "holds evaluation text"


@dataclass
class Selection:
    """The decision about each of N documents."""

    reasons: list[str]  # the meaning of each `code`; the first is "", for a document that is kept
    code: np.ndarray  # (N,) int16: why the document was dropped
    validation: np.ndarray  # (N,) bool: held out; False for dropped documents
    cluster: np.ndarray  # (N,) int64: the document that stands for its near-duplicate cluster; itself if it has none
    source: np.ndarray  # (N,) int16: number of the document's source
    chance: np.ndarray  # (N,) float32 in [0, 1): a hash of the text, for fractional weights

    def save(self, folder: Path) -> None:
        np.savez(folder / "selection.npz", **{**vars(self), "reasons": np.array(self.reasons)})

    @classmethod
    def load(cls, folder: Path) -> "Selection":
        with np.load(folder / "selection.npz") as arrays:
            return cls(**{**arrays, "reasons": arrays["reasons"].tolist()})

    @property
    def train(self) -> np.ndarray:
        """(N,) bool: kept and not held out."""
        return (self.code == 0) & ~self.validation

    def count(self) -> dict[str, int]:
        """Number of dropped documents by reason, the most frequent first."""
        counts = np.bincount(self.code, minlength=len(self.reasons))
        order = np.argsort(-counts, kind="stable")
        return {self.reasons[code]: int(counts[code]) for code in order if code and counts[code]}


def select_documents(
    cleaned: datasets.Dataset, sketches: datasets.Dataset, lengths: np.ndarray, sources: list[str],
    config: DeduplicationConfig, validation_fraction: float, evaluation_texts: Iterable[list[str]],
    map_texts: Callable[[np.ndarray, Callable[[list[str]], list[int]]], np.ndarray],
) -> Selection:  # fmt: skip
    """Decide about every document. Takes about 100 bytes of memory per document, plus the index of evaluation text.

    `cleaned` has the columns text, source and reason; `sketches` exact, digest (16 × uint8) and, for near duplicates,
    signature. With pictures, sounds or groups, `sketches` also has split (16 × uint8), which decides the split in place
    of digest, and has_media: documents with media are no near duplicates and are not searched for evaluation text,
    because equal texts do not make them alike. `lengths` (N,) are the bytes of each text; the longest of several near
    duplicates is kept. Training documents must not contain `evaluation_texts` (batches) or the validation split.
    `map_texts` applies a function to the texts of documents, given by their numbers (n,), and returns (n,) int64.
    """
    found, numbers = _encode_dictionary(cleaned.data.column("reason"))
    reasons = ["", *sorted(reason for reason in found if reason), EXACT, SAME_WORDS, NEAR, CONTAMINATED]
    code = np.array([reasons.index(reason) for reason in found], np.int16)[numbers]
    names, numbers = _encode_dictionary(cleaned.data.column("source"))
    source = np.array([sources.index(name) for name in names], np.int16)[numbers]

    for column, reason in (("exact", EXACT), ("digest", SAME_WORDS)):
        digests = np.concatenate(list(fixed_size_chunks(sketches, column)))
        if reason == EXACT or config.ignore_case_and_punctuation:
            kept = np.flatnonzero(code == 0)
            code[kept[~first_of_each(digests[kept])]] = reasons.index(reason)

    text_only = np.ones(len(code), bool)
    held_out_by = digests
    if "split" in sketches.column_names:
        text_only = ~sketches.data.column("has_media").to_numpy()
        held_out_by = np.concatenate(list(fixed_size_chunks(sketches, "split")))
    cluster = np.arange(len(code))
    if config.near_threshold is not None:
        signatures = list(fixed_size_chunks(sketches, "signature"))
        cluster = find_near_duplicates(signatures, lengths, (code == 0) & text_only, config.near_threshold)
        code[(code == 0) & (cluster != np.arange(len(code)))] = reasons.index(NEAR)

    validation = (code == 0) & is_held_out(held_out_by, validation_fraction)
    selection = Selection(reasons, code, validation, cluster, source, draw_chance(digests))
    if config.contamination_overlap is not None:
        index = build_index(itertools.chain(iter_texts(cleaned, lengths, validation & text_only), evaluation_texts))
        train = np.flatnonzero(selection.train & text_only)
        find = functools.partial(find_contaminated, index=index, overlap=config.contamination_overlap)
        code[train[map_texts(train, find) >= 0]] = reasons.index(CONTAMINATED)
    return selection


def _encode_dictionary(column: pa.ChunkedArray) -> tuple[list[str], np.ndarray]:
    """The distinct strings of a column, and the number of each row's string (N,)."""
    chunks = pa.compute.dictionary_encode(column).unify_dictionaries().chunks
    return chunks[0].dictionary.to_pylist(), np.concatenate([chunk.indices.to_numpy() for chunk in chunks])


def is_held_out(digests: np.ndarray, validation_fraction: float) -> np.ndarray:
    """Digests (N, 16) uint8 → (N,) bool. The text alone decides: added documents never change the split of others."""
    return _as_uint64(digests[:, :8]) < math.ceil(validation_fraction * 2**64)


def draw_chance(digests: np.ndarray) -> np.ndarray:
    """Digests (N, 16) uint8 → (N,) float32 in [0, 1), the same for the same text."""
    return (_as_uint64(digests[:, 8:]) / 2**64).astype(np.float32)


def _as_uint64(halves: np.ndarray) -> np.ndarray:
    """(N, 8) uint8 → (N,) uint64, the first byte the highest."""
    return np.ascontiguousarray(halves).view(">u8")[:, 0]


def count_uses(weights: np.ndarray, chance: np.ndarray) -> np.ndarray:
    """How often each document is used per epoch (n,) int64; a weight's fraction is the chance of one use more."""
    return (np.floor(weights) + (chance < weights % 1)).astype(np.int64)


def repeat_by_weight(rows: np.ndarray, weights: np.ndarray, chance: np.ndarray) -> np.ndarray:
    """Each of `rows` (n,) as often as `count_uses` says. Repetitions come in further passes, so they are far apart."""
    times = count_uses(weights, chance)
    return np.concatenate([np.empty(0, np.int64), *(rows[times > done] for done in range(times.max(initial=0)))])


def fixed_size_chunks(table: datasets.Dataset, column: str) -> Iterator[np.ndarray]:
    """The chunks of a column of fixed-size lists as memory-mapped arrays (n, size)."""
    for chunk in table.data.column(column).chunks:
        yield chunk.flatten().to_numpy(zero_copy_only=True).reshape(len(chunk), -1)


def iter_texts(documents: datasets.Dataset, lengths: np.ndarray, mask: np.ndarray) -> Iterator[list[str]]:
    """The texts to compare of the documents in `mask` (N,) bool, in batches of bounded size."""
    tables = documents.select_columns(["text"]).with_format("arrow")
    for start, stop in iter_slices(lengths):
        if mask[start:stop].any():
            chosen = tables[start:stop]["text"].filter(pa.array(mask[start:stop]))
            yield [without_system(text) for text in chosen.to_pylist()]
