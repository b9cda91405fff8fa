"""Reading the tensors of a checkpoint: from one file, or from shards that any number of FSDP ranks wrote. A shard knows
its place in the whole tensor (torch.distributed.checkpoint), so each rank reads only the part that it holds."""

import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import PreTrainedModel

from utils.cli import UserError
from utils.files import short

Tensors = dict[str, torch.Tensor]


def read_tensors(checkpoint: Path, group: str, like: Callable[[str], torch.Tensor | None]) -> Tensors:
    """The tensors of `optimizer` or `average`, each sharded like the tensor that `like` returns for its name, or whole
    if that is None or has another shape. Raises what torch and safetensors raise, and `OSError` without a shard."""
    if not (checkpoint / group).is_dir():
        whole = load_file(checkpoint / f"{group}.safetensors")
        # `clone` moves a tensor out of the mapped file, as in `load_model`.
        return {name: _shard_like(tensor.clone(), like(name)) for name, tensor in whole.items()}
    # Here, because the import takes 1.7 s and only checkpoints of FSDP need it.
    import torch.distributed.checkpoint as dcp

    found: Tensors = {}
    for name, stored in read_shard_metadata(checkpoint / group).items():
        example = like(name)
        if example is None or example.shape != stored.size:
            example = torch.empty(stored.size)
        found[name] = torch.zeros_like(example, dtype=stored.properties.dtype, requires_grad=False)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # each rank reads by itself
        dcp.load(found, storage_reader=dcp.HuggingFaceStorageReader(str(checkpoint / group)), no_dist=True)
    return found


def read_shard_metadata(folder: Path) -> Mapping[str, Any]:
    """Tensor name → torch's TensorStorageMetadata; `OSError` if the shards of a tensor do not add up to all of it."""
    from torch.distributed.checkpoint import HuggingFaceStorageReader

    found = HuggingFaceStorageReader(str(folder)).read_metadata().state_dict_metadata
    for name, stored in found.items():
        if sum(part.sizes.numel() for part in stored.chunks) != stored.size.numel():  # type: ignore[union-attr,misc]
            raise OSError(f"{folder}: a shard of {name} is missing")
    return found


def _shard_like(tensor: torch.Tensor, example: torch.Tensor | None) -> torch.Tensor:
    """This rank's shard of `tensor`, which every rank has read whole, if `example` is sharded; else `tensor`."""
    if not isinstance(example, DTensor) or tensor.shape != example.shape:
        return tensor
    tensor = tensor.to(example.device_mesh.device_type)
    return distribute_tensor(tensor, example.device_mesh, example.placements, src_data_rank=None)


def read_average(checkpoint: Path, expected: Tensors) -> Tensors:
    """The moving average of the weights, with the names, shapes and sharding of `expected`; `UserError` otherwise."""
    if not any((checkpoint / name).exists() for name in ("average", "average.safetensors")):
        raise UserError(f"{checkpoint}: the run kept no average of its weights; train with --optimizer.ema_decay")
    try:
        tensors = read_tensors(checkpoint, "average", expected.get)
    except Exception as error:  # torch and safetensors fail in many ways
        raise UserError(f"{checkpoint}: the average of the weights cannot be read: {short(error)}") from None
    for name in sorted(tensors.keys() | expected.keys()):
        pair = [group.get(name) for group in (tensors, expected)]
        found, wanted = (
            tuple(part.shape) if part is not None and part.is_floating_point() else "none" for part in pair
        )
        if found != wanted:
            raise UserError(f"{checkpoint}: {name} of the average has the shape {found}, this model's is {wanted}")
    return tensors


@torch.no_grad()
def load_average(checkpoint: Path, model: PreTrainedModel) -> None:
    """Replace the weights of `model` by their moving average; `UserError` if the run kept none."""
    parameters: Tensors = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    for name, values in read_average(checkpoint, parameters).items():
        parameters[name].copy_(values)
