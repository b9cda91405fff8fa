"""Packed rows against padded ones on short texts: tokens that are trained on, per second.

    python benchmarks/padding.py           # needs data/demo: python prepare_data.py

The dictionary entries of the sample, rows of up to 512 positions, one model and one batch of positions for all: padded to
the maximal length, padded to the longest of the batch, and packed; in processes that take turns. Prints a table and one
JSON object.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # `utils` is not installed
OPTIONS = {
    "data.dataset": ROOT / "data" / "demo", "data.sequence_length": 512, "model.max_position_embeddings": 512,
    "batch.global_batch_size": 8, "evaluation.every_steps": 100_000, "checkpoint.every_steps": 100_000,
    "evaluation.per_device_batch_size": 8, "tracking.trackers": "[]", "tracking.sample_every_steps": 0,
    "tracking.log_every_steps": 1,
}  # fmt: skip
KINDS = {
    "max_length": {"data.layout": "padded", "data.pad_to": "max_length"},
    "longest": {"data.layout": "padded", "data.pad_to": "longest"},
    "packed": {"data.layout": "packed"},
    "best_fit": {"data.layout": "best_fit"},
}


def tokens_per_second(kind: str, steps: int, folder: Path) -> float:
    """Targets per second of train.py, the median of its steps but for the first two."""
    output = folder / f"{kind}-{time.monotonic_ns()}"
    options = OPTIONS | KINDS[kind] | {"output": output, "schedule.max_steps": steps}
    arguments = [str(part) for name, value in options.items() for part in (f"--{name}", value)]
    subprocess.run([sys.executable, "train.py", *arguments], cwd=ROOT, check=True, capture_output=True)
    records = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return statistics.median([item["perf/tokens_per_second"] for item in records if "train/loss" in item][2:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=12)
    arguments = parser.parse_args()
    speeds: dict[str, list[float]] = {kind: [] for kind in KINDS}
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(arguments.rounds):
            for kind, found in speeds.items():
                found.append(tokens_per_second(kind, arguments.steps, Path(folder)))
    medians = {kind: statistics.median(found) for kind, found in speeds.items()}
    for kind, value in medians.items():
        print(f"{kind:<12}{value:>10,.0f} tokens/s{value / medians['max_length']:>8.2f}")
    print(json.dumps({"tokens_per_second": medians, "ratio_packed": medians["packed"] / medians["max_length"]}))


if __name__ == "__main__":
    main()
