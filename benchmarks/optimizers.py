"""Compare optimizers at equal steps: one recipe, the same data order and initial weights, several seeds.

    python benchmarks/optimizers.py                  # needs data/demo: python prepare_data.py

Each optimizer first runs one seed with each of three learning rates, then all seeds with the best rate. Other options
go to train.py. Prints a table of evaluation losses over the steps, writes the curves to runs/optimizers.png, and ends
with one JSON object.
"""

import argparse
import json
import statistics
import sys
import tempfile
from pathlib import Path

from matplotlib.figure import Figure

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from benchmarks.common import (
    DEMO,
    ONE_PROCESS,
    ROOT,
    TRAIN,
    build_parser,
    count,
    file_to_write,
    flags,
    read_arguments,
    read_metrics,
    run,
    save_plot,
)

LEARNING_RATES = {"adamw": (1e-3, 3e-3, 1e-2), "muon": (3e-3, 1e-2, 3e-2)}
Curve = dict[int, float]  # optimizer step → evaluation loss


def main(options: argparse.Namespace, further: list[str]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        results: dict[str, dict[str, object]] = {}
        curves: dict[str, list[Curve]] = {}
        for name, rates in LEARNING_RATES.items():

            def runs_with(rate: float, seed: int, name: str = name) -> tuple[Curve, float]:
                return train(options, further, Path(folder), name, rate, seed)

            first = {rate: runs_with(rate, options.seeds[0]) for rate in rates}
            last = {rate: curve[options.steps] for rate, (curve, _) in first.items()}
            best = min(last, key=lambda rate: last[rate])
            runs = [first[best], *(runs_with(best, seed) for seed in options.seeds[1:])]
            curves[name] = [curve for curve, _ in runs]
            results[name] = {
                "learning_rate": best,
                "loss_by_learning_rate": {f"{rate:g}": round(loss, 4) for rate, loss in last.items()},
                "final_losses": [round(curve[options.steps], 4) for curve, _ in runs],
                "seconds_per_step": round(statistics.median(seconds for _, seconds in runs) / options.steps, 4),
            }
    print(f"\n{'step':>6}  " + "  ".join(f"{name:>24}" for name in curves))
    for step in curves["adamw"][0]:
        cells = (" ".join(f"{curve[step]:.4f}" for curve in found) for found in curves.values())
        print(f"{step:>6}  " + "  ".join(f"{cell:>24}" for cell in cells))
    plot(curves, results, options.plot)
    print(json.dumps({"steps": options.steps, "seeds": options.seeds, **results}))


def train(
    options: argparse.Namespace, further: list[str], folder: Path, name: str, rate: float, seed: int
) -> tuple[Curve, float]:
    """Train once; returns the evaluation losses and the seconds of training."""
    output = folder / f"{name}-{rate:g}-{seed}"
    settings = {
        "config": options.recipe, "data.dataset": DEMO, "output": output, "optimizer.name": name,
        "optimizer.learning_rate": rate, "seed": seed, "schedule.max_steps": options.steps,
        "evaluation.every_steps": options.steps // 6, "checkpoint.every_steps": options.steps,
        "tracking.trackers": "[]", "tracking.sample_every_steps": 0,
    }  # fmt: skip
    run(*ONE_PROCESS, TRAIN, *flags(settings), *further)
    curve = {int(record["step"]): record["eval/loss"] for record in read_metrics(output) if "eval/loss" in record}
    seconds = json.loads((output / "summary.json").read_text(encoding="utf-8"))["train_seconds"]
    print(f"{name:<6} learning rate {rate:g}, seed {seed}: {curve[options.steps]:.4f}", flush=True)
    return curve, seconds


def plot(curves: dict[str, list[Curve]], results: dict[str, dict[str, object]], path: Path) -> None:
    axes = (figure := Figure(figsize=(8, 4.5), layout="constrained")).subplots()
    for number, (name, found) in enumerate(curves.items()):
        for curve in found:
            label = f"{name}, {results[name]['learning_rate']:g}" if curve is found[0] else None
            axes.plot(list(curve), list(curve.values()), "o-", color=f"C{number}", label=label, markersize=3)
    axes.set(xlabel="optimizer step", ylabel="evaluation loss, nats per token")
    save_plot(figure, path)


if __name__ == "__main__":
    parser = build_parser(__doc__)
    parser.add_argument("--recipe", default=ROOT / "configs" / "small" / "llama_tiny.yaml")
    parser.add_argument("--steps", type=count, default=180, help="a multiple of 6")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--plot", type=file_to_write, default=ROOT / "runs" / "optimizers.png")
    main(*read_arguments(parser, {"data.dataset": DEMO}))
