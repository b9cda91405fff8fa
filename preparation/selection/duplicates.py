"""Exact duplicates by digest, near duplicates by MinHash (Broder 1997) and locality-sensitive hashing.

How the numbers were chosen:

- Shingles are 3-grams of words. Editing one word changes n shingles, so two texts that differ in a share e of their
  words have J = q / (2 - q) of the shingles in common, with q = (1 - e)^n. For e = 5 % and 30 % that is 0.82 and 0.32
  with n = 2, 0.75 and 0.21 with n = 3, 0.63 and 0.09 with n = 5 (FineWeb's, arXiv 2406.17557). Chance in where the
  edits fall blurs the gap for n = 2. For n = 5 the upper value is so low that finding it takes many more bands.
- The threshold 0.55 lies in that gap, below the 0.6 of a 40-word text with one edit more than its share. It corresponds
  to editing a tenth of the words. Two texts that share half of their words, such as a licence header, have J = 1/3 and
  are both kept.
- 128 hashes in 32 bands of 4 rows: two texts of similarity J agree in at least one band with probability
  1 - (1 - J^4)^32: 0.95 for J = 0.55, 0.99 for 0.6, 0.9998 for 0.7, 0.05 for 0.2. (FineWeb's 14 bands of 8 give 0.11,
  0.21 and 0.56.) Such pairs are compared by all 128 hashes: the share of equal hashes estimates J with a standard error
  of at most 0.044.
- Short texts: with 20 words, one edit gives J = 0.71; with 12 it gives 0.54, so half of such pairs are kept; with 3
  to 8 words, any edit in the middle makes a different text.
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
    """128 bits of BLAKE2b of the normalized text, which are equal for exact duplicates."""
    return blake2b(normalize(text).encode("utf-8", "surrogatepass"), digest_size=DIGEST_BYTES).digest()


def digest_documents(texts: list[str]) -> np.ndarray:
    """The digest of each text, (n, 16) uint8."""
    return np.frombuffer(b"".join(map(digest, texts)), np.uint8).reshape(-1, DIGEST_BYTES)


def first_of_each(digests: np.ndarray) -> np.ndarray:
    """Digests (N, 16) uint8 → (N,) bool: True for the first of each. Takes 44 bytes per document while it runs."""
    order = np.lexsort(np.ascontiguousarray(digests).view(np.uint64).T)  # stable: equal ones keep their order
    ordered = digests[order]
    first = np.empty(len(digests), bool)
    first[order[:1]] = True
    first[order[1:]] = (ordered[1:] != ordered[:-1]).any(axis=1)
    return first


def sketch_documents(texts: list[str]) -> np.ndarray:
    """MinHash signatures (n, NUM_HASHES) uint32. A text of fewer than NGRAM words is one shingle."""
    _keep_rensa_to_one_thread()
    return _sketch(*hash_ngrams(*hash_words(texts, at_least=NGRAM), NGRAM))


def _sketch(shingles: np.ndarray, counts: np.ndarray) -> np.ndarray:
    offsets = np.concatenate([[0], np.cumsum(counts)]).astype(np.uint64)
    matrix = RMinHash.digest_matrix_from_flat_token_hashes(shingles, offsets, NUM_HASHES, SEED)
    return np.array(matrix.to_rows(), np.uint32).reshape(-1, NUM_HASHES)  # rensa has no faster way: 6 µs per document


@cache
def _keep_rensa_to_one_thread() -> None:
    """A thread pool does not survive a fork: a worker forked after a first large call here (`num_proc` of datasets)
    would wait for its threads forever. The pool takes its size from the environment at that call, and rensa does not
    use a pool of one thread.
    """
    before = os.environ.get("RAYON_NUM_THREADS")
    os.environ["RAYON_NUM_THREADS"] = "1"
    _sketch(np.zeros(2**17, np.uint64), np.full(2**10, 2**7))
    del os.environ["RAYON_NUM_THREADS"]
    if before is not None:
        os.environ["RAYON_NUM_THREADS"] = before


def find_near_duplicates(
    signatures: Sequence[np.ndarray], lengths: np.ndarray, candidates: np.ndarray, threshold: float = THRESHOLD
) -> np.ndarray:
    """For each document, the representative of its cluster: the longest document, and the first of equally long ones.

    `signatures`: chunks (n_i, NUM_HASHES) uint32 whose n_i add up to N, memory-mapped, as they are read 32 times in
    order; `lengths` (N,); `candidates` (N,) bool. Returns (N,) int64: its own index for each document that is kept and
    for each that is no candidate. Takes 40 (no duplicates) to 58 bytes per document while it runs.

    The documents that agree in a band form a bucket. Each is compared only with the one before it in its bucket, which
    keeps the time linear in N, even where a million documents share a licence header. A pair missed in such a bucket is
    found in another band, if one of its hashes is not from the header. Two documents are linked if at least `threshold`
    of their hashes are equal (below 0.5 the bands begin to miss pairs); a cluster is everything that links connect,
    since two edited copies of a text may differ while both resemble the text. A document at the end of such a chain is
    kept if its similarity to the representative is below `threshold` - DRIFT.
    """
    table = _SignatureTable(signatures)
    members = np.flatnonzero(candidates).astype(np.uint32)
    root = np.arange(len(members), dtype=np.uint32)  # for each member, an earlier one of its cluster; see `_join`
    for band in range(BANDS):
        keys = table.band_keys(candidates, band)
        order = np.argsort(keys, kind="stable")  # buckets of equal keys
        keys = keys[order]
        later = np.flatnonzero(keys[1:] == keys[:-1]) + 1
        del keys
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
        documents, kept = members[part], members[best[part]]
        alike = table.similarity(documents, kept) >= threshold - DRIFT
        cluster[documents[alike]] = kept[alike]
    return cluster


class _SignatureTable:
    """Rows of signatures in many arrays, usually memory-mapped."""

    def __init__(self, chunks: Sequence[np.ndarray]) -> None:
        self.blocks = [chunk[start : start + BLOCK] for chunk in chunks for start in range(0, len(chunk), BLOCK)]
        self.offsets = np.cumsum([0, *map(len, self.blocks)])

    def band_keys(self, candidates: np.ndarray, band: int) -> np.ndarray:
        """A 64-bit hash of each candidate's rows of one band, (candidates,) uint64."""
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


def _join(root: np.ndarray, left: np.ndarray, right: np.ndarray) -> None:
    """Union-find over whole arrays: joins the clusters of left[k] and right[k] under the smaller root."""
    while len(left):
        left, right = _find(root, left), _find(root, right)
        apart = left != right
        left, right = left[apart], right[apart]
        np.minimum.at(root, np.maximum(left, right), np.minimum(left, right))


def _find(root: np.ndarray, documents: np.ndarray) -> np.ndarray:
    """The roots of these documents. Halves their paths on the way, so that a chain costs a logarithm."""
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
