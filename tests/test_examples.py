"""The side tools, on the recipe of a small run."""

import itertools
import json
import re

import numpy as np
from conftest import script

from utils.batches.token_dataset import open_split


def test_the_range_test_finds_a_learning_rate_between_too_low_and_too_high(finished_run, tmp_path):
    plot = tmp_path / "plot.png"
    output = script(
        "examples/lr_range_test.py", "--recipe", finished_run / "config.yaml", "--num_steps", "60", "--plot", plot,
        "--max_learning_rate", "10",
    ).stdout  # fmt: skip
    loss, lowest = map(float, re.search(r"lowest smoothed loss ([\d.]+) at (\S+);", output).groups())
    first = float(re.search(r"smoothed loss ([\d.]+)", output)[1])
    assert loss < first - 0.5 and 1e-4 < lowest < 1 and plot.stat().st_size > 10_000


def test_the_micro_batch_finder_tries_what_divides_the_global_batch(finished_run):
    output = script("examples/find_micro_batch.py", "--recipe", finished_run / "config.yaml", "--repeats", "1").stdout
    tried = [int(size) for size in re.findall(r"^ +(\d+): [\d.]+ s per step", output, re.M)]
    assert tried == [1, 2, 4, 8]
    assert int(re.search(r"fastest: --batch.per_device_batch_size (\d+)", output)[1]) in tried


def test_the_bigram_baseline_is_the_one_counted_by_hand(finished_run, dataset):
    output = script("examples/baselines.py", "--run", finished_run).stdout
    counts: dict[int, dict[int, int]] = {}
    unigram = np.ones(2048)
    pairs = {}
    for split in ("train", "validation"):
        tokens = open_split(dataset, split)
        bounds = tokens.offsets.tolist()
        documents = [tokens.read(start, stop).tolist() for start, stop in itertools.pairwise(bounds)]
        pairs[split] = [pair for ids in documents for pair in itertools.pairwise(ids)]
    for left, right in pairs["train"]:
        unigram[right] += 1
        row = counts.setdefault(left, {})
        row[right] = row.get(right, 0) + 1
    unigram /= unigram.sum()
    totals = {left: sum(row.values()) for left, row in counts.items()}

    def loss(strength):
        return -np.mean([
            np.log((counts.get(left, {}).get(right, 0) + strength * unigram[right]) / (totals.get(left, 0) + strength))
            for left, right in pairs["validation"]
        ])  # fmt: skip

    assert f"bigram       {min(map(loss, (30.0, 100.0, 300.0))):.4f}" in output
    assert f"unigram      {-np.mean([np.log(unigram[right]) for _, right in pairs['validation']]):.4f}" in output
    best = json.loads((finished_run / "summary.json").read_text())["best_loss"]
    assert f"this run     {best:.4f}" in output
