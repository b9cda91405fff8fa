"""Trainings in processes of their own that a test watches, signals and kills."""

import contextlib
import hashlib
import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
from conftest import PATIENCE, ROOT, SMALL, environment, flags, start

from training.monitoring.watchdog import HEARTBEATS
from utils.checkpoints import find_problem, list_checkpoints


def command(output: Path, dataset: Path, *, name: str = "train.py", **options: object) -> list[str]:
    """A call of the small model's training; option names have `__` for the dot."""
    changed = {option.replace("__", "."): value for option, value in options.items()}
    return [name, *flags(SMALL | {"output": output, "data.dataset": dataset} | changed)]


class Training:
    """A training that runs beside the test, with what it prints in a file; its processes are gone when it is closed.

    Args:
        arguments: a script and its options, forked; or the command of a launcher, which is a fresh process.
        processes: of the script, as ranks without a launcher.
    """

    def __init__(
        self, arguments: list[str], output: Path, *, processes: int = 1, log: Path | None = None, **extra: str
    ) -> None:
        self.output, self.started = output, time.monotonic()
        self.log = log or output.with_name(f"{output.name}-{time.monotonic_ns()}.log")
        self.launched = not arguments[0].endswith(".py")
        self.processes: list[Any]
        with self.log.open("a") as file:  # ranks write in turns
            if self.launched:
                self.processes = [subprocess.Popen(
                    arguments, env=environment() | extra, stdout=file, stderr=subprocess.STDOUT,
                    start_new_session=True,
                )]  # fmt: skip
            else:
                self.processes = start(arguments, processes, stdout=file, stderr=file, **extra)
        self.process = self.processes[0]
        self.seen: list[psutil.Process] = [psutil.Process(process.pid) for process in self.processes]

    @property
    def ranks(self) -> list[psutil.Process]:
        """The processes that train, by rank."""
        if not self.launched:
            return self.seen[: len(self.processes)]
        found = [child for child in self.seen[0].children() if "train" in " ".join(child.cmdline())]
        return sorted(found, key=lambda process: int(process.environ().get("RANK", 0)))

    def has_ended(self) -> bool:
        return any(process.poll() is not None for process in self.processes)

    def text(self) -> str:
        return self.log.read_text()

    def wait_for(self, condition: Callable[[], object]) -> None:
        """Until `condition()` holds; fails if the training ends or takes too long."""
        while not condition():
            assert not self.has_ended(), f"it has ended:\n{self.text()[-3000:]}"
            assert time.monotonic() - self.started < PATIENCE, self.text()[-3000:]
            time.sleep(0.002)
        self.look()

    def look(self) -> None:
        """Note all processes that it has started so far."""
        for process in self.seen[: len(self.processes)]:
            with contextlib.suppress(psutil.NoSuchProcess):
                self.seen += process.children(recursive=True)

    def wait_for_step(self, step: int) -> None:
        """Until the metrics of a step are logged (by every run of the small model, for each step)."""
        path = self.output / "metrics.jsonl"
        self.wait_for(lambda: path.exists() and path.read_text().count('"train/loss"') >= step)

    def wait_for_heartbeat(self, words: str, rank: int = 0) -> None:
        """Until a rank begins what these words are part of, with next to no pause between looks."""
        deadline = time.monotonic() + PATIENCE
        while words not in heartbeat(self.output, rank):
            assert not self.has_ended() and time.monotonic() < deadline, self.text()[-3000:]
            time.sleep(0.0002)

    def kill(self) -> None:
        """SIGKILL for the launcher and all ranks; their workers are not asked either."""
        self.look()
        for process in self.seen:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        self.end()

    def end(self, seconds: float = PATIENCE) -> int:
        """Wait until it and what it has started have ended; the exit code of what was called, or of the first rank to fail."""
        codes = [process.wait(timeout=seconds) for process in self.processes]
        left = [process for process in self.seen[len(self.processes) :] if process.is_running()]
        _, alive = psutil.wait_procs(left, timeout=seconds)
        assert not [process for process in alive if process.status() != psutil.STATUS_ZOMBIE], self.text()[-3000:]
        return next((code for code in codes if code), 0)


@contextlib.contextmanager
def training(arguments: list[str], output: Path, **options: Any) -> Iterator[Training]:
    started = Training(arguments, output, **options)
    try:
        yield started
    finally:
        if any(process.poll() is None for process in started.processes) or any(
            process.is_running() for process in started.seen[len(started.processes) :]
        ):
            started.kill()


@contextlib.contextmanager
def changed_copy(*changes: tuple[str, str], name: str) -> Iterator[str]:
    """A copy of train.py, with some lines changed, as a user would; its name. It lies where tests run, beside `utils`."""
    text = (ROOT / "train.py").read_text()
    for old, new in changes:
        assert text.count(old) == 1, old
        text = text.replace(old, new)
    copy = Path(f"my_train_{name}.py")
    copy.write_text(text)
    try:
        yield copy.name
    finally:
        copy.unlink()


def heartbeat(output: Path, rank: int = 0) -> str:
    """What a rank does, or was doing when it was killed, on two lines."""
    try:
        return (output / HEARTBEATS / f"rank-{rank}").read_text()
    except FileNotFoundError:
        return ""


def kill_at(step: int, arguments: list[str], output: Path, processes: int = 1) -> None:
    """Start a training and kill -9 all of it once `step` is logged."""
    with training(arguments, output, processes=processes) as started:
        started.wait_for_step(step)
        started.kill()
    assert not (output / "summary.json").exists()


def weights(output: Path) -> str:
    """Identity of the last checkpoint's weights and optimizer state."""
    names = ("model.safetensors", "optimizer.safetensors")
    return " ".join(hashlib.sha256((output / "checkpoints" / "last" / name).read_bytes()).hexdigest() for name in names)


def summary(output: Path) -> dict:
    return json.loads((output / "summary.json").read_text())


def state(output: Path, checkpoint: str = "last") -> dict:
    return json.loads((output / "checkpoints" / checkpoint / "state.json").read_text())["state"]


def invalid_checkpoints(output: Path) -> list[str]:
    found = {path.name: find_problem(path) for path in list_checkpoints(output / "checkpoints")}
    return [f"{name}: {problem}" for name, problem in found.items() if problem]


def send(process: psutil.Process, signum: signal.Signals) -> None:
    os.kill(process.pid, signum)
