"""The run folder: which run it holds, whether this launch may continue it, and what makes the run repeatable.

config.yaml        the resolved configuration; runs again as --config
environment.json   one entry per launch: versions, machine, command, git commit
"""

import contextlib
import json
import os
import platform
import subprocess
import sys
import time
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from training.monitoring.stopping import STOP_FILE
from training.options import check_resume
from training.saving.folders import remove_leftovers
from utils.checkpoints import find_newest_valid, load_state
from utils.cli import UserError, at_exit, save_config
from utils.config import TrainConfig
from utils.files import flatten, hold_lock, read_json, read_yaml, replace_text

# Options that a resumed run may change: what is shown, how the same batch is split, how long the run is. The last one
# bends a decaying schedule from the resumed step on. Every change is printed.
FREE_TO_CHANGE = (
    "output", "max_minutes", "data.dataset", "data.num_workers", "batch.per_device_batch_size", "evaluation.",
    "checkpoint.", "guards.", "tracking.", "schedule.max_steps", "schedule.num_epochs", "schedule.max_tokens",
    "schedule.decay_steps", "model.activation_checkpointing",
)  # fmt: skip
PACKAGES = ("torch", "transformers", "accelerate", "datasets", "tokenizers", "safetensors", "numpy")


def open_run(accelerator: Accelerator, config: TrainConfig, dataset_key: str) -> tuple[Path | None, list[str]]:
    """The checkpoint to resume from (None: a new run) and lines to print, the same on all ranks.

    The main process verifies the checkpoint and locks the folder until it exits; the others get the result. Raises
    `UserError` on all ranks if the folder holds another run, is in use, cannot be written, or may not be resumed.
    """
    found: list[Any] = [None, [], None]
    if accelerator.is_main_process:
        try:
            found[:2] = _open_run(Path(config.output), config, dataset_key)
            before = [launch.get("mixed_precision") for launch in past_launches(Path(config.output))][-1:]
            if before not in ([], [accelerator.mixed_precision]):
                found[1].append(f"changed since the last launch: precision {before[0]} → {accelerator.mixed_precision}")
        except (UserError, OSError) as error:
            found[2] = str(error)
    broadcast_object_list(found)
    checkpoint, lines, problem = found
    if problem:
        raise UserError(problem)
    return checkpoint, lines


def _open_run(run: Path, config: TrainConfig, dataset_key: str) -> tuple[Path | None, list[str]]:
    try:
        run.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"run folder {run} cannot be made: {error.strerror}; choose another --output") from None
    if not os.access(run, os.W_OK):
        raise UserError(f"run folder {run} cannot be written; choose another --output")
    saved_config = run / "config.yaml"
    # The user may ask for a stop while the first launch is still importing.
    is_empty = all(path.name.startswith(".") or path.name == STOP_FILE for path in run.iterdir())
    if not is_empty and not saved_config.is_file():
        raise UserError(f"{run} is not empty and not a run folder (no config.yaml); choose another --output")
    lock = run / ".lock"
    if not at_exit.enter_context(hold_lock(lock)):
        raise UserError(f"{run} is in use by {lock.read_text('utf-8')}; wait for it, or choose another --output")
    at_exit.callback(_leave_no_trace, run)
    check_resume(config)
    changes = [] if is_empty else _differences(read_yaml(saved_config), asdict(config))
    if refused := [text for name, text in changes if not name.startswith(FREE_TO_CHANGE)]:
        raise UserError(f"{run} holds another run: {'; '.join(refused)}; choose another --output")
    checkpoint, problems = find_newest_valid(run / "checkpoints")
    if problems and checkpoint is None:
        raise UserError(f"{run} has no valid checkpoint to resume from: {'; '.join(problems)}; choose another --output")
    if checkpoint is not None and load_state(checkpoint).dataset_key != dataset_key:
        raise UserError(f"{run} was trained on another dataset than {config.data.dataset}; choose another --output")
    remove_leftovers(run / "checkpoints")
    return checkpoint, [*(f"changed since the last launch: {text}" for _, text in changes), *problems]


def _leave_no_trace(run: Path) -> None:
    """After a refused run, remove its lock file, while still holding the lock."""
    with contextlib.suppress(OSError):
        if [path.name for path in run.iterdir()] == [".lock"]:
            (run / ".lock").unlink()


def _differences(saved: dict[str, Any], current: dict[str, Any]) -> list[tuple[str, str]]:
    """(option, "option old → new") for each option that differs between two nested mappings.

    For an option that is newer than the run, the old value is its default.
    """
    old, new = flatten(asdict(TrainConfig())) | flatten(saved), flatten(current)
    names = sorted(old.keys() | new.keys())
    return [(name, f"{name} {old.get(name)} → {new.get(name)}") for name in names if old.get(name) != new.get(name)]


def record_launch(accelerator: Accelerator, config: TrainConfig) -> None:
    """Write config.yaml, which makes the folder this run's, and append to environment.json (main process)."""
    run = Path(config.output)
    save_config(config, run / "config.yaml")
    launches = past_launches(run)
    (run / "summary.json").unlink(missing_ok=True)  # it describes an earlier launch
    launches.append({
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "command": sys.argv,
        "git_commit": _git_commit(),
        "python": platform.python_version(),
        "packages": {name: version(name) for name in PACKAGES},
        "platform": platform.platform(),
        "device": str(accelerator.device),
        "num_processes": accelerator.num_processes,
        "distributed_type": accelerator.distributed_type.value,
        "mixed_precision": accelerator.mixed_precision,
        "threads": torch.get_num_threads(),
    })  # fmt: skip
    replace_text(run / "environment.json", json.dumps(launches, indent=2) + "\n")


def past_launches(run: Path) -> list[dict[str, Any]]:
    """environment.json, or nothing if there is none."""
    try:
        launches = read_json(run / "environment.json", list)
    except UserError:
        return []
    return [launch for launch in launches if isinstance(launch, dict)]


def _git_commit() -> str | None:
    command = ["git", "-C", str(Path(sys.argv[0]).resolve().parent), "describe", "--always", "--dirty", "--abbrev=40"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
