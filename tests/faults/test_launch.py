"""Faults 29 and 30: a launch that is not what was asked for."""

import subprocess
import sys
from pathlib import Path

import pytest
from conftest import SMALL, environment, flags, run
from processes import ROOT

LAUNCH = [sys.executable, "-m", "accelerate.commands.launch", "--quiet"]


@pytest.fixture(scope="module")
def dataset(small_dataset) -> Path:
    return small_dataset


def refused(launch: list[str], dataset, output, **extra: str) -> str:
    result = run(*launch, "train.py", *flags(SMALL | {"output": output, "data.dataset": dataset}), check=False, **extra)
    assert result.returncode != 0 and not output.exists()
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("train.py: error:")]
    return line


def test_29_two_processes_asked_for_and_one_got(dataset, tmp_path):
    """By a flag, and by a file whose distributed_type accelerate does not start on CPUs."""
    line = refused([*LAUNCH, "--cpu", "--num_processes", "2"], dataset, tmp_path / "run")
    assert "asked for 2 processes and got 1" in line and "cpu_2_processes.yaml" in line
    text = (ROOT / "accelerate_configs" / "cpu_2_processes.yaml").read_text()
    config = tmp_path / "multi_cpu.yaml"
    config.write_text(text.replace("MULTI_GPU  ", "MULTI_CPU  "))
    assert "asked for 2 processes and got 1" in refused(
        [*LAUNCH, "--config_file", str(config)], dataset, tmp_path / "run"
    )


def test_29_two_processes_that_are_each_rank_0(dataset, tmp_path):
    """As `srun --ntasks 2 python train.py` would start them; and without Slurm, the second on the folder of the first."""
    arguments = [sys.executable, "train.py", *flags(SMALL | {"output": tmp_path / "run", "data.dataset": dataset})]
    slurm = {"SLURM_STEP_NUM_TASKS": "2"}
    tasks = [
        subprocess.Popen(arguments, cwd=ROOT, env=environment() | slurm | {"SLURM_PROCID": str(number)},
                         stderr=subprocess.PIPE, text=True)
        for number in range(2)
    ]  # fmt: skip
    for task in tasks:
        _, errors = task.communicate(timeout=100)
        assert (
            task.returncode == 2
            and "2 tasks were started (SLURM_STEP_NUM_TASKS), and each would train by itself" in errors
        )
    both = [
        subprocess.Popen(arguments, cwd=ROOT, env=environment(), stderr=subprocess.PIPE, text=True) for _ in range(2)
    ]
    ended = [(task.communicate(timeout=100)[1], task.returncode) for task in both]
    assert sorted(code for _, code in ended) == [0, 2], ended
    assert any("is in use by process" in errors or "already holds a run" in errors for errors, _ in ended)


def test_30_fp16_or_fsdp_asked_for_and_not_active(dataset, tmp_path):
    assert "fp16 with loss scaling needs a GPU" in refused(
        [*LAUNCH, "--mixed_precision", "fp16"], dataset, tmp_path / "run"
    )
    # What `accelerate launch` sets for FSDP, without its many options.
    line = refused([*LAUNCH, "--cpu"], dataset, tmp_path / "run", ACCELERATE_USE_FSDP="true")
    assert "asked for FSDP, active is NO" in line
