"""report.html: what a text dataset went through, as one page that needs no other file, no script and no network."""

import difflib
import html
import itertools
import json
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import datasets
import numpy as np

from utils.text.report import table as console_table
from utils.text.selection import Selection

SPLITS = ("train", "validation")
EXAMPLES, EXAMPLE_CHARACTERS = 3, 400  # of each reason; of each document
REASONS = 40  # with examples and by source, the most frequent: the language filter knows some 180
CLUSTERS, MEMBERS, MEMBER_CHARACTERS = 5, 3, 220  # the largest, and as many others; of each cluster; of each member
COMPARED_CHARACTERS = 4000  # of two near duplicates, as difflib's time grows with the square
FILES, BROKEN, FAILURES = 50, 20, 3
BINS = 32  # of bytes per token, at most


@dataclass
class Excerpt:
    """The beginning of a document."""

    id: str
    source: str
    bytes: int
    text: str


@dataclass
class Cluster:
    """Near duplicates: the document that stands for them, what became of it, and a few of the others."""

    size: int
    kept: Excerpt
    fate: str
    members: list[Excerpt]


@dataclass
class Histogram:
    """A figure of the stored documents, by split."""

    edges: np.ndarray
    """(B + 1,): bin b holds values from edges[b] to below edges[b + 1]; the outermost also what lies beyond."""
    counts: dict[str, np.ndarray]
    """(B,) int64: documents in each bin."""
    figures: dict[str, list[float]]
    """Mean, median, 95th percentile, least, greatest."""


@dataclass
class Details:
    """What the page shows and the manifest does not hold."""

    reasons: list[str]
    """As in Selection: the first is "", for documents that are kept."""
    sources: list[str]
    counts: np.ndarray
    """(reasons, sources) int64: documents."""
    examples: dict[str, list[Excerpt]]
    """Dropped documents by reason, the most frequent first."""
    clusters: list[Cluster]
    cluster_sizes: np.ndarray
    """(clusters,) int64: the size of every near-duplicate cluster."""
    lengths: Histogram
    """Tokens per document."""
    ratios: Histogram
    """Bytes per token of each document."""


def collect_details(
    cleaned: datasets.Dataset, lengths: np.ndarray, selection: Selection, token_lengths: dict[str, np.ndarray],
    rows: dict[str, np.ndarray],
) -> Details:  # fmt: skip
    """Count over all N documents, and fetch the texts of the few that the page shows (160 at most).

    Args:
        cleaned: columns text, source and id.
        lengths: (N,) UTF-8 bytes of each text.
        token_lengths: by split, (n,) tokens of each stored document.
        rows: by split, (n,) the numbers of these documents in `cleaned`.
    """
    numbers, first = np.unique(selection.source, return_index=True)
    width, height = int(numbers[-1]) + 1, len(selection.reasons)
    cells = np.bincount(selection.code.astype(np.int64) * width + selection.source, minlength=width * height)
    counts = cells.reshape(height, width)[:, numbers]

    def excerpt(row: int, characters: int = EXAMPLE_CHARACTERS) -> Excerpt:
        record = cleaned[int(row)]
        return Excerpt(record["id"], record["source"], int(lengths[row]), _cut(record["text"], characters))

    examples = {
        reason: [excerpt(row) for row in _spread(np.flatnonzero(selection.code == selection.reasons.index(reason)), EXAMPLES)]
        for reason in list(selection.count())[:REASONS]
    }  # fmt: skip
    members = np.flatnonzero(selection.cluster != np.arange(len(selection.cluster)))
    roots, sizes = np.unique(selection.cluster[members], return_counts=True)
    by_size = np.argsort(-sizes, kind="stable")
    clusters = []
    for index in [*by_size[:CLUSTERS], *_spread(np.sort(by_size[CLUSTERS:]), CLUSTERS)]:
        root = roots[index]
        fate = selection.reasons[selection.code[root]] or SPLITS[int(selection.validation[root])]
        others = _spread(members[selection.cluster[members] == root], MEMBERS)
        texts = [excerpt(row, COMPARED_CHARACTERS) for row in (root, *others)]
        clusters.append(Cluster(int(sizes[index]) + 1, texts[0], fate, texts[1:]))

    tokens = {split: values for split, values in token_lengths.items() if len(values)}
    ratios = {split: lengths[rows[split]] / values for split, values in tokens.items()}
    return Details(
        selection.reasons, [cleaned[int(row)]["source"] for row in first], counts, examples, clusters, sizes + 1,
        _histogram(tokens, _half_octaves(tokens)), _histogram(ratios, _even_steps(ratios)),
    )  # fmt: skip


def _cut(text: str, characters: int) -> str:
    return text if len(text) <= characters else text[:characters] + "…"


def _spread(items: np.ndarray, count: int) -> np.ndarray:
    """At most `count` of `items`, evenly from the first to the last."""
    return items[np.linspace(0, len(items) - 1, min(count, len(items))).astype(int)]


def _half_octaves(values: dict[str, np.ndarray]) -> np.ndarray:
    """Edges 4, 6, 8, 11, 16, ... around all values, from one power of two to another."""
    low = math.floor(math.log2(min(array.min() for array in values.values())))
    high = math.ceil(math.log2(max(array.max() for array in values.values()) + 1))
    return np.unique(np.round(2 ** (np.arange(2 * low, 2 * high + 1) / 2)))


def _even_steps(values: dict[str, np.ndarray]) -> np.ndarray:
    """Edges between whole numbers around all values but one in a thousand on either side."""
    least, greatest = np.quantile(np.concatenate(list(values.values())), [0.001, 0.999])
    low, high, step = math.floor(least), math.floor(greatest) + 1, 0.125
    while (high - low) / step > BINS:
        step *= 2
    return np.arange(low, high + step, step)


def _histogram(values: dict[str, np.ndarray], edges: np.ndarray) -> Histogram:
    counts = {split: np.histogram(np.clip(array, edges[0], edges[-1]), edges)[0] for split, array in values.items()}
    figures = {key: [float(array.mean()), *np.quantile(array, [0.5, 0.95, 0, 1])] for key, array in values.items()}
    return Histogram(edges, counts, figures)


# ---- Markup


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


def _element(tag: str, *content: object, **attributes: object) -> Html:
    """`class_` and `aria_label` stand for class and aria-label; an attribute that is None is left out."""
    given = "".join(
        f' {name.rstrip("_").replace("_", "-")}="{_html(str(value))}"' for name, value in attributes.items() if value is not None
    )  # fmt: skip
    return Html(f"<{tag}{given}>{''.join(map(_html, content))}</{tag}>")


def _table(head: Sequence[str], rows: Iterable[Sequence[object]], *, text_columns: int = 1, caption: str = "") -> Html:
    """The first columns hold text, the others figures."""

    def row(tag: str, cells: Sequence[object]) -> Html:
        classes = itertools.chain(["text"] * text_columns, itertools.repeat("figure"))
        return _element("tr", *(_element(tag, cell, class_=name) for cell, name in zip(cells, classes, strict=False)), "\n")

    body = (row("td", cells) for cells in rows)
    content = _element("caption", caption), _element("thead", row("th", head)), _element("tbody", *body)
    return _element("div", _element("table", *content[not caption :]), class_="wide")


def _share(part: float, total: float, greatest: float) -> Html:
    """`part` of `total` in per cent, on a bar whose full width stands for `greatest`."""
    share = part / max(total, 1)
    label = "< 0.1%" if 0 < share < 0.001 else f"{share:.1%}"
    return _element("div", label, class_="share", style=f"--w:{100 * part / max(greatest, 1):.1f}%")


def _bars(what: str, counts: dict[str, int], unit: str, total: int) -> Html:
    greatest = max(counts.values(), default=0)
    rows = [(name, count, _share(count, total, greatest)) for name, count in counts.items()]
    return _table([what, unit, "share"], rows)


def _section(title: str, *content: object) -> Html:
    return _element("section", _element("h2", title), *content)


def _note(text: str) -> Html:
    return _element("p", text, class_="note")


# ---- The page


def html_report(name: str, manifest: dict[str, Any], details: Details) -> str:
    """The page, complete. The same arguments give the same text; what comes from documents or file names is escaped."""
    title = f"{name}: data report"
    body = [
        _header(name, manifest), _filtering(manifest, details), _mixture(manifest), _distributions(details),
        _examples(details), _clusters(manifest, details), _tokenizer(manifest), _recipe(manifest),
    ]  # fmt: skip
    policy = "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">"
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8">{policy}<title>{_html(title)}</title>'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><style>{STYLE}</style></head>\n'
        f"<body>{''.join(body)}</body></html>\n"
    )


def _header(name: str, manifest: dict[str, Any]) -> Html:
    read, splits = manifest["documents_read"], manifest["splits"]
    kept = read - sum(manifest["dropped"].values())
    size, tokens = (sum(figures[key] for figures in splits.values()) for key in ("bytes", "tokens"))
    tiles = {
        "documents read": (read, _bytes(manifest["bytes_read"])),
        "documents kept": (kept, f"{kept / max(read, 1):.1%} of those read"),
        **{f"{split} tokens": (figures["tokens"], f"{figures['documents']:,} documents, {_bytes(figures['bytes'])}")
           for split, figures in splits.items()},
        "bytes per token": (f"{size / max(tokens, 1):.2f}", "special tokens counted"),
        "tokenizer entries": (manifest["tokenizer"]["vocab_size"], f"from {manifest['tokenizer']['from']}"),
    }  # fmt: skip
    stream = [
        _note(
            f"The training text is a stream: it is read, cleaned and tokenized while training, and not stored. All figures "
            f"here are those of its head, the first {read:,} documents; of them the validation split is stored."
        )
    ]
    return _element(
        "header", _element("h1", "Token dataset ", _element("b", name)), *stream[: manifest["stream"]],
        _element("dl", *(
            _element("div", _element("dt", what), _element("dd", figure), _element("dd", note, class_="note"))
            for what, (figure, note) in tiles.items()
        )),
    )  # fmt: skip


def _bytes(count: int) -> str:
    for factor, unit in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if count >= factor:
            return f"{count / factor:,.2f} {unit}"
    return f"{count:,} bytes"


def _filtering(manifest: dict[str, Any], details: Details) -> Html:
    read, total = manifest["read"], manifest["documents_read"]
    dropped, kept = manifest["dropped"], total - sum(manifest["dropped"].values())
    parts = [_bars("", {"kept": kept, "dropped": total - kept}, "documents", total)]
    if dropped:
        parts += [_element("h3", "Dropped, by reason"), _bars("reason", dropped, "documents", total)]
    if dropped and len(details.sources) > 1:
        by_source = details.counts.sum(axis=0)
        rows = [(f"all {len(details.reasons) - 1}" if False else "documents read", *by_source)]
        for reason in ["", *list(dropped)[:REASONS]]:
            counts = details.counts[details.reasons.index(reason)]
            rows.append((reason or "kept", *(_heat(a, b) for a, b in zip(counts, by_source, strict=True))))
        parts += [_element("h3", "Reasons by source"), _table(["", *(_cut(name, 60) for name in details.sources)], rows)]
    changed = {step: count for step, count in manifest["changed"].items() if count}
    parts.append(_element("h3", "Documents changed, by cleaning step"))
    parts.append(_bars("step", changed, "documents", total) if changed else _note("No step changed any document."))
    if read["skipped"]:
        parts += [_element("h3", "Skipped records"), _table(["why", "records"], read["skipped"].items())]
    if read["broken"]:
        records = [(item["file"], item["why"]) for item in read["broken_records"][:BROKEN]]
        more = f"The first {len(records):,} of {read['broken']:,}." if read["broken"] > len(records) else ""
        parts += [_element("h3", "Broken records"), _table(["file", "why"], records, text_columns=2), _note(more)]
    return _section("Kept and dropped", *parts)
