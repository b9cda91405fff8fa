"""Layouts: how a stream of documents becomes rows of T positions.

Both layouts score every token but the first of each document exactly once: the target of a row's last position is the
token that the next row begins with, so cutting a document loses no target. Ignored targets are -100. A layout is a
map-style dataset of rows; index `PADDING_SAMPLE` is a row without a target.
"""

import numpy as np

from utils.batches.batch_plan import PADDING_SAMPLE
from utils.batches.token_dataset import TokenDataset

IGNORED = -100
FILLER = 0  # fills a packed row; any id will do, as it has no target and no document attends to it
Row = dict[str, np.ndarray]


class PackedLayout:
    """Documents end to end, cut every T tokens.

    A row is `input_ids`, `shift_labels` (the next token of the same document) and `position_ids`, each (T,).
    `position_ids` restart at 0 with every document and every row, by which the model keeps documents apart.
    """

    def __init__(self, tokens: TokenDataset, sequence_length: int) -> None:
        self.tokens, self.sequence_length = tokens, sequence_length

    def __len__(self) -> int:
        return -(-self.tokens.num_tokens // self.sequence_length)

    def __getitem__(self, index: int) -> Row:
        if index == PADDING_SAMPLE:
            return self._padding_row()
        length = self.sequence_length
        start = index * length
        ids = self.tokens.read(start, start + length + 1)
        stop = min(start + length, self.tokens.num_tokens)
        offsets = self.tokens.offsets
        first = int(np.searchsorted(offsets, start, side="right"))
        last = int(np.searchsorted(offsets, start + length, side="right"))
        document_starts = offsets[first:last] - start  # those within [1, length], empty documents included

        labels = np.full(length, IGNORED, np.int64)
        labels[: len(ids) - 1] = ids[1:]
        labels[document_starts - 1] = IGNORED  # the token after a document's last is another document's

        restarts = np.zeros(length, np.int64)
        restarts[document_starts[document_starts < length]] = document_starts[document_starts < length]
        restarts[stop - start :] = stop - start  # the padding of the last row counts as a document of its own
        positions = np.arange(length) - np.maximum.accumulate(restarts)
        return {"input_ids": _padded(ids[: stop - start], length, FILLER), "shift_labels": labels,
                "position_ids": positions}  # fmt: skip

    def _padding_row(self) -> Row:
        """A row without a target: it fills up the last batch of an evaluation."""
        length = self.sequence_length
        return {"input_ids": np.full(length, FILLER), "shift_labels": np.full(length, IGNORED),
                "position_ids": np.arange(length)}  # fmt: skip


class PaddedLayout:
    """One document per row, one longer than T in as many rows as it needs; `collate` pads to the longest.

    A row is `input_ids`, `shift_labels` and `attention_mask` (1 on tokens, 0 on padding), each (length,) with
    1 ≤ length ≤ T.
    """

    def __init__(self, tokens: TokenDataset, sequence_length: int, pad_token_id: int) -> None:
        self.tokens, self.sequence_length, self.pad_token_id = tokens, sequence_length, pad_token_id
        # A document of n tokens has n - 1 targets. `rows` counts the rows before each document.
        rows_per_document = -(-(np.diff(tokens.offsets) - 1).clip(min=0) // sequence_length)
        self.rows = np.concatenate([[0], np.cumsum(rows_per_document)])

    def __len__(self) -> int:
        return int(self.rows[-1])

    def __getitem__(self, index: int) -> Row:
        if index == PADDING_SAMPLE:
            return self._padding_row()
        document = int(np.searchsorted(self.rows, index, side="right")) - 1
        start = int(self.tokens.offsets[document]) + (index - int(self.rows[document])) * self.sequence_length
        end_of_document = int(self.tokens.offsets[document + 1])
        stop = min(start + self.sequence_length, end_of_document)
        ids = self.tokens.read(start, min(stop + 1, end_of_document))
        labels = _padded(ids[1:], stop - start, IGNORED)
        return {"input_ids": ids[: stop - start], "shift_labels": labels,
                "attention_mask": np.ones(stop - start, np.int64)}  # fmt: skip

    def _padding_row(self) -> Row:
        # The one attended position keeps the softmax of the row defined.
        return {"input_ids": np.full(1, self.pad_token_id), "shift_labels": np.full(1, IGNORED),
                "attention_mask": np.ones(1, np.int64)}  # fmt: skip


def collate(rows: list[Row], pad_token_id: int) -> Row:
    """Rows → one batch of (B, longest row) arrays, padded on the right."""
    longest = max(len(row["input_ids"]) for row in rows)
    fill = {"input_ids": pad_token_id, "shift_labels": IGNORED, "attention_mask": 0}
    return {name: np.stack([_padded(row[name], longest, fill.get(name, 0)) for row in rows]) for name in rows[0]}


def _padded(values: np.ndarray, length: int, fill: int) -> np.ndarray:
    if len(values) == length:
        return values
    result = np.full(length, fill, np.int64)
    result[: len(values)] = values
    return result
