"""Files that `accelerate config` writes, its questions answered through a terminal, are used to launch, or refused with the
line to write instead."""

import contextlib
import sys
from pathlib import Path

import pexpect
import pytest
import yaml
from conftest import SMALL, environment, flags, metrics, run, train_losses

from training.launch import check_launch_file
from utils.cli import UserError

pytestmark = pytest.mark.slow
DOWN = "\x1b[B"
# Part of a question → what to type; Enter, the default, for all others.
MULTI_GPU = {"Which type of machine": 4 * DOWN, "How many GPU": "2"}


def configure(path: Path, answers: dict[str, str]) -> dict:
    """The file that `accelerate config` writes for these answers."""
    child = pexpect.spawn(
        sys.executable, ["-m", "accelerate.commands.accelerate_cli", "config", "--config_file", str(path)],
        env=environment() | {"TERM": "xterm"}, encoding="utf-8", timeout=30, dimensions=(60, 300),
    )  # fmt: skip
    try:
        while child.isalive():
            question = ""
            with contextlib.suppress(pexpect.TIMEOUT, pexpect.EOF):  # it is silent when it waits for an answer
                while True:
                    question += child.read_nonblocking(10_000, timeout=1 if question else 60)
            typed = next((text for part, text in answers.items() if part in question), "")
            child.send(typed + "\r")
    finally:
        child.kill(9)
    return yaml.safe_load(path.read_text())


def launch(file: Path, output: Path, dataset: Path, name: str = "train.py") -> str:
    settings = SMALL | {"output": output, "data.dataset": dataset}
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", file]
    result = run(*command, name, *flags(settings), GLOO_SOCKET_IFNAME="lo")
    assert len(train_losses(metrics(output))) == 10
    return result.stdout


def test_cpu(small_dataset, tmp_path):
    values = configure(tmp_path / "cpu.yaml", {"CPU only": "yes"})
    assert values["use_cpu"] is True and values["distributed_type"] == "NO"
    assert " 1 process(es) on cpu" in launch(tmp_path / "cpu.yaml", tmp_path / "run", small_dataset)


def test_several_gpus(small_dataset, tmp_path):
    """On this machine without one its processes train on the CPU, over gloo."""
    values = configure(tmp_path / "gpus.yaml", MULTI_GPU)
    assert values["distributed_type"] == "MULTI_GPU" and values["num_processes"] == 2
    assert " 2 process(es) on cpu" in launch(tmp_path / "gpus.yaml", tmp_path / "run", small_dataset)


def test_fsdp(small_dataset, tmp_path):
    values = configure(
        tmp_path / "fsdp.yaml", MULTI_GPU | {"FullyShardedDataParallel?": "yes", "_no_split_modules": "yes"}
    )
    assert values["distributed_type"] == "FSDP" and values["fsdp_config"]["fsdp_version"] == 2
    said = launch(tmp_path / "fsdp.yaml", tmp_path / "run", small_dataset, name="tests/unlocked_train.py")
    assert " 2 process(es) on cpu, FSDP" in said


def test_several_cpu_processes_are_refused_with_what_to_write(tmp_path):
    configure(tmp_path / "cpus.yaml", {"Which type of machine": DOWN, "How many process": "2", "How many CPU": "2"})
    with pytest.raises(UserError, match="write distributed_type: MULTI_GPU and use_cpu: true"):
        check_launch_file(tmp_path / "cpus.yaml")
