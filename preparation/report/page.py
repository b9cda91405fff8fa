"""report.html: how a text dataset was prepared, on one page without other files, scripts or network access."""

import difflib
import itertools
import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import numpy as np

from preparation.selection.splits import Selection
from preparation.sources.media import describe
from utils.report import LINE, NAME, cut, page_templates

EXAMPLES, EXAMPLE_CHARACTERS = 3, 400  # per reason; per document
CLUSTERS, MEMBERS, MEMBER_CHARACTERS = 5, 3, 220  # the largest, and as many others; per cluster; per member
COMPARED_CHARACTERS, COMPARED_WORDS = 4000, 500  # of near duplicates; the time of difflib is quadratic
REASONS, FILES, BROKEN, FAILURES = 40, 50, 20, 3  # listed at most; the language filter alone has 180 reasons
MEDIA = 4  # pictures or sounds of a document
FEW_BYTES = 2.0  # per token: English text takes 3 to 5, Chinese and Russian in a tokenizer made for them 3 to 6
BYTE_LEVEL = 1000  # entries of a tokenizer whose tokens are bytes or letters by design, at most
SPELLED = 20  # the same of special tokens


def collect_details(
    cleaned: datasets.Dataset, lengths: np.ndarray, selection: Selection, token_lengths: dict[str, np.ndarray],
    rows: dict[str, np.ndarray], kind: str | None = None,
) -> dict[str, Any]:  # fmt: skip
    """What the page shows in addition to the manifest: counts over all N documents, the texts of at most 160 of them.

    `lengths` (N,): UTF-8 bytes of each text of `cleaned`. By split, `token_lengths` (n,): tokens of each stored
    document; `rows` (n,): its number in `cleaned`, which also has the column `media` if `kind` says of what kind they
    are. A document in the result is {text, source, id, bytes, fate, media}.
    """
    numbers, first = np.unique(selection.source, return_index=True)
    shape = len(selection.reasons), int(numbers[-1]) + 1
    pairs = np.bincount(selection.code.astype(np.int64) * shape[1] + selection.source, minlength=shape[0] * shape[1])
    by_source = dict(zip(selection.reasons, pairs.reshape(shape)[:, numbers], strict=True))

    def excerpt(row: int, characters: int) -> dict[str, Any]:
        record = cleaned[int(row)]
        kept = "kept in validation" if selection.validation[row] else "kept in train"
        fate = selection.reasons[selection.code[row]] or kept
        media = [describe(data, kind) for data in record["media"][:MEDIA]] if kind else []
        shown = {"text": cut(record["text"], characters), "bytes": int(lengths[row]), "fate": fate, "media": media}
        return record | shown

    def examples_of(mask: np.ndarray) -> list[dict[str, Any]]:
        return [excerpt(row, EXAMPLE_CHARACTERS) for row in _spread(np.flatnonzero(mask), EXAMPLES)]

    reasons = itertools.islice(selection.count(), REASONS)
    examples = {reason: examples_of(selection.code == selection.reasons.index(reason)) for reason in reasons}

    names = [cleaned[int(row)]["source"] for row in first]
    kept = {}
    for name, number in zip(names[:REASONS], numbers, strict=False):
        if documents := examples_of(selection.train & (selection.source == number)):
            kept[name] = documents

    members = np.flatnonzero(selection.cluster != np.arange(len(selection.cluster)))
    roots, sizes = np.unique(selection.cluster[members], return_counts=True)
    by_size = np.argsort(-sizes, kind="stable")
    clusters = []
    for index in [*by_size[:CLUSTERS], *_spread(np.sort(by_size[CLUSTERS:]), CLUSTERS)]:
        shown = [roots[index], *_spread(members[selection.cluster[members] == roots[index]], MEMBERS)]
        clusters.append((int(sizes[index]) + 1, [excerpt(row, COMPARED_CHARACTERS) for row in shown]))

    tokens = {split: values for split, values in token_lengths.items() if len(values)}
    ratios = {split: lengths[rows[split]] / values for split, values in tokens.items()}
    return {
        "sources": names,
        "counts": {reason: by_source[reason] for reason in ["", *selection.count()]},  # by source; "" means kept
        "examples": examples,  # dropped documents by reason
        "kept": kept,  # documents for training, by source
        "clusters": clusters,  # of near duplicates: size; the representative and a few others
        "cluster_sizes": sizes + 1,  # of all clusters
        "tokens": tokens,  # of each stored document, by split
        "ratios": ratios,  # bytes per token, likewise
    }


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


def html_report(name: str, manifest: dict[str, Any], details: dict[str, Any]) -> str:
    """The complete page. The same arguments give the same text; text from documents and file names is escaped."""
    environment = page_templates(Path(__file__).parent)
    environment.filters["difference"] = difference
    sizes = {"EXAMPLES": EXAMPLES, "CLUSTERS": CLUSTERS, "MEMBER_CHARACTERS": MEMBER_CHARACTERS}
    read, splits = manifest["documents_read"], manifest["splits"]
    totals = [sum(figures[key] for figures in splits.values()) for key in ("bytes", "tokens")]
    read_from = np.sum(list(details["counts"].values()), axis=0).tolist()
    by_source = [{"reason": reason or "kept", "parts": list(zip(counts.tolist(), read_from, strict=True))}
                 for reason, counts in itertools.islice(details["counts"].items(), REASONS + 1)]  # fmt: skip

    shown, counts = manifest["files"][:FILES], manifest["read"]
    broken = counts["broken_records"]
    return environment.get_template("page.html").render(
        sizes, name=name, details=details, stream=manifest["stream"], splits=splits, versions=manifest["versions"],
        tokenizer=manifest["tokenizer"], read=read, bytes_read=manifest["bytes_read"],
        kept=read - sum(manifest["dropped"].values()), total_ratio=f"{totals[0] / max(totals[1], 1):.2f}",
        dropped=manifest["dropped"], by_source=by_source, read_counts=counts,
        skipped=[(why, count, counts["skipped_bytes"][why]) for why, count in counts["skipped"].items()],
        skipped_files=[[cut(item["file"], LINE), item["why"], item["bytes"]] for item in counts["skipped_files"][:FILES]],
        losses=[_loss(*pair) for pair in counts["broken_reasons"].items()],
        lossy_files=[_loss(*pair) for pair in itertools.islice(counts["broken_files"].items(), FILES)],
        changed={step: count for step, count in manifest["changed"].items() if count},
        broken=[(cut(item["file"], LINE), cut(item["why"], LINE), item["bytes"]) for item in broken[:BROKEN]],
        page_shares=page_shares(manifest["read"]), small_pages=manifest["read"].get("small_pages", [])[:BROKEN],
        notes=notes_on_pages(manifest["read"]), media_lines=media_lines(manifest),
        distributions=_distributions(details["tokens"], details["ratios"]),
        cluster_spans=_cluster_spans(details["cluster_sizes"]),
        searched=manifest["options"]["deduplication"]["near_threshold"] is not None,
        failures=list(_iter_failures(manifest)), options=list(_flatten(manifest["options"])),
        files=[(cut(item["source"], NAME), cut(item["name"], LINE), item["content"], item["bytes"]) for item in shown],
        all_files=len(manifest["files"]), console_table=table(manifest),
    )  # fmt: skip


def _loss(name: str, item: dict[str, int]) -> list[Any]:
    return [cut(name, LINE), item["records"], item["files"], item["bytes"]]


def difference(kept: str, other: str) -> Iterator[tuple[str, str, str]]:
    """`other` from a little before its first difference, as (kind, text, white space after it): kind is "del" for words
    only in `kept`, "ins" for words only in `other`, else ""."""
    old, new = (re.findall(r"\S+\s*", text)[:COMPARED_WORDS] for text in (kept, other))
    matcher = difflib.SequenceMatcher(None, list(map(str.strip, old)), list(map(str.strip, new)), autojunk=False)
    words: list[tuple[str, str]] = []
    for kind, a, b, c, d in matcher.get_opcodes():
        words += [("del", word) for word in old[a:b] if kind != "equal"]
        words += [("" if kind == "equal" else "ins", word) for word in new[c:d]]
    first = next((at for at, (kind, _) in enumerate(words) if kind), 0)
    start, left = max(first - 8, 0), MEMBER_CHARACTERS
    if start:
        yield "", "…", " "
    for kind, run in itertools.groupby(words[start:], key=lambda word: word[0]):
        text = cut("".join(word for _, word in run), left)
        yield kind, text.rstrip(), text[len(text.rstrip()) :]
        left -= len(text)
        if left <= 0:
            break


def _distributions(tokens: dict[str, np.ndarray], ratios: dict[str, np.ndarray]) -> list[dict[str, Any]]:
    """Statistics and histograms of tokens per document and bytes per token."""
    edges = half_octaves(tokens)
    pairs = itertools.pairwise(edges.tolist())
    spans = [f"{low:,}" if low + 1 == high else f"{low:,}–{high - 1:,}" for low, high in pairs]
    steps = even_steps(ratios)
    ranges = [f"{low:.2f}–{high:.2f}" for low, high in itertools.pairwise(steps)]
    ranges[0], ranges[-1] = f"below {steps[1]:.2f}", f"from {steps[-2]:.2f}"
    return [
        _distribution("tokens per document", 0, tokens, edges, spans),
        _distribution("bytes per token", 2, ratios, steps, ranges),
    ]


def _distribution(
    name: str, digits: int, values: dict[str, np.ndarray], edges: np.ndarray, labels: list[str]
) -> dict[str, Any]:
    """`values` are those of each split's documents; the outer bins also hold values beyond the outer edges."""
    quantiles = {"median": 0.5, "95th percentile": 0.95, "minimum": 0, "maximum": 1}
    figures = {"mean": [array.mean() for array in values.values()]}
    figures |= {label: [np.quantile(array, share) for array in values.values()] for label, share in quantiles.items()}
    counts = {split: np.histogram(np.clip(array, edges[0], edges[-1]), edges)[0] for split, array in values.items()}
    shares = {split: (count / count.sum()).tolist() for split, count in counts.items()}
    rows = (dict(zip(shares, row, strict=True)) for row in zip(*shares.values(), strict=True))
    bins = [{"label": label, "shares": row} for label, row in zip(labels, rows, strict=True)]
    return {
        "name": name, "splits": list(values), "heads": [f"share of {split}" for split in values], "bins": bins,
        "figures": [[label, *(f"{value:,.{digits}f}" for value in row)] for label, row in figures.items()],
        "greatest": max(max(share) for share in shares.values()),
    }  # fmt: skip


def _cluster_spans(sizes: np.ndarray) -> dict[str, int]:
    """The number of clusters by size: 2, 3–4, 5–8, 9–16, ..."""
    octaves = np.bincount(np.ceil(np.log2(sizes)).astype(np.int64)).tolist()
    spans = [f"{2 ** (octave - 1) + 1:,}–{2**octave:,}" if octave > 1 else "2" for octave in range(len(octaves))]
    return {span: count for span, count in zip(spans, octaves, strict=True) if count}


def _iter_failures(manifest: dict[str, Any]) -> Iterator[tuple[str, str]]:
    for source, item in manifest["tokenizer"]["sources"].items():
        for failure in item.get("round_trip_failures", [])[:FAILURES]:
            text = failure if isinstance(failure, str) else json.dumps(failure, ensure_ascii=False)
            yield cut(source, NAME), cut(text, LINE)


def _flatten(options: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    for name, value in options.items():
        if isinstance(value, dict):
            yield from _flatten(value, f"{prefix}{name}.")
        else:
            yield prefix + name, cut(json.dumps(value, ensure_ascii=False), 100 * LINE)


# ---- The same in text: the table on the console and the data card


TRAINED_HERE = "the training documents"


def table(manifest: dict[str, Any]) -> str:
    """Documents, bytes and tokens; how many were changed or dropped, and why; the tokenizer."""
    read, splits, dropped = manifest["read"], manifest["splits"], manifest["dropped"]
    name = "read (the head of a stream)" if manifest["stream"] else "read"
    lines = [
        f"{'':<34}{'documents':>12}{'bytes':>16}{'tokens':>16}{'bytes/token':>13}",
        f"{name:<34}{manifest['documents_read']:>12,}{manifest['bytes_read']:>16,}",
        *(f"{'- ' + reason:<34}{count:>12,}" for reason, count in dropped.items()),
        f"{'kept':<34}{manifest['documents_read'] - sum(dropped.values()):>12,}",
    ]
    for split, figures in splits.items():
        lines.append(_row(split, figures))
        if "assistant_tokens" in figures:
            lines.append(f"{'  said by the assistant':<62}{figures['assistant_tokens']:>16,}")
        if len(figures["sources"]) > 1:
            for name, source in figures["sources"].items():
                lines.append(f"{_row(f'  {name}', source)}{source['tokens'] / max(figures['tokens'], 1):>7.1%}")
    lines += media_lines(manifest)
    weighted = [entry for entry in manifest["options"]["sources"] if isinstance(entry, dict) and "weight" in entry]
    if weighted and not manifest["stream"]:
        lines.append("train counts each document as often as the weight of its source says")
    sources = splits["train"]["sources"] if "train" in splits else {}
    for name in [name for name, figures in sources.items() if not figures["documents"]]:
        lines.append(f"note: no document of {name} is left for training; report.html shows why")
    left_out = {"broken record": (read["broken"], read["broken_bytes"])} if read["broken"] else {}
    left_out |= {why: (count, read["skipped_bytes"][why]) for why, count in read["skipped"].items()}
    if left_out:
        parts = (f"{reason} {count:,} ({size:,} bytes)" for reason, (count, size) in left_out.items())
        lines.append("not read: " + ", ".join(parts))
        if names := [cut(item["file"], NAME) for item in read["skipped_files"][:3]]:
            lines.append(f"  such as {', '.join(names)}: .txt and .md are read as text; report.html lists more")
    if read["lost_files"]:
        lines.append(f"lost: {read['lost_files']:,} of {read['files']:,} files, {read['broken_bytes']:,} of "
                     f"{read['file_bytes']:,} bytes")  # fmt: skip
    if manifest["stream"]:
        lines.append("train: not stored, but read, cleaned and tokenized while training")
    steps = ", ".join(f"{step} {count:,}" for step, count in manifest["changed"].items() if count)
    lines.append(f"documents changed by: {steps or 'none'}")
    tokenizer, options = manifest["tokenizer"], manifest["options"]["tokenizer"]
    short = tokenizer["from"] == TRAINED_HERE and tokenizer["vocab_size"] < options["vocab_size"]
    note = f" ({options['vocab_size']:,} requested, but the text has no more pairs to merge)" if short else ""
    lines.append(f"tokenizer: {tokenizer['vocab_size']:,} entries, from {tokenizer['from']}{note}")
    for name, figures in tokenizer["sources"].items():
        ratio, foreign = figures["bytes_per_token"], tokenizer["from"] != TRAINED_HERE
        if foreign and ratio < FEW_BYTES and tokenizer["vocab_size"] > BYTE_LEVEL:
            lines.append(
                f"hint: the tokenizer takes a token for every {ratio:.1f} bytes of {name}, so it was made for other text; "
                "leave tokenizer.pretrained out to train one on this text"
            )
        if lost := figures.get("lost_share"):
            share = f"{lost:.2%}" if lost >= 0.0001 else "< 0.01%"
            lines.append(f"warning: the tokenizer cannot write {share} of {name}: {figures['lost_characters']}")
    if spelled := tokenizer.get("spelled_out"):
        counts = ", ".join(f"{token} {count:,}" for token, count in list(spelled.items())[:SPELLED])
        meaning = "became tokens" if options.get("parse_special_tokens") else "are text (see parse_special_tokens)"
        lines.append(f"special tokens spelled out in the stored text, which {meaning}: {counts}")
    lines += [f"note: {note}" for note in notes_on_pages(read)]
    lines += [f"broken: {record['file']}: {record['why']}" for record in read["broken_records"][:5]]
    if read["broken"] > 5:
        lines.append(f"broken: {read['broken'] - 5:,} more; see manifest.json")
    return "\n".join(lines)


def media_lines(manifest: dict[str, Any]) -> list[str]:
    """One line per source with pictures or sounds, and one per split: their number, size and extent."""
    name = "pictures" if manifest.get("media", {}).get("kind") == "image" else "sounds"
    lines = []
    for source, figures in manifest["read"]["sources"].items():
        if files := figures.get("media"):
            minutes = f"{figures.get('milliseconds', 0) / 60_000:,.1f} minutes"
            extent = f"{figures['pixels'] / 1e6:,.1f} megapixels" if "pixels" in figures else minutes
            lines.append(f"{name} of {source}: {files:,}, {figures['media_bytes']:,} bytes, {extent}")
    for split, figures in manifest["splits"].items():
        if "media_files" in figures:
            lines.append(f"{name} in {split}: {figures['media_files']:,}, {figures['media_bytes']:,} bytes")
    return lines


def page_shares(read: dict[str, Any]) -> dict[str, dict[str, int]]:
    """By source with HTML: the pages, those of which little is text, and the characters of text and of all."""
    return {name: figures for name, figures in read["sources"].items() if figures.get("pages")}


def notes_on_pages(read: dict[str, Any]) -> list[str]:
    """One line per source whose pages lost much: more than half of their characters, or most of every fifth page. Of
    879 pages of documentation 13 % of the characters and most of every nineteenth page were navigation."""
    notes = []
    for name, figures in page_shares(read).items():
        kept = figures["kept_characters"] / max(figures["page_characters"], 1)
        if kept < 0.5 or figures["small_pages"] * 5 > figures["pages"]:
            examples = ", ".join([page["file"] for page in read["small_pages"] if page["source"] == name][:3])
            notes.append(
                f"only {kept:.0%} of the characters on the pages of {name} are kept as text, and less than a tenth on "
                f"{figures['small_pages']:,} of {figures['pages']:,} pages{f': look at {examples}' if examples else ''}"
            )
    return notes


def _row(name: str, figures: dict[str, Any]) -> str:
    ratio = figures["bytes"] / figures["tokens"] if figures["tokens"] else 0.0
    return f"{name:<34}{figures['documents']:>12,}{figures['bytes']:>16,}{figures['tokens']:>16,}{ratio:>13.2f}"


def tokenizer_table(manifest: dict[str, Any]) -> str:
    """How well the tokenizer works on a sample of each source."""
    lines = [f"{'source':<34}{'bytes/token':>12}{'tokens/word':>13}{'unknown':>10}{'lost':>10}{'round trip':>12}"]
    row = "{:<34}{bytes_per_token:>12.2f}{fertility:>13.2f}{unknown_rate:>10.2%}{lost_share:>10.2%}{round_trip_share:>12.1%}"
    lines += [row.format(name, **figures) for name, figures in manifest["tokenizer"]["sources"].items()]
    return "\n".join(lines)


def data_card(name: str, manifest: dict[str, Any]) -> str:
    """README.md of the dataset folder."""
    files = manifest["files"]
    listed = "\n".join("- {source}: `{name}`, {bytes:,} bytes, `{content}`".format(**item) for item in files[:20])
    more = f"\n- and {len(files) - 20:,} more files, listed in `manifest.json`" if len(files) > 20 else ""
    options = "\n".join(f"- `{key}`: `{value}`" for key, value in manifest["options"].items())
    tokenizer = manifest["tokenizer"]
    train = "The training text is not stored, but read while training. " if manifest["stream"] else ""
    stored = "`validation/` is" if manifest["stream"] else "`train/` and `validation/` are"
    columns = f"the column `input_ids` ({tokenizer['dtype']})"
    if "assistant_tokens" in manifest["splits"]["validation"]:
        columns += " and `loss_mask` (uint8), which is 1 for the tokens that the assistant says"
    if media := manifest.get("media"):
        stands = f", where the text has the token `{media['placeholder']}`" if "placeholder" in media else ""
        columns += (
            f"; `train_media/` and `validation_media/` have the files of kind {media['kind']} of each row{stands}"
        )
    text = (
        f"# Token dataset `{name}`\n\nMade by Plainloop's `prepare_data.py`. {train}{stored} Arrow tables with one row "
        f"per document and {columns}; `tokenizer/` opens with `AutoTokenizer` ({tokenizer['vocab_size']:,} entries, "
        f"from {tokenizer['from']}). `report.html` shows what was kept and dropped.\n\n"
        f"## Sources\n\n{listed}{more}\n\nEach source has its own licence: check it before you share this folder.\n\n"
        f"## Figures\n\n```\n{table(manifest)}\n```\n\n{_losses(manifest['read'])}## Tokenizer\n\n```\n{tokenizer_table(manifest)}\n```\n\n"
        f"## Options\n\n{options}\n"
    )
    return text.encode(errors="replace").decode()  # a file name may hold bytes that are not UTF-8


def _losses(read: dict[str, Any]) -> str:
    """What was not read, by reason and by file, as Markdown tables."""
    rows = [
        *(["lost", *_loss(*pair)] for pair in read["broken_reasons"].items()),
        *(["left out", why, count, count, read["skipped_bytes"][why]] for why, count in read["skipped"].items()),
    ]
    files = [["lost", *_loss(*pair)] for pair in read["broken_files"].items()]
    files += [["left out", cut(item["file"], LINE), "", item["why"], item["bytes"]] for item in read["skipped_files"]]
    if not rows:
        return ""
    lines = ["| | reason | records | files | bytes |", "|---|---|---|---|---|"]
    lines += ["| " + " | ".join(map(str, row)) + " |" for row in rows]
    lines += ["", f"Files with losses or left out ({min(len(files), FILES):,} of {len(files):,} listed):", ""]
    lines += [f"- {row[0]}: `{row[1]}`, {row[-1]:,} bytes" for row in files[:FILES]]
    return "## Not read\n\n" + "\n".join(lines) + "\n\n"
