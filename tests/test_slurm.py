"""The batch script for Slurm, started by bash as Slurm would start it; what Slurm is to do is recorded, not done."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import yaml
from conftest import ROOT, SMALL, environment, metrics, run, train

SCRIPT = ROOT / "launch" / "slurm_requeue.sh"
STEPS = 200  # some seconds: more than it takes until a stop is seen


@pytest.fixture
def cluster(tmp_path: Path) -> dict[str, str]:
    """The environment of a job, with an `scontrol` that writes down its arguments: a test machine has no Slurm."""
    commands = tmp_path / "bin"
    commands.mkdir()
    (commands / "scontrol").write_text(f'#!/bin/sh\necho "$@" >> "{tmp_path}/asked"\n')
    (commands / "scontrol").chmod(0o755)
    path = os.pathsep.join([str(commands), f"{sys.prefix}/bin", os.environ["PATH"]])
    job = {"SLURM_JOB_ID": "17", "SLURM_RESTART_COUNT": "0", "SLURM_GPUS_ON_NODE": "", "PATH": path}
    return environment() | job | {"LAUNCH": "accelerate_configs/cpu.yaml"}


def start(cluster: dict[str, str], *arguments: str | Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        ["bash", SCRIPT, *arguments], cwd=ROOT, env=cluster, text=True, start_new_session=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip


def write_recipe(folder: Path, options: dict[str, object]) -> Path:
    path = folder / "recipe.yaml"
    path.write_text("".join(f"{name}: {value}\n" for name, value in options.items()))
    return path


def wait_for_a_step(process: subprocess.Popen[str], output: Path) -> None:
    deadline = time.monotonic() + 120
    while not (output / "metrics.jsonl").exists() or not (output / "metrics.jsonl").read_text():
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()[0]
        time.sleep(0.01)


def asked(folder: Path) -> list[str]:
    """What `scontrol` was called with, a line per call."""
    return (folder / "asked").read_text().splitlines() if (folder / "asked").exists() else []


@pytest.mark.slow
def test_a_warned_run_saves_and_queues_again_and_goes_on_to_its_end(cluster, small_dataset, tmp_path):
    output = tmp_path / "run"
    options = SMALL | {"data.dataset": str(small_dataset), "schedule.max_steps": STEPS}
    command = (write_recipe(tmp_path, options), output, "--seed", "3")

    process = start(cluster, *command)
    wait_for_a_step(process, output)
    os.kill(process.pid, signal.SIGUSR1)  # the shell alone, as --signal=B: has it
    printed = process.communicate(timeout=120)[0]
    summary = json.loads((output / "summary.json").read_text())
    assert process.returncode == 0 and asked(tmp_path) == ["requeue 17"], printed
    assert (summary["finished"], summary["reason"]) == (False, "stop_file")
    assert summary["optimizer_step"] < STEPS and "job 17, restart 0, ended with: stop_file" in printed

    process = start(cluster | {"SLURM_RESTART_COUNT": "1"}, *command)
    printed = process.communicate(timeout=120)[0]
    assert process.returncode == 0 and asked(tmp_path) == ["requeue 17"], printed
    assert f"at step {summary['optimizer_step']}" in printed
    assert json.loads((output / "summary.json").read_text())["finished"] is True
    assert [line["step"] for line in metrics(output) if "train/loss" in line] == list(range(1, STEPS + 1))
    launches = json.loads((output / "environment.json").read_text())
    assert [launch["num_processes"] for launch in launches] == [1, 1]
    assert yaml.safe_load((output / "config.yaml").read_text())["seed"] == 3


@pytest.mark.slow
def test_an_error_is_not_tried_again(cluster, small_dataset, tmp_path):
    """A learning rate that no model bears: the second loss is not finite, and train.py gives up."""
    output = tmp_path / "run"
    options = SMALL | {"data.dataset": str(small_dataset), "optimizer.learning_rate": 1e38, "guards.max_nonfinite": 0}
    process = start(cluster, write_recipe(tmp_path, options), output)
    printed = process.communicate(timeout=120)[0]
    assert json.loads((output / "summary.json").read_text())["reason"] == "error", printed
    assert process.returncode == 1 and asked(tmp_path) == []


@pytest.mark.slow
def test_a_killed_rank_is_no_error(cluster, small_dataset, tmp_path):
    """As by a lack of memory: the other rank meets an error, which is not its own."""
    output = tmp_path / "run"
    options = SMALL | {"data.dataset": str(small_dataset), "schedule.max_steps": 10_000}
    two = cluster | {"LAUNCH": "accelerate_configs/cpu_2_processes.yaml"}
    process = start(two, write_recipe(tmp_path, options), output)
    wait_for_a_step(process, output)
    ranks = [child for child in psutil.Process(process.pid).children(recursive=True) if "-u" in child.cmdline()]
    next(rank for rank in ranks if rank.environ()["RANK"] == "1").kill()
    printed = process.communicate(timeout=120)[0]
    assert process.returncode == 0 and asked(tmp_path) == ["requeue 17"], printed
    assert "ended with: rank_gone" in printed


@pytest.mark.parametrize(
    ("started", "restarts", "ended", "expected"),
    [(True, "19", "nothing", ["requeue 17"]), (True, "20", "nothing", []), (False, "0", "refused", [])],
)
def test_a_launch_that_is_killed_is_tried_again_so_many_times(started, restarts, ended, expected, cluster, tmp_path):
    """As if killed once it had begun, or refused before. An earlier launch's summary is not taken for its own, nor an
    earlier stop obeyed."""
    output = tmp_path / "run"
    output.mkdir()
    (output / "summary.json").write_text('{"finished": true, "reason": "max_steps"}')
    (output / "environment.json").write_text("[]")
    (output / "stop").touch()
    launch = tmp_path / "bin" / "accelerate"
    launch.write_text(f"#!/bin/sh\nsleep 0.1\n{f'touch {output}/environment.json' if started else ''}\nexit 137\n")
    launch.chmod(0o755)
    process = start(cluster | {"SLURM_RESTART_COUNT": restarts}, "recipe.yaml", output)
    printed = process.communicate(timeout=120)[0]
    assert f"ended with: {ended}" in printed
    assert asked(tmp_path) == expected and process.returncode == (0 if expected else 1)
    assert not (output / "stop").exists()


def test_a_stop_asked_before_the_folder_is_in_use_is_obeyed(small_dataset, tmp_path):
    """A warning may come while the first launch is still importing."""
    output = tmp_path / "run"
    output.mkdir()
    (output / "stop").touch()
    train(output, data__dataset=small_dataset)
    summary = json.loads((output / "summary.json").read_text())
    assert (summary["reason"], summary["optimizer_step"]) == ("stop_file", 1)


@pytest.mark.parametrize("path", [SCRIPT, ROOT / ".ci" / "run"], ids=lambda path: path.name)
def test_shell_scripts_are_well_formed(path):
    run("bash", "-n", path)
    assert "set -euo pipefail" in path.read_text().splitlines()
