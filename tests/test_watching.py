"""What a person sees of a run: banner, status lines, time left, hints, short evaluations."""

import io
import json
import math
import os
import re
import time
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from conftest import SMALL, call, flags, metrics, train, train_losses

from preparation.report.page import table
from training import hardware
from training.data import sample_rows
from training.launch import launcher_options
from training.monitoring import hints
from training.monitoring.console import Clock, Console, banner, times_due
from training.monitoring.stopping import StopRequests
from training.report.folder import read_run
from training.report.report import WHOLE, figures_of
from training.run import Run
from utils.config import TrainConfig
from utils.data.packing import PackedLayout
from utils.data.token_dataset import TokenDataset, open_split
from utils.pretrained import read_tokenizer


@pytest.fixture(scope="module")
def dataset(small_dataset):
    return small_dataset


def test_a_banner_aligns_the_texts_behind_their_labels():
    lines = banner(["model: a: b", "data: rows", "changed since the last launch: x"])
    assert lines == ["model       a: b", "data        rows", "changed since the last launch: x"]


@pytest.mark.parametrize("every", [0, 1, 3, 10, 11])
def test_looks_to_come_are_counted_as_the_loop_makes_them(every):
    for first in range(1, 12):
        due = [step for step in range(first, 11) if every and (step % every == 0 or step == 10)]
        assert times_due(every, first, 10) == len(due)


def test_the_clock_tells_activities_apart(monkeypatch):
    now = [0.0]
    monkeypatch.setattr("time.perf_counter", lambda: now[0])
    clock = Clock()
    for seconds, doing in ((1, "training"), (10, "evaluating"), (2, "evaluating"), (3, "training"), (4, "evaluating")):
        now[0] += seconds
        clock.turn(doing)
    now[0] += 5
    assert clock.so_far() == 5
    clock.turn("training")
    assert clock.seconds == {"starting": 1, "training": 14, "evaluating": 10} and clock.mean("evaluating") == 5
    assert clock.mean("sampling") is None


def test_the_console_shows_lines_records_or_nothing(dataset, tmp_path):
    """The same run in three modes: all warn alike, and JSON is what metrics.jsonl holds."""
    options = SMALL | {"data.dataset": dataset, "schedule.warmup_steps": 20, "evaluation.every_steps": 5}
    shown = {}
    for mode in ("lines", "quiet", "json"):
        code, shown[mode], errors = call(
            "train.py", *flags(options | {"console": mode, "output": tmp_path / mode, "checkpoint.every_steps": 5})
        )
        assert code == 0 and "schedule.warmup_steps" in errors
    assert shown["quiet"] == ""
    assert [json.loads(line) for line in shown["json"].splitlines()] == metrics(tmp_path / "json")
    lines = shown["lines"].splitlines()
    assert re.match(r"launch +1 process", lines[0]) and any(re.match(r"output +/", line) for line in lines)
    steps = [line for line in lines if re.match(r"step +\d+/10 +\d+% \| train \| loss \d", line)]
    assert len(steps) == 10 and all(re.search(r"tokens/s .* MFU \d+%", line) for line in steps)
    evaluation, _ = [line for line in lines if "| eval  |" in line]
    assert re.search(r"5/10 +50% \| eval .* bits per byte \| \d+\.\d s$", evaluation)
    assert sum("| save  |" in line for line in lines) == 2
    assert [line for line in lines if line.startswith("next")] == [
        f"next: python evaluate.py --model {tmp_path / 'lines'}",
        f"next: python export.py --checkpoint {tmp_path / 'lines'} --output exports/lines",
    ]
    assert lines[-1].startswith("next") and shown["lines"] in _without_times(tmp_path / "lines" / "training.log")


def _without_times(log) -> str:
    return "".join(
        line.partition(" INFO ")[2] for line in log.read_text().splitlines(keepends=True) if " INFO " in line
    )


def test_only_the_last_step_is_at_100_percent():
    console = Console("quiet", 1000, 0)
    assert [re.search(r"\d+%", console.record({}, step, None))[0] for step in (4, 999, 1000)] == ["0%", "99%", "100%"]


def test_a_long_evaluation_says_how_far_it_is(capsys, monkeypatch):
    now = [1.0]
    monkeypatch.setattr("training.monitoring.console.time.monotonic", lambda: now[0])
    console = Console("lines", 10, 0)
    for done in range(1, 101):
        console.progress("evaluating", done, 100)
        now[0] += 1.0
    lines = capsys.readouterr().out.splitlines()
    assert lines == [f"evaluating: {done} of 100 batches, {left} left" for done, left in
                     ((31, "1.1 min"), (61, "39 s"), (91, "9.0 s"))]  # fmt: skip


def test_the_bar_leaves_the_time_left_to_the_lines(monkeypatch):
    """tqdm takes an evaluation for a slow step, so its time left would be another than that of the next line."""
    screen = io.StringIO()
    screen.isatty = lambda: True  # type: ignore[method-assign]
    monkeypatch.setattr("sys.stderr", screen)
    console = Console("lines", 10, 4)
    time.sleep(0.2)  # tqdm draws at most every tenth of a second
    console.advance()
    console.close()
    assert "5/10" in screen.getvalue() and not re.search(r"s/step|step/s|\d:\d", screen.getvalue())


def test_time_left_counts_an_evaluation_of_all_rows_at_the_end():
    """After 50 of 100 steps of a second, and an evaluation of 10 rows in 4 seconds."""
    clock = Clock()
    clock.seconds, clock.times = Counter(evaluating=4.0), Counter(evaluating=1)
    state = SimpleNamespace(train_seconds=50.0, optimizer_step=50, last_evaluated_step=50)
    config = TrainConfig()
    config.evaluation.every_steps, config.tracking.sample_every_steps = 50, 0
    data = SimpleNamespace(max_steps=100, validation_rows=range(40), rows_scored=40, sampled_rows=None)
    run = SimpleNamespace(state=state, config=config, data=data, _clock=clock, first_step=0, _warm=(0, 0.0, 0))
    assert Run._seconds_left(run) == pytest.approx(50 + 4)
    data.sampled_rows, data.rows_scored = range(10), 10
    assert Run._seconds_left(run) == pytest.approx(50 + 4 + 4 * 4)


def test_time_left_counts_evaluations_samples_and_saves(dataset, tmp_path, monkeypatch):
    """By a clock that only steps, evaluations, samples and saves move: at half time the estimate is what the rest takes."""
    now = [0.0]
    seconds = {"poll": 3.0, "save": 1.0, "sample": 5.0, "vote": 0.2}

    def slowed(original, took):
        def call_it(self, *arguments, **options):
            result = original(self, *arguments, **options)
            now[0] += took
            return result

        return call_it

    for name, took in seconds.items():
        monkeypatch.setattr(Run, name, slowed(getattr(Run, name), took))
    found, seconds_left = {}, Run._seconds_left
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(Run, "_seconds_left", lambda self: found.setdefault(now[0], seconds_left(self)))
    monkeypatch.setattr(Run, "finish", lambda self, *_: None)
    options = SMALL | {
        "data.dataset": dataset, "output": tmp_path / "run", "schedule.max_steps": 48, "evaluation.every_steps": 8,
        "checkpoint.every_steps": 8, "tracking.log_every_steps": 4, "tracking.sample_every_steps": 12,
    }  # fmt: skip
    code, _, error = call("train.py", *flags(options))
    assert code == 0, error
    assert len(found) == 13
    at, estimate = list(found.items())[6]  # after step 24 of 48
    rest = now[0] - at
    assert estimate == pytest.approx(rest, rel=0.15)
    assert rest > 24 * 0.2 + 4 * 3 + 3 * 5  # the looks of step 24 are still to come


# ---- Evaluations of a part of the split


def test_a_sample_of_rows_is_spread_over_the_split():
    tokens = TokenDataset([np.zeros(6400, np.uint16)], np.full(64, 100))
    rows = PackedLayout(tokens, 64)
    assert len(rows) == 100
    assert sample_rows(rows, None) is None and sample_rows(rows, 6400) is None
    assert sample_rows(rows, 64) == [0]
    sampled = sample_rows(rows, 640)
    assert len(sampled) == len(set(sampled)) == 10 and sampled[0] == 0 and sampled[-1] == 99


def test_evaluations_of_a_part_end_with_one_of_all(dataset, tmp_path):
    """The losses while training are those of the sampled rows, the summary's that of the whole split, as without the
    option."""
    options = {"data__dataset": dataset, "evaluation__every_steps": 5}
    whole = train(tmp_path / "whole", **options)
    tokens = open_split(dataset, "validation").num_tokens
    part = train(tmp_path / "part", evaluation__max_tokens=tokens // 3, **options)
    losses = {name: [record["eval/loss"] for record in records if "eval/loss" in record]
              for name, records in (("whole", whole), ("part", part))}  # fmt: skip
    assert len(losses["part"]) == len(losses["whole"]) == 2
    assert all(abs(one - other) > 1e-6 for one, other in zip(*losses.values(), strict=True))
    assert not any("eval/bits_per_byte" in record for record in part)
    summaries = [json.loads((tmp_path / name / "summary.json").read_text()) for name in ("whole", "part")]
    assert summaries[1]["eval_loss"] == pytest.approx(summaries[0]["eval_loss"], rel=1e-6)
    assert summaries[1]["bits_per_byte"] == pytest.approx(summaries[0]["bits_per_byte"], rel=1e-6)
    assert summaries[1]["best_loss"] == min(losses["part"])
    from utils.checkpoints import find_checkpoint  # the rows, scored by hand
    from utils.evaluation import evaluate
    from utils.model.build import load_model
    from utils.objectives import build_objective

    layout = PackedLayout(open_split(dataset, "validation"), 64)
    rows = sample_rows(layout, tokens // 3)
    model = load_model(find_checkpoint(tmp_path / "part", "last"))
    config = TrainConfig()
    objective = build_objective(model, config.objective, "auto", config.kernels, torch.device("cpu"))
    AcceleratorState._reset_state(True)
    batch = {name: torch.from_numpy(values) for name, values in layout.__getitems__(rows).items() if name != "lengths"}
    found = evaluate(Accelerator(cpu=True), objective, [batch])  # type: ignore[arg-type]
    AcceleratorState._reset_state(True)
    assert found.loss == pytest.approx(losses["part"][-1], rel=1e-5)


def test_a_stopped_run_claims_nothing_of_the_whole_split(dataset, tmp_path, monkeypatch):
    """Its last evaluation has scored a part: there are no bits per byte, and the page does not call it the whole."""
    flags_of, steps = StopRequests._flags, []

    def stop_after_evaluations(self):
        steps.append(1)
        return [*flags_of(self)[:-1], len(steps) > 20]

    monkeypatch.setattr(StopRequests, "_flags", stop_after_evaluations)
    options = {
        "evaluation__max_tokens": open_split(dataset, "validation").num_tokens // 3,
        "evaluation__every_steps": 5,
    }
    records = train(tmp_path / "run", data__dataset=dataset, schedule__max_steps=100, **options)
    losses = [record["eval/loss"] for record in records if "eval/loss" in record]
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["reason"] == "max_minutes" and summary["eval_loss"] == losses[-1]
    assert summary["bits_per_byte"] is None
    figures = figures_of(read_run(tmp_path / "run"))
    assert "bits per byte" not in figures and WHOLE not in figures


def test_the_evaluation_of_all_rows_at_the_end_can_be_stopped(dataset, tmp_path, monkeypatch):
    """It may take long. The resumed run makes no step, and evaluates."""
    options = {"data__dataset": dataset, "evaluation__every_steps": 5}
    options |= {"evaluation__max_tokens": open_split(dataset, "validation").num_tokens // 3, "schedule__max_steps": 5}
    with monkeypatch.context() as patch:
        patch.setattr(Run, "finish", lambda self, *rest, finish=Run.finish: (stop(patch), finish(self, *rest)))
        train(tmp_path / "run", **options)
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert (summary["finished"], summary["reason"], summary["bits_per_byte"]) == (False, "max_minutes", None)
    records = train(tmp_path / "run", checkpoint__resume="auto", **options)
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert (summary["finished"], summary["reason"], summary["optimizer_step"]) == (True, "max_steps", 5)
    assert summary["bits_per_byte"] > 1 and len(train_losses(records)) == 5


def stop(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(StopRequests, "_flags", lambda self, flags=StopRequests._flags: [*flags(self)[:-1], True])


# ---- Peaks


def test_a_peak_is_measured_once_per_machine(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    calls = []
    monkeypatch.setattr(hardware, "measure_flops_per_second", lambda *_: calls.append(1) or 1e11)
    cpu = torch.device("cpu")
    assert [hardware.peak_flops_per_second(cpu, "no") for _ in range(3)] == [1e11] * 3 and len(calls) == 1
    assert hardware.peak_flops_per_second(cpu, "bf16") == 1e11 and len(calls) == 2
    (tmp_path / "plainloop" / "peaks.json").write_text("{broken")
    assert hardware.peak_flops_per_second(cpu, "no") == 1e11 and len(calls) == 3


@pytest.mark.parametrize(
    ("name", "peak"),
    [("NVIDIA H100 80GB HBM3", 989e12), ("NVIDIA A100-SXM4-80GB", 312e12), ("NVIDIA GeForce RTX 4090", 165.2e12),
     ("NVIDIA H200", 1.0), ("NVIDIA L4", 121e12), ("NVIDIA L40S", 1.0), ("NVIDIA H100 PCIe", 1.0), ("NVIDIA GeForce RTX 4090 Laptop GPU", 1.0)],
)  # fmt: skip
def test_a_card_is_known_by_its_name(name, peak, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    monkeypatch.setattr(hardware, "measure_flops_per_second", lambda *_: 1.0)
    assert hardware.peak_flops_per_second(torch.device("cuda"), "bf16") == peak


# ---- Hints: that they come, and that they do not come where they should not


def test_hints_on_the_data():
    config = TrainConfig()

    def found(*, epochs=1.0, tokens=50_000, rows=100):
        data = SimpleNamespace(num_rows=rows, num_epochs=epochs, validation_tokens=tokens, key="k",
                               plan=SimpleNamespace(global_batch_size=8))  # fmt: skip
        return hints.hints_on_data(config, data)

    assert found() == [] and found(epochs=4) == [] and found(rows=None) == []
    (line,) = found(epochs=4.5)
    assert "4.5 times" in line and "--schedule.max_steps 50" in line
    (line,) = found(tokens=900)
    assert "900 validation tokens" in line and "0.10 nats" in line and "--validation_fraction" in line
    config.model.pretrained = "exports/x"  # fine-tuning repeats a small text on purpose
    assert found(epochs=10) == []


def test_a_learning_rate_far_from_the_range_tests_is_mentioned(tmp_path, monkeypatch):
    monkeypatch.setattr(hints, "RANGE_TEST", tmp_path / "lr_range.json")
    config = TrainConfig()
    data = SimpleNamespace(num_rows=None, validation_tokens=50_000, key="k")
    assert hints.hints_on_data(config, data) == []
    hints.record_range_test(config, "k", 1e-2, hints.RANGE_TEST)
    for rate, comes in ((5e-3, False), (1e-3, False), (2e-2, True), (1e-4, True)):
        config.optimizer.learning_rate = rate
        assert any("--optimizer.learning_rate 2.0e-03" in line for line in hints.hints_on_data(config, data)) is comes
    data.key = "another dataset"
    assert hints.hints_on_data(config, data) == []
    hints.RANGE_TEST.write_text("[1]")
    assert hints.hints_on_data(config, data) == []


def test_a_loss_that_stays_that_of_guessing_is_mentioned():
    config = TrainConfig()
    config.schedule.warmup_steps = 10
    guessing = math.log(2048)
    assert hints.hint_on_loss(config, 109, guessing, 2048) is None
    assert "lr_range_test.py" in hints.hint_on_loss(config, 110, guessing, 2048)
    assert hints.hint_on_loss(config, 110, 0.9 * guessing, 2048) is None
    config.model.pretrained = "exports/x"
    assert hints.hint_on_loss(config, 110, guessing, 2048) is None


def test_the_hint_on_the_loss_comes_once(dataset, tmp_path, monkeypatch):
    """With a learning rate of nearly 0 nothing is learnt."""
    monkeypatch.setattr(hints, "LOSS_STEPS", 3)
    train(tmp_path / "run", data__dataset=dataset, optimizer__learning_rate=1e-9)
    log = (tmp_path / "run" / "training.log").read_text()
    assert log.count("no better than guessing") == 1
    train(tmp_path / "learns", data__dataset=dataset, optimizer__learning_rate=3e-2)
    vocabulary = len(read_tokenizer(dataset / "tokenizer"))
    assert train_losses(metrics(tmp_path / "learns"))[-1] < 0.97 * math.log(vocabulary)
    assert "no better than guessing" not in (tmp_path / "learns" / "training.log").read_text()


def test_idle_cores_are_physical_ones_that_the_process_may_use(monkeypatch):
    """A launch with cpu.yaml has a thread for each physical core: on a CPU with two threads per core, nothing is idle."""
    accelerator = SimpleNamespace(device=torch.device("cpu"), num_processes=1, mixed_precision="bf16")
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    monkeypatch.setattr(os, "cpu_count", lambda: 16)
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    for physical, granted, found in ((4, 8, None), (8, 16, "4 of 8 cores"), (8, 4, None), (None, 16, "4 of 16 cores")):
        monkeypatch.setattr("psutil.cpu_count", lambda logical=True, physical=physical: 16 if logical else physical)
        monkeypatch.setattr(
            os, "sched_getaffinity", lambda process, granted=granted: set(range(granted)), raising=False
        )
        lines = hints.hints_on_launch(accelerator)
        assert len(lines) == (found is not None)
        assert found is None or f"{found} in use; `accelerate launch --num_cpu_threads_per_process" in lines[0]


def test_idle_gpus_and_accelerates_default_file_are_mentioned(tmp_path, monkeypatch):
    accelerator = SimpleNamespace(device=torch.device("cuda"), num_processes=2, mixed_precision="bf16")
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 4)
    (line,) = hints.hints_on_launch(accelerator)
    assert "2 of 4 GPUs" in line and "--num_processes 4" in line
    accelerator.num_processes = 4
    assert hints.hints_on_launch(accelerator) == []
    accelerator.device = torch.device("cpu")
    (line,) = hints.hints_on_launch(accelerator)
    assert "4 GPU(s) are idle" in line
    accelerator.device = torch.device("cuda")
    assert launcher_options() is None  # pytest is not accelerate
    default = tmp_path / "default_config.yaml"
    monkeypatch.setattr(hints, "default_config_file", str(default))
    for chosen, exists, comes in ((None, True, True), ("a.yaml", True, False), (None, False, False)):
        default.write_text("") if exists else default.unlink(missing_ok=True)
        monkeypatch.setattr(
            hints, "launcher_options", lambda chosen=chosen: SimpleNamespace(config_file=chosen, cpu=False)
        )
        assert any(str(default) in line for line in hints.hints_on_launch(accelerator)) is comes


def test_a_tokenizer_made_for_other_text_is_mentioned(dataset):
    manifest = json.loads((dataset / "manifest.json").read_text())
    (figures,) = manifest["tokenizer"]["sources"].values()
    assert figures["bytes_per_token"] > 1 and "made for other text" not in table(manifest)
    figures["bytes_per_token"] = 1.4
    manifest["tokenizer"]["vocab_size"] = 32_000
    assert "made for other text" not in table(manifest)  # trained here, on few entries
    manifest["tokenizer"]["from"] = "models/x"
    assert "a token for every 1.4 bytes" in table(manifest)
    manifest["tokenizer"]["vocab_size"] = 300
    assert "made for other text" not in table(manifest)


def test_a_masked_model_shows_the_words_that_it_fills_in(dataset, tmp_path):
    train(
        tmp_path / "run", data__dataset=dataset, objective__name="masked", model__architecture="bert",
        tracking__sample_every_steps=10,
    )  # fmt: skip
    text = (tmp_path / "run" / "samples.md").read_text()
    masked, filled = text.partition("\n---")[0], text.partition("filled:")[2]
    assert "<|mask|>" in masked and filled.strip() and "<|mask|>" not in filled


def test_several_prompts_give_several_samples(dataset, tmp_path):
    train(
        tmp_path / "run", data__dataset=dataset, tracking__sample_prompt='["LOVE", "HATE"]',
        tracking__sample_every_steps=10, tracking__sample_max_new_tokens=3,
    )  # fmt: skip
    first, second = (tmp_path / "run" / "samples.md").read_text().split("\n---\n")
    assert "LOVE" in first and second.lstrip().startswith("HATE")
