"""report.html: a run on one page, without other files, scripts or network access. Works without torch."""

import os
import shlex
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any
from urllib.parse import quote

import jinja2

from training.report.curves import Curve, Curves, Series, chart
from training.report.folder import (
    CHECKPOINTS,
    LAUNCHES,
    SAMPLE_CHARACTERS,
    RunFolder,
    changed_options,
    commands,
    folder_bytes,
    read_run,
    spell,
)
from utils.checkpoints import step_of
from utils.cli import UserError
from utils.files import flatten, read_json, readable, replace_text, short
from utils.report import LINE, cut, page_templates

PAGE = "report.html"
LOSSES = {"train/loss": "training", "eval/loss": "evaluation", "eval/average_loss": "evaluation of the averaged weights"}
# Metric → title of its chart. These begin at zero; other metrics have charts after them, under their own names.
TITLES = {
    "train/learning_rate": "learning rate", "train/grad_norm": "gradient norm before clipping",
    "perf/tokens_per_second": "tokens per second", "perf/peak_memory_gb": "peak memory, GB",
    "perf/mfu": "MFU: share of the peak FLOP/s",
}  # fmt: skip
WITHOUT_CHART = ("perf/train_seconds", "train/epoch")  # straight lines
FILES = (
    "loss.png", "metrics.jsonl", "training.log", "samples.md", "config.yaml", "environment.json", "summary.json",
    "evaluation.json",
)  # fmt: skip
COLOURS = 8  # in charts.css


class RunReport:
    """report.html of a run that is going on; a failure is one warning and never an error."""

    def __init__(self, run: Path, warn: Callable[[str], None]) -> None:
        self.run, self.warn, self.failed = run, warn, False

    def write(self) -> None:
        try:
            replace_text(self.run / PAGE, html_report(read_run(self.run)))
        except Exception as error:  # whatever a page lacks, the run matters more
            if not self.failed:
                self.warn(f"{PAGE} cannot be written: {short(error)}; training goes on without it")
            self.failed = True


@cache
def templates() -> jinja2.Environment:
    return page_templates(Path(__file__).parent)


def html_report(run: RunFolder) -> str:
    """The complete page. Text from files is escaped."""
    shown = run.checkpoints[-CHECKPOINTS:]
    pointed = [path for path in run.checkpoints[:-CHECKPOINTS] if path.name in run.pointers.values()]
    launch = run.launches[-1] if run.launches else {}
    return (
        templates()
        .get_template("page.html")
        .render(
            name=run.name,
            tiles=tiles(run),
            error=cut(str(run.summary.get("error") or ""), 5 * LINE),
            commands=commands(run),
            is_done=run.summary.get("reason") == "max_steps" and run.options.get("schedule.max_steps") is not None,
            losses=loss_charts([(run, "")]),
            legend=legend(run.curves),
            charts=metric_charts([(run, "")]),
            damaged=run.curves.damaged,
            crowded=run.curves.crowded,
            samples=[(step, cut(text, SAMPLE_CHARACTERS)) for step, text in run.samples],
            checkpoints=[checkpoint_row(run, path) for path in reversed([*pointed, *shown])],
            all_checkpoints=len(run.checkpoints),
            events=[(when, level, cut(message, 3 * LINE)) for when, level, message in reversed(run.events)],
            options=[(name, cut(value, LINE), cut(default, LINE)) for name, value, default in changed_options(run.options)],
            environment=[(name, cut(spell(value), LINE)) for name, value in flatten(launch).items() if name != "command"],
            launches=[launch_row(launch) for launch in reversed(run.launches[-LAUNCHES:])],
            all_launches=len(run.launches),
            dataset=describe_dataset(run),
            files=[name for name in FILES if (run.path / name).is_file()],
        )
    )


def state_of(run: RunFolder) -> str:
    if not run.summary:
        return "running"
    return f"{'finished' if run.summary.get('finished') else 'stopped'} ({run.summary.get('reason')})"


def tiles(run: RunFolder) -> list[tuple[str, str, str]]:
    """(name, value, note) of the figures at the top."""
    series = run.curves.series
    known = run.curves.get(*series)
    now = time.strftime("%Y-%m-%d %H:%M:%S")
    notes = {"running": f"or killed since; as of {now}"}
    of = f" of {run.max_steps:,}" if run.max_steps else ""
    found = [
        ("state", cut(state_of(run), 40), notes.get(state_of(run), f"as of {now}")),
        ("step", f"{run.step:,}{of}", f"{run.step / run.max_steps:.0%} of the run" if run.max_steps else ""),
    ]
    if "eval/loss" in known:
        step, best = known["eval/loss"].low
        found.append(("best evaluation loss", f"{best:.4f}", f"at step {int(step):,}; nats per token"))
        found.append(("last evaluation loss", f"{known['eval/loss'].last[1]:.4f}", f"at step {int(known['eval/loss'].last[0]):,}"))
    if "eval/bits_per_byte" in known:
        step, best = known["eval/bits_per_byte"].low
        found.append(("bits per byte", f"{best:.3f}", f"at step {int(step):,}, the lowest"))
    if "train/loss" in known:
        found.append(("last training loss", f"{known['train/loss'].last[1]:.4f}", f"at step {int(known['train/loss'].last[0]):,}"))
    if "perf/train_seconds" in known:
        seconds = known["perf/train_seconds"].last[1]
        left = (run.max_steps or 0) - run.step
        each = seconds / max(known["perf/train_seconds"].last[0], 1)
        note = f"about {spell_seconds(left * each)} left" if left > 0 and not run.summary else "in training steps"
        found.append(("time", spell_seconds(seconds), note))
    if run.tokens_per_step:
        tokens = run.tokens_per_step * run.step
        rate = known["perf/tokens_per_second"].last[1] if "perf/tokens_per_second" in known else None
        found.append(("tokens", spell_count(tokens), f"{rate:,.0f} per second" if rate is not None else "targets seen"))
    if isinstance(parameters := run.summary.get("parameters"), int):
        found.append(("parameters", spell_count(parameters), f"{parameters:,}"))
    return found


def spell_seconds(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    if days:
        return f"{days} d {hours} h"
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{seconds:.1f} s"


def spell_count(number: float) -> str:
    for unit, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if number >= unit:
            return f"{number / unit:.3g} {letter}"
    return f"{number:.0f}"


# ---- Charts; of one run, or of several over each other


def axes(runs: list[tuple[RunFolder, str]]) -> dict[str, list[Callable[..., Any]]]:
    """What the x axis may be → for each run a function of its steps; only what is known of all runs."""
    found: dict[str, list[Callable[..., Any]]] = {"optimizer step": [list for _ in runs]}
    if all(run.tokens_per_step for run, _ in runs):
        found["tokens"] = [run.tokens for run, _ in runs]
    if all(run.curves.get("perf/train_seconds") for run, _ in runs):
        found["hours of training"] = [run.curves.hours for run, _ in runs]
    return found


def loss_charts(runs: list[tuple[RunFolder, str]], losses: dict[str, str] = LOSSES) -> list[tuple[str, dict[str, Any]]]:
    """(title of the tab, chart): the losses by step, by tokens, by hours, and the later half. One run has a colour for each
    loss, of several each its own."""
    tabs = {f"by {unit.partition(' of ')[0].removeprefix('optimizer ')}": (unit, maps, 0.0) for unit, maps in axes(runs).items()}
    tabs["later half"] = ("optimizer step", axes(runs)["optimizer step"], 0.5)
    found = []
    for title, (unit, maps, skip) in tabs.items():
        curves = [
            Curve(name or label, f"s{(number if len(runs) > 1 else index) % COLOURS}", series, x, dots=metric != "train/loss")
            for number, ((run, name), x) in enumerate(zip(runs, maps, strict=True))
            for index, (metric, label) in enumerate(losses.items())
            for series in run.curves.get(metric).values()
        ]
        if drawn := chart(curves, unit, skip=skip):
            found.append((title, drawn))
    return found


def legend(curves: Curves) -> list[tuple[str, str, str]]:
    """(colour, name, figures) of the losses of one run."""
    found = []
    for index, (metric, label) in enumerate(LOSSES.items()):
        for series in curves.get(metric).values():
            step, low = series.low
            best = "" if metric == "train/loss" else f", lowest {low:.4f} at step {int(step):,}"
            found.append((f"s{index}", label, f"last {series.last[1]:.4f}{best}{not_finite(series)}"))
    return found


def not_finite(series: Series) -> str:
    return f"; {series.missing:,} not finite" if series.missing else ""


def metric_charts(runs: list[tuple[RunFolder, str]]) -> list[tuple[str, str, dict[str, Any]]]:
    """(title, note, chart) of every metric but the losses: the known ones, then those that some run logs besides."""
    others = sorted({name for run, _ in runs for name in run.curves.series} - {*LOSSES, *TITLES, *WITHOUT_CHART})
    found = []
    for metric in [*TITLES, *others]:
        having = [(number, pair) for number, pair in enumerate(runs) if run_has(pair[0], metric)]
        curves = [
            Curve(name, f"s{number % COLOURS}", run.curves.series[metric], dots=metric.startswith("eval/"))
            for number, (run, name) in having
        ]
        if drawn := chart(curves, "optimizer step", from_zero=metric in TITLES):
            series = curves[0].series
            note = f"last {series.last[1]:,.4g}{not_finite(series)}" if len(runs) == 1 else ""
            found.append((TITLES.get(metric, cut(metric, LINE)), note, drawn))
    return found


def run_has(run: RunFolder, metric: str) -> bool:
    return bool(run.curves.get(metric))


# ---- Tables


def checkpoint_row(run: RunFolder, path: Path) -> list[Any]:
    step = step_of(path)
    losses = [run.curves.at.get(step, {}).get(name) for name in LOSSES]
    marks = " ".join(mark.replace("_", " ") for mark, name in run.pointers.items() if name == path.name)
    spelled = ["" if not isinstance(loss, float) else f"{loss:.4f}" for loss in losses]
    return [f"{step:,}", marks, *spelled, readable(folder_bytes(path))]


def launch_row(launch: dict[str, Any]) -> list[str]:
    command = launch.get("command")
    words = shlex.join(map(str, command)) if isinstance(command, list) else ""
    figures = [launch.get(name) for name in ("num_processes", "device", "mixed_precision")]
    shown = [launch.get("time"), (str(launch.get("git_commit") or ""))[:12], " × ".join(map(str, figures[:2])), figures[2]]
    return [*(cut(str(value), LINE) for value in shown), cut(words, 3 * LINE)]


def describe_dataset(run: RunFolder) -> dict[str, Any] | None:
    """The figures of the dataset's manifest; None if it is not there any more, or is damaged."""
    folder = Path(str(run.options.get("data.dataset")))
    try:
        manifest = read_json(folder / "manifest.json")
        read, dropped = int(manifest["documents_read"]), manifest["dropped"]
        splits = [
            (cut(split, LINE), item["documents"], item["bytes"], item["tokens"], f"{item['bytes'] / item['tokens']:.2f}")
            for split, item in manifest["splits"].items()
        ]
        sources = [
            (cut(name, LINE), item["documents"], item["tokens"])
            for split in list(manifest["splits"].values())[:1]
            for name, item in list(split["sources"].items())[:LAUNCHES]
        ]
        tokenizer = f"{int(manifest['tokenizer']['vocab_size']):,} entries, from {manifest['tokenizer']['from']}"
        kept = read - sum(dropped.values())
    except (UserError, OSError, KeyError, TypeError, ValueError, AttributeError, ZeroDivisionError):
        return None
    page = folder / PAGE
    return {
        "folder": str(folder), "read": read, "kept": kept, "splits": splits, "tokenizer": tokenizer, "sources": sources,
        "changed": run.dataset_key is not None and manifest.get("key") != run.dataset_key,
        "link": quote(os.path.relpath(page.resolve(), run.path.resolve())) if page.is_file() else None,
    }  # fmt: skip
