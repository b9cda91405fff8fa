"""Words of any script, and hashes of their n-grams: what near duplicates and contamination are measured by.

Hashes are the same in every process, on every machine and for every batching: they depend on the words alone (and, for
the rarest characters, on the Unicode tables of the Python that runs).
"""

import re
import unicodedata
from array import array
from hashlib import blake2b

import numpy as np

MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)  # 2^64 / golden ratio, odd: multiplication by it loses no bits
CACHED_WORDS = 2**17  # some 25 MB per process
LETTER = re.compile(r"[^\W\d_]")
# NFKC makes a space and a combining mark of an accent that stands alone, as in ´quoted´.
LONE_MARKS = re.compile("[ \n\t][\u0300-\u036f\u064b-\u0652\u3099\u309a]+")
WITHOUT_SPACES = ("CJK ", "IDEOGRAPHIC ", "HIRAGANA ", "KATAKANA", "BOPOMOFO ", "THAI ", "LAO ", "KHMER ", "MYANMAR ")


class _Separated(dict[int, str]):
    """Translation table, filled as characters turn up: what separates words becomes a space."""

    def __missing__(self, code: int) -> str:
        character = chr(code)
        category, name = unicodedata.category(character), unicodedata.name(character, "")
        if category == "Cf" or name.startswith("VARIATION SELECTOR"):
            result = ""  # soft hyphens, joiners and the like are spelling, not ends of words
        elif category[0] not in "LMN":
            result = " "
        else:
            result = f" {character} " if name.startswith(WITHOUT_SPACES) else character
        self[code] = result
        return result


class _WordHashes(dict[str, int]):
    """64 bits of BLAKE2b of each word; forgets all when it is full, so that a process stays bounded."""

    def __missing__(self, word: str) -> int:
        if len(self) >= CACHED_WORDS:
            self.clear()
        hashed = blake2b(word.encode("utf-8", "surrogatepass"), digest_size=8).digest()
        self[word] = value = int.from_bytes(hashed, "little")
        return value


SEPARATED = _Separated()
WORD_HASHES = _WordHashes()


def split_words(text: str) -> list[str]:
    """The words of a text: runs of letters, marks and numbers after NFKC and case folding.

    Each character of a script that is written without spaces (Chinese, Japanese, Thai, Lao, Khmer, Burmese) is a word
    of its own. Punctuation, symbols and white space separate words and are dropped, except in a text without a single
    letter: `2 + 2` and `2 - 2`, or two rows of symbols, differ in nothing else, so there words are what white space
    separates.
    """
    # Case folding can leave what NFKC would compose again (Unicode, chapter 3.13, on caseless matching).
    folded = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())
    if not folded.isascii():
        folded = LONE_MARKS.sub(" ", folded)
    return folded.translate(SEPARATED).split() if LETTER.search(folded) else folded.split()


def normalize(text: str) -> str:
    """What two documents share when they are the same: their words (see `split_words`), one space between them.

    So texts that differ in case, width, line breaks, punctuation or symbols alone are equal. In code this ignores
    operators and indents, too: two files are the same when all names, keywords and numbers are, in the same order.
    """
    return " ".join(split_words(text))


def hash_words(texts: list[str], at_least: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Word hashes of all texts end to end, (W,) uint64, and the number of each text's words, (n,) int64.

    A text of fewer than `at_least` words is filled up with zeros.
    """
    hashes = array("Q")
    lengths = np.empty(len(texts), np.int64)
    for index, text in enumerate(texts):
        start = len(hashes)
        hashes.extend(map(WORD_HASHES.__getitem__, split_words(text)))
        hashes.extend([0] * (at_least - (len(hashes) - start)))
        lengths[index] = len(hashes) - start
    return np.asarray(hashes), lengths


def hash_ngrams(words: np.ndarray, lengths: np.ndarray, n: int) -> tuple[np.ndarray, np.ndarray]:
    """Hashes of the n-grams of all texts end to end, (S,) uint64, and the number of each text's, (n,) int64.

    A polynomial of the words' hashes modulo 2^64: it tells the order. A text of fewer than n words has none.
    """
    counts = np.maximum(lengths - n + 1, 0)
    # The k-th n-gram of a text begins with its k-th word; the texts before have so many fewer n-grams than words.
    firsts = np.arange(counts.sum()) + np.repeat(np.cumsum(lengths - counts) - (lengths - counts), counts)
    grams = words[firsts]
    for offset in range(1, n):
        grams *= MULTIPLIER
        grams += words[firsts + offset]
    grams ^= grams >> np.uint64(32)  # spreads the high bits to the low ones
    grams *= MULTIPLIER
    return grams, counts
