"""The folders of a run: whose run it is, what makes it repeatable, and checkpoints that are complete or not there.

config.yaml        the resolved configuration; runs again as --config
environment.json   one entry per launch: versions, machine, command, git commit
source/            the scripts that were launched, and changes that are in no commit
checkpoints/       a checkpoint goes only when a newer one is safe. With FSDP each rank writes its shard into it, by
                   torch.distributed.checkpoint, which takes 1.7 s to import
"""

import contextlib
import errno
import json
import os
import platform
import shutil
import sys
import time
import uuid
from collections.abc import Iterator
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object
from torch import nn

from training.options import check_output
from training.saving.source import record_source
from utils.checkpoint_tensors import Tensors, read_shard_metadata
from utils.checkpoints import (
    POINTER_FILE,
    POINTERS,
    checkpoint_name,
    find_newest_valid,
    find_problem,
    list_checkpoints,
    load_state,
    read_pointers,
    step_of,
)
from utils.cli import UserError, at_exit, save_config
from utils.config import CheckpointConfig, TrainConfig
from utils.files import flatten, follow_umask, hash_file, hold_lock, read_json, read_yaml, readable, replace_text
from utils.pretrained import WEIGHTS

TEMPORARY_PREFIX = ".tmp-"  # not yet a checkpoint, or no longer one; the next start or save removes it
# Options that a resumed run may change: what is shown, how the same batch is split, how long the run is. The last one
# bends a decaying schedule from the resumed step on. Every change is printed.
FREE_TO_CHANGE = (
    "output", "max_minutes", "data.dataset", "data.num_workers", "batch.per_device_batch_size",
    # Not early_stopping_weights: patience would compare with the loss of the other weights.
    "evaluation.every_steps", "evaluation.at_start", "evaluation.per_device_batch_size",
    "evaluation.early_stopping_patience", "evaluation.early_stopping_min_delta",
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
    check_output(config)
    made = [path for path in (run, *run.parents) if not path.exists()]
    try:
        run.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        _remove_empty(made)
        raise UserError(f"run folder {run} cannot be made: {error.strerror}; choose another --output") from None
    if not os.access(run, os.W_OK):
        raise UserError(f"run folder {run} cannot be written; choose another --output")
    lock = run / ".lock"
    try:
        locked = at_exit.enter_context(hold_lock(lock))
    except OSError as error:
        _remove_empty(made)
        raise UserError(f"run folder {run} cannot be written: {error.strerror}; choose another --output") from None
    if not locked:
        raise UserError(f"{run} is in use by {lock.read_text('utf-8')}; wait for it, or choose another --output")
    at_exit.callback(_leave_no_trace, run, made)
    check_output(config)  # again: another launch may have begun and ended since
    saved_config = run / "config.yaml"
    changes = _differences(read_yaml(saved_config), asdict(config)) if saved_config.is_file() else []
    if refused := [text for name, text in changes if not name.startswith(FREE_TO_CHANGE)]:
        raise UserError(f"{run} holds another run: {'; '.join(refused)}; choose another --output")
    checkpoint, problems = find_newest_valid(run / "checkpoints")
    if problems and checkpoint is None:
        raise UserError(f"{run} has no valid checkpoint to resume from: {'; '.join(problems)}; choose another --output")
    if checkpoint is not None and load_state(checkpoint).dataset_key != dataset_key:
        raise UserError(f"{run} was trained on another dataset than {config.data.dataset}; choose another --output")
    remove_leftovers(run / "checkpoints")
    return checkpoint, [*(f"changed since the last launch: {text}" for _, text in changes), *problems]


def _leave_no_trace(run: Path, made: list[Path]) -> None:
    """After a refused run, remove its lock file, while still holding the lock, and the folders `made` for it."""
    with contextlib.suppress(OSError):
        if not (run / "config.yaml").exists():
            (run / ".lock").unlink()
        _remove_empty(made)


def _remove_empty(made: list[Path]) -> None:
    """Remove the folders `made` for a run that is refused, the innermost first, as far as they are empty."""
    for folder in made:
        with contextlib.suppress(OSError):
            folder.rmdir()


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
        **record_source(run),
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


@contextlib.contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """A folder to write into, which becomes `target` at the end of the block, flushed and hashed.

    If the block raises, or is killed, there is no `target`, and its neighbours are untouched.
    """
    temporary = target.with_name(f"{TEMPORARY_PREFIX}{target.name}")
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        yield temporary
        follow_umask(temporary)
        files: dict[str, Any] = {}
        for path in sorted(path for path in temporary.rglob("*") if path.is_file()):
            files[str(path.relative_to(temporary))] = {"bytes": path.stat().st_size, "sha256": hash_file(path)}
        (temporary / "manifest.json").write_text(json.dumps(files, indent=2), encoding="utf-8")
        for path in [*temporary.rglob("*"), temporary]:
            _flush_to_disk(path)
        if target.exists():  # one that a resume passed over as damaged
            _remove(target)
        temporary.rename(target)
        _flush_to_disk(target.parent)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def point(folder: Path, steps: dict[str, int | None]) -> list[str]:
    """Record in `folder`, in one step, which checkpoint each pointer names (pointer → optimizer step; None: no change).

    Returns the pointers whose checkpoint is not there; they keep their former one.
    """
    pointers = {}
    with contextlib.suppress(UserError):  # a file that cannot be read is written anew
        pointers = read_pointers(folder)
    wanted = {name: checkpoint_name(step) for name, step in steps.items() if step is not None}
    there = {name: target for name, target in wanted.items() if (folder / target).is_dir()}
    pointers |= there
    replace_text(folder / POINTER_FILE, json.dumps(pointers, indent=2) + "\n")
    _flush_to_disk(folder)
    for name, target in pointers.items():
        _link(folder / name, target)
    return sorted(wanted.keys() - there.keys())


def _link(link: Path, target: str) -> None:
    """A link for users' paths. There is none where the disk has no links, or a copy of the run has a folder there."""
    temporary = link.with_name(f"{TEMPORARY_PREFIX}{link.name}")
    with contextlib.suppress(OSError):
        temporary.unlink(missing_ok=True)
        temporary.symlink_to(target)
        temporary.replace(link)
    with contextlib.suppress(OSError):
        temporary.unlink()


def remove_old_checkpoints(folder: Path, keep_last: int, archive_every_steps: int | None) -> None:
    """Remove all but the newest `keep_last`, those that pointers name, and the archived checkpoints."""
    found = list_checkpoints(folder)
    kept = {*read_pointers(folder).values(), *(path.name for path in found[-keep_last:])}
    for path in found:
        if path.name not in kept and not (archive_every_steps and step_of(path) % archive_every_steps == 0):
            _remove(path)
    remove_leftovers(folder)


def remove_leftovers(folder: Path) -> None:
    """Remove what a killed save or removal has left."""
    for path in folder.glob(f"{TEMPORARY_PREFIX}*"):
        shutil.rmtree(path, ignore_errors=True)


def try_disk(folder: Path) -> list[str]:
    """Do what a save does, with a few bytes, before the first step; lines on what this disk lacks (main process).

    `UserError` if checkpoints cannot be written or read back here.
    """
    trial = folder / f"{TEMPORARY_PREFIX}trial"
    try:
        with new_folder(trial / checkpoint_name(0)) as temporary:
            (temporary / "state.json").write_text("{}", encoding="utf-8")
        point(trial, {"last": 0})
        problem = find_problem(trial / read_pointers(trial)["last"])
        flushes, links = _flush_to_disk(trial), (trial / "last").is_symlink()
        _remove(trial / checkpoint_name(0))
    except (OSError, UserError) as error:
        problem = str(error)
    finally:
        shutil.rmtree(trial, ignore_errors=True)
    if problem:
        with contextlib.suppress(OSError):
            folder.rmdir()
        raise UserError(f"{folder} cannot hold checkpoints: {problem}; choose another --output")
    copied = [name for name in POINTERS if (folder / name).is_dir() and not (folder / name).is_symlink()]
    lines = [
        f"{folder / name} is a folder, as in a copied run; {POINTER_FILE} decides, and you can remove this folder"
        for name in copied
    ]
    if not links:
        lines.append(f"this disk has no links; {folder / POINTER_FILE} names the best and the last checkpoint")
    if not flushes:
        lines.append("this disk does not flush folders; a power cut may undo the latest save")
    return lines


def _flush_to_disk(path: Path) -> bool:
    """Whether it could be done. Some disks do not flush folders; what else fails is an `OSError`."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if path.is_dir() and error.errno in (errno.EINVAL, errno.ENOTSUP, errno.ENOSYS):
            return False
        raise
    finally:
        os.close(descriptor)
    return True


def _remove(checkpoint: Path) -> None:
    """Rename the checkpoint first, so that a kill never leaves half of one under its name; then delete its files."""
    leaving = checkpoint.with_name(f"{TEMPORARY_PREFIX}{checkpoint.name}.removed")
    shutil.rmtree(leaving, ignore_errors=True)
    checkpoint.rename(leaving)
    shutil.rmtree(leaving, ignore_errors=True)


def check_disk(folder: Path, config: CheckpointConfig, bytes_each: int, steps_left: int, num_best: int) -> str:
    """A line on the space that the coming checkpoints will take; `UserError` if the disk has too little.

    At most, there will be the newest, `num_best`, the archived ones and the one that is being written.
    """
    archive = config.archive_every_steps
    number = config.keep_last + num_best + 1 + (steps_left // archive if archive else 0)
    removable = [path for path in list_checkpoints(folder) if not archive or step_of(path) % archive]
    freed = sum(file.stat().st_size for path in removable for file in path.rglob("*") if file.is_file())
    free = shutil.disk_usage(next(path for path in (folder, *folder.parents) if path.exists())).free
    if number * bytes_each > free + freed:
        raise UserError(
            f"{folder} will need {readable(number * bytes_each)} for {number} checkpoints of {readable(bytes_each)}, "
            f"but the disk has {readable(free + freed)}; free some, change --output, or lower checkpoint.keep_last"
        )
    return f"checkpoints: about {readable(bytes_each)} each, at most {number}; the disk has {readable(free)} free"


def check_shards(run: Path, model: nn.Module) -> None:
    """`UserError` on all ranks (which all call) if the shards of this model cannot be saved in this run's folder."""
    for name, value in model.state_dict().items():
        if value.ndim == 0 or not value.is_floating_point():
            raise UserError(
                f"with FSDP a model with {name} cannot be saved: it has no dimensions or is not floating-point; use DDP"
            )
    token, is_main = [f".seen-{uuid.uuid4().hex}"], dist.get_rank() == 0
    if is_main:
        (run / token[0]).touch()
    broadcast_object_list(token)
    seen = gather_object([(run / token[0]).exists()])
    if is_main:
        (run / token[0]).unlink()
    if not all(seen):
        raise UserError(
            f"{run} is not on a disk that all machines share, but FSDP's ranks all write there; choose another --output"
        )


@contextlib.contextmanager
def shared_checkpoint(folder: Path, step: int, group: dist.ProcessGroup) -> Iterator[Path]:
    """The main process's `new_folder` for a checkpoint, for all ranks of `group` to write into; raises on all if it cannot begin."""
    begun: list[Path | None] = [None]
    with contextlib.ExitStack() as stack:
        try:
            if dist.get_rank() == 0:
                begun[0] = stack.enter_context(new_folder(folder / checkpoint_name(step)))
        finally:  # else the others would wait for ever
            dist.broadcast_object_list(begun, group=group)
        if begun[0] is None:
            raise OSError(f"the main process cannot write in {folder}")
        yield begun[0]


def save_shards(tensors: Tensors, folder: Path, group: dist.ProcessGroup, *, merge: bool = False) -> None:
    """Write each rank's shard to its own file in `folder`; takes twice the shard's memory for a moment.

    With `merge` the main process merges the files on the disk. No rank ever holds the whole model.
    """
    import torch.distributed.checkpoint as dcp

    writer = dcp.HuggingFaceStorageWriter(str(folder), save_distributed=True, enable_consolidation=merge)
    dcp.save(tensors, storage_writer=writer, process_group=group)
    if merge and dist.get_rank() == 0:
        shutil.rmtree(folder / "sharded", ignore_errors=True)  # else the weights take the disk twice


def take_weights(expected: Tensors, merged: Path) -> None:
    """Move the merged file to where transformers looks for it (main process); `OSError` unless it is complete."""
    check_complete(merged, expected)
    (merged / "model-00001-of-00001.safetensors").replace(merged.parent / WEIGHTS)
    shutil.rmtree(merged)  # only an index is left in it


def check_complete(folder: Path, expected: Tensors) -> None:
    """`OSError` unless the files hold all of each tensor. torch merges and reads whatever it finds."""
    stored = read_shard_metadata(folder) if expected else {}
    for name, tensor in expected.items():
        if name not in stored or stored[name].size != tensor.shape:
            raise OSError(f"{folder}: a shard of {name} is missing")
