"""The token dataset on disk: a folder with `train/` and `validation/` (Arrow), `tokenizer/` and `manifest.json`.

A split is a `datasets` table with one row per document and the column `input_ids` (uint16 or uint32), without padding
and labels. Conversations also have the column `loss_mask` (uint8), 1 on the assistant's tokens. Pictures and sounds are
in a table of their own beside the split, `train_media/` and `validation_media/`, with one row per document: the column
`media`, a list of files as they came. The manifest's `media` says their kind, and what stands for a picture in a text.
"""

import itertools
from bisect import bisect_right
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from utils.cli import UserError
from utils.files import read_json, short

FORMAT_VERSION = 1
# Those that Pillow decodes by itself. It would run another program for EPS.
PICTURE_FORMATS = ("PNG", "JPEG", "GIF", "WEBP", "BMP", "TIFF", "PPM")


def load_manifest(folder: str | Path, sources: str = "'[my_texts/]'") -> dict[str, Any]:
    """`manifest.json` of a dataset folder; `UserError` if the folder is not a complete dataset of this version. It says
    how one is made of `sources`, which are followed by options that they need."""
    path = Path(folder) / "manifest.json"
    if not path.is_file():
        reason = "is not a dataset folder (it has no manifest.json)" if Path(folder).exists() else "does not exist"
        is_demo = Path(folder).parts[-2:] == ("data", "demo") and "--" not in sources
        sources = "" if is_demo else f"--sources {sources} "
        output = "data/mine" if Path(folder).exists() else folder
        raise UserError(f"dataset {folder} {reason}; make it with: python prepare_data.py {sources}--output {output}")
    manifest = read_json(path)
    again = "prepare the dataset again in a new folder"
    if (found := manifest.get("format_version")) != FORMAT_VERSION:
        raise UserError(f"{path}: has format version {found}, but this Plainloop reads {FORMAT_VERSION}; {again}")
    try:
        num_bytes = manifest["splits"]["validation"]["bytes"]
        is_whole = isinstance(manifest["key"], str) and type(num_bytes) is int and num_bytes > 0
        is_whole = is_whole and (not manifest.get("stream") or isinstance(manifest["options"], dict))
    except (KeyError, TypeError):
        is_whole = False
    if not is_whole:
        raise UserError(f"{path}: is damaged; {again}")
    return manifest


class MediaFiles:
    """The files of each document, read in place: document i → a list of bytes, empty for one without."""

    def __init__(self, column: pa.ChunkedArray) -> None:
        self._column = column

    def __len__(self) -> int:
        return len(self._column)

    def __getitem__(self, document: int) -> list[bytes]:
        return self._column[document].as_py()  # type: ignore[no-any-return]


class TokenDataset:
    """The tokens of many documents as one long stream, read in place. Document i is positions offsets[i] to
    offsets[i + 1]; `offsets` (N + 1,) int64. `loss_mask` is a stream of the same documents, 1 for a token that may be
    trained on, else 0; None if all may be. `media` are the documents' pictures or sounds; None for text."""

    def __init__(
        self, chunks: list[np.ndarray], lengths: np.ndarray, loss_mask: "TokenDataset | None" = None,
        media: MediaFiles | None = None,
    ) -> None:  # fmt: skip
        """`chunks` are the stream, in order; `lengths` (N,) are the documents' lengths in tokens."""
        self._chunks, self.loss_mask, self.media = chunks, loss_mask, media
        self._chunk_starts = [0, *itertools.accumulate(map(len, chunks))]
        self.offsets = np.zeros(len(lengths) + 1, dtype=np.int64)
        self.offsets[1:] = lengths
        np.cumsum(self.offsets, out=self.offsets)  # in place: summing `lengths` would make a wide copy of them first

    @property
    def num_tokens(self) -> int:
        return int(self.offsets[-1])

    @property
    def largest_id(self) -> int:
        """Reads all tokens: some seconds for 1e10 of them."""
        return max((int(chunk.max()) for chunk in self._chunks if len(chunk)), default=-1)

    @property
    def total(self) -> int:
        """The sum; for a loss mask the number of tokens that may be trained on."""
        return sum(int(chunk.sum()) for chunk in self._chunks)

    def read(self, start: int, stop: int) -> np.ndarray:
        """Tokens [start, stop) of the stream, (stop - start,) int64, cut at the stream's end."""
        return self.gather([start], [min(stop, self.num_tokens)]).astype(np.int64)

    def gather(self, starts: Iterable[int], stops: Iterable[int]) -> np.ndarray:
        """The tokens of several spans [start, stop) end to end, in their stored type; zeros behind the stream's end."""
        parts: list[np.ndarray] = [np.empty(0, np.uint8)]  # for a concatenation without spans
        for start, stop in zip(starts, stops, strict=True):
            index = bisect_right(self._chunk_starts, start) - 1
            while start < stop and index < len(self._chunks):
                origin = self._chunk_starts[index]
                parts.append(self._chunks[index][start - origin : stop - origin])
                start += len(parts[-1])
                index += 1
            if start < stop:
                parts.append(np.zeros(stop - start, np.uint8))
        return np.concatenate(parts)


def open_split(folder: str | Path, split: str) -> TokenDataset:
    """The split `train` or `validation` of a dataset folder, mapped from disk without a copy."""
    media = None
    try:
        table = _map_table(Path(folder) / split)
        mask = TokenDataset(*_read_lists(table, "loss_mask")) if "loss_mask" in table.column_names else None
        if (Path(folder) / f"{split}_media").is_dir():
            media = MediaFiles(_map_table(Path(folder) / f"{split}_media").column("media"))
        tokens = TokenDataset(*_read_lists(table, "input_ids"), mask, media)
    except Exception as error:  # pyarrow raises many types
        raise UserError(f"dataset {folder}: the {split} split cannot be read: {short(error)}") from None
    if mask is not None and mask.num_tokens != tokens.num_tokens:
        counts = f"{mask.num_tokens} masks for {tokens.num_tokens} tokens"
        raise UserError(f"dataset {folder}: the {split} split has {counts}; prepare it again")
    if media is not None and len(media) != (documents := len(tokens.offsets) - 1):
        counts = f"media of {len(media)} documents for {documents}"
        raise UserError(f"dataset {folder}: the {split} split has {counts}; prepare it again")
    return tokens


def _map_table(folder: Path) -> pa.Table:
    """A table that `datasets` saved, mapped as its `load_from_disk` does, without the second of CPU time that importing
    `datasets` takes."""
    files = [folder / part["filename"] for part in read_json(folder / "state.json")["_data_files"]]
    return pa.concat_tables([pa.ipc.open_stream(pa.memory_map(str(file))).read_all() for file in files])


def _read_lists(table: pa.Table, column: str) -> tuple[list[np.ndarray], np.ndarray]:
    """The values of a column of lists, in chunks, and the lengths of the lists (N,)."""
    chunks, lengths = [], [np.empty(0, np.int32)]
    for chunk in table.column(column).chunks:
        # Arrow's own buffers. The first offset of a slice need not be 0, so offsets are always applied.
        offsets = chunk.offsets.to_numpy()
        if not pa.types.is_unsigned_integer(chunk.type.value_type) or offsets[0] < 0 or (np.diff(offsets) < 0).any():
            raise ValueError(f"{column} is not lists of token ids")
        if offsets[-1] > len(chunk.values):
            raise ValueError(f"{column} is cut off")
        chunks.append(chunk.values.to_numpy(zero_copy_only=True)[offsets[0] : offsets[-1]])
        lengths.append(np.diff(offsets))
    return chunks, np.concatenate(lengths)
