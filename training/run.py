"""The apparatus of a run: its folder and state, what a person sees of it, stop requests, heartbeats, checkpoints."""

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DynamoBackend
from accelerate.utils.memory import should_reduce_batch_size

from training.data import TrainingData
from training.dry_run import find_fitting_micro_batch
from training.hardware import blend_peaks, peak_flops_per_second, peak_memory_bytes
from training.launch import describe_launch
from training.model import check_tokenizer
from training.monitoring.console import Clock, banner, times_due
from training.monitoring.guards import NO_TARGET, check_limits, write_bad_batch
from training.monitoring.hints import hint_on_loss, hints_on_data, hints_on_launch
from training.monitoring.stopping import StopAsked, StopRequests
from training.monitoring.tracking import RunTracker
from training.monitoring.watchdog import Watchdog
from training.optimization.optimizers import OPTIMIZERS
from training.optimization.schedule import warn_of_warmup
from training.parallel.sharding import full_tensor, is_sharded
from training.saving.checkpoint_writer import CheckpointWriter
from training.saving.folders import check_disk, check_shards, open_run, record_launch, try_disk
from training.saving.training_state import load_training_state
from training.stream_loader import describe_stream
from utils.checkpoints import TrainState, load_state
from utils.cli import UserError, at_exit
from utils.config import TrainConfig
from utils.data.loaders import end_workers
from utils.evaluation import Evaluation
from utils.files import short
from utils.model.build import count_parameters
from utils.pretrained import tokenizer_of

BATCHES_PER_POLL = 16  # of an evaluation on a GPU
COMPILE_SECONDS = 1800.0  # more for the first step of a launch that compiles, before it counts as hanging
END_REASONS = ("max_steps", "early_stopping")  # every other reason stops a run before its end


class Run:
    """One launch of a run. It owns neither model nor optimizer nor loaders, and every rank has one.

    `checkpoint` is the folder to resume from (None for a new run), `state` says where the run stands, and `saved_step`
    is the step of the newest checkpoint, and `first_step` the one where this launch began.
    """

    def __init__(self, accelerator: Accelerator, config: TrainConfig, data: TrainingData, processor: Any) -> None:
        """Open the run folder; `UserError` if it holds another run, is in use, or may not be resumed. `processor` is the
        tokenizer, or holds it."""
        self.accelerator, self.config, self.data, self.processor = accelerator, config, data, processor
        self.tokenizer = tokenizer_of(processor)
        self.folder = Path(config.output)
        self.checkpoint, self.notes = open_run(accelerator, config, data.key)
        if self.checkpoint is None:
            self.state = TrainState(dataset_key=data.key)
        else:
            check_tokenizer(self.checkpoint, self.tokenizer)
            self.state = load_state(self.checkpoint)
        self.first_step = self.saved_step = self.state.optimizer_step
        # Tokens, seconds of training and steps: when this launch began, after its first step, at the last line of the log.
        self._launched = (self.state.tokens_seen, self.state.train_seconds, self.first_step)
        self._warm = self._logged = self._launched
        self._clock = Clock()
        self._hinted = False  # about a loss that does not move

    def begin(
        self,
        model: Any,
        optimizer: Any,
        scheduler: Any,
        average: Any,
        about: tuple[list[str], int | None, float] | None,
    ) -> None:
        """Restore the checkpoint's training state, claim the folder, start everything that runs beside training.

        `about`: what `describe_objective` returns; None except on the main process. `UserError` if the disk
        cannot hold the checkpoints to come.
        """
        accelerator, config, data = self.accelerator, self.config, self.data
        at_exit.enter_context(self._explaining_memory())
        if self.checkpoint:
            load_training_state(self.checkpoint, accelerator, optimizer, scheduler, average)
        if is_sharded(accelerator):
            check_shards(self.folder, model)
        bytes_each = checkpoint_bytes(model, config)
        if accelerator.is_main_process:
            steps_left = data.max_steps - self.state.optimizer_step
            checkpoints, num_best = self.folder / "checkpoints", 1 if average is None else 2
            self.notes.append(check_disk(checkpoints, config.checkpoint, bytes_each, steps_left, num_best))
            self.notes += try_disk(checkpoints)
            record_launch(accelerator, config)  # all checks have passed; the folder is this run's
        self.stops = at_exit.enter_context(StopRequests(accelerator, self.folder, config.max_minutes, bytes_each))
        self.tracker = at_exit.enter_context(RunTracker(accelerator, config, self.state, data.max_steps))
        hang_seconds = 60 * config.guards.hang_minutes + 2 * self.stops.save_seconds  # ranks may wait for a save
        compiles = accelerator.state.dynamo_plugin.backend != DynamoBackend.NO
        self.watchdog = at_exit.enter_context(
            Watchdog(self.folder, accelerator.process_index, hang_seconds, COMPILE_SECONDS if compiles else 0.0)
        )
        self.writer = CheckpointWriter(
            accelerator, self.folder / "checkpoints", config.checkpoint, self.processor, warn=self.tracker.warn,
            note=self.watchdog.note_writing,
        )  # fmt: skip
        at_exit.callback(self.writer.close)
        at_exit.callback(end_workers)
        lines, self._step_flops, share = about or ([], None, 1.0)
        if accelerator.is_main_process and self._step_flops is not None:
            peak = peak_flops_per_second(accelerator.device, accelerator.mixed_precision)
            if share < 1:
                peak = blend_peaks(peak, peak_flops_per_second(accelerator.device, "bf16"), share)
            self._peak = peak * data.plan.num_processes
        launch = describe_launch(accelerator, data.plan)
        lines = [*launch, *lines, *data.describe(), f"output: {self.folder}"]
        self.tracker.say(*banner(lines))
        self.tracker.say(*self.notes)
        if accelerator.is_main_process:
            self.tracker.say(*hints_on_launch(accelerator), *hints_on_data(config, data))
        if warning := warn_of_warmup(config.schedule, data.max_steps):
            self.tracker.warn(warning)
        if self.checkpoint:
            self.tracker.say(f"resumed from {self.checkpoint} at step {self.state.optimizer_step}")
        gc.freeze()  # what lives as long as the run: else Python searches it in some steps, which takes a tenth of a second

    def beat(self, doing: str) -> None:
        """Tell the watchdog what begins now, in one word."""
        self._clock.turn(doing)
        self.watchdog.beat(self.state.optimizer_step + (doing in ("fetching", "training")), doing)

    @contextmanager
    def _explaining_memory(self) -> Iterator[None]:
        """A step that runs out of memory ends the run with one line: what it needs, and which micro-batch would fit."""
        try:
            yield
        except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
            out_of_memory = isinstance(error, MemoryError) or should_reduce_batch_size(error)
            if self._clock.doing != "training" or not out_of_memory:
                raise
            found = find_fitting_micro_batch(self.config, self.accelerator, self.data, self.tokenizer)
            raise UserError(
                f"step {self.state.optimizer_step + 1} ran out of memory: {found or short(error)}; "
                "to continue from the last checkpoint, add --checkpoint.resume auto"
            ) from error

    @contextmanager
    def looking(self, save: Callable[..., None]) -> Iterator[None]:
        """Around an evaluation and a sample (all ranks). A stop request ends only these. An error ends the run; the step is
        saved first, if it is not saved yet and the remaining ranks can do it."""
        if self.state.evaluation_due:
            self.beat("evaluating")
        try:
            yield
        except StopAsked:  # the resumed run evaluates instead
            pass
        except Exception as error:
            alone = self.data.train_rows is not None or self.accelerator.num_processes == 1  # a stream has many cursors
            if self.saved_step < self.state.optimizer_step and alone and self.writer.can_save():
                save(wait=False)
            if isinstance(error, torch.OutOfMemoryError | MemoryError):
                remedy = "a smaller evaluation.per_device_batch_size needs less memory"
                self.tracker.warn(f"the evaluation of step {self.state.optimizer_step} failed; {remedy}")
            raise

    def show_evaluation(self, done: int, total: int) -> None:
        """Between the batches of an evaluation: `done` of `total` are scored."""
        self.beat("evaluating")
        self.tracker.progress("evaluating", done, total)

    def poll(self, done: int, total: int) -> None:
        """`show_evaluation`; raises `StopAsked` on all ranks (which all call) if one is to stop. On a GPU it asks only once
        in a while, because asking waits for the device."""
        self.show_evaluation(done, total)
        if done % (1 if self.accelerator.device.type == "cpu" else BATCHES_PER_POLL) == 0:
            self.stops.poll()

    def sample(self, write: Callable[[], str | None]) -> None:
        """Append what `write` returns to the samples (all ranks call)."""
        self.beat("sampling")
        # Without torch.compile, which would compile the growing text again and again.
        with self.accelerator.autocast(), torch.compiler.set_stance("force_eager"):
            self.tracker.sample(write, self.state.optimizer_step)
        self.tracker.say(f"sampled in {self._clock.so_far():.1f} s; see {self.folder / 'samples.md'}")

    def log_evaluation(self, metrics: dict[str, float]) -> None:
        """Log what an evaluation, which has just ended, found, and how long it took."""
        self.tracker.log(metrics | {"perf/eval_seconds": self._clock.so_far()}, self.state.optimizer_step)

    def vote(self, loss: torch.Tensor, norm: torch.Tensor, num_targets: torch.Tensor) -> tuple[float, float, int]:
        """All-reduce: the loss summed over the ranks, the gradient norm, which all ranks share, and stop requests.

        The third number is `num_targets`, which all ranks know. It comes with the others, in a step's one wait."""
        count = num_targets.to("cpu", non_blocking=True)  # complete when the vote has waited for the device
        loss_sum, grad_norm = self.stops.vote(loss, full_tensor(norm) / self.accelerator.num_processes)
        return loss_sum, grad_norm, int(count)

    def skip(self, fault: str, micro_batches: list[dict[str, torch.Tensor]]) -> None:
        """Record an update that is not made, with its texts (all ranks call); `UserError` at the limits of `guards`.
        Batches without a target are no fault of the run: only the first is mentioned."""
        state, warn = self.state, self.tracker.warn
        if fault != NO_TARGET:
            write_bad_batch(self.accelerator, self.folder, state, micro_batches, self.tokenizer, fault, warn)
            check_limits(state, self.config.guards, fault)
            state.skipped += 1
            warn(f"step {state.optimizer_step + 1}: the update is skipped: {fault}")
        elif state.without_target == 1:
            warn(f"step {state.optimizer_step + 1}: {fault}, so it is skipped; summary.json counts such batches")
        if self.accelerator.scaler is not None:
            self.accelerator.scaler.update()  # else its next `unscale_` raises

    def count_overflow(self) -> bool:
        """Whether fp16's scaler skipped this update for an overflow; counts it. `UserError` if no scale is left."""
        if not self.accelerator.optimizer_step_was_skipped:
            return False
        self.state.skipped += 1
        if self.accelerator.scaler.get_scale() < 1:
            step = self.state.optimizer_step
            raise UserError(f"fp16 overflows at every scale after step {step}; try bf16 or a lower learning rate")
        return True

    def log_step(self, loss: float, targets: int, learning_rate: float, grad_norm: float, *, shown: bool) -> None:
        """Count a step; if it is to be `shown`, log its numbers. Loss and speed are means over the steps since the last such
        line. The speed leaves out the first step of a launch, which compiles and fills caches, unless it is the only one."""
        state = self.state
        state.interval_nats += loss * targets
        state.interval_targets += targets
        now = (state.tokens_seen, state.train_seconds, state.optimizer_step)
        self._warm = now if self._warm == self._launched else self._warm
        self.tracker.advance()
        if not shown:
            return
        tokens, seconds, step = self._logged if self._warm == now else max(self._logged, self._warm)
        step_seconds = (state.train_seconds - seconds) / (state.optimizer_step - step)
        figures = {
            "train/loss": state.interval_nats / state.interval_targets,
            "train/learning_rate": learning_rate, "train/grad_norm": grad_norm,
            "perf/tokens_per_second": (state.tokens_seen - tokens) / (state.train_seconds - seconds),
            "perf/peak_memory_gb": peak_memory_bytes(self.accelerator.device) / 1e9,
            "perf/train_seconds": state.train_seconds,
        }  # fmt: skip
        if self._step_flops is not None:
            figures["perf/mfu"] = self._step_flops / step_seconds / self._peak
        if self.data.num_rows is not None:
            figures["train/epoch"] = state.samples_seen / self.data.num_rows
        self.tracker.log(figures, state.optimizer_step, self._seconds_left())
        hint = hint_on_loss(self.config, state.optimizer_step, figures["train/loss"], len(self.tokenizer))
        if hint is not None and not self._hinted:
            self._hinted = True
            self.tracker.say(hint)
        state.interval_nats, state.interval_targets, self._logged = 0.0, 0, now

    def _seconds_left(self) -> float:
        """Until the end of the run. Steps, evaluations, samples and saves take as long as those of this launch so far; the
        first step counts only as long as it is the only one."""
        state, clock, config, last = self.state, self._clock, self.config, self.data.max_steps
        _, seconds, step = self._warm if self._warm[2] < state.optimizer_step else self._launched
        step_seconds = (state.train_seconds - seconds) / (state.optimizer_step - step)
        first = max(state.last_evaluated_step + 1, state.optimizer_step)
        evaluating = clock.mean("evaluating")
        if evaluating is None:
            evaluating = step_seconds * self.data.steps_per_evaluation
        saving = clock.seconds["saving"] / (state.optimizer_step - self.first_step)
        whole = 0.0 if self.data.sampled_rows is None else len(self.data.validation_rows) / self.data.rows_scored
        return (
            (last - state.optimizer_step) * (step_seconds + saving)
            + times_due(config.evaluation.every_steps, first, last) * evaluating
            + times_due(config.tracking.sample_every_steps, first, last) * (clock.mean("sampling") or 0.0)
            + whole * evaluating  # in `finish`
        )

    def save(self, model: Any, optimizer: Any, scheduler: Any, average: Any, *, wait: bool) -> None:
        """Save a checkpoint (all ranks call); with `wait`, until it is on the disk. Training pauses for a copy only.

        If this step is saved already, only the pointers to the best checkpoints move. If an evaluation is due, it waits
        too, but a save that fails is a warning.
        """
        self.beat("saving")
        is_new, self.saved_step = self.saved_step != self.state.optimizer_step, self.state.optimizer_step
        self.state.stream = self.data.stream_state()
        self.writer.save(self.state, model, optimizer, scheduler, average, wait=wait)
        if self.state.evaluation_due:
            self.writer.close()
        if is_new:
            self.tracker.log({"perf/save_pause_seconds": self.writer.pause_seconds}, self.saved_step)
        if warning := self.stops.time_for_save(self.writer.write_seconds):
            self.tracker.warn(warning)

    def finish(self, reason: str, evaluation: Evaluation | None, look: Callable[..., Evaluation], model: Any) -> None:
        """Wait for the last checkpoint, write summary and plot, say how the run ended and how to continue it.

        `look` scores the rows of a loader: all of the split, if this launch has not.
        """
        state, finished = self.state, reason in END_REASONS
        if finished and state.optimizer_step == self.first_step:
            self.tracker.say(f"nothing to do: the run had reached its end ({reason}) at step {state.optimizer_step}")
        num_bytes = self.data.scored_bytes
        if finished and (evaluation is None or self.data.sampled_rows is not None):
            self.beat("evaluating")
            try:
                evaluation = look(self.accelerator.prepare(self.data.validation_loader(whole=True)), self.poll)
                num_bytes = self.data.validation_bytes
                self.tracker.say(f"all validation documents: loss {evaluation.loss:.4f}")
            except StopAsked:  # the resumed run has no step to make, and evaluates
                finished, reason = False, self.stops.reason or reason
        self.beat("ending")
        self.writer.finish()
        bits = None if evaluation is None or num_bytes is None else evaluation.bits_per_byte(num_bytes)
        self.tracker.finish({
            "finished": finished, "reason": reason, "optimizer_step": state.optimizer_step,
            "parameters": count_parameters(model), "tokens_seen": state.tokens_seen, "skipped": state.skipped,
            "without_target": state.without_target,
            "eval_loss": evaluation and evaluation.loss, "perplexity": evaluation and evaluation.perplexity,
            "bits_per_byte": bits, "best_loss": state.best_loss, "best_step": state.best_step,
            "best_average_loss": state.best_average_loss, "best_average_step": state.best_average_step,
            "train_seconds": state.train_seconds, "tokens_per_second": state.tokens_seen / state.train_seconds,
        })  # fmt: skip
        if state.stream is not None:
            self.tracker.say(describe_stream(state.stream))
        if finished:
            best = "no loss was finite"
            if state.best_loss is not None:
                best = f"best loss {state.best_loss:.4f} at step {state.best_step}"
            if state.best_average_loss is not None:
                best += f", of the average {state.best_average_loss:.4f} at step {state.best_average_step}"
            self.tracker.say(f"finished ({reason}); {best}; see {self.folder}")
            output = f"exports/{self.folder.name}"
            self.tracker.say(f"next: python evaluate.py --model {self.folder}")
            self.tracker.say(f"next: python export.py --checkpoint {self.folder} --output {output}")
        else:
            remedy = "to continue, repeat the command with --checkpoint.resume auto"
            self.tracker.say(f"stopped ({reason}) at step {state.optimizer_step}, which is saved; {remedy}")
        # The main process may still be drawing the plot: until it is done, all ranks note signals and have a watchdog.
        self.accelerator.wait_for_everyone()


def checkpoint_bytes(model: Any, config: TrainConfig) -> int:
    """About how many bytes a checkpoint takes on the disk."""
    trainable = sum(tensor.nbytes for tensor in model.parameters() if tensor.requires_grad)
    weights = trainable if hasattr(model, "peft_config") else sum(tensor.nbytes for tensor in model.parameters())
    copies = OPTIMIZERS[config.optimizer.name].state_size + (config.optimizer.ema_decay is not None)
    return int(weights + copies * trainable)
