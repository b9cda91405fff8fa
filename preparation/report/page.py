"""report.html: how a text dataset was prepared, on one page without other files, scripts or network access."""

import difflib
import html
import itertools
import json
import math
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import datasets
import numpy as np

from preparation.report.card import table as console_table
from preparation.selection.splits import Selection

EXAMPLES, EXAMPLE_CHARACTERS = 3, 400  # per reason; per document
CLUSTERS, MEMBERS, MEMBER_CHARACTERS = 5, 3, 220  # the largest, and as many others; per cluster; per member
COMPARED_CHARACTERS = 4000  # of near duplicates, to find where they differ
COMPARED_WORDS = 500  # because the time of difflib is quadratic
REASONS, FILES, BROKEN, FAILURES = 40, 50, 20, 3  # listed at most; the language filter alone has 180 reasons
NAME, LINE = 60, 200  # characters shown of a source's name and of other text from files, to keep the page small


class Html(str):
    """Markup. An element escapes any other string that it contains."""


# HTML forbids control characters, so symbols for them (␀, ␛) replace them.
CONTROLS = {code: 0x2400 + code for code in range(32) if chr(code) not in "\t\n"} | {127: 0x2421}


def _html(content: object) -> str:
    if isinstance(content, Html):
        return content
    if isinstance(content, int | np.integer):
        return f"{content:,}"
    # A file name may contain surrogates, for bytes that are not UTF-8, which cannot be written.
    return html.escape(str(content).encode(errors="replace").decode().translate(CONTROLS))


def element(tag: str, *content: object, **attributes: str) -> Html:
    given = "".join(f' {name.rstrip("_")}="{_html(value)}"' for name, value in attributes.items())
    return Html(f"<{tag}{given}>{''.join(map(_html, content))}</{tag}>")


def table(head: Sequence[str], rows: Iterable[Sequence[object]], text_columns: int = 1) -> Html:
    """The first `text_columns` columns hold text, the others numbers."""

    def line(tag: str, cells: Sequence[object]) -> Html:
        kinds = itertools.chain(["text"] * text_columns, itertools.repeat("figure"))
        return element("tr", *(element(tag, cell, class_=kind) for cell, kind in zip(cells, kinds, strict=False)), "\n")

    body = element("thead", line("th", head)), element("tbody", *(line("td", cells) for cells in rows))
    return element("div", element("table", *body), class_="wide")


def cut(text: str, characters: int) -> str:
    return text if len(text) <= characters else text[:characters] + "…"


def bar(label: object, part: float, of: float, class_: str = "train") -> Html:
    """A label on a bar, `part` of `of` wide."""
    return element("div", label, class_=f"bar {class_}", style=f"--w:{100 * part / max(of, 1e-9):.1f}%")


def percent(part: float, total: float) -> str:
    share = part / max(total, 1)
    if share >= 0.01 or share == 0:
        return f"{share:.1%}"
    return f"{share:.2%}" if share >= 0.0001 else "< 0.01%"


def shares(head: Sequence[str], counts: dict[str, int], *totals: int) -> Html:
    """Counts and their shares of each of `totals`, the last share with a bar."""
    rows = []
    for name, count in counts.items():
        *plain, last = (percent(count, total) for total in totals)
        rows.append((name, count, *plain, bar(last, count, totals[-1])))
    return table(head, rows)


def note(text: str) -> Html:
    return element("p", text, class_="note")


def difference(kept: str, other: str, characters: int) -> Html:
    """`other` from a little before its first difference: words only in `kept` are in <del>, words only in `other` in <ins>."""
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


@dataclass
class Histogram:
    """The distribution of a value over the stored documents, by split."""

    edges: np.ndarray
    """(B + 1,): bin b holds values from edges[b] to below edges[b + 1]; the outer bins also hold values beyond them."""
    counts: dict[str, np.ndarray]
    """(B,) int64: documents in each bin."""
    figures: dict[str, list[float]]
    """Mean, median, 95th percentile, minimum, maximum."""


@dataclass
class Details:
    """What the page shows in addition to the manifest. Documents are mappings: text, source, id, bytes, fate."""

    sources: list[str]
    counts: dict[str, np.ndarray]
    """Documents by reason, the most frequent first, (sources,) int64; the reason "" is for those that are kept."""
    examples: dict[str, list[dict[str, Any]]]
    """Dropped documents by reason."""
    kept: dict[str, list[dict[str, Any]]]
    """Documents for training, by source."""
    clusters: list[tuple[int, list[dict[str, Any]]]]
    """Size of a near-duplicate cluster; its representative, and a few of its other documents."""
    cluster_sizes: np.ndarray
    """(clusters,) int64: of all clusters."""
    lengths: Histogram
    """Tokens per document."""
    ratios: Histogram
    """Bytes per token of each document."""


def collect_details(
    cleaned: datasets.Dataset, lengths: np.ndarray, selection: Selection, token_lengths: dict[str, np.ndarray],
    rows: dict[str, np.ndarray],
) -> Details:  # fmt: skip
    """Count over all N documents, and fetch the texts of the few that the page shows (at most 160).

    `lengths` (N,): UTF-8 bytes of each text of `cleaned`. By split, `token_lengths` (n,): tokens of each stored document;
    `rows` (n,): its number in `cleaned`.
    """
    numbers, first = np.unique(selection.source, return_index=True)
    shape = len(selection.reasons), int(numbers[-1]) + 1
    pairs = np.bincount(selection.code.astype(np.int64) * shape[1] + selection.source, minlength=shape[0] * shape[1])
    by_source = dict(zip(selection.reasons, pairs.reshape(shape)[:, numbers], strict=True))

    def excerpt(row: int, characters: int) -> dict[str, Any]:
        record = cleaned[int(row)]
        kept = "kept in validation" if selection.validation[row] else "kept in train"
        fate = selection.reasons[selection.code[row]] or kept
        return record | {"text": cut(record["text"], characters), "bytes": int(lengths[row]), "fate": fate}

    examples = {}
    for reason in itertools.islice(selection.count(), REASONS):
        dropped = np.flatnonzero(selection.code == selection.reasons.index(reason))
        examples[reason] = [excerpt(row, EXAMPLE_CHARACTERS) for row in _spread(dropped, EXAMPLES)]

    names = [cleaned[int(row)]["source"] for row in first]
    trained = [np.flatnonzero(selection.train & (selection.source == number)) for number in numbers]
    kept = {name: [excerpt(row, EXAMPLE_CHARACTERS) for row in _spread(part, EXAMPLES)]
            for name, part in zip(names[:REASONS], trained, strict=False) if len(part)}  # fmt: skip

    members = np.flatnonzero(selection.cluster != np.arange(len(selection.cluster)))
    roots, sizes = np.unique(selection.cluster[members], return_counts=True)
    by_size = np.argsort(-sizes, kind="stable")
    clusters = []
    for index in [*by_size[:CLUSTERS], *_spread(np.sort(by_size[CLUSTERS:]), CLUSTERS)]:
        shown = [roots[index], *_spread(members[selection.cluster[members] == roots[index]], MEMBERS)]
        clusters.append((int(sizes[index]) + 1, [excerpt(row, COMPARED_CHARACTERS) for row in shown]))

    tokens = {split: values for split, values in token_lengths.items() if len(values)}
    ratios = {split: lengths[rows[split]] / values for split, values in tokens.items()}
    return Details(
        sources=names,
        counts={reason: by_source[reason] for reason in ["", *selection.count()]},
        examples=examples,
        kept=kept,
        clusters=clusters,
        cluster_sizes=sizes + 1,
        lengths=histogram(tokens, half_octaves(tokens)),
        ratios=histogram(ratios, even_steps(ratios)),
    )


def _spread(items: np.ndarray, count: int) -> np.ndarray:
    """At most `count` of `items`, evenly spaced from the first to the last."""
    return items[np.linspace(0, len(items) - 1, min(count, len(items))).astype(int)]


def half_octaves(values: dict[str, np.ndarray]) -> np.ndarray:
    """Edges 4, 6, 8, 11, 16, ... around all values, from a power of two to a power of two."""
    low = math.floor(math.log2(min(array.min() for array in values.values())))
    high = math.ceil(math.log2(max(array.max() for array in values.values()) + 1))
    return np.unique(np.round(2 ** (np.arange(2 * low, 2 * high + 1) / 2))).astype(np.int64)


def even_steps(values: dict[str, np.ndarray]) -> np.ndarray:
    """Edges of about 16 bins around all values except one in two hundred on either side."""
    least, greatest = np.quantile(np.concatenate(list(values.values())), [0.005, 0.995])
    step = 2.0 ** math.ceil(math.log2(max(greatest - least, 4) / 16))
    return np.arange(math.floor(least / step), math.floor(greatest / step) + 2) * step


def histogram(values: dict[str, np.ndarray], edges: np.ndarray) -> Histogram:
    counts = {split: np.histogram(np.clip(array, edges[0], edges[-1]), edges)[0] for split, array in values.items()}
    figures = {key: [float(array.mean()), *np.quantile(array, [0.5, 0.95, 0, 1])] for key, array in values.items()}
    return Histogram(edges, counts, figures)


def html_report(name: str, manifest: dict[str, Any], details: Details) -> str:
    """The complete page. The same arguments give the same text; text from documents and file names is escaped."""
    sections = {
        "Kept and dropped": _filtering(manifest, details), "Mixture": _mixture(manifest),
        "Distributions": _distributions(details), "Kept documents": _kept(details), "Dropped documents": _examples(details),
        "Near duplicates": _clusters(manifest, details), "Tokenizer": _tokenizer(manifest), "Recipe": _recipe(manifest),
    }  # fmt: skip
    body = (element("section", element("h2", title), *parts) for title, parts in sections.items())
    return PAGE + "".join([
        element("title", f"{name}: data report"), element("style", Html(STYLE)), *_header(name, manifest), *body, "\n",
    ])  # fmt: skip


def _header(name: str, manifest: dict[str, Any]) -> Iterator[Html]:
    read, splits = manifest["documents_read"], manifest["splits"]
    yield element("h1", "Token dataset ", element("b", name))
    if manifest["stream"]:
        yield note(
            f"The training text is a stream: it is read, cleaned and tokenized while training, and not stored. All figures "
            f"here describe its head: the first documents of each source, {read:,} in all."
        )
    kept = read - sum(manifest["dropped"].values())
    sums = {key: sum(figures[key] for figures in splits.values()) for key in ("bytes", "tokens")}
    parts, tiles = [], [
        ("documents read", read, f"{manifest['bytes_read'] / 1e6:,.2f} MB of text"),
        ("documents kept", kept, f"{percent(kept, read)} of those read"),
        *((f"tokens, {split}", item["tokens"], f"{item['documents']:,} documents, {item['bytes'] / 1e6:,.2f} MB")
          for split, item in splits.items()),
        ("bytes per token", f"{sums['bytes'] / max(sums['tokens'], 1):.2f}", "including special tokens"),
        ("tokenizer entries", manifest["tokenizer"]["vocab_size"], f"from {manifest['tokenizer']['from']}"),
    ]  # fmt: skip
    for what, figure, remark in tiles:
        parts.append(element("div", element("dt", what), element("dd", figure), element("dd", remark, class_="note")))
    yield element("dl", *parts)


def _filtering(manifest: dict[str, Any], details: Details) -> Iterator[Html]:
    read, total, dropped = manifest["read"], manifest["documents_read"], manifest["dropped"]
    kept = total - sum(dropped.values())
    yield shares(["", "documents", "share of all read"], {"kept": kept, "dropped": total - kept}, total)
    if dropped:
        head = ["dropped, by reason", "documents", "of all read", "of the dropped"]
        yield shares(head, dropped, total, total - kept)
    if dropped and len(details.sources) > 1:
        read_from = np.sum(list(details.counts.values()), axis=0)
        rows = [(reason or "kept", *map(bar, counts, counts, read_from)) for reason, counts in details.counts.items()]
        yield table(["reason, by source", *(cut(source, NAME) for source in details.sources)], rows[: REASONS + 1])
    changed = {step: count for step, count in manifest["changed"].items() if count}
    if changed:
        yield shares(["changed, by step", "documents", "share of all read"], changed, total)
    else:
        yield note("No cleaning step changed a document.")
    if read["skipped"]:
        yield table(["skipped, and why", "records"], read["skipped"].items())
    if read["broken"]:
        records = [(cut(item["file"], LINE), cut(item["why"], LINE)) for item in read["broken_records"][:BROKEN]]
        yield table([f"broken ({len(records):,} of {read['broken']:,} shown)", "why"], records, text_columns=2)


def _mixture(manifest: dict[str, Any]) -> Iterator[Html]:
    for split, total in manifest["splits"].items():
        rows = []
        for source, item in [*total["sources"].items(), ("all", total)]:
            ratio = f"{item['bytes'] / max(item['tokens'], 1):.2f}"
            share = bar(percent(item["tokens"], total["tokens"]), item["tokens"], total["tokens"], split)
            rows.append((cut(source, NAME), item["documents"], item["bytes"], item["tokens"], ratio, share))
        yield table([split, "documents", "bytes", "tokens", "bytes/token", "share of tokens"], rows)


def _distributions(details: Details) -> Iterator[Html]:
    tokens, ratios = details.lengths.edges.tolist(), details.ratios.edges.tolist()
    spans = [f"{low:,}" if low + 1 == high else f"{low:,}–{high - 1:,}" for low, high in itertools.pairwise(tokens)]
    ranges = [f"{low:.2f}–{high:.2f}" for low, high in itertools.pairwise(ratios)]
    ranges[0], ranges[-1] = f"below {ratios[1]:.2f}", f"from {ratios[-2]:.2f}"
    yield element(
        "div", _distribution("tokens per document", 0, details.lengths, spans),
        _distribution("bytes per token", 2, details.ratios, ranges), class_="halves",
    )  # fmt: skip
    yield note("Documents as stored, including repetitions and special tokens.")


def _distribution(what: str, digits: int, histogram: Histogram, labels: list[str]) -> Html:
    """Statistics of each split, and its documents by bin, the splits side by side."""
    splits = list(histogram.counts)
    names = ("mean", "median", "95th percentile", "minimum", "maximum")
    figures = [
        (name, *(f"{histogram.figures[split][at]:,.{digits}f}" for split in splits)) for at, name in enumerate(names)
    ]
    parts = {split: counts / counts.sum() for split, counts in histogram.counts.items()}
    greatest = max(part.max() for part in parts.values())
    bins = [
        (label, *(bar(percent(part[at], 1), part[at], greatest, split) for split, part in parts.items()))
        for at, label in enumerate(labels)
    ]
    heads = [f"share of {split}" for split in splits]
    return element("div", table([what, *splits], figures), table([what, *heads], bins))


def _kept(details: Details) -> Iterator[Html]:
    yield note(f"Up to {EXAMPLES} documents of each source, as cleaned.")
    yield from (_group(documents, element("b", cut(name, NAME))) for name, documents in details.kept.items())


def _examples(details: Details) -> Iterator[Html]:
    reasons, shown = len(details.counts) - 1, len(details.examples)
    yield note(f"Up to {EXAMPLES} documents from across the corpus for each of {shown:,} of {reasons:,} reasons.")
    for reason, documents in details.examples.items():
        yield _group(documents, element("b", reason), f" · {details.counts[reason].sum():,} dropped")


def _group(documents: list[dict[str, Any]], *heading: object) -> Html:
    parts = element("div", *map(_excerpt, documents), class_="thirds")
    return element("details", element("summary", *heading), parts, open="")


def _excerpt(document: dict[str, Any], shown: Html | None = None, note: str = "") -> Html:
    """The beginning of a document, or `shown` instead, with its origin."""
    origin = f" · {cut(document['source'], NAME)} · {document['bytes']:,} bytes{note}"
    text = shown or document["text"] or element("i", "(no text)")
    caption = element("figcaption", element("code", cut(document["id"], 2 * NAME)), origin)
    return element("figure", caption, element("blockquote", text, dir="auto"))


def _clusters(manifest: dict[str, Any], details: Details) -> Iterator[Html]:
    sizes = details.cluster_sizes
    if not len(sizes):
        off = manifest["options"]["deduplication"]["near_threshold"] is None
        yield note("The search for near duplicates was off." if off else "No near duplicates were found.")
        return
    yield note(
        f"{len(sizes):,} clusters hold {sizes.sum():,} documents, the largest {sizes.max():,}. The longest document of each "
        f"is kept. Below are the {CLUSTERS} largest clusters and {CLUSTERS} others from across the corpus: first the kept "
        f"document, then others from where they first differ. Text only in the kept one is struck out; text it lacks is "
        f"underlined."
    )
    spans = {}
    for octave, count in enumerate(np.bincount(np.ceil(np.log2(sizes)).astype(np.int64)).tolist()):
        if count:
            spans[f"{2 ** (octave - 1) + 1:,}–{2**octave:,}" if octave > 1 else "2"] = count
    yield shares(["documents in a cluster", "clusters", "share of clusters"], spans, len(sizes))
    for size, (kept, *others) in details.clusters:
        beginning = element("span", cut(kept["text"], MEMBER_CHARACTERS))
        figures = [_excerpt(kept, beginning, f" · {kept['fate']}")]
        figures += [_excerpt(item, difference(kept["text"], item["text"], MEMBER_CHARACTERS)) for item in others]
        heading = element("summary", element("b", f"{size:,} documents"))
        yield element("details", heading, element("div", *figures, class_="quarters"), open="")


def _tokenizer(manifest: dict[str, Any]) -> Iterator[Html]:
    rows, failures = [], []
    for source, item in manifest["tokenizer"]["sources"].items():
        figures = [f"{item['bytes_per_token']:.2f}", f"{item['fertility']:.2f}", f"{item['unknown_rate']:.2%}"]
        rows.append([cut(source, NAME), *figures, f"{item['round_trip_share']:.1%}"])
        for failure in item.get("round_trip_failures", [])[:FAILURES]:
            text = failure if isinstance(failure, str) else json.dumps(failure, ensure_ascii=False)
            failures.append((cut(source, NAME), cut(text, LINE)))
    yield table(["source (a sample)", "bytes/token", "tokens/word", "unknown", "round trip"], rows)
    if failures:
        yield table(["source", "text that its tokens do not decode to"], failures, text_columns=2)


def _recipe(manifest: dict[str, Any]) -> Iterator[Html]:
    files, shown = manifest["files"], manifest["files"][:FILES]
    rows = [(cut(item["source"], NAME), cut(item["name"], LINE), item["content"], item["bytes"]) for item in shown]
    yield table(["source", f"file ({len(shown):,} of {len(files):,} shown)", "content", "bytes"], rows, text_columns=3)
    yield table(["option", "value"], _flatten(manifest["options"]), text_columns=2)
    yield table(["library", "version"], manifest["versions"].items(), text_columns=2)
    figures = element("pre", console_table(manifest))
    yield element("details", element("summary", "The figures as plain text"), figures)


def _flatten(options: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    for name, value in options.items():
        if isinstance(value, dict):
            yield from _flatten(value, f"{prefix}{name}.")
        else:
            yield prefix + name, cut(json.dumps(value, ensure_ascii=False), 100 * LINE)


# The policy keeps browsers from loading or running anything, whatever the page contains.
PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
"""

# Blue and vermilion, or sky blue and orange in dark mode: Okabe and Ito's colours (jfly.uni-koeln.de/color), which
# colour-blind people can distinguish.
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
