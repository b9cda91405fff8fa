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

from training.monitoring.console import duration
from training.report.charts import LOSSES, colour, loss_tabs, metric_charts, not_finite
from training.report.curves import Curve
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
from utils.checkpoints import POINTERS, step_of
from utils.files import UserError, flatten, read_json, readable, replace_text, short
from utils.report import LINE, NAME, cut, page_templates

PAGE = "report.html"
WHOLE = "loss on all validation documents"
# Files of a run folder that the page links to.
FILES = (
    "loss.png", "metrics.jsonl", "training.log", "samples.md", "config.yaml", "environment.json", "summary.json",
    "evaluation.json",
)  # fmt: skip


class RunReport:
    """Writes the page of a run that is going on. A failure is a warning, once, and never an error."""

    def __init__(self, run: Path, warn: Callable[[str], None]) -> None:
        self.run, self.warn, self.failed = run, warn, False

    def write(self) -> None:
        try:
            replace_text(self.run / PAGE, html_report(read_run(self.run)))
        except Exception as error:  # whatever the page lacks, the run matters more
            if not self.failed:
                self.warn(f"{PAGE} cannot be written: {short(error)}; training goes on without it")
            self.failed = True


@cache
def templates() -> jinja2.Environment:
    return page_templates(Path(__file__).parent)


def html_report(run: RunFolder) -> str:
    """The complete page. Text from files is escaped."""
    losses = run.curves.get(*LOSSES)
    curves = [Curve(LOSSES[name], colour(list(LOSSES).index(name)), series, dots=name != "train/loss")
              for name, series in losses.items()]  # fmt: skip
    older, newest = run.checkpoints[:-CHECKPOINTS], run.checkpoints[-CHECKPOINTS:]
    shown = [*(path for path in older if path.name in run.pointers.values()), *newest]
    options = changed_options(run.options)
    launch = flatten(run.launches[-1]) if run.launches else {}
    return templates().get_template("page.html").render(
        name=run.name, tiles=tiles(run), error=cut(str(run.summary.get("error", "")), 5 * LINE),
        commands=commands(run), is_done=run.summary.get("reason") == "max_steps" and bool(run.options["schedule.max_steps"]),
        files=[name for name in FILES if (run.path / name).is_file()],
        legend=[legend(curve) for curve in curves], losses=loss_tabs([run], [(0, curve) for curve in curves]),
        charts=metric_charts([run], [""]), damaged=run.curves.damaged, crowded=run.curves.crowded,
        samples=[(step, cut(text, SAMPLE_CHARACTERS)) for step, text in run.samples],
        saved=[f"{LOSSES[name]} loss" if name != "eval/average_loss" else "the average's" for name in losses],
        checkpoints=[checkpoint_row(run, path, list(losses)) for path in reversed(shown)],
        all_checkpoints=len(run.checkpoints),
        events=[(when, level, cut(message, 3 * LINE)) for when, level, message in reversed(run.events)],
        dataset=describe_dataset(run),
        options=[(name, cut(value, LINE), cut(default, LINE)) for name, value, default in options],
        launches=[launch_row(item) for item in reversed(run.launches[-LAUNCHES:])], all_launches=len(run.launches),
        environment=[(name, cut(spell(value), LINE)) for name, value in launch.items() if name != "command"],
    )  # fmt: skip


def legend(curve: Curve) -> tuple[str, str, str]:
    """(colour, name, figures) of a loss."""
    step, low = curve.series.low
    lowest = f", lowest {low:.4f} at step {int(step):,}" if curve.dots else ""
    return curve.colour, curve.name, f"last {curve.series.last[1]:.4f}{lowest}{not_finite(curve.series)}"


def state_of(run: RunFolder) -> str:
    if not run.summary:
        return "running"
    return cut(f"{'finished' if run.summary.get('finished') else 'stopped'} ({run.summary.get('reason')})", NAME)


def tiles(run: RunFolder) -> list[tuple[str, str, str]]:
    """(name, value, note) of the figures at the top."""
    as_of = time.strftime("%Y-%m-%d %H:%M:%S")
    found = [("state", state_of(run), f"as of {as_of}" if run.summary else f"as of {as_of}, unless killed since")]
    of, share = "", ""
    if run.max_steps:
        of, share = f" of {run.max_steps:,}", f"{100 * run.step // run.max_steps}% of the run"
    found.append(("step", f"{run.step:,}{of}", share))
    figures = figures_of(run)
    for name in ("best evaluation loss", WHOLE, "bits per byte", "last training loss"):
        if name in figures and (name != WHOLE or run.options.get("evaluation.max_tokens")):
            found.append((name, *figures[name]))
    if "time" in figures:
        value, note = figures["time"]
        seconds = run.curves.series["perf/train_seconds"]
        left = seconds.last[1] / max(seconds.last[0], 1) * ((run.max_steps or 0) - run.step)
        found.append(("time", value, f"about {duration(left)} left" if left > 0 and not run.summary else note))
    found += [(name, *figures[name]) for name in ("tokens", "parameters") if name in figures]
    return found


def figures_of(run: RunFolder) -> dict[str, tuple[str, str]]:
    """Name → (value, note) of what is known of a run's results."""
    found = {}
    known = run.curves.get(
        "eval/loss", "eval/bits_per_byte", "train/loss", "perf/train_seconds", "perf/tokens_per_second"
    )
    for metric, name, digits in (("eval/loss", "best evaluation loss", 4), ("eval/bits_per_byte", "bits per byte", 3)):
        if metric in known:
            step, low = known[metric].low
            found[name] = (f"{low:.{digits}f}", f"at step {int(step):,}, the lowest")
    if "train/loss" in known:
        step, loss = known["train/loss"].last
        found["last training loss"] = (f"{loss:.4f}", f"at step {int(step):,}")
    if "perf/train_seconds" in known:
        found["time"] = (duration(known["perf/train_seconds"].last[1]), "in training steps")
    if "perf/tokens_per_second" in known:
        found["tokens per second"] = (f"{known['perf/tokens_per_second'].last[1]:,.0f}", "the last")
    if run.tokens_per_step:
        rate = f"{found['tokens per second'][0]} per second" if "tokens per second" in found else ""
        found["tokens"] = (spell_count(run.tokens_per_step * run.step), rate)
    # Of the whole split, which may be scored only at the end.
    bits, whole = run.summary.get("bits_per_byte"), run.summary.get("eval_loss")
    if isinstance(bits, float) and "bits per byte" not in found:
        found["bits per byte"] = (f"{bits:.3f}", "at the end")
    if isinstance(whole, float) and run.summary.get("finished"):
        found[WHOLE] = (f"{whole:.4f}", "at the end")
    if type(parameters := run.summary.get("parameters")) is int:
        found["parameters"] = (spell_count(parameters), f"{parameters:,}")
    return found


def spell_count(number: float) -> str:
    unit, letter = next((pair for pair in ((1e12, "T"), (1e9, "B"), (1e6, "M")) if number >= pair[0]), (1.0, ""))
    return f"{number / unit:.2f} {letter}" if letter else f"{number:,.0f}"


# ---- Tables


def checkpoint_row(run: RunFolder, path: Path, losses: list[str]) -> list[str]:
    step = step_of(path)
    found = [run.curves.at.get(step, {}).get(name) for name in losses]
    marks = ", ".join(mark.replace("_", " ") for mark in POINTERS if run.pointers.get(mark) == path.name)
    spelled = [f"{loss:.4f}" if isinstance(loss, float) else "" for loss in found]
    return [f"{step:,}", marks, *spelled, readable(folder_bytes(path))]


def launch_row(launch: dict[str, Any]) -> list[str]:
    command, where = launch.get("command"), f"{launch.get('num_processes')} × {launch.get('device')}"
    words = shlex.join(map(str, command)) if isinstance(command, list) else ""
    when, commit = str(launch.get("time"))[:16].replace("T", " "), str(launch.get("git_commit") or "")[:10]
    return [when, commit, cut(where, NAME), cut(str(launch.get("mixed_precision")), NAME), cut(words, 3 * LINE)]


def describe_dataset(run: RunFolder) -> dict[str, Any] | None:
    """The figures of the dataset's manifest; None if it is not there any more, or is damaged."""
    folder = Path(str(run.options["data.dataset"]))
    page = folder / PAGE
    try:
        manifest = read_json(folder / "manifest.json")
        splits, tokenizer = manifest["splits"], manifest["tokenizer"]
        sources = list(splits.get("train", {"sources": {}})["sources"].items())[:LAUNCHES]  # a stream has no such split
        return {
            "folder": cut(str(folder), LINE), "read": int(manifest["documents_read"]),
            "kept": int(manifest["documents_read"]) - sum(manifest["dropped"].values()),
            "splits": [(cut(name, NAME), *(int(item[key]) for key in ("documents", "bytes", "tokens")),
                        f"{item['bytes'] / max(item['tokens'], 1):.2f}") for name, item in splits.items()],
            "sources": [(cut(name, NAME), int(item["documents"]), int(item["tokens"])) for name, item in sources],
            "tokenizer": f"{int(tokenizer['vocab_size']):,} entries, from {cut(str(tokenizer['from']), LINE)}",
            "changed": run.dataset_key not in (None, manifest["key"]),
            "link": quote(os.path.relpath(page.resolve(), run.path.resolve())) if page.is_file() else "",
        }  # fmt: skip
    except (UserError, OSError, KeyError, TypeError, ValueError, AttributeError, StopIteration):
        return None
