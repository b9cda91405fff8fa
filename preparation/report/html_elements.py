"""Markup for a page that needs no other file, no script and no network: escaped elements, tables, bars, the style."""

import difflib
import html
import itertools
import re
from collections.abc import Iterable, Sequence

import numpy as np


class Html(str):
    """Markup. Any other string is text, and is escaped where an element takes it in."""


# HTML forbids control characters: pictures of them (␀, ␛) stand in their place.
CONTROLS = {code: 0x2400 + code for code in range(32) if chr(code) not in "\t\n"} | {127: 0x2421}


def _html(content: object) -> str:
    if isinstance(content, Html):
        return content
    if isinstance(content, int | np.integer):
        return f"{content:,}"
    # A file name may hold surrogates, for bytes that are no UTF-8: those cannot be written.
    return html.escape(str(content).encode(errors="replace").decode().translate(CONTROLS))


def element(tag: str, *content: object, **attributes: str) -> Html:
    given = "".join(f' {name.rstrip("_")}="{_html(value)}"' for name, value in attributes.items())
    return Html(f"<{tag}{given}>{''.join(map(_html, content))}</{tag}>")


def table(head: Sequence[str], rows: Iterable[Sequence[object]], text_columns: int = 1) -> Html:
    """The first columns hold text, the others figures."""

    def line(tag: str, cells: Sequence[object]) -> Html:
        kinds = itertools.chain(["text"] * text_columns, itertools.repeat("figure"))
        return element("tr", *(element(tag, cell, class_=kind) for cell, kind in zip(cells, kinds, strict=False)), "\n")

    body = element("thead", line("th", head)), element("tbody", *(line("td", cells) for cells in rows))
    return element("div", element("table", *body), class_="wide")


def cut(text: str, characters: int) -> str:
    return text if len(text) <= characters else text[:characters] + "…"


def bar(label: object, part: float, of: float, class_: str = "train") -> Html:
    """A label on a bar whose full width stands for `of`."""
    return element("div", label, class_=f"bar {class_}", style=f"--w:{100 * part / max(of, 1e-9):.1f}%")


def percent(part: float, total: float) -> str:
    share = part / max(total, 1)
    if share >= 0.01 or share == 0:
        return f"{share:.1%}"
    return f"{share:.2%}" if share >= 0.0001 else "< 0.01%"


def shares(head: Sequence[str], counts: dict[str, int], *totals: int) -> Html:
    """Counts and their shares of each of `totals`, the last one with a bar."""
    rows = []
    for name, count in counts.items():
        *plain, last = (percent(count, total) for total in totals)
        rows.append((name, count, *plain, bar(last, count, totals[-1])))
    return table(head, rows)


def note(text: str) -> Html:
    return element("p", text, class_="note")


COMPARED_WORDS = 500  # as difflib's time grows with the square


def difference(kept: str, other: str, characters: int) -> Html:
    """`other` from a little before its first difference: words that only `kept` has in <del>, only `other` in <ins>."""
    old, new = (re.findall(r"\S+\s*", text)[:COMPARED_WORDS] for text in (kept, other))
    matcher = difflib.SequenceMatcher(None, list(map(str.strip, old)), list(map(str.strip, new)), autojunk=False)
    words: list[tuple[str, str]] = []
    for kind, a, b, c, d in matcher.get_opcodes():
        if kind != "equal":
            words += [("del", word) for word in old[a:b]]
        words += [("" if kind == "equal" else "ins", word) for word in new[c:d]]
    first = next((at for at, (kind, _) in enumerate(words) if kind), 0)
    start = max(first - 8, 0)
    parts: list[object] = ["… "] if start else []
    for kind, run in itertools.groupby(words[start:], key=lambda word: word[0]):
        text = cut("".join(word for _, word in run), characters)
        parts += [element(kind, text.rstrip()), text[len(text.rstrip()) :]] if kind else [text]
        characters -= len(text)
        if characters <= 0:
            break
    return element("span", *parts)


# No browser lets this page load or run anything, whatever it holds.
PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
"""

# Blue and vermilion, in the dark sky blue and orange: Okabe and Ito's colours (jfly.uni-koeln.de/color), which the
# colour-blind can tell apart.
STYLE = """
:root { color-scheme: light dark; --ink: #1c2128; --soft: #59636e; --paper: #fff; --panel: #f5f7f9; --line: #d5dae0;
  --train: #0072b2; --validation: #d55e00; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e9ed; --soft: #9aa4af; --paper: #14181d; --panel: #1d232a;
  --line: #353d47; --train: #56b4e9; --validation: #e69f00; } }
body { margin: 0 auto; max-width: 70rem; padding: 1rem; background: var(--paper); color: var(--ink);
  font: 15px/1.45 system-ui, sans-serif; overflow-wrap: anywhere; }
h1 { font-size: 1.6rem; font-weight: 400; margin: .5rem 0 1rem; }
h2 { font-size: 1.2rem; margin: 2.5rem 0 .75rem; padding-bottom: .25rem; border-bottom: 1px solid var(--line); }
.note, figcaption, th, dt { color: var(--soft); font-size: .85rem; font-weight: 400; }
dl { display: grid; grid-template-columns: repeat(auto-fit, minmax(9.5rem, 1fr)); gap: .75rem; }
dl div, figure { background: var(--panel); border: 1px solid var(--line); border-radius: .4rem; padding: .6rem .75rem; }
dd { margin: 0; font-size: 1.3rem; font-variant-numeric: tabular-nums; }
dd.note { font-size: .85rem; }
.halves, .thirds, .quarters { display: grid; gap: .75rem 1.5rem;
  grid-template-columns: repeat(auto-fill, minmax(min(100%, var(--least)), 1fr)); }
.halves { --least: 24rem; } .halves table { table-layout: fixed; } .thirds { --least: 19rem; } .quarters { --least: 15rem; }
.wide { overflow-x: auto; margin-bottom: 1.25rem; }
table { border-spacing: 0; width: 100%; }
th, td { padding: .2rem .6rem .2rem 0; border-bottom: 1px solid var(--line); text-align: left; vertical-align: top; }
.figure { text-align: right; white-space: nowrap; font-variant-numeric: tabular-nums; overflow-wrap: normal; }
.text { min-width: 6.5rem; }
.wide :is(th, td):first-child { position: sticky; left: 0; background: var(--paper); }
th.figure { white-space: normal; vertical-align: bottom; }
.bar { min-width: 4.5rem; padding: 0 .3rem; border-radius: .15rem; background: linear-gradient(
  color-mix(in srgb, var(--bar) 38%, transparent) 0 0) no-repeat 0 / var(--w) 100%; }
.bar.train { --bar: var(--train); } .bar.validation { --bar: var(--validation); }
details { margin: 0 0 1.25rem; } summary { cursor: pointer; margin-bottom: .4rem; }
figure { margin: 0; min-width: 0; }
blockquote { margin: .4rem 0 0; max-height: 16rem; overflow: auto; white-space: pre-wrap; font-size: .9rem;
  unicode-bidi: isolate; }
ins, del { color: inherit; border-radius: .15rem; text-decoration-thickness: 2px; }
ins { background: color-mix(in srgb, var(--train) 25%, transparent); text-decoration-color: var(--train); }
del { background: color-mix(in srgb, var(--validation) 25%, transparent); text-decoration-color: var(--validation); }
pre { overflow-x: auto; font-size: .8rem; overflow-wrap: normal; }
"""
