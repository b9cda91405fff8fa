"""Faults 17 to 20: numbers that go wrong."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from conftest import SMALL, error_line, flags, metrics, script, train, train_losses
from processes import changed_copy, command, state, summary, weights
from safetensors.torch import load_file

from training.monitoring.guards import NO_TARGET, check_update
from training.optimization.schedule import learning_rate_factor
from training.run import Run
from utils.checkpoints import TrainState
from utils.cli import UserError
from utils.config import GuardConfig, ScheduleConfig
from utils.data.order import sample_ids
from utils.data.packing import IGNORED, PaddedLayout
from utils.data.token_dataset import load_manifest, open_split
from utils.evaluation import evaluate

MICRO_LOSS = "                micro_loss = objective(**batch)\n"


@pytest.fixture(scope="module")
def dataset(small_dataset) -> Path:
    return small_dataset


def multiplied(by: str, when: str) -> tuple[str, str]:
    """The change of train.py by which a loss is multiplied, on what is true of `state` and `accelerator` only."""
    return MICRO_LOSS, f"                micro_loss = objective(**batch) * ({by} if {when} else 1.0)\n"


def is_finite(output: Path) -> bool:
    return all(tensor.isfinite().all() for tensor in load_file(output / "checkpoints/last/model.safetensors").values())


@pytest.mark.parametrize(("value", "processes"), [("math.nan", 2), pytest.param("math.inf", 1, marks=pytest.mark.slow)])
def test_17_a_loss_that_is_not_finite(value, processes, dataset, tmp_path):
    """On one rank, in one micro-batch: all ranks stop before the update; the texts are written out; then the run goes on
    without that update when it may."""
    output = tmp_path / "run"
    change = multiplied(value, f"state.samples_seen == 40 and accelerator.process_index == {processes - 1}")
    with changed_copy(change, name=f"nan{processes}") as name:
        arguments = command(output, dataset, name=name, checkpoint__every_steps=2)
        result = script(*arguments, processes=processes, check=False)
        assert result.returncode != 0
        (line,) = [line for line in result.stderr.splitlines() if line.startswith(f"{name}: error:")]
        assert "step 6 is not finite: loss" in line and "guards.max_nonfinite" in line
        assert summary(output) == {"finished": False, "reason": "error", "error": summary(output)["error"],
                                   "optimizer_step": 5}  # fmt: skip
        assert is_finite(output) and state(output)["optimizer_step"] == 4
        rows = [json.loads(row) for row in (output / "bad_batches/samples-0000000040.jsonl").read_text().splitlines()]
        assert len(rows) == 8 and {row["rank"] for row in rows} == set(range(processes))
        assert all(row["text"] and row["step"] == 6 for row in rows)
        script(*arguments, *flags({"checkpoint.resume": "auto", "guards.max_nonfinite": 1}), processes=processes)
    end = state(output)
    assert (end["optimizer_step"], end["samples_seen"], end["skipped"], end["nonfinite"]) == (10, 88, 1, 1)
    assert is_finite(output) and summary(output)["finished"] is True
    rates = [record["train/learning_rate"] for record in metrics(output) if "train/loss" in record]
    factor = learning_rate_factor(ScheduleConfig(warmup_steps=2), 10)  # of the updates that were made
    assert rates == pytest.approx([0.003 * factor(step) for step in range(10)], rel=1e-12)
    assert len(train_losses(metrics(output))) == 10 and all(
        math.isfinite(loss) for loss in train_losses(metrics(output))
    )


def test_17_a_loss_that_is_infinite_with_gradients_that_are_not(dataset, tmp_path):
    """Which the norm of the gradients would not show."""
    output = tmp_path / "run"
    change = (
        "            loss_sum += micro_loss.detach()\n",
        "            loss_sum += micro_loss.detach() + (math.inf if state.samples_seen == 40 else 0.0)\n",
    )
    with changed_copy(change, name="inf") as name:
        result = script(*command(output, dataset, name=name), check=False)
    assert result.returncode == 2 and "step 6 is not finite: loss inf, gradient norm 0." in result.stderr


def test_18_infinite_gradients_under_a_scaler(dataset, tmp_path):
    """A scaler as fp16 has it on a GPU, on the CPU, from a scale at which gradients overflow: updates and schedule are
    left out until the scale has come down, and resuming takes the scale along."""
    output = tmp_path / "run"
    before = "    optimizer = build_optimizer("
    after = "    average = WeightAverage("
    changes = (
        (MICRO_LOSS, MICRO_LOSS.replace("\n", " * 2.0**30\n")),  # it makes no difference to AdamW
        (before, "    accelerator.scaler = torch.amp.GradScaler('cpu', init_scale=2.0**125)\n" + before),
        (after, "    accelerator.native_amp, accelerator.state._mixed_precision = True, 'fp16'\n" + after),
    )
    with changed_copy(*changes, name="scaler") as name:
        script(*command(output, dataset, name=name, schedule__max_steps=4))
        end = state(output)
        script(*command(output, dataset, name=name, schedule__max_steps=6, checkpoint__resume="auto"))
    assert end["skipped"] > 2 and end["optimizer_step"] == 4
    assert end["samples_seen"] == 8 * (4 + end["skipped"])
    rates = [record["train/learning_rate"] for record in metrics(output) if "train/loss" in record]
    assert rates[:2] == [0.0, 0.0015]  # the schedule of the updates that were made
    assert state(output)["skipped"] == end["skipped"] and is_finite(output)
    record = json.loads((output / "checkpoints/last/state.json").read_text())
    assert record["scaler"]["scale"] == 2.0 ** (125 - end["skipped"])


def test_19_a_spike_is_left_out_and_limited(dataset, tmp_path):
    options = {"schedule__max_steps": 24, "guards__spike_deviations": 6, "guards__spike_window": 16}
    whole = train(tmp_path / "whole", data__dataset=dataset, **options)
    assert state(tmp_path / "whole")["spikes"] == 0
    with changed_copy(multiplied("30.0", "state.samples_seen in (120, 160)"), name="spike") as name:
        output = tmp_path / "run"
        result = script(*command(output, dataset, name=name, **options))
        assert result.stderr.count("the update is skipped: a spike: loss") == 2
        # A run that is killed and resumed has the same window: it leaves out the same.
        again = tmp_path / "again"
        script(
            *command(again, dataset, name=name, **{**options, "schedule__max_steps": 18}, schedule__shape="constant")
        )
        script(*command(again, dataset, name=name, **options, schedule__shape="constant", checkpoint__resume="auto"))
        assert state(again)["spikes"] == 2
        result = script(
            *command(tmp_path / "limited", dataset, name=name, guards__max_spikes=1, **options), check=False
        )
        assert result.returncode == 2 and "guards.max_spikes" in result.stderr
    end = state(output)
    assert (end["optimizer_step"], end["samples_seen"], end["spikes"]) == (24, 208, 2)
    assert len(end["recent"]) == 16
    assert train_losses(metrics(output))[:15] == train_losses(whole)[:15]  # up to the first spike
    assert max(train_losses(metrics(output))) < 10


def test_19_the_rule_is_the_stated_one():
    """More than 6 standard deviations above the mean of the window, once the window is half full; never below it."""
    config = GuardConfig(spike_deviations=6, spike_window=8)
    state = TrainState(dataset_key="")
    values = [2.0, 2.1, 1.9, 2.0]
    for value in values:
        assert check_update(state, config, value, 1.0 + value / 10, targets=9, scaled=False) is None
    deviation = float(torch.tensor(values, dtype=torch.float64).std())
    assert check_update(state, config, 2.0 + 5.9 * deviation, 1.2, targets=9, scaled=False) is None
    state.recent.pop()
    assert "a spike: loss" in str(check_update(state, config, 2.0 + 6.1 * deviation, 1.2, targets=9, scaled=False))
    assert "a spike: gradient norm" in str(check_update(state, config, 2.0, 9.0, targets=9, scaled=False))
    assert check_update(state, config, 0.1, 0.01, targets=9, scaled=False) is None
    assert (state.spikes, len(state.recent)) == (2, 5)
    assert check_update(state, GuardConfig(), 1e9, 1e9, targets=9, scaled=False) is None  # off by default
    assert check_update(state, GuardConfig(), 2.0, math.inf, targets=9, scaled=True) is None  # the scaler's business
    before = list(state.recent)
    assert check_update(state, config, math.nan, 0.0, targets=0, scaled=False) == NO_TARGET
    assert (state.without_target, state.nonfinite, state.recent) == (1, 0, before)


def without_targets(when: str) -> tuple[str, str]:
    """The change of train.py by which no token of a global batch is a target."""
    line = '        run.beat("training")\n'
    return (
        line,
        f'{line}        for batch in micro_batches:\n            batch["targets"][:] = -100 if {when} else batch["targets"]\n',
    )


@pytest.mark.parametrize("processes", [1, 2])
def test_a_batch_without_a_target_makes_no_update(processes, dataset, tmp_path):
    """It is read and counted, and is no step: the weights are those of a run that skips the same batches for another
    reason. It has no loss that could be logged, enter the spike window or the mean of an interval; it's mentioned once.
    """
    when = "state.samples_seen in (0, 40, 48)"
    options = {"guards__spike_deviations": 50, "tracking__log_every_steps": 4, "processes": processes}
    runs = {"bare": without_targets(when), "faulty": multiplied("math.nan", when)}
    for kind, change in runs.items():
        with changed_copy(change, name=f"{kind}{processes}") as name:
            arguments = command(tmp_path / kind, dataset, name=name, guards__max_nonfinite=3, **{
                key: value for key, value in options.items() if key != "processes"
            })  # fmt: skip
            result = script(*arguments, processes=processes)
            assert result.stderr.count("no token of the global batch is a target") == (kind == "bare")
    bare, faulty = (state(tmp_path / kind) for kind in runs)
    assert weights(tmp_path / "bare") == weights(tmp_path / "faulty")
    same = ("optimizer_step", "samples_seen", "recent", "interval_targets")
    assert [bare[name] for name in same] == [faulty[name] for name in same] and bare["samples_seen"] == 8 * 13
    assert (bare["without_target"], bare["skipped"], bare["nonfinite"]) == (3, 0, 0)
    assert bare["tokens_seen"] < faulty["tokens_seen"] and summary(tmp_path / "bare")["without_target"] == 3
    assert train_losses(metrics(tmp_path / "bare")) == train_losses(metrics(tmp_path / "faulty"))
    assert not (tmp_path / "bare" / "bad_batches").exists()


def test_rows_without_any_target_are_refused(dataset, tmp_path):
    """The run would read on for ever, and report a loss of 0."""
    options = {"objective.name": "masked", "objective.masked.mask_rate": 1e-9, "model.architecture": "bert"}
    settings = SMALL | {"output": tmp_path / "run", "data.dataset": dataset} | options
    assert "nothing to predict" in error_line("train.py", *flags(settings))


def test_an_evaluation_without_a_target_has_no_loss():
    class Silent(torch.nn.Module):
        def forward(self, targets: torch.Tensor) -> torch.Tensor:
            return torch.zeros(())

    with pytest.raises(UserError, match="nothing to predict"):
        evaluate(Accelerator(cpu=True), Silent(), [{"targets": torch.full((2, 4), IGNORED)}])


def test_the_logged_loss_is_the_mean_over_the_targets_of_its_interval(dataset, tmp_path):
    """By the losses and targets of single steps; on two processes; after a resume exactly. The guards see single steps."""
    layout = PaddedLayout(open_split(dataset, "train"), 64, 0)
    rows = sample_ids(0, 80, len(layout), seed=1234).reshape(10, 8)
    targets = [int((layout.__getitems__(step.tolist())["targets"] != IGNORED).sum()) for step in rows]
    options = {"data__layout": "padded", "guards__spike_deviations": 50}
    single = train_losses(train(tmp_path / "single", data__dataset=dataset, **options))
    options |= {"tracking__log_every_steps": 4, "checkpoint__every_steps": 6}
    expected = [single[0], *(np.average(single[a:b], weights=targets[a:b]) for a, b in ((1, 4), (4, 8), (8, 10)))]
    assert max(targets) > 1.1 * min(targets) and len(set(expected)) == 4
    for processes in (1, 2):
        output = tmp_path / f"{processes}"
        records = train(output, processes=processes, data__dataset=dataset, **options)
        assert [record["step"] for record in records if "train/loss" in record] == [1, 4, 8, 10]
        assert train_losses(records) == pytest.approx(expected, rel=1e-6)
        assert [loss for loss, _ in state(output)["recent"]] == pytest.approx(single, rel=1e-6)
    with changed_copy(
        multiplied("math.nan", "state.samples_seen == 56"), name="ends"
    ) as name:  # in the midst of 5 to 8
        assert script(*command(tmp_path / "resumed", dataset, name=name, **options), check=False).returncode == 2
    assert len(train_losses(metrics(tmp_path / "resumed"))) == 2
    resumed = train(tmp_path / "resumed", data__dataset=dataset, checkpoint__resume="auto", **options)
    assert train_losses(resumed) == train_losses(metrics(tmp_path / "1"))


def test_the_speed_leaves_out_the_first_step_of_a_launch(dataset, tmp_path, monkeypatch):
    """Which compiles; unless there is no other step in the interval."""
    marks, log_step = [], Run.log_step

    def remember(run: Run, *figures: float, shown: bool) -> None:
        log_step(run, *figures, shown=shown)
        marks.append((run.state.tokens_seen, run.state.train_seconds))

    monkeypatch.setattr(Run, "log_step", remember)
    options = {"data__dataset": dataset, "tracking__log_every_steps": 4, "checkpoint__every_steps": 2}
    train(tmp_path / "run", **options, schedule__max_steps=6)
    records = train(tmp_path / "run", **options, schedule__max_steps=9, checkpoint__resume="auto")
    found = {record["step"]: record["perf/tokens_per_second"] for record in records if "train/loss" in record}
    marks = [(0, 0.0), *marks]
    expected = {1: (0, 1), 4: (1, 4), 6: (4, 6), 8: (7, 8), 9: (8, 9)}
    for step, (start, end) in expected.items():
        (tokens, seconds), (all_tokens, all_seconds) = marks[start], marks[end]
        assert found[step] == pytest.approx((all_tokens - tokens) / (all_seconds - seconds), rel=1e-9), step


def test_an_evaluation_that_is_not_finite_is_never_the_best_and_is_null_in_the_files(dataset, tmp_path):
    """Steps 2 and 4 of 6 are not; at the end of another run nothing was finite. JSON knows neither NaN nor infinity."""

    def strict(text: str) -> dict:
        return json.loads(text, parse_constant=lambda constant: pytest.fail(f"{constant} in a file"))

    line = "                    found = look(run.poll)\n"
    for kind, steps, best in (("some", (2, 4), 6), ("all", (2, 4, 6), None)):
        change = (line, f"{line}                    found.loss = math.nan if step in {steps} else found.loss\n")
        options = {"evaluation__every_steps": 2, "schedule__max_steps": 6, "evaluation__early_stopping_patience": 4}
        with changed_copy(change, name=kind) as name:
            script(*command(tmp_path / kind, dataset, name=name, **options))
        lines = (tmp_path / kind / "metrics.jsonl").read_text().splitlines()
        losses = [record["eval/loss"] for record in map(strict, lines) if "eval/loss" in record]
        assert [loss is None for loss in losses] == [step in steps for step in (2, 4, 6)]
        found = strict((tmp_path / kind / "summary.json").read_text())
        assert (found["finished"], found["best_step"], found["best_loss"] is None) == (True, best, best is None)
        assert state(tmp_path / kind)["evaluations_without_improvement"] == 2  # before the last
        assert (tmp_path / kind / "loss.png").exists()


def test_20_an_uneven_last_evaluation_batch(dataset, tmp_path):
    """Every target is counted once, whatever the size of the batches and the number of processes."""
    splits = load_manifest(dataset)["splits"]["validation"]
    rows = -(-splits["tokens"] // 64)
    assert rows % 3 and rows % 4
    losses = []
    for processes, size in ((1, 1), (1, 3), (2, 2)):
        output = tmp_path / f"{processes}-{size}"
        train(output, processes=processes, data__dataset=dataset, evaluation__per_device_batch_size=size)
        (record,) = [record for record in metrics(output) if "eval/loss" in record]
        losses.append(record["eval/loss"])
        bits = record["eval/bits_per_byte"] * splits["bytes"]
        targets = splits["tokens"] - splits["documents"]
        assert bits * math.log(2) / record["eval/loss"] == pytest.approx(targets, rel=1e-9)
    assert losses == pytest.approx(losses[:1] * 3, abs=1e-5)
