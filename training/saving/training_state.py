"""State of optimizer, scheduler, gradient scaler and average: into a checkpoint and back."""

import math
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch.distributed.tensor import DTensor
from torch.optim.lr_scheduler import LambdaLR

from training.optimization.ema import WeightAverage
from utils.checkpoint_tensors import Tensors, read_average, read_tensors
from utils.cli import UserError
from utils.files import read_json, short

# State of Adafactor and 8-bit AdamW that is kept by row, column or block, and so has another shape than its parameter.
OTHER_SHAPES = ("row_var", "col_var", "qmap", "absmax")


def split_tensors(value: Any) -> tuple[Any, Tensors]:
    """`value` as JSON with {"tensor": name} in the place of each tensor, and the tensors by name, a shared one once."""
    tensors: Tensors = {}
    names: dict[int, str] = {}

    def split(item: Any, name: str) -> Any:
        if isinstance(item, torch.Tensor):
            name = names.setdefault(id(item), name)
            tensors[name] = item.detach() if isinstance(item, DTensor) else item.detach().contiguous()
            return {"tensor": name}
        if isinstance(item, dict):
            return {str(key): split(part, f"{name}.{key}") for key, part in item.items()}
        if isinstance(item, list | tuple):
            return [split(part, f"{name}.{index}") for index, part in enumerate(item)]
        return item

    return split(value, "optimizer"), tensors


def join_tensors(value: Any, tensors: Tensors) -> Any:
    """The inverse of `split_tensors`, but keys that are digits become numbers, and tuples become lists."""
    if isinstance(value, dict):
        if value.keys() == {"tensor"}:
            return tensors[value["tensor"]]
        return {int(key) if key.isdecimal() else key: join_tensors(item, tensors) for key, item in value.items()}
    return [join_tensors(item, tensors) for item in value] if isinstance(value, list) else value


def load_training_state(
    checkpoint: Path, accelerator: Accelerator, optimizer: torch.optim.Optimizer, scheduler: LambdaLR,
    average: WeightAverage | None,
) -> None:  # fmt: skip
    """Restore optimizer, scheduler, scaler and average, after `accelerator.prepare`. Every rank reads the same files.

    Options of the optimizer (weight decay, betas) are those of this launch, only learned state comes from the
    checkpoint. `UserError` if the files do not belong to this model and optimizer.
    """
    record = read_json(checkpoint / "state.json")
    try:
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        # A tensor's name is optimizer.state.NUMBER.…, with parameters numbered in the order of the groups.
        tensors = read_tensors(checkpoint, "optimizer", lambda name: parameters[int(name.split(".")[2])])
        for name, tensor in tensors.items():
            if not (torch.is_floating_point(tensor) or tensor.dtype == torch.uint8):
                raise ValueError(f"{name} holds {tensor.dtype}")
        saved = join_tensors(record["optimizer"], tensors)
        sizes = [[len(group["params"]) for group in each] for each in (saved["param_groups"], optimizer.param_groups)]
        if sizes[0] != sizes[1]:
            raise ValueError("it has other groups of parameters")
        optimizer.load_state_dict(optimizer.state_dict() | {"state": saved["state"]})
        check_optimizer_state(optimizer)
        step = int(record["state"]["optimizer_step"])
        scheduler.load_state_dict(scheduler.state_dict() | {"last_epoch": step, "_step_count": step + 1})
        if accelerator.scaler is not None and "scaler" in record:
            accelerator.scaler.load_state_dict(record["scaler"])
        if average is not None:
            average.load_state_dict(read_average(checkpoint, average.state_dict()))
    except UserError:
        raise
    except Exception as error:  # each of these reads, and fails, in its own way
        why = f"{type(error).__name__}: {short(error)}"
        raise UserError(f"{checkpoint} is not a checkpoint of this model and optimizer: {why}") from error
    # The learning rate is a function of the step, so a run that is to go further follows its new schedule at once.
    # (`load_state_dict` above has replaced the groups.)
    for group, base, factor in zip(optimizer.param_groups, scheduler.base_lrs, scheduler.lr_lambdas, strict=True):
        group["lr"] = base * factor(scheduler.last_epoch)
    scheduler._last_lr = [group["lr"] for group in optimizer.param_groups]


def check_optimizer_state(optimizer: torch.optim.Optimizer) -> None:
    """`ValueError` if a state belongs to no parameter, or has another shape than its parameter."""
    parameters = {parameter for group in optimizer.param_groups for parameter in group["params"]}
    for parameter, state in optimizer.state.items():
        if parameter not in parameters:
            raise ValueError("it has the state of a parameter that the model lacks")
        for name, value in state.items():
            if not isinstance(value, torch.Tensor) or value.ndim == 0 < parameter.ndim:  # a step, or a product of rates
                if not 0 <= float(value) < math.inf:
                    raise ValueError(f"{name} {value}")
            elif not name.startswith(OTHER_SHAPES) and value.shape != parameter.shape:
                raise ValueError(f"{name} of shape {tuple(value.shape)} for a parameter of {tuple(parameter.shape)}")
