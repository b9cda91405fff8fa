"""The HTML report: figures that match a plain count, documents that cannot inject markup, nothing fetched."""

import json
import re
from collections import Counter
from html.parser import HTMLParser

import datasets
import numpy as np
import pyarrow as pa
import pytest
from conftest import ROOT
from markupsafe import escape

from preparation.cleaning.steps import clean_documents, expand_steps
from preparation.recipe import CleaningConfig, DeduplicationConfig
from preparation.report.page import collect_details, html_report
from preparation.selection.splits import Selection, select_documents
from preparation.stages import text_bytes
from prepare_data import sketch_table

RECORDS = [json.loads(line) for line in (ROOT / "sample_data/dictionaries.jsonl").read_text("utf-8").splitlines()][
    :1400
]
EVIL = "<script>alert('&')</script><img src=http://example.org/x onerror=y>"


class Page(HTMLParser):
    """The elements, attributes and text of a page, and whether the elements close in order."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: Counter[str] = Counter()
        self.attributes: set[str] = set()
        self.rows: list[list[str]] = []
        self.text = ""
        self.feed(page)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags[tag] += 1
        self.attributes |= {name for name, _ in attrs}
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
        if tag not in ("html", "meta", "input"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data
        if {"td", "th"} & set(self.open):
            self.rows[-1][-1] += data

    def row(self, *first: str) -> list[str]:
        return next(row for row in self.rows if row[: len(first)] == list(first))


def prepared(documents: list[dict]) -> tuple[datasets.Dataset, np.ndarray, Selection]:
    """Documents cleaned and selected as prepare_data.py does it."""
    columns = {name: [item[name] for item in documents] for name in ("text", "source", "id")}
    options = CleaningConfig(steps=["standard", "length"], min_characters=100)
    cleaned = clean_documents(columns, options)
    for number, item in enumerate(documents):
        cleaned["reason"][number] = item.get("reason", cleaned["reason"][number])
    dataset = datasets.Dataset(pa.table(cleaned))
    sketches = datasets.Dataset(sketch_table(pa.table({"text": cleaned["text"]}), near=True))
    lengths = text_bytes(dataset)
    config = DeduplicationConfig(contamination_overlap=None)
    names = sorted(set(columns["source"]))
    return (
        dataset,
        lengths,
        select_documents(dataset, sketches, lengths, names, config, 0.1, [], lambda rows, _: rows * 0 - 1),
    )


def report(documents: list[dict], *, stream: bool = False, **tokenizer: object) -> tuple[str, Selection, dict]:
    cleaned, lengths, selection = prepared(documents)
    rows = {"train": np.flatnonzero(selection.train), "validation": np.flatnonzero(selection.validation)}
    if stream:
        del rows["train"]
    texts = cleaned["text"][:]
    tokens = {split: np.array([len(texts[row].split()) + 2 for row in rows[split]]) for split in rows}
    sources = sorted(set(cleaned["source"][:]))

    def figures(split: str, numbers: set[int]) -> dict[str, int]:
        chosen = np.isin(selection.source[rows[split]], list(numbers))
        return {
            "documents": int(chosen.sum()),
            "bytes": int(lengths[rows[split]][chosen].sum()),
            "tokens": int(tokens[split][chosen].sum()),
        }

    everything = set(range(len(sources)))
    measured = {
        "bytes_per_token": 3.25,
        "fertility": 1.5,
        "unknown_rate": 0.0,
        "lost_share": 0.0,
        "round_trip_share": 1.0,
    } | tokenizer
    manifest = {
        "stream": stream,
        "options": {"sources": sources, "deduplication": {"near_threshold": 0.55}, "tokenizer": {"vocab_size": 500}},
        "files": [
            {"source": source, "name": "d\udcff.jsonl", "bytes": 7, "content": "c0d8" * 16} for source in sources
        ],
        "documents_read": len(documents),
        "bytes_read": sum(len(item["text"].encode()) for item in documents),
        "read": {
            "sources": {},
            "broken": 1,
            "broken_bytes": 7,
            "broken_lines": 1,
            "file_bytes": 5000,
            "files": 3,
            "lost_files": 0,
            "broken_reasons": {"no JSON": {"records": 1, "bytes": 7, "files": 0}},
            "skipped_files": [],
            "broken_files": {"a.jsonl": {"records": 1, "bytes": 7, "files": 0}},
            "broken_records": [{"file": "a.jsonl", "why": "line 3: no JSON", "bytes": 7}],
            "skipped": {"too long": 2},
            "skipped_bytes": {"too long": 9},
        },
        "changed": {step: number for number, step in enumerate(expand_steps(["standard"]))},
        "dropped": selection.count(),
        "splits": {
            split: figures(split, everything)
            | {"sources": {name: figures(split, {number}) for number, name in enumerate(sources)}}
            for split in rows
        },
        "tokenizer": {
            "from": "x",
            "vocab_size": 500,
            "dtype": "uint16",
            "spelled_out": {},
            "sources": dict.fromkeys(sources, measured),
        },
        "versions": {"datasets": "5.2.0"},
        "token_lengths": {split: lengths.tolist() for split, lengths in tokens.items()},  # not in a real manifest
    }
    details = collect_details(cleaned, lengths, selection, tokens, rows)
    page = html_report("demo", manifest, details)
    assert page == html_report("demo", manifest, collect_details(cleaned, lengths, selection, tokens, rows))
    page.encode()
    return page, selection, manifest


@pytest.fixture(scope="module")
def documents() -> list[dict]:
    """Dictionary entries in two sources, some of them too short, with near and exact duplicates among them."""
    items = [record | {"source": record["id"].split("/")[0]} for record in RECORDS]
    words = items[700]["text"].split(" ")
    edited = [" ".join([*words[:-5], f"edition{letter}", *words[-5:]]) for letter in "abcd"]
    items += [{"id": f"edited/{number}", "source": "jargon", "text": text} for number, text in enumerate(edited)]
    items.append({"id": "again", "source": "devil", "text": items[1]["text"]})
    items.append({"id": "nothing", "source": "devil", "text": " \n"})
    return items


def test_figures_are_those_of_a_plain_count(documents):
    text, selection, manifest = report(documents)
    page = Page(text)
    assert page.open == [] and page.tags["h2"] == 8
    by_reason = Counter(
        (selection.reasons[code], source) for code, source in zip(selection.code, selection.source, strict=True)
    )
    sources = sorted({item["source"] for item in documents})
    assert page.row("reason, by source")[1:] == sources
    for reason in ["", *selection.count()]:
        rows = [row for row in page.rows if row[0] == (reason or "kept")]
        assert [f"{by_reason[reason, number]:,}" for number in range(len(sources))] in [row[1:] for row in rows], reason
    assert {"exact duplicate", "near duplicate", "empty after cleaning", "length: too short"} <= manifest[
        "dropped"
    ].keys()
    for split, kept in (("train", selection.train), ("validation", selection.validation)):
        tokens = manifest["splits"][split]["tokens"]
        assert page.row("all", f"{kept.sum():,}")[3] == f"{tokens:,}"
        assert f"{tokens / kept.sum():,.0f}" in page.row("mean")[1:]
    assert page.row("a.jsonl")[1:] == page.row("no JSON")[1:] == ["1", "0", "7"] and page.row("too long")[1] == "2"


def test_bins_hold_what_a_plain_loop_counts(documents):
    text, _, manifest = report(documents)
    page, tokens = Page(text), manifest["token_lengths"]
    bins = [row for row in page.rows if re.fullmatch(r"[\d,]+(–[\d,]+)?", row[0]) and len(row) == 3 and "%" in row[1]]
    assert len(bins) >= 8
    for column, split in ((1, "train"), (2, "validation")):
        seen = 0
        for row in bins:
            low, _, high = row[0].replace(",", "").partition("–")
            inside = sum(int(low) <= length <= int(high or low) for length in tokens[split])
            assert float(row[column].strip("%< ")) == pytest.approx(100 * inside / len(tokens[split]), abs=0.06)
            seen += inside
        assert seen == len(tokens[split]), "the bins leave no gap"
    assert page.row("95th percentile")[1] == f"{np.percentile(tokens['train'], 95):,.0f}"


def test_a_cluster_shows_the_longest_document_and_what_differs(documents):
    text, selection, _ = report(documents)
    members = np.flatnonzero(selection.cluster == selection.cluster[len(RECORDS)])
    assert len(members) >= 5
    start = text.index(f"<b>{len(members):,} documents</b>")
    cluster = text[start : text.index("</details>", start)]
    assert f"<code>{documents[selection.cluster[members[0]]]['id']}</code>" in cluster.split("</figure>")[0]
    assert re.search(r"<del>edition\w</del>\s<ins>edition\w</ins>", cluster) and "kept in train" in cluster


def test_nothing_in_a_document_becomes_markup_and_nothing_is_fetched(documents):
    evil = {"id": "\0" + EVIL, "source": EVIL, "text": EVIL + "\u202e long enough to be kept" * 9}
    items = [*documents, evil | {"reason": EVIL}, evil, evil | {"text": evil["text"] + " or nearly"}]
    text, selection, _ = report(items, round_trip_failures=[EVIL, {"text": EVIL}])
    page = Page(text)
    assert selection.count()[EVIL] == 1
    assert page.text.count(EVIL) > 12 and "␀" in page.text and "\0" not in text
    assert not {"script", "img", "link", "iframe", "a"} & page.tags.keys()
    assert page.attributes <= {"lang", "charset", "name", "content", "http-equiv", "class", "style", "open", "dir"}
    assert "url(" not in text and "@import" not in text
    with pytest.raises(AssertionError):  # a single unescaped place would be noticed
        Page(text.replace(str(escape(EVIL)), EVIL, 1))


def test_a_streams_report_speaks_of_its_head(documents):
    text, _, _ = report(documents, stream=True)
    page = Page(text)
    assert "training text is a stream" in page.text and "of its head" in page.text
    assert page.row("tokens per document") == ["tokens per document", "validation"]
    assert "training text is a stream" not in Page(report(documents[:200])[0]).text


def test_fifty_sources_with_long_names_stay_under_a_megabyte(documents):
    many = [item | {"source": f"{number % 50} {'name ' * 40}", "text": item["text"] + " &<>" * 300,
                    "reason": f"language: {number % 200}" if number % 3 else ""} for number, item in enumerate(documents)]  # fmt: skip
    text, selection, _ = report(many)
    assert len(selection.count()) > 100
    assert len(text.encode()) < 1_000_000
