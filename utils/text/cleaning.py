"""Cleaning rules: pure functions from text to text."""

import re
import unicodedata
from collections.abc import Callable

# Everything in Unicode's categories Cc (controls) but tab and newline, and the zero-width characters that no script
# needs: ZERO WIDTH SPACE, WORD JOINER, BYTE ORDER MARK. The joiners U+200C and U+200D spell words and emoji: kept.
CONTROL_CHARACTERS = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u200b\u2060\ufeff]")
LINE_ENDS = re.compile("\r\n?|\u2028|\u2029|\x85")
TRAILING_SPACE = re.compile(r"[ \t]+$", re.MULTILINE)
BLANK_LINES = re.compile(r"\n{3,}")
NOT_BASIC = re.compile(r"[^\w\s.,!?;:()\-']")


def clean_standard(text: str) -> str:
    """NFC, unified line ends, no control characters, no trailing space, at most one blank line; indents stay."""
    text = LINE_ENDS.sub("\n", text)
    text = unicodedata.normalize("NFC", CONTROL_CHARACTERS.sub("", text))
    text = TRAILING_SPACE.sub("", text)
    return BLANK_LINES.sub("\n\n", text).strip("\n")


def clean_basic(text: str) -> str:
    """One line of words and plain punctuation; deletes about an eighth of ordinary prose, every newline included."""
    text = NOT_BASIC.sub("", unicodedata.normalize("NFC", text))
    return " ".join(text.split())


RULES: dict[str, Callable[[str], str]] = {"standard": clean_standard, "basic": clean_basic}
