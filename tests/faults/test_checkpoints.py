"""Faults 1 to 16: what befalls checkpoints. Real kills, real damage, a real full disk."""

import contextlib
import json
import os
import pickle
import re
import shutil
import subprocess
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from conftest import ROOT, SMALL, call, error_line, flags, metrics, script, train, train_losses
from processes import changed_copy, command, invalid_checkpoints, kill_at, state, summary, training, weights
from safetensors.torch import load_file
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from training.optimization.ema import WeightAverage
from training.optimization.schedule import learning_rate_factor
from training.saving.checkpoint_writer import CheckpointWriter
from training.saving.folders import new_folder
from utils.checkpoints import TrainState, find_problem, list_checkpoints
from utils.config import CheckpointConfig, ScheduleConfig
from utils.data.order import sample_ids
from utils.data.packing import PackedLayout
from utils.data.token_dataset import open_split
from utils.files import hash_file

# Dropout, accumulation, evaluations, an average of the weights, patience: all that a resumed run could get wrong.
FULL: dict[str, object] = {
    "model__architecture": "gpt2", "model__dropout": 0.1, "batch__per_device_batch_size": 2, "schedule__max_steps": 24,
    "checkpoint__every_steps": 5, "evaluation__every_steps": 8, "optimizer__ema_decay": 0.9,
    "evaluation__early_stopping_patience": 9, "tracking__sample_every_steps": 12, "tracking__sample_max_new_tokens": 8,
}  # fmt: skip
# Checkpoints of some 20 MB, so that there is time to kill within a save.
LARGE: dict[str, object] = {
    "model__hidden_size": 512, "model__intermediate_size": 512, "schedule__max_steps": 12, "checkpoint__every_steps": 2,
    "batch__global_batch_size": 4, "checkpoint__keep_last": 1,
}  # fmt: skip
RESUME = {"checkpoint__resume": "auto"}


@pytest.fixture(scope="module")
def dataset(small_dataset) -> Path:
    return small_dataset


@pytest.fixture(scope="module")
def whole_run(dataset, tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("whole") / "run"
    script(*command(output, dataset, **FULL))
    return output


@pytest.fixture(scope="module")
def large_run(dataset, tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("large") / "run"
    script(*command(output, dataset, **LARGE))
    return output


@pytest.fixture(scope="module")
def kept_run(dataset, tmp_path_factory) -> Path:
    """A run of ten steps that keeps its checkpoints of steps 4, 6, 8 and 10."""
    output = tmp_path_factory.mktemp("kept") / "run"
    train(output, data__dataset=dataset, checkpoint__every_steps=2, checkpoint__keep_last=4)
    return output


def kill_in(phase: str, output: Path, arguments: list[str]) -> None:
    """Kill a training while its checkpoints are in a phase, as it has noted itself; again if the phase was over."""
    for _ in range(6):
        shutil.rmtree(output / ".heartbeats", ignore_errors=True)  # of an earlier launch
        with training(arguments, output) as started:
            started.wait_for_heartbeat(f"checkpoint {phase}")
            started.kill()
        left = [path.name for path in (output / "checkpoints").glob(".tmp-step-*")]
        if f"checkpoint {phase}" in (output / ".heartbeats" / "rank-0").read_text() and left:
            assert all(name.endswith(".removed") == (phase == "rotating") for name in left)
            return
    pytest.fail(f"{phase} was never hit")


# Removing a checkpoint pauses after its first file, so that a busy machine does not miss the moment.
SLOW_REMOVAL = (
    "def main(config: TrainConfig) -> None:\n",
    """def main(config: TrainConfig) -> None:
    import shutil
    remove = shutil.rmtree
    def remove_slowly(path, **options):
        for file in sorted(Path(path).glob("*"))[:1] if str(path).endswith(".removed") else ():
            file.unlink()
            time.sleep(3)
        remove(path, **options)
    shutil.rmtree = remove_slowly
""",
)


@pytest.mark.parametrize(
    "phase", [pytest.param("writing", id="01_while_saving"), pytest.param("rotating", id="03_while_removing")]
)
def test_kill_9(phase, large_run, dataset, tmp_path):
    """1 and 3: no half of a checkpoint is ever to be seen, the last whole one loads, and the end is the same."""
    output = tmp_path / "run"
    arguments = command(output, dataset, **LARGE, **RESUME)
    if phase == "writing":
        kill_in("writing", output, arguments)
    else:
        with changed_copy(SLOW_REMOVAL, name="removal") as name:
            kill_in("rotating", output, [name, *arguments[1:]])
    assert invalid_checkpoints(output) == []
    script(*arguments)
    assert invalid_checkpoints(output) == []
    assert weights(output) == weights(large_run)
    assert not list((output / "checkpoints").glob(".tmp-step-*"))


@pytest.mark.parametrize("processes", [1, 2])
def test_02_kill_9_while_training(processes, whole_run, dataset, tmp_path):
    """The resumed run's weights, optimizer, average, schedule, state and every logged number are the uninterrupted one's."""
    whole, broken = whole_run if processes == 1 else tmp_path / "whole", tmp_path / "broken"
    if processes == 2:
        script(*command(whole, dataset, **FULL), processes=2)
    kill_at(13, command(broken, dataset, **FULL), broken, processes)
    script(*command(broken, dataset, **FULL, **RESUME), processes=processes)
    check_equal(broken, whole)


def check_equal(ours: Path, theirs: Path) -> None:
    assert weights(ours) == weights(theirs)
    records = [json.loads((path / "checkpoints/last/state.json").read_text()) for path in (ours, theirs)]
    for record in records:
        record["state"].pop("train_seconds")
    assert records[0] == records[1]
    if (theirs / "checkpoints/last/average.safetensors").exists():
        averages = [load_file(path / "checkpoints/last/average.safetensors") for path in (ours, theirs)]
        assert all(torch.equal(averages[0][name], value) for name, value in averages[1].items())
    logged = [[drop_timings(record) for record in metrics(path)] for path in (ours, theirs)]
    assert [record for record in logged[0] if len(record) > 1] == [record for record in logged[1] if len(record) > 1]
    assert (ours / "samples.md").read_text() == (theirs / "samples.md").read_text()
    assert summary(ours)["finished"] is True


def drop_timings(record: dict) -> dict:
    return {name: value for name, value in record.items() if not name.startswith("perf/")}


@pytest.mark.slow
def test_02_kill_9_with_loader_workers_and_bf16(dataset, tmp_path):
    options = {**FULL, "data__num_workers": 2, "optimizer__name": "muon", "schedule__max_steps": 12}
    options |= {"optimizer__ema_decay": "null", "evaluation__every_steps": 100}  # bf16 is slow on many CPUs
    bf16 = {"ACCELERATE_MIXED_PRECISION": "bf16"}
    script(*command(tmp_path / "whole", dataset, **options), **bf16)
    with training(command(tmp_path / "broken", dataset, **options), tmp_path / "broken", **bf16) as started:
        started.wait_for_step(7)
        started.kill()
    script(*command(tmp_path / "broken", dataset, **options, **RESUME), **bf16)
    check_equal(tmp_path / "broken", tmp_path / "whole")


def test_a_checkpoint_is_whole_or_not_there(tmp_path):
    """What is written becomes visible by one renaming, and only if nothing went wrong before."""
    with new_folder(tmp_path / "step-00000003") as temporary:
        (temporary / "state.json").write_text("{}")
        assert list_checkpoints(tmp_path) == []
        identity = temporary.stat().st_ino
    (checkpoint,) = tmp_path.iterdir()
    assert checkpoint.name == "step-00000003" and checkpoint.stat().st_ino == identity
    assert find_problem(checkpoint) is None
    with contextlib.suppress(OSError), new_folder(tmp_path / "step-00000004") as temporary:
        (temporary / "state.json").write_text("{")
        raise OSError("a full disk")
    assert list(tmp_path.iterdir()) == [checkpoint]


def test_a_checkpoint_is_of_its_moment_whatever_is_trained_while_it_is_written(dataset, tmp_path):
    model = LlamaForCausalLM(LlamaConfig(
        vocab_size=50, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
    ))  # fmt: skip
    optimizer = torch.optim.AdamW(model.parameters())
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    average = WeightAverage(model, 0.9)
    model(torch.arange(8)[None], labels=torch.arange(8)[None]).loss.backward()
    optimizer.step()
    tensors = [
        *model.parameters(),
        *average.averages.values(),
        *(state["exp_avg"] for state in optimizer.state.values()),
    ]
    before = sorted(float(tensor.detach().double().sum()) for tensor in tensors)
    trained = threading.Event()
    writer = CheckpointWriter(
        Accelerator(cpu=True), tmp_path, CheckpointConfig(), AutoTokenizer.from_pretrained(dataset / "tokenizer"),
        warn=pytest.fail, note=lambda words: words != "writing" or trained.wait(60),
    )  # fmt: skip
    state = TrainState(dataset_key="", optimizer_step=3)
    writer.save(state, model, optimizer, scheduler, average, wait=False)
    with torch.no_grad():
        for tensor in tensors:
            tensor.add_(1)
    state.optimizer_step = 4
    trained.set()
    writer.finish()
    checkpoint = tmp_path / "step-00000003"
    files = {name: load_file(checkpoint / f"{name}.safetensors") for name in ("model", "average", "optimizer")}
    saved = [tensor for tensors in files.values() for name, tensor in tensors.items()
             if name.split(".")[-1] not in ("exp_avg_sq", "step")]  # fmt: skip
    assert sorted(float(tensor.double().sum()) for tensor in saved) == before
    assert json.loads((checkpoint / "state.json").read_text())["state"]["optimizer_step"] == 3


# ---- Damage: (number, what is done to the newest checkpoint, what is said of it)


def truncate(checkpoint: Path) -> None:
    path = checkpoint / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def flip_bit(checkpoint: Path) -> None:
    path = checkpoint / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def change_state(checkpoint: Path, change: Callable[[dict], object], consistent: bool = False) -> None:
    record = json.loads((checkpoint / "state.json").read_text())
    change(record)
    (checkpoint / "state.json").write_text(json.dumps(record))
    if consistent:
        make_consistent(checkpoint)


def make_consistent(checkpoint: Path) -> None:
    """A manifest that agrees with what is there now, as somebody with bad intentions would write it."""
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    for name in manifest:
        path = checkpoint / name
        manifest[name] = {"bytes": path.stat().st_size, "sha256": hash_file(path)}
    (checkpoint / "manifest.json").write_text(json.dumps(manifest))


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "04_truncated_model": (truncate, "model.safetensors has"),
    "05_empty_optimizer": (lambda path: (path / "optimizer.safetensors").write_bytes(b""), "optimizer.safetensors has 0 bytes"),
    "06_missing_scheduler": (lambda path: change_state(path, lambda record: record.pop("scheduler")), "state.json has"),
    "07_one_flipped_bit": (flip_bit, "model.safetensors has changed since it was saved"),
    # The random numbers of a step follow from the seed and `samples_seen`.
    "08_random_state_gone": (lambda path: (path / "state.json").unlink(), "state.json is missing"),
    "08_random_state_changed": (
        lambda path: change_state(path, lambda record: record["state"].update(samples_seen=72)), "state.json has",
    ),
    "09_empty_folder": (lambda path: [file.unlink() for file in path.iterdir()], "manifest.json is missing"),
}  # fmt: skip


@pytest.mark.parametrize("name", DAMAGE)
def test_damage(name, kept_run, dataset, tmp_path):
    """4 to 9: named, passed over, the next older one is used, and the run ends as it did."""
    damage, said = DAMAGE[name]
    output = shutil.copytree(kept_run, tmp_path / "run", symlinks=True)
    newest = output / "checkpoints" / "step-00000010"
    damage(newest)
    arguments = flags(SMALL | {"output": output, "data.dataset": dataset, "checkpoint.every_steps": 2})
    code, out, err = call("train.py", *arguments, "--checkpoint.resume", "auto", "--checkpoint.keep_last", "4")
    assert code == 0, err
    assert f"{newest} is not valid and is skipped: {said}" in out
    assert f"resumed from {output}/checkpoints/step-00000008 at step 8" in out
    assert weights(output) == weights(kept_run) and invalid_checkpoints(output) == []
    assert "passed over" not in err


def test_10_a_foreign_folder_among_the_checkpoints(kept_run, dataset, tmp_path):
    output = shutil.copytree(kept_run, tmp_path / "run", symlinks=True)
    shutil.rmtree(output / "checkpoints" / "step-00000010")
    for name in ("step-final", "step-00000010-copy", "notes"):
        (output / "checkpoints" / name).mkdir()
        (output / "checkpoints" / name / "mine.txt").write_text("keep me")
    train(output, data__dataset=dataset, checkpoint__every_steps=2, checkpoint__keep_last=1, **RESUME)
    assert weights(output) == weights(kept_run)
    assert len(list((output / "checkpoints").glob("*/mine.txt"))) == 3


@contextlib.contextmanager
def mounted(folder: Path, options: str) -> Iterator[Path]:
    folder.mkdir()
    if os.geteuid() or subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", folder]).returncode:
        pytest.skip("a file system can only be mounted by root")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", folder], check=True)


@pytest.mark.parametrize(
    "freed", [True, pytest.param(False, marks=pytest.mark.slow)], ids=["and_is_freed", "and_stays_full"]
)
def test_11_the_disk_fills_up(freed, dataset, tmp_path):
    """The run goes on with a warning; it ends well if there is room again, else with one line. What was saved stays."""
    options = {"checkpoint__every_steps": 10, "schedule__max_steps": 150, "tracking__trackers": "[tensorboard]",
               "evaluation__every_steps": 20}  # fmt: skip
    with mounted(tmp_path / "disk", "size=8M") as disk:
        output = disk / "run"
        filler = disk / "filler"
        arguments = command(output, dataset, **options)
        with training(arguments, output, log=tmp_path / "log") as process:
            process.wait_for((output / "checkpoints" / "last").exists)
            with filler.open("wb", buffering=0) as file, contextlib.suppress(OSError):
                while True:
                    file.write(bytes(4096))
            process.wait_for(lambda: "a checkpoint could not be written" in process.text())
            assert "the earlier ones are untouched" in process.text() and "Traceback" not in process.text()
            if freed:
                filler.unlink()
            code = process.end()
        assert invalid_checkpoints(output) == []
        if freed:
            assert code == 0 and state(output)["optimizer_step"] == 150
            assert len(train_losses(metrics(output))) == 150  # the lines that could not be written came later
        else:
            assert code == 2
            assert (
                process.text().strip().splitlines()[-1].startswith("train.py: error: cannot write the last checkpoint")
            )
            assert "No space left" in process.text() and state(output)["optimizer_step"] == 10


@pytest.mark.parametrize("options", ["size=4k", "size=1M,nr_inodes=3", "size=1M,nr_inodes=2"])
def test_11_the_disk_is_full_from_the_start(options, dataset, tmp_path):
    """Its one page holds a file; or it has room for two files or folders, or one: the run needs three for its lock."""
    with mounted(tmp_path / "disk", options) as disk:
        if "size=4k" in options:
            (disk / "filler").write_bytes(bytes(4096))
        before = sorted(disk.rglob("*"))
        output = disk / "runs" / "new"
        line = error_line("train.py", *flags(SMALL | {"data.dataset": dataset, "output": output}))
        assert f"run folder {output} cannot be " in line and "No space left" in line
        assert sorted(disk.rglob("*")) == before


@pytest.mark.parametrize("obstacle", ["file", "read-only"])
def test_12_the_output_cannot_be_written(obstacle, dataset, tmp_path):
    """Refused at the start."""
    settings = SMALL | {"data.dataset": dataset}
    if obstacle == "file":
        (tmp_path / "run").write_text("mine")
        line = error_line("train.py", *flags(settings | {"output": tmp_path / "run"}))
        assert "cannot be made" in line and (tmp_path / "run").read_text() == "mine"
    else:
        with mounted(tmp_path / "disk", "size=1M,ro") as disk:
            assert "Read-only file system" in error_line("train.py", *flags(settings | {"output": disk / "run"}))


def test_13_two_runs_on_one_folder(dataset, tmp_path):
    """The second is refused, with the first's process; the first, its lock and its files stay. A kill frees the lock."""
    output = tmp_path / "run"
    arguments = command(output, dataset, schedule__max_steps=2000, data__num_workers=2)
    with training(arguments, output) as first:
        first.wait_for_step(1)
        line = error_line("train.py", *arguments[1:], "--checkpoint.resume", "auto")
        assert f"{output} is in use by process {first.process.pid} on " in line
        os.kill(first.process.pid, 9)  # its loader workers live on for a while
        first.process.wait()
        code, _, err = call(
            "train.py", *arguments[1:-2], *flags({"schedule.max_steps": 3, "checkpoint.resume": "auto"})
        )
        assert code == 0, err


class Malicious:
    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self):
        return (Path.touch, (self.canary,))


@pytest.mark.parametrize("name", ["optimizer.safetensors", "model.safetensors", "average.safetensors"])
def test_14_a_malicious_pickle_in_a_checkpoint(name, dataset, tmp_path):
    """In the place of each file with tensors, and with hashes that agree: refused in a line, and not executed."""
    output, canary = tmp_path / "run", tmp_path / "executed"
    options = {"data__dataset": dataset, "optimizer__ema_decay": 0.9}
    train(output, schedule__max_steps=2, **options)
    checkpoint = output / "checkpoints" / "step-00000002"
    (checkpoint / name).write_bytes(pickle.dumps(Malicious(canary)))
    make_consistent(checkpoint)
    assert find_problem(checkpoint) is None
    settings = SMALL | {"output": output, "data.dataset": dataset, "optimizer.ema_decay": 0.9, "schedule.max_steps": 4}
    assert str(checkpoint) in error_line("train.py", *flags(settings), "--checkpoint.resume", "auto")
    assert not canary.exists()
    pickle.loads((checkpoint / name).read_bytes())
    assert canary.exists()  # it would have been


SHOW_ROWS = (
    "        micro_batches = [next(batches) for _ in range(plan.accumulation)]\n",
    "        micro_batches = [next(batches) for _ in range(plan.accumulation)]\n"
    "        with open(f'{config.output}/rows-{accelerator.process_index}', 'a') as file:\n"
    "            for micro_batch in micro_batches:\n"
    "                for ids in micro_batch['input_ids'].tolist():\n"
    "                    print(state.samples_seen, ids, file=file)\n",
)


def test_15_another_number_of_processes(dataset, tmp_path):
    """1 → 2 → 1 processes in one run of two epochs and a bit: each row once per epoch, in the one order; the rates of a
    run that was never stopped. The rows are those that the loop was given."""
    output = tmp_path / "run"
    layout = PackedLayout(open_split(dataset, "train"), 64)
    epoch = len(layout) // 8 * 8
    assert epoch < len(layout)  # epochs end within a batch
    per_epoch = -(-len(layout) // 8)
    steps = 2 * per_epoch + 3
    options = {"batch__per_device_batch_size": 2, "schedule__shape": "constant"}
    with changed_copy(SHOW_ROWS, name="rows") as name:
        for processes, until in ((1, per_epoch // 2), (2, per_epoch + 4), (1, steps)):
            script(
                *command(output, dataset, name=name, schedule__max_steps=until, **options, **RESUME),
                processes=processes,
            )
    numbers = {tuple(layout.__getitems__([row])["input_ids"][0].tolist()): row for row in range(len(layout))}
    seen: dict[int, list[int]] = {}
    for file in output.glob("rows-*"):
        for line in file.read_text().splitlines():
            samples_seen, ids = line.split(" ", 1)
            seen.setdefault(int(samples_seen), []).append(numbers[tuple(json.loads(ids))])
    assert sorted(seen) == list(range(0, 8 * steps, 8)) and all(len(rows) == 8 for rows in seen.values())
    order = sample_ids(0, 8 * steps, len(layout), 1234).tolist()
    assert all(sorted(rows) == sorted(order[start : start + 8]) for start, rows in seen.items())
    for number in range(2):  # of the rows that the loop was given, an epoch's are each row once
        start, stop = number * len(layout), (number + 1) * len(layout)
        inside = [row for begin in range(start // 8 * 8, stop, 8) for row in seen[begin]]
        assert Counter(inside) - Counter(range(len(layout))) == Counter(
            order[start // 8 * 8 : start] + order[stop : -(-stop // 8) * 8]
        )
    factor = learning_rate_factor(ScheduleConfig(warmup_steps=2, shape="constant"), steps)
    rates = [record["train/learning_rate"] for record in metrics(output) if "train/loss" in record]
    assert np.allclose(rates, [0.003 * factor(step) for step in range(steps)], rtol=1e-12)


def test_16_another_model_tokenizer_or_dataset_is_refused_and_other_logging_is_not(kept_run, dataset, tmp_path):
    output = shutil.copytree(kept_run, tmp_path / "run", symlinks=True)
    settings = SMALL | {"output": output, "data.dataset": dataset, "checkpoint.resume": "auto"}
    before = [path for path in sorted(output.rglob("*")) if path.name != ".lock"]

    def refused(**options: object) -> str:
        return error_line(
            "train.py", *flags(settings | {name.replace("__", "."): value for name, value in options.items()})
        )

    line = refused(model__hidden_size=64, optimizer__beta2=0.99)
    assert "model.hidden_size 32 → 64; optimizer.beta2 0.95 → 0.99" in line
    line = refused(evaluation__early_stopping_weights="average", optimizer__ema_decay=0.99)
    assert "evaluation.early_stopping_weights trained → average" in line
    other = tmp_path / "other"
    assert call("prepare_data.py", "--output", other, "--tokenizer.vocab_size", "1024")[0] == 0
    assert "was trained on another dataset" in refused(data__dataset=other)
    swapped = shutil.copytree(dataset, tmp_path / "swapped")  # a manifest that has not heard of it
    tokenizer = json.loads((swapped / "tokenizer" / "tokenizer.json").read_text())
    tokenizer["model"]["vocab"] = {
        {"e": "t", "t": "e"}.get(token, token): number for token, number in tokenizer["model"]["vocab"].items()
    }
    (swapped / "tokenizer" / "tokenizer.json").write_text(json.dumps(tokenizer))
    assert len(AutoTokenizer.from_pretrained(swapped / "tokenizer")) == 400
    assert "is not the one that" in refused(data__dataset=swapped)
    assert [path for path in sorted(output.rglob("*")) if path.name != ".lock"] == before
    options = {"tracking.log_every_steps": 2, "evaluation.every_steps": 3, "schedule.max_steps": 12, "max_minutes": 30}
    code, out, err = call("train.py", *flags(settings | options))
    assert code == 0, err
    assert "changed since the last launch: tracking.log_every_steps 1 → 2" in out


def test_archived_checkpoints_stay_and_the_command_lists_them(dataset, tmp_path):
    output = tmp_path / "run"
    train(
        output,
        data__dataset=dataset,
        checkpoint__every_steps=1,
        checkpoint__keep_last=1,
        checkpoint__archive_every_steps=4,
    )
    names = ["step-00000004", "step-00000008", "step-00000010"]
    assert sorted(path.name for path in (output / "checkpoints").glob("step-*")) == names
    listing = ["-m", "utils.checkpoints", "list", output]
    assert [line.split()[0] for line in script(*listing).stdout.splitlines()] == names
    flip_bit(output / "checkpoints" / names[1])
    result = script(*listing[:2], "verify", output, check=False)
    assert result.returncode == 1
    verdicts = [line.split("  ")[-1].strip() for line in result.stdout.splitlines()]
    assert verdicts == ["valid", "NOT VALID: model.safetensors has changed since it was saved", "valid"]
    assert script(*listing[:2], "list", ROOT / "docs", check=False).returncode == 2


def test_too_little_disk_for_the_checkpoints_to_come_is_said_before_training(dataset, tmp_path):
    with mounted(tmp_path / "disk", "size=4M") as disk:
        settings = SMALL | {
            "output": disk / "run",
            "data.dataset": dataset,
            "checkpoint.archive_every_steps": 1,
            "model.intermediate_size": 2048,
        }
        line = error_line("train.py", *flags(settings))
        assert re.search(r"will need ([\d.]+) MB for 14 checkpoints of [\d.]+ MB, but the disk has 4\.[12] MB", line)
        assert not (disk / "run" / "config.yaml").exists()


POINTED = [
    ("fsync", "checkpoints/.pointers.json.tmp"),
    ("rename", "checkpoints/.pointers.json.tmp"),
    ("fsync", "checkpoints"),
]


def record_disk_calls(monkeypatch: pytest.MonkeyPatch, under: Path) -> list[tuple[str, str, object]]:
    """From here on, what this process flushes and renames below a folder, in order: (call, path, size or new path)."""
    calls: list[tuple[str, str, object]] = []
    real_fsync, real_rename, real_replace = os.fsync, os.rename, os.replace

    def note(call: str, path: str, what: object) -> None:
        if path.startswith(f"{under}/"):
            calls.append((call, path.removeprefix(f"{under}/"), what))

    def fsync(descriptor: int) -> None:
        real_fsync(descriptor)
        note("fsync", os.readlink(f"/proc/self/fd/{descriptor}"), os.fstat(descriptor).st_size)

    def rename(source: str | Path, target: str | Path) -> None:
        real_rename(source, target)
        note("rename", str(source), str(target).removeprefix(f"{under}/"))

    def replace(source: str | Path, target: str | Path) -> None:
        real_replace(source, target)
        note("rename", str(source), str(target).removeprefix(f"{under}/"))

    for name, wrapped in (("fsync", fsync), ("rename", rename), ("replace", replace)):
        monkeypatch.setattr(os, name, wrapped)
    return calls


def test_a_checkpoint_is_on_the_disk_before_it_has_its_name_and_has_it_before_another_goes(
    dataset, tmp_path, monkeypatch
):
    """Each file, whole, then the folder, then the rename, then the parent, then the pointers, and only then an old one goes.
    What is put in the place of a small file is flushed first, too."""
    output = tmp_path.resolve() / "run"
    calls = record_disk_calls(monkeypatch, output)
    train(
        output, data__dataset=dataset, optimizer__ema_decay=0.9, schedule__max_steps=3, checkpoint__every_steps=1,
        checkpoint__keep_last=3,
    )  # fmt: skip
    for number in range(1, 4):
        name, temporary = f"checkpoints/step-{number:08}", f"checkpoints/.tmp-step-{number:08}"
        sizes = {f"{temporary}/{path.name}": path.stat().st_size for path in (output / name).iterdir()}
        assert {f"{temporary}/{file}" for file in ("manifest.json", "model.safetensors", "state.json")} < sizes.keys()
        renamed = calls.index(("rename", temporary, name))
        before = [(path, size) for call, path, size in calls[:renamed] if call == "fsync" and temporary in path]
        assert dict(before[:-1]) == sizes  # no byte came later
        assert before[-1][0] == temporary
        assert calls[renamed + 1][:2] == ("fsync", "checkpoints")
        assert [call[:2] for call in calls[renamed + 2 : renamed + 5]] == POINTED
    replaced = [path for call, path, target in calls if call == "rename" and not str(target).startswith("checkpoints/")]
    assert {f".{name}.tmp" for name in ("config.yaml", "environment.json", "summary.json")} <= set(replaced)
    for path in replaced:
        place = calls.index(next(entry for entry in calls if entry[:2] == ("rename", path)))
        assert ("fsync", path) in [entry[:2] for entry in calls[:place]], path

    calls.clear()  # the next one takes the place of an old one
    train(
        output, data__dataset=dataset, optimizer__ema_decay=0.9, schedule__max_steps=4, checkpoint__every_steps=1,
        checkpoint__keep_last=1, **RESUME,
    )  # fmt: skip
    order = [(call, path) for call, path, _ in calls if path.startswith("checkpoints")]
    gone = order.index(("rename", "checkpoints/step-00000003"))
    new = order.index(("rename", "checkpoints/.tmp-step-00000004"))
    assert order[new + 1 : new + 5] == [("fsync", "checkpoints"), *POINTED]
    assert new + 5 <= gone


def test_the_parts_that_ranks_write_are_on_the_disk_before_the_checkpoint_has_its_name(tmp_path, monkeypatch):
    folder = tmp_path.resolve()
    calls = record_disk_calls(monkeypatch, folder)
    with new_folder(folder / "step-00000001") as temporary:
        (temporary / "optimizer").mkdir()
        (temporary / "optimizer" / "shard-0.safetensors").write_bytes(b"part")
    order = [(call, path) for call, path, _ in calls]
    renamed = order.index(("rename", ".tmp-step-00000001"))
    for flushed in ("optimizer/shard-0.safetensors", "optimizer", "manifest.json"):
        assert ("fsync", f".tmp-step-00000001/{flushed}") in order[:renamed], flushed
