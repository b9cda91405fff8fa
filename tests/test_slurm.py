"""The batch script for Slurm, started by bash as Slurm would start it; `srun` starts its tasks here, on one machine, and what
else Slurm is to do is recorded, not done."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import yaml
from conftest import ROOT, SMALL, environment, metrics, train

SCRIPT = ROOT / "launch" / "slurm_requeue.sh"
STEPS = 200  # some seconds: more than it takes until a stop is seen
# As Slurm: a task per node, told which it is; when one ends in an error, the others are killed with what they have started.
SRUN = """#!/usr/bin/env bash
echo "$*" >> "$FOLDER/started"
while [[ $1 == -* ]]; do shift; done
tasks=()
for ((node = 0; node < SLURM_JOB_NUM_NODES; node++)); do
  SLURM_NODEID=$node SLURM_STEP_NUM_TASKS=$SLURM_JOB_NUM_NODES "$@" &
  tasks+=($!)
done
for _ in "${tasks[@]}"; do
  wait -n && continue
  for task in "${tasks[@]}"; do
    pkill -KILL -P "$task"
    kill -KILL "$task"
  done
  exit 137
done
"""
SCONTROL = """#!/usr/bin/env bash
if [[ $* == "show hostnames node[1-2]" ]]; then printf '127.0.0.1\\nnode2\\n'; else echo "$@" >> "$FOLDER/asked"; fi
"""


@pytest.fixture
def cluster(tmp_path: Path) -> dict[str, str]:
    """The environment of a job on one node, with an `srun` and a `scontrol` of our own: a test machine has no Slurm."""
    commands = tmp_path / "bin"
    commands.mkdir()
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
        (commands / name).write_text(text)
        (commands / name).chmod(0o755)
    path = os.pathsep.join([str(commands), f"{sys.prefix}/bin", os.environ["PATH"]])
    job = {"JOB_ID": "17", "JOB_NUM_NODES": "1", "JOB_NODELIST": "node[1-2]", "RESTART_COUNT": "0"}
    job |= {"GPUS_ON_NODE": "", "CPUS_PER_TASK": "8"}
    settings = {"PATH": path, "FOLDER": str(tmp_path), "LAUNCH": "accelerate_configs/cpu.yaml"}
    return environment() | {f"SLURM_{name}": value for name, value in job.items()} | settings


@pytest.fixture
def two_nodes(cluster: dict[str, str], tmp_path: Path) -> dict[str, str]:
    """The environment of a job on two nodes with one GPU each, for which a CPU process stands in."""
    values = yaml.safe_load((ROOT / "accelerate_configs/multi_node.yaml").read_text())
    values |= {"use_cpu": True, "mixed_precision": "no", "dynamo_config": {}}
    (tmp_path / "machines.yaml").write_text(yaml.safe_dump(values))
    job = {"SLURM_JOB_NUM_NODES": "2", "SLURM_GPUS_ON_NODE": "1", "LAUNCH": str(tmp_path / "machines.yaml")}
    return cluster | job | {"GLOO_SOCKET_IFNAME": "lo"}


def start(cluster: dict[str, str], *arguments: str | Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        ["bash", SCRIPT, *arguments], env=cluster, text=True, start_new_session=True,
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


def rank_of(process: subprocess.Popen[str], number: int) -> psutil.Process:
    ranks = [child for child in psutil.Process(process.pid).children(recursive=True) if "-u" in child.cmdline()]
    return next(rank for rank in ranks if rank.environ()["RANK"] == str(number))


def asked(folder: Path) -> list[str]:
    """What `scontrol` was to do, a line per call."""
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
def test_two_nodes_train_one_run_and_go_on_after_one_was_killed(two_nodes, small_dataset, tmp_path):
    output = tmp_path / "run"
    options = SMALL | {"data.dataset": str(small_dataset), "schedule.max_steps": STEPS, "checkpoint.every_steps": 5}
    command = (write_recipe(tmp_path, options), output)

    process = start(two_nodes, *command)
    wait_for_a_step(process, output)
    rank_of(process, 1).kill()
    printed = process.communicate(timeout=120)[0]
    assert process.returncode == 0 and asked(tmp_path) == ["requeue 17"], printed
    # Node 0 may be ended before it can say what it has seen.
    assert re.search("ended with: (rank_gone|nothing)", printed)

    process = start(two_nodes | {"SLURM_RESTART_COUNT": "1"}, *command)
    printed = process.communicate(timeout=240)[0]
    assert process.returncode == 0 and "job 17, restart 1, ended with: finished" in printed
    assert asked(tmp_path) == ["requeue 17"]
    summary = json.loads((output / "summary.json").read_text())
    assert (summary["finished"], summary["reason"], summary["optimizer_step"]) == (True, "max_steps", STEPS)
    assert [line["step"] for line in metrics(output) if "train/loss" in line] == list(range(1, STEPS + 1))
    launches = json.loads((output / "environment.json").read_text())
    assert [launch["num_processes"] for launch in launches] == [2, 2]
    started = (tmp_path / "started").read_text().splitlines()
    assert len(started) == 2 and all("--kill-on-bad-exit=1 --cpus-per-task=8 bash" in line for line in started)
    assert "--num_machines 2 --main_process_ip 127.0.0.1 --main_process_port 20017 --num_processes 2" in started[0]


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
    rank_of(process, 1).kill()
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
