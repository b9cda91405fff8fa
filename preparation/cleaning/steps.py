"""Cleaning: named steps over batches of documents, each a filter or a transformation (text to text, idempotent)."""

import itertools
import re
from collections.abc import Callable, Container, Iterable
from functools import partial
from typing import Any

import numpy as np

from preparation.cleaning.filters import FILTERS, Verdict, language, length, licence
from preparation.cleaning.personal_data import mask_personal_data
from preparation.normal_forms import to_form
from preparation.recipe import CleaningConfig
from preparation.sources.conversations import assistant_text, lacks_content, map_contents
from utils.cli import nearest

# Unicode's category Cc (controls) except tab and newline, soft hyphens, and the zero-width characters that no script
# needs: WORD JOINER, BYTE ORDER MARK, and ZERO WIDTH SPACE outside of SPACELESS. The joiners U+200C and U+200D are part
# of words and emoji, so they stay.
SHOWN_HYPHENS = re.compile("\xad(?=[ \t]*\n)")
CONTROL_CHARACTERS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\xad\u2060\ufeff]")
ANY_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\xad\u200b\u2028\u2029\u2060\ufeff]")
LINE_ENDS = re.compile("\r\n?|[\u2028\x85]")
# Form feed, the separators of files and groups, U+2029; a newline beside them is part of the same break.
PARAGRAPH_ENDS = re.compile("\n?[\f\x1c\x1d\u2029]\n?")
LINE_SEPARATORS = re.compile("[\v\x1e]")
# ECMA-48: control sequences (CSI), strings up to their end (OSC, as in hyperlinks; DCS, SOS, PM, APC), and short ones.
TERMINAL_ESCAPES = re.compile(
    r"\x1b(?:\[[0-?]*[ -/]*([@-~]?)|\][^\x07\x1b\n]*(?:\x07|\x1b\\)|[PX^_][^\x1b\n]*\x1b\\|[#-/]+[0-~]|[0-Z\\-~])"
)
MOVES = {"C": " ", "G": "\n", "H": "\n", "f": "\n"}  # of the cursor: forward; to another column or place
# Letters printed twice for bold, or over a line, as `man` and nroff write them. Other backspaces are left to
# CONTROL_CHARACTERS: they come from "\beta" in JSON, where nothing was struck over.
OVERSTRUCK = re.compile(r"(?:_\x08)+([^\n\x08])(?:\x08(?:\1|_))*|([^\s\x08])(?:\x08(?:\2|_))+|\+\x08o|o\x08\+")
# Thai, Lao, Burmese, Khmer, and the other scripts of class SA in Unicode's line breaking; Balinese, Javanese, Cham.
# Here a ZERO WIDTH SPACE is the border of two words, which nothing else shows.
_SPACELESS = "[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u1950-\u19ff\u1a20-\u1aaf\u1b00-\u1b7f\ua980-\uaadf]"
ZERO_WIDTH_SPACES = re.compile(f"((?<={_SPACELESS})\u200b)\u200b*(?={_SPACELESS})|\u200b+")
BLANK_LINES = re.compile(r"\n{3,}")
NOT_BASIC = re.compile(r"[^\w\s.,!?;:()\-']")

# ftfy only repairs text that was decoded with the wrong encoding. Its other repairs are off: quotes, ligatures and
# half-width punctuation (，！ to ,!) change the spelling, which is wrong in Chinese and Japanese; &lt; and escape
# sequences belong in texts about HTML and terminals; line ends, controls and NFC have their own steps.
FTFY_OPTIONS: dict[str, Any] = {
    "unescape_html": False, "remove_terminal_escapes": False, "fix_latin_ligatures": False, "uncurl_quotes": False,
    "fix_character_width": False, "fix_line_breaks": False, "fix_surrogates": False, "remove_control_chars": False,
    "normalization": None,
}  # fmt: skip

BOILERPLATE_LINE = 120  # characters; a longer line is prose that mentions such things
_SITE = r"(?:twitter|x|facebook|linked ?in|reddit|pinterest|whatsapp|tumblr|telegram|instagram|youtube|e-?mail)"
_LINK = (
    r"(?:home|next|prev(?:ious)?|back|up|top|index|contents|menu|search|help|faqs?|about(?: us)?|contact(?: us)?"
    r"|site ?map|log ?in|sign ?(?:in|up)|register|privacy(?: policy)?|cookies?(?: policy| settings)?|imprint|disclaimer"
    r"|terms(?: (?:of (?:use|service)|(?:and|&) conditions))?|accessibility|careers|press|blog|advertis(?:e|ing))"
)
# Lines that are boilerplate from end to end, in lower case: strings that such a line contains (checked first, because
# it is cheap) and a pattern for the whole line. Prose about cookies or copyright must survive.
_BOILERPLATE = [
    (("|", " · ", " • ", " » ", " / "), rf"[^\w|]*{_LINK}(?:[ \t]*[|·•»/][ \t|·•»/]*{_LINK})+[\W_]*"),
    (("skip to", " top"), r"skip to (?:main |the )?content|(?:back|return|go) to (?:the )?top(?: of (?:the )?page)?"),
    (("terms", "privacy"), r"(?:terms (?:of (?:use|service)|(?:and|&) conditions)|privacy (?:policy|statement))\.?"),
    (("copyright", "©", "(c)"), r"(?:copyright(?: ?(?:©|\(c\)))?|©|\(c\))[ :]*(?:19|20)\d\d\b.*"),
    (("all rights reserved",), r".{0,60}\ball rights reserved\b.{0,30}"),
    (("cookie",), r"(?:this|our) (?:web)?(?:site|page) uses cookies\b.*|(?:accept|reject|manage)(?: all)? cookies\.?"
                  r"|cookie (?:policy|settings|preferences)\.?"),
    (("cookie",), r"(?:by |we use )(?:.*\b)?cookies\b.*\b(?:experience|(?:web)?site|browsing|consent|policy|traffic"
                  r"|personali[sz]e|accept|advertis).*"),
    (("javascript",), r"(?:please )?(?:enable|turn on|activate) javascript\b.*|(?:.{0,40}\b)?javascript "
                      r"(?:must be|needs to be|is (?:currently )?(?:disabled|required|not enabled))\b.*"),
    (("share ", "us on "), rf"(?:share|follow|like|find|join)(?: (?:this|us|it|on|to|via|with|page|article|post))*:? "
                           rf"{_SITE}(?:(?:,|/| and| or)* {_SITE})*[.!]?|share this(?: (?:page|post))?[:.!]?"),
    (("newsletter",), r"(?:subscribe to|sign up (?:for|to)) (?:our|the) (?:(?:free|weekly|monthly) )*newsletter\b.*"),
    (("read more", "click here", "leave a ", "advertisement"),
     r"(?:read more|click here|leave a (?:comment|reply))[ .…»>→]*|advertisement"),
]  # fmt: skip
BOILERPLATE = [(hint, re.compile(form)) for hints, form in _BOILERPLATE for hint in hints]

C4_NOTICES = re.compile(r"javascript|terms of use|(?:privacy|cookie) policy|uses? (?:of )?cookies", re.IGNORECASE)


def fix_unicode(text: str) -> str:
    """Repair mojibake, UTF-8 that was decoded with another encoding ("schÃ¶n"), line by line with ftfy."""
    if text.isascii():
        return text
    import ftfy  # a slow import that checking a configuration does not need

    return "\n".join([line if line.isascii() else ftfy.fix_text(line, **FTFY_OPTIONS) for line in text.split("\n")])


def unify_line_ends(text: str) -> str:
    return text if text.isascii() and "\r" not in text else LINE_ENDS.sub("\n", text.replace("\u2029", "\n\n"))


def remove_controls(text: str) -> str:
    """Turn controls into what they mean: a form feed ends a paragraph; carriage return, vertical tab and record
    separator end a line; a unit separator is a space; letters struck over are one letter. Remove the other controls,
    terminals' escape sequences, soft hyphens (a hyphen at the end of a line), and zero-width characters except joiners
    and borders of words in scripts without spaces."""
    if not ANY_CONTROL.search(text):
        return text
    text = TERMINAL_ESCAPES.sub(lambda match: MOVES.get(match[1], ""), text) if "\x1b" in text else text
    text = OVERSTRUCK.sub(lambda match: match[1] or match[2] or "•", text) if "\b" in text else text
    text = PARAGRAPH_ENDS.sub("\n\n", LINE_SEPARATORS.sub("\n", unify_line_ends(text))).replace("\x1f", " ")
    text = CONTROL_CHARACTERS.sub("", SHOWN_HYPHENS.sub("-", text))
    return ZERO_WIDTH_SPACES.sub(r"\1", text)


def nfc(text: str) -> str:
    """Unicode normalization form C; a run of more than 30 combining marks stays as it is."""
    return to_form("NFC", text)


def tidy_whitespace(text: str) -> str:
    """Unify line ends; remove trailing spaces, repeated blank lines and blank lines at the ends. Indents stay, and so
    do two spaces that end a line before another one: Markdown's hard break."""
    raw = unify_line_ends(text).split("\n")
    lines = [line.rstrip(" \t") for line in raw]
    if "  \n" in text or "  \r" in text:
        triples = zip(raw, lines, itertools.chain(lines[1:], [""]), strict=True)
        lines = [before if line and after and before == line + "  " else line for before, line, after in triples]
    return BLANK_LINES.sub("\n\n", "\n".join(lines)).strip("\n")


def tidy_code(text: str) -> str:
    """`tidy_whitespace` for code, where blank lines have a meaning: they stay, except at the ends."""
    return "\n".join([line.rstrip(" \t") for line in unify_line_ends(text).split("\n")]).strip("\n")


def basic(text: str) -> str:
    """One line of words and plain punctuation. Deletes about an eighth of ordinary prose, including every newline."""
    return " ".join(nfc(NOT_BASIC.sub("", nfc(text))).split())


def remove_boilerplate(text: str) -> str:
    """Remove lines that are web page boilerplate from end to end: cookie notices, copyright, navigation."""
    lower = text.lower()
    short = [line if len(line) <= BOILERPLATE_LINE else "" for line in lower.split("\n")]
    forms = [(hint, form) for hint, form in BOILERPLATE if hint in lower]
    found = {i for hint, form in forms for i, line in enumerate(short) if hint in line and form.fullmatch(line.strip())}
    return _keep_lines(text, [i not in found for i in range(len(short))]) if found else text


def c4_lines(text: str) -> str:
    """Keep blank lines, and those that end like a sentence, have five words and are no notice: C4's rules for lines
    (Raffel et al. 2019, arXiv 1910.10683, section 2.2, and the released code)."""
    lines = text.split("\n")
    keep = [not line.strip() or _is_c4_line(line.strip()) for line in lines]
    return text if all(keep) else _keep_lines(text, keep)


def _is_c4_line(line: str) -> bool:
    ends = line.endswith((".", "!", "?", '"', "”")) and not line.endswith("...")
    return ends and len(line.split(None, 5)) >= 5 and not C4_NOTICES.search(line)


def _keep_lines(text: str, keep: list[bool]) -> str:
    return BLANK_LINES.sub("\n\n", "\n".join(itertools.compress(text.split("\n"), keep))).strip("\n")


_STEPS = (fix_unicode, remove_controls, nfc, tidy_whitespace, basic, remove_boilerplate, c4_lines, mask_personal_data)
TRANSFORMATIONS: dict[str, Callable[[str], str]] = {step.__name__: step for step in _STEPS}
# In this order: removing a character may join a letter and its accent, or leave a space at the end of a line.
STANDARD = ["fix_unicode", "remove_controls", "nfc", "tidy_whitespace"]
PROSE_STEPS = {"remove_boilerplate", "c4_lines", "c4", "gopher_quality", "gopher_repetition", "fineweb", "language"}
CODE_STEPS = {"generated_code", "code_lines", "licence"}
EMPTY = "empty after cleaning"


def expand_steps(steps: Iterable[str]) -> list[str]:
    """The steps by their own names: "standard" is short for those in STANDARD."""
    return [name for step in steps for name in (STANDARD if step == "standard" else [step])]


def check_steps(steps: Iterable[str]) -> list[str]:
    """The problems with a list of steps, one line each. Imports nothing slow."""
    known = ["standard", *TRANSFORMATIONS, *FILTERS]
    problems, expanded = [], expand_steps(steps)
    for name in dict.fromkeys(expanded):
        if name not in known:
            problems.append(f"cleaning: unknown step {name!r}{nearest(name, known)}; known are {', '.join(known)}")
        elif expanded.count(name) > 1:
            problems.append(f"cleaning: {name} is given twice (standard includes {', '.join(STANDARD)})")
    return problems


def clean_documents(
    batch: dict[str, list], config: CleaningConfig, code_sources: Container[str] = (), conversations: bool = False
) -> dict[str, Any]:
    """Columns text, source, id → the same columns and reason, changed.

    The cleaning of a dropped document ends where it was dropped; `reason` says why, "" if it is kept. Bit i of
    `changed` (uint32) is set if step i of `expand_steps(config.steps)` changed the text. PROSE_STEPS skip documents
    whose source is in `code_sources`; CODE_STEPS skip the others. In `conversations`, transformations change each
    message, and filters judge only what the assistant says, since only that is trained on.
    """
    filters: dict[str, Callable[[str], Verdict]] = FILTERS | {
        "language": partial(language, languages=config.languages, min_score=config.min_language_score),
        "length": partial(length, min_characters=config.min_characters, max_characters=config.max_characters),
        "licence": partial(licence, licences=config.licences),
    }
    steps = list(enumerate(expand_steps(config.steps)))
    texts, reasons, changes = [], [], []
    for raw, source in zip(batch["text"], batch["source"], strict=True):
        text, reason, changed = encodable(raw or ""), "", 0
        skipped = PROSE_STEPS if source in code_sources else CODE_STEPS
        for index, name in steps:
            if name in skipped:
                continue
            if name in TRANSFORMATIONS:
                step = tidy_code if name == "tidy_whitespace" and source in code_sources else TRANSFORMATIONS[name]
                before, text = text, map_contents(text, step) if conversations else step(text)
                changed |= (text != before) << index
            elif (verdict := filters[name](assistant_text(text) if conversations else text)) is not True:
                reason = verdict[1]
                break
        is_empty = lacks_content(text) if conversations else not text.strip()
        texts.append(text)
        reasons.append(EMPTY if is_empty else reason)
        changes.append(changed)
    return {
        "text": texts, "source": batch["source"], "id": batch["id"], "reason": reasons,
        "changed": np.array(changes, dtype=np.uint32),
    }  # fmt: skip


def encodable(text: str) -> str:
    """`text` as UTF-8 can express it: surrogate pairs become their character, lone surrogates U+FFFD."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    return text
