"""Measure weak scaling: one process of one thread against two, each with the same work, and the cost of the exchange.

    python benchmarks/scaling.py           # needs data/demo: python prepare_data.py; two cores, about 5 minutes

train.py trains the demo's model in three ways, which take turns: one process; two independent processes at the same
time; two processes that train one model (DDP over gloo, with twice the global batch). What two independent processes
lose against one is contention for memory and caches; any further loss is the exchange. Other options go to train.py.
Prints a table and one JSON object.
"""

import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from benchmarks.common import (
    ON_CPU,
    ONE_PROCESS,
    STEPS_ONLY,
    TRAIN,
    TWO_PROCESSES,
    build_parser,
    count,
    environment,
    flags,
    median_speed,
    read_arguments,
)

KINDS = {"one": (ONE_PROCESS, 1), "two, no exchange": (ONE_PROCESS, 2), "two, one model": (TWO_PROCESSES, 1)}


def start(command: list[str], output: Path, rows: int, steps: int, further: list[str]) -> subprocess.Popen[str]:
    options = STEPS_ONLY | {"output": output, "batch.global_batch_size": rows, "schedule.max_steps": steps}
    return subprocess.Popen(
        [*command, TRAIN, *flags(options), *further], text=True, stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE, env=environment(OMP_NUM_THREADS="1", **ON_CPU),
    )  # fmt: skip


def speed(process: subprocess.Popen[str], output: Path) -> float:
    """Wait for a process to end; returns its tokens per second."""
    errors = process.communicate()[1]
    if process.returncode:
        raise SystemExit(errors[-3000:])
    return median_speed(output)


def main() -> None:
    parser = build_parser(__doc__)
    parser.add_argument("--rounds", type=count, default=2)
    parser.add_argument("--steps", type=count, default=12)
    parser.add_argument("--rows", type=count, default=8, help="rows of 256 positions per process")
    arguments, further = read_arguments(parser, STEPS_ONLY)
    speeds: dict[str, list[float]] = {kind: [] for kind in KINDS}
    with tempfile.TemporaryDirectory() as temporary:
        for number in range(arguments.rounds):
            for kind, found in speeds.items():
                command, calls = KINDS[kind]
                rows = arguments.rows * (2 if command is TWO_PROCESSES else 1)
                outputs = [Path(temporary) / f"{number}-{kind}" / str(index) for index in range(calls)]
                started = [start(command, output, rows, arguments.steps, further) for output in outputs]
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
