"""README.md of an export: what the run, its dataset and the receipts say. A section without facts is left out."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from exporting import line_cells
from utils.files import UserError, flatten, read_json, read_yaml

EVALUATIONS = 12  # of the curve that are shown
SHOWN = (
    "objective.name", "data.sequence_length", "data.layout", "batch.global_batch_size", "optimizer.name",
    "optimizer.learning_rate", "optimizer.weight_decay", "schedule.shape", "schedule.warmup_steps", "schedule.max_steps",
    "model.lora.rank", "seed",
)  # fmt: skip


def write_card(folder: Path, name: str, checkpoint: Path, report: dict[str, Any], licence: str | None) -> None:
    """`report` is that of export.py, with the rows of its files."""
    run = checkpoint.parent.parent
    options = flatten(read_yaml(run / "config.yaml")) if (run / "config.yaml").is_file() else {}
    head: dict[str, Any] = {"tags": ["plainloop"]}
    opening = f"A model of {report['parameters']:,} parameters."
    if any(folder.glob("model*.safetensors")):
        head["library_name"] = "transformers"
        opening = f"A transformers model of {report['parameters']:,} parameters; `{report['opens_with']}` opens it."
    if licence:
        head["license"] = licence
    if report["pretrained"]:
        opening += f" Its training started from the weights of `{report['pretrained']}`."
    sections = {
        "Data": known(describe_data, options.get("data.dataset")),
        "Recipe": table(("option", "value"), [(key, f"`{options[key]}`") for key in SHOWN if options.get(key)]),
        "Loss": known(describe_loss, run, folder, report["optimizer_step"]),
        "Hardware and time": known(describe_hardware, run),
        "Files": table(("file", "size", "seconds", "reader", "ids", "positions", "log-prob. diff.", "perplexity", "greedy",
                        "stop", "receipt"), [line_cells(row) for row in report.get("files", [])]),
        "Limits": describe_limits(options, report),
    }  # fmt: skip
    text = f"---\n{yaml.safe_dump(head)}---\n\n# {name}\n\n{opening}\n"
    text += "".join(f"\n## {title}\n\n{body}\n" for title, body in sections.items() if body)
    (folder / "README.md").write_text(text, encoding="utf-8")


def known(describe: Callable[..., str], *arguments: Any) -> str:
    """Nothing where a file of the run is of another version, or damaged."""
    try:
        return describe(*arguments)
    except (UserError, ValueError, LookupError, TypeError, AttributeError):
        return ""


def table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    lines = [head, ("---",) * len(head), *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', '/') for cell in cells)} |" for cells in lines) if rows else ""


def describe_data(dataset: Any) -> str:
    path = Path(str(dataset)) / "manifest.json"
    if not path.is_file():
        return ""
    splits = read_json(path)["splits"]
    return table(("split", "documents", "bytes of text", "tokens"), [
        (name, *(f"{split[key]:,}" if key in split else "" for key in ("documents", "bytes", "tokens")))
        for name, split in splits.items()
    ])  # fmt: skip


def describe_loss(run: Path, folder: Path, step: int) -> str:
    """The evaluations up to the exported step, and the plot."""
    path = run / "metrics.jsonl"
    records = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.is_file() else []
    found = [record for record in records if "eval/loss" in record and record["step"] <= step]
    if not found:
        return ""
    shown = found[:: -(len(found) // -EVALUATIONS)]
    if shown[-1] is not found[-1]:
        shown.append(found[-1])
    names = {
        "eval/loss": "loss, nats per target",
        "eval/perplexity": "perplexity",
        "eval/bits_per_byte": "bits per byte",
    }
    text = "On held-out text:\n\n" + table(("step", *names.values()), [
        (f"{record['step']:,}", *(f"{record[name]:.4f}" if name in record else "" for name in names)) for record in shown
    ])  # fmt: skip
    if (run / "loss.png").is_file():
        shutil.copyfile(run / "loss.png", folder / "loss.png")
        text += "\n\n![Loss by step](loss.png)"
    return text


def describe_hardware(run: Path) -> str:
    if not (run / "environment.json").is_file():
        return ""
    launches = read_json(run / "environment.json", list)
    last = launches[-1]
    lines = [f"- {last['num_processes']} × {last['device']}, mixed precision {last['mixed_precision']}, in "
             f"{len(launches)} launch{'es' if len(launches) > 1 else ''}"]  # fmt: skip
    if (run / "summary.json").is_file():
        summary = read_json(run / "summary.json")
        hours, tokens = summary["train_seconds"] / 3600, summary["tokens_seen"]
        lines.append(f"- {hours:.2f} hours of training, {tokens:,} tokens")
    versions = ", ".join(f"{name} {version}" for name, version in last["packages"].items())
    return "\n".join([*lines, f"- Python {last['python']}, {versions}"])


def describe_limits(options: dict[str, Any], report: dict[str, Any]) -> str:
    lines = []
    if length := options.get("data.sequence_length"):
        lines.append(f"- It was trained on rows of {length:,} tokens; longer texts are untested.")
    if not any("reader" in row for row in report.get("files", [])):
        lines.append("- No reader has opened its files in another process.")
    return "\n".join([*lines, "- It was evaluated by its loss alone, not on tasks, for safety or for bias."])
