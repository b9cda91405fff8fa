"""loss.png: the losses and the learning rate over the steps."""

from pathlib import Path
from typing import Any

from training.report.curves import read_curves

COLOURS = {"train/loss": "#0072b2", "eval/loss": "#d55e00", "eval/average_loss": "#009e73"}  # Okabe and Ito's


def draw_losses(metrics: Path) -> Any:
    """A figure of matplotlib from a metrics.jsonl: the losses above, the learning rate below."""
    from matplotlib.figure import Figure

    curves = read_curves(metrics)
    figure = Figure(figsize=(8, 5.5), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    for name, series in curves.get(*COLOURS).items():
        # The figures are in the legend, because labels at the ends of two lines would cover each other.
        step, low = series.low
        label = f"{name}: last {series.last[1]:.3f}, lowest {low:.3f} at step {int(step):,}"
        mark = "" if name == "train/loss" or series.count > 60 else "o"
        above.plot(
            *zip(*series.line(), strict=True),
            label=label,
            color=COLOURS[name],
            marker=mark,
            markersize=4,
            linewidth=1.2,
        )
        if series.size > 1:
            spans = [(bucket.steps / bucket.size, bucket.low[1], bucket.high[1]) for bucket in series.buckets]
            above.fill_between(*zip(*spans, strict=True), color=COLOURS[name], alpha=0.2, linewidth=0)
    for series in curves.get("train/learning_rate").values():
        below.plot(*zip(*series.line(), strict=True), color="0.35", linewidth=1.2)
    figure.suptitle(f"Run {metrics.resolve().parent.name}", fontweight="bold")
    above.set(ylabel="cross-entropy, nats per token")
    below.set(xlabel="optimizer step", ylabel="learning rate", ylim=(0, None))
    for axes in (above, below):
        axes.grid(alpha=0.3)
    if above.get_lines():
        above.legend()
    figure.align_ylabels()
    return figure
