"""Compare the memory that `--dry_run` estimates with what training steps take (Linux, CPU).

    python benchmarks/memory.py            # about 20 minutes, at most 6 GB
    python benchmarks/memory.py --only bert t5

For each configuration, train.py makes three steps in its own process, on the demo's dataset (python prepare_data.py).
The figure is the largest resident size (VmHWM) up to the first evaluation, minus the size before the model was built.
A second process does the same with MALLOC_MMAP_THRESHOLD_=1048576, which takes blocks of 1 MiB and more directly from
the system. It has no fragmented heap, so it shows only the tensors, which is what the estimate counts, but is slower.
"""

import contextlib
import json
import os
import shutil
import sys
import tempfile
import time
from argparse import SUPPRESS
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # `utils` is not installed
from benchmarks import common
from benchmarks.common import ON_CPU, ONE_PROCESS, add_dataset, build_parser, flags

STEPS = 3
GPT2 = {"model.architecture": "gpt2", "model.size": "124m", "model.vocabulary_multiple": 50257,
        "data.sequence_length": 512, "batch.global_batch_size": 2}  # fmt: skip
LLAMA = {"model.vocabulary_multiple": 8192, "model.hidden_size": 512, "model.num_hidden_layers": 8, "model.num_attention_heads": 8,
         "model.intermediate_size": 1376, "model.max_position_embeddings": 512, "data.sequence_length": 512,
         "batch.global_batch_size": 8}  # fmt: skip
# Name → accelerate's precision and options of train.py.
CONFIGURATIONS: dict[str, tuple[str, dict[str, Any]]] = {
    "demo": ("no", {}),
    "gpt2": ("no", GPT2),
    "gpt2 dropout": ("no", GPT2 | {"model.dropout": 0.1}),
    "gpt2 accumulation": ("bf16", GPT2 | {"batch.per_device_batch_size": 1}),
    "bert": ("no", {
        "model.architecture": "bert", "model.size": "base", "model.vocabulary_multiple": 30522,
        "objective.name": "masked", "data.sequence_length": 256, "batch.global_batch_size": 4,
    }),
    "llama": ("bf16", LLAMA),
    "llama checkpointing": ("bf16", LLAMA | {"model.activation_checkpointing": True}),
    "llama muon": ("no", LLAMA | {"optimizer.name": "muon", "batch.global_batch_size": 4}),
    "t5": ("no", {
        "model.architecture": "t5", "model.size": "small", "model.vocabulary_multiple": 32128,
        "objective.name": "span_corruption", "data.sequence_length": 512, "batch.global_batch_size": 8,
    }),
}  # fmt: skip


class Measured(Exception):
    """Raised when training has made its steps."""


def train(name: str, dataset: Path, folder: Path, **changes: Any) -> None:
    """Run train.py's main in this process with the configuration `name`."""
    import train as script
    from utils.cli import parse_config
    from utils.config import TrainConfig

    options = CONFIGURATIONS[name][1] | {
        "data.dataset": dataset, "output": folder / "run", "schedule.max_steps": STEPS,
        "schedule.warmup_steps": 1, "tracking.trackers": "[]", "tracking.sample_every_steps": 0,
        "evaluation.every_steps": STEPS,
    } | changes  # fmt: skip
    sys.argv = ["train.py", *flags(options)]
    with contextlib.redirect_stdout(sys.stderr):
        script.main(parse_config(TrainConfig, ""))


def estimate(name: str, dataset: Path, folder: Path) -> dict[str, int]:
    """Bytes by part, from what train.py passes to its dry run."""
    from training import dry_run

    found: dict[str, int] = {}

    def capture(objective: Any, example: Any, config: Any, plan: Any, *, mixed_precision: str, **_: Any) -> list[str]:
        found.update(dry_run.estimate_memory(
            objective, dry_run.resized(example, plan.micro_batch), config.optimizer, accumulation=plan.accumulation,
            mixed_precision=mixed_precision,
        ))  # fmt: skip
        return []

    dry_run.dry_run_report = capture  # type: ignore[assignment]
    train(name, dataset, folder, dry_run=True)
    return found


def status(field: str) -> int:
    """A field of /proc/self/status in bytes."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines[field].split()[0]) * 1024


def measure(name: str, dataset: Path, folder: Path) -> dict[str, float]:
    """Train in this process up to the first evaluation; returns peak bytes and the seconds of all steps."""
    import train as script

    before: list[float] = []
    build_model = script.build_model

    def build(*arguments: Any, **options: Any) -> Any:
        before.extend([status("VmRSS"), time.perf_counter()])
        return build_model(*arguments, **options)

    def stop(*_: Any) -> None:
        raise Measured

    script.build_model, script.evaluate = build, stop
    try:
        train(name, dataset, folder)
    except Measured:
        return {"peak": status("VmHWM") - before[0], "seconds": time.perf_counter() - before[1]}
    raise SystemExit(f"{name}: train.py ended without an evaluation")


def run(name: str, what: str, dataset: Path, folder: Path, **environment: str) -> dict[str, Any]:
    """Run `estimate` or `measure` in its own process."""
    shutil.rmtree(folder / "run", ignore_errors=True)
    printed = common.run(
        *ONE_PROCESS, __file__, "--only", name, "--child", what, "--dataset", dataset, "--folder", folder,
        ACCELERATE_MIXED_PRECISION=CONFIGURATIONS[name][0], **ON_CPU, **environment,
    )  # fmt: skip
    return json.loads(printed.splitlines()[-1])


def main() -> None:
    parser = build_parser(__doc__)
    parser.add_argument("--only", nargs="+", choices=CONFIGURATIONS, default=list(CONFIGURATIONS), metavar="NAME")
    add_dataset(parser)
    parser.add_argument("--child", choices=["estimate", "measure"], help=SUPPRESS)
    parser.add_argument("--folder", type=Path, help=SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        child = {"estimate": estimate, "measure": measure}[arguments.child]
        print(json.dumps(child(arguments.only[0], arguments.dataset, arguments.folder)))
        return
    for name in [name for name in os.environ if name.startswith("MALLOC_")]:
        del os.environ[name]
    with tempfile.TemporaryDirectory() as folder:
        print(json.dumps(compare(arguments.only, arguments.dataset, Path(folder))))


def compare(names: list[str], dataset: Path, folder: Path) -> dict[str, dict[str, Any]]:
    """Print a line of the table for each name; returns all figures."""
    print(f"{'MB':<20} {'estimate':>8}   {'no heap':>8} {'ratio':>6}   {'measured':>8} {'ratio':>6}")
    results = {}
    for name in names:
        parts = run(name, "estimate", dataset, folder)
        usual = run(name, "measure", dataset, folder)
        mapped = run(name, "measure", dataset, folder, MALLOC_MMAP_THRESHOLD_=str(2**20))
        total = sum(parts.values())
        results[name] = {
            "parts": parts, "measured": usual["peak"], "ratio": total / usual["peak"], "seconds": usual["seconds"],
            "measured_without_heap": mapped["peak"], "ratio_without_heap": total / mapped["peak"],
            "seconds_without_heap": mapped["seconds"],
        }  # fmt: skip
        print(
            f"{name:<20} {total / 1e6:>8.0f}   {mapped['peak'] / 1e6:>8.0f} {total / mapped['peak']:>6.2f}   "
            f"{usual['peak'] / 1e6:>8.0f} {total / usual['peak']:>6.2f}",
            flush=True,
        )
    return results


if __name__ == "__main__":
    main()
