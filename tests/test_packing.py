"""Layouts against plain loops, on random documents; what they cost, and what they fill."""

import hashlib
from collections import Counter

import numpy as np
import pytest
from growth import growth

from utils.data import packing
from utils.data.loaders import build_layout
from utils.data.order import PADDING_SAMPLE
from utils.data.packing import IGNORED, BestFitLayout, best_fit_decreasing
from utils.data.token_dataset import TokenDataset, open_split

PAD = 60_000


def random_documents(random: np.random.Generator) -> tuple[TokenDataset, list[np.ndarray]]:
    """Up to 14 documents of distinct tokens, from 1 on; some empty, the stream cut into chunks at random places."""
    lengths = random.integers(0, random.choice([2, 4, 12, 40]), random.integers(1, 15))
    lengths[random.integers(len(lengths))] += 2  # something to predict
    stream = np.arange(1, 1 + lengths.sum(), dtype=random.choice([np.uint16, np.uint32]))
    chunks = np.split(stream, np.sort(random.integers(0, len(stream) + 1, random.integers(0, 4))))
    return TokenDataset(chunks, lengths), np.split(stream, np.cumsum(lengths)[:-1])


def log_normal_lengths(count: int) -> np.ndarray:
    """Lengths with a mean of 250 tokens; a tenth is longer than 530."""
    return np.random.default_rng(0).lognormal(np.log(250) - 0.5, 1.0, count).astype(np.int32).clip(1)


@pytest.mark.parametrize("layout", ["packed", "best_fit", "padded"])
def test_every_token_and_every_target_comes_exactly_once(layout, monkeypatch):
    random = np.random.default_rng(5)
    for _ in range(400):
        tokens, documents = random_documents(random)
        monkeypatch.setattr(packing, "WINDOW", random.integers(1, 8))
        rows = build_layout(tokens, layout, int(random.integers(2, 10)), pad_token_id=PAD, vocab_size=1 << 16)
        shuffled = random.permutation([*range(len(rows)), PADDING_SAMPLE, PADDING_SAMPLE])
        inputs, pairs = [], []
        for indices in np.array_split(shuffled, random.integers(1, 4)):
            if len(indices):
                batch = rows.__getitems__(indices.tolist())
                scored = batch["targets"] != IGNORED
                pairs += zip(batch["input_ids"][scored].tolist(), batch["targets"][scored].tolist(), strict=True)
                inputs += batch["input_ids"][(batch["input_ids"] != 0) & (batch["input_ids"] != PAD)].tolist()
        following = [
            pair for ids in documents for pair in zip(ids[:-1].tolist(), ids[1:].tolist(), strict=True)
        ]  # fmt: skip
        assert sorted(pairs) == following
        if layout == "padded":  # a token without a target may be missing, where a row would hold nothing else
            assert max(Counter(inputs).values()) == 1 and {first for first, _ in following} <= set(inputs)
        else:
            assert sorted(inputs) == np.concatenate(documents).tolist()


@pytest.mark.parametrize("layout", ["packed", "best_fit"])
def test_positions_count_from_the_beginning_of_each_piece(layout):
    random = np.random.default_rng(6)
    for _ in range(200):
        tokens, documents = random_documents(random)
        document_of = np.repeat(np.arange(len(documents)), [len(ids) for ids in documents])
        rows = build_layout(tokens, layout, int(random.integers(2, 10)), pad_token_id=PAD, vocab_size=1 << 16)
        batch = rows.__getitems__([*range(len(rows)), PADDING_SAMPLE])
        for ids, positions in zip(batch["input_ids"].tolist(), batch["position_ids"].tolist(), strict=True):
            assert positions[0] == 0
            for column in range(1, len(ids)):
                before, token = ids[column - 1], ids[column]
                free = before == token == 0
                together = free or (
                    before and token == before + 1 and document_of[before - 1] == document_of[token - 1]
                )
                assert positions[column] == (positions[column - 1] + 1 if together else 0)


@pytest.mark.parametrize("layout", ["packed", "best_fit", "padded"])
def test_a_batch_is_its_rows_by_themselves(layout):
    random = np.random.default_rng(7)
    for _ in range(50):
        tokens, _ = random_documents(random)
        rows = build_layout(tokens, layout, 6, pad_token_id=PAD, vocab_size=1 << 16)
        indices = random.integers(PADDING_SAMPLE, len(rows), 5).tolist()
        batch = rows.__getitems__(indices)
        for place, index in enumerate(indices):
            alone = rows.__getitems__([index])
            assert alone.pop("lengths").tolist() == batch["lengths"][place : place + 1].tolist()
            for name, row in alone.items():
                assert row.dtype == np.int64
                fill = {"input_ids": PAD, "targets": IGNORED, "attention_mask": 0}.get(name)
                width = batch[name].shape[1] - row.shape[1]
                expected = np.pad(row[0], (0, width), constant_values=fill) if width else row[0]
                assert (batch[name][place] == expected).all()


@pytest.mark.parametrize("layout", ["packed", "best_fit", "padded"])
def test_lengths_count_the_positions_that_hold_tokens(layout):
    random = np.random.default_rng(11)
    for _ in range(200):
        rows = build_layout(
            random_documents(random)[0], layout, int(random.integers(2, 10)), pad_token_id=0, vocab_size=1 << 16
        )
        batch = rows.__getitems__([*range(len(rows)), PADDING_SAMPLE])
        assert batch["lengths"].dtype == np.int64 and batch["lengths"][-1] == 0
        for ids, length in zip(batch["input_ids"], batch["lengths"], strict=True):
            assert length == np.count_nonzero(ids) and not ids[length:].any()


@pytest.mark.parametrize("layout", ["packed", "best_fit", "padded"])
def test_the_loss_mask_stands_at_its_tokens_target(layout):
    """The mask of a token goes with it, wherever the token is a target; its chunks need not be those of the tokens."""
    random = np.random.default_rng(12)
    for _ in range(200):
        tokens, documents = random_documents(random)
        mask_of = random.integers(0, 2, 1 + tokens.num_tokens, dtype=np.uint8)  # by token; these are numbers from 1 on
        chunks = np.split(mask_of[1:], np.sort(random.integers(0, tokens.num_tokens, 2)))
        tokens.loss_mask = TokenDataset(chunks, np.array([len(ids) for ids in documents]))
        rows = build_layout(tokens, layout, int(random.integers(2, 10)), pad_token_id=PAD, vocab_size=1 << 16)
        batch = rows.__getitems__([PADDING_SAMPLE, *random.permutation(len(rows)).tolist()])
        expected = np.where(batch["targets"] == IGNORED, 0, mask_of[batch["targets"].clip(0)])
        assert batch["loss_mask"].dtype == np.uint8 and (batch["loss_mask"] == expected).all()


def test_padded_rows_can_have_a_fixed_length():
    random = np.random.default_rng(13)
    for _ in range(50):
        tokens, _ = random_documents(random)
        shortest, fixed = (
            build_layout(tokens, "padded", 9, pad_token_id=PAD, vocab_size=1 << 16, fixed_length=fixed)
            for fixed in (False, True)
        )
        indices = [0, PADDING_SAMPLE, len(shortest) - 1]
        batch, wide = shortest.__getitems__(indices), fixed.__getitems__(indices)
        width = batch["input_ids"].shape[1]
        for name, fill in {"input_ids": PAD, "targets": IGNORED, "attention_mask": 0}.items():
            assert wide[name].shape == (3, 9)
            assert (wide[name][:, :width] == batch[name]).all() and (wide[name][:, width:] == fill).all()
        assert (wide["lengths"] == batch["lengths"]).all()


def test_best_fit_cuts_only_what_is_longer_than_a_row():
    random = np.random.default_rng(8)
    for _ in range(200):
        tokens, documents = random_documents(random)
        length = int(random.integers(2, 10))
        rows = BestFitLayout(tokens, length)
        row_of = {
            token: row
            for row in range(len(rows))
            for token in rows.__getitems__([row])["input_ids"][0].tolist()
            if token
        }
        for ids in documents:
            pieces = Counter(row_of[token] for token in ids.tolist())
            assert len(pieces) == -(-len(ids) // length)
            assert sorted(pieces.values())[1:] == [length] * (len(pieces) - 1)


def test_packing_equals_a_plain_best_fit_decreasing():
    random = np.random.default_rng(9)
    for _ in range(300):
        capacity = int(random.integers(2, 60))
        lengths = random.integers(1, random.integers(2, capacity + 2), random.integers(1, 200))
        free: list[int] = []
        for length in sorted(lengths.tolist(), reverse=True):
            fitting = [space for space in free if space >= length]
            if fitting:
                free.remove(min(fitting))
            free.append((min(fitting) if fitting else capacity) - length)
        order, sizes = best_fit_decreasing(lengths, capacity)
        assert sorted(order.tolist()) == list(range(len(lengths)))
        filled = [int(lengths[bin_].sum()) for bin_ in np.split(order, np.cumsum(sizes)[:-1])]
        assert sorted(capacity - total for total in filled) == sorted(free)


def test_best_fit_rows_are_the_golden_ones(monkeypatch):
    """These numbers must never change: resuming an old run depends on which documents its rows hold."""
    assert packing.WINDOW == 2**17
    monkeypatch.setattr(packing, "WINDOW", 1000)
    lengths = np.arange(5000) * 7919 % 613
    rows = BestFitLayout(TokenDataset([np.arange(lengths.sum(), dtype=np.uint32)], lengths), 256)
    ids = rows.__getitems__(list(range(len(rows))))["input_ids"]
    assert hashlib.sha256(ids.tobytes()).hexdigest()[:16] == "e3ebff27924c4b66"


@pytest.mark.parametrize("layout", ["packed", "best_fit", "padded"])
def test_utilisation_is_the_share_of_positions_that_hold_tokens(layout):
    random = np.random.default_rng(10)
    for _ in range(50):
        rows = build_layout(random_documents(random)[0], layout, 5, pad_token_id=PAD, vocab_size=1 << 16)
        batch = rows.__getitems__(list(range(len(rows))))
        used = ((batch["input_ids"] != 0) & (batch["input_ids"] != PAD)).sum()
        assert rows.utilisation == pytest.approx(used / (len(rows) * 5))


def test_best_fit_fills_rows_of_real_text(dataset):
    tokens = open_split(dataset, "train")
    assert BestFitLayout(tokens, 256).utilisation > 0.99
    assert (
        build_layout(tokens, "padded", 256, pad_token_id=PAD, vocab_size=1 << 16).utilisation < 0.7
    )  # there is something to gain


@pytest.mark.parametrize("length", [512, 2048])
def test_four_times_the_documents_take_four_times_as_long_to_lay_out(length):
    """Some 20 ms for 200,000 documents."""
    lengths = log_normal_lengths(400_000)

    def lay_out(count: int) -> None:
        assert BestFitLayout(TokenDataset([], lengths[:count]), length).utilisation > 0.99

    assert growth(lay_out, 100_000, tries=5) < 9


def test_the_window_bounds_what_is_packed_together(monkeypatch):
    """Documents of one row lie in one window, and small windows cost little: rows of 512, windows of 4,096."""
    monkeypatch.setattr(packing, "WINDOW", 4096)
    rows = BestFitLayout(TokenDataset([], log_normal_lengths(50_000)), 512)
    for members in np.split(rows.members, rows.first_member[1:-1].astype(np.int64)):
        assert members.min() // 4096 == members.max() // 4096
    assert rows.utilisation > 0.99
