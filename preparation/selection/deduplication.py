"""Exact duplicates, near duplicates, and the split that follows from the same hash.

Near duplicates are found by MinHash (Broder 1997) and locality-sensitive hashing. The figures, and why these:

- Shingles are 3-grams of words. An edited word breaks n shingles, so of two texts that differ in a share e of their
  words, J = q / (2 - q) of the shingles are common, q = (1 - e)^n. For e = 5 % and 30 % that is 0.82 and 0.32 with
  n = 2, 0.75 and 0.21 with n = 3, 0.63 and 0.09 with n = 5 (FineWeb's, arXiv 2406.17557). A gap that the chance of
  where the edits fall does not close needs n > 2, and bands that find the upper value cheaply need n < 5.
- The threshold 0.55 lies in that gap, below the 0.6 that a text of 40 words has with one edit more than its share. It
  stands for a tenth of the words edited. Two texts that have half of their words in common, such as a licence header,
  have J = 1/3 and are both kept.
- 128 hashes in 32 bands of 4 rows: a pair of similarity J meets in a band with probability 1 - (1 - J^4)^32: 0.95 for
  J = 0.55, 0.99 for 0.6, 0.9998 for 0.7, 0.05 for 0.2. (FineWeb's 14 bands of 8 give 0.11, 0.21 and 0.56.) What met is
  compared by all 128 hashes: the share of equal ones estimates J with a standard error of at most 0.044.
- Short texts: with 20 words, one edit leaves J = 0.71; with 12, 0.54, so that half of them are kept; with 3 to 8, any
  edit in the middle makes another text.
"""

import os
from collections.abc import Sequence
from functools import cache
from hashlib import blake2b

import numpy as np
from rensa import RMinHash

from preparation.selection.shingles import MULTIPLIER, hash_ngrams, hash_words, normalize

DIGEST_BYTES = 16
NGRAM = 3
BANDS, ROWS = 32, 4
NUM_HASHES = BANDS * ROWS
THRESHOLD = 0.55
DRIFT = 0.15
SEED = 1
BLOCK = 2**14  # documents compared at a time, 8 MB of signatures


def digest(text: str) -> bytes:
    """128 bits of BLAKE2b of the normalised text: two documents are the same when these are."""
    return blake2b(normalize(text).encode("utf-8", "surrogatepass"), digest_size=DIGEST_BYTES).digest()


def is_validation(value: bytes, validation_fraction: float) -> bool:
    """Whether the document of this digest is held out: a property of its text alone, so that added documents move
    none of the others across the split."""
    return int.from_bytes(value[:8], "big") < validation_fraction * 2**64


def first_of_each(digests: np.ndarray) -> np.ndarray:
    """Digests (N, 16) uint8 → (N,) bool: True for the first of each. Needs 44 bytes per document meanwhile."""
    order = np.lexsort(np.ascontiguousarray(digests).view(np.uint64).T)  # stable: equal ones stay in their order
    ordered = digests[order]
    first = np.empty(len(digests), bool)
    first[order[:1]] = True
    first[order[1:]] = (ordered[1:] != ordered[:-1]).any(axis=1)
    return first


def sketch_documents(texts: list[str]) -> np.ndarray:
    """MinHash signatures (n, NUM_HASHES) uint32. A text of fewer than NGRAM words has one shingle: all of it."""
    _keep_rensa_to_one_thread()
    return _sketch(*hash_ngrams(*hash_words(texts, at_least=NGRAM), NGRAM))


def _sketch(shingles: np.ndarray, counts: np.ndarray) -> np.ndarray:
    offsets = np.concatenate([[0], np.cumsum(counts)]).astype(np.uint64)
    matrix = RMinHash.digest_matrix_from_flat_token_hashes(shingles, offsets, NUM_HASHES, SEED)
    return np.array(matrix.to_rows(), np.uint32).reshape(-1, NUM_HASHES)  # the only way out: 6 µs a document


@cache
def _keep_rensa_to_one_thread() -> None:
    """A thread pool does not survive a fork: after a first large call here, a forked worker's (`num_proc` of datasets)
    would wait for it for ever. The pool takes its size from the environment at that call, and one of one thread is
    not used.
    """
    before = os.environ.get("RAYON_NUM_THREADS")
    os.environ["RAYON_NUM_THREADS"] = "1"
    _sketch(np.zeros(2**17, np.uint64), np.full(2**10, 2**7))
    if before is None:
        del os.environ["RAYON_NUM_THREADS"]
    else:
        os.environ["RAYON_NUM_THREADS"] = before


def find_near_duplicates(
    signatures: Sequence[np.ndarray], lengths: np.ndarray, candidates: np.ndarray, threshold: float = THRESHOLD
) -> np.ndarray:
    """For each document, the one that stands for its cluster: the longest, and the first of equally long ones.

    `signatures`: chunks (n_i, NUM_HASHES) uint32 whose n_i add up to N, mapped from a file, as they are read 32 times,
    in order; `lengths` (N,); `candidates` (N,) bool. Returns (N,) int64: its own index for each document that is kept,
    and for each that is no candidate. Needs 40 (no duplicates) to 58 bytes per document meanwhile.

    The documents of a bucket, those that agree in a band, are compared each with the one before it: linear in N, also
    where a million of them share a licence header. What such a bucket hides, others show: a band with one hash that is
    not of the header is enough. Two documents are linked when at least `threshold` of their hashes are equal (below 0.5
    the bands begin to miss pairs), and a cluster is all that links connect: two edited copies of a text may be unlike,
    but both are like the text. What a chain has led astray, less than `threshold` - DRIFT like the document that stands
    for the cluster, is kept.
    """
    table = _SignatureTable(signatures)
    members = np.flatnonzero(candidates).astype(np.uint32)
    root = np.arange(len(members), dtype=np.uint32)  # of each member, an earlier one of its cluster; see `_join`
    for band in range(BANDS):
        order, later = _sort_into_buckets(table.band_keys(candidates, band))
        for start in range(0, len(later), BLOCK):
            part = later[start : start + BLOCK]
            left, right = order[part], order[part - 1]
            apart = _find(root, left) != _find(root, right)
            left, right = left[apart], right[apart]
            alike = table.similarity(members[left], members[right]) >= threshold
            _join(root, left[alike], right[alike])
        del order, later

    root = _find(root, np.arange(len(members), dtype=np.uint32))
    best = _longest_of_each(root, lengths[members])
    cluster = np.arange(len(candidates))
    represented = np.flatnonzero(best != np.arange(len(members)))
    for start in range(0, len(represented), BLOCK):
        part = represented[start : start + BLOCK]
        left, right = members[part], members[best[part]]
        alike = table.similarity(left, right) >= threshold - DRIFT
        cluster[left[alike]] = right[alike]
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
        for places in np.split(order, np.flatnonzero(np.diff(block_of[order], prepend=-1)))[1:]:
            block = block_of[places[0]]
            rows[places] = self.blocks[block][documents[places] - self.offsets[block]]
        return rows


def _sort_into_buckets(keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The order that brings equal keys together, and the places in it whose key is that of the place before."""
    order = np.argsort(keys, kind="stable")
    keys = keys[order]
    same = np.zeros(len(keys), bool)
    same[1:] = keys[1:] == keys[:-1]
    return order, np.flatnonzero(same)


def _join(root: np.ndarray, left: np.ndarray, right: np.ndarray) -> None:
    """Union-find over whole arrays: joins the clusters of left[k] and right[k], of which the smaller root stays one."""
    while len(left):
        left, right = _find(root, left), _find(root, right)
        apart = left != right
        left, right = left[apart], right[apart]
        np.minimum.at(root, np.maximum(left, right), np.minimum(left, right))


def _find(root: np.ndarray, documents: np.ndarray) -> np.ndarray:
    """The roots of these documents; halves the ways of all of them on the way, so that chains cost a logarithm."""
    while True:
        parents = root[documents]
        grandparents = root[parents]
        if (parents == grandparents).all():
            return parents
        root[documents] = grandparents


def _longest_of_each(root: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """For each document, the first of the longest documents with the same root."""
    longest = np.zeros(len(root), lengths.dtype)
    np.maximum.at(longest, root, lengths)
    is_longest = np.flatnonzero(lengths == longest[root])
    del longest
    best = np.full(len(root), len(root), np.uint32)
    np.minimum.at(best, root[is_longest], is_longest.astype(np.uint32))
    return best[root]
