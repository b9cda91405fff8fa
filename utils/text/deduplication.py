"""Exact duplicates, near duplicates, and the split that follows from the same hash.

Near duplicates are found by MinHash (Broder 1997) and locality-sensitive hashing. The figures, and why these:

- Shingles are 3-grams of words. An edited word breaks n shingles, so of two texts that differ in a share e of their
  words, J = q / (2 - q) of the shingles are common, q = (1 - e)^n. For e = 5 % and 30 % that is 0.82 and 0.32 with
  n = 2, 0.75 and 0.21 with n = 3, 0.63 and 0.09 with n = 5 (FineWeb's, arXiv 2406.17557): n = 3 leaves the widest gap
  that 5 % is still clearly on the upper side of, also in texts of 40 words.
- The threshold 0.55 lies in that gap, and a little nearer to what must be found, as a text of 40 words with one edit
  more than its share has 0.6. It stands for about a tenth of the words edited.
- 128 hashes in 32 bands of 4 rows: a pair of similarity J meets in a band with probability 1 - (1 - J^4)^32: 0.95 for
  J = 0.55, 0.99 for 0.6, 0.9998 for 0.7, 0.05 for 0.2. (FineWeb's 14 bands of 8 give 0.11, 0.21 and 0.56.) What met is
  compared by all 128 hashes: the share of equal ones estimates J with a standard error below 0.04.
"""

from collections.abc import Sequence
from hashlib import blake2b

import numpy as np
import pyarrow as pa
from rensa import RMinHash

from utils.text.shingles import hash_ngrams, hash_words, normalize

DIGEST_BYTES = 16
NGRAM = 3
BANDS, ROWS = 32, 4
NUM_HASHES = BANDS * ROWS
THRESHOLD = 0.55
SEED = 1
BLOCK = 2**14  # signatures at a time: 8 MB

HIGH_BITS = np.uint64(0xFFFFFFFFFF000000)
MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)


def digest(text: str) -> bytes:
    """128 bits of BLAKE2b of the normalised text: two documents are the same when these are."""
    return blake2b(normalize(text).encode("utf-8", "surrogatepass"), digest_size=DIGEST_BYTES).digest()


def is_validation(value: bytes, validation_fraction: float) -> bool:
    """Whether the document of this digest is held out: a property of its text alone, so that added documents move
    none of the others across the split."""
    return int.from_bytes(value[:8], "big") < validation_fraction * 2**64


def first_of_each(digests: np.ndarray) -> np.ndarray:
    """Digests (N, 16) uint8 → (N,) bool: True for the first document of each digest. Peak memory 50 bytes a document."""
    order = np.lexsort(np.ascontiguousarray(digests).view(np.uint64).T)  # stable: equal ones stay in their order
    ordered = digests[order]
    first = np.empty(len(digests), bool)
    first[order[:1]] = True
    first[order[1:]] = (ordered[1:] != ordered[:-1]).any(axis=1)
    return first


def sketch_documents(texts: list[str]) -> np.ndarray:
    """MinHash signatures (n, NUM_HASHES) uint32. A text of fewer than NGRAM words has one shingle: all of it."""
    shingles, counts = hash_ngrams(*hash_words(texts, at_least=NGRAM), NGRAM)
    offsets = np.concatenate([[0], np.cumsum(counts)]).astype(np.uint64)
    matrix = RMinHash.digest_matrix_from_flat_token_hashes(shingles, offsets, NUM_HASHES, SEED)
    return np.array(matrix.to_rows(), np.uint32).reshape(-1, NUM_HASHES)  # the only way out: 6 µs a document


def signature_chunks(column: pa.ChunkedArray) -> list[np.ndarray]:
    """A FixedSizeList<uint32>[NUM_HASHES] column as arrays (n, NUM_HASHES) that share its memory (or map its file)."""
    return [chunk.flatten().to_numpy(zero_copy_only=True).reshape(-1, NUM_HASHES) for chunk in column.chunks]


def find_near_duplicates(
    signatures: Sequence[np.ndarray], lengths: np.ndarray, candidates: np.ndarray, threshold: float = THRESHOLD
) -> np.ndarray:
    """The document that stands for each one's cluster: the longest, and the first of equally long ones.

    `signatures`: chunks (n_i, NUM_HASHES) whose n_i add up to N; `lengths` (N,); `candidates` (N,) bool. Returns (N,)
    int64: its own index for each document that is kept, and for each that is no candidate.

    Two documents are linked when they meet in a band and at least `threshold` of their hashes are equal; a cluster is
    all that links connect, so two of its members may be less alike than that.
    """
    table = _SignatureTable(signatures)
    members = np.flatnonzero(candidates).astype(np.uint32)
    root = np.arange(len(members), dtype=np.uint32)  # of each member, the first member of its cluster so far
    following = table.band_keys(candidates, 0)
    for band in range(BANDS):
        keys, following = following, table.band_keys(candidates, (band + 1) % BANDS)
        order, later = _sort_into_buckets(keys, following)
        del keys
        # Each document of a bucket is compared with the one before it and with the bucket's first: linear in N, also
        # where a million documents share a bucket.
        first = later - 1
        first[1:][np.diff(later) == 1] = 0
        np.maximum.accumulate(first, out=first)
        for start in range(0, len(later), BLOCK):
            pairs = slice(start, start + BLOCK)
            for earlier in (later[pairs] - 1, first[pairs]):
                left, right = order[later[pairs]], order[earlier]
                apart = root[left] != root[right]
                left, right = left[apart], right[apart]
                alike = table.similarity(members[left], members[right]) >= threshold
                _join(root, left[alike], right[alike])
        del order, later, first
    del following
    best = _longest_of_each(root, np.asarray(lengths)[members])
    cluster = np.arange(len(candidates))
    cluster[members] = members[best]
    return cluster


class _SignatureTable:
    """Rows of signatures that lie in many arrays, most often mapped from a file."""

    def __init__(self, chunks: Sequence[np.ndarray]) -> None:
        self.blocks = [chunk[start : start + BLOCK] for chunk in chunks for start in range(0, len(chunk), BLOCK)]
        self.offsets = np.cumsum([0, *map(len, self.blocks)])

    def band_keys(self, candidates: np.ndarray, band: int) -> np.ndarray:
        """64 bits of hash of the candidates' rows of one band, (candidates,) uint64."""
        keys = np.zeros(np.count_nonzero(candidates), np.uint64)
        stop = 0
        for block, offset in zip(self.blocks, self.offsets, strict=False):
            rows = block[candidates[offset : offset + len(block)], band * ROWS : (band + 1) * ROWS]
            start, stop = stop, stop + len(rows)
            part = keys[start:stop]
            for row in range(ROWS):
                part ^= rows[:, row]
                part *= MULTIPLIER
                part ^= part >> np.uint64(32)
        return keys

    def similarity(self, left: np.ndarray, right: np.ndarray) -> np.ndarray:
        """Share of equal hashes of documents left[i] and right[i]."""
        return np.mean(self._rows(left) == self._rows(right), axis=1)

    def _rows(self, documents: np.ndarray) -> np.ndarray:
        rows = np.empty((len(documents), NUM_HASHES), np.uint32)
        block_of = np.searchsorted(self.offsets, documents, side="right") - 1
        order = np.argsort(block_of, kind="stable")
        for places in np.split(order, np.flatnonzero(np.diff(block_of[order])) + 1):
            block = block_of[places[0]]
            rows[places] = self.blocks[block][documents[places] - self.offsets[block]]
        return rows


def _sort_into_buckets(keys: np.ndarray, following: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The order that brings equal keys together, and the places in it whose key is that of the place before.

    A bucket is what agrees in the high 40 bits. The low 24, which are the next band's, sort within it: those that
    agree in two bands become neighbours, however many others (with one licence header, say) are in the bucket.
    """
    keys &= HIGH_BITS
    keys |= following >> np.uint64(40)
    order = np.argsort(keys, kind="stable")
    buckets = keys[order]
    buckets >>= np.uint64(24)
    return order, np.flatnonzero(buckets[1:] == buckets[:-1]) + 1


def _join(root: np.ndarray, left: np.ndarray, right: np.ndarray) -> None:
    """Union-find over whole arrays: lets root[i] be the smallest index of i's cluster after left[k] and right[k] joined."""
    while len(left):
        np.minimum.at(root, np.maximum(root[left], root[right]), np.minimum(root[left], root[right]))
        while (root[root] != root).any():
            root[:] = root[root]
        apart = root[left] != root[right]
        left, right = left[apart], right[apart]


def _longest_of_each(root: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """For each document, the first of the longest documents with the same root."""
    longest = np.zeros(len(root), lengths.dtype)
    np.maximum.at(longest, root, lengths)
    is_longest = np.flatnonzero(lengths == longest[root])
    best = np.full(len(root), len(root))
    np.minimum.at(best, root[is_longest], is_longest)
    return best[root]
