"""Checkpoints of sharded parameters: each rank writes its shard. utils/checkpoint_tensors.py reads them.

torch.distributed.checkpoint takes 1.7 s to import, so the functions that need it import it.
"""

import shutil
import uuid
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch.distributed as dist
from accelerate.utils import broadcast_object_list, gather_object
from torch import nn

from training.saving.folders import new_checkpoint
from utils.checkpoint_tensors import Tensors, read_shard_metadata
from utils.cli import UserError
from utils.pretrained import WEIGHTS

MERGING = "weights"  # the sub-folder in which torch merges the shards of the weights


def check_shards(run: Path, model: nn.Module) -> None:
    """`UserError` on all ranks (which all call) if the shards of this model cannot be saved in this run's folder."""
    for name, value in model.state_dict().items():
        if value.ndim == 0 or not value.is_floating_point():
            raise UserError(
                f"with FSDP a model with {name} cannot be saved: torch merges shards only of floating-point tensors that "
                "have dimensions; use DDP"
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
            f"{run} is not on a disk that all machines share, but with FSDP each rank writes its shard of a checkpoint "
            "there; choose another --output"
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


def save_shards(tensors: Tensors, folder: Path, group: dist.ProcessGroup) -> None:
    """Write each rank's shard to its own file in `folder`; takes twice the shard's memory for a moment."""
    import torch.distributed.checkpoint as dcp

    writer = dcp.HuggingFaceStorageWriter(str(folder), save_distributed=True)
    dcp.save(tensors, storage_writer=writer, process_group=group)


def save_weights(weights: Tensors, folder: Path, group: dist.ProcessGroup) -> None:
    """Write each rank's shard; the main process merges them on the disk. No rank ever holds the whole model."""
    import torch.distributed.checkpoint as dcp

    merged = folder / MERGING
    writer = dcp.HuggingFaceStorageWriter(str(merged), save_distributed=True, enable_consolidation=True)
    dcp.save(weights, storage_writer=writer, process_group=group)
    if dist.get_rank() == 0:
        shutil.rmtree(merged / "sharded", ignore_errors=True)  # else the weights take the disk twice


def take_weights(expected: Tensors, folder: Path) -> None:
    """Move the merged file to where transformers looks for it (main process); `OSError` unless it is complete."""
    check_complete(folder / MERGING, expected)
    (folder / MERGING / "model-00001-of-00001.safetensors").replace(folder / WEIGHTS)
    shutil.rmtree(folder / MERGING)  # only an index is left in it


def check_complete(folder: Path, expected: Tensors) -> None:
    """`OSError` unless the files hold all of each tensor. torch merges and reads whatever it finds."""
    stored = read_shard_metadata(folder) if expected else {}
    for name, tensor in expected.items():
        if name not in stored or stored[name].size != tensor.shape:
            raise OSError(f"{folder}: a shard of {name} is missing")
