"""Faults 28 to 32: a launch that is not what was asked for."""

import json
import os
import sys
from pathlib import Path

import pytest
import torch
import yaml
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from conftest import ROOT, SMALL, flags, metrics, run, script, start, train, train_losses
from processes import PATIENCE, Training, command

from training.launch import SECTIONS, check_launch_file, describe_launch, plan_batches
from training.monitoring.hints import hints_on_launch
from utils.cli import UserError

LAUNCH = [sys.executable, "-m", "accelerate.commands.launch", "--quiet"]


@pytest.fixture(scope="module")
def dataset(small_dataset) -> Path:
    return small_dataset


def refused(launch: list[str], dataset, output, **extra: str) -> str:
    """The line with which train.py refuses a real launch; without `launch`, the variables that one would set."""
    command = [*launch, "train.py", *flags(SMALL | {"output": output, "data.dataset": dataset})]
    result = (run if launch else script)(*command, check=False, **extra)
    assert result.returncode != 0 and not output.exists()
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("train.py: error:")]
    return line


@pytest.mark.slow
def test_28_an_elastic_restart_after_each_of_five_kills(dataset, tmp_path):
    """By the shipped script; each kill comes after another checkpoint than the one before."""
    options = SMALL | {"data.dataset": dataset, "schedule.max_steps": 240, "checkpoint.every_steps": 10}
    recipe, output = tmp_path / "recipe.yaml", tmp_path / "run"
    recipe.write_text("".join(f"{name}: {value}\n" for name, value in options.items()))
    elastic = {"PROCESSES": "2", "RESTARTS": "5", "GLOO_SOCKET_IFNAME": "lo", "ACCELERATE_USE_CPU": "true",
               "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])}  # fmt: skip
    training = Training(["bash", "launch/torchrun_elastic.sh", str(recipe), str(output)], output, **elastic)
    try:
        for kill in range(5):
            saved = output / "checkpoints" / f"step-{10 + 40 * kill:08}"
            training.wait_for(lambda saved=saved: saved.is_dir() and len(training.ranks) == 2)
            training.ranks[kill % 2].kill()
        training.process.wait(timeout=PATIENCE)
    finally:
        training.kill()
    text = training.text()
    assert training.process.returncode == 0 and text.count("resumed from") == 5, text[-3000:]
    assert json.loads((output / "summary.json").read_text())["finished"] is True
    whole = train(tmp_path / "whole", **{name.replace(".", "__"): value for name, value in options.items()})
    assert train_losses(metrics(output)) == pytest.approx(train_losses(whole), abs=1e-5)


def test_29_two_processes_asked_for_and_one_got(dataset, tmp_path):
    """By a flag, and by a file whose distributed_type accelerate does not start on CPUs."""
    line = refused([*LAUNCH, "--cpu", "--num_processes", "2"], dataset, tmp_path / "run")
    assert "asked for 2 processes and got 1" in line and "cpu_2_processes.yaml" in line
    text = (ROOT / "accelerate_configs" / "cpu_2_processes.yaml").read_text()
    line = problems(tmp_path / "multi_cpu.yaml", text.replace("MULTI_GPU  ", "MULTI_CPU  "))
    assert "starts one process for distributed_type MULTI_CPU, not 2" in line and "MULTI_GPU" in line


def test_29_two_processes_that_are_each_rank_0(dataset, tmp_path):
    """As `srun --ntasks 2 python train.py` would start them; and without Slurm, the second on the folder of the first."""
    for number in ("0", "1"):
        line = refused([], dataset, tmp_path / "run", SLURM_STEP_NUM_TASKS="2", SLURM_PROCID=number)
        assert "2 tasks were started (SLURM_STEP_NUM_TASKS), and each would train by itself" in line
    arguments = command(tmp_path / "run", dataset)
    with (tmp_path / "log").open("a") as log:
        both = [start(arguments, stdout=log, stderr=log)[0] for _ in range(2)]
        codes = sorted(task.wait(timeout=PATIENCE) for task in both)
    text = (tmp_path / "log").read_text()
    assert codes == [0, 2], text
    assert "is in use by process" in text or "already holds a run" in text


def test_30_fp16_or_fsdp_asked_for_and_not_active(dataset, tmp_path):
    """By the variables that `accelerate launch` sets."""
    for asked, expected in (
        ({"ACCELERATE_MIXED_PRECISION": "fp16"}, "fp16 with loss scaling needs a GPU"),
        ({"ACCELERATE_MIXED_PRECISION": "bfloat16"}, "one of no, bf16, fp16, fp8"),
        ({"ACCELERATE_USE_FSDP": "true"}, "asked for FSDP, active is NO"),
    ):
        assert expected in refused([], dataset, tmp_path / "run", **asked)


FSDP = """distributed_type: FSDP
use_cpu: true
num_machines: 1
machine_rank: 0
num_processes: 2
main_process_port: 0
mixed_precision: 'no'
fsdp_config:
  fsdp_version: 2
"""


def problems(path: Path, text: str) -> str:
    path.write_text(text)
    with pytest.raises(UserError) as refusal:
        check_launch_file(path)
    return str(refusal.value)


@pytest.mark.parametrize("shipped", sorted((ROOT / "accelerate_configs").glob("*.yaml")), ids=lambda path: path.stem)
def test_31_a_misspelt_key_in_every_file_that_is_shipped(shipped, tmp_path):
    check_launch_file(shipped)
    values = yaml.safe_load(shipped.read_text())
    for key in values:
        changed = {(name[:-2] + name[-1] if name == key else name): value for name, value in values.items()}
        line = problems(tmp_path / "top.yaml", yaml.safe_dump(changed))
        assert f"{key[:-2]}{key[-1]} is unknown to accelerate" in line and f"did you mean {key}?" in line
    for section in SECTIONS:
        line = problems(tmp_path / "nested.yaml", yaml.safe_dump(values | {section: {"no_such_key": 1}}))
        assert f"{section}.no_such_key is unknown to accelerate" in line


def test_31_a_misspelt_key_is_refused_by_hand(tmp_path):
    file = tmp_path / "fsdp.yaml"
    file.write_text(FSDP + "  fsdp_reshard_after_foward: true\n")
    by_hand = script("-m", "training.launch", file, check=False)
    assert (
        by_hand.returncode == 2 and by_hand.stderr.count("\n") == 1 and "fsdp_reshard_after_forward?" in by_hand.stderr
    )
    good = script("-m", "training.launch", "accelerate_configs/multi_gpu.yaml")
    assert "no problems" in good.stdout


def test_31_values_that_mean_something_else(tmp_path):
    file = tmp_path / "file.yaml"
    assert "in quotes" in problems(file, "distributed_type: 'NO'\nmixed_precision: no\n")
    assert "distributed_type is missing" in problems(file, "num_processes: 1\n")
    assert "did you mean MULTI_GPU?" in problems(file, "distributed_type: MULTY_GPU\n")
    assert "not supported" in problems(file, "distributed_type: DEEPSPEED\n")
    assert "(did you mean bf16?)" in problems(file, "distributed_type: 'NO'\nmixed_precision: bf-16\n")
    assert "must be a whole number" in problems(file, "distributed_type: 'NO'\nnum_processes: four\n")
    sizes = "parallelism_config:\n  parallelism_config_dp_shard_size: 2\n  parallelism_config_cp_size: 2\n"
    assert "dp_shard_size 2 needs distributed_type: FSDP" in problems(file, f"distributed_type: 'NO'\n{sizes}")
    assert "cp_size two must be" in problems(file, f"{FSDP}{sizes.replace('cp_size: 2', 'cp_size: two')}")
    file.write_text(f"{FSDP}{sizes}".replace("num_processes: 2", "num_processes: 3"))
    with pytest.raises(UserError, match="the number of processes, 3"):
        check_launch_file(file)
    tensor = "  parallelism_config_tp_size: 2\n"
    assert "tp_size 2 is not supported" in problems(file, f"distributed_type: MULTI_GPU\nparallelism_config:\n{tensor}")


def test_32_fsdp_of_version_1(tmp_path):
    for version in ("  fsdp_version: 1\n", "  fsdp_use_orig_params: false\n"):
        line = problems(tmp_path / "fsdp1.yaml", FSDP.replace("  fsdp_version: 2\n", version))
        assert "fsdp_version must be 2" in line


def test_what_the_machine_could_do_beside_the_launch_is_hinted_at(monkeypatch):
    """Cores that no thread uses, and bf16 where the processor has instructions for it and the launch asks for fp32."""
    plan, threads = plan_batches(8, 2, 1), torch.get_num_threads()

    def hints(precision: str, cores: int, has_bf16: bool) -> list[str]:
        monkeypatch.setattr("training.monitoring.hints.usable_cores", lambda: cores)
        monkeypatch.setattr(
            torch.cpu, "get_capabilities", lambda: {"avx2": True, "avx512_bf16": has_bf16}, raising=False
        )
        AcceleratorState._reset_state(True)
        try:
            accelerator = Accelerator(cpu=True, mixed_precision=precision)
            lines, found = describe_launch(accelerator, plan), hints_on_launch(accelerator)
        finally:
            AcceleratorState._reset_state(True)
        assert f"precision {precision}, {threads} thread(s) each" in lines[0]
        assert "8 sequences = 1 process(es) × 4 micro-batch(es) × 2" in lines[1]
        return found

    assert hints("no", threads, False) == hints("bf16", threads, True) == []
    (line,) = hints("no", threads + 3, False)
    assert f"{threads} of {threads + 3} cores" in line and f"--num_cpu_threads_per_process {threads + 3}`" in line
    (line,) = hints("no", threads, True)
    assert "--mixed_precision bf16" in line
    assert len(hints("no", threads + 3, True)) == 2
