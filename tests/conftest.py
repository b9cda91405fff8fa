"""Helpers: the real scripts in real processes, on real text, with a model small enough to wait for."""

import contextlib
import importlib
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from utils.cli import parse_config, run_script

ROOT = Path(__file__).resolve().parent.parent
# Tests run beside each other: one thread for each, or their kernels would wait for threads that have no core.
os.environ |= {
    "HF_HUB_OFFLINE": "1",
    "ACCELERATE_USE_CPU": "true",
    "TOKENIZERS_PARALLELISM": "false",
    "OMP_NUM_THREADS": "1",
}
CONFIGS = {
    "prepare_data": "PrepareConfig",
    "train": "TrainConfig",
    "export": "ExportConfig",
    "evaluate": "EvaluateConfig",
}

# A model of 50 thousand parameters on rows of 64: a step takes some 15 ms.
SMALL = {
    "data.sequence_length": 64, "model.hidden_size": 32, "model.num_hidden_layers": 2, "model.num_attention_heads": 2,
    "model.intermediate_size": 64, "model.max_position_embeddings": 64, "batch.global_batch_size": 8,
    "schedule.warmup_steps": 2, "schedule.max_steps": 10, "tracking.log_every_steps": 1, "tracking.trackers": "[]",
    "tracking.sample_every_steps": 0, "evaluation.every_steps": 1000, "checkpoint.every_steps": 1000,
}  # fmt: skip


def environment() -> dict[str, str]:
    """The environment of a user's shell: nothing of a launcher's, no network; the CPU, also where a GPU is present."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("ACCELERATE_", "WANDB_"))}
    return kept | {"HF_HUB_OFFLINE": "1", "ACCELERATE_USE_CPU": "true", "TOKENIZERS_PARALLELISM": "false"}


def run(*command: str | Path, cwd: Path = ROOT, check: bool = True, **extra: str) -> subprocess.CompletedProcess[str]:
    """Run a command to its end; with `check`, its output is shown if it fails."""
    result = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        capture_output=True,
        text=True,
        env=environment() | extra,
        timeout=1800,
    )
    if check and result.returncode:
        pytest.fail(f"{command} ended with {result.returncode}\n{result.stdout[-3000:]}\n{result.stderr[-5000:]}")
    return result


def script(name: str, *arguments: str | Path, **options) -> subprocess.CompletedProcess[str]:
    return run(sys.executable, name, *arguments, **options)


def call(name: str, *arguments: str | Path) -> tuple[int, str, str]:
    """What `script` does, in this process, where starting one would take most of the time: exit code, stdout, stderr."""
    module = importlib.import_module(name.removesuffix(".py"))
    cls = getattr(module, CONFIGS[module.__name__])
    out, err, argv, sys.argv = io.StringIO(), io.StringIO(), sys.argv, [name, *map(str, arguments)]
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            run_script(module.main, parse_config(cls, module.__doc__))
        code = 0
    except SystemExit as ended:
        code = int(ended.code or 0)
    finally:
        sys.argv = argv
    return code, out.getvalue(), err.getvalue()


def error_line(name: str, *arguments: str | Path) -> str:
    """The one line that a script prints on stderr when it refuses, with exit code 2."""
    code, _, err = call(name, *arguments)
    lines = err.strip().splitlines()
    assert code == 2 and len(lines) == 1 and lines[0].startswith(f"{name}: error: "), (code, err)
    return lines[0]


def flags(options: dict[str, object]) -> list[str]:
    return [text for name, value in options.items() for text in (f"--{name}", str(value))]


def launcher(processes: int) -> list[str]:
    """`accelerate launch` for CPU processes; one alone needs no launcher."""
    if processes == 1:
        return [sys.executable]
    config_file = "accelerate_configs/cpu_2_processes.yaml"
    return [sys.executable, "-m", "accelerate.commands.launch", "--config_file", config_file]


def train(output: Path, *, processes: int = 1, name: str = "train.py", **options: object) -> list[dict]:
    """Train the small model and return metrics.jsonl; option names have `__` for the dot."""
    settings = SMALL | {"output": output} | {key.replace("__", "."): value for key, value in options.items()}
    if processes == 1 and name == "train.py":  # in this process: importing takes longer than ten steps
        code, _, err = call(name, *flags(settings))
        assert code == 0, err
    else:
        run(*launcher(processes), name, *flags(settings))
    return metrics(output)


def metrics(output: Path) -> list[dict]:
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


def train_losses(records: list[dict]) -> list[float]:
    return [record["train/loss"] for record in records if "train/loss" in record]


@pytest.fixture(scope="session")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The sample, prepared by prepare_data.py with its defaults."""
    folder = tmp_path_factory.mktemp("data") / "demo"
    script("prepare_data.py", "--output", folder)
    return folder


@pytest.fixture(scope="session")
def finished_run(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small run that has come to its end."""
    output = tmp_path_factory.mktemp("runs") / "finished"
    train(output, data__dataset=dataset, evaluation__every_steps=5, tracking__sample_every_steps=5)
    return output


@pytest.fixture(scope="session")
def small_dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Some hundred short documents: an epoch is soon over."""
    folder = tmp_path_factory.mktemp("small")
    lines = (ROOT / "sample_data" / "dictionaries.jsonl").read_text(encoding="utf-8").splitlines()[:150]
    texts = [" ".join(json.loads(line)["text"].split()[:30]) for line in lines]
    (folder / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    options = {"output": folder / "data", "sources": f"[{folder / 'texts.jsonl'}]", "tokenizer.vocab_size": 400,
               "validation_fraction": 0.1}  # fmt: skip
    assert call("prepare_data.py", *flags(options))[0] == 0
    return folder / "data"
