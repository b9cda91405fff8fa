"""The tensors of a checkpoint on the disk: whole, or in the part of each rank. All is safetensors; nothing is pickled.

A part knows its place in the whole tensor (torch.distributed.checkpoint), so any number of ranks reads what any other has
written, and each only what it holds.
"""

import shutil
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from utils.pretrained import WEIGHTS
from utils.training.checkpoint_folders import new_checkpoint

Tensors = dict[str, torch.Tensor]
OPTIMIZER, AVERAGE = "optimizer", "average"  # what names of tensors begin with; a model's have nothing before them
MERGING = "weights"
SHARDS = "shards"  # not beside the weights: transformers would take shard-… files there for the model's


@contextmanager
def shared_checkpoint(folder: Path, step: int, group: dist.ProcessGroup) -> Iterator[Path]:
    """`new_checkpoint` of the main process, for all ranks of `group` to write into; raises on all if it cannot begin."""
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
    """Each rank of `group` its part, in a file of its own in `folder/shards`."""
    writer = HuggingFaceStorageWriter(str(folder / SHARDS), save_distributed=True)
    dcp.save(tensors, storage_writer=writer, process_group=group)


def save_weights(weights: Tensors, folder: Path, group: dist.ProcessGroup) -> None:
    """Each rank its part, which the main process then copies into one file, without a whole model in anyone's memory."""
    writer = HuggingFaceStorageWriter(str(folder / MERGING), save_distributed=True, enable_consolidation=True)
    dcp.save(weights, storage_writer=writer, process_group=group)


def take_weights(folder: Path) -> None:
    """That one file to where transformers looks for it (main process); the parts are removed."""
    (folder / MERGING / "model-00001-of-00001.safetensors").replace(folder / WEIGHTS)
    shutil.rmtree(folder / MERGING)


def read_tensors(checkpoint: Path, kind: str, like: Callable[[str], torch.Tensor | None]) -> Tensors:
    """The tensors whose names begin with `kind`, each as shared out as the one that `like` gives for its name.

    What it gives none for, or one of another shape, is whole. Raises what torch and safetensors raise.
    """
    reader = HuggingFaceStorageReader(str(checkpoint / SHARDS if (checkpoint / SHARDS).is_dir() else checkpoint))
    found: Tensors = {}
    for name, stored in reader.read_metadata().state_dict_metadata.items():
        if name.startswith(f"{kind}.") and isinstance(stored, TensorStorageMetadata):
            example, kept = like(name), stored.properties.dtype
            if example is None or example.shape != stored.size:
                found[name] = torch.zeros(stored.size, dtype=kept)
            else:
                found[name] = torch.zeros_like(example, dtype=kept, requires_grad=False)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # each rank reads by itself
        dcp.load(found, storage_reader=reader, no_dist=True)
    return found
