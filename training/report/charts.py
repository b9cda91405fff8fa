"""Which charts a page has: of one run, or of several, one colour each."""

from collections.abc import Callable, Sequence
from typing import Any

from training.report.curves import Curve, Series, chart, spell_value
from training.report.folder import RunFolder
from utils.report import LINE, cut

LOSSES = {"train/loss": "training", "eval/loss": "evaluation", "eval/average_loss": "evaluation of the average"}
# Metric → title of its chart. These charts begin at zero. Those of other metrics come after them, under their own names.
TITLES = {
    "train/learning_rate": "learning rate", "train/grad_norm": "gradient norm before clipping",
    "perf/tokens_per_second": "tokens per second", "perf/peak_memory_gb": "peak memory, GB",
    "perf/mfu": "MFU: share of the peak FLOP/s",
}  # fmt: skip
WITHOUT_CHART = ("perf/train_seconds", "train/epoch")  # straight lines
COLOURS = 8  # in charts.css

Map = Callable[[Sequence[float]], Sequence[float]]


def colour(number: int) -> str:
    return f"s{number % COLOURS}"


def loss_tabs(runs: list[RunFolder], curves: list[tuple[int, Curve]]) -> list[tuple[str, dict[str, Any]]]:
    """(title of a tab, chart) of losses by step, by tokens, by hours, and the later half. `curves`: the number of the run,
    and its curve."""
    axes: list[tuple[str, str, list[Map], float]] = [("by step", "optimizer step", [list for _ in runs], 0.0)]
    if all(run.tokens_per_step for run in runs):
        axes.append(("by tokens", "target tokens", [run.tokens for run in runs], 0.0))
    if all(run.curves.get("perf/train_seconds") for run in runs):
        axes.append(("by hours", "hours of training", [run.curves.hours for run in runs], 0.0))
    axes.append(("later half", "optimizer step", [list for _ in runs], 0.5))
    drawn = [
        (title, chart([curve._replace(x=maps[number]) for number, curve in curves], unit, skip=skip))
        for title, unit, maps, skip in axes
    ]
    return [(title, found) for title, found in drawn if found]


def metric_charts(runs: list[RunFolder], names: list[str]) -> list[tuple[str, str, dict[str, Any]]]:
    """(title, note, chart) of every metric but the losses. `names` of the runs are those of their curves."""
    others = sorted({metric for run in runs for metric in run.curves.series} - {*LOSSES, *TITLES, *WITHOUT_CHART})
    found = []
    for metric in [*TITLES, *others]:
        dots = metric.startswith("eval/")
        curves = [
            Curve(name, colour(number if len(runs) > 1 else dots), series, dots=dots)
            for number, (run, name) in enumerate(zip(runs, names, strict=True))
            for series in run.curves.get(metric).values()
        ]
        if drawn := chart(curves, "optimizer step", from_zero=metric in TITLES):
            series = curves[0].series
            note = f"last {spell_value(series.last[1])}{not_finite(series)}" if len(runs) == 1 else ""
            found.append((TITLES.get(metric, cut(metric, LINE)), note, drawn))
    return found


def not_finite(series: Series) -> str:
    return f"; {series.missing:,} not finite" if series.missing else ""
