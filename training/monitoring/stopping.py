"""What may ask a run to stop before its end, and how all ranks come to agree on it."""

import contextlib
import os
import shlex
import shutil
import signal
import sys
import time
from pathlib import Path
from types import FrameType, TracebackType

import psutil
import torch
from accelerate import Accelerator

from training.launch_check import launcher_command
from utils.cli import LAUNCHER_PID

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)
# What to say of each, in the order of `StopRequests.flags`.
REASONS = (*(signum.name for signum in SIGNALS), "launcher_gone", "stop_file", "max_minutes")
STOP_FILE = "stop"
LOOK_SECONDS = 1.0  # between looks at the stop file, which may be on another machine
SLOW_DISK = 100e6  # bytes per second; until the first save tells
END_SECONDS = 5  # from the save to the exit: plot, trackers
# Torch's launcher kills its processes this long after it has told them to end.
LAUNCHER_SECONDS = int(os.environ.get("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "30"))


class StopAsked(Exception):
    """Raised by `StopRequests.poll`, on all ranks alike."""


class StopRequests:
    """Signals, a file `stop` in the run folder, a time limit, a launcher that has died.

    Each rank has one. A signal is only noted, however often it comes, so that what is being written is written to its
    end; `agree` tells all ranks at the same step boundary.

    Attributes:
        reason: one of `REASONS`, once the ranks have agreed to stop.
        longest_gap_seconds: longest time between two calls of `agree`, in which nothing could be asked.
    """

    def __init__(self, accelerator: Accelerator, run: Path, max_minutes: float | None, bytes_to_save: int) -> None:
        self.accelerator, self.stop_file = accelerator, run / STOP_FILE
        self.reason: str | None = None
        self.save_seconds = bytes_to_save / SLOW_DISK
        self.longest_gap_seconds = 0.0
        self._noted: set[int] = set()
        self._process, self._launcher = os.getpid(), launcher_command()
        self._deadline = (
            None
            if max_minutes is None
            else psutil.Process(LAUNCHER_PID if self._launcher else None).create_time() + 60 * max_minutes
        )
        self._next_look = self._last_time = 0.0
        self._stop_file_seen = self._warned = False

    def __enter__(self) -> "StopRequests":
        """From here on signals are noted; before, they end the process as they always do."""
        heeded = [
            signum for signum in SIGNALS if signal.getsignal(signum) is not signal.SIG_IGN
        ]  # nohup ignores SIGHUP
        self._before = {signum: signal.signal(signum, self._note) for signum in heeded}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.accelerator.is_main_process:
            with contextlib.suppress(OSError):  # obeyed, or too late: it is not for the next launch
                self.stop_file.unlink()
        for signum, handler in self._before.items():
            signal.signal(signum, handler)

    def _note(self, signum: int, frame: FrameType | None) -> None:
        if os.getpid() != self._process:  # a loader's worker, made by a fork: it ends when its parent does
            return
        if signum not in self._noted:
            self._noted.add(signum)
            with contextlib.suppress(OSError):  # `| tee` has been told to end, too
                os.write(2, f"{signal.Signals(signum).name}: saving after this step, then ending\n".encode())

    def flags(self) -> list[float]:
        """1.0 for each of `REASONS` that this rank knows of."""
        now = time.time()
        if self.accelerator.is_main_process and now >= self._next_look:
            self._next_look = now + LOOK_SECONDS
            self._stop_file_seen = self.stop_file.exists()
        launcher_gone = self._launcher is not None and os.getppid() != LAUNCHER_PID
        late = self._deadline is not None and self.accelerator.is_main_process and (
            now + 2 * self.longest_gap_seconds + 2 * self.save_seconds + END_SECONDS > self._deadline)  # fmt: skip
        found = [*(signum in self._noted for signum in SIGNALS), launcher_gone, self._stop_file_seen, late]
        return [float(flag) for flag in found]

    def agree(self, *figures: torch.Tensor) -> list[float]:
        """The sums of scalars over all ranks (which all call this); sets `reason` if one of them is asked to stop.

        One small reduction, which waits for the device.
        """
        now = time.perf_counter()
        self.longest_gap_seconds = max(self.longest_gap_seconds, now - (self._last_time or now))
        self._last_time = now
        device = self.accelerator.device
        votes = torch.tensor(self.flags(), dtype=torch.float32, device=device)
        # With parameters offloaded the norm of their gradients is in the host's memory.
        values = torch.cat([*(figure.to(device).float().reshape(1) for figure in figures), votes])
        sums = self.accelerator.reduce(values, "sum").tolist()
        asked = [reason for reason, votes in zip(REASONS, sums[len(figures) :], strict=True) if votes]
        if asked and self.reason is None:
            self.reason = asked[0]
        return sums[: len(figures)]

    def poll(self) -> None:
        """Raise `StopAsked` if a rank is asked to stop (all ranks call); for what takes long and can be left out."""
        self.agree()
        if self.reason is not None:
            raise StopAsked

    def time_for_save(self, save_seconds: float) -> str | None:
        """To be told how long the latest save took; the line to warn with if torch's launcher would kill the next one."""
        self.save_seconds = save_seconds or self.save_seconds
        seconds = self.longest_gap_seconds + 2 * self.save_seconds
        if self._warned or "TORCHELASTIC_RUN_ID" not in os.environ or seconds < LAUNCHER_SECONDS:
            return None
        self._warned = True
        return (
            f"a step, a save that is under way and another take {seconds:.0f} s; after SIGTERM the launcher kills its processes in {LAUNCHER_SECONDS} s, "
            f"which loses the steps since the last checkpoint. `touch {self.stop_file}` stops without a limit; "
            "--max_minutes stops in time"
        )

    def how_to_go_on(self) -> str:
        """The command of this launch, with which it goes on."""
        words = self._launcher or [sys.executable, *sys.argv]
        # A script with a line `#!python` stands behind its interpreter in the list; a person calls it by its name.
        words = words[1:] if os.path.basename(words[1]) in ("accelerate", "accelerate-launch", "torchrun") else words
        name = os.path.basename(words[0])
        joined = shlex.join([name if shutil.which(name) == shutil.which(words[0]) else words[0], *words[1:]])
        return joined if "--checkpoint.resume auto" in joined else f"{joined} --checkpoint.resume auto"
