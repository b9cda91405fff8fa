"""Measure time per token and memory as the model grows, and compare two processes with two threads on two cores.

    python benchmarks/sizes.py             # needs data/demo: python prepare_data.py

train.py makes a few steps of Llamas of 1 to 125 million parameters, with 2 rows of 512. Memory is the process's
largest resident size, minus that of a process that only imports what train.py needs; the table also shows the peak
that --dry_run predicts. Then one process with two threads takes turns with two processes of one thread each (gloo),
on the demo's model. Other options go to train.py. Prints two tables and one JSON object.
"""

import json
import re
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from benchmarks.common import (
    ON_CPU,
    ONE_PROCESS,
    ROOT,
    STEPS_ONLY,
    TRAIN,
    TWO_PROCESSES,
    build_parser,
    count,
    flags,
    median_speed,
    read_arguments,
    run,
)

# Name → width, layers, heads, width of the MLP. With 8,192 vocabulary entries these have 1.0, 4.2, 11.5, 29.9, 59.8 and
# 119.5 million parameters.
SIZES = {
    "1M": (96, 2, 2, 256), "5M": (192, 6, 3, 512), "10M": (256, 9, 4, 1024), "30M": (512, 8, 8, 1408),
    "60M": (640, 11, 10, 1728), "125M": (768, 16, 12, 2048),
}  # fmt: skip
COMMON = STEPS_ONLY | {"evaluation.per_device_batch_size": 2}


def train(options: dict[str, Any], further: list[str]) -> tuple[str, float]:
    """Run train.py; returns its output and its peak resident size in bytes."""
    code = (
        "import resource, runpy, sys\n"
        "sys.argv = sys.argv[1:]\n"
        "runpy.run_path(sys.argv[0], run_name='__main__')\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"
    )
    printed = run_python(code, TRAIN, *flags(COMMON | options), *further)
    return printed, 1024 * float(printed.split()[-1])


def imported_bytes() -> float:
    """Resident size in bytes of a process that only imports what train.py imports."""
    return 1024 * float(run_python("import train, resource; print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"))


def run_python(code: str, *arguments: str) -> str:
    found = f"import sys; sys.path.insert(0, {str(ROOT)!r})\n"
    return run(*ONE_PROCESS, "-c", found + code, *arguments, **ON_CPU)


def size_options(name: str) -> dict[str, Any]:
    width, layers, heads, inner = SIZES[name]
    return {
        "model.hidden_size": width, "model.num_hidden_layers": layers, "model.num_attention_heads": heads,
        "model.intermediate_size": inner, "model.max_position_embeddings": 512, "data.sequence_length": 512,
        "model.vocabulary_multiple": 8192,
        "batch.global_batch_size": 2,
    }  # fmt: skip


def main() -> None:
    parser = build_parser(__doc__)
    parser.add_argument("--sizes", nargs="*", choices=SIZES, default=list(SIZES))
    parser.add_argument("--steps", type=count, default=6)
    parser.add_argument("--rounds", type=count, default=3, help="of the comparison of processes")
    parser.add_argument("--process_steps", type=count, default=30, help="of the comparison of processes")
    arguments, further = read_arguments(parser, STEPS_ONLY)
    table, splits = {}, {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        base = imported_bytes()
        print(
            f"{'size':<8}{'parameters':>13}{'tokens/s':>10}{'ns/(token·parameter)':>26}{'peak MB':>9}{'predicted':>11}"
        )
        for name in arguments.sizes:
            options = size_options(name) | {"output": folder / name, "schedule.max_steps": arguments.steps}
            _, peak = train(options, further)
            summary = json.loads((folder / name / "summary.json").read_text())
            dry, _ = train(options | {"dry_run": True, "output": folder / "dry"}, further)
            found = re.search(r"memory on each device: ([\d,.]+) (MB|GB)", dry)
            assert found is not None, dry
            predicted = float(found[1].replace(",", "")) * {"MB": 1e6, "GB": 1e9}[found[2]]
            each = median_speed(folder / name)
            table[name] = {
                "parameters": summary["parameters"], "tokens_per_second": each, "peak_memory_bytes": peak - base,
                "predicted_bytes": predicted,
            }  # fmt: skip
            print(f"{name:<8}{summary['parameters']:>13,}{each:>10,.0f}{1e9 / each / summary['parameters']:>26.2f}"
                  f"{(peak - base) / 1e6:>9,.0f}{predicted / 1e6:>11,.0f}", flush=True)  # fmt: skip
        kinds = {"1 process, 2 threads": (ONE_PROCESS, "2"), "2 processes, 1 thread each": (TWO_PROCESSES, "1")}
        speeds: dict[str, list[float]] = {kind: [] for kind in kinds}
        for number in range(arguments.rounds):
            for kind, (command, threads) in kinds.items():
                output = folder / f"{kind}-{number}"
                options = COMMON | {"output": output, "schedule.max_steps": arguments.process_steps}
                run(*command, TRAIN, *flags(options), *further, OMP_NUM_THREADS=threads, **ON_CPU)
                speeds[kind].append(median_speed(output))
        splits = {kind: statistics.median(found) for kind, found in speeds.items()}
        for kind, each in splits.items():
            print(f"{kind:<28}{each:>10,.0f} tokens/s{each / splits['1 process, 2 threads']:>8.2f}")
    print(json.dumps({"sizes": table, "processes": splits, "imported_bytes": base}))


if __name__ == "__main__":
    main()
