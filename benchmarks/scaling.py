"""Weak scaling: one process of one thread against two, each with the same share of the work, and what the exchange costs.

    python benchmarks/scaling.py           # needs data/demo: python prepare_data.py; two cores, some 5 minutes

train.py on the demo's model: one process; two that know nothing of each other, at the same time; two that train one model
(DDP over gloo, the global batch twice as large). What two lose against one without any exchange is the machine's (memory,
caches); what they lose beyond that is the exchange. Takes turns; prints a table and one JSON object.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
OPTIONS: dict[str, Any] = {
    "data.dataset": ROOT / "data" / "demo", "evaluation.every_steps": 100_000, "checkpoint.every_steps": 100_000,
    "tracking.trackers": "[]", "tracking.sample_every_steps": 0, "tracking.log_every_steps": 1,
}  # fmt: skip
ALONE = [sys.executable]
TOGETHER = [
    sys.executable, "-m", "accelerate.commands.launch", "--config_file", "accelerate_configs/cpu_2_processes.yaml"
]  # fmt: skip


def start(command: list[str], output: Path, rows: int, steps: int) -> subprocess.Popen[str]:
    options = OPTIONS | {"output": output, "batch.global_batch_size": rows, "schedule.max_steps": steps}
    arguments = [str(part) for name, value in options.items() for part in (f"--{name}", value)]
    kept = {name: value for name, value in os.environ.items() if not name.startswith("ACCELERATE_")}
    return subprocess.Popen(
        [*command, "train.py", *arguments], cwd=ROOT, text=True, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
        env=kept | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"},
    )  # fmt: skip


def speed(process: subprocess.Popen[str], output: Path) -> float:
    """Tokens per second, the median of all steps but the first two."""
    errors = process.communicate()[1]
    if process.returncode:
        raise SystemExit(errors[-3000:])
    records = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return statistics.median([item["perf/tokens_per_second"] for item in records if "train/loss" in item][2:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--rows", type=int, default=8, help="of 256 positions, for each process")
    arguments = parser.parse_args()
    speeds: dict[str, list[float]] = {"one": [], "two, no exchange": [], "two, one model": []}
    with tempfile.TemporaryDirectory() as temporary:
        for number in range(arguments.rounds):
            for kind, found in speeds.items():
                folder = Path(temporary) / f"{number}-{kind}"
                each, ways = (
                    arguments.rows,
                    {"one": (ALONE, 1), "two, no exchange": (ALONE, 2), "two, one model": (TOGETHER, 1)},
                )
                command, calls = ways[kind]
                rows = 2 * each if command is TOGETHER else each
                outputs = [folder / str(index) for index in range(calls)]
                started = [start(command, output, rows, arguments.steps) for output in outputs]
                found.append(sum(speed(process, output) for process, output in zip(started, outputs, strict=True)))
    medians = {kind: statistics.median(found) for kind, found in speeds.items()}
    print(f"{'processes of one thread':<26}{'tokens/s':>10}{'ratio':>8}")
    for kind, value in medians.items():
        print(f"{kind:<26}{value:>10,.0f}{value / medians['one']:>8.2f}")
    exchange = 1 - medians["two, one model"] / medians["two, no exchange"]
    print(f"share of the exchange: {exchange:.1%}")
    print(json.dumps({
        "tokens_per_second": medians, "weak_scaling": medians["two, one model"] / medians["one"] / 2,
        "communication_share": exchange,
    }))  # fmt: skip


if __name__ == "__main__":
    main()
