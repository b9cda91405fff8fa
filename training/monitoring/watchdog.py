"""Where each rank stands, also for who looks from outside, and an end for a rank that hangs."""

import contextlib
import faulthandler
import os
import sys
import threading
import time
from pathlib import Path
from types import TracebackType

HEARTBEATS = ".heartbeats"
LINE_BYTES = 60
HANG_EXIT_CODE = 1
BACKSTOP_SECONDS = 60


class Watchdog:
    """Notes what this rank does, in `.heartbeats/rank-N` of the run folder, and ends it if that stays the same too long.

    The file has two lines, of the training, with the time, and of the writing of checkpoints; it outlives a kill. A note
    costs some microseconds. A rank whose interpreter stands still, so that no thread of it runs, is ended by
    `faulthandler`, without a word but with its stacks.
    """

    def __init__(self, run: Path, rank: int, num_ranks: int, limit_seconds: float) -> None:
        self.folder, self.rank, self.num_ranks, self.limit = run / HEARTBEATS, rank, num_ranks, limit_seconds
        self._deadline, self._step, self._doing = time.monotonic() + self.limit, 0, "starting"
        self._over = threading.Event()

    def __enter__(self) -> "Watchdog":
        self.folder.mkdir(parents=True, exist_ok=True)
        self._file = os.open(self.folder / f"rank-{self.rank}", os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o644)
        self._stacks = (self.folder / f"stacks-{self.rank}").open("w")  # now: when it is needed, it may be too late
        self.beat(0, "starting")
        self.note_writing("idle")
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over.set()
        self._thread.join()  # or it might set the backstop once more
        faulthandler.cancel_dump_traceback_later()
        os.close(self._file)
        self._stacks.close()

    def beat(self, step: int, doing: str) -> None:
        """The training has come to `step`, and begins `doing`: a word."""
        self._deadline, self._step, self._doing = time.monotonic() + self.limit, step, doing
        self._note(f"step {step} {doing} {time.time():.3f}", 0)

    def note_writing(self, doing: str) -> None:
        """What the writing of checkpoints does, beside the training."""
        self._note(f"checkpoint {doing}", LINE_BYTES)

    def _note(self, text: str, place: int) -> None:
        with contextlib.suppress(OSError):  # a full disk: it is for information only
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
                f"{Path(sys.argv[0]).name}: error: rank {self.rank} has come no further than step {self._step}, "
                f"{self._doing}, for {self.limit / 60:.3g} minutes{self._first_to_stop()}; ending it. Its stacks are in "
                f"{self._stacks.name}. Go on from the last checkpoint with --checkpoint.resume auto; guards.hang_minutes is "
                "how long is too long",
                file=sys.stderr, flush=True,
            )  # fmt: skip
            faulthandler.dump_traceback(self._stacks, all_threads=True)
        finally:
            os._exit(HANG_EXIT_CODE)

    def _first_to_stop(self) -> str:
        """The rank that has been silent for longest: the others may only be waiting for it."""
        beats: list[tuple[float, int, str]] = []
        for rank in range(self.num_ranks):
            with contextlib.suppress(OSError, ValueError, IndexError):  # not there: on another machine
                _, step, doing, second = (self.folder / f"rank-{rank}").read_text().split()[:4]
                beats.append((float(second), rank, f"step {step} {doing}"))
        if not beats or min(beats)[1] == self.rank:
            return ""
        return f" (the first to fall silent was rank {min(beats)[1]}: {min(beats)[2]})"
