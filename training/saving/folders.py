"""Checkpoint folders on the disk: a folder is complete or not there, and goes only when a newer one is safe.

With FSDP each rank writes its shard into it; utils/checkpoint_tensors.py reads them. torch.distributed.checkpoint takes
1.7 s to import, so the functions that need it import it.
"""

import json
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch.distributed as dist
from accelerate.utils import broadcast_object_list, gather_object
from torch import nn

from utils.checkpoint_tensors import Tensors, read_shard_metadata
from utils.checkpoints import LINKS, PREFIX, checkpoint_name, list_checkpoints, step_of
from utils.cli import UserError
from utils.config import CheckpointConfig
from utils.files import hash_file, readable
from utils.pretrained import WEIGHTS

TEMPORARY_PREFIX = ".tmp-"  # not yet a checkpoint, or no longer one; the next start or save removes it


@contextmanager
def new_checkpoint(folder: Path, step: int) -> Iterator[Path]:
    """A folder to write into, which becomes `folder/step-N` at the end of the block, flushed and hashed.

    If the block raises, or is killed, there is no such checkpoint, and the older ones are untouched.
    """
    target = folder / checkpoint_name(step)
    temporary = folder / f"{TEMPORARY_PREFIX}{target.name}"
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        yield temporary
        paths = sorted(path for path in temporary.rglob("*") if path.is_file())
        files = {
            str(path.relative_to(temporary)): {"bytes": path.stat().st_size, "sha256": hash_file(path)}
            for path in paths
        }
        (temporary / "manifest.json").write_text(json.dumps(files, indent=2), encoding="utf-8")
        for path in [*temporary.rglob("*"), temporary]:
            _flush_to_disk(path)
        if target.exists():  # one that a resume passed over as damaged
            _remove(target)
        temporary.rename(target)
        _flush_to_disk(folder)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def link_checkpoint(folder: Path, link: str, step: int | None) -> bool:
    """Let `folder/link` point to the checkpoint of `step`, in one step; False if there is none."""
    target = checkpoint_name(step or 0)
    if not (folder / target).exists():
        return False
    temporary = folder / f"{TEMPORARY_PREFIX}{link}"
    temporary.unlink(missing_ok=True)
    temporary.symlink_to(target)
    temporary.replace(folder / link)
    return True


def remove_old_checkpoints(folder: Path, keep_last: int, archive_every_steps: int | None) -> None:
    """Remove all but the newest `keep_last`, the linked and the archived checkpoints."""
    kept = {(folder / link).resolve().name for link in LINKS}
    found = list_checkpoints(folder)
    kept |= {path.name for path in found[-keep_last:]}
    for path in found:
        if path.name not in kept and not (archive_every_steps and step_of(path) % archive_every_steps == 0):
            _remove(path)
    remove_leftovers(folder)


def remove_leftovers(folder: Path) -> None:
    """Remove what a killed save or removal has left."""
    for path in folder.glob(f"{TEMPORARY_PREFIX}{PREFIX}*"):
        shutil.rmtree(path, ignore_errors=True)


def _flush_to_disk(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _remove(checkpoint: Path) -> None:
    """Away under its name in one step, so that a kill leaves no half of a checkpoint; then file by file."""
    leaving = checkpoint.with_name(f"{TEMPORARY_PREFIX}{checkpoint.name}.removed")
    shutil.rmtree(leaving, ignore_errors=True)
    checkpoint.rename(leaving)
    shutil.rmtree(leaving, ignore_errors=True)


def check_disk(folder: Path, config: CheckpointConfig, bytes_each: int, steps_left: int) -> str:
    """A line on the space that the coming checkpoints will take; `UserError` if the disk has too little.

    At most, there will be the newest, the best, the archived ones and the one that is being written.
    """
    archive = config.archive_every_steps
    number = config.keep_last + 2 + (steps_left // archive if archive else 0)
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


@contextmanager
def shared_checkpoint(folder: Path, step: int, group: dist.ProcessGroup) -> Iterator[Path]:
    """The main process's `new_checkpoint`, for all ranks of `group` to write into; raises on all if it cannot begin."""
    begun: list[Path | None] = [None]
    with ExitStack() as stack:
        try:
            if dist.get_rank() == 0:
                begun[0] = stack.enter_context(new_checkpoint(folder, step))
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
