"""Faults 21 to 27: processes that die, hang, or are asked to stop."""

import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from accelerate import Accelerator
from conftest import LAUNCH_TWO, ROOT, environment, metrics, run, script, train, train_losses
from processes import (
    PATIENCE,
    changed_copy,
    command,
    heartbeat,
    invalid_checkpoints,
    send,
    state,
    summary,
    training,
    weights,
)

from training.monitoring import stopping

ENDLESS: dict[str, object] = {"schedule__max_steps": 4000, "schedule__shape": "constant", "checkpoint__every_steps": 50}
MICRO_BATCHES = '        run.beat("training")\n'


@pytest.fixture(scope="module")
def dataset(small_dataset) -> Path:
    return small_dataset


def test_21_a_rank_is_killed(dataset, tmp_path):
    output = tmp_path / "run"
    with training([*LAUNCH_TWO, *command(output, dataset, **ENDLESS)], output) as started:
        started.wait_for_step(5)
        send(started.ranks[1], signal.SIGKILL)
        assert started.end() != 0  # well before guards.hang_minutes (10) would end it
        assert "train.py: error: another rank has" in started.text()
    assert summary(output)["finished"] is False


def test_22_a_rank_hangs(dataset, tmp_path):
    """A rank that waits, or hangs, ends in time, names itself and its step, and leaves its stacks."""
    output = tmp_path / "run"
    change = (
        MICRO_BATCHES,
        "        if step == 4 and accelerator.process_index == 1:\n            time.sleep(1000)\n" + MICRO_BATCHES,
    )
    with changed_copy(change, name="hang") as name:
        arguments = command(output, dataset, name=name, **ENDLESS, guards__hang_minutes=0.05)
        with training(arguments, output, processes=2) as started:
            started.wait_for(lambda: "has been at step 5" in started.text())
            assert started.end() != 0
            told = started.text()
    # Both are due within a second. The first to report ends the launch, so the other may not get to it.
    assert re.search(r"rank [01] has been at step 5, (fetching|training), for 0\.05\d* minutes.*stacks-[01]", told), (
        told
    )
    stacks = [(output / ".heartbeats" / f"stacks-{rank}").read_text() for rank in range(2)]
    assert "in reduce" in stacks[0] or "in main" in stacks[1]
    assert "in reduce" not in stacks[1]


def test_the_first_step_may_take_longer_where_it_compiles(tmp_path):
    code = f"""if True:
        import sys, time
        sys.path.insert(0, {str(ROOT)!r})
        from pathlib import Path
        from training.monitoring.watchdog import Watchdog
        with Watchdog(Path({str(tmp_path)!r}), 0, 0.2, 1000) as watchdog:
            watchdog.beat(7, "training")
            time.sleep(1)
            print("compiled", flush=True)
            watchdog.beat(8, "training")
            time.sleep(1000)
    """
    ended = script("-c", code, check=False)
    assert ended.returncode == 1 and ended.stdout == "compiled\n" and "at step 8, training" in ended.stderr


@pytest.mark.parametrize(
    "how", ["raise RuntimeError('my own mistake')", pytest.param("sys.exit(0)", marks=pytest.mark.slow)]
)
def test_23_a_rank_raises_or_leaves(how, dataset, tmp_path):
    """All end with a non-zero code, and the first error is what the user sees first."""
    output = tmp_path / "run"
    change = (
        MICRO_BATCHES,
        f"        if step == 4 and accelerator.process_index == 1:\n            import sys\n            {how}\n"
        + MICRO_BATCHES,
    )
    with changed_copy(change, name="raise") as name:
        result = run(*LAUNCH_TWO, *command(output, dataset, name=name, **ENDLESS), check=False)
    assert result.returncode != 0
    if "raise" in how:
        others = [result.stderr.find(words) for words in ("another rank has", "SIGTERM", "ChildFailedError")]
        assert 0 < result.stderr.index("my own mistake") < min(place for place in others if place >= 0)
    assert summary(output)["finished"] is False


def stopped_equals_whole(output: Path, dataset: Path, processes: int, step: int) -> None:
    """Resume for a few steps: the losses are those of a run that was not stopped, each step once."""
    more = {**ENDLESS, "schedule__max_steps": step + 3}
    script(*command(output, dataset, **more, checkpoint__resume="auto"), processes=processes)
    losses = train_losses(metrics(output))
    whole = train(output.with_name("whole"), data__dataset=dataset, **more)
    assert len(losses) == step + 3
    assert max(abs(a - b) for a, b in zip(losses, train_losses(whole), strict=True)) < 1e-4


SIGNALS = {
    "24_SIGTERM_to_the_launcher": (signal.SIGTERM, "launcher"),
    "24_SIGTERM_to_a_rank": (signal.SIGTERM, 1),
    "24_SIGINT_to_the_launcher": (signal.SIGINT, "launcher"),
    "26_SIGUSR1_to_a_rank": (signal.SIGUSR1, 1),
}


SLOW = ("24_SIGTERM_to_a_rank", "24_SIGINT_to_the_launcher")


@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=pytest.mark.slow) if case in SLOW else case for case in SIGNALS]
)
def test_signals(case, dataset, tmp_path):
    """24 and 26: all ranks save the same step and end in order; each loader has workers, which get the signal too."""
    signum, target = SIGNALS[case]
    output = tmp_path / "run"
    arguments = command(output, dataset, **ENDLESS, data__num_workers=1)
    launched: dict[str, Any] = {"processes": 2}
    if target == "launcher":
        arguments, launched = [*LAUNCH_TWO, *arguments], {}
    with training(arguments, output, **launched) as started:
        started.wait_for_step(5)
        send(started.seen[0] if target == "launcher" else started.ranks[int(target)], signum)
        code = started.end()
        text = started.text()
    end = summary(output)
    assert (end["finished"], end["reason"]) == (False, signum.name), text[-3000:]
    assert re.search(rf"stopped \({signum.name}\) at step {end['optimizer_step']}, .*--checkpoint\.resume auto", text)
    assert state(output)["optimizer_step"] == end["optimizer_step"] and invalid_checkpoints(output) == []
    if target != "launcher":
        assert code == 0, text[-3000:]  # the launcher's own code is another matter when it is the one that is told
    assert len(train_losses(metrics(output))) == end["optimizer_step"]
    if case == "26_SIGUSR1_to_a_rank":
        stopped_equals_whole(output, dataset, 2, end["optimizer_step"])


def test_24_a_launcher_that_dies_leaves_no_orphans(dataset, tmp_path):
    """One process: SIGTERM ends `accelerate launch` alone. Its script notices, saves, and ends."""
    output = tmp_path / "run"
    one = [word.replace("cpu_2_processes", "cpu") for word in LAUNCH_TWO]
    with training([*one, *command(output, dataset, **ENDLESS)], output) as started:
        started.wait_for_step(5)
        send(started.seen[0], signal.SIGTERM)
        started.end()
    assert summary(output)["reason"] == "launcher_gone" and not invalid_checkpoints(output)
    assert state(output)["optimizer_step"] == summary(output)["optimizer_step"]


def test_25_a_second_signal_during_the_save(dataset, tmp_path):
    output = tmp_path / "run"
    large = {"model__hidden_size": 512, "model__intermediate_size": 512, "batch__global_batch_size": 2}
    with training(command(output, dataset, **{**ENDLESS, **large, "checkpoint__every_steps": 4000}), output) as started:
        started.wait_for_step(3)
        send(started.seen[0], signal.SIGTERM)
        started.wait_for_heartbeat("checkpoint writing")
        for signum in (signal.SIGTERM, signal.SIGINT, signal.SIGTERM):
            send(started.seen[0], signum)
        assert started.end() == 0
        assert "Traceback" not in started.text() and "KeyboardInterrupt" not in started.text()
    assert (
        invalid_checkpoints(output) == [] and state(output)["optimizer_step"] == summary(output)["optimizer_step"] >= 3
    )


def test_a_signal_during_an_evaluation_leaves_it_to_the_resumed_run(dataset, tmp_path):
    """Stopped in the middle of the evaluation of step 6; the resumed run makes it first, and ends as if nothing were."""
    options = {"schedule__max_steps": 12, "evaluation__every_steps": 6, "evaluation__per_device_batch_size": 1, "data__sequence_length": 8,
               "tracking__sample_every_steps": 6, "tracking__sample_max_new_tokens": 8}  # fmt: skip
    output, whole = tmp_path / "run", tmp_path / "whole"
    arguments = command(output, dataset, **options)
    poll = "found = look(run.poll)\n"
    slow = poll.replace("run.poll", "lambda *done: (time.sleep(0.1), run.poll(*done))")
    with (
        changed_copy((poll, slow), name="slow") as name,
        training([name, *arguments[1:]], output) as started,
    ):
        started.wait_for_heartbeat("step 6 evaluating")
        send(started.seen[0], signal.SIGINT)
        assert started.end() == 0
    assert (
        summary(output)["reason"] == "SIGINT"
        and state(output)["last_evaluated_step"] < state(output)["optimizer_step"] == 6
    )
    assert not any("eval/loss" in record for record in metrics(output))
    script(*arguments, "--checkpoint.resume", "auto")
    train(whole, data__dataset=dataset, **options)
    assert weights(output) == weights(whole)
    kept = [
        [record for record in metrics(path) if "train/loss" in record or "eval/loss" in record]
        for path in (output, whole)
    ]
    assert [(record["step"], record.get("train/loss"), record.get("eval/loss")) for record in kept[0]] == [
        (record["step"], record.get("train/loss"), record.get("eval/loss")) for record in kept[1]
    ]
    assert (output / "samples.md").read_text() == (whole / "samples.md").read_text()
    for name in ("best_loss", "best_step", "last_evaluated_step", "evaluations_without_improvement"):
        assert state(output)[name] == state(whole)[name]


@pytest.mark.slow
def test_27_a_time_limit(dataset, tmp_path):
    """Counted from the start of the processes: it is saved before it, and then ends."""
    output = tmp_path / "run"
    script("-c", "pass")  # the fork server is there from here on: its start does not count
    started = time.time()
    result = script(*command(output, dataset, **{**ENDLESS, "schedule__max_steps": 20_000}, max_minutes=1))
    assert (output / "checkpoints/last").resolve().stat().st_mtime - started < 60
    assert summary(output)["reason"] == "max_minutes" and summary(output)["optimizer_step"] > 1
    assert re.search(r"stopped \(max_minutes\) at step \d+, which is saved", result.stdout)
    assert state(output)["optimizer_step"] == summary(output)["optimizer_step"]


def test_a_stop_file(dataset, tmp_path):
    output = tmp_path / "run"
    with training(command(output, dataset, **ENDLESS), output) as started:
        started.wait_for_step(2)
        (output / "stop").touch()
        assert started.end() == 0
    assert summary(output)["reason"] == "stop_file" and not (output / "stop").exists()
    assert heartbeat(output).startswith(f"step {summary(output)['optimizer_step']} ending")


def test_a_console_that_has_gone_costs_nothing(dataset, tmp_path):
    """As with `| tee`, which Ctrl-C ends first, or a connection that is lost: saved, and ended in order."""
    output = tmp_path / "run"
    arguments = [sys.executable, *command(output, dataset, **ENDLESS)]
    process = subprocess.Popen(arguments, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    while b"step    1/" not in (line := process.stdout.readline()):
        assert line
    process.stdout.close()
    process.send_signal(signal.SIGHUP)
    assert process.wait(PATIENCE) == 0
    assert summary(output)["reason"] == "SIGHUP" and not invalid_checkpoints(output)
    assert state(output)["optimizer_step"] == summary(output)["optimizer_step"]


def test_a_save_that_the_launcher_would_cut_short_is_warned_of_once(dataset, tmp_path, monkeypatch):
    """Torch's launcher kills after 30 seconds: a step, the save that is under way and another must be done by then."""
    monkeypatch.setattr(stopping, "LAUNCHER_SECONDS", 30)
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    stops = stopping.StopRequests(Accelerator(cpu=True), tmp_path, None, bytes_to_save=0)
    stops.longest_gap_seconds = 4.0
    assert stops.time_for_save(1000.0) is None  # without that launcher nobody is in a hurry
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    assert stops.time_for_save(12.9) is None
    warning = stops.time_for_save(13.1)
    assert warning is not None and "in 30 s" in warning and f"touch {tmp_path / 'stop'}" in warning
    assert stops.time_for_save(13.1) is None
    unmeasured = stopping.StopRequests(Accelerator(cpu=True), tmp_path, None, bytes_to_save=2_000_000_000)
    assert unmeasured.time_for_save(0.0) is not None  # until a save has ended: 20 s at the speed of a slow disk

    monkeypatch.setattr(stopping, "LAUNCHER_SECONDS", 0)
    train(tmp_path / "run", data__dataset=dataset, checkpoint__every_steps=3)
    log = (tmp_path / "run" / "training.log").read_text()
    assert log.count(f"touch {tmp_path / 'run' / 'stop'}") == 1
