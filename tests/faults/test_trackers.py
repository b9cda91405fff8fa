"""Faults 33 to 35: trackers that fail, and runs that go on in them."""

import contextlib
import json
import shutil
import sqlite3
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import LAUNCH_TWO, metrics, script, train, train_losses
from processes import command, summary, training

WANDB = {"tracking__trackers": "[tensorboard,wandb]"}


@pytest.fixture(scope="module")
def dataset(small_dataset) -> Path:
    return small_dataset


def test_33_wandb_without_a_key_and_with_a_dead_network(dataset, tmp_path):
    """A warning, and JSON lines and TensorBoard go on. Without a key the run is kept offline."""
    result = script(*command(tmp_path / "keyless", dataset, **WANDB))
    assert "warning: W&B has no API key" in result.stderr
    assert list((tmp_path / "keyless").glob("wandb/offline-run-*/*.wandb"))
    dead = {"WANDB_API_KEY": "0" * 40, "WANDB_BASE_URL": "http://127.0.0.1:9", "WANDB_INIT_TIMEOUT": "3",
            "WANDB_HTTP_TIMEOUT": "1"}  # fmt: skip
    result = script(*command(tmp_path / "dead", dataset, **WANDB), **dead)
    assert "warning: tracker wandb is off from here" in result.stderr
    for name in ("keyless", "dead"):
        assert len(train_losses(metrics(tmp_path / name))) == 10 and summary(tmp_path / name)["finished"] is True
        assert len(tensorboard_steps(tmp_path / name)) == 10


def test_34_a_resumed_run_goes_on_in_its_trackers(dataset, tmp_path):
    """Killed behind a checkpoint and resumed before where it was: the same W&B run, no step twice in any of them. W&B's
    helper writes an offline run in blocks of 32 KiB: of a killed one the last is missing there, and only there."""
    output = tmp_path / "run"
    options = {**WANDB, "schedule__max_steps": 100, "checkpoint__every_steps": 40}
    with training(command(output, dataset, **options), output) as started:
        started.wait_for_step(70)
        started.process.kill()
        started.end()
    logged = max(record["step"] for record in metrics(output))
    result = script(*command(output, dataset, **options, checkpoint__resume="auto"))
    assert "at step 40" in result.stdout and logged >= 70
    assert [record["step"] for record in metrics(output) if "train/loss" in record] == list(range(1, 101))
    assert tensorboard_steps(output) == list(range(1, 101))
    files = sorted(output.glob("wandb/offline-run-*/run-*.wandb"))
    assert len(files) == 2 and len({file.stem.removeprefix("run-") for file in files}) == 1  # one run, two launches
    first, second = map(wandb_steps, files)
    assert len(first) > 20 and first == list(range(1, len(first) + 1))
    assert second == list(range(logged + 1, 101))


def test_34_what_was_sent_is_remembered_over_two_kills(dataset, tmp_path):
    """Sent up to step 9, killed at 7 when it went on: the third launch sends nothing before step 10."""
    output = tmp_path / "run"
    options = {"data__dataset": dataset, "checkpoint__every_steps": 4, **WANDB}
    train(output, schedule__max_steps=4, **options)
    records = [json.dumps({"step": step, "train/loss": 1.0}) + "\n" for step in range(1, 10)]
    for last, name in ((9, "first"), (7, "second")):
        (output / "metrics.jsonl").write_text("".join(records[:last]))
        shutil.rmtree(output / "checkpoints" / "step-00000006", ignore_errors=True)
        train(output, schedule__max_steps=6, **options, checkpoint__resume="auto")
        shutil.rmtree(output / "checkpoints" / "step-00000006")
        assert (output / "wandb_id.txt").read_text().split()[1] == "9", name


def tensorboard_steps(output: Path) -> list[int]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(output / "tensorboard" / "plainloop")).Reload()
    return [event.step for event in events.Scalars("train/loss")]


def wandb_steps(file: Path) -> list[int]:
    """The steps whose loss is in the file of an offline run."""
    from wandb.proto import wandb_internal_pb2

    steps = []
    for data in read_log(file.read_bytes()):
        record = wandb_internal_pb2.Record()
        record.ParseFromString(data)
        if record.WhichOneof("record_type") == "history":
            values = {item.key or item.nested_key[0]: item.value_json for item in record.history.item}
            if "train/loss" in values:
                steps.append(int(json.loads(values["_step"])))
    return steps


def read_log(content: bytes) -> Iterator[bytes]:
    """The records of a file in LevelDB's log format, behind W&B's seven bytes: pieces with a head of CRC, length and
    kind (whole, first, middle, last), none across a border of 32 KiB."""
    position, record = 7, b""
    while position + 7 <= len(content):
        if (left := 2**15 - position % 2**15) < 7:
            position += left
            continue
        length, kind = struct.unpack("<HB", content[position + 4 : position + 7])
        record += content[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):
            yield record
            record = b""


def test_35_a_nested_configuration_reaches_tensorboard_flat(dataset, tmp_path):
    import yaml

    output = tmp_path / "run"
    train(output, data__dataset=dataset, tracking__trackers="[tensorboard]")
    (file,) = (output / "tensorboard" / "plainloop").rglob("hparams.yml")
    values = yaml.safe_load(file.read_text())
    assert values["model.hidden_size"] == 32 and values["schedule.max_steps"] == 10
    assert not any(isinstance(value, dict | list) for value in values.values())


@pytest.mark.slow
def test_a_signal_ends_a_run_with_its_tracker_in_order(dataset, tmp_path):
    """torch's launcher signals the whole session of a rank, W&B's helper process in it."""
    output = tmp_path / "run"
    with training([*LAUNCH_TWO, *command(output, dataset, **WANDB, schedule__max_steps=4000)], output) as started:
        started.wait_for_step(5)
        started.process.terminate()
        started.end()
        assert summary(output)["reason"] == "SIGTERM", started.text()[-3000:]


def test_34_mlflow_and_trackio_hold_one_run_for_all_launches(dataset, tmp_path):
    """Both are read from their databases: each step once, although options have changed between the launches."""
    where = {"MLFLOW_TRACKING_URI": f"sqlite:///{tmp_path}/mlflow.db", "TRACKIO_DIR": str(tmp_path / "trackio")}
    options = {"tracking__trackers": "[mlflow,trackio]", "checkpoint__resume": "auto"}
    for steps in (4, 6):  # in processes of their own: both trackers keep the run that is active in the process
        script(*command(tmp_path / "run", dataset, schedule__max_steps=steps, **options), **where)
    # trackio has one row for all that is logged at once, here also by the save and the evaluation at the end.
    for path, query in (
        (tmp_path / "mlflow.db", "select run_uuid, step from metrics where key = 'train/loss'"),
        (tmp_path / "trackio" / "plainloop.db", "select run_name, step from metrics where step not in (4, 6)"),
    ):
        with contextlib.closing(sqlite3.connect(path)) as database:
            rows = database.execute(query).fetchall()
        assert sorted(step for _, step in rows if step not in (4, 6)) == [1, 2, 3, 5], path
        assert len({name for name, _ in rows}) == 1
