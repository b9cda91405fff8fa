"""Writing checkpoints while training continues."""

import json
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from safetensors.torch import save_file
from torch.optim.lr_scheduler import LambdaLR
from transformers import PreTrainedModel
from transformers.utils import logging as transformers_logging

from training.optimization.ema import WeightAverage
from training.parallel.sharding import is_sharded, meeting_group
from training.saving import folders
from training.saving.training_state import split_tensors
from utils.checkpoint_tensors import Tensors
from utils.checkpoints import TrainState, checkpoint_name, find_problem
from utils.cli import UserError
from utils.config import CheckpointConfig
from utils.model.adapters import has_adapters, save_base


class CheckpointWriter:
    """Writes the checkpoints of a run: training pauses for a copy to memory, a thread writes the copy to the disk.

    Every rank has one. Only the main process writes, except under FSDP, where each rank writes its shard. The buffers
    of the copy are kept for the next save; they take as much host memory as the process writes to the disk (under FSDP
    more for a moment, see `save_shards`). A save that fails leaves the earlier checkpoints untouched. `warn` reports it
    and the next save tries again; if the caller waits for the save, it raises instead.

    Attributes:
        pause_seconds, write_seconds: how long training paused for the latest save, and how long it took in all.
    """

    def __init__(
        self, accelerator: Accelerator, folder: Path, config: CheckpointConfig, processor: Any, *,
        warn: Callable[[str], None], note: Callable[[str], None],
    ) -> None:  # fmt: skip
        """`processor` is the tokenizer, or holds it. `note` gets what the thread is doing: writing, rotating or idle."""
        self.accelerator, self.folder, self.config, self.warn, self.note = accelerator, folder, config, warn, note
        self.pause_seconds = self.write_seconds = 0.0
        self._thread: threading.Thread | None = None
        self._error: Exception | None = None
        self._saved_step: int | None = None
        self._buffers: Tensors = {}
        self._group: dist.ProcessGroup | None = None
        if is_sharded(accelerator):
            from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions  # 1.7 s to import

            # The writing threads need a group of their own, so that their messages do not mix with the training's. They
            # wait for the merged weights, as long as the disk takes; if a rank dies, the launcher ends all.
            self._group = dist.new_group(backend="gloo", timeout=timedelta(days=1))
            self._meeting = meeting_group()
            on_gpu = accelerator.device.type != "cpu"
            self._stager = DefaultStager(StagingOptions(
                use_pinned_memory=on_gpu, use_shared_memory=False, use_async_staging=False, use_non_blocking_copy=on_gpu
            ))  # fmt: skip
        transformers_logging.disable_progress_bar()  # of each `save_pretrained`
        self._processor_files: dict[Path, bytes] = {}
        if accelerator.is_main_process:
            # Read once: it does not change, and may be in use while a checkpoint is written.
            with tempfile.TemporaryDirectory() as temporary:
                processor.save_pretrained(temporary)
                files = [path for path in Path(temporary).rglob("*") if path.is_file()]
                self._processor_files = {path.relative_to(temporary): path.read_bytes() for path in files}

    def save(
        self, state: TrainState, model: PreTrainedModel, optimizer: torch.optim.Optimizer, scheduler: LambdaLR,
        average: WeightAverage | None, *, wait: bool,
    ) -> None:  # fmt: skip
        """Save step N of `state` (all ranks call); with `wait`, also call `finish`. Without `asynchronous`, call `close`.

        If there is an intact checkpoint of that step, only the pointers move: it was saved before its evaluation.
        """
        started = time.perf_counter()
        self.close()
        target = self.folder / checkpoint_name(state.optimizer_step)
        step, is_main = state.optimizer_step, self.accelerator.is_main_process
        needed = [is_main and step != self._saved_step and (not target.exists() or find_problem(target) is not None)]
        if self._group is not None:
            broadcast_object_list(needed)
        write: Callable[[], None] | None = None
        if needed[0]:
            # Copy from the GPU even for a blocking save: the buffer exists, and safetensors would make another.
            beside = self.config.asynchronous and not wait
            snapshot = beside or self.accelerator.device.type != "cpu"
            write = self._prepare(state, model, optimizer, scheduler, average, snapshot=snapshot)
        if write is not None or is_main:
            steps = {"last": step, "best": state.best_step, "best_average": state.best_average_step}
            self._thread = threading.Thread(target=self._write, args=(write, steps, started), name="checkpoint")
            self._thread.start()
        if wait:
            self.finish()
        elif not self.config.asynchronous:
            self.close()
        self.pause_seconds = time.perf_counter() - started

    def finish(self) -> None:
        """Wait until everything is on the disk (all ranks call); `UserError` if the latest save failed."""
        failure = [self._join()]
        broadcast_object_list(failure)
        if failure[0]:
            raise UserError(f"cannot write the last checkpoint in {self.folder}: {failure[0]}")

    def close(self) -> None:
        """Wait for a save in progress; its failure is a warning."""
        if failure := self._join():
            self.warn(f"a checkpoint could not be written: {failure}, and the next save tries again")

    def can_save(self) -> bool:
        """Whether a save can be made now although ranks may be gone: by the main process, under FSDP by all or none."""
        if self._group is None:
            return self.accelerator.is_main_process
        try:
            dist.barrier(self._meeting)
        except RuntimeError:
            return False
        return True

    def _join(self) -> str | None:
        """Wait for the thread; why it failed."""
        if self._thread is not None:
            self._thread.join()
        error, self._thread, self._error = self._error, None, None
        return None if error is None else f"{error}; the earlier ones are untouched"

    def _write(self, write: Callable[[], None] | None, steps: dict[str, int | None], started: float) -> None:
        """In the thread: write the checkpoint unless it exists, move the pointers, remove old checkpoints."""
        try:
            self.note("writing")
            if write is not None:
                write()
                self.write_seconds, self._saved_step = time.perf_counter() - started, steps["last"]
            if self.accelerator.is_main_process:
                for name in folders.point(self.folder, steps):
                    self.warn(f"the checkpoint of step {steps[name]} is not there, so `{name}` does not point to it")
                self.note("rotating")
                folders.remove_old_checkpoints(self.folder, self.config.keep_last, self.config.archive_every_steps)
        except Exception as error:  # a full disk comes as OSError, RuntimeError or SafetensorError
            if self.accelerator.is_main_process:  # it fails too if another rank does
                self._error = error
        finally:
            self.note("idle")

    def _prepare(
        self, state: TrainState, model: Any, optimizer: torch.optim.Optimizer, scheduler: LambdaLR,
        average: WeightAverage | None, *, snapshot: bool,
    ) -> Callable[[], None]:  # fmt: skip
        """A function that writes the checkpoint, with `snapshot` from a copy of everything that training changes."""
        weights = model.state_dict(keep_vars=True)
        if hasattr(model, "peft_config"):  # only the adapters are saved
            weights = {name: tensor for name, tensor in weights.items() if tensor.requires_grad}
        owners: dict[int, str] = {}  # the first name of a tensor that has two
        shared = {name: owners.setdefault(id(tensor), name) for name, tensor in weights.items()}
        owned = {name: weights[name].detach() for name in owners.values()}
        optimizer_record, tensors = split_tensors(optimizer.state_dict())
        parts: Any = {"model": owned, "optimizer": tensors, "average": average.state_dict() if average else {}}
        if (group := self._group) is not None:
            parts = self._stager.stage(parts)
        elif snapshot:
            for part, live in parts.items():
                parts[part] = {name: self._copy(tensor, f"{part}.{name}") for name, tensor in live.items()}
            if torch.accelerator.is_available():
                torch.accelerator.synchronize()  # copies to pinned memory are asynchronous
        owned, tensors, averages = parts["model"], parts["optimizer"], parts["average"]
        record = {"state": asdict(state), "scheduler": scheduler.state_dict(), "optimizer": optimizer_record}
        if self.accelerator.scaler is not None:
            record["scaler"] = self.accelerator.scaler.state_dict()
        text, step = json.dumps(record, indent=2), state.optimizer_step

        def write_rest(temporary: Path) -> None:
            for name, content in self._processor_files.items():
                (temporary / name).parent.mkdir(parents=True, exist_ok=True)
                (temporary / name).write_bytes(content)
            (temporary / "state.json").write_text(text, encoding="utf-8")

        def write() -> None:
            with folders.new_folder(self.folder / checkpoint_name(step)) as temporary:
                model.save_pretrained(temporary, state_dict={name: owned[owner] for name, owner in shared.items()})
                if has_adapters(temporary):
                    save_base(model, temporary)
                save_file(tensors, temporary / "optimizer.safetensors")
                if averages:
                    save_file(averages, temporary / "average.safetensors")
                write_rest(temporary)

        if group is None:
            return write

        def write_together() -> None:
            with folders.shared_checkpoint(self.folder, step, group) as temporary:
                folders.save_shards(owned, temporary / "weights", group, merge=True)
                folders.save_shards(tensors, temporary / "optimizer", group)
                if averages:
                    folders.save_shards(averages, temporary / "average", group)
                # No rank waits for another from here on, so the main process may raise alone.
                if self.accelerator.is_main_process:
                    folders.check_complete(temporary / "optimizer", tensors)
                    folders.check_complete(temporary / "average", averages)
                    model.save_pretrained(temporary, state_dict={}, save_original_format=False)
                    folders.take_weights(owned, temporary / "weights")
                    write_rest(temporary)

        return write_together

    def _copy(self, tensor: torch.Tensor, name: str) -> torch.Tensor:
        """A copy in this process's memory, in the same buffer each time; from a GPU it is asynchronous."""
        buffer = self._buffers.get(name)
        if buffer is None or buffer.shape != tensor.shape or buffer.dtype != tensor.dtype:
            buffer = self._buffers[name] = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
        return buffer.copy_(tensor, non_blocking=True)
