"""Time per token and memory as the model grows, on one process, and what two processes make of two cores.

    python benchmarks/sizes.py             # needs data/demo: python prepare_data.py

train.py makes a few steps of Llamas of 1 to 125 million parameters, 2 rows of 512. Memory is the process's largest
resident size less that of one that has only imported what it needs, beside the peak that --dry_run predicts. Then one
process with two threads takes turns with two of one thread each (gloo), on the demo's model. Prints two tables and one
JSON object.
"""

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
# Name → width, layers, heads, width of the MLP. With 8,192 entries these have 1.0, 4.2, 11.5, 29.9, 59.8 and 119.5 million
# parameters.
SIZES = {
    "1M": (96, 2, 2, 256), "5M": (192, 6, 3, 512), "10M": (256, 9, 4, 1024), "30M": (512, 8, 8, 1408),
    "60M": (640, 11, 10, 1728), "125M": (768, 16, 12, 2048),
}  # fmt: skip
COMMON = {
    "data.dataset": ROOT / "data" / "demo", "evaluation.every_steps": 100_000, "checkpoint.every_steps": 100_000,
    "tracking.trackers": "[]", "tracking.sample_every_steps": 0, "tracking.log_every_steps": 1,
    "evaluation.per_device_batch_size": 2,
}  # fmt: skip
ONE = [sys.executable]
TWO = [
    sys.executable, "-m", "accelerate.commands.launch", "--config_file", "accelerate_configs/cpu_2_processes.yaml"
]  # fmt: skip


def train(command: list[str], options: dict[str, Any], **environment: str) -> tuple[str, float]:
    """Standard output and the peak resident size in bytes of `command train.py`, the largest of its processes."""
    arguments = [str(part) for name, value in (COMMON | options).items() for part in (f"--{name}", value)]
    kept = {name: value for name, value in os.environ.items() if not name.startswith("ACCELERATE_")}
    measured = (
        "import resource, subprocess, sys\n"
        "code = subprocess.call(sys.argv[1:])\n"
        "print('peak', resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)\n"
        "sys.exit(code)"
    )
    child = subprocess.run(
        [sys.executable, "-c", measured, *command, "train.py", *arguments],
        cwd=ROOT, capture_output=True, text=True, env=kept | {"ACCELERATE_USE_CPU": "true"} | environment,
    )  # fmt: skip
    if child.returncode:
        raise SystemExit(child.stderr[-3000:])
    return child.stdout, 1024 * float(child.stdout.split()[-1])


def speed(output: Path) -> float:
    """Tokens per second, the median of all steps but the first two."""
    records = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return statistics.median([item["perf/tokens_per_second"] for item in records if "train/loss" in item][2:])


def size_options(name: str) -> dict[str, Any]:
    width, layers, heads, inner = SIZES[name]
    return {
        "model.hidden_size": width, "model.num_hidden_layers": layers, "model.num_attention_heads": heads,
        "model.intermediate_size": inner, "model.max_position_embeddings": 512, "data.sequence_length": 512,
        "model.vocabulary_multiple": 8192,
        "batch.global_batch_size": 2,
    }  # fmt: skip


def imported_bytes() -> float:
    """Resident size of a process that has imported what train.py imports."""
    code = "import train, resource; print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"
    return 1024 * float(subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True).stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="*", choices=SIZES, default=list(SIZES))
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--rounds", type=int, default=3, help="of the comparison of processes")
    arguments = parser.parse_args()
    table, splits = {}, {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        base = imported_bytes()
        print(
            f"{'size':<8}{'parameters':>13}{'tokens/s':>10}{'ns a token and parameter':>26}{'peak MB':>9}{'predicted':>11}"
        )
        for name in arguments.sizes:
            options = size_options(name) | {"output": folder / name, "schedule.max_steps": arguments.steps}
            _, peak = train(ONE, options)
            summary = json.loads((folder / name / "summary.json").read_text())
            dry, _ = train(ONE, options | {"dry_run": True, "output": folder / "dry"})
            found = re.search(r"memory on each device: ([\d,.]+) (MB|GB)", dry)
            assert found is not None, dry
            predicted = float(found[1].replace(",", "")) * {"MB": 1e6, "GB": 1e9}[found[2]]
            each = speed(folder / name)
            table[name] = {
                "parameters": summary["parameters"], "tokens_per_second": each, "peak_memory_bytes": peak - base,
                "predicted_bytes": predicted,
            }  # fmt: skip
            print(f"{name:<8}{summary['parameters']:>13,}{each:>10,.0f}{1e9 / each / summary['parameters']:>26.2f}"
                  f"{(peak - base) / 1e6:>9,.0f}{predicted / 1e6:>11,.0f}", flush=True)  # fmt: skip
        kinds = {"1 process, 2 threads": (ONE, "2"), "2 processes, 1 thread each": (TWO, "1")}
        speeds: dict[str, list[float]] = {kind: [] for kind in kinds}
        for number in range(arguments.rounds):
            for kind, (command, threads) in kinds.items():
                output = folder / f"{kind}-{number}"
                train(command, {"output": output, "schedule.max_steps": 30}, OMP_NUM_THREADS=threads)
                speeds[kind].append(speed(output))
        splits = {kind: statistics.median(found) for kind, found in speeds.items()}
        for kind, each in splits.items():
            print(f"{kind:<28}{each:>10,.0f} tokens/s{each / splits['1 process, 2 threads']:>8.2f}")
    print(json.dumps({"sizes": table, "processes": splits, "imported_bytes": base}))


if __name__ == "__main__":
    main()
