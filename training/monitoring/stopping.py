"""What ends a run: its last step, early stopping, or a request, on which all ranks agree by a vote."""

import contextlib
import math
import os
import signal
import time
from pathlib import Path
from types import FrameType

import psutil
import torch
from accelerate import Accelerator

from training.options import STOP_FILE
from utils.checkpoints import TrainState
from utils.cli import LAUNCHER_PID
from utils.config import EvaluationConfig, TrainConfig
from utils.evaluation import Evaluation

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)
# The reasons to stop, in the order of `StopRequests._flags`.
REASONS = (*(signum.name for signum in SIGNALS), "launcher_gone", "stop_file", "max_minutes")
LOOK_SECONDS = 1.0  # between looks at the stop file, which may be on a network disk
SLOW_DISK = 100e6  # bytes per second, assumed until the first save is measured
END_SECONDS = 5  # from the last save to the exit: plot, trackers
# torch's launcher kills its processes this long after it asked them to end.
LAUNCHER_SECONDS = int(os.environ.get("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "30"))


class StopAsked(Exception):
    """Raised by `StopRequests.poll`, on all ranks alike."""


class StopRequests:
    """Signals, a file `stop` in the run folder, a time limit, a launcher that has died.

    Each rank has one. A signal is only noted, however often it comes, so that a write in progress is completed. `vote`
    tells all ranks at the same step boundary; then `reason` is one of `REASONS`. No rank can react between two votes,
    `longest_gap_seconds` at most. `save_seconds` is how long a save takes, an estimate until the first one.
    """

    def __init__(self, accelerator: Accelerator, run: Path, max_minutes: float | None, bytes_to_save: int) -> None:
        self.accelerator, self.stop_file = accelerator, run / STOP_FILE
        self.reason: str | None = None
        self.save_seconds = bytes_to_save / SLOW_DISK
        self.longest_gap_seconds = 0.0
        self._noted: set[int] = set()
        self._process = os.getpid()
        # accelerate and torchrun set these; without a launcher, a parent shell may go and the run goes on.
        self._launched = any(name in os.environ for name in ("TORCHELASTIC_RUN_ID", "ACCELERATE_MIXED_PRECISION"))
        self._deadline = psutil.Process().create_time() + 60 * (math.inf if max_minutes is None else max_minutes)
        self._last_time, self._next_look = 0.0, 0.0
        self._warned = self._stop_file_seen = False

    def __enter__(self) -> "StopRequests":
        """Note signals from here on; before, they end the process. A signal that nohup ignores stays ignored."""
        noted = [signum for signum in SIGNALS if signal.getsignal(signum) is not signal.SIG_IGN]
        self._before = {signum: signal.signal(signum, self._note) for signum in noted}
        return self

    def __exit__(self, *_: object) -> None:
        if self.accelerator.is_main_process:
            with contextlib.suppress(OSError):  # it must not stop the next launch
                self.stop_file.unlink()
        for signum, handler in self._before.items():
            signal.signal(signum, handler)

    def _note(self, signum: int, frame: FrameType | None) -> None:
        if os.getpid() != self._process:  # a loader's worker, made by a fork: it ends when its parent does
            return
        if signum not in self._noted:
            self._noted.add(signum)
            with contextlib.suppress(OSError):  # `| tee` has got the signal, too, and may be gone
                os.write(2, f"{signal.Signals(signum).name}: saving after this step, then ending\n".encode())

    def _flags(self) -> list[bool]:
        """Which of `REASONS` this rank knows of."""
        is_main = self.accelerator.is_main_process
        launcher_gone = self._launched and os.getppid() != LAUNCHER_PID
        end = time.time() + 2 * self.longest_gap_seconds + 2 * self.save_seconds + END_SECONDS
        if is_main and time.time() >= self._next_look:
            self._next_look = time.time() + LOOK_SECONDS
            self._stop_file_seen = self.stop_file.exists()
        late = is_main and end > self._deadline
        return [*(signum in self._noted for signum in SIGNALS), launcher_gone, self._stop_file_seen, late]

    def vote(self, *figures: torch.Tensor) -> list[float]:
        """All-reduce: the sums of scalars over all ranks, and of the flags. All ranks call it; it waits for the device.

        Sets `reason` if any rank is asked to stop.
        """
        now = time.perf_counter()
        self.longest_gap_seconds = max(self.longest_gap_seconds, now - (self._last_time or now))
        self._last_time = now
        device = self.accelerator.device
        # From pinned memory, else the host would wait for the device here and again for the sums.
        flags = torch.tensor(self._flags(), dtype=torch.float32, pin_memory=device.type == "cuda")
        flags = flags.to(device, non_blocking=True)
        # With offloaded parameters the gradient norm is in the host's memory.
        values = torch.cat([*(figure.to(device).float().reshape(1) for figure in figures), flags])
        sums = self.accelerator.reduce(values, "sum").tolist()
        asked = (reason for reason, votes in zip(REASONS, sums[len(figures) :], strict=True) if votes)
        self.reason = self.reason or next(asked, None)
        return sums[: len(figures)]

    def poll(self) -> None:
        """Raise `StopAsked` on all ranks (which all call it) if one is asked to stop."""
        self.vote()
        if self.reason is not None:
            raise StopAsked

    def time_for_save(self, save_seconds: float) -> str | None:
        """Note how long the latest save took; return a warning if torch's launcher would kill the next one."""
        self.save_seconds = save_seconds or self.save_seconds
        self._last_time = 0.0  # the save itself is no gap between two votes
        seconds = self.longest_gap_seconds + 2 * self.save_seconds
        if self._warned or "TORCHELASTIC_RUN_ID" not in os.environ or seconds < LAUNCHER_SECONDS:
            return None
        self._warned = True
        return (
            f"a step and two saves take {seconds:.0f} s, but after SIGTERM the launcher kills its processes in "
            f"{LAUNCHER_SECONDS} s, which loses the steps since the last checkpoint. `touch {self.stop_file}` stops "
            "without a limit, --max_minutes stops in time"
        )


def update_best(state: TrainState, config: EvaluationConfig, trained: Evaluation, average: Evaluation | None) -> bool:
    """Whether the loss of the trained weights, or of their average, is the lowest so far. Counts the evaluations in
    which the one that early stopping follows improves by too little."""
    improved = _is_lower(trained.loss, state.best_loss)
    if improved:
        state.best_loss, state.best_step = trained.loss, state.optimizer_step
    if average is not None and _is_lower(average.loss, state.best_average_loss):
        improved, state.best_average_loss, state.best_average_step = True, average.loss, state.optimizer_step
    followed = average if average is not None and config.early_stopping_weights == "average" else trained
    goal = None if state.patience_loss is None else state.patience_loss - config.early_stopping_min_delta
    if _is_lower(followed.loss, goal):
        state.patience_loss, state.evaluations_without_improvement = followed.loss, 0
    else:
        state.evaluations_without_improvement += 1
    return improved


def _is_lower(loss: float, best: float | None) -> bool:
    """NaN and infinity never are."""
    return loss < (math.inf if best is None or math.isnan(best) else best)


def end_of_run(state: TrainState, config: TrainConfig, max_steps: int) -> str | None:
    """ "max_steps" or "early_stopping" once the run has reached its end and its last model is evaluated, else None."""
    if state.last_evaluated_step < state.optimizer_step:
        return None
    if state.optimizer_step >= max_steps:
        return "max_steps"
    patience = config.evaluation.early_stopping_patience
    return "early_stopping" if patience is not None and state.evaluations_without_improvement >= patience else None
