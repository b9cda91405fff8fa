"""Going on with a run, and refusing to; faults/ has the kills, the damage and the signals."""

import shutil

import pytest
from conftest import SMALL, error_line, flags, metrics, script, train
from processes import weights

from training.optimization.schedule import learning_rate_factor
from utils.checkpoints import resolve_checkpoint
from utils.config import ScheduleConfig


def test_another_run_is_refused_and_untouched(finished_run, dataset):
    before = {path: path.read_bytes() for path in finished_run.rglob("*") if path.is_file()}
    base = flags(SMALL | {"output": finished_run, "data.dataset": dataset})
    for extra, expected in {
        (): "already holds a run; continue it with --checkpoint.resume auto",
        ("--checkpoint.resume", "auto", "--optimizer.learning_rate", "1.0"): "optimizer.learning_rate 0.003 → 1.0",
        ("--checkpoint.resume", "auto", "--model.hidden_size", "64"): "model.hidden_size 32 → 64",
    }.items():
        assert expected in error_line("train.py", *base, *extra)
    assert before == {path: path.read_bytes() for path in finished_run.rglob("*") if path.is_file()}


def test_resuming_a_finished_run_does_nothing(finished_run, dataset):
    """Its last evaluation is made once more, because the last checkpoint was written before it."""

    def found() -> tuple:
        records = [record | {"perf/eval_seconds": 0} for record in metrics(finished_run)]
        return weights(finished_run), records, (finished_run / "summary.json").read_text()

    before = found()
    settings = SMALL | {"output": finished_run, "data.dataset": dataset, "checkpoint.resume": "auto"}
    assert "nothing to do" in script("train.py", *flags(settings)).stdout
    assert before == found()


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
    assert resolve_checkpoint(tmp_path / "run").name == best  # of a run, export.py and evaluate.py take that


def test_a_run_without_a_valid_checkpoint_is_refused_and_kept(finished_run, dataset, tmp_path):
    output = tmp_path / "run"
    shutil.copytree(finished_run, output, symlinks=True)
    for checkpoint in (output / "checkpoints").glob("step-*"):
        (checkpoint / "optimizer.safetensors").write_bytes(b"")
    before = sorted(output.rglob("*"))
    settings = SMALL | {"output": output, "data.dataset": dataset, "checkpoint.resume": "auto"}
    assert "no valid checkpoint" in error_line("train.py", *flags(settings))
    assert before == sorted(output.rglob("*"))


def test_a_final_checkpoint_without_a_summary_gets_one(finished_run, dataset, tmp_path):
    """Killed between the last checkpoint and the summary."""
    output = tmp_path / "run"
    shutil.copytree(finished_run, output, symlinks=True)
    expected = (output / "summary.json").read_text()
    (output / "summary.json").unlink()
    settings = SMALL | {"output": output, "data.dataset": dataset, "checkpoint.resume": "auto"}
    script("train.py", *flags(settings))
    assert (output / "summary.json").read_text() == expected
