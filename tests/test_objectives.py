"""The objectives: what they hide, cut out or move is counted and undone here; their loss is transformers' own."""

import copy
import itertools
import json
import math
import pickle
import re
from collections import Counter, defaultdict

import numpy as np
import pytest
import torch
from conftest import ROOT
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoTokenizer,
    BertConfig,
    DataCollatorForLanguageModeling,
    LlamaConfig,
    LlamaForCausalLM,
    ModernBertConfig,
    PreTrainedTokenizerFast,
    T5Config,
)
from transformers.trainer_pt_utils import LabelSmoother

from preparation.tokenizer.build import train_tokenizer
from preparation.tokenizer.encoding import Encoder
from utils.cli import UserError
from utils.config import FillInTheMiddleConfig, MaskedConfig, ObjectiveConfig, SpanCorruptionConfig
from utils.data.loaders import CollatedRows
from utils.data.order import PADDING_SAMPLE
from utils.data.packing import IGNORED, BestFitLayout, PackedLayout, PaddedLayout
from utils.data.token_dataset import TokenDataset
from utils.model.build import pad_token_id
from utils.objectives import Objective, count_targets, masked, objective_module, span_corruption

TEXTS = [json.loads(line)["text"] for line in (ROOT / "sample_data/dictionaries.jsonl").read_text().splitlines()[:500]]
LENGTH = 128
LAYOUTS = ["packed", "best_fit", "padded"]
NAMES = ["causal", "masked", "span_corruption", "fill_in_the_middle"]


def sentencepiece_tokenizer():
    """A unigram tokenizer of SentencePiece's kind: ▁ for a space, <0x..> for the bytes of unknown characters."""
    backend = Tokenizer(models.Unigram())
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    special = ["<unk>", "</s>", "<pad>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.UnigramTrainer(
        vocab_size=900, special_tokens=special[:3], unk_token="<unk>", show_progress=False
    )
    backend.train_from_iterator(TEXTS, trainer)
    pieces = [tuple(item) for item in json.loads(backend.to_str())["model"]["vocab"]]
    pieces += [(token, -20.0) for token in [*special[3:], "中", "文"]]
    backend.model = models.Unigram(pieces, unk_id=0, byte_fallback=True)
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", eos_token="</s>", pad_token="<pad>")


@pytest.fixture(scope="module")
def trained():
    own = {name: train_tokenizer([TEXTS], algorithm=name, vocab_size=800) for name in ("bpe", "unigram", "wordpiece")}
    return own | {"sentencepiece": sentencepiece_tokenizer()}


@pytest.fixture
def tokenizers(trained):
    """Fresh ones: an objective adds its special tokens in place."""
    return {name: copy.deepcopy(tokenizer) for name, tokenizer in trained.items()}


def layout(tokenizer, name="packed", length=LENGTH, texts=TEXTS):
    ids, offsets = Encoder(tokenizer)(texts)
    tokens = TokenDataset([ids], np.diff(offsets))
    if name == "padded":
        return PaddedLayout(tokens, length, pad_token_id(tokenizer))
    return {"packed": PackedLayout, "best_fit": BestFitLayout}[name](tokens, length)


def rows_of(tokenizer, name="packed", length=LENGTH, texts=TEXTS):
    """All rows of the dataset as one batch."""
    rows = layout(tokenizer, name, length, texts)
    return rows.__getitems__(list(range(len(rows))))


def build(tokenizer, name, **options):
    config = ObjectiveConfig(name=name)
    section = {"masked": MaskedConfig, "span_corruption": SpanCorruptionConfig}.get(name, FillInTheMiddleConfig)
    if options:
        setattr(config, name, section(**options))
    return objective_module(name).build_collator(config, tokenizer)


def generators(numbers):
    return [np.random.default_rng([7, number + 1]) for number in numbers]


def tensors(batch):
    return {name: torch.from_numpy(values) for name, values in batch.items()}


def assert_same_gradients(ours, theirs, tolerance=1e-5):
    for (name, parameter), other in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        if other.grad is not None:
            scale = float(other.grad.abs().max())
            assert float((parameter.grad - other.grad).abs().max()) <= tolerance * max(scale, 1.0), name


def assert_share(count, total, expected):
    """A share of `total` independent draws lies within four standard deviations, and there are enough to tell."""
    deviation = 4 * math.sqrt(expected * (1 - expected) / total)
    assert deviation < 0.5 * expected
    assert abs(count / total - expected) <= deviation, (count / total, expected, deviation)


# ---- all objectives


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("layout_name", LAYOUTS)
def test_a_row_is_the_same_in_any_batch_and_a_padding_row_has_no_target(tokenizers, name, layout_name):
    tokenizer = tokenizers["bpe"]
    rows, collate = layout(tokenizer, layout_name), build(tokenizer, name)
    numbers = [3, 0, PADDING_SAMPLE, 11, 12, PADDING_SAMPLE, 7, 5]
    whole = collate(rows.__getitems__(numbers), generators(numbers))
    assert set(whole) & {"lengths", "loss_mask"} == set()
    assert whole["targets"].dtype == whole["input_ids"].dtype == np.int64
    for part in ([0, 1, 2], [3, 4], [2], [5, 6, 7]):
        some = [numbers[place] for place in part]
        batch = pickle.loads(pickle.dumps(collate))(rows.__getitems__(some), generators(some))
        for key, values in batch.items():
            width = values.shape[1]
            assert np.array_equal(whole[key][part][:, :width], values), key
            if key in ("targets", "attention_mask"):  # what the larger batch has beyond is padding
                assert (whole[key][part][:, width:] == {"targets": IGNORED, "attention_mask": 0}[key]).all()
    assert (whole["targets"][[2, 5]] == IGNORED).all()
    assert ((whole["targets"] != IGNORED).sum(1)[[0, 1, 3, 4, 6, 7]] > 0).all()
    if "attention_mask" in whole:
        assert (whole["attention_mask"][:, 0] == 1).all()  # a softmax over nothing is NaN
    if name != "causal":
        again = collate(rows.__getitems__(numbers), generators([number + 100 for number in numbers]))
        assert not np.array_equal(again["input_ids"], whole["input_ids"])


@pytest.mark.parametrize("name", NAMES[1:])
def test_what_is_hidden_depends_on_row_epoch_and_seed_alone(tokenizers, name):
    """Not on the row's place in its batch, so not on micro-batches, processes and where a run was resumed."""
    tokenizer = tokenizers["bpe"]
    rows, collate = layout(tokenizer), build(tokenizer, name)

    def inputs(draws, seed=1):
        return CollatedRows(rows, collate, seed).__getitems__(draws)["input_ids"]

    whole = inputs([3, 0, PADDING_SAMPLE, 11, 3 + len(rows)])
    assert np.array_equal(inputs([11, 3]), whole[[3, 0]])
    assert not np.array_equal(whole[4], whole[0]) and not np.array_equal(inputs([3], seed=2)[0], whole[0])


@pytest.mark.parametrize("name", NAMES[1:])
@pytest.mark.parametrize("layout_name", LAYOUTS[1:])
def test_what_stands_behind_a_rows_tokens_does_not_matter(tokenizers, name, layout_name):
    """The free end of a packed row is zeros: an ordinary token, an exclamation mark, in GPT-2's vocabulary."""
    tokenizer = tokenizers["bpe"]
    collate = build(tokenizer, name)
    rows = rows_of(tokenizer, layout_name)
    numbers = range(len(rows["input_ids"]))
    behind = np.arange(LENGTH) >= rows["lengths"][:, None]
    assert behind.sum() > 100
    results = [
        collate(rows | {"input_ids": np.where(behind, token, rows["input_ids"])}, generators(numbers))
        for token in (0, 500)
    ]
    assert np.array_equal(results[0]["targets"], results[1]["targets"])
    if name == "span_corruption":
        assert np.array_equal(results[0]["input_ids"], results[1]["input_ids"])


@pytest.mark.parametrize("algorithm", ["bpe", "wordpiece"])
def test_special_tokens_are_added_once_and_survive_saving(tokenizers, trained, algorithm, tmp_path):
    tokenizer = tokenizers[algorithm]
    tokenizer.add_special_tokens({"extra_special_tokens": ["<|note|>"]})
    for name in NAMES:
        build(tokenizer, name)
    size, special = len(tokenizer), set(tokenizer.all_special_tokens)
    added = {"<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>", "<|note|>", *span_corruption.SENTINELS}
    added |= {"<|mask|>"} if algorithm == "bpe" else set()  # BERT's tokenizer has one
    assert special == set(trained[algorithm].all_special_tokens) | added
    assert size == len(trained[algorithm]) + len(added)
    assert set(tokenizer.get_vocab().values()) == set(range(size))
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    for name in NAMES:
        build(loaded, name)
    assert loaded.get_vocab() == tokenizer.get_vocab() and set(loaded.all_special_tokens) == special
    assert loaded.mask_token == tokenizer.mask_token == ("<|mask|>" if algorithm == "bpe" else "[MASK]")
    assert np.array_equal(Encoder(loaded)(TEXTS)[0], Encoder(trained[algorithm])(TEXTS)[0])  # of plain text


def test_starcoders_sentinels_are_taken_where_the_tokenizer_has_them(tokenizers):
    tokenizer = tokenizers["bpe"]
    tokenizer.add_tokens(["<fim_prefix>", "<fim_middle>", "<fim_suffix>"], special_tokens=True)
    size = len(tokenizer)
    collate = build(tokenizer, "fill_in_the_middle")
    assert len(tokenizer) == size
    assert tokenizer.convert_ids_to_tokens(collate.sentinels.tolist()) == [
        "<fim_prefix>", "<fim_suffix>", "<fim_middle>", "<|endoftext|>",
    ]  # fmt: skip


# ---- masked


@pytest.mark.parametrize("layout_name", ["best_fit", "padded"])
def test_masking_hides_the_share_and_in_the_ways_that_transformers_does(tokenizers, layout_name):
    tokenizer = tokenizers["wordpiece"]
    collate = build(tokenizer, "masked")
    rows = rows_of(tokenizer, layout_name)
    ids, special = rows["input_ids"], np.array(tokenizer.all_special_ids)
    batch = collate(rows, generators(range(len(ids))))
    free = ~np.isin(ids, special) & (np.arange(ids.shape[1]) < rows["lengths"][:, None])

    theirs = DataCollatorForLanguageModeling(tokenizer, mlm_probability=0.15, return_tensors="np", seed=1)
    their_inputs, their_targets = theirs.numpy_mask_tokens(ids.copy(), (~free).astype(int))

    for inputs, targets in ((batch["input_ids"], batch["targets"]), (their_inputs, their_targets)):
        chosen = targets != IGNORED
        assert not (chosen & ~free).any()
        assert np.array_equal(targets[chosen], ids[chosen]) and np.array_equal(inputs[~chosen], ids[~chosen])
        assert_share(chosen.sum(), free.sum(), 0.15)
        hidden, kept = inputs[chosen] == tokenizer.mask_token_id, inputs[chosen] == ids[chosen]
        assert_share(hidden.sum(), chosen.sum(), 0.8)
        assert_share(kept.sum(), chosen.sum(), 0.1)
        assert_share((~hidden & ~kept).sum(), chosen.sum(), 0.1)
    chosen = batch["targets"] != IGNORED
    random = batch["input_ids"][chosen & (batch["input_ids"] != ids) & (batch["input_ids"] != tokenizer.mask_token_id)]
    assert not np.isin(random, special).any()
    assert len(set(random.tolist())) > 0.3 * len(random)  # of the whole vocabulary
    assert_share((random < len(tokenizer) // 2).sum(), len(random), 0.5)


def test_the_rates_of_masking_are_the_options(tokenizers):
    tokenizer = tokenizers["bpe"]
    rows = rows_of(tokenizer)
    batch = build(tokenizer, "masked", mask_rate=0.4, replace_rate=0.5, random_rate=0.5)(
        rows, generators(range(len(rows["input_ids"])))
    )
    free = ~np.isin(rows["input_ids"], tokenizer.all_special_ids)
    free &= np.arange(LENGTH) < rows["lengths"][:, None]
    chosen = batch["targets"] != IGNORED
    assert_share(chosen.sum(), free.sum(), 0.4)
    assert_share((batch["input_ids"][chosen] == tokenizer.mask_token_id).sum(), chosen.sum(), 0.5)
    assert (batch["input_ids"][chosen] == rows["input_ids"][chosen]).mean() < 0.01  # by chance


MIXED = "naïve Übermut, 42nd of 1,024; l'été (Ελλάδα) Привет-мир 中文 abc_d"
MIXED_WORDS = [
    "naïve",
    "Übermut",
    ",",
    "42nd",
    "of",
    "1",
    ",",
    "024",
    ";",
    "l",
    "'",
    "été",
    "(",
    "Ελλάδα",
    ")",
    "Привет",
    "-",
    "мир",
    "中",
    "文",
    "abc",
    "_",
    "d",
]


@pytest.mark.parametrize("algorithm", ["bpe", "unigram", "wordpiece", "sentencepiece"])
def test_words_begin_where_they_do_in_the_text(tokenizers, algorithm):
    tokenizer = tokenizers[algorithm]
    collate = build(tokenizer, "masked", whole_words=True)
    num_inside = 0
    for text in TEXTS[:150]:
        encoding = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        ids = np.array([encoding["input_ids"]])
        begins = (collate.word_starts({"input_ids": ids}) == np.arange(ids.shape[1]))[0].tolist()
        if algorithm == "wordpiece":
            words = encoding.word_ids()
            expected = [place == 0 or words[place] != words[place - 1] for place in range(len(words))]
        else:  # a token begins no word if it begins between two letters or digits of the text
            places = [end - len(text[start:end].lstrip()) for start, end in encoding["offset_mapping"]]
            expected = [re.fullmatch("[a-zA-Z0-9]{2}", text[max(place - 1, 0) : place + 1]) is None for place in places]
        assert begins == expected, text
        num_inside += begins.count(False)
    assert num_inside > 1000


@pytest.mark.parametrize("algorithm", ["bpe", "sentencepiece"])
def test_words_are_found_in_characters_that_are_split_or_beyond_ascii(tokenizers, algorithm):
    tokenizer = tokenizers[algorithm]
    collate = build(tokenizer, "masked", whole_words=True)
    ids = np.array(tokenizer(MIXED, add_special_tokens=False)["input_ids"])
    starts = collate.word_starts({"input_ids": ids[None]})[0]
    words = [tokenizer.decode(ids[starts == start]).strip() for start in np.unique(starts)]
    assert [word for word in words if word] == MIXED_WORDS
    assert any("\ufffd" in tokenizer.decode([token]) for token in ids)  # parts of characters


@pytest.mark.parametrize("algorithm", ["bpe", "wordpiece"])
def test_whole_words_are_chosen_as_one_by_the_same_rate(tokenizers, algorithm):
    tokenizer = tokenizers[algorithm]
    rows = rows_of(tokenizer, "best_fit")
    collate = build(tokenizer, "masked", whole_words=True)
    batch = collate(rows, generators(range(len(rows["input_ids"]))))
    chosen = batch["targets"] != IGNORED
    starts = collate.word_starts(rows)
    free = ~np.isin(rows["input_ids"], tokenizer.all_special_ids)
    free &= np.arange(LENGTH) < rows["lengths"][:, None]
    assert np.array_equal(chosen, np.take_along_axis(chosen, starts, 1) & free)
    heads = free & (starts == np.arange(LENGTH))
    assert_share((chosen & heads).sum(), heads.sum(), 0.15)
    hidden = batch["input_ids"] == tokenizer.mask_token_id
    assert_share((chosen & hidden).sum(), chosen.sum(), 0.8)
    single = build(tokenizer, "masked")(rows, generators(range(len(rows["input_ids"]))))["targets"] != IGNORED
    assert (single != np.take_along_axis(single, starts, 1)).any()  # without the option words are torn


def test_no_word_goes_beyond_its_document(tokenizers):
    tokenizer = tokenizers["wordpiece"]
    ids = np.array([tokenizer(text, add_special_tokens=False)["input_ids"][:6] for text in ("unbelievability",) * 2])
    assert all(token.startswith("##") for token in tokenizer.convert_ids_to_tokens(ids[0, 1:].tolist()))
    collate = build(tokenizer, "masked", whole_words=True)
    positions = np.array([[0, 1, 2, 0, 1, 2], [0, 1, 2, 3, 4, 5]])
    starts = collate.word_starts({"input_ids": ids, "position_ids": positions})
    assert starts.tolist() == [[0, 0, 0, 3, 3, 3], [0] * 6]


def test_whole_words_need_a_tokenizer_that_tells_where_they_begin():
    backend = Tokenizer(models.WordLevel({"[UNK]": 0, "cat": 1}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="[UNK]", mask_token="[UNK]")
    with pytest.raises(UserError, match="where a word begins"):
        build(tokenizer, "masked", whole_words=True)


SMALL = {
    "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 48,
    "max_position_embeddings": 512, "initializer_range": 0.1,
}  # fmt: skip


def encoder(tokenizer, kind):
    torch.manual_seed(0)
    special = {"pad_token_id": tokenizer.pad_token_id, "bos_token_id": 2, "eos_token_id": 3}
    if kind == "bert":
        config = BertConfig(
            vocab_size=len(tokenizer), hidden_dropout_prob=0, attention_probs_dropout_prob=0, **SMALL, **special
        )
    else:
        config = ModernBertConfig(vocab_size=len(tokenizer), cls_token_id=2, sep_token_id=3, **SMALL, **special)
        assert config.local_attention == 128
    return masked.AUTO_MODEL.from_config(config)


@pytest.mark.parametrize("kind", ["bert", "modernbert"])
@pytest.mark.parametrize("layout_name", ["best_fit", "padded"])
def test_masked_loss_and_gradients_are_transformers_own(tokenizers, kind, layout_name):
    """Of packed rows: of their documents, each by itself, also where they are longer than the local attention."""
    tokenizer = tokenizers["wordpiece"]
    rows = layout(tokenizer, layout_name, 320)
    numbers = [0, 1, len(rows) - 1]
    rows = rows.__getitems__(numbers)
    batch = tensors(build(tokenizer, "masked")(rows, generators(numbers)))
    ours = encoder(tokenizer, kind)
    theirs = copy.deepcopy(ours)
    loss = Objective(ours, ObjectiveConfig(name="masked"))(**batch)
    if layout_name == "padded":
        count = count_targets(batch)
        expected = count * theirs(batch["input_ids"], batch["attention_mask"], labels=batch["targets"]).loss
    else:
        expected, longest = torch.zeros(()), 0
        for row, start, stop in pieces_of(rows):
            ids, targets = batch["input_ids"][row : row + 1, start:stop], batch["targets"][row : row + 1, start:stop]
            if (targets != IGNORED).any():
                expected = expected + theirs(ids, labels=targets).loss * (targets != IGNORED).sum()
            longest = max(longest, stop - start)
        assert longest > 128
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)
    loss.backward()
    expected.backward()
    assert_same_gradients(ours, theirs)


def pieces_of(rows):
    """Row, begin and end of each piece of a document."""
    for row, length in enumerate(rows["lengths"].tolist()):
        restarts = [0] if "attention_mask" in rows else np.flatnonzero(rows["position_ids"][row] == 0).tolist()
        starts = [start for start in restarts if start < length]
        yield from ((row, start, stop) for start, stop in itertools.pairwise([*starts, length]))


# ---- span corruption


def t5_counts(length, density=0.15, mean=3.0):
    """As in T5's `random_spans_noise_mask`, by hand."""
    num_noise = min(max(round(length * density), 1), length - 1)
    return num_noise, max(round(num_noise / mean), 1)


def undo_spans(inputs, targets, sentinels):
    """The text and the spans that had been cut out of it; both are without their eos."""
    spans: list[list[int]] = []
    for token in targets:
        if token in sentinels:
            assert token == sentinels[len(spans)]
            spans.append([])
        else:
            spans[-1].append(token)
    order = [token for token in inputs if token in sentinels]
    assert order == sentinels[: len(spans)] and all(spans)
    text = [spans[sentinels.index(token)] if token in sentinels else [token] for token in inputs]
    return list(itertools.chain.from_iterable(text)), spans


@pytest.mark.parametrize("layout_name", LAYOUTS)
def test_spans_and_input_make_up_the_text(tokenizers, layout_name):
    tokenizer = tokenizers["unigram"]
    collate = build(tokenizer, "span_corruption")
    rows = rows_of(tokenizer, layout_name)
    batch = collate(rows, generators(range(len(rows["input_ids"]))))
    sentinels = tokenizer.convert_tokens_to_ids([f"<extra_id_{number}>" for number in range(100)])
    widths = defaultdict(set)
    for number, length in enumerate(rows["lengths"].tolist()):
        text = rows["input_ids"][number, :length].tolist()
        text = text[:-1] if text[-1] == tokenizer.eos_token_id else text
        inputs = batch["input_ids"][number][batch["attention_mask"][number] == 1].tolist()
        targets = batch["targets"][number][batch["targets"][number] != IGNORED].tolist()
        if len(text) < 2:
            assert inputs == [*text, tokenizer.eos_token_id] and targets == []
            continue
        assert inputs.pop() == targets.pop() == tokenizer.eos_token_id
        undone, spans = undo_spans(inputs, targets, sentinels)
        assert undone == text
        num_noise, num_spans = t5_counts(len(text))
        assert (sum(map(len, spans)), len(spans)) == (num_noise, num_spans)
        assert inputs[0] not in sentinels and inputs[-1] in sentinels
        widths[len(text)].add((len(inputs) + 1, len(targets) + 1))
    assert widths[LENGTH] == {(batch["input_ids"].shape[1], batch["targets"].shape[1])}
    assert all(len(widths[length]) == 1 for length in widths) and len(widths) > 1


def test_every_way_to_cut_the_spans_is_equally_likely(tokenizers):
    collate = build(tokenizers["bpe"], "span_corruption", noise_density=0.5, mean_span_length=2.0)
    generator = np.random.default_rng(0)
    text = np.arange(500, 508)
    seen = Counter(tuple(collate.corrupt(text, generator)[0].tolist()) for _ in range(9000))
    assert len(seen) == 9  # 4 = 1 + 3 = 2 + 2 = 3 + 1, of both kinds
    for count in seen.values():
        assert_share(count, 9000, 1 / 9)


@pytest.mark.parametrize(
    ("density", "mean"), [(0.15, 3.0), (0.5, 3.0), (0.15, 1.0), (0.9, 2.0), (1.0, 1.0), (0.0, 3.0)]
)
def test_spans_fit_at_any_length_and_no_shorter_text_is_wider(tokenizers, density, mean):
    collate = build(tokenizers["bpe"], "span_corruption", noise_density=density, mean_span_length=mean)
    generator, before = np.random.default_rng(0), (0, 0)
    for length in [*range(80), 511, 512, 2047, 2048]:
        inputs, targets = collate.corrupt(np.full(length, 500), generator)
        widths = collate.widths(length)
        assert (len(inputs), max(len(targets), 1)) == widths and (length < 2) == (len(targets) == 0)
        assert np.isin(targets, collate.sentinels).sum() <= 100
        assert widths >= before and widths[1] >= before[1]
        before = widths


@pytest.mark.parametrize("layout_name", ["best_fit", "padded"])
def test_span_corruption_loss_and_gradients_are_t5s_own(tokenizers, layout_name):
    tokenizer = tokenizers["bpe"]
    collate = build(tokenizer, "span_corruption")
    rows = layout(tokenizer, layout_name)
    numbers = [0, 1, PADDING_SAMPLE, len(rows) - 1]
    batch = tensors(collate(rows.__getitems__(numbers), generators(numbers)))
    torch.manual_seed(0)
    config = T5Config(
        vocab_size=len(tokenizer), d_model=32, d_kv=16, d_ff=48, num_layers=2, num_heads=2, dropout_rate=0.0,
        pad_token_id=tokenizer.pad_token_id, decoder_start_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    ours = span_corruption.AUTO_MODEL.from_config(config)
    theirs = copy.deepcopy(ours)
    assert torch.equal(batch["decoder_input_ids"], theirs._shift_right(batch["targets"]))
    loss = Objective(ours, ObjectiveConfig(name="span_corruption"))(**batch)
    expected = theirs(batch["input_ids"], batch["attention_mask"], labels=batch["targets"]).loss * count_targets(batch)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)
    loss.backward()
    expected.backward()
    assert_same_gradients(ours, theirs)
    with torch.no_grad():  # row by row and without padding: what pads has no part in it
        alone = torch.zeros(())
        for number in (0, 1, 3):
            targets = batch["targets"][number]
            mask = batch["attention_mask"][number] == 1
            labels = targets[targets != IGNORED][None]
            alone += theirs(batch["input_ids"][number, mask][None], labels=labels).loss * labels.numel()
    torch.testing.assert_close(alone, expected.detach(), rtol=1e-5, atol=0)


# ---- fill-in-the-middle


def undo_middle(piece, sentinels):
    """(prefix + middle + suffix, lengths of these three or None where prefix and middle are one run)."""
    before, behind, fill, eos = sentinels
    assert piece[0] == before and piece[-1] == eos
    place, other = piece.index(fill), piece.index(behind)
    middle = piece[place + 1 : -1]
    prefix, suffix = piece[1:other], piece[other + 1 : place]
    lengths = (len(prefix), len(middle), len(suffix)) if prefix else None
    return prefix + middle + suffix, lengths


@pytest.mark.parametrize("algorithm", ["bpe", "wordpiece"])
@pytest.mark.parametrize("layout_name", LAYOUTS)
def test_the_rearranged_pieces_make_up_the_text(tokenizers, algorithm, layout_name):
    tokenizer = tokenizers[algorithm]
    collate = build(tokenizer, "fill_in_the_middle", rate=0.6, suffix_first_rate=0.3)
    rows = rows_of(tokenizer, layout_name)
    batch = collate(rows, generators(range(len(rows["input_ids"]))))
    begins, eos = {tokenizer.bos_token_id, tokenizer.eos_token_id}, tokenizer.eos_token_id
    able = moved = together = 0
    expected_together = 0.0
    for row, start, stop in pieces_of(rows):
        old, new = rows["input_ids"][row, start:stop].tolist(), batch["input_ids"][row, start:stop].tolist()
        targets = batch["targets"][row, start:stop].tolist()
        lead = int(old[0] in begins)
        content = len(old) - lead - 4
        able += content >= 8
        if new == old:
            assert targets == rows["targets"][row, start:stop].tolist()
            continue
        assert content >= 8 and new[:lead] == old[:lead] and targets == [*new[1:], IGNORED]
        text, lengths = undo_middle(new[lead:], collate.sentinels.tolist())
        assert text == old[lead : lead + content]
        assert eos not in text  # the one that the piece had is at its end, and there only
        moved += 1
        together += lengths is None
        expected_together += 0.3 + 0.7 * (1 - (content / (content + 1)) ** 2)  # or both cuts left the prefix empty
    assert_share(moved, able, 0.6)
    assert_share(together, moved, expected_together / moved)
    outside = np.arange(rows["input_ids"].shape[1]) >= rows["lengths"][:, None]
    assert np.array_equal(batch["input_ids"][outside], rows["input_ids"][outside])
    assert (batch["targets"][outside] == IGNORED).all()


def test_every_two_cuts_are_equally_likely(tokenizers):
    tokenizer = tokenizers["bpe"]
    collate = build(tokenizer, "fill_in_the_middle", rate=1.0, suffix_first_rate=0.0)
    num_pieces, size = 81, 12  # 8 tokens of content, so cuts at 0 to 8
    ids = np.tile(np.arange(500, 500 + size), (100, num_pieces))
    rows = {
        "input_ids": ids, "targets": ids, "position_ids": np.tile(np.arange(size), (100, num_pieces)),
        "lengths": np.full(100, num_pieces * size),
    }  # fmt: skip
    pieces = collate(rows, generators(range(100)))["input_ids"].reshape(-1, size).tolist()
    seen: Counter[tuple[int, int]] = Counter()
    for piece in pieces:
        _, lengths = undo_middle(piece, collate.sentinels.tolist())
        if lengths is not None:
            seen[lengths[0], lengths[0] + lengths[1]] += 1
    assert len(seen) == 36  # 1 ≤ left ≤ right ≤ 8
    for (left, right), count in seen.items():
        assert_share(count, len(pieces), (1 if left == right else 2) / 81)


def test_fill_in_the_middle_at_rate_0_is_causal(tokenizers):
    rows = rows_of(tokenizers["bpe"])
    numbers = range(len(rows["input_ids"]))
    ours = build(tokenizers["bpe"], "fill_in_the_middle", rate=0.0)(rows, generators(numbers))
    causal = build(tokenizers["bpe"], "causal")(rows, generators(numbers))
    assert ours.keys() == causal.keys() and all(np.array_equal(ours[name], causal[name]) for name in causal)


def llama(tokenizer):
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=len(tokenizer), **SMALL, pad_token_id=None, bos_token_id=0, eos_token_id=0)
    return LlamaForCausalLM(config)


@pytest.mark.parametrize("layout_name", ["best_fit", "padded"])
def test_fill_in_the_middle_loss_and_gradients_are_transformers_own(tokenizers, layout_name):
    tokenizer = tokenizers["bpe"]
    collate = build(tokenizer, "fill_in_the_middle", rate=1.0)
    rows = layout(tokenizer, layout_name, texts=[text for text in TEXTS if 80 < len(text) < 200])
    rows = rows.__getitems__([0, 1, 2])
    batch = tensors(collate(rows, generators([0, 1, 2])))
    ours = llama(tokenizer)
    theirs = copy.deepcopy(ours)
    loss = Objective(ours, ObjectiveConfig(name="fill_in_the_middle"))(**batch)
    expected, num_pieces = torch.zeros(()), 0
    for row, start, stop in pieces_of(rows):
        ids = batch["input_ids"][row : row + 1, start:stop]
        assert collate.sentinels[2] in ids.numpy()
        expected = expected + theirs(ids, labels=ids).loss * (stop - start - 1)
        num_pieces += 1
    assert num_pieces > (3 if layout_name == "best_fit" else 2)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)
    loss.backward()
    expected.backward()
    assert_same_gradients(ours, theirs)


# ---- what all losses may be given


def test_label_smoothing_is_the_trainers_and_z_loss_its_formula_in_training_only(tokenizers):
    tokenizer = tokenizers["bpe"]
    rows = layout(tokenizer, "padded").__getitems__([0, 1, 2])
    batch = tensors(build(tokenizer, "causal")(rows, []))
    model = llama(tokenizer)
    plain, smooth, z = (
        Objective(model, config)
        for config in (ObjectiveConfig(), ObjectiveConfig(label_smoothing=0.1), ObjectiveConfig(z_loss=0.01))
    )
    logits = model(batch["input_ids"], batch["attention_mask"]).logits
    count = count_targets(batch)
    expected = LabelSmoother(epsilon=0.1)({"logits": logits}, batch["targets"]) * count
    torch.testing.assert_close(smooth(**batch), expected, rtol=1e-5, atol=0)
    real = logits[batch["targets"] != IGNORED].double()
    penalty = 0.01 * (real.exp().sum(-1).log() ** 2).sum()
    assert penalty > 0.01 * count
    torch.testing.assert_close(z(**batch), plain(**batch) + penalty.float(), rtol=1e-5, atol=0)
    model.eval()
    for objective in (plain, smooth, z):
        objective.eval()
    with torch.no_grad():
        assert float(smooth(**batch)) == float(z(**batch)) == float(plain(**batch))
