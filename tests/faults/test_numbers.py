"""Faults 17 to 20: numbers that go wrong."""

import json
import math
from pathlib import Path

import pytest
import torch
from conftest import flags, metrics, script, train, train_losses
from processes import changed_copy, command, state, summary
from safetensors.torch import load_file

from training.monitoring.guards import check_update
from training.optimization.schedule import learning_rate_factor
from utils.checkpoints import TrainState
from utils.config import GuardConfig, ScheduleConfig
from utils.data.token_dataset import load_manifest

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
        assert check_update(state, config, value, 1.0 + value / 10, scaled=False) is None
    deviation = float(torch.tensor(values, dtype=torch.float64).std())
    assert check_update(state, config, 2.0 + 5.9 * deviation, 1.2, scaled=False) is None
    state.recent.pop()
    assert "a spike: loss" in str(check_update(state, config, 2.0 + 6.1 * deviation, 1.2, scaled=False))
    assert "a spike: gradient norm" in str(check_update(state, config, 2.0, 9.0, scaled=False))
    assert check_update(state, config, 0.1, 0.01, scaled=False) is None
    assert (state.spikes, len(state.recent)) == (2, 5)
    assert check_update(state, GuardConfig(), 1e9, 1e9, scaled=False) is None  # off by default
    assert check_update(state, GuardConfig(), 2.0, math.inf, scaled=True) is None  # the scaler's business


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
