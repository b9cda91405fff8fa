"""The run folder: whose it is, whether this call may go on in it, and what makes the run repeatable.

config.yaml        the resolved configuration; runs again as --config
environment.json   versions, machine, launch, git commit, one entry per launch
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
from utils.checkpoint_folders import find_newest_valid, remove_leftovers
from utils.checkpoints import load_state
from utils.cli import UserError, at_exit, save_config
from utils.config import TrainConfig
from utils.files import hold_lock, read_json, read_yaml, replace_text

# What may differ when a run goes on: what is seen of it, how the same batch is split, and how far it goes. The last
# bends a decaying schedule from the resumed step on; every change is printed.
FREE_TO_CHANGE = (
    "output", "max_minutes", "data.dataset", "data.num_workers", "batch.per_device_batch_size", "evaluation.",
    "checkpoint.", "guards.", "tracking.", "schedule.max_steps", "schedule.num_epochs", "schedule.max_tokens", "schedule.decay_steps", "model.activation_checkpointing",
)  # fmt: skip
PACKAGES = ("torch", "transformers", "accelerate", "datasets", "tokenizers", "safetensors", "numpy")


def open_run(accelerator: Accelerator, config: TrainConfig, dataset_key: str) -> tuple[Path | None, list[str]]:
    """The checkpoint to go on from (None: start afresh) and lines to say, the same on all ranks.

    The main process looks, hashes the checkpoint, and keeps a lock on the folder until it ends; the others are told.
    Raises `UserError` on all ranks if the folder holds another run, is in use, cannot be written, or was not asked to be
    resumed.
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
    # A stop may be asked for while the first launch is still importing.
    is_empty = all(path.name.startswith(".") or path.name == STOP_FILE for path in run.iterdir())
    if not is_empty and not saved_config.is_file():
        raise UserError(f"{run} is not empty and not a run folder (no config.yaml); choose another --output")
    lock = run / ".lock"
    if not at_exit.enter_context(hold_lock(lock)):
        raise UserError(
            f"{run} is in use by {lock.read_text(encoding='utf-8')}; wait for it, or choose another --output"
        )
    at_exit.callback(_leave_no_trace, run)
    lines: list[str] = []
    checkpoint = None
    if not is_empty:
        if config.checkpoint.resume == "never":
            raise UserError(
                f"{run} already holds a run; go on with it by --checkpoint.resume auto, or choose another --output"
            )
        saved = read_yaml(saved_config)
        changes = _differences(saved, asdict(config))
        refused = [text for name, text in changes if not name.startswith(FREE_TO_CHANGE)]
        if refused:
            raise UserError(f"{run} holds another run: {'; '.join(refused)}; choose another --output")
        lines += [f"changed since the last launch: {text}" for _, text in changes]
        checkpoint, problems = find_newest_valid(run / "checkpoints")
        if problems and checkpoint is None:
            raise UserError(
                f"{run} has no valid checkpoint to go on from: {'; '.join(problems)}; choose another --output"
            )
        lines += problems
        if checkpoint is not None and load_state(checkpoint).dataset_key != dataset_key:
            raise UserError(f"{run} was trained on another dataset than {config.data.dataset}; choose another --output")
    remove_leftovers(run / "checkpoints")
    return checkpoint, lines


def _leave_no_trace(run: Path) -> None:
    """Of a run that was refused. Called before the lock is let go: who opens the file meanwhile is refused, too."""
    with contextlib.suppress(OSError):
        if [path.name for path in run.iterdir()] == [".lock"]:
            (run / ".lock").unlink()


def _differences(saved: dict[str, Any], current: dict[str, Any]) -> list[tuple[str, str]]:
    """(option, "option old → new") for each option of two nested mappings that differs.

    An option that is newer than the run counts as left at its default, which is what the run did.
    """
    old, new = flatten(asdict(TrainConfig())) | flatten(saved), flatten(current)
    names = sorted(old.keys() | new.keys())
    return [(name, f"{name} {old.get(name)} → {new.get(name)}") for name in names if old.get(name) != new.get(name)]


def flatten(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mapping → one level, keys joined by dots."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, dict):
            flat |= flatten(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = value
    return flat


def record_launch(accelerator: Accelerator, config: TrainConfig) -> None:
    """Write config.yaml, by which the folder is this run's, and append to environment.json (main process)."""
    run = Path(config.output)
    save_config(config, run / "config.yaml")
    path = run / "environment.json"
    launches = past_launches(run)
    (run / "summary.json").unlink(missing_ok=True)  # it spoke of the end of an earlier launch
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
    replace_text(path, json.dumps(launches, indent=2) + "\n")


def past_launches(run: Path) -> list[dict[str, Any]]:
    """environment.json, or nothing where there is none."""
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
