"""What the fork server starts behaves as a fresh process does."""

import os
import signal
import socket
import sys

import psutil
import pytest
from conftest import PATIENCE, SMALL, flags, metrics, run, script, start, train_losses
from fork_server import SERVER

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the fork server is for Linux")

JOB = """
import atexit, os, pathlib, signal, sys
import torch
atexit.register(lambda: pathlib.Path("ended").write_text("in order"))
torch.set_num_threads(2)
torch.randn(600, 600) @ torch.randn(600, 600)  # hangs after a parallel product in the server
print(__name__, sys.argv[1:], os.environ["MINE"], os.getcwd(), os.getpid() == os.getsid(0))
print("to stderr", file=sys.stderr)
os.kill(os.getpid(), int(sys.argv[1])) if sys.argv[1] != "0" else sys.exit(3)
"""


def test_a_job_has_its_own_arguments_folder_variables_exit_code_and_end(tmp_path):
    (tmp_path / "job.py").write_text(JOB)
    ended = script("job.py", "0", "a b", cwd=tmp_path, check=False, MINE="mine")
    assert ended.stdout == f"__main__ ['0', 'a b'] mine {tmp_path} True\n" and ended.stderr == "to stderr\n"
    assert ended.returncode == 3 and (tmp_path / "ended").read_text() == "in order"
    (tmp_path / "ended").unlink()
    killed = script("job.py", str(int(signal.SIGKILL)), cwd=tmp_path, check=False, MINE="mine")
    assert killed.returncode == -signal.SIGKILL and not (tmp_path / "ended").exists()


def test_a_job_that_nobody_waits_for_is_killed_and_the_server_goes_on(tmp_path):
    (tmp_path / "job.py").write_text("import time\ntime.sleep(1000)")
    with (tmp_path / "log").open("w") as log:
        (job,) = start(["job.py"], cwd=tmp_path, stdout=log, stderr=log)
    process = psutil.Process(job.pid)
    del job  # as when its test has failed
    assert psutil.wait_procs([process], timeout=PATIENCE)[1] == []
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as nobody:
        nobody.connect(f"\0{os.environ[SERVER]}")
    (tmp_path / "job.py").write_text("import os\nprint(sorted(map(int, os.listdir('/proc/self/fd')))[:-1])")
    assert script("job.py", cwd=tmp_path).stdout == "[0, 1, 2]\n"  # it has no file of the server's or of other jobs


def test_what_is_read_at_import_is_refused(tmp_path):
    (tmp_path / "job.py").write_text("")
    for name, value in {"OMP_NUM_THREADS": "7", "PYTHONIOENCODING": "ascii", "HF_HOME": "elsewhere"}.items():
        with pytest.raises(RuntimeError, match=name):
            script("job.py", cwd=tmp_path, **{name: value})


def test_a_training_has_the_losses_of_a_fresh_process(small_dataset, tmp_path):
    arguments = ["train.py", *flags(SMALL | {"data.dataset": small_dataset, "model.dropout": 0.1})]
    script(*arguments, "--output", tmp_path / "forked")
    run(sys.executable, *arguments, "--output", tmp_path / "fresh")
    assert train_losses(metrics(tmp_path / "forked")) == train_losses(metrics(tmp_path / "fresh"))
