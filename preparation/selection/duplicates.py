"""Duplicates and evaluation text, recognized by the words that documents share.

Exact duplicates have equal digests of their words. Near duplicates are found by MinHash (Broder 1997) and
locality-sensitive hashing. How the numbers were chosen:

- Shingles are 3-grams of words. Editing one word changes n shingles, so two texts that differ in a share e of their
  words have J = q / (2 - q) of the shingles in common, with q = (1 - e)^n. For e = 5 % and 30 % that is 0.82 and 0.32
  with n = 2 (where chance blurs the gap), 0.75 and 0.21 with n = 3, 0.63 and 0.09 with n = 5 (FineWeb's, arXiv
  2406.17557, which takes many more bands).
- The threshold 0.55 lies in that gap, below the 0.6 of a 40-word text with one edit more than its share. It corresponds
  to editing a tenth of the words. Two texts that share half of their words, such as a licence header, have J = 1/3 and
  are both kept.
- 128 hashes in 32 bands of 4 rows: two texts of similarity J agree in at least one band with probability
  1 - (1 - J^4)^32: 0.95 for J = 0.55, 0.99 for 0.6, 0.9998 for 0.7, 0.05 for 0.2. (FineWeb's 14 bands of 8 give 0.11,
  0.21 and 0.56.) Such pairs are compared by all 128 hashes: the share of equal hashes estimates J with a standard error
  of at most 0.044.
- Short texts: with 20 words, one edit gives J = 0.71; with 12 it gives 0.54, so half of such pairs are kept; with 3
  to 8 words, any edit in the middle makes a different text.

A training document is contaminated if it contains a share of an *evaluation* document's 13-grams of words, the length
that GPT-3's authors chose (Brown et al. 2020, arXiv 2005.14165, appendix C): a long page that quotes a whole test item
is dropped, however small a part of the page the item is. A licence header or a quotation that both documents contain is
only a part of the item. Evaluation documents of fewer than 13 words are not checked: such a sentence occurs in
unrelated texts, and a training document equal to it is an exact duplicate.

Hashes depend on the words alone, not on the process, machine or batch (for the rarest characters they also depend on
Python's Unicode tables).
"""

import os
import re
import unicodedata
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from hashlib import blake2b

import numpy as np
from rensa import RMinHash

from preparation.normal_forms import to_form

DIGEST_BYTES = 16
NGRAM = 3
BANDS, ROWS = 32, 4
NUM_HASHES = BANDS * ROWS
THRESHOLD = 0.55
DRIFT = 0.15
SEED = 1
BLOCK = 2**14  # documents compared at a time, 8 MB of signatures
EVALUATION_NGRAM = 13
SKETCH_SIZE = 64  # 13-grams per evaluation document
MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)  # 2^64 / golden ratio, odd: multiplication by it loses no bits
LETTER = re.compile(r"[^\W\d_]")
# NFKC turns a lone accent, as in ´quoted´, into a space and a combining mark.
LONE_MARKS = re.compile("[ \n\t][\u0300-\u036f\u064b-\u0652\u3099\u309a]+")
WITHOUT_SPACES = ("CJK ", "IDEOGRAPHIC ", "HIRAGANA ", "KATAKANA", "BOPOMOFO ", "THAI ", "LAO ", "KHMER ", "MYANMAR ")


class _Separated(dict[int, str]):
    """Translation table, filled on demand: characters that separate words become a space."""

    def __missing__(self, code: int) -> str:
        character = chr(code)
        category, name = unicodedata.category(character), unicodedata.name(character, "")
        if category == "Cf" or name.startswith("VARIATION SELECTOR"):
            result = ""  # soft hyphens, joiners and the like do not end a word
        elif category[0] not in "LMN":
            result = " "
        else:
            result = f" {character} " if name.startswith(WITHOUT_SPACES) else character
        self[code] = result
        return result


SEPARATED = _Separated()


@lru_cache(maxsize=2**17)  # some 25 MB per process
def hash_word(word: str) -> int:
    """64 bits of BLAKE2b."""
    return int.from_bytes(blake2b(word.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little")


def split_words(text: str) -> list[str]:
    """The words of a text: runs of letters, marks and numbers after NFKC and case folding.

    Each character of a script written without spaces (Chinese, Japanese, Thai, Lao, Khmer, Burmese) is a word.
    Punctuation, symbols and white space separate words and are dropped. In a text without letters only white space
    separates words, because texts such as `2 + 2` and `2 - 2` differ in nothing but symbols.
    """
    # NFKC again, because case folding can undo it (Unicode, chapter 3.13, on caseless matching).
    folded = to_form("NFKC", to_form("NFKC", text).casefold())
    if not folded.isascii():
        folded = LONE_MARKS.sub(" ", folded)
    return folded.translate(SEPARATED).split() if LETTER.search(folded) else folded.split()


def normalize(text: str) -> str:
    """The words of a text (see `split_words`) joined by single spaces, which are equal for exact duplicates.

    So texts that differ only in case, width, line breaks, punctuation or symbols are duplicates. In code this also
    ignores operators and indents: two files are duplicates if they have the same names, keywords and numbers in order.
    """
    return " ".join(split_words(text))


def hash_words(texts: list[str], at_least: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Word hashes of all texts, concatenated (W,) uint64, and the number of words of each text, (n,) int64. A text of
    fewer than `at_least` words is padded with zeros."""
    hashes, ends = array("Q"), [0]
    for text in texts:
        hashes.extend(map(hash_word, split_words(text)))
        hashes.extend([0] * (ends[-1] + at_least - len(hashes)))
        ends.append(len(hashes))
    return np.asarray(hashes), np.diff(ends)


def hash_ngrams(words: np.ndarray, lengths: np.ndarray, n: int) -> tuple[np.ndarray, np.ndarray]:
    """Hashes of the n-grams of all texts, concatenated (S,) uint64, and the number of n-grams of each text, (n,) int64.
    A hash is a polynomial of the words' hashes modulo 2^64. A text of fewer than n words has no n-gram."""
    counts = np.maximum(lengths - n + 1, 0)
    # The k-th n-gram of a text begins with its k-th word, so shift by how many fewer n-grams than words came before.
    firsts = np.arange(counts.sum()) + np.repeat(np.cumsum(lengths - counts) - (lengths - counts), counts)
    grams = words[firsts]
    for offset in range(1, n):
        grams *= MULTIPLIER
        grams += words[firsts + offset]
    grams ^= grams >> np.uint64(32)  # mixes the high bits into the low ones
    grams *= MULTIPLIER
    return grams, counts


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
    first = np.ones(len(digests), bool)
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
    """A worker forked after a first large call here would wait forever for its thread pool, which does not survive a
    fork. The pool takes its size from the environment at that call, and rensa does not use a pool of one thread."""
    before = os.environ.copy()
    os.environ["RAYON_NUM_THREADS"] = "1"
    _sketch(np.zeros(2**17, np.uint64), np.full(2**10, 2**7))
    del os.environ["RAYON_NUM_THREADS"]
    os.environ.update(before)


def find_near_duplicates(
    signatures: Sequence[np.ndarray], lengths: np.ndarray, candidates: np.ndarray, threshold: float = THRESHOLD
) -> np.ndarray:
    """For each document, the representative of its cluster: the longest document, and the first of equally long ones.

    `signatures`: chunks (n_i, NUM_HASHES) uint32 whose n_i add up to N, memory-mapped, as they are read 32 times in
    order; `lengths` (N,); `candidates` (N,) bool. Returns (N,) int64: its own index for each document that is kept and
    for each that is no candidate. Takes 40 (no duplicates) to 58 bytes per document while it runs.

    The documents that agree in a band form a bucket. Each is compared only with the one before it, which keeps the time
    linear in N, even where a million documents share a licence header; another band finds a pair missed there. Two
    documents are linked if at least `threshold` of their hashes are equal (below 0.5 the bands begin to miss pairs); a
    cluster is everything that links connect. A document at the end of such a chain is kept if its similarity to the
    representative is below `threshold` - DRIFT.
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
            for column in rows.T:
                part ^= column
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


@dataclass
class ContaminationIndex:
    """The 13-grams of E evaluation documents, P in all. Each takes 12 bytes, and 2 to 4 in the bitmap: at most 1 KB per
    document, and three times that while the index is built.

    In the bitmap, one of the 16 to 32 bits per 13-gram is set. For nearly every 13-gram of clean text the bit is unset,
    which saves a search in `hashes` with about twenty cache misses.
    """

    hashes: np.ndarray  # (P,) uint64, sorted; a 13-gram of several documents occurs several times
    owners: np.ndarray  # (P,) uint32: the number of the evaluation document, counted from 0
    sizes: np.ndarray  # (E,) number of 13-grams of each document; 0 for one that is too short to check
    bitmap: np.ndarray  # (2^b,) uint8


def build_index(batches: Iterable[list[str]]) -> ContaminationIndex:
    """Index the 64 13-grams with the smallest hashes of each evaluation document: a random sample (bottom-k sketch,
    Cohen and Kaplan 2007) that estimates the share another document contains with a standard error of at most 0.06.
    Documents of up to 76 words have no more 13-grams than that."""
    sketches = [np.empty(0, np.uint64)]
    for texts in batches:
        grams, counts = hash_ngrams(*hash_words(texts), EVALUATION_NGRAM)
        sketches += [np.unique(part)[:SKETCH_SIZE].copy() for part in np.split(grams, np.cumsum(counts))[:-1]]
    sizes = np.array([len(sketch) for sketch in sketches[1:]], np.int64)
    hashes = np.concatenate(sketches)
    sketches.clear()  # there may be a lot of evaluation text
    order = np.argsort(hashes, kind="stable")
    owners, hashes = np.repeat(np.arange(len(sizes), dtype=np.uint32), sizes)[order], hashes[order]
    bitmap = np.zeros(2 ** (len(hashes).bit_length() + 1), np.uint8)
    np.bitwise_or.at(bitmap, *_place_and_bit(hashes, bitmap))
    return ContaminationIndex(hashes, owners, sizes, bitmap)


def find_contaminated(texts: list[str], index: ContaminationIndex, overlap: float = 0.5) -> list[int]:
    """For each training document, the number of the evaluation document whose 13-grams it contains the largest share
    of, if that share is at least `overlap`; else -1."""
    grams, counts = hash_ngrams(*hash_words(texts), EVALUATION_NGRAM)
    found = [-1] * len(texts)
    place, bit = _place_and_bit(grams, index.bitmap)
    positions = np.flatnonzero(index.bitmap[place] & bit)
    grams = grams[positions]
    starts, stops = np.searchsorted(index.hashes, grams), np.searchsorted(index.hashes, grams, side="right")
    documents = np.searchsorted(np.cumsum(counts), positions, side="right")
    # Sorted by document, each 13-gram once, however often the document repeats it.
    hits = np.unique(np.stack([documents, starts, stops])[:, starts < stops], axis=1)
    for rows in np.split(hits, np.flatnonzero(np.diff(hits[0], prepend=-1)), axis=1)[1:]:
        owning = [index.owners[start:stop] for _, start, stop in rows.T.tolist()]
        owners, shared = np.unique(np.concatenate(owning), return_counts=True)
        shares = shared / index.sizes[owners]
        best = int(np.argmax(shares))  # the first of equals
        if shares[best] >= overlap:
            found[rows[0, 0]] = int(owners[best])
    return found


def _place_and_bit(hashes: np.ndarray, bitmap: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The place of each hash in the bitmap: the byte from its highest bits, the bit from its lowest three."""
    place = hashes >> np.uint64(65 - len(bitmap).bit_length())
    return place, np.uint8(1) << (hashes & np.uint64(7)).astype(np.uint8)
