"""What a checkpoint holds, and how it is read back; training/saving/checkpoint_writer.py writes it.

    checkpoints/step-00000100/
        model.safetensors, config.json, tokenizer.json, …   opens with transformers' from_pretrained; with
                                                            adapters: they alone, and base.json
        optimizer.safetensors                               the tensors of the optimizer's state
        average.safetensors                                 the average of the weights, where the run keeps one
        optimizer/, average/                                under FSDP in place of these two: each rank's part of them
        state.json                                          TrainState, scheduler, the rest of the optimizer's state,
                                                            and the gradient scaler of fp16
        manifest.json                                       size and SHA-256 of every file above

There is no random state to store: train.py seeds every step from (seed, samples seen, rank). Nothing is pickled.

    python -m utils.checkpoints list runs/demo      what a run has; verify: and whether it is intact
"""

import math
import shutil
import sys
import time
from dataclasses import dataclass, field, fields
from pathlib import Path
from types import UnionType
from typing import Any, get_args, get_origin

import torch
from accelerate import Accelerator
from torch.distributed.tensor import DTensor
from torch.optim.lr_scheduler import LambdaLR
from transformers import PreTrainedModel

from training.optimization.ema import WeightAverage
from training.saving.shards import Tensors, read_tensors
from utils.checkpoint_folders import LINKS, find_problem, list_checkpoints, step_of
from utils.cli import UserError, exit_with
from utils.config import CheckpointConfig, OptimizerConfig
from utils.files import read_json, readable

# What Adafactor and AdamW in 8 bits keep by row, column or block.
SIZED_OTHERWISE = ("row_var", "col_var", "qmap", "absmax")


@dataclass
class TrainState:
    """Where a run stands. Restored whole."""

    dataset_key: str
    """Identity of the dataset, from its manifest."""
    optimizer_step: int = 0
    """Updates made; drives the schedule."""
    samples_seen: int = 0
    """Rows consumed by all ranks; drives the data order."""
    tokens_seen: int = 0
    """Target tokens consumed by all ranks."""
    looked_step: int = 0
    """The step up to which evaluations and samples are done: a stop may have come before those of optimizer_step."""
    skipped: int = 0
    """Updates that were not made: they consume data, but no step of the schedule."""
    nonfinite: int = 0
    """Those of them for a loss or gradient that was not finite (but for fp16's overflows)."""
    spikes: int = 0
    """Those of them for a spike of loss or gradient."""
    recent: list[list[float]] = field(default_factory=list)
    """Loss and gradient norm of the latest updates, where spikes are looked for: the window of guards.spike_window."""
    train_seconds: float = 0.0
    """Time spent in training steps, over all launches of the run."""
    best_loss: float | None = None
    """Lowest evaluation loss, in nats per token."""
    best_step: int | None = None
    """Where it was reached; the checkpoint that export.py takes."""
    patience_loss: float | None = None
    """The loss that the next evaluation has to beat by early_stopping_min_delta, in nats per token."""
    evaluations_without_improvement: int = 0
    stream: dict[str, Any] | None = None
    """Where each lane of a streamed dataset stands (`StreamLoader.state`); None where the data is stored."""


def take_tensors(value: Any) -> tuple[Any, Tensors]:
    """`value` as JSON, with {"tensor": name} in the place of each tensor, and the tensors by name, a shared one once."""
    tensors: Tensors = {}
    names: dict[int, str] = {}

    def take(item: Any, name: str) -> Any:
        if isinstance(item, torch.Tensor):
            name = names.setdefault(id(item), name)
            tensors[name] = item.detach() if isinstance(item, DTensor) else item.detach().contiguous()
            return {"tensor": name}
        if isinstance(item, dict):
            return {str(key): take(part, f"{name}.{key}") for key, part in item.items()}
        if isinstance(item, list | tuple):
            return [take(part, f"{name}.{index}") for index, part in enumerate(item)]
        return item

    return take(value, "optimizer"), tensors


def put_tensors(value: Any, tensors: Tensors) -> Any:
    """What `take_tensors` was given; keys that are numbers have become numbers again, tuples lists."""
    if isinstance(value, dict):
        if value.keys() == {"tensor"}:
            return tensors[value["tensor"]]
        return {int(key) if key.isdecimal() else key: put_tensors(item, tensors) for key, item in value.items()}
    return [put_tensors(item, tensors) for item in value] if isinstance(value, list) else value


def load_training_state(
    checkpoint: Path, accelerator: Accelerator, optimizer: torch.optim.Optimizer, scheduler: LambdaLR,
    average: WeightAverage | None,
) -> None:  # fmt: skip
    """Restore optimizer, scheduler, scaler and average, after `accelerator.prepare` (every rank reads the same files).

    `UserError` if they are not what this model and optimizer save.
    """
    record = read_json(checkpoint / "state.json")
    try:
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        # Named optimizer.state.NUMBER.…, in the order of the groups.
        tensors = read_tensors(checkpoint, "optimizer", lambda name: parameters[int(name.split(".")[2])])
        if odd := [
            name
            for name, tensor in tensors.items()
            if not (torch.is_floating_point(tensor) or tensor.dtype == torch.uint8)
        ]:
            raise ValueError(f"{odd[0]} holds {tensors[odd[0]].dtype}")
        saved = put_tensors(record["optimizer"], tensors)
        if [len(group["params"]) for group in saved["param_groups"]] != [
            len(g["params"]) for g in optimizer.param_groups
        ]:
            raise ValueError("it has other groups of parameters")
        # The options are the configuration's, which is the same; only what has been learned is the checkpoint's.
        optimizer.load_state_dict(optimizer.state_dict() | {"state": saved["state"]})
        check_optimizer_state(optimizer)
        step = scheduler.state_dict() | {"last_epoch": int(record["state"]["optimizer_step"])}
        scheduler.load_state_dict(step | {"_step_count": step["last_epoch"] + 1})
        if accelerator.scaler is not None and "scaler" in record:
            accelerator.scaler.load_state_dict(record["scaler"])
        if average is not None:
            average.load_state_dict(read_average(checkpoint, average.state_dict()))
    except UserError:
        raise
    except Exception as error:  # each of these reads, and fails, in its own way
        raise UserError(f"{checkpoint} is not a checkpoint of this model and optimizer: {_short(error)}") from error
    # The learning rate is a function of the step: a resumed run that is to go further follows its new schedule at once.
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
            if name == "step":
                if not 0 <= float(value) < math.inf:
                    raise ValueError(f"step {value}")
            elif not name.startswith(SIZED_OTHERWISE) and value.shape != parameter.shape:
                raise ValueError(f"{name} of shape {tuple(value.shape)} for a parameter of {tuple(parameter.shape)}")


def read_average(checkpoint: Path, expected: Tensors) -> Tensors:
    """The average of the weights, which must have the names and shapes of `expected`; as shared out as these."""
    if not any((checkpoint / name).exists() for name in ("average", "average.safetensors")):
        raise UserError(f"{checkpoint}: the run kept no average of its weights; train with --optimizer.ema_decay")
    try:
        tensors = read_tensors(checkpoint, "average", expected.get)
    except Exception as error:  # torch and safetensors fail in many ways
        raise UserError(f"{checkpoint}: the average of the weights cannot be read: {_short(error)}") from None
    for name in sorted(tensors.keys() | expected.keys()):
        shapes = [
            tuple(group[name].shape) if name in group and torch.is_floating_point(group[name]) else "none"
            for group in (tensors, expected)
        ]
        if shapes[0] != shapes[1]:
            raise UserError(
                f"{checkpoint}: in the average {name} has the shape {shapes[0]}, this model's is {shapes[1]}"
            )
    return tensors


@torch.no_grad()
def load_average(checkpoint: Path, model: PreTrainedModel) -> None:
    """Put the moving average of the weights in the place of the weights; `UserError` if the run kept none."""
    parameters: Tensors = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    for name, values in read_average(checkpoint, parameters).items():
        parameters[name].copy_(values)


def load_state(checkpoint: Path) -> TrainState:
    path = checkpoint / "state.json"
    try:
        state = TrainState(**read_json(path)["state"])
    except (KeyError, TypeError) as error:
        raise UserError(f"{path} is not of this version of train.py: {_short(error)}") from error
    for item in fields(TrainState):
        value = getattr(state, item.name)
        if not _fits(value, item.type):
            raise UserError(f"{path}: {item.name} is {str(value)[:40]!r}, which train.py never writes")
    return state


def _fits(value: Any, kind: Any) -> bool:
    """Whether a value read from JSON is of a field's type; numbers that are counted are not negative."""
    if isinstance(kind, UnionType):
        return any(_fits(value, part) for part in get_args(kind))
    if get_origin(kind) is list:
        return isinstance(value, list) and all(_fits(item, get_args(kind)[0]) for item in value)
    if kind is int:
        return type(value) is int and 0 <= value < 1 << 63
    return type(value) in (int, float) if kind is float else isinstance(value, get_origin(kind) or kind)


def checkpoint_bytes(model: PreTrainedModel, config: OptimizerConfig) -> int:
    """About how many bytes a checkpoint takes on the disk."""
    trainable = sum(tensor.nbytes for tensor in model.parameters() if tensor.requires_grad)
    weights = trainable if hasattr(model, "peft_config") else sum(tensor.nbytes for tensor in model.parameters())
    state = {"adamw": 2.0, "muon": 2.0, "sgd": 1.0, "adamw_8bit": 0.5, "adafactor": 0.0}[config.name]
    return int(weights + (state + (config.ema_decay is not None)) * trainable)


def check_disk(folder: Path, config: CheckpointConfig, bytes_each: int, steps_left: int) -> str:
    """A line on the space that the checkpoints to come will take; `UserError` if the disk has not as much.

    There will be the newest, the best, the archived ones, and for a moment the one that is being written.
    """
    archived = steps_left // config.archive_every_steps if config.archive_every_steps else 0
    number = config.keep_last + 2 + archived
    archive = config.archive_every_steps
    going = [path for path in list_checkpoints(folder) if not archive or step_of(path) % archive]
    there = sum(file.stat().st_size for path in going for file in path.rglob("*") if file.is_file())
    free = shutil.disk_usage(next(path for path in (folder, *folder.parents) if path.exists())).free
    if number * bytes_each > free + there:
        raise UserError(
            f"{folder} will need {readable(number * bytes_each)} for {number} checkpoints of {readable(bytes_each)}, and "
            f"the disk has {readable(free + there)} for them; free some, choose another --output, or lower "
            "checkpoint.keep_last"
        )
    return (
        f"checkpoints: about {readable(bytes_each)} each, at most {number} at a time; {readable(free)} of disk are free"
    )


def _short(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


def main(arguments: list[str]) -> int:
    """`list RUN` or `verify RUN`: a line per checkpoint; 1 if one of them is not valid."""
    if len(arguments) != 2 or arguments[0] not in ("list", "verify"):
        raise UserError("usage: python -m utils.checkpoints list|verify RUN")
    command, run = arguments[0], Path(arguments[1])
    folder = run / "checkpoints" if (run / "checkpoints").is_dir() else run
    found = list_checkpoints(folder)
    if not found:
        raise UserError(f"{run}: {'no checkpoints here' if run.exists() else 'does not exist'}")
    linked = {link: (folder / link).resolve().name for link in LINKS}
    damaged = 0
    for checkpoint in found:
        files = [path.stat() for path in checkpoint.rglob("*") if path.is_file()]
        saved = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(max((file.st_mtime for file in files), default=0)))
        marks = " ".join(link for link, name in linked.items() if name == checkpoint.name)
        size = readable(sum(file.st_size for file in files))
        problem = find_problem(checkpoint) if command == "verify" else None
        damaged += problem is not None
        verdict = "" if command == "list" else f"  {'NOT VALID: ' + problem if problem else 'valid'}"
        print(f"{checkpoint.name}  {saved}  {size:>9}  {marks:<9}{verdict}".rstrip())
    return 1 if damaged else 0


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except UserError as error:
        exit_with(error)
