"""Trainings in processes of their own that a test watches, signals and kills."""

import contextlib
import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
from conftest import ROOT, SMALL, environment, flags, launcher

from utils.training.checkpoint_folders import find_problem, list_checkpoints
from utils.training.watchdog import HEARTBEATS

PATIENCE = 240.0


def command(output: Path, dataset: Path, processes: int = 1, *, name: str = "train.py", **options: object) -> list[str]:
    """A call of the small model's training; option names have `__` for the dot."""
    changed = {option.replace("__", "."): value for option, value in options.items()}
    return [*launcher(processes), name, *flags(SMALL | {"output": output, "data.dataset": dataset} | changed)]


class Training:
    """A training that runs beside the test, with what it prints in a file; its processes are gone when it is closed."""

    def __init__(self, arguments: list[str], output: Path, log: Path | None = None, **extra: str) -> None:
        self.output, self.started = output, time.monotonic()
        self.log = log or output.with_name(f"{output.name}-{time.monotonic_ns()}.log")
        with self.log.open("w") as file:
            self.process = subprocess.Popen(
                arguments, cwd=ROOT, env=environment() | extra, stdout=file, stderr=subprocess.STDOUT,
                start_new_session=True,
            )  # fmt: skip
        self.seen: list[psutil.Process] = [psutil.Process(self.process.pid)]

    @property
    def ranks(self) -> list[psutil.Process]:
        """The processes that train, by rank."""
        words = " ".join(self.seen[0].cmdline())
        launched = "accelerate.commands.launch" in words or "torchrun" in words
        found = [child for child in self.seen[0].children() if "train" in " ".join(child.cmdline())]
        processes = found if launched else [self.seen[0]]
        return sorted(processes, key=lambda process: int(process.environ().get("RANK", 0)))

    def text(self) -> str:
        return self.log.read_text()

    def wait_for(self, condition: Callable[[], object]) -> None:
        """Until `condition()` holds; fails if the training ends or takes too long."""
        while not condition():
            assert self.process.poll() is None, f"it has ended:\n{self.text()[-3000:]}"
            assert time.monotonic() - self.started < PATIENCE, self.text()[-3000:]
            time.sleep(0.002)
        self.seen += self.seen[0].children(recursive=True)

    def wait_for_step(self, step: int) -> None:
        """Until the metrics of a step are logged (by every run of the small model, for each step)."""
        path = self.output / "metrics.jsonl"
        self.wait_for(lambda: path.exists() and path.read_text().count('"train/loss"') >= step)

    def wait_for_heartbeat(self, words: str, rank: int = 0) -> None:
        """Until a rank begins what these words are part of, with next to no pause between looks."""
        deadline = time.monotonic() + PATIENCE
        while words not in heartbeat(self.output, rank):
            assert self.process.poll() is None and time.monotonic() < deadline, self.text()[-3000:]
            time.sleep(0.0002)

    def kill(self) -> None:
        """SIGKILL for the launcher and all ranks; their workers are not asked either."""
        with contextlib.suppress(psutil.NoSuchProcess):
            self.seen += self.seen[0].children(recursive=True)
        for process in self.seen:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        self.end()

    def end(self, seconds: float = PATIENCE) -> int:
        """Wait until it and what it has started have ended; the exit code of what was called."""
        code = self.process.wait(timeout=seconds)
        left = [process for process in self.seen[1:] if process.is_running()]
        _, alive = psutil.wait_procs(left, timeout=seconds)
        assert not [process for process in alive if process.status() != psutil.STATUS_ZOMBIE], self.text()[-3000:]
        return code


@contextlib.contextmanager
def training(arguments: list[str], output: Path, log: Path | None = None, **extra: str) -> Iterator[Training]:
    started = Training(arguments, output, log, **extra)
    try:
        yield started
    finally:
        if started.process.poll() is None or any(process.is_running() for process in started.seen[1:]):
            started.kill()


@contextlib.contextmanager
def changed_copy(*changes: tuple[str, str], name: str) -> Iterator[str]:
    """A copy of train.py beside it, with some lines changed, as a user would; its name."""
    text = (ROOT / "train.py").read_text()
    for old, new in changes:
        assert text.count(old) == 1, old
        text = text.replace(old, new)
    copy = ROOT / f"my_train_{name}_{os.getpid()}.py"
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


def kill_at(step: int, arguments: list[str], output: Path) -> None:
    """Start a training and kill -9 all of it once `step` is logged."""
    with training(arguments, output) as started:
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


def python(*arguments: str | Path) -> list[str]:
    return [sys.executable, *map(str, arguments)]


def send(process: psutil.Process, signum: signal.Signals) -> None:
    os.kill(process.pid, signum)
