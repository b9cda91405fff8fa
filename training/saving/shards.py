"""The tensors of a checkpoint on the disk: whole, or in the part of each rank. All is safetensors; nothing is pickled.

A part knows its place in the whole tensor (torch.distributed.checkpoint), so any number of ranks reads what any other has
written, and each only what it holds.
"""

import shutil
import uuid
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from accelerate.utils import broadcast_object_list, gather_object
from safetensors.torch import load_file
from torch import nn
from torch.distributed.checkpoint import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.tensor import DTensor, distribute_tensor

from utils.checkpoint_folders import new_checkpoint
from utils.cli import UserError
from utils.pretrained import WEIGHTS

Tensors = dict[str, torch.Tensor]
MERGING = "weights"


def check_shards(run: Path, model: nn.Module) -> None:
    """`UserError` on all ranks, which all call, if parts of this model cannot be saved in this run's folder."""
    for name, value in model.state_dict().items():
        if value.ndim == 0 or not value.is_floating_point():
            raise UserError(f"with FSDP a model with {name} cannot be saved: torch merges parts of tensors only that have "
                            "dimensions and floating-point numbers; use DDP")  # fmt: skip
    token, is_main = [f".seen-{uuid.uuid4().hex}"], dist.get_rank() == 0
    if is_main:
        (run / token[0]).touch()
    broadcast_object_list(token)
    seen = gather_object([(run / token[0]).exists()])
    if is_main:
        (run / token[0]).unlink()
    if not all(seen):
        raise UserError(f"{run} is not on a disk that all machines share: with FSDP each rank writes its part of a checkpoint "
                        "there; choose another --output")  # fmt: skip


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
    """Each rank of `group` its part, in a file of its own in `folder`; in memory it takes twice as much beside the tensors."""
    writer = HuggingFaceStorageWriter(str(folder), save_distributed=True)
    dcp.save(tensors, storage_writer=writer, process_group=group)


def save_weights(weights: Tensors, folder: Path, group: dist.ProcessGroup) -> None:
    """Each rank its part, which the main process then copies into one file, without a whole model in anyone's memory."""
    writer = HuggingFaceStorageWriter(str(folder / MERGING), save_distributed=True, enable_consolidation=True)
    dcp.save(weights, storage_writer=writer, process_group=group)
    if dist.get_rank() == 0:
        shutil.rmtree(folder / MERGING / "sharded", ignore_errors=True)  # they would take the disk twice


def take_weights(expected: Tensors, folder: Path) -> None:
    """That one file to where transformers looks for it (main process); `OSError` unless it is complete."""
    check_complete(folder / MERGING, expected)
    (folder / MERGING / "model-00001-of-00001.safetensors").replace(folder / WEIGHTS)
    shutil.rmtree(folder / MERGING)  # with an index of the one file


def check_complete(folder: Path, expected: Tensors) -> None:
    """`OSError` unless the files of a folder hold all of each tensor: torch merges and reads what it finds of it."""
    stored = _stored(folder) if expected else {}
    for name, tensor in expected.items():
        if name not in stored or stored[name].size != tensor.shape:
            raise OSError(f"{folder}: a part of {name} is missing")


def read_tensors(checkpoint: Path, kind: str, like: Callable[[str], torch.Tensor | None]) -> Tensors:
    """The tensors of `optimizer` or `average`, each as shared out as the one that `like` gives for its name.

    What it gives none for, or one of another shape, is whole. Raises what torch and safetensors raise, `OSError` if a
    part is missing.
    """
    if not (checkpoint / kind).is_dir():
        # Out of the mapped file, as in `load_model`.
        whole = load_file(checkpoint / f"{kind}.safetensors")
        return {name: _share_like(tensor.clone(), like(name)) for name, tensor in whole.items()}
    found: Tensors = {}
    for name, stored in _stored(checkpoint / kind).items():
        example, kept = like(name), stored.properties.dtype
        if example is None or example.shape != stored.size:
            found[name] = torch.zeros(stored.size, dtype=kept)
        else:
            found[name] = torch.zeros_like(example, dtype=kept, requires_grad=False)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # each rank reads by itself
        dcp.load(found, storage_reader=HuggingFaceStorageReader(str(checkpoint / kind)), no_dist=True)
    return found


def _stored(folder: Path) -> Mapping[str, TensorStorageMetadata]:
    """What the files of a folder say of each tensor; `OSError` if their parts do not make up a whole."""
    found: dict[str, TensorStorageMetadata] = {}
    for name, stored in HuggingFaceStorageReader(str(folder)).read_metadata().state_dict_metadata.items():
        assert isinstance(stored, TensorStorageMetadata)  # of safetensors all are
        if sum(part.sizes.numel() for part in stored.chunks) != stored.size.numel():
            raise OSError(f"{folder}: a part of {name} is missing")
        found[name] = stored
    return found


def _share_like(tensor: torch.Tensor, example: torch.Tensor | None) -> torch.Tensor:
    """This rank's part of a tensor that every rank has whole, if `example` is shared out; others and scalars as they are."""
    if not isinstance(example, DTensor) or tensor.shape != example.shape:
        return tensor
    tensor = tensor.to(example.device_mesh.device_type)
    return distribute_tensor(tensor, example.device_mesh, example.placements, src_data_rank=None)
