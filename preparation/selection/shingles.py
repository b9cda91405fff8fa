"""Words of any script, and hashes of their n-grams, by which near duplicates and contamination are measured.

Hashes depend on the words alone, not on the process, machine or batch (for the rarest characters they also depend on
Python's Unicode tables).
"""

import re
import unicodedata
from array import array
from functools import lru_cache
from hashlib import blake2b

import numpy as np

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
    folded = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())
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
    """Word hashes of all texts, concatenated (W,) uint64, and the number of words of each text, (n,) int64.

    A text of fewer than `at_least` words is padded with zeros.
    """
    hashes = array("Q")
    lengths = np.empty(len(texts), np.int64)
    for index, text in enumerate(texts):
        start = len(hashes)
        hashes.extend(map(hash_word, split_words(text)))
        hashes.extend([0] * (at_least - (len(hashes) - start)))
        lengths[index] = len(hashes) - start
    return np.asarray(hashes), lengths


def hash_ngrams(words: np.ndarray, lengths: np.ndarray, n: int) -> tuple[np.ndarray, np.ndarray]:
    """Hashes of the n-grams of all texts, concatenated (S,) uint64, and the number of n-grams of each text, (n,) int64.

    A hash is a polynomial of the words' hashes modulo 2^64, so it depends on their order. A text of fewer than n words
    has no n-gram.
    """
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
