"""Real kills: a run that was stopped and resumed ends with the weights of one that never was."""

import hashlib
import json
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import psutil
import pytest
import torch
from conftest import ROOT, SMALL, environment, error_line, flags, launcher, metrics, run, train, train_losses

from utils.optimizer_config import ScheduleConfig
from utils.training.checkpoint_folders import find_problem
from utils.training.optimization import learning_rate_factor

STEPS = 60
OPTIONS = {
    # Dropout, accumulation, epochs that end within a batch: all that a resumed run could get wrong.
    "model.architecture": "gpt2", "model.dropout": 0.1, "batch.per_device_batch_size": 2, "schedule.max_steps": STEPS,
    "checkpoint.every_steps": 10, "evaluation.every_steps": 15, "tracking.sample_every_steps": 20,
    "tracking.sample_max_new_tokens": 8,
}  # fmt: skip


def command(output: Path, dataset: Path, processes: int, **more: object) -> list[str]:
    return [
        *launcher(processes),
        "train.py",
        *flags(SMALL | OPTIONS | {"output": output, "data.dataset": dataset} | more),
    ]


def kill_at(step: int, arguments: list[str], output: Path) -> None:
    """Start a run and kill -9 launcher and ranks alike once `step` is logged."""
    process = subprocess.Popen(
        arguments,
        cwd=ROOT,
        env=environment(),
        start_new_session=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 120
    while not (output / "metrics.jsonl").exists() or (output / "metrics.jsonl").read_text().count("train/loss") < step:
        assert process.poll() is None and time.monotonic() < deadline, "the run ended before it could be killed"
        time.sleep(0.005)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    # The ranks of a launcher are its children, in its session: wait until none is left.
    while any(session(pid) == process.pid for pid in psutil.pids()):
        time.sleep(0.01)


def session(pid: int) -> int | None:
    try:
        return os.getsid(pid) if psutil.Process(pid).status() != psutil.STATUS_ZOMBIE else None
    except (ProcessLookupError, psutil.NoSuchProcess):
        return None


def weights(output: Path) -> str:
    path = output / "checkpoints" / "last" / "model.safetensors"
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture(scope="module")
def whole_run(dataset, tmp_path_factory) -> Path:
    """Never stopped, one process."""
    output = tmp_path_factory.mktemp("whole") / "run"
    run(*command(output, dataset, 1))
    return output


@pytest.mark.parametrize("processes", [1, 2])
def test_kill_9_and_resume_is_bit_equal(processes, whole_run, dataset, tmp_path):
    whole, broken = whole_run if processes == 1 else tmp_path / "whole", tmp_path / "broken"
    if processes == 2:
        run(*command(whole, dataset, processes))
    kill_at(25, command(broken, dataset, processes), broken)
    assert not (broken / "summary.json").exists()
    run(*command(broken, dataset, processes, **{"checkpoint.resume": "auto"}))
    assert weights(broken) == weights(whole)
    ours, theirs = (torch.load(path / "checkpoints/last/optimizer.pt", weights_only=True) for path in (broken, whole))
    for index, state in theirs["state"].items():
        assert all(torch.equal(ours["state"][index][name], value) for name, value in state.items())
    assert json.loads((broken / "checkpoints/last/state.json").read_text())["scheduler"] == \
        json.loads((whole / "checkpoints/last/state.json").read_text())["scheduler"]  # fmt: skip
    steps = [record["step"] for record in metrics(broken) if "train/loss" in record]
    assert steps == list(range(1, STEPS + 1))  # none twice, none missing
    assert train_losses(metrics(broken)) == train_losses(metrics(whole))
    assert json.loads((broken / "summary.json").read_text())["finished"] is True


def test_a_damaged_checkpoint_is_passed_over(whole_run, dataset, tmp_path):
    damaged = tmp_path / "damaged"
    kill_at(45, command(damaged, dataset, 1), damaged)
    newest = max(path for path in (damaged / "checkpoints").glob("step-*"))
    model = newest / "model.safetensors"
    content = bytearray(model.read_bytes())
    content[len(content) // 2] ^= 1  # one flipped bit
    model.write_bytes(content)
    result = run(*command(damaged, dataset, 1, **{"checkpoint.resume": "auto", "checkpoint.keep_last": 100}))
    assert f"{newest} is not valid and is passed over: model.safetensors has changed" in result.stdout
    assert weights(damaged) == weights(whole_run)
    assert find_problem(newest) is None  # written anew


def test_another_run_is_refused_and_untouched(finished_run, dataset):
    before = {path: path.read_bytes() for path in finished_run.rglob("*") if path.is_file()}
    base = flags(SMALL | {"output": finished_run, "data.dataset": dataset})
    for extra, expected in {
        (): "already holds a run; go on with it by --checkpoint.resume auto",
        ("--checkpoint.resume", "auto", "--optimizer.learning_rate", "1.0"): "optimizer.learning_rate 0.003 → 1.0",
        ("--checkpoint.resume", "auto", "--model.hidden_size", "64"): "model.hidden_size 32 → 64",
    }.items():
        assert expected in error_line("train.py", *base, *extra)
    assert before == {path: path.read_bytes() for path in finished_run.rglob("*") if path.is_file()}


def test_resuming_a_finished_run_does_nothing(finished_run, dataset):
    before = weights(finished_run), metrics(finished_run), (finished_run / "summary.json").read_text()
    settings = SMALL | {"output": finished_run, "data.dataset": dataset, "checkpoint.resume": "auto"}
    assert "nothing to do" in run(*launcher(1), "train.py", *flags(settings)).stdout
    assert before == (weights(finished_run), metrics(finished_run), (finished_run / "summary.json").read_text())


def test_one_run_on_one_then_two_processes_sees_the_same_samples(dataset, tmp_path):
    """The losses of the steps after the change are those of the unchanged run, to rounding."""
    train(tmp_path / "run", data__dataset=dataset, schedule__shape="constant", schedule__max_steps=6)
    resumed = train(
        tmp_path / "run", processes=2, data__dataset=dataset, schedule__shape="constant", schedule__max_steps=12,
        checkpoint__resume="auto",
    )  # fmt: skip
    whole = train(tmp_path / "whole", data__dataset=dataset, schedule__shape="constant", schedule__max_steps=12)
    assert len(train_losses(resumed)) == 12
    assert max(abs(a - b) for a, b in zip(train_losses(resumed), train_losses(whole), strict=True)) < 1e-4


def test_a_run_that_goes_further_follows_its_new_schedule_at_once(dataset, tmp_path):
    """Its learning rates after the resume are those of a run of the full length."""
    train(tmp_path / "run", data__dataset=dataset, schedule__max_steps=6)
    records = train(tmp_path / "run", data__dataset=dataset, schedule__max_steps=12, checkpoint__resume="auto")
    expected = learning_rate_factor(ScheduleConfig(warmup_steps=2), 12)
    rates = {record["step"]: record["train/learning_rate"] for record in records if "train/learning_rate" in record}
    assert {step: rate for step, rate in rates.items() if step > 6} == {
        step: pytest.approx(0.003 * expected(step - 1), rel=1e-12) for step in range(7, 13)
    }


def test_old_checkpoints_go_and_the_best_stays(dataset, tmp_path):
    """A learning rate that ruins the model after the first evaluation: the best is early, the newest two are late."""
    train(
        tmp_path / "run", data__dataset=dataset, evaluation__every_steps=2, checkpoint__every_steps=2,
        optimizer__learning_rate=3.0, optimizer__max_grad_norm=0, schedule__warmup_steps=9, schedule__max_steps=12,
        schedule__shape="constant",
    )  # fmt: skip
    folder = tmp_path / "run" / "checkpoints"
    best = (folder / "best").resolve().name
    assert {path.name for path in folder.glob("step-*")} == {best, "step-00000010", "step-00000012"}
    assert best < "step-00000010"


def test_a_run_without_a_valid_checkpoint_is_refused_and_kept(finished_run, dataset, tmp_path):
    output = tmp_path / "run"
    shutil.copytree(finished_run, output, symlinks=True)
    for checkpoint in (output / "checkpoints").glob("step-*"):
        (checkpoint / "optimizer.pt").write_bytes(b"")
    before = sorted(output.rglob("*"))
    settings = SMALL | {"output": output, "data.dataset": dataset, "checkpoint.resume": "auto"}
    assert "no valid checkpoint to go on from" in error_line("train.py", *flags(settings))
    assert before == sorted(output.rglob("*"))


def test_a_final_checkpoint_without_a_summary_gets_one(finished_run, dataset, tmp_path):
    """Killed between the last checkpoint and the summary."""
    output = tmp_path / "run"
    shutil.copytree(finished_run, output, symlinks=True)
    expected = (output / "summary.json").read_text()
    (output / "summary.json").unlink()
    settings = SMALL | {"output": output, "data.dataset": dataset, "checkpoint.resume": "auto"}
    run(*launcher(1), "train.py", *flags(settings))
    assert (output / "summary.json").read_text() == expected
