"""Looking at a model never costs the run; and which checkpoint counts, wherever a run folder has been copied to."""

import errno
import json
import os
import shutil
import stat
import subprocess

import pytest
from conftest import SMALL, call, error_line, flags, metrics, script, train
from processes import changed_copy, invalid_checkpoints, state, summary, weights
from safetensors.torch import load_file

from utils.checkpoints import find_checkpoint, read_pointers

RESUME = {"checkpoint__resume": "auto"}
EVALUATED = "                    found = look(run.poll)\n"


def evaluations(output):
    return [(record["step"], record["eval/loss"]) for record in metrics(output) if "eval/loss" in record]


def failing(when: str) -> tuple[str, str]:
    """The line of train.py that evaluates, and one that raises at some steps, as an evaluation out of memory does."""
    return (
        EVALUATED,
        f"                    if {when}:\n                        raise MemoryError('no room')\n{EVALUATED}",
    )


OFTEN = {"schedule__max_steps": 12, "evaluation__every_steps": 3, "checkpoint__every_steps": 4,
         "checkpoint__keep_last": 9}  # fmt: skip


@pytest.fixture(scope="module")
def whole(dataset, tmp_path_factory):
    """Twelve steps; an evaluation every third, a checkpoint every fourth."""
    output = tmp_path_factory.mktemp("runs") / "whole"
    train(output, data__dataset=dataset, **OFTEN)
    return output


@pytest.mark.parametrize("step", [9, 12], ids=["no_save_is_due", "a_save_is_due"])
def test_an_evaluation_that_fails_costs_no_step(step, whole, dataset, tmp_path):
    """The step is saved, the evaluation is still to be made, and the resumed run makes it: once in all."""
    output = tmp_path / "run"
    settings = SMALL | {"output": output, "data.dataset": dataset} | {
        name.replace("__", "."): value for name, value in OFTEN.items()
    }  # fmt: skip
    with changed_copy(failing(f"step == {step}"), name=f"looks_{step}") as name:
        result = script(name, *flags(settings), check=False)
    assert result.returncode == 1 and "no room" in result.stderr
    assert summary(output)["reason"] == "error"
    assert state(output)["optimizer_step"] == step > state(output)["last_evaluated_step"]
    assert invalid_checkpoints(output) == []
    train(output, data__dataset=dataset, **OFTEN, **RESUME)
    assert weights(output) == weights(whole)
    assert evaluations(output) == evaluations(whole)
    assert summary(output)["best_step"] == summary(whole)["best_step"]


def test_a_checkpoint_is_whole_before_the_evaluation_of_its_step(dataset, tmp_path):
    """`best` is set afterwards, to the checkpoint that is there."""
    output = tmp_path / "run"
    look = "run.tracker.log({'eval/there': (run.folder / 'checkpoints' / 'step-00000004' / 'manifest.json').exists()}, step)\n"
    settings = SMALL | {"output": output, "data.dataset": dataset, "evaluation.every_steps": 4,
                        "checkpoint.every_steps": 4, "schedule.max_steps": 4}  # fmt: skip
    with changed_copy((EVALUATED, f"                    {look}{EVALUATED}"), name="before") as name:
        script(name, *flags(settings))
    assert [record["eval/there"] for record in metrics(output) if "eval/there" in record] == [True]
    assert read_pointers(output / "checkpoints") == {"last": "step-00000004", "best": "step-00000004"}


def test_a_run_that_goes_further_has_each_evaluation_and_sample_once(dataset, tmp_path):
    """Those of its former end, too, at which there would be none now."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    output = tmp_path / "run"
    options = {"data__dataset": dataset, "evaluation__every_steps": 4, "evaluation__at_start": True,
               "checkpoint__every_steps": 4, "tracking__sample_every_steps": 4, "tracking__sample_max_new_tokens": 4,
               "tracking__trackers": "[tensorboard]"}  # fmt: skip
    train(output, **options, schedule__max_steps=6)
    train(output, **options, schedule__max_steps=8, **RESUME)
    folders = {str(path.parent) for path in output.rglob("events.out.tfevents*") if path.parent.name == "plainloop"}
    steps = [event.step for folder in folders for event in EventAccumulator(folder).Reload().Scalars("eval/loss")]
    assert steps == [step for step, _ in evaluations(output)] == [0, 4, 6, 8]
    samples = (output / "samples.md").read_text()
    assert [int(line[8:]) for line in samples.splitlines() if line.startswith("## Step ")] == [4, 6, 8]


def test_a_sample_that_fails_is_a_warning(dataset, tmp_path):
    """Qwen3-Next keeps a state that its cache does not know with so few layers, so `generate` raises."""
    output = tmp_path / "run"
    train(
        output, data__dataset=dataset, model__architecture="qwen3_next", model__size="null",
        model__overrides="{num_experts: 2, num_experts_per_tok: 1, moe_intermediate_size: 32, linear_num_value_heads: 2, "
        "linear_num_key_heads: 2, linear_key_head_dim: 16, linear_value_head_dim: 16}", tracking__sample_every_steps=2,
        data__layout="padded", schedule__max_steps=4,
    )  # fmt: skip
    assert summary(output)["finished"] and not (output / "samples.md").exists()
    assert (output / "training.log").read_text().count("no sample at step") == 2


def test_the_average_has_a_best_checkpoint_of_its_own(dataset, tmp_path):
    """With a high learning rate the losses go up and down, those of the average later."""
    output = tmp_path / "run"
    records = train(
        output, data__dataset=dataset, evaluation__every_steps=1, checkpoint__every_steps=2, checkpoint__keep_last=1,
        optimizer__learning_rate=0.7, optimizer__max_grad_norm=0, schedule__warmup_steps=8, schedule__max_steps=12,
        schedule__shape="constant", optimizer__ema_decay=0.9,
    )  # fmt: skip
    best = {}
    for name in ("eval/loss", "eval/average_loss"):
        losses = {record["step"]: record[name] for record in records if name in record}
        best[name] = min(losses, key=lambda step: losses[step])
    assert len({*best.values(), 12}) == 3, "the test needs two different best steps, both before the last"
    assert summary(output)["best_average_step"] == best["eval/average_loss"]
    assert {path.name for path in (output / "checkpoints").glob("step-*")} == {
        f"step-{step:08}" for step in (*best.values(), 12)
    }
    code, out, err = call("export.py", "--checkpoint", output, "--output", tmp_path / "export", "--weights", "average")
    assert code == 0, err
    kept = load_file(output / "checkpoints" / f"step-{best['eval/average_loss']:08}" / "average.safetensors")
    exported = load_file(tmp_path / "export" / "model.safetensors")
    assert all(bool((exported[name] == tensor).all()) for name, tensor in kept.items())
    assert "step-00000012" in out  # what is newer is named


def test_early_stopping_can_follow_the_average(dataset, tmp_path):
    output = tmp_path / "run"
    records = train(
        output, data__dataset=dataset, evaluation__every_steps=1, optimizer__ema_decay=0.99, schedule__max_steps=40,
        optimizer__learning_rate=3.0, optimizer__max_grad_norm=0, schedule__warmup_steps=20,
        evaluation__early_stopping_patience=2, evaluation__early_stopping_weights="average",
    )  # fmt: skip
    losses = [record["eval/average_loss"] for record in records if "eval/average_loss" in record]
    stopped = summary(output)
    assert stopped["reason"] == "early_stopping" and stopped["optimizer_step"] == len(losses)
    assert losses[-3] == min(losses) == stopped["best_average_loss"]
    base = flags(SMALL | {"output": tmp_path / "none", "data.dataset": dataset})
    assert "ema_decay" in error_line("train.py", *base, "--evaluation.early_stopping_weights", "average")


# ---- Which checkpoint counts


def copied(whole, target):
    """`cp -rL`, as scp and object stores do: `best` and `last` become folders."""
    subprocess.run(["cp", "-rL", whole, target], check=True)
    assert not (target / "checkpoints" / "best").is_symlink()
    return target


def test_a_copied_run_goes_on(dataset, tmp_path):
    options = {
        "data__dataset": dataset,
        "evaluation__every_steps": 3,
        "checkpoint__every_steps": 3,
        "checkpoint__keep_last": 1,
    }
    train(tmp_path / "first", schedule__max_steps=6, schedule__shape="constant", **options)
    train(tmp_path / "whole", schedule__max_steps=12, schedule__shape="constant", **options)
    output = copied(tmp_path / "first", tmp_path / "copy")
    train(output, schedule__max_steps=12, schedule__shape="constant", **options, **RESUME)
    folder = output / "checkpoints"
    assert read_pointers(folder) == {"last": "step-00000012", "best": "step-00000012"}
    assert {path.name for path in folder.glob("step-*")} == {"step-00000012"}  # the old ones went
    assert find_checkpoint(folder / "best").name == "step-00000012"  # not the folder of that name, which is older
    names = ("model.safetensors", "optimizer.safetensors")
    pairs = [(folder / "step-00000012" / name, tmp_path / "whole/checkpoints/step-00000012" / name) for name in names]
    assert all(left.read_bytes() == right.read_bytes() for left, right in pairs)
    assert "best is a folder" in (output / "training.log").read_text()
    code, out, err = call("export.py", "--checkpoint", output, "--output", tmp_path / "export")
    assert code == 0 and "step 12" in out, err


def test_a_disk_without_links_that_flushes_no_folders(whole, dataset, tmp_path, monkeypatch):
    real_fsync = os.fsync

    def no_links(*_: object) -> None:
        raise PermissionError(errno.EPERM, "Operation not permitted")

    def fsync(descriptor: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(errno.EINVAL, "Invalid argument")
        real_fsync(descriptor)

    monkeypatch.setattr(os, "symlink", no_links)
    monkeypatch.setattr(os, "fsync", fsync)
    output = tmp_path / "run"
    train(output, data__dataset=dataset, **OFTEN)
    assert [path.name for path in (output / "checkpoints").iterdir() if not path.name.startswith("step-")] == [
        "pointers.json"
    ]
    assert read_pointers(output / "checkpoints") == read_pointers(whole / "checkpoints")
    log = (output / "training.log").read_text()
    assert "no links" in log and "does not flush folders" in log and "could not be written" not in log
    assert (
        call("evaluate.py", "--model", output / "checkpoints" / "best", "--prompt", "a", "--max_new_tokens", "1")[0]
        == 0
    )


@pytest.mark.parametrize("call_name", ["fsync", "rename"])
def test_a_disk_that_cannot_hold_a_checkpoint_is_refused_before_the_first_step(
    call_name, dataset, tmp_path, monkeypatch
):
    real = getattr(os, call_name)

    def fail(what, *more):
        place = os.readlink(f"/proc/self/fd/{what}") if isinstance(what, int) else str(what)
        if "checkpoints" in place:
            raise OSError(errno.EIO, "Input/output error", place)
        return real(what, *more)

    monkeypatch.setattr(os, call_name, fail)
    line = error_line("train.py", *flags(SMALL | {"output": tmp_path / "run", "data.dataset": dataset}))
    assert "cannot hold checkpoints" in line and "Input/output error" in line
    assert not (tmp_path / "run" / "checkpoints").exists() and not (tmp_path / "run" / "config.yaml").exists()


def test_the_file_counts_then_the_links_then_the_state(whole, tmp_path):
    run = shutil.copytree(whole, tmp_path / "run", symlinks=True)
    folder = run / "checkpoints"
    best = read_pointers(folder)["best"]
    (folder / "best").unlink()
    (folder / "best").symlink_to("step-00000003")
    assert find_checkpoint(run).name == find_checkpoint(folder / "best").name == best != "step-00000003"
    (folder / "pointers.json").unlink()
    assert find_checkpoint(run).name == "step-00000003"
    (folder / "best").unlink()
    assert find_checkpoint(run).name == f"step-{state(run)['best_step']:08}"
    newest = folder / "step-00000012" / "state.json"
    content = newest.read_text()
    newest.write_text(json.dumps({"state": state(run) | {"best_average_step": 8}}))
    assert read_pointers(folder)["best_average"] == "step-00000008"
    newest.write_text(content)
    shutil.rmtree(find_checkpoint(run))
    line = error_line("export.py", "--checkpoint", run, "--output", tmp_path / "export")
    assert "is gone" in line and "step-00000004" in line
    for content in ('{"best": "../../elsewhere"}', '{"mine": "step-00000004"}', "[]", "{"):
        (folder / "pointers.json").write_text(content)
        assert "pointers.json" in error_line("evaluate.py", "--model", run)
