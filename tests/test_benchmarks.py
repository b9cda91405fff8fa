"""Every benchmark from its first line to its last, on a tiny setting: it runs, and its figures are there."""

import json
import math
import re
import sys

import pytest
from conftest import ROOT, script

# Three true launches of two processes each, which are killed: the only one that takes more than seconds.
SLOW = ("chaos",)
BENCHMARKS = [
    pytest.param(path.stem, marks=pytest.mark.slow if path.stem in SLOW else ())
    for path in sorted((ROOT / "benchmarks").glob("*.py"))
    if path.stem != "common"
]
# train.py's options for a small model; {dataset}, {text}, {folder} and {run} are filled in.
TINY = "--model.hidden_size 32 --model.num_hidden_layers 2 --model.num_attention_heads 2 --model.intermediate_size 64"
SMALL = f"--data.dataset {{dataset}} --data.sequence_length 64 {TINY}"
# Benchmark → its arguments, and the figures that must be finite and above zero: names in the JSON object, by dots.
SMOKE = {
    "chaos": (
        "--kills 1 --dataset {dataset}",
        "kills bit_equal losses_equal steps seconds",
    ),
    "exports": (
        "{run} --groups safetensors",
        "finished.0.perplexity finished.0.greedy_tokens_equal finished.0.bytes finished.0.seconds_of_receipt",
    ),
    "gpu": (
        "--tiny --dataset {dataset} --output {folder}/gpu.jsonl --parts 124m-packed-eager 124m-packed-regional 124m-one-regional "
        "124m-trainer 124m-nanogpt 1b-packed-eager 124m-head kill-and-resume",
        "ratio_trainer parts.124m_packed_eager.mfu parts.124m_packed_regional.first_step_seconds parts.124m_trainer.mfu "
        "parts.124m_nanogpt.tokens_per_second parts.1b_packed_eager.peak_memory_bytes parts.kill_and_resume.step",
    ),
    "layout": (
        "--documents 1e4",
        "documents packed_seconds packed_peak_bytes best_fit_seconds best_fit_peak_bytes utilisation",
    ),
    "loss_curves": (
        f"--steps 3 --fp32 --plot {{folder}}/plot.png {SMALL}",
        "steps against_plain_fp32.plain_fp32.last_loss against_plain_fp32.fast_fp32.last_loss",
    ),
    "memory": (
        "--only demo --dataset {dataset}",
        "demo.parts.weights demo.measured demo.ratio demo.seconds demo.measured_without_heap demo.ratio_without_heap",
    ),
    "optimizers": (
        f"--steps 6 --seeds 1 --plot {{folder}}/plot.png {SMALL} --schedule.warmup_steps 1",
        "steps adamw.learning_rate adamw.loss_by_learning_rate.0_001 adamw.seconds_per_step muon.seconds_per_step",
    ),
    "padding": (
        f"--rounds 1 --steps 3 --length 64 {TINY}",
        "mean_tokens ratio_longest ratio_packed ratio_best_fit tokens_per_second.packed",
    ),
    "prepare_data": (
        "--quick --input {text} --megabytes 0.1 --loader_seconds 0.1",
        "ratio_tokenizers ratio_fast bytes_per_token loader_ratio peak_memory_bytes tokens rounds "
        "whole_run_tokens_per_second whole_run_seconds",
    ),
    "quality": (
        "--steps 2 --bits 100 --dataset {dataset} --plot {folder}/plot.png",
        "bits_per_byte plainloop.seconds plainloop.with_start plainloop.ratio trainer.ratio nanogpt.ratio",
    ),
    "reliability": (
        f"--steps 60 {SMALL}",
        "step_seconds_bare step_seconds_guarded asynchronous_pause_seconds synchronous_save_seconds pause_share",
    ),
    "scaling": (
        f"--rounds 1 --steps 3 {SMALL}",
        "tokens_per_second.one weak_scaling",
    ),
    "sizes": (
        f"--sizes 1M --steps 3 --rounds 1 --process_steps 3 {SMALL}",
        "imported_bytes sizes.1M.parameters sizes.1M.tokens_per_second sizes.1M.peak_memory_bytes sizes.1M.predicted_bytes",
    ),
    "train": (  # the README's command
        "--quick --dataset {dataset}",
        "tokens_per_second ratio_no_trainer ratio_no_trainer_cpu limit_share peak_memory_bytes first_step_seconds "
        "peak_memory_bytes_no_trainer rounds",
    ),
}


def test_the_readmes_benchmarks_are_among_them():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    commands = re.findall(r"^python benchmarks/(\w+)\.py(.*)$", readme, re.M)
    assert commands and all(f"{SMOKE[name][0]} ".startswith(f"{options.strip()} ") for name, options in commands)


@pytest.mark.parametrize("name", BENCHMARKS)
def test_every_benchmark_runs_and_ends_with_its_figures(name, small_dataset, tmp_path, request):
    assert name in SMOKE, f"give benchmarks/{name}.py arguments here with which it takes seconds"
    arguments, names = SMOKE[name]
    python = tmp_path / "python"  # for the processes that it starts
    python.write_text(f'#!/bin/sh\nexec "{sys.executable}" -I -S "{ROOT / "tests" / "forked_python.py"}" "$@"\n')
    python.chmod(0o755)
    forked = {} if name in SLOW else {"PLAINLOOP_PYTHON": str(python)}
    places = {"dataset": small_dataset, "text": small_dataset.parent / "texts.jsonl", "folder": tmp_path}
    if "{run}" in arguments:
        places["run"] = request.getfixturevalue("finished_run")
    printed = script(f"benchmarks/{name}.py", *arguments.format_map(places).split(), **forked).stdout.splitlines()
    assert len(printed) > 2, "a table comes before the figures"
    figures = flat(json.loads(printed[-1]))
    assert all(math.isfinite(value) for value in figures.values()), figures
    for figure in names.split():
        assert figures[figure] > 0, figure
    assert (tmp_path / "plot.png").exists() == ("plot.png" in arguments)


def flat(figures: object, name: str = "") -> dict[str, float]:
    """All numbers of nested figures, by their names with dots between; other characters become underscores."""
    if isinstance(figures, dict | list):
        parts = figures.items() if isinstance(figures, dict) else enumerate(figures)
        inner = [flat(value, f"{name}.{re.sub('[^A-Za-z0-9]+', '_', str(key))}") for key, value in parts]
        return {key: value for each in inner for key, value in each.items()}
    return {name[1:]: float(figures)} if isinstance(figures, bool | int | float) else {}
