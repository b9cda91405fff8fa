"""Layouts: how a stream of documents becomes rows of T positions.

No layout loses a target: every token except its document's first is a target exactly once. The target of a row's last
position is the next token of the document, whichever row that token is in. Ignored targets are -100. A layout is a
map-style dataset whose unit is the batch; index `PADDING_SAMPLE` is a row without a target. Every batch has `lengths`
(B,) int64, the positions with tokens in each row; if the tokens have a loss mask, also `loss_mask`, like `targets`; if
they have media, also `media` (B,), an object array of lists of files, empty for a padding row.
"""

from bisect import bisect_left, insort
from collections import defaultdict
from collections.abc import Iterator

import numpy as np

from utils.data.order import PADDING_SAMPLE
from utils.data.token_dataset import TokenDataset

IGNORED = -100
WINDOW = 2**17  # documents laid out at a time, which bounds temporary memory; another number is another layout
Row = dict[str, np.ndarray]  # name → (T,)
Batch = dict[str, np.ndarray]  # name → (B, T); `lengths` (B,)


class PackedLayout:
    """Documents end to end, cut every T tokens. A batch is `input_ids`, `targets` (the next token of the same document)
    and `position_ids`, each (B, T) int64. By `position_ids` a model keeps documents apart: they restart at 0 with each
    document, row and run of free positions."""

    def __init__(self, tokens: TokenDataset, sequence_length: int) -> None:
        self.tokens, self.sequence_length = tokens, sequence_length
        self.columns = np.arange(sequence_length)

    def __len__(self) -> int:
        return -(-self.tokens.num_tokens // self.sequence_length)

    @property
    def utilisation(self) -> float:
        """The share of positions that hold a token."""
        return self.tokens.num_tokens / (len(self) * self.sequence_length)

    def __getitems__(self, indices: list[int]) -> Batch:
        """The rows `indices` (B,) as one batch; PyTorch's loaders call this name for many samples at once."""
        length, offsets, end = self.sequence_length, self.tokens.offsets, self.tokens.num_tokens
        starts = np.array([row * length if row != PADDING_SAMPLE else end for row in indices])
        # The documents that begin after a row's first position and at most one position after its last, empty ones too.
        first = offsets.searchsorted(starts, "right")
        counts = offsets.searchsorted(starts + length, "right") - first
        ends = offsets[ranges(first, counts)] + (np.arange(len(starts)) * length - starts).repeat(counts)
        return self._batch(starts.tolist(), (starts + length + 1).tolist(), end - starts, ends)

    def _batch(self, starts: list[int], stops: list[int], used: np.ndarray, ends: np.ndarray) -> Batch:
        """The batch of the token spans [start, stop), B × (T + 1) tokens: each row and the token behind it. Row i
        begins with used[i] tokens of documents. `ends` (of B × T) are the places behind each document's last one."""
        length = self.sequence_length
        buffer = self.tokens.gather(starts, stops).reshape(-1, length + 1)
        labels = buffer[:, 1:].astype(np.int64)
        labels.reshape(-1)[ends - 1] = IGNORED  # what follows is another document
        if used.min() <= length:
            labels[self.columns + 1 >= used[:, None]] = IGNORED
        restarts = np.concatenate([np.arange(len(labels) + 1) * length, ends])
        restarts.sort()
        positions = (restarts[:-1] % length).repeat(restarts[1:] - restarts[:-1]).reshape(labels.shape)
        np.subtract(self.columns, positions, out=positions)
        batch = {"input_ids": buffer[:, :-1].astype(np.int64), "targets": labels, "position_ids": positions}
        batch["lengths"] = np.minimum(used, length)
        if self.tokens.loss_mask is not None:
            mask = self.tokens.loss_mask.gather(starts, stops).reshape(-1, length + 1)[:, 1:]
            batch["loss_mask"] = mask * (labels != IGNORED)
        return batch


def document_places(batch: Batch) -> np.ndarray:
    """Where the documents of a batch of (B, T) begin and where the last one ends, with its rows end to end: (N,) int32.

    Documents begin where `position_ids` restart; in padded rows, at a row's begin and at that of its padding. N is a
    power of two, so that few sizes occur; the end is repeated, which means documents without tokens.
    """
    rows, length = batch["input_ids"].shape
    if "position_ids" in batch:
        begins = batch["position_ids"] == 0
    else:
        mask = batch.get("attention_mask", np.ones((rows, length), np.int64))
        begins = np.diff(mask, axis=1, prepend=-1) != 0
    found = np.flatnonzero(begins)
    places = np.full(1 << len(found).bit_length(), rows * length, np.int32)
    places[: len(found)] = found
    return places


class BestFitLayout(PackedLayout):
    """Whole documents; one longer than T is cut into full rows and a rest, which is placed like a whole document.

    Within a window of consecutive documents, each goes where it leaves the least space, the longest first. Rows below
    `num_shared` hold documents: row r those in members[first_member[r] : first_member[r + 1]], of a long one its rest.
    The other rows are full rows of the long documents, first_full[i + 1] - first_full[i] of document long[i].
    """

    def __init__(self, tokens: TokenDataset, sequence_length: int) -> None:
        super().__init__(tokens, sequence_length)
        id_type = np.min_scalar_type(len(tokens.offsets))  # 4 bytes for 1e9 documents
        members, first_member = [np.empty(0, id_type)], [np.zeros(1, id_type)]
        long, first_full = [np.empty(0, id_type)], [np.zeros(1, np.int64)]
        num_members = num_full = 0
        for start, lengths in document_windows(tokens):
            filled = np.flatnonzero(lengths)
            full, rest = np.divmod(lengths[filled] - 1, sequence_length)
            order, sizes = best_fit_decreasing(rest + 1, sequence_length)
            members.append((start + filled[order]).astype(id_type))
            first_member.append((num_members + sizes.cumsum()).astype(id_type))
            long.append((start + filled[full > 0]).astype(id_type))
            first_full.append(num_full + full[full > 0].cumsum())
            num_members += len(order)
            num_full += int(full.sum())
        self.members, self.first_member = np.concatenate(members), np.concatenate(first_member)
        self.long, self.first_full = np.concatenate(long), np.concatenate(first_full)
        self.num_shared = len(self.first_member) - 1

    def __len__(self) -> int:
        return self.num_shared + int(self.first_full[-1])

    def __getitems__(self, indices: list[int]) -> Batch:
        length, offsets, end = self.sequence_length, self.tokens.offsets, self.tokens.num_tokens
        starts, stops, used, ends = [], [], [], []
        for place, row in enumerate(indices):
            column = 0
            if row >= self.num_shared:
                row -= self.num_shared
                which = int(self.first_full.searchsorted(row, "right")) - 1
                starts.append(int(offsets[self.long[which]]) + (row - int(self.first_full[which])) * length)
                stops.append(starts[-1] + length + 1)  # with the target of the last position
                column = length + 1
            elif row != PADDING_SAMPLE:
                for document in self.members[self.first_member[row] : self.first_member[row + 1]].tolist():
                    start, stop = offsets[document : document + 2].tolist()
                    size = (stop - start - 1) % length + 1
                    starts.append(stop - size)
                    stops.append(stop)
                    column += size
                    ends.append(place * length + column)
            starts.append(end)  # the rest of the row is zeros
            stops.append(end + length + 1 - column)
            used.append(column)
        return self._batch(starts, stops, np.array(used), np.array(ends, np.int64))


class PaddedLayout:
    """One document per row, or several rows for one longer than T; a batch is padded to its longest row. It is
    `input_ids`, `targets` and `attention_mask` (1 on tokens, 0 on padding), each (B, longest) int64.

    With a `stride` below T the rows of a document overlap: each begins `stride` tokens after the one before, and has
    targets where that one has none. Every target then has at least T - stride tokens before it, or its whole document's.
    """

    def __init__(
        self, tokens: TokenDataset, sequence_length: int, pad_token_id: int, *, fixed_length: bool = False,
        stride: int | None = None,
    ) -> None:  # fmt: skip
        self.tokens, self.sequence_length, self.stride = tokens, sequence_length, stride or sequence_length
        self.pad_token_id, self.fixed_length = pad_token_id, fixed_length
        # A document of n tokens has n - 1 targets. rows[i] is the number of rows before document i.
        self.rows = np.zeros_like(tokens.offsets)
        self._num_inputs = 0
        for start, lengths in document_windows(tokens):
            targets = (lengths - 1).clip(min=0)
            further = -(-(targets - sequence_length).clip(min=0) // self.stride)
            self.rows[start + 1 : start + 1 + len(lengths)] = (targets > 0) + further
            self._num_inputs += int((targets + (targets % sequence_length > 0)).sum())
        np.cumsum(self.rows, out=self.rows)

    def __len__(self) -> int:
        return int(self.rows[-1])

    @property
    def utilisation(self) -> float:
        """The share of positions that would hold a token if all rows were padded to T, at most 1; for rows that do not
        overlap."""
        return self._num_inputs / (len(self) * self.sequence_length)

    def __getitems__(self, indices: list[int]) -> Batch:
        """The rows `indices` (B,) as one batch."""
        length, offsets, rows = self.sequence_length, self.tokens.offsets, np.array(indices)
        documents = self.rows.searchsorted(rows, "right") - 1
        windows = rows - self.rows[documents]
        starts = offsets[documents] + windows * self.stride
        sizes = np.minimum(offsets[documents + 1] - starts, length + 1)  # with the target of a full row's last position
        padding = rows == PADDING_SAMPLE
        starts[padding], sizes[padding] = self.tokens.num_tokens, 0
        lengths = sizes.clip(1, length)  # attend to one position of a padding row, for a defined softmax
        width = length if self.fixed_length else int(lengths.max())
        spans = starts.tolist(), (starts + width + 1).tolist()
        buffer = self.tokens.gather(*spans).reshape(-1, width + 1).astype(np.int64)
        columns = np.arange(width)
        is_new = (columns >= length - self.stride) | (windows == 0)[:, None]
        has_target = (columns + 1 < sizes[:, None]) & is_new
        batch: Batch = {
            "input_ids": np.where(columns < sizes[:, None], buffer[:, :-1], self.pad_token_id),
            "targets": np.where(has_target, buffer[:, 1:], IGNORED),
            "attention_mask": (columns < lengths[:, None]).astype(np.int64),
            "lengths": np.minimum(sizes, length),
        }
        if self.tokens.loss_mask is not None:
            batch["loss_mask"] = self.tokens.loss_mask.gather(*spans).reshape(-1, width + 1)[:, 1:] * has_target
        if self.tokens.media is not None:
            batch["media"] = np.empty(len(indices), object)
            for place, document in enumerate(documents.tolist()):
                batch["media"][place] = [] if padding[place] else self.tokens.media[document]
        return batch


def document_windows(tokens: TokenDataset) -> Iterator[tuple[int, np.ndarray]]:
    """The documents in windows of `WINDOW`: (index of the first, lengths (n,) int64)."""
    for start in range(0, len(tokens.offsets) - 1, WINDOW):
        yield start, np.diff(tokens.offsets[start : start + WINDOW + 1])


def best_fit_decreasing(lengths: np.ndarray, capacity: int) -> tuple[np.ndarray, np.ndarray]:
    """Pack items of `lengths` (n,), each in [1, capacity], into bins of `capacity`.

    Returns (order, sizes): the indices of the items, bin after bin, (n,), and the number of items in each bin. The
    longest item comes first, and each goes to a bin where it leaves the least space (best-fit decreasing: Johnson et
    al., "Worst-case performance bounds for simple one-dimensional packing algorithms", 1974). One step places all equal
    items in all equal bins (histogram packing: Krell et al., 2021, arXiv 2107.02027): O(capacity × log capacity) steps.
    """
    steps: list[tuple[int, int, int]] = []  # first bin, number of bins, items that go into each of them
    # Free space → groups of consecutive bins that have it: first bin, number of bins. The spaces, sorted.
    groups: defaultdict[int, list[tuple[int, int]]] = defaultdict(list)
    spaces: list[int] = []
    num_bins = 0
    counts = np.bincount(lengths)
    for length in np.flatnonzero(counts)[::-1].tolist():
        left = int(counts[length])
        while left:
            place = bisect_left(spaces, length)
            space, first, available = capacity, num_bins, left  # as many new bins as needed
            if place < len(spaces):
                space = spaces[place]
                first, available = groups[space].pop()
            each = min(left, space // length)
            bins = min(available, left // each)
            left -= bins * each
            steps.append((first, bins, each))
            if place == len(spaces):
                num_bins += bins
            elif bins < available:
                groups[space].append((first + bins, available - bins))
            elif not groups[space]:
                del groups[spaces.pop(place)]
            if rest := space - each * length:
                if rest not in groups:
                    insort(spaces, rest)
                groups[rest].append((first, bins))
    first_bin, bins_filled, items_each = np.array(steps, np.int64).reshape(-1, 3).T
    bin_of_item = np.repeat(ranges(first_bin, bins_filled), np.repeat(items_each, bins_filled))  # the longest first
    by_length = np.argsort((capacity - lengths).astype(np.min_scalar_type(capacity)), kind="stable")
    order = by_length[np.argsort(bin_of_item.astype(np.min_scalar_type(num_bins)), kind="stable")]
    return order, np.bincount(bin_of_item, minlength=num_bins)


def ranges(first: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """first[i], first[i] + 1, ... (sizes[i] numbers) for every i, end to end."""
    return np.arange(sizes.sum()) + (first - sizes.cumsum() + sizes).repeat(sizes)
