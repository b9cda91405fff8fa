"""Helpers: the real scripts in real processes, on real text, with a model small enough to wait for."""

import contextlib
import gc
import importlib
import io
import json
import math
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import IO, Any

import pytest
from filelock import FileLock
from fork_server import SERVER, Forked, start_server

from utils.cli import parse_config, run_script

ROOT = Path(__file__).resolve().parent.parent
# Tests run beside each other: one thread for each, or their kernels would wait for threads that have no core.
os.environ |= {
    "HF_HUB_OFFLINE": "1",
    "ACCELERATE_USE_CPU": "true",
    "TOKENIZERS_PARALLELISM": "false",
    "OMP_NUM_THREADS": "1",
}
PATIENCE = 240.0  # seconds for what a busy machine may take long to do
# Files of tests that take more than some ten CPU seconds, the longest first.
LONGEST = [f"test_{name}.py" for name in (
    "processes", "readme", "checkpoints", "benchmarks", "train", "recipes", "streaming", "estimates", "prepare_faults", "kernels",
    "hostile", "launch", "numbers", "makefile", "trackers", "context_parallel", "export", "evaluate", "shards", "fork_server",
)]  # fmt: skip
VALIDATION_FRACTION = 0.01  # of the sample, in `dataset`
WRITTEN = ("data", "runs", "exports")  # what the scripts write to unless they are told otherwise
CONFIGS = {
    "prepare_data": "PrepareConfig",
    "train": "TrainConfig",
    "export": "ExportConfig",
    "evaluate": "EvaluateConfig",
    "chat": "ChatConfig",
}

# As in a user's shell; `nohup` and background jobs ignore these, and so would every process that a test starts.
signal.signal(signal.SIGHUP, signal.SIG_DFL)
signal.signal(signal.SIGINT, signal.default_int_handler)

# A model of 50 thousand parameters on rows of 64: a step takes some 15 ms.
SMALL = {
    "data.sequence_length": 64, "model.hidden_size": 32, "model.num_hidden_layers": 2, "model.num_attention_heads": 2,
    "model.intermediate_size": 64, "model.max_position_embeddings": 64, "batch.global_batch_size": 8,
    "schedule.warmup_steps": 2, "schedule.max_steps": 10, "tracking.log_every_steps": 1, "tracking.trackers": "[]",
    "tracking.sample_every_steps": 0, "evaluation.every_steps": 1000, "checkpoint.every_steps": 1000,
}  # fmt: skip


def environment() -> dict[str, str]:
    """The environment of a user's shell: nothing of a launcher's or of the `make` that runs the suite, no network; the
    CPU, also where a GPU is present."""
    foreign = ("ACCELERATE_", "WANDB_", "MAKE", "MFLAGS")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(foreign)}
    return kept | {"HF_HUB_OFFLINE": "1", "ACCELERATE_USE_CPU": "true", "TOKENIZERS_PARALLELISM": "false"}


def run(
    *command: str | Path, cwd: Path | None = None, check: bool = True, **extra: str
) -> subprocess.CompletedProcess[str]:
    """Run a command in a fresh process; with `check`, its output is shown if it fails."""
    result = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        capture_output=True,
        text=True,
        env=environment() | extra,
        timeout=1800,
    )
    return checked(result) if check else result


@contextlib.contextmanager
def small_disk(folder: Path, size: str) -> Iterator[None]:
    """A folder on a disk of its own, of a size such as 3M."""
    folder.mkdir()
    if os.geteuid() or subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder]).returncode:
        pytest.skip("a small file system can only be mounted by root")
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", folder], check=True)


def checked(result: subprocess.CompletedProcess[str]) -> subprocess.CompletedProcess[str]:
    if result.returncode:
        pytest.fail(f"{result.args} ended with {result.returncode}\n{result.stdout[-3000:]}\n{result.stderr[-5000:]}")
    return result


def start(
    arguments: list[str], processes: int = 1, *, cwd: Path | None = None, stdout: IO[str], stderr: IO[str], **extra: str
) -> list[Any]:
    """Start a script, or "-m" and a module, in a process that has done its imports; or in several ranks of one launch.

    Returns objects with the interface of `subprocess.Popen`. Where there is no fork server (not on Linux), the processes are
    fresh.
    """
    options: dict[str, Any] = {"cwd": cwd or Path.cwd(), "stdout": stdout, "stderr": stderr}
    env = environment() | extra
    ranks = [env]
    if processes > 1:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            env |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
        env |= {"WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes), "GLOO_SOCKET_IFNAME": "lo"}
        ranks = [env | {"RANK": rank, "LOCAL_RANK": rank} for rank in map(str, range(processes))]
    if SERVER in os.environ:
        return [Forked(arguments, env=each, **options) for each in ranks]
    command = [sys.executable, *arguments]
    return [subprocess.Popen(command, env=each, start_new_session=True, **options) for each in ranks]


def script(
    *arguments: str | Path, processes: int = 1, cwd: Path | None = None, check: bool = True, **extra: str
) -> subprocess.CompletedProcess[str]:
    """Run a script as `run` does, but by `start`. If a rank fails, the others are told to end, as a launcher tells them."""
    words = [str(argument) for argument in arguments]
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        ranks = start(words, processes, cwd=cwd, stdout=out, stderr=err, **extra)
        try:
            code = wait_for_ranks(ranks)
        finally:
            for rank in ranks:
                if rank.poll() is None:  # the test is being ended
                    os.killpg(rank.pid, signal.SIGKILL)
        for file in (out, err):
            file.seek(0)
        result = subprocess.CompletedProcess(words, code, out.read(), err.read())
    return checked(result) if check else result


def as_ranks(module: str) -> list[str]:
    """What `script(..., processes=2)` runs for ranks that call `as_a_rank` of a test's module, with further arguments."""
    paths = [str(ROOT), str(ROOT / "tests")]
    return ["-c", f"import sys; sys.path[:0] = {paths}; import {module}; {module}.as_a_rank(*sys.argv[1:])"]


def wait_for_ranks(ranks: list[Any]) -> int:
    """0, or the exit code of the first rank to fail; those that do not end after it are killed."""
    code, deadline = 0, math.inf
    while any(rank.poll() is None for rank in ranks) and time.monotonic() < deadline:
        if not code and (code := next((rank.returncode for rank in ranks if rank.returncode), 0)):
            deadline = time.monotonic() + PATIENCE
            for rank in ranks:
                rank.terminate()
        time.sleep(0.01)
    return code or next((rank.returncode for rank in ranks if rank.returncode), 0)


def call(name: str, *arguments: str | Path) -> tuple[int, str, str]:
    """What `script` does, in this process, where starting one would take most of the time: exit code, stdout, stderr."""
    module = importlib.import_module(name.removesuffix(".py"))
    cls = getattr(module, CONFIGS[module.__name__])
    out, err, argv, sys.argv = io.StringIO(), io.StringIO(), sys.argv, [name, *map(str, arguments)]
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            read = getattr(module, "read_options", partial(parse_config, cls))
            run_script(module.main, read(module.__doc__))
        code = 0
    except SystemExit as ended:
        code = int(ended.code or 0)
    finally:
        sys.argv = argv
    return code, out.getvalue(), err.getvalue()


def error_line(name: str, *arguments: str | Path) -> str:
    """The one line that a script prints on stderr when it refuses, with exit code 2."""
    code, _, err = call(name, *arguments)
    lines = err.strip().splitlines()
    assert code == 2 and len(lines) == 1 and lines[0].startswith(f"{name}: error: "), (code, err)
    return lines[0]


def flags(options: dict[str, object]) -> list[str]:
    return [text for name, value in options.items() for text in (f"--{name}", str(value))]


# Two processes on CPUs, by the shipped file.
LAUNCH_TWO = [
    sys.executable,
    "-m",
    "accelerate.commands.launch",
    "--config_file",
    "accelerate_configs/cpu_2_processes.yaml",
]


def train(output: Path, *, processes: int = 1, name: str = "train.py", **options: object) -> list[dict]:
    """Train the small model and return metrics.jsonl; option names have `__` for the dot."""
    settings = SMALL | {"output": output} | {key.replace("__", "."): value for key, value in options.items()}
    if processes == 1 and name == "train.py":
        code, _, err = call(name, *flags(settings))
        assert code == 0, err
    else:
        script(name, *flags(settings), processes=processes)
    return metrics(output)


def metrics(output: Path) -> list[dict]:
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


def train_losses(records: list[dict]) -> list[float]:
    return [record["train/loss"] for record in records if "train/loss" in record]


def pytest_configure(config: pytest.Config) -> None:
    """One fork server for all workers: the process that starts them starts it too."""
    if hasattr(config, "workerinput") or sys.platform != "linux":
        return
    os.environ[SERVER] = f"plainloop-{os.getpid()}-{time.time_ns()}"
    server = start_server(environment())

    def end() -> None:
        server.communicate()  # closes its standard input

    config.add_cleanup(end)


@pytest.fixture(scope="session", autouse=True)
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Where tests run: a folder like the clone, without what a user has made there (data/, runs/, exports/)."""
    folder, before = tmp_path_factory.mktemp("place"), Path.cwd()
    for path in ROOT.iterdir():
        if path.name not in WRITTEN and not path.name.startswith("."):
            (folder / path.name).symlink_to(path)
    os.chdir(folder)
    yield folder
    os.chdir(before)


@pytest.fixture(autouse=True)
def nothing_is_left_in_its_place(place: Path) -> Iterator[None]:
    yield
    left = [name for name in WRITTEN if (place / name).exists()]
    for name in left:
        shutil.rmtree(place / name)
    assert not left, f"a test wrote where its user would look for results: {left}"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files first, or the last one would run alone; `make quick` leaves them out."""
    for item in items:
        if item.path.name in LONGEST:
            item.add_marker("long")
    items.sort(key=lambda item: LONGEST.index(item.path.name) if item.path.name in LONGEST else len(LONGEST))


def pytest_collection_finish() -> None:
    """What is imported by now stays; a run's own `gc.collect` need not look at it again (it would take 0.4 s each time)."""
    gc.freeze()


def made_once(tmp_path_factory: pytest.TempPathFactory, name: str, make: Callable[[Path], object]) -> Path:
    """A folder that the first worker to ask makes, by `make(folder)`; all workers read it, and none may write to it."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / name
    made = folder.with_name(f"{name}.made")
    with FileLock(f"{folder}.lock"):
        if not made.exists():
            shutil.rmtree(folder, ignore_errors=True)  # of a worker that failed
            make(folder)
            made.touch()
    return folder


@pytest.fixture(scope="session")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The sample, prepared by prepare_data.py with its defaults, but for a validation split that is soon evaluated."""
    options = flags({"validation_fraction": VALIDATION_FRACTION})
    return made_once(tmp_path_factory, "demo", lambda folder: script("prepare_data.py", "--output", folder, *options))


@pytest.fixture(scope="session")
def finished_run(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small run that has come to its end. Each worker has its own, because a test may resume it."""
    output = tmp_path_factory.mktemp("runs") / "finished"
    train(output, data__dataset=dataset, evaluation__every_steps=5, tracking__sample_every_steps=5)
    return output


@pytest.fixture(scope="session")
def small_dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Some hundred short documents: an epoch is soon over."""

    def make(folder: Path) -> None:
        folder.mkdir()
        lines = (ROOT / "sample_data" / "dictionaries.jsonl").read_text(encoding="utf-8").splitlines()[:150]
        texts = [" ".join(json.loads(line)["text"].split()[:30]) for line in lines]
        (folder / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        options = {"output": folder / "data", "sources": f"[{folder / 'texts.jsonl'}]", "tokenizer.vocab_size": 400,
                   "validation_fraction": 0.1}  # fmt: skip
        assert call("prepare_data.py", *flags(options))[0] == 0

    return made_once(tmp_path_factory, "small", make) / "data"
