"""The main text of a web page: its markup without menus and lists of links, written as text by resiliparse.

One pass over the tags finds what to leave out, in time that grows with the page however deep its elements are nested.
It works on the markup because walking resiliparse's tree from Python takes ten times as long. docs/data.md has the
measurements on documentation pages.
"""

import html
import re
from collections import Counter
from typing import NamedTuple

TAG = re.compile(r"<(/?)([a-zA-Z][a-zA-Z0-9]*)([^<>]*)>([^<]*)")
# Elements whose inside is no markup, or not for reading.
_RAW = "script|style|textarea|title|iframe|noembed|noframes|xmp|template|svg|select|button"
RAW = re.compile(rf"<!--|<({_RAW})\b([^<>]*)>", re.IGNORECASE)
# XHTML's <a id="here"/> would stay open in HTML. Elements that are always empty stay as they are.
VOID = frozenset("area base br col embed hr img input link meta param source track wbr".split())  # noqa: SIM905
SELF_CLOSED = re.compile(rf"<(?!(?:{'|'.join(sorted(VOID))})\b)([a-zA-Z][\w:.-]*)(\s[^<>]*)?/>", re.IGNORECASE)
# Browsers' limit, too. A parser looks through all open elements at a misplaced tag, so its time grows with the depth.
MAX_DEPTH = 500
ENDS_BY_ITSELF = VOID.union(["a", "p", "li", "dt", "dd", "tr", "td", "th", "tbody", "thead", "tfoot", "option"])
CELLS = ("td", "th")
MEASURED = frozenset([
    "ul", "ol", "dl", "menu", "dir", "table", "td", "th", "div", "section", "article", "main", "nav", "header",
    "footer", "aside", "form", "p",
])  # fmt: skip
TITLES = ("h1", "h2")
BLOCKS = MEASURED.union([
    "li", "dt", "dd", "tr", "h1", "h2", "h3", "h4", "h5", "h6", "pre", "blockquote", "hr", "center", "tbody", "thead",
    "tfoot",
])  # fmt: skip
NAMES = re.compile(r"""\b(?:class|id|role)\s*=\s*("[^"]*"|'[^']*'|[^\s"'>]+)""", re.IGNORECASE)
ROLE_MAIN = re.compile(r"""\brole\s*=\s*["']?main\b""", re.IGNORECASE)
# Classes, ids and roles of what is not the page's own text. Prose may stand there, too: see `is_navigation`.
_PLACE = "(?:(?:main|top|side|page|site|bottom|small|sub|head|mobile|sphinx)[-_]?)?"
NAVIGATION = re.compile(
    rf"(?<![\w-]){_PLACE}(?:(?:nav|menu|navigation)(?:[-_]?(?:bar|panel|header|footer|links?|top|bottom|table|list|menu))?"
    r"|(?:side|tool|doc)-?(?:bar|nav)|search(?:[-_]?(?:box|bar|form))?|breadcrumbs?|pagination|pager|toc(?:[-_]?frame)?"
    r"|table[-_]?of[-_]?contents|quickview|related|path|mw-editsection|languages?)(?![\w-])",
    re.IGNORECASE,
)
FRAME = re.compile(
    rf"(?<![\w-]){_PLACE}(?:header|footer|banner|contentinfo|copyright|share|social|cookies?|(?:top|bottom)lang)(?![\w-])",
    re.IGNORECASE,
)
LIST_OF_LINKS = 0.75  # share of linked characters from which an element is left out, if it has two links or more
LINKED_DEFINITIONS = 0.95  # the same for a list of terms: a glossary may link all of its definitions
FEW_LINKS = 0.25  # the same for an element with a suggestive name and no title
SHORT = 600  # characters; a header or footer with less text and no title is left out
VERY_SHORT = 200  # the same for a menu with a link
ORDINAL = re.compile(r"(?:st|nd|rd|th|e|er|re|ère|ème|me|o|a|os|as|tm|sm|®|™|\W)\W*", re.IGNORECASE)
SIGN = re.compile(r"[\W_]{1,2}")
PLAIN_EXPONENT = re.compile(r"\s*[-+−]?\w+\s*")


class Page(NamedTuple):
    text: str
    kept: int  # characters of the text, without white space
    characters: int  # the same of the page with its navigation, without scripts


class _Element:
    __slots__ = ("all_linked", "all_text", "has_title", "is_main", "linked", "links", "name", "names", "start", "text")

    def __init__(self, name: str, start: int, names: str = "") -> None:
        self.name, self.start, self.names = name, start, names
        self.text = self.linked = self.links = 0  # characters, those in links, number of links
        self.all_text = self.all_linked = 0  # also those of inner elements that are left out
        self.has_title = self.is_main = False

    def is_navigation(self) -> bool:
        """Whether it is a menu, a list of links, a header or a footer."""
        share = self.linked / max(self.text, 1)
        most = LINKED_DEFINITIONS if self.name == "dl" else LIST_OF_LINKS
        if self.name == "nav" or (self.links >= 2 and share >= most):
            return True
        if self.has_title:
            return False
        if self.text < SHORT:  # what is left of a menu without its lists of links
            share = self.all_linked / max(self.all_text, 1)
        if self.name in ("header", "footer") or FRAME.search(self.names):
            return share >= FEW_LINKS or self.text < SHORT
        is_menu = share >= FEW_LINKS or (self.links > 0 and self.text < VERY_SHORT)
        return is_menu and NAVIGATION.search(self.names) is not None

    def add(self, inside: "_Element") -> None:
        self.text += inside.text
        if inside.name != "dl":  # a glossary counts as prose
            self.linked += inside.linked
            self.links += inside.links
        self.has_title |= inside.has_title


def read_page(markup: str) -> Page:
    """The main text of a page, and how much of the page it is."""
    from resiliparse.extract.html2text import extract_plain_text  # a slow import that only HTML needs
    from resiliparse.parse.html import HTMLTree

    markup = SELF_CLOSED.sub(_close, _without_raw(markup))
    scan = _Scan(markup)
    parts, done = [], 0
    for start, end, text in sorted(scan.edits, key=lambda edit: (edit[0], -edit[1])):
        if start >= done:
            parts += [markup[done:start], text]
            done = end
    tree = HTMLTree.parse("".join([*parts, markup[done:]]))
    text = extract_plain_text(tree, main_content=False, alt_texts=False)
    kept = len("".join(text.split()))
    return Page(text, kept, max(scan.characters, kept))


def decode_page(data: bytes) -> str:
    """The markup of a page in the encoding that it declares, or that resiliparse detects, unless it is UTF-8."""
    from resiliparse.parse.encoding import bytes_to_str, detect_encoding

    if b"\x1b" not in data:  # ISO-2022-JP is ASCII with escape sequences
        try:  # first, because the detection takes some pages in UTF-8 for Greek
            return data.decode("utf-8-sig")
        except UnicodeDecodeError:
            pass
    return bytes_to_str(data, detect_encoding(data, from_html_meta=True) or "utf-8")


def _close(match: re.Match) -> str:
    attributes = match[2] or ""
    return f"<{match[1]}{attributes}></{match[1]}>" if _closes_itself(attributes) else match[0]


def _closes_itself(attributes: str) -> bool:
    """Whether a slash after these attributes belongs to the tag; in <a href=/there/> it belongs to the value."""
    return attributes[-1:] in ("", *"\"' \t\r\n") or "=" not in attributes.rsplit(None, 1)[-1]


def _without_raw(markup: str) -> str:
    """`markup` without comments and the elements of RAW, also where they close themselves. A script that is never
    closed has the rest of the page, as in browsers; other elements that are never closed lose only their tag."""
    parts, done, unclosed = [], 0, set()
    for match in RAW.finditer(markup):
        if match.start() < done:
            continue
        name, attributes, end = (match[1] or "--").lower(), match[2] or "", match.end()
        if not (attributes.endswith("/") and _closes_itself(attributes[:-1])) and name not in unclosed:
            closing = re.compile("-->" if name == "--" else f"</{name}[^<>]*>", re.IGNORECASE).search(markup, end)
            if closing is not None:
                end = closing.end()
            elif name in ("script", "style"):
                end = len(markup)
            else:
                unclosed.add(name)
        parts.append(markup[done : match.start()])
        done = end
    return "".join([*parts, markup[done:]])


class _Scan:
    """One pass over the tags of `markup`: what to replace in it (start, end, text), and the number of characters that a
    reader sees, without white space."""

    def __init__(self, markup: str) -> None:
        self.markup = markup
        self.edits: list[tuple[int, int, str]] = []
        self.characters = 0
        self.stack, self.open_names = [_Element("", 0)], Counter[str]()  # of MEASURED
        self.mains: list[tuple[int, int, int]] = []  # characters outside of links, start, end
        self.link: int | None = None  # where the open link starts
        self.link_is_sign = False
        self.before = ""  # the text that ends where the tag begins, "" at the start of a block
        self.exponent_is_long = False
        depth, open_tags = 0, Counter[str]()
        for match in TAG.finditer(markup):
            closing, name, attributes, text = match.groups()
            name = name.lower()
            useless = False  # closes nothing, or is too deep
            if name not in ENDS_BY_ITSELF:
                step = -min(open_tags[name], 1) if closing else 1
                useless = not step or depth >= MAX_DEPTH + bool(closing)
                open_tags[name] += step
                depth += step
            if useless:
                self.edits.append((match.start(), match.start(4), ""))
            elif name == "a":
                self._read_link(match.start(), closing, attributes)
            elif name in BLOCKS:
                self._read_block(match, name)
            elif name == "sup":
                self._read_superscript(match, closing, text)
            self._read_text(text)
        while len(self.stack) > 1:
            self._close(len(markup), implied=True)
        root = self.stack[0]
        if self.mains and max(self.mains)[0] * 2 >= root.text - root.linked:
            _, start, end = max(self.mains)
            self.edits += [(0, start, ""), (end, len(markup), "")]

    def _close(self, end: int, *, implied: bool = False) -> None:
        element = self.stack.pop()
        self.open_names[element.name] -= 1
        if element.is_main:
            self.mains.append((element.text - element.linked, element.start, end))
        if element.is_navigation() and not implied:
            self.edits.append((element.start, end, ""))
        else:
            self.stack[-1].add(element)
        self.stack[-1].all_text += element.all_text
        self.stack[-1].all_linked += element.all_linked

    def _read_link(self, start: int, closing: str, attributes: str) -> None:
        if self.link is not None and self.link_is_sign:  # ¶, #, §: a link to the heading that it follows
            self.edits.append((self.link, start, ""))
        self.link = None
        if not closing and "href" in attributes.lower():
            self.link, self.link_is_sign = start, True
            self.stack[-1].links += 1

    def _read_block(self, match: re.Match, name: str) -> None:
        start, closing, attributes = match.start(), match[1], match[3]
        self.before = ""
        if self.stack[-1].name == "p" and (name != "p" or not closing):
            self._close(start)
        if name in TITLES:
            self.stack[-1].has_title = True
        elif closing and name in MEASURED:
            while self.open_names[name]:
                found = self.stack[-1].name == name
                self._close(match.start(4) if found else start)
                if found:
                    break
        elif name in MEASURED:
            if name in CELLS and self.stack[-1].name in CELLS:
                self._close(start)
            element = _Element(name, start, " ".join(NAMES.findall(attributes)) if "=" in attributes else "")
            element.is_main = name == "main" or ("main" in element.names and ROLE_MAIN.search(attributes) is not None)
            self.stack.append(element)
            self.open_names[name] += 1

    def _read_superscript(self, match: re.Match, closing: str, text: str) -> None:
        follows = self.before and not self.before[-1].isspace()
        if not closing and follows and text.strip() and not ORDINAL.fullmatch(text.strip()):
            self.exponent_is_long = not PLAIN_EXPONENT.fullmatch(text) or not self.markup.startswith("</", match.end())
            self.edits.append((match.start(4), match.start(4), "^(" if self.exponent_is_long else "^"))
        elif closing and self.exponent_is_long:
            self.edits.append((match.start(), match.start(), ")"))
            self.exponent_is_long = False

    def _read_text(self, text: str) -> None:
        if not text or text.isspace():
            self.before = self.before and self.before + text
            return
        self.before = text
        shown = html.unescape(text) if "&" in text else text
        count = len("".join(shown.split()))
        self.characters += count
        element = self.stack[-1]
        element.text += count
        element.all_text += count
        if self.link is not None:
            element.linked += count
            element.all_linked += count
            self.link_is_sign = self.link_is_sign and SIGN.fullmatch(shown) is not None
