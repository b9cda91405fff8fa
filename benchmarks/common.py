"""Shared by the benchmarks: running train.py in its own processes, and reading its metrics."""

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # `utils` is not installed
from training.options import read_options
from utils.cli import parse_config
from utils.config import TrainConfig
from utils.files import find_obstacle

ROOT = Path(__file__).resolve().parent.parent
DEMO = ROOT / "data" / "demo"
# train.py's options for a run in which only the steps count; each step writes a line of metrics.jsonl.
STEPS_ONLY: dict[str, Any] = {
    "data.dataset": DEMO, "evaluation.every_steps": 100_000, "checkpoint.every_steps": 100_000,
    "tracking.trackers": "[]", "tracking.sample_every_steps": 0, "tracking.log_every_steps": 1,
}  # fmt: skip
ON_CPU = {"ACCELERATE_USE_CPU": "true"}
TRAIN = str(ROOT / "train.py")
ONE_PROCESS = [sys.executable]
TWO_PROCESSES = [
    sys.executable, "-m", "accelerate.commands.launch",
    "--config_file", str(ROOT / "accelerate_configs" / "cpu_2_processes.yaml"),
    "--main_process_port", "0",  # any free port, because other launches may be running
]  # fmt: skip


def build_parser(doc: str | None) -> argparse.ArgumentParser:
    """A parser without abbreviations, because options that a benchmark does not know may be train.py's."""
    formatter = argparse.RawDescriptionHelpFormatter
    return argparse.ArgumentParser(description=doc, formatter_class=formatter, allow_abbrev=False)


def add_dataset(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--dataset", type=dataset_folder, default=str(DEMO), help="folder written by prepare_data.py")


def read_arguments(parser: argparse.ArgumentParser, base: dict[str, Any]) -> tuple[argparse.Namespace, list[str]]:
    """A benchmark's own options, and those for train.py, checked together with `base`: before the first process starts,
    and for a mistake one line. Without a dataset in `base`, the benchmark makes its own."""
    arguments, further = parser.parse_known_args()
    if "data.dataset" in base:
        read_options(None, [*flags(base), *further], runs=False)
    else:
        parse_config(TrainConfig, None, [*flags(base), *further])
    return arguments, further


def count(text: str) -> int:
    """The type of an option: a whole number from 1 on, also written 1e8."""
    try:
        value = float(text)
        if value >= 1 and value == int(value):
            return int(value)
    except (ValueError, OverflowError):  # no number; infinity
        pass
    raise argparse.ArgumentTypeError(f"{text} must be a whole number, 1 or more")


def amount(text: str) -> float:
    """The type of an option: a number above 0."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text} must be a number above 0")
    return value


def file_to_write(name: str) -> Path:
    if obstacle := find_obstacle(name):
        raise argparse.ArgumentTypeError(f"{name} {obstacle}")
    return Path(name)


def dataset_folder(name: str) -> Path:
    if not (folder := Path(name).resolve() / "manifest.json").is_file():
        raise argparse.ArgumentTypeError(f"{name} is not a dataset; make the demo's with: python prepare_data.py")
    return folder.parent


def flags(options: dict[str, Any]) -> list[str]:
    return [str(part) for name, value in options.items() for part in (f"--{name}", value)]


def environment(**extra: str) -> dict[str, str]:
    """The environment without a launcher's variables, except ACCELERATE_USE_CPU, plus `extra`."""
    kept = {name for name in os.environ if not name.startswith("ACCELERATE_") or name == "ACCELERATE_USE_CPU"}
    return {name: os.environ[name] for name in kept} | extra


def run(*command: str | Path, **extra: str) -> str:
    """Run a command and return its output; if it fails, the benchmark ends."""
    arguments = [str(part) for part in command]
    child = subprocess.run(arguments, capture_output=True, text=True, env=environment(**extra))
    if child.returncode:
        raise SystemExit(f"{' '.join(arguments)} ended with {child.returncode}:\n{child.stderr[-3000:]}")
    return child.stdout


def read_metrics(output: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def median_speed(output: Path) -> float:
    """Tokens per second of a run: the median over all steps except the first two."""
    return statistics.median(
        [item["perf/tokens_per_second"] for item in read_metrics(output) if "train/loss" in item][2:]
    )


def save_plot(figure: Any, path: Path) -> None:
    for each in figure.axes:
        each.grid(alpha=0.3)
        each.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
