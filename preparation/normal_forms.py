"""Unicode's normal forms in time that grows with the text."""

import unicodedata
from collections.abc import Iterator
from typing import Literal

# Sorting the marks on one character takes time that grows with the square of their number. No language needs more
# (Unicode Standard Annex #15, Stream-Safe Text Format).
MAX_MARKS = 30
# Unicode's class for these is 0, but they decompose to marks: Tibetan vowels, and Japanese voicing of half width.
DECOMPOSE_TO_MARKS = "\u0f73\u0f75\u0f81\uff9e\uff9f"


def to_form(form: Literal["NFC", "NFKC"], text: str) -> str:
    """`unicodedata.normalize`, except that runs of more than MAX_MARKS combining marks stay as they are."""
    if text.isascii():
        return text
    parts, done = [], 0
    for start, end in _iter_long_runs(text):
        parts += [unicodedata.normalize(form, text[done:start]), text[start:end]]
        done = end
    return "".join([*parts, unicodedata.normalize(form, text[done:])])


def _iter_long_runs(text: str) -> Iterator[tuple[int, int]]:
    """Start and end of each run of more than MAX_MARKS combining marks. It holds one of the places looked at."""
    end = 0
    for place in range(0, len(text), MAX_MARKS + 1):
        if place < end or not _is_mark(text[place]):
            continue
        start, end = place, place + 1
        while start and _is_mark(text[start - 1]):
            start -= 1
        while end < len(text) and _is_mark(text[end]):
            end += 1
        if end - start > MAX_MARKS:
            yield start, end


def _is_mark(character: str) -> bool:
    return unicodedata.combining(character) != 0 or character in DECOMPOSE_TO_MARKS
