"""What a person reads about a prepared dataset: the table on the console and the data card."""

from typing import Any

TRAINED_HERE = "the training documents"


def table(manifest: dict[str, Any]) -> str:
    """Documents, bytes and tokens; what was dropped and why; the tokenizer; seconds per stage."""
    lines = [f"{'':<22}{'documents':>12}{'bytes':>14}{'tokens':>12}{'bytes/token':>13}"]
    lines.append(f"{'read':<22}{manifest['documents_read']:>12,}{manifest['bytes_read']:>14,}")
    for reason, count in manifest["dropped"].items():
        lines.append(f"{'- ' + reason:<22}{count:>12,}")
    for split, figures in manifest["splits"].items():
        ratio = figures["bytes"] / figures["tokens"]
        lines.append(
            f"{split:<22}{figures['documents']:>12,}{figures['bytes']:>14,}{figures['tokens']:>12,}{ratio:>13.2f}"
        )
    tokenizer, asked = manifest["tokenizer"], manifest["options"]["tokenizer"]["vocab_size"]
    short = tokenizer["from"] == TRAINED_HERE and tokenizer["vocab_size"] < asked
    note = f" ({asked:,} asked for: the text has no more pairs to merge)" if short else ""
    lines.append(f"tokenizer: {tokenizer['vocab_size']:,} entries, from {tokenizer['from']}{note}")
    seconds = manifest["seconds"]
    stages = ", ".join(f"{stage} {value:.1f}" for stage, value in seconds.items())
    lines.append(f"seconds: {stages}; {sum(seconds.values()):.1f} in all")
    return "\n".join(lines)


def data_card(name: str, manifest: dict[str, Any]) -> str:
    """README.md of the dataset folder."""
    sources = "\n".join(
        f"- `{item['name']}`, {item['bytes']:,} bytes, SHA-256 `{item['sha256']}`" for item in manifest["sources"]
    )
    options = "\n".join(f"- `{key}`: `{value}`" for key, value in manifest["options"].items())
    tokenizer = manifest["tokenizer"]
    return (
        f"# Token dataset `{name}`\n\nMade by Plainloop's `prepare_data.py`. `train/` and `validation/` are Arrow "
        f"tables with one row per document and one column, `input_ids` ({tokenizer['dtype']}); `tokenizer/` opens "
        f"with `AutoTokenizer` ({tokenizer['vocab_size']:,} entries, from {tokenizer['from']}).\n\n"
        f"## Sources\n\n{sources}\n\nTheir licences are their own: look them up before you share this folder.\n\n"
        f"## Figures\n\n```\n{table(manifest)}\n```\n\n## Options\n\n{options}\n"
    )
