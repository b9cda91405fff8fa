"""Layouts and the sample order, against brute force."""

import itertools
import json
import sys
from functools import partial

import numpy as np
import pytest
from conftest import ROOT, run

from training.launch import plan_batches
from utils.cli import UserError
from utils.data.order import (
    PADDING_SAMPLE,
    EvaluationBatchSampler,
    TrainBatchSampler,
    permute,
    sample_ids,
)
from utils.data.packing import IGNORED, BestFitLayout, PackedLayout, PaddedLayout
from utils.data.token_dataset import TokenDataset

PAD = 99


def make_tokens(lengths: list[int], chunk_sizes: list[int] | None = None) -> tuple[TokenDataset, list[np.ndarray]]:
    """Documents of distinct tokens, the stream cut into chunks at arbitrary places."""
    stream = np.arange(1000, 1000 + sum(lengths), dtype=np.uint16)
    cuts = np.cumsum(chunk_sizes or [])
    chunks = [chunk for chunk in np.split(stream, cuts) if len(chunk)]
    return TokenDataset(chunks, np.array(lengths)), np.split(stream, np.cumsum(lengths)[:-1])


@pytest.mark.parametrize("layout", [PackedLayout, BestFitLayout, partial(PaddedLayout, pad_token_id=PAD)])
@pytest.mark.parametrize("length", [2, 3, 5, 8, 64])
@pytest.mark.parametrize("lengths", [[1], [2], [7, 1, 1, 0, 3, 16, 5], [5, 5, 5], [33], [8, 8], [3, 0, 0, 8, 1]])
def test_every_target_is_scored_once(layout, length, lengths):
    tokens, documents = make_tokens(lengths, chunk_sizes=[2, 3])
    rows = layout(tokens, length)
    pairs = []
    for index in range(len(rows)):
        row = rows.__getitems__([index])
        assert row["input_ids"].shape[0] == 1 and row["input_ids"].shape[1] <= length
        scored = row["targets"] != IGNORED
        pairs += zip(row["input_ids"][scored].tolist(), row["targets"][scored].tolist(), strict=True)
    expected = [
        pair for document in documents for pair in zip(document[:-1].tolist(), document[1:].tolist(), strict=True)
    ]
    assert sorted(pairs) == sorted(expected)


@pytest.mark.parametrize("length", [3, 8, 64])
def test_packed_positions_restart_with_each_document_and_row(length):
    lengths = [7, 1, 1, 3, 16, 5]
    tokens, documents = make_tokens(lengths)
    position_in_document = np.concatenate([np.arange(len(document)) for document in documents])
    rows = PackedLayout(tokens, length)
    for index in range(len(rows)):
        positions = rows.__getitems__([index])["position_ids"][0]
        start = index * length
        for offset in range(min(length, tokens.num_tokens - start)):
            assert positions[offset] == min(position_in_document[start + offset], offset)


def test_padded_rows_are_masked_and_padded_on_the_right():
    tokens, _ = make_tokens([4, 2])
    rows = PaddedLayout(tokens, 8, PAD)
    batch = rows.__getitems__([0, 1, PADDING_SAMPLE])
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1], [1, 1, 0, 0], [1, 0, 0, 0]]
    assert batch["input_ids"][1:].tolist() == [[1004, 1005, PAD, PAD], [PAD] * 4]
    assert (batch["targets"][2] == IGNORED).all()


@pytest.mark.parametrize("size", [1, 2, 3, 7, 64, 1000, 65_537])
def test_permutation_is_one_and_changes_with_seed_and_epoch(size):
    index = np.arange(size)
    shuffled = permute(index, size, seed=1, epoch=0)
    assert (np.sort(shuffled) == index).all()
    if size >= 64:
        assert (shuffled != permute(index, size, seed=2, epoch=0)).any()
        assert (shuffled != permute(index, size, seed=1, epoch=1)).any()
        fixed_points = (shuffled == index).sum()  # one on average, as in a random permutation
        assert fixed_points < 10


def test_sample_order_is_the_golden_one():
    """These numbers must never change: resuming an old run depends on them."""
    golden = json.loads((ROOT / "tests" / "golden_order.json").read_text())
    for case in golden:
        assert (
            sample_ids(case["samples_seen"], case["count"], case["num_samples"], case["seed"]).tolist() == case["ids"]
        )


def test_order_is_a_function_of_the_position():
    whole = sample_ids(0, 100, 30, seed=5)
    assert [sorted(whole[start : start + 30].tolist()) for start in (0, 30, 60)] == [list(range(30))] * 3
    assert sample_ids(37, 11, 30, seed=5).tolist() == whole[37:48].tolist()
    sampler = iter(TrainBatchSampler(30, batch_size=4, seed=5, samples_seen=16))
    assert [next(sampler) for _ in range(3)] == whole[16:28].reshape(3, 4).tolist()
    # A draw says in which epoch, so that what is hidden of a row is another thing in each.
    draws = list(itertools.chain.from_iterable(itertools.islice(TrainBatchSampler(30, 5, 5, 0), 18)))
    assert draws == [30 * (place // 30) + row for place, row in enumerate(whole[:90].tolist())]


def test_neighbouring_samples_are_spread():
    """Correlation of position and sample, and of neighbours, as small as chance has it (3 / sqrt n)."""
    order = permute(np.arange(10_000), 10_000, seed=3, epoch=0).astype(float)
    assert abs(np.corrcoef(np.arange(10_000), order)[0, 1]) < 0.03
    assert abs(np.corrcoef(order[:-1], order[1:])[0, 1]) < 0.03


def test_evaluation_covers_every_sample_once():
    batches = list(EvaluationBatchSampler(range(10), 4))
    assert batches == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, -1, -1]]


def test_batch_plan_names_what_would_fit():
    assert plan_batches(16, None, 2).micro_batch == 8
    assert plan_batches(16, 4, 2).accumulation == 2
    with pytest.raises(UserError, match="15 or 18 would fit"):
        plan_batches(16, None, 3)
    with pytest.raises(UserError, match="1, 2, 4, 8 would fit"):
        plan_batches(16, 3, 2)


def test_layouts_need_no_torch():
    code = "import sys, utils.data.packing, utils.data.order; assert 'torch' not in sys.modules"
    run(sys.executable, "-c", code)
