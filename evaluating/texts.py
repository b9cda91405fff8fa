"""The texts to score: validation documents of a dataset, a text file, or the documents of a JSON lines file.

Models with the dataset's tokenizer read the ids that are stored. If one has another tokenizer, every model reads the
same text, encoded by its own.
"""

import itertools
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from utils.cli import UserError
from utils.data.token_dataset import TokenDataset, load_manifest, open_split
from utils.model.build import covers_vocabulary
from utils.pretrained import hide_special_tokens, read_tokenizer

BLOCK = 1000  # characters of a text file that count as one unit
MAX_BLOCKS = 1000


@dataclass(frozen=True)
class Text:
    """What is scored. A unit is what the bootstrap draws: a document, or a block of the one document of a text file."""

    name: str
    num_bytes: int
    documents: list[str] | None  # None if nobody needs them
    unit_bytes: np.ndarray  # (U,) float64, the length of each unit; their sum is `num_bytes`
    unit: str  # "documents" or "blocks"
    stored: TokenDataset | None  # the ids of a dataset; None: each model's tokenizer encodes the documents
    sources: dict[str, np.ndarray]  # the units of each source of a dataset, if it has several


@dataclass(frozen=True)
class Tokens:
    """A text as a model reads it."""

    tokens: TokenDataset
    units: np.ndarray  # (n,) uint32: for each token, the unit of the token that follows it
    num_units: int


def read_dataset(folder: str, tokenizers: Sequence[Any], *, decode: bool) -> Text:
    """The validation documents; with `decode` also as text, which their bytes are counted on."""
    manifest = load_manifest(folder)
    tokens, split = open_split(folder, "validation"), manifest["splits"]["validation"]
    owned = [covers_vocabulary(tokenizer, Path(folder) / "tokenizer") for tokenizer in tokenizers]
    text = Text(f"{folder}, validation", split["bytes"], None, np.zeros(0), "documents", tokens, find_sources(split))
    if not all(owned) and (tokens.loss_mask is not None or tokens.media is not None):
        raise UserError(f"{folder} was made with another tokenizer than the model's, and holds more than plain text")
    if all(owned) and not decode:
        return text
    documents = decode_documents(tokens, read_tokenizer(Path(folder) / "tokenizer"))
    lengths = np.array([len(document.encode()) for document in documents], np.float64)
    if lengths.sum() == split["bytes"]:
        return replace(text, documents=documents, unit_bytes=lengths, stored=tokens if all(owned) else None)
    if all(owned):  # the tokenizer changes a text; what it was made of decides
        return replace(text, documents=documents, unit_bytes=lengths * split["bytes"] / max(lengths.sum(), 1))
    changed = f"its {split['bytes']:,} bytes became {int(lengths.sum()):,}"
    raise UserError(
        f"{folder} was made with another tokenizer than the model's, which does not give its text back ({changed}); "
        "score its text with --text_file"
    )


def decode_documents(tokens: TokenDataset, tokenizer: Any) -> list[str]:
    """The documents without special tokens; exact if the tokenizer decodes exactly."""
    return [
        tokenizer.decode(tokens.read(start, stop), skip_special_tokens=True, clean_up_tokenization_spaces=False)
        for start, stop in itertools.pairwise(tokens.offsets.tolist())
    ]


def find_sources(split: dict[str, Any]) -> dict[str, np.ndarray]:
    """Source → its documents' numbers in a split, which holds source after source; {} for one source."""
    counts = {name: values["documents"] for name, values in split.get("sources", {}).items() if values["documents"]}
    ends = list(itertools.accumulate(counts.values()))
    if len(counts) < 2 or ends[-1] != split["documents"]:
        return {}
    return {name: np.arange(end - counts[name], end) for name, end in zip(counts, ends, strict=True)}


def read_file(path: Path) -> Text:
    """A text file as one document, whose blocks are the units; JSON lines as the documents in the field `text`."""
    try:
        text = path.read_text(encoding="utf-8-sig")  # without the mark that some programs put first
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text ({error.reason} at byte {error.start})") from None
    if not text.strip():
        raise UserError(f"{path}: the file holds no text")
    if path.suffix == ".jsonl":
        documents = read_records(path, text)
        unit_bytes, unit = [len(document.encode()) for document in documents], "documents"
    else:
        documents, edges = [text], block_edges(len(text))
        unit_bytes, unit = [len(text[a:b].encode()) for a, b in itertools.pairwise(edges.tolist())], "blocks"
    return Text(str(path), sum(unit_bytes), documents, np.array(unit_bytes, np.float64), unit, None, {})


def read_records(path: Path, text: str) -> list[str]:
    documents = []
    # Not `splitlines`, which also cuts at characters such as U+2028 inside a text.
    for number, line in enumerate(text.split("\n"), 1):
        try:
            record = json.loads(line) if line.strip() else {"text": ""}
        except (ValueError, RecursionError):
            raise UserError(f"{path}, line {number}: is no JSON") from None
        document = record.get("text") if isinstance(record, dict) else None
        if not isinstance(document, str):
            raise UserError(f"{path}, line {number}: has no text in the field `text`")
        if re.search("[\ud800-\udfff]", document):
            raise UserError(f"{path}, line {number}: the text holds half a character (a lone surrogate)")
        documents += [document] if document.strip() else []
    if not documents:
        raise UserError(f"{path}: the file holds no text")
    return documents


def block_edges(characters: int) -> np.ndarray:
    """Where the blocks of a text begin, and its end, (blocks + 1,)."""
    blocks = min(MAX_BLOCKS, max(1, characters // BLOCK))
    return np.linspace(0, characters, blocks + 1).astype(np.int64)


def encode(text: Text, tokenizer: Any, *, in_front: bool) -> Tokens:
    """The text as a model with `tokenizer` reads it. in_front: where the tokenizer puts no token in front of a document,
    put one there, so that models with different tokenizers predict the same text, from its first byte on."""
    if text.stored is not None:
        return Tokens(text.stored, *number_documents(np.diff(text.stored.offsets)))
    assert text.documents is not None
    ids, starts = encode_documents(text.documents, tokenizer)
    first = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    if in_front and not tokenizer("")["input_ids"][:1] and first is not None:
        ids = [np.concatenate([[first], document]).astype(np.uint32) for document in ids]
        starts = [np.concatenate([[0], places]) for places in starts]
    lengths = np.array([len(document) for document in ids])
    tokens = TokenDataset(ids, lengths)
    if text.unit == "documents":
        return Tokens(tokens, *number_documents(lengths))
    following = np.append(starts[0][1:], starts[0][-1])
    edges = block_edges(len(text.documents[0]))
    return Tokens(tokens, edges[1:-1].searchsorted(following, "right").astype(np.uint32), len(edges) - 1)


def number_documents(lengths: np.ndarray) -> tuple[np.ndarray, int]:
    """The document of each token, and the number of documents."""
    return np.repeat(np.arange(len(lengths), dtype=np.uint32), lengths), len(lengths)


def encode_documents(documents: list[str], tokenizer: Any) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """The ids that prepare_data.py stores for each document, (n,) uint32: the tokenizer's own, then an eos token. Special
    tokens that the text spells out are text. And where in its document each token begins, (n,), in characters."""
    ids, starts = [], []
    for document, encoding in zip(
        documents, hide_special_tokens(tokenizer.backend_tokenizer)[0].encode_batch(documents), strict=True
    ):
        found, places = encoding.ids, [start for start, _ in encoding.offsets]
        if len(found) <= 1 or found[-1] != tokenizer.eos_token_id:
            found, places = [*found, tokenizer.eos_token_id], [*places, 0]
        places[-1] = len(document)
        ids.append(np.array(found, np.uint32))
        starts.append(np.array(places, np.int64))
    return ids, starts
