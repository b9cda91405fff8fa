"""report.html: what a text dataset went through, as one page that needs no other file, no script and no network."""

import itertools
import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import datasets
import numpy as np

from preparation.report.histograms import Histogram, even_steps, half_octaves, histogram
from preparation.report.html_elements import (
    PAGE,
    STYLE,
    Html,
    bar,
    cut,
    difference,
    element,
    note,
    percent,
    shares,
    table,
)
from preparation.report.report import table as console_table
from preparation.selection.selection import Selection

EXAMPLES, EXAMPLE_CHARACTERS = 3, 400  # of each reason; of each document
CLUSTERS, MEMBERS, MEMBER_CHARACTERS = 5, 3, 220  # the largest, and as many others; of each cluster; of each member
COMPARED_CHARACTERS = 4000  # of near duplicates, to find where they differ
REASONS, FILES, BROKEN, FAILURES = 40, 50, 20, 3  # that are listed; the language filter alone knows 180 reasons
NAME, LINE = 60, 200  # characters of a source's name and of a line that a file decides, so that the page stays small


@dataclass
class Details:
    """What the page shows and the manifest does not hold. Documents are mappings: text, source, id, bytes, fate."""

    sources: list[str]
    counts: dict[str, np.ndarray]
    """By reason, the most frequent first, (sources,) int64: documents; "" stands for those that are kept."""
    examples: dict[str, list[dict[str, Any]]]
    """Dropped documents by reason."""
    kept: dict[str, list[dict[str, Any]]]
    """Documents for training, by source."""
    clusters: list[tuple[int, list[dict[str, Any]]]]
    """Size of a near-duplicate cluster; the document that stands for it, and a few of the others."""
    cluster_sizes: np.ndarray
    """(clusters,) int64: of all of them."""
    lengths: Histogram
    """Tokens per document."""
    ratios: Histogram
    """Bytes per token of each document."""


def collect_details(
    cleaned: datasets.Dataset, lengths: np.ndarray, selection: Selection, token_lengths: dict[str, np.ndarray],
    rows: dict[str, np.ndarray],
) -> Details:  # fmt: skip
    """Count over all N documents, and fetch the texts of the few that the page shows (160 at most).

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
    """At most `count` of `items`, evenly from the first to the last."""
    return items[np.linspace(0, len(items) - 1, min(count, len(items))).astype(int)]


def html_report(name: str, manifest: dict[str, Any], details: Details) -> str:
    """The page, complete. The same arguments give the same text; what comes from documents or file names is escaped."""
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
            f"here are those of its head: the first documents of each source, {read:,} in all."
        )
    kept = read - sum(manifest["dropped"].values())
    sums = {key: sum(figures[key] for figures in splits.values()) for key in ("bytes", "tokens")}
    parts, tiles = [], [
        ("documents read", read, f"{manifest['bytes_read'] / 1e6:,.2f} MB of text"),
        ("documents kept", kept, f"{percent(kept, read)} of those read"),
        *((f"tokens, {split}", item["tokens"], f"{item['documents']:,} documents, {item['bytes'] / 1e6:,.2f} MB")
          for split, item in splits.items()),
        ("bytes per token", f"{sums['bytes'] / max(sums['tokens'], 1):.2f}", "special tokens counted"),
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
    yield note("Documents as stored, a repeated one as often as it is; special tokens counted.")


def _distribution(what: str, digits: int, histogram: Histogram, labels: list[str]) -> Html:
    """Figures of each split, and its documents by bin, the splits side by side."""
    splits = list(histogram.counts)
    names = ("mean", "median", "95th percentile", "least", "greatest")
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
    yield note(f"Up to {EXAMPLES} documents, from all over the corpus, of {shown:,} of {reasons:,} reasons.")
    for reason, documents in details.examples.items():
        yield _group(documents, element("b", reason), f" · {details.counts[reason].sum():,} dropped")


def _group(documents: list[dict[str, Any]], *heading: object) -> Html:
    parts = element("div", *map(_excerpt, documents), class_="thirds")
    return element("details", element("summary", *heading), parts, open="")


def _excerpt(document: dict[str, Any], shown: Html | None = None, note: str = "") -> Html:
    """The beginning of a document with its origin; `shown` in place of its text."""
    origin = f" · {cut(document['source'], NAME)} · {document['bytes']:,} bytes{note}"
    text = shown or document["text"] or element("i", "(no text)")
    caption = element("figcaption", element("code", cut(document["id"], 2 * NAME)), origin)
    return element("figure", caption, element("blockquote", text, dir="auto"))


def _clusters(manifest: dict[str, Any], details: Details) -> Iterator[Html]:
    sizes = details.cluster_sizes
    if not len(sizes):
        off = manifest["options"]["deduplication"]["near_threshold"] is None
        yield note("Near duplicates were not looked for." if off else "No near duplicates were found.")
        return
    yield note(
        f"{len(sizes):,} clusters hold {sizes.sum():,} documents, the largest {sizes.max():,}. The longest document of each "
        f"is kept. Below, the {CLUSTERS} largest clusters and {CLUSTERS} others from all over the corpus: first what is kept, "
        f"then others from where they first differ. Struck out is what only the kept one has, underlined what it has not."
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
    yield table(["source, by a sample of it", "bytes/token", "tokens/word", "unknown", "round trip"], rows)
    if failures:
        yield table(["source", "text that does not come back from its tokens"], failures, text_columns=2)


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
