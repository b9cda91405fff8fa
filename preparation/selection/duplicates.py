"""Duplicates and evaluation text, recognized by the words that documents share.

Exact duplicates have equal digests of their text, in which white space does not count. The digest of a text's words
decides about the split, so that variants of one text are in the same split. Near duplicates are found by MinHash
(Broder 1997) and locality-sensitive hashing. How the numbers were chosen:

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
  to 8 words, any edit in the middle makes a different text. Texts of fewer than 3 words must be equal.
- Numbers and symbols say what a text is about where the rest is a form: exercises, records, `C++` and `C#`. Two texts
  are therefore kept if they fall below the threshold with each mark counted 8 times more. A mark is a number or a
  symbol, and the word after it. Edits spread over a text change a smaller share of the marks than of the 3-grams, so
  marks decide only if they were changed more often than words. Measured on generated texts: of 1,217 equations, none
  is dropped (226 if all words count alike); of 1,292 exercises of 54 words and 3 numbers, those that have two numbers
  in common (319; 1,291); pages that differ in a page counter are found from 40 words on, pages with another date from
  60 or 80 words on (two or three numbers).

A training document is contaminated if it contains a share of an *evaluation* document's 13-grams of words, the length
that GPT-3's authors chose (Brown et al. 2020, arXiv 2005.14165, appendix C): a long page that quotes a whole test item
is dropped, however small a part of the page the item is. A licence header or a quotation that both documents contain is
only a part of the item. Evaluation documents of fewer than 13 words are not checked: such a sentence occurs in
unrelated texts, and documents of the same words are in the same split.

Hashes depend on the words alone, not on the process, machine or batch (for the rarest characters they also depend on
Python's Unicode tables).
"""

import os
import re
import unicodedata
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from hashlib import blake2b
from itertools import chain

import numpy as np
from rensa import RMinHash

from preparation.normal_forms import to_form

DIGEST_BYTES = 16
NGRAM = 3
BANDS, ROWS = 32, 4
NUM_HASHES = BANDS * ROWS
MARK_HASHES = 64
MARK_WEIGHT = 8
SIGNATURE = NUM_HASHES + MARK_HASHES + 2  # and the number of words and of marks
THRESHOLD = 0.55
DRIFT = 0.15
SEED = 1
BLOCK = 2**13  # documents compared at a time, 6 MB of signatures
EVALUATION_NGRAM = 13
SKETCH_SIZE = 64  # 13-grams per evaluation document
MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)  # 2^64 / golden ratio, odd: multiplication by it loses no bits
LETTER = re.compile(r"[^\W\d_]")
DIGIT = re.compile(r"\d")
# Signs of numbers (no hyphen, no dash); symbols with the beginning of the next word. Both regular expressions begin with
# a set of characters, which `re` finds fast.
SIGN = re.compile(r"[-\u2212](?<![\w)\]].)\d+")
SYMBOLS = re.compile(
    r"([$+<=>~&#%@/\\^|*\u00a2-\u00a5\u00ac\u00b0\u00b1\u00d7\u00f7\u20a0-\u20cf\u2190-\u2bff\U0001f000-\U0001faff]+)"
    r"[\s\u200d\ufe0e\ufe0f]*(\w{0,8})"
)
RULE = re.compile(r"[=~^+*#<>|/\\\u25a0-\u25ff]{3,}|\|")
BULLET = re.compile(r"[\x21-\x7e\u25a0-\u25ff]+")
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
    """64 bits of BLAKE2b, of which the lowest is replaced: it says whether the word has a digit."""
    value = int.from_bytes(blake2b(word.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little")
    return value & ~1 | (DIGIT.search(word) is not None)


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
    """The words of a text (see `split_words`) joined by single spaces.

    Equal for texts that differ only in case, width, line breaks, punctuation or symbols; also for code with other
    operators and indents, but the same names, keywords and numbers in order.
    """
    return " ".join(split_words(text))


def find_symbols(text: str) -> Iterator[str]:
    """Symbols that carry meaning, each with the beginning of the word after it (`++ is`, `&& b`, `😀 `), and numbers with
    a sign (`-5`). Markup does not count: rules, tables, bullets at the beginning of a line, *emphasis*."""
    text = text if text.isascii() else unicodedata.normalize("NFKC", text)
    for sign in SIGN.findall(text):
        yield sign.replace("\u2212", "-")
    for found in SYMBOLS.finditer(text):
        symbols, word = found.groups()
        start, end = found.span(1)
        before, after = text[start - 1 : start], text[end : end + 1]
        if RULE.fullmatch(symbols) or (symbols == "+" and "-" in before + after):
            continue
        if after.isspace() and BULLET.fullmatch(symbols) and not text[text.rfind("\n", 0, start) + 1 : start].strip():
            continue
        if symbols.strip("*") or (before.isspace() and after.isspace()) or (before.isalnum() and after.isalnum()):
            yield f"{symbols} {word.casefold()}"


def hash_words(texts: list[str], at_least: int = 0, digests: bytearray | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Word hashes of all texts, concatenated (W,) uint64, and the number of words of each text, (n,) int64. A text of
    fewer than `at_least` words becomes one hash of its exact form, padded with zeros. The digest of each
    text's words is appended to `digests`, as splitting takes long."""
    hashes, ends = array("Q"), [0]
    for text in texts:
        words = split_words(text)
        if digests is not None:
            digests += _blake(" ".join(words))
        if len(words) < at_least:
            hashes.extend([int.from_bytes(digest_exact(text)[:8]) & ~1, *[0] * (at_least - 1)])
        else:
            hashes.extend(map(hash_word, words))
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
    """128 bits of BLAKE2b of the normalized text."""
    return _blake(normalize(text))


def digest_exact(text: str) -> bytes:
    """128 bits of BLAKE2b of the text with all white space as single spaces, which are equal for exact duplicates."""
    return _blake(" ".join(text.split()))


def _blake(text: str) -> bytes:
    return blake2b(text.encode("utf-8", "surrogatepass"), digest_size=DIGEST_BYTES).digest()


def digest_documents(texts: list[str], function: Callable[[str], bytes] = digest) -> np.ndarray:
    """The digest of each text, (n, 16) uint8."""
    return np.frombuffer(b"".join(map(function, texts)), np.uint8).reshape(-1, DIGEST_BYTES)


def first_of_each(digests: np.ndarray) -> np.ndarray:
    """Digests (N, 16) uint8 → (N,) bool: True for the first of each. Takes 44 bytes per document while it runs."""
    order = np.lexsort(np.ascontiguousarray(digests).view(np.uint64).T)  # stable: equal ones keep their order
    ordered = digests[order]
    first = np.ones(len(digests), bool)
    first[order[1:]] = (ordered[1:] != ordered[:-1]).any(axis=1)
    return first


def sketch_documents(texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """Digests (n, 16) uint8 and signatures (n, SIGNATURE) uint32: NUM_HASHES MinHashes of the shingles, MARK_HASHES of
    the marks, the number of words, the number of marks. A text of fewer than NGRAM words is one shingle."""
    _keep_rensa_to_one_thread()
    digests = bytearray()
    words, lengths = hash_words(texts, NGRAM, digests)
    shingles, counts = hash_ngrams(words, lengths, NGRAM)
    marks, mark_counts = _hash_marks(texts, words, lengths)
    sizes = np.stack([lengths, mark_counts], axis=1).astype(np.uint32)
    signatures = [_sketch(shingles, counts), _sketch(marks, mark_counts, MARK_HASHES), sizes]
    return np.frombuffer(digests, np.uint8).reshape(-1, DIGEST_BYTES), np.concatenate(signatures, axis=1)


def _hash_marks(texts: list[str], words: np.ndarray, lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Hashes of the distinct marks of each text, concatenated (M,) uint64, and their number for each text, (n,) int64.
    A mark is a word with a digit, or a symbol, and what follows it."""
    numbers = np.flatnonzero(words & np.uint64(1))
    following = np.append(words[1:], np.uint64(0))
    following[np.cumsum(lengths) - 1] = 0
    # A symbol is three marks, so that it outweighs its neighbours: `€5` and `5`, `2 + x = 4` and `2 / x = 4` differ.
    symbols = [[hash_word(mark + copy) for mark in find_symbols(text) for copy in ("", " ", "  ")] for text in texts]
    marks = [words[numbers] * MULTIPLIER + following[numbers], np.array([*chain.from_iterable(symbols)], np.uint64)]
    index = np.arange(len(texts))
    owners = np.append(np.repeat(index, lengths)[numbers], np.repeat(index, list(map(len, symbols))))
    found = np.unique(np.stack([owners.astype(np.uint64), np.concatenate(marks)]), axis=1)
    return np.ascontiguousarray(found[1]), np.bincount(found[0].astype(np.int64), minlength=len(texts))


def _sketch(shingles: np.ndarray, counts: np.ndarray, num_hashes: int = NUM_HASHES) -> np.ndarray:
    offsets = np.concatenate([[0], np.cumsum(counts)]).astype(np.uint64)
    matrix = RMinHash.digest_matrix_from_flat_token_hashes(shingles, offsets, num_hashes, SEED)
    return np.array(matrix.to_rows(), np.uint32).reshape(-1, num_hashes)  # rensa has no faster way: 6 µs per document


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

    `signatures`: chunks (n_i, SIGNATURE) uint32 whose n_i add up to N, memory-mapped, as they are read 32 times in
    order; `lengths` (N,); `candidates` (N,) bool. Returns (N,) int64: its own index for each document that is kept and
    for each that is no candidate. Takes 40 (no duplicates) to 58 bytes per document while it runs.

    The documents that agree in a band form a bucket. Each is compared only with the one before it, which keeps the time
    linear in N, even where a million documents share a licence header; another band finds a pair missed there. Two
    documents are linked if their similarity is at least `threshold` (below 0.5 the bands begin to miss pairs); a cluster
    is everything that links connect. A document at the end of such a chain is kept if its similarity to the
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
            alike = table.are_alike(members[left], members[right], threshold)
            _join(root, left[alike], right[alike])
        del order, later

    root = _find(root, np.arange(len(members), dtype=np.uint32))
    best = _longest_of_each(root, lengths[members])
    cluster = np.arange(len(candidates))
    represented = np.flatnonzero(best != np.arange(len(members)))
    for start in range(0, len(represented), BLOCK):
        part = represented[start : start + BLOCK]
        documents, kept = members[part], members[best[part]]
        alike = table.are_alike(documents, kept, threshold, DRIFT)
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

    def are_alike(self, left: np.ndarray, right: np.ndarray, threshold: float, drift: float = 0) -> np.ndarray:
        """Whether the estimated similarity of documents left[i] and right[i] is at least `threshold` - `drift`, and at
        least `threshold` with the marks weighed more, unless these are more alike than the rest."""
        rows, others = self._rows(left), self._rows(right)
        equal = rows[:, :-2] == others[:, :-2]
        alike, marks_alike = equal[:, :NUM_HASHES].mean(axis=1), equal[:, NUM_HASHES:].mean(axis=1)
        sizes = rows[:, -2:].astype(float) + others[:, -2:]
        words = sizes[:, 0] / (1 + alike)  # |A ∪ B| = (|A| + |B|) / (1 + J)
        marks = MARK_WEIGHT * sizes[:, 1] / (1 + marks_alike)
        weighted = (alike * words + marks_alike * marks) / (words + marks)
        return (alike >= threshold - drift) & ((weighted >= threshold) | (marks_alike >= alike))

    def _rows(self, documents: np.ndarray) -> np.ndarray:
        rows = np.empty((len(documents), SIGNATURE), np.uint32)
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
