"""A prepared dataset described in text: the table on the console and the data card."""

from typing import Any

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
    weighted = [entry for entry in manifest["options"]["sources"] if isinstance(entry, dict) and "weight" in entry]
    if weighted and not manifest["stream"]:
        lines.append("train counts each document as often as the weight of its source says")
    sources = splits["train"]["sources"] if "train" in splits else {}
    for name in [name for name, figures in sources.items() if not figures["documents"]]:
        lines.append(f"note: no document of {name} is left for training; report.html shows why")
    left_out = {"broken record": read["broken"]} | read["skipped"] if read["broken"] else read["skipped"]
    if left_out:
        lines.append("not read: " + ", ".join(f"{reason} {count:,}" for reason, count in left_out.items()))
    if manifest["stream"]:
        lines.append("train: not stored, but read, cleaned and tokenized while training")
    steps = ", ".join(f"{step} {count:,}" for step, count in manifest["changed"].items() if count)
    lines.append(f"documents changed by: {steps or 'none'}")
    tokenizer, options = manifest["tokenizer"], manifest["options"]["tokenizer"]
    short = tokenizer["from"] == TRAINED_HERE and tokenizer["vocab_size"] < options["vocab_size"]
    note = f" ({options['vocab_size']:,} requested, but the text has no more pairs to merge)" if short else ""
    lines.append(f"tokenizer: {tokenizer['vocab_size']:,} entries, from {tokenizer['from']}{note}")
    lines += [f"broken: {record['file']}: {record['why']}" for record in read["broken_records"][:5]]
    if read["broken"] > 5:
        lines.append(f"broken: {read['broken'] - 5:,} more; see manifest.json")
    return "\n".join(lines)


def _row(name: str, figures: dict[str, Any]) -> str:
    ratio = figures["bytes"] / figures["tokens"] if figures["tokens"] else 0.0
    return f"{name:<34}{figures['documents']:>12,}{figures['bytes']:>16,}{figures['tokens']:>16,}{ratio:>13.2f}"


def tokenizer_table(manifest: dict[str, Any]) -> str:
    """How well the tokenizer works on a sample of each source."""
    lines = [f"{'source':<34}{'bytes/token':>12}{'tokens/word':>13}{'unknown':>10}{'round trip':>12}"]
    row = "{:<34}{bytes_per_token:>12.2f}{fertility:>13.2f}{unknown_rate:>10.2%}{round_trip_share:>12.1%}"
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
    return (
        f"# Token dataset `{name}`\n\nMade by Plainloop's `prepare_data.py`. {train}{stored} Arrow tables with one row "
        f"per document and {columns}; `tokenizer/` opens with `AutoTokenizer` ({tokenizer['vocab_size']:,} entries, "
        f"from {tokenizer['from']}). `report.html` shows what was kept and dropped.\n\n"
        f"## Sources\n\n{listed}{more}\n\nEach source has its own licence: check it before you share this folder.\n\n"
        f"## Figures\n\n```\n{table(manifest)}\n```\n\n## Tokenizer\n\n```\n{tokenizer_table(manifest)}\n```\n\n"
        f"## Options\n\n{options}\n"
    )
