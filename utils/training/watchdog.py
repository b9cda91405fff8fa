"""Where each rank stands, also for who looks from outside, and an end for a rank that hangs."""

import faulthandler
import os
import sys
import threading
import time
from pathlib import Path
from types import TracebackType

HEARTBEATS = ".heartbeats"
LINE_BYTES = 40
HANG_EXIT_CODE = 1


class Watchdog:
    """Notes what this rank does, in `.heartbeats/rank-N` of the run folder, and ends it if that stays the same too long.

    The file has two lines, of the training and of the writing of checkpoints; it outlives a kill. A note costs some
    microseconds.
    """

    def __init__(self, run: Path, rank: int, num_ranks: int, hang_minutes: float) -> None:
        self.run, self.rank, self.num_ranks, self.limit = run, rank, num_ranks, 60 * hang_minutes
        self._deadline, self._step, self._doing = time.monotonic() + self.limit, 0, "starting"
        self._over = threading.Event()

    def __enter__(self) -> "Watchdog":
        folder = self.run / HEARTBEATS
        folder.mkdir(parents=True, exist_ok=True)
        self._file = os.open(folder / f"rank-{self.rank}", os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o644)
        self.beat(0, "starting")
        self.note_writing("idle")
        threading.Thread(target=self._watch, name="watchdog", daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over.set()
        os.close(self._file)

    def beat(self, step: int, doing: str, seconds: float = 0.0) -> None:
        """The training has come to `step`, and begins `doing`: a word. It may take `seconds` longer than all else."""
        self._deadline, self._step, self._doing = time.monotonic() + self.limit + seconds, step, doing
        os.pwrite(self._file, f"step {step} {doing}".ljust(LINE_BYTES - 1).encode() + b"\n", 0)

    def note_writing(self, doing: str) -> None:
        """What the writing of checkpoints does, beside the training."""
        if not self._over.is_set():
            os.pwrite(self._file, f"checkpoint {doing}".ljust(LINE_BYTES - 1).encode() + b"\n", LINE_BYTES)

    def _watch(self) -> None:
        while not self._over.wait(min(1.0, self.limit / 4)):
            if time.monotonic() > self._deadline:
                self._give_up()

    def _give_up(self) -> None:
        stacks = self.run / f"hang-rank-{self.rank}.txt"
        with stacks.open("w", encoding="utf-8") as file:
            faulthandler.dump_traceback(file, all_threads=True)
        print(
            f"{Path(sys.argv[0]).name}: error: rank {self.rank} has come no further than step {self._step}, {self._doing}, for "
            f"{self.limit / 60:.3g} minutes{self._first_to_stop()}; ending it. Its stacks are in {stacks}. Go on from the last "
            "checkpoint with --checkpoint.resume auto; guards.hang_minutes is how long is too long",
            file=sys.stderr, flush=True,
        )  # fmt: skip
        os._exit(HANG_EXIT_CODE)

    def _first_to_stop(self) -> str:
        """The rank that has been silent for longest: the others may only be waiting for it."""
        files = [self.run / HEARTBEATS / f"rank-{rank}" for rank in range(self.num_ranks)]
        times = {path: path.stat().st_mtime for path in files if path.exists()}  # not there: on another machine
        first = min(times, key=lambda path: times[path])
        if first.name == f"rank-{self.rank}":
            return ""
        return f" (the first to fall silent was {first.name}: {first.read_text().splitlines()[0].strip()})"
