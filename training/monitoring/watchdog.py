"""What each rank is doing, readable from outside, and an end for a rank that hangs."""

import contextlib
import faulthandler
import os
import sys
import threading
import time
from pathlib import Path

HEARTBEATS = ".heartbeats"
LINE_BYTES = 60
BACKSTOP_SECONDS = 60


class Watchdog:
    """Writes what this rank does to `.heartbeats/rank-N` of the run folder, and ends a rank that makes no progress.

    The file has two lines: the training with the time, and the writing of checkpoints. It survives a kill. A beat takes
    microseconds. If no thread of the interpreter runs any more, `faulthandler` ends the rank, leaving its stacks.
    """

    def __init__(self, run: Path, rank: int, limit_seconds: float, compile_seconds: float = 0.0) -> None:
        """compile_seconds: how much longer the first step of a launch may take."""
        self.folder, self.rank, self.limit, self.compile_seconds = (
            run / HEARTBEATS,
            rank,
            limit_seconds,
            compile_seconds,
        )
        self._allowed, self._first_step = limit_seconds, -1
        self._deadline, self._step, self._doing = time.monotonic() + limit_seconds, 0, "starting"
        self._over = threading.Event()

    def __enter__(self) -> "Watchdog":
        self.folder.mkdir(parents=True, exist_ok=True)
        self._file = os.open(self.folder / f"rank-{self.rank}", os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o666)
        self._stacks = (self.folder / f"stacks-{self.rank}").open("w")  # opened now: later the disk may be full
        self.beat(0, "starting")
        self.note_writing("idle")
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()  # else it might arm faulthandler once more
        faulthandler.cancel_dump_traceback_later()
        os.close(self._file)
        self._stacks.close()

    def beat(self, step: int, doing: str) -> None:
        """The training has reached `step` and begins `doing`, one word."""
        if self._first_step < 0 and doing == "training":
            self._first_step = step
        self._allowed = self.limit + (self.compile_seconds if step == self._first_step else 0.0)
        self._deadline, self._step, self._doing = time.monotonic() + self._allowed, step, doing
        self._note(f"step {step} {doing} {time.time():.3f}", 0)

    def note_writing(self, doing: str) -> None:
        """What the thread that writes checkpoints is doing."""
        self._note(f"checkpoint {doing}", LINE_BYTES)

    def _note(self, text: str, place: int) -> None:
        with contextlib.suppress(OSError):  # a full disk: the file is for information only
            os.pwrite(self._file, text.ljust(LINE_BYTES - 1).encode() + b"\n", place)

    def _watch(self) -> None:
        while not self._over.wait(min(1.0, self.limit / 4)):
            left = self._deadline - time.monotonic()
            if left <= 0:
                self._give_up()
            faulthandler.dump_traceback_later(left + BACKSTOP_SECONDS, exit=True, file=self._stacks)

    def _give_up(self) -> None:
        try:
            print(
                f"{Path(sys.argv[0]).name}: error: rank {self.rank} has been at step {self._step}, {self._doing}, for "
                f"{self._allowed / 60:.3g} minutes, so it is ended (guards.hang_minutes). {self._stacks.name} holds its "
                "stacks. Continue from the last checkpoint with --checkpoint.resume auto",
                file=sys.stderr, flush=True,
            )  # fmt: skip
            faulthandler.dump_traceback(self._stacks, all_threads=True)
        finally:
            os._exit(1)
