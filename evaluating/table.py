"""Several models side by side: what each scored on each text, and whether that is better than what the first scored."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from evaluating.intervals import CONFIDENCE, Difference, Interval, intervals_of_ratios
from evaluating.models import Candidate

if TYPE_CHECKING:  # they import torch
    from evaluating.scoring import Score
    from evaluating.texts import Text

# Options that do not change what a model learns.
WITHOUT_EFFECT = ("output", "console", "max_minutes", "dry_run", "tracking.", "checkpoint.", "evaluation.")
WIDEST = 40  # characters of an option's value


def compare(text: "Text", scores: "Sequence[Score]", has_bytes: bool, seed: int) -> list[dict[str, Any]]:
    """A record for all of a text and one for each of its sources, with an entry per model. has_bytes: whether every
    token of the text is a target of every model, so that bits per byte can be given.

    Losses per token are compared where all models predicted as many tokens of each unit, else bits per byte.
    """
    parts = {"": np.arange(len(scores[0].sums))} | (text.sources if scores[0].unit == "documents" else {})
    same_tokens = all(np.array_equal(score.counts, scores[0].counts) for score in scores)
    metric = "loss" if same_tokens else "bits_per_byte" if has_bytes else None
    records = []
    for source, units in parts.items():
        chosen = [score.of(units) for score in scores]
        size = text.unit_bytes[units] if has_bytes else None
        entries = [describe(score, size) for score in chosen]
        if metric is not None:
            sums = np.stack([score.sums for score in chosen], axis=1)
            sizes = np.stack([score.counts for score in chosen], axis=1)
            if metric == "bits_per_byte":
                assert size is not None
                sums, sizes = sums / math.log(2), np.repeat(size[:, None], len(chosen), axis=1)
            own, paired = intervals_of_ratios(sums, sizes, seed)
            for entry, interval, difference in zip(entries, own, paired, strict=True):
                entry |= {"metric": metric, "interval": as_list(interval)}
                if entry is not entries[0]:
                    entry |= as_entry(Difference(entry[metric] - entries[0][metric], difference))
        records.append({"source": source or None, "units": len(units), "models": entries})
    return records


def describe(score: "Score", unit_bytes: np.ndarray | None) -> dict[str, Any]:
    loss = score.loss
    entry = {"loss": loss, "perplexity": math.exp(loss) if loss < 700 else math.inf, "target_tokens": score.num_tokens}
    if unit_bytes is not None and unit_bytes.sum():
        entry["bits_per_byte"] = float(score.sums.sum()) / math.log(2) / float(unit_bytes.sum())
    return entry


def as_list(interval: Interval | None) -> list[float] | None:
    return None if interval is None else [interval.low, interval.high]


def as_entry(difference: Difference) -> dict[str, Any]:
    found = {"difference": difference.value, "difference_interval": as_list(difference.interval)}
    return found | {"verdict": difference.verdict}


def lines_of(records: list[dict[str, Any]], names: Sequence[str]) -> list[str]:
    """The records of `compare` as a table."""
    metric = records[0]["models"][0].get("metric")
    percent = f"{CONFIDENCE:.0%} interval"
    spelled = "bits per byte" if metric == "bits_per_byte" else "loss"
    head = ["model", "loss", "perplexity", "bits per byte", f"{spelled}, {percent}"]
    head += ["difference", percent, ""] if len(names) > 1 else []
    has_sources = len(records) > 1
    rows = [[*(["source"] if has_sources else []), *head]]
    for record in records:
        for name, entry in zip(names, record["models"], strict=True):
            bits = f"{entry['bits_per_byte']:.4f}" if "bits_per_byte" in entry else "-"
            row = [name, f"{entry['loss']:.4f}", f"{entry['perplexity']:.2f}", bits, spell(entry.get("interval"))]
            if len(names) > 1 and "difference" in entry:
                row += [f"{entry['difference']:+.4f}", spell(entry["difference_interval"], "+"), entry["verdict"]]
            elif len(names) > 1:
                row += ["", "", "" if metric else "cannot compare"]
            rows.append([*([record["source"] or "all"] if has_sources else []), *row])
    return align(rows)


def spell(interval: list[float] | None, sign: str = "") -> str:
    return "-" if interval is None else f"{interval[0]:{sign}.4f} to {interval[1]:{sign}.4f}"


def align(rows: list[list[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def differing_options(candidates: Sequence[Candidate]) -> dict[str, list[Any]]:
    """Option → its value in the run of each model, for those that differ; of a model without a run, null. An export
    knows only how its run scored, so it is compared on that."""
    known = [candidate.options for candidate in candidates if candidate.options]
    names = [name for name in known[0] if all(name in options for options in known)] if len(known) > 1 else []
    return {
        name: [candidate.options.get(name) for candidate in candidates]
        for name in names
        if not name.startswith(WITHOUT_EFFECT) and any(options[name] != known[0][name] for options in known)
    }


def lines_of_options(options: dict[str, list[Any]], candidates: Sequence[Candidate]) -> list[str]:
    """What differs in the runs' options, as a table; or that nothing does, or is known."""
    unknown = [candidate.name for candidate in candidates if not candidate.options]
    lines = [f"options of the run are not known: {', '.join(unknown)}"] if unknown else []
    if options:
        rows = [["option", *(candidate.name for candidate in candidates)]]
        for name, values in options.items():
            rows.append([name, *("-" if value is None else str(value)[:WIDEST] for value in values)])
        return lines + align(rows)
    return lines if len(candidates) - len(unknown) < 2 else [*lines, "no option of the runs differs"]
