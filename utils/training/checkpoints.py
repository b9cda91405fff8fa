"""Checkpoints: folders that exist only when they are complete, and are believed only when their hashes agree.

    checkpoints/step-00000100/
        model.safetensors, config.json, tokenizer.json, …   opens with transformers' from_pretrained; with
                                                            adapters: they alone, and base.json
        optimizer.pt                                        the optimizer's state (read back with weights_only)
        average.safetensors                                 the average of the weights, where the run keeps one
    state.json                                          TrainState, scheduler, and the gradient scaler of fp16
        manifest.json                                       size and SHA-256 of every file above
    checkpoints/best, checkpoints/last                      links to two of them

There is no random state to store: train.py seeds every step from (seed, samples seen, rank).
"""

import hashlib
import json
import os
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch.optim.lr_scheduler import LambdaLR
from transformers import PreTrainedModel

from utils.cli import UserError
from utils.training.adapters import has_adapters, save_base
from utils.training.ema import WeightAverage

PREFIX = "step-"
TEMPORARY_PREFIX = ".tmp-"


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
    skipped: int = 0
    """Updates that the fp16 scaler refused: they consume data, but no step of the schedule."""
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


def save_checkpoint(
    accelerator: Accelerator, folder: Path, state: TrainState, model: PreTrainedModel, tokenizer: Any,
    optimizer: torch.optim.Optimizer, scheduler: LambdaLR, average: WeightAverage | None, keep_last: int,
) -> None:  # fmt: skip
    """Write `folder/step-N` atomically, move the links, then remove what is no longer needed (all ranks call this).

    The main process writes; the others wait. Raises `UserError` if the disk refuses; what was saved before stays.
    """
    target = folder / f"{PREFIX}{state.optimizer_step:08d}"
    if accelerator.is_main_process:
        temporary = folder / f"{TEMPORARY_PREFIX}{target.name}"
        try:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
            model.save_pretrained(temporary)
            if has_adapters(temporary):
                save_base(model, temporary)
            tokenizer.save_pretrained(temporary)
            torch.save(optimizer.state_dict(), temporary / "optimizer.pt")
            if average is not None:
                save_file(average.state_dict(), temporary / "average.safetensors")
            record = {"state": asdict(state), "scheduler": scheduler.state_dict()}
            if accelerator.scaler is not None:
                record["scaler"] = accelerator.scaler.state_dict()
            (temporary / "state.json").write_text(json.dumps(record, indent=2), encoding="utf-8")
            (temporary / "manifest.json").write_text(json.dumps(_describe_files(temporary), indent=2), encoding="utf-8")
            for path in [*temporary.rglob("*"), temporary]:
                _flush_to_disk(path)
            if target.exists():  # one that a resume passed over as damaged
                shutil.rmtree(target)
            temporary.rename(target)
            _flush_to_disk(folder)
            _link(folder / "last", target.name)
            best = f"{PREFIX}{state.best_step or 0:08d}"
            if (folder / best).exists():
                _link(folder / "best", best)
        except (OSError, RuntimeError, SafetensorError) as error:  # how torch and safetensors report a full disk
            shutil.rmtree(temporary, ignore_errors=True)
            raise UserError(f"cannot write checkpoint {target}: {error}; earlier checkpoints are untouched") from error
        _remove_old(folder, keep_last)
    accelerator.wait_for_everyone()


def load_training_state(
    checkpoint: Path, accelerator: Accelerator, optimizer: torch.optim.Optimizer, scheduler: LambdaLR,
    average: WeightAverage | None,
) -> None:  # fmt: skip
    """Restore optimizer, scheduler, scaler and average, after `accelerator.prepare` (every rank reads the same files)."""
    optimizer.load_state_dict(torch.load(checkpoint / "optimizer.pt", map_location="cpu", weights_only=True))
    record = json.loads((checkpoint / "state.json").read_text(encoding="utf-8"))
    scheduler.load_state_dict(record["scheduler"])
    # The learning rate is a function of the step: a resumed run that is to go further follows its new schedule at once.
    for group, base, factor in zip(optimizer.param_groups, scheduler.base_lrs, scheduler.lr_lambdas, strict=True):
        group["lr"] = base * factor(scheduler.last_epoch)
    scheduler._last_lr = [group["lr"] for group in optimizer.param_groups]
    if accelerator.scaler is not None and "scaler" in record:
        accelerator.scaler.load_state_dict(record["scaler"])
    if average is not None:
        average.load_state_dict(load_file(checkpoint / "average.safetensors"))


@torch.no_grad()
def load_average(checkpoint: Path, model: PreTrainedModel) -> None:
    """Put the moving average of the weights in the place of the weights; `UserError` if the run kept none."""
    path = checkpoint / "average.safetensors"
    if not path.is_file():
        raise UserError(f"{checkpoint}: the run kept no average of its weights; train with --optimizer.ema_decay")
    parameters = dict(model.named_parameters())
    for name, values in load_file(path).items():
        parameters[name].copy_(values)


def load_state(checkpoint: Path) -> TrainState:
    return TrainState(**json.loads((checkpoint / "state.json").read_text(encoding="utf-8"))["state"])


def find_newest_valid(folder: Path) -> tuple[Path | None, list[str]]:
    """The newest checkpoint whose files agree with their hashes, and one line per newer one that was passed over."""
    problems: list[str] = []
    for checkpoint in sorted(folder.glob(PREFIX + "*"), reverse=True):
        problem = find_problem(checkpoint)
        if problem is None:
            return checkpoint, problems
        problems.append(f"{checkpoint} is not valid and is passed over: {problem}")
    return None, problems


def find_problem(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint folder, or None; reads every byte of it."""
    try:
        manifest = json.loads((checkpoint / "manifest.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return "manifest.json is missing or unreadable"
    for name, expected in manifest.items():
        path = checkpoint / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != expected["bytes"]:
            return f"{name} has {path.stat().st_size} bytes in place of {expected['bytes']}"
        if _hash(path) != expected["sha256"]:
            return f"{name} has changed since it was saved"
    return None


def resolve_checkpoint(path: str | Path) -> Path:
    """A run folder (its best checkpoint, else its last) or a checkpoint folder → a verified checkpoint folder."""
    path = Path(path)
    if not path.exists():
        raise UserError(f"{path}: no such run or checkpoint folder")
    if (path / "checkpoints").is_dir():
        links = [path / "checkpoints" / name for name in ("best", "last")]
        path = next((link for link in links if link.exists()), path / "checkpoints" / "last")
    if not (path / "state.json").is_file():
        raise UserError(f"{path}: not a checkpoint folder (it has no state.json)")
    problem = find_problem(path)
    if problem:
        raise UserError(f"{path}: {problem}")
    return path.resolve()


def _describe_files(folder: Path) -> dict[str, dict[str, Any]]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): {"bytes": path.stat().st_size, "sha256": _hash(path)} for path in files}


def _hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _flush_to_disk(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _link(link: Path, target: str) -> None:
    """Point `link` at its sibling `target` in one step."""
    temporary = link.with_name(f"{TEMPORARY_PREFIX}{link.name}")
    temporary.unlink(missing_ok=True)
    temporary.symlink_to(target)
    temporary.replace(link)


def _remove_old(folder: Path, keep_last: int) -> None:
    """Remove all but the newest `keep_last` and the best checkpoint, and what a killed save has left."""
    kept = {(folder / name).resolve() for name in ("best", "last")}
    kept |= {path.resolve() for path in sorted(folder.glob(PREFIX + "*"))[-keep_last:]}
    leftovers = [path for path in folder.glob(f"{TEMPORARY_PREFIX}{PREFIX}*") if path.is_dir()]
    for path in [*folder.glob(PREFIX + "*"), *leftovers]:
        if path.resolve() not in kept:
            shutil.rmtree(path, ignore_errors=True)
