"""What a checkpoint holds, how to find one, and whether it is intact; training/saving/ writes them.

    checkpoints/step-00000100/
        model.safetensors, config.json, …   for transformers' `from_pretrained`; with LoRA only adapters and base.json
        optimizer.safetensors               tensors of the optimizer's state
        average.safetensors                 moving average of the weights, if the run keeps one
        optimizer/, average/                with FSDP, instead of these two files: one shard per rank
        state.json                          TrainState, scheduler, gradient scaler, the rest of the optimizer's state
        manifest.json                       size and SHA-256 of every other file; written last
    checkpoints/pointers.json               the names of two or three of these folders: best, best_average, last
    checkpoints/best, …                     links to them for users' paths, where the disk has links

No random state is stored: train.py seeds every step from (seed, samples seen, rank). Nothing is pickled.
`python -m utils.checkpoints list RUN` prints the checkpoints of a run; `verify` also checks every byte of them. This
module does not import torch, so that both commands answer at once.
"""

import contextlib
import os
import re
import sys
import time
from dataclasses import dataclass, field, fields
from pathlib import Path
from types import UnionType
from typing import Any, get_args, get_origin

from utils.cli import UserError, run_script
from utils.files import hash_file, read_json, readable

PREFIX = "step-"
POINTERS = ("best", "best_average", "last")
POINTER_FILE = "pointers.json"


@dataclass
class TrainState:
    """Where a run stands. It is saved and restored as a whole."""

    dataset_key: str  # identity of the dataset, from its manifest
    optimizer_step: int = 0  # updates made; drives the schedule
    samples_seen: int = 0  # rows consumed by all ranks; drives the data order
    tokens_seen: int = 0  # target tokens consumed by all ranks
    last_evaluated_step: int = 0  # behind optimizer_step if the state was saved before its evaluation and sample
    evaluation_due: bool = False  # then: whether these are to be made
    sample_due: bool = False
    skipped: int = 0  # updates that were not made; they consume data, but no step of the schedule
    nonfinite: int = 0  # updates skipped because loss or gradient was not finite, without fp16's overflows
    spikes: int = 0  # updates skipped because of a spike of loss or gradient norm
    without_target: int = 0  # updates that were not made because no token of the global batch is a target
    recent: list[list[float]] = field(default_factory=list)  # [loss, gradient norm] of the latest updates: spike_window
    interval_nats: float = 0.0  # summed loss of the updates since the last one that was logged
    interval_targets: int = 0  # their target tokens
    train_seconds: float = 0.0  # time spent in training steps, over all launches of the run
    best_loss: float | None = None  # lowest evaluation loss, in nats per token
    best_step: int | None = None  # its step; export.py takes its checkpoint
    best_average_loss: float | None = None  # the same of the average of the weights, if the run keeps one
    best_average_step: int | None = None
    patience_loss: float | None = None  # the next evaluation must be lower by early_stopping_min_delta; nats per token
    evaluations_without_improvement: int = 0
    stream: dict[str, Any] | None = None  # position of each lane (`StreamLoader.state`); None for stored data


def load_state(checkpoint: Path) -> TrainState:
    """The TrainState in a checkpoint; `UserError` if a field is missing, unknown or of another type."""
    path = checkpoint / "state.json"
    try:
        saved = read_json(path)["state"]
        if "looked_step" in saved:  # its earlier name
            saved["last_evaluated_step"] = saved.pop("looked_step")
        state = TrainState(**saved)
    except (KeyError, TypeError) as error:
        raise UserError(f"{path} was not written by this version of train.py: {error}") from error
    for item in fields(TrainState):
        value = getattr(state, item.name)
        if not _fits(value, item.type):
            raise UserError(f"{path}: {item.name} is {str(value)[:40]!r}, which train.py never writes")
    return state


def _fits(value: Any, kind: Any) -> bool:
    """Whether a value read from JSON has the type of a field; a count must not be negative."""
    if isinstance(kind, UnionType):
        return any(_fits(value, part) for part in get_args(kind))
    if get_origin(kind) is list:
        return isinstance(value, list) and all(_fits(item, get_args(kind)[0]) for item in value)
    if kind is int:
        return type(value) is int and 0 <= value < 1 << 63
    return type(value) in (int, float) if kind is float else isinstance(value, get_origin(kind) or kind)


def checkpoint_name(step: int) -> str:
    return f"{PREFIX}{step:08d}"


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix(PREFIX))


def list_checkpoints(folder: Path) -> list[Path]:
    """The checkpoint folders of a run, oldest first, valid or not; links and folders of other names do not count."""
    found = (path for path in folder.glob(PREFIX + "*") if is_checkpoint_name(path.name))
    return sorted((path for path in found if not path.is_symlink()), key=step_of)


def is_checkpoint_name(name: Any) -> bool:
    return isinstance(name, str) and re.fullmatch(r"step-[0-9]{8,18}", name) is not None


def read_pointers(folder: Path) -> dict[str, str]:
    """The names of the checkpoints in `folder` that are best, best_average and last, as far as it is known.

    pointers.json decides. Without it, the links do, and without these, as a last resort, the state of the newest
    checkpoint, which was saved before its own evaluation. `UserError` if one of them names anything else than a
    checkpoint of this folder.
    """
    path = folder / POINTER_FILE
    if path.is_file():
        pointers = read_json(path)
        if strange := [name for name in pointers if name not in POINTERS or not is_checkpoint_name(pointers[name])]:
            raise UserError(
                f"{path}: {strange[0]!r} names no checkpoint; remove the file, or give a checkpoint folder itself"
            )
        return pointers  # type: ignore[no-any-return]
    found = list_checkpoints(folder)
    pointers = {"last": found[-1].name} if found else {}
    for link in (folder / name for name in POINTERS):
        if link.is_symlink():
            if not is_inside(link, folder):
                raise UserError(f"{link} is a link to {os.readlink(link)}, outside of the run; give that folder itself")
            pointers[link.name] = link.resolve().name
    if found and len(pointers) < len(POINTERS):
        with contextlib.suppress(UserError):
            state = load_state(found[-1])
            for name, step in (("best", state.best_step), ("best_average", state.best_average_step)):
                if step:
                    pointers.setdefault(name, checkpoint_name(step))
    return pointers


def find_newest_valid(folder: Path) -> tuple[Path | None, list[str]]:
    """The newest checkpoint whose files match their hashes, and one line for each newer one that does not."""
    problems: list[str] = []
    for checkpoint in reversed(list_checkpoints(folder)):
        if (problem := find_problem(checkpoint)) is None:
            return checkpoint, problems
        problems.append(f"{checkpoint} is not valid and is skipped: {problem}")
    return None, problems


def find_problem(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint folder, or None. Reads every byte of it."""
    try:
        manifest = read_json(checkpoint / "manifest.json")
        expected = {name: (int(file["bytes"]), str(file["sha256"])) for name, file in manifest.items()}
    except (UserError, ValueError, TypeError, KeyError, OverflowError):
        return "manifest.json is missing or unreadable"
    for name, (size, digest) in expected.items():
        if not is_inside(path := checkpoint / name, checkpoint):
            return f"manifest.json names {name[:200]!r}, which is outside of the checkpoint"
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != size:
            return f"{name} has {path.stat().st_size} bytes instead of {size}"
        if hash_file(path) != digest:
            return f"{name} has changed since it was saved"
    return None if "state.json" in expected else "manifest.json does not name state.json"


def is_pointer(path: Path) -> bool:
    """Whether `path` is RUN/checkpoints/best, …/best_average or …/last. pointers.json decides what it stands for: in a
    copy of a run a folder of that name may hold an older checkpoint."""
    return path.name in POINTERS and (path.parent / POINTER_FILE).is_file()


def find_checkpoint(path: str | Path, *pointers: str) -> Path:
    """A run folder, or its checkpoints/ → the first of its `pointers` (best, else last) that it has;
    RUN/checkpoints/best → what it points to; a checkpoint folder → itself. Reads no weights. `UserError` if there is
    no such checkpoint."""
    path = Path(path)
    folder, pointers = path / "checkpoints", pointers or ("best", "last")
    if is_pointer(path):
        folder, pointers = path.parent, (path.name,)
    elif not path.exists():
        raise UserError(f"{path} does not exist; give a run or a checkpoint")
    elif list_checkpoints(path):
        folder = path
    if not folder.is_dir():
        if (path / "state.json").is_file():
            return path
        is_run = (path / "config.yaml").is_file()
        raise UserError(f"{path} is " + ("a run without a checkpoint so far" if is_run else "no run and no checkpoint"))
    known = read_pointers(folder)
    pointer = next((name for name in pointers if name in known), None)
    if pointer is None:
        raise UserError(f"{path}: the run has no {pointers[0].replace('_', ' ')} checkpoint so far")
    if (found := folder / known[pointer]) not in (left := list_checkpoints(folder)):
        remedy = (
            f"left are {', '.join(path.name for path in left)}: give one, as in {left[-1]}" if left else "none is left"
        )
        raise UserError(f"{found}, the {pointer.replace('_', ' ')} checkpoint of the run, is gone; {remedy}")
    return found


def resolve_checkpoint(path: str | Path, *pointers: str) -> Path:
    """`find_checkpoint`, verified: `UserError` unless its files are those that were saved. Reads every byte."""
    found = find_checkpoint(path, *pointers)
    if problem := find_problem(found):
        raise UserError(f"{found}: {problem}; give a valid one (`python -m utils.checkpoints verify RUN` lists them)")
    return found.resolve()


def is_inside(path: Path, folder: Path) -> bool:
    """Whether `path`, with all links followed, lies in `folder`; False if it cannot be a path."""
    try:
        return path.resolve().is_relative_to(folder.resolve())
    except (OSError, ValueError):
        return False


def main(arguments: list[str]) -> None:
    """Print a line per checkpoint; exit with 1 if `verify` finds one that is not valid."""
    if len(arguments) != 2 or arguments[0] not in ("list", "verify"):
        raise UserError("usage: python -m utils.checkpoints list|verify RUN")
    command, run = arguments[0], Path(arguments[1])
    folder = run / "checkpoints" if (run / "checkpoints").is_dir() else run
    if not (found := list_checkpoints(folder)):
        raise UserError(f"{run}: {'no checkpoints here' if run.exists() else 'does not exist'}")
    pointers = read_pointers(folder)
    damaged = 0
    for checkpoint in found:
        files = [path.stat() for path in checkpoint.rglob("*") if path.is_file()]
        saved = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(max((file.st_mtime for file in files), default=0)))
        marks = " ".join(mark for mark, name in pointers.items() if name == checkpoint.name)
        size = readable(sum(file.st_size for file in files))
        problem = find_problem(checkpoint) if command == "verify" else None
        damaged += problem is not None
        verdict = "" if command == "list" else f"  {'NOT VALID: ' + problem if problem else 'valid'}"
        print(f"{checkpoint.name}  {saved}  {size:>9}  {marks:<9}{verdict}".rstrip())
    if damaged:
        sys.exit(1)


if __name__ == "__main__":
    run_script(main, sys.argv[1:])
