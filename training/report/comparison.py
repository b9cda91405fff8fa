"""Several runs on one page: their curves over each other, their results, and the options that differ."""

from collections import Counter
from pathlib import Path
from typing import Any

from training.report.charts import LOSSES, colour, loss_tabs, metric_charts
from training.report.curves import Curve
from training.report.folder import RunFolder, spell
from training.report.report import WHOLE, figures_of, state_of, templates
from utils.report import LINE, NAME, cut

FIGURES = (
    "best evaluation loss", WHOLE, "bits per byte", "last training loss", "tokens", "time", "tokens per second", "parameters",
)  # fmt: skip
OWN = ("output", "checkpoint.resume")  # options of the folder and the launch, not of the recipe


def html_comparison(runs: list[RunFolder]) -> str:
    """The complete page. Text from files is escaped."""
    names = labels([run.path for run in runs])
    charts = []
    for metric in ("eval/loss", "train/loss", "eval/average_loss"):
        curves = [
            (number, Curve(name, colour(number), series, dots=metric != "train/loss"))
            for number, (run, name) in enumerate(zip(runs, names, strict=True))
            for series in run.curves.get(metric).values()
        ]
        if tabs := loss_tabs(runs, curves):
            charts.append((LOSSES[metric], tabs))
    known = [figures_of(run) for run in runs]
    parts = any(run.options.get("evaluation.max_tokens") for run in runs)
    shown = [name for name in FIGURES if any(name in figures for figures in known) and (name != WHOLE or parts)]
    rows = [
        (
            colour(number),
            names[number],
            state_of(run),
            f"{run.step:,}",
            *(figures.get(name, ("",))[0] for name in shown),
        )
        for number, (run, figures) in enumerate(zip(runs, known, strict=True))
    ]
    return templates().get_template("comparison.html").render(
        names=names, colours=[colour(number) for number in range(len(runs))], losses=charts,
        charts=metric_charts(runs, names), figures=shown, rows=rows, options=differing_options(runs),
        same_data=have_same_data(runs),
    )  # fmt: skip


def have_same_data(runs: list[RunFolder]) -> bool:
    """By the keys of the datasets; by their folders where a run has no checkpoint yet, which would hold the key."""
    keys, folders = {run.dataset_key for run in runs}, {run.options["data.dataset"] for run in runs}
    return len(keys - {None}) <= 1 and (None not in keys or len(folders) == 1)


def labels(paths: list[Path]) -> list[str]:
    """The names of the run folders, or the end of their paths where two have the same name."""
    names = [path.resolve().name for path in paths]
    counts = Counter(names)
    return [name if counts[name] == 1 else str(path)[-NAME:] for name, path in zip(names, paths, strict=True)]


def differing_options(runs: list[RunFolder]) -> list[list[Any]]:
    """A row for each option that the runs do not share: its name, and its value in each run."""
    found = []
    for name in dict.fromkeys(name for run in runs for name in run.options):
        values = [spell(run.options[name]) if name in run.options else "" for run in runs]
        if name not in OWN and len(set(values)) > 1:
            found.append([cut(name, NAME), *(cut(value, LINE) for value in values)])
    return found
