"""Training, describing and applying tokenizers, compared with the tokenizer's own call and plain computations."""

import hashlib
import json
import pickle
import random
import subprocess
import sys
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pytest
from conftest import ROOT, call, environment, error_line
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from preparation.recipe import TokenizerConfig
from preparation.tokenizer import encoding
from preparation.tokenizer.build import (
    describe_tokenizer,
    iter_sample,
    load_tokenizer,
    token_dtype,
    train_tokenizer,
)
from preparation.tokenizer.encoding import (
    Encoder,
    build_encoder,
    find_template,
    has_new_characters,
    iter_pieces,
    splits_at_spaces,
)
from utils.cli import UserError
from utils.data.token_dataset import load_manifest
from utils.pretrained import hide_special_tokens

ENGLISH = [
    json.loads(line)["text"] for line in (ROOT / "sample_data" / "dictionaries.jsonl").read_text("utf-8").splitlines()
]
GERMAN = [  # Goethe, Die Leiden des jungen Werthers, 1774; Faust I, 1808
    "Wie froh bin ich, daß ich weg bin! Bester Freund, was ist das Herz des Menschen! Dich zu verlassen, den ich so "
    "liebe, von dem ich unzertrennlich war, und froh zu sein! Ich weiß, du verzeihst mir's. Waren nicht meine übrigen "
    "Verbindungen recht ausgesucht vom Schicksal, um ein Herz wie das meine zu ängstigen?",
    "Habe nun, ach! Philosophie,\nJuristerei und Medizin,\nUnd leider auch Theologie\nDurchaus studiert, mit heißem "
    "Bemühn.\nDa steh ich nun, ich armer Tor!\nUnd bin so klug als wie zuvor;",
]
JAPANESE = [  # 夏目漱石『吾輩は猫である』、1905
    "吾輩は猫である。名前はまだ無い。\n　どこで生れたかとんと見当がつかぬ。何でも薄暗いじめじめした所でニャーニャー泣いていた事だけは記憶している。"
    "吾輩はここで始めて人間というものを見た。しかもあとで聞くとそれは書生という人間中で一番獰悪な種族であったそうだ。",
]
CHINESE = [  # 老子《道德經》
    "道可道，非常道。名可名，非常名。無名天地之始；有名萬物之母。故常無欲，以觀其妙；常有欲，以觀其徼。此兩者，同出而異名，同謂之玄。玄之又玄，衆妙之門。",
    "天下皆知美之為美，斯惡已。皆知善之為善，斯不善已。\n故有無相生，難易相成，長短相較，高下相傾，音聲相和，前後相隨。",
]
CODE = [(ROOT / "train.py").read_text("utf-8"), (ROOT / "pyproject.toml").read_text("utf-8")]
EXTRA = ["<|user|>", "<|assistant|>"]
CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message.role }}|>{{ message.content }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
TRAINING = [ENGLISH[:300], GERMAN + JAPANESE + CHINESE]
ALGORITHMS = ["bpe", "unigram", "wordpiece"]


def fuzz() -> list[str]:
    rng = random.Random(7)
    texts = [rng.randbytes(300).decode(errors="replace") for _ in range(20)]
    for last in (0x7F, 0xFFF, 0xD7FF, 0x10FFFF):
        codes = [rng.randint(0, last) for _ in range(2000)]
        texts.append("".join(chr(code) for code in codes if not 0xD800 <= code < 0xE000))
    runs = "".join(
        rng.choice([" ", "\n", "\t", "\r\n", "a", "?", "\u3000", "\u00a0"]) * rng.randint(1, 9) for _ in range(500)
    )
    return [*texts, runs, " " * 5000, "\n" * 5000, "a" * 5000, "ab " * 2000]


def awkward_texts(tokenizer) -> list[str]:
    eos, pad = tokenizer.eos_token, tokenizer.pad_token
    return [
        "",
        " ",
        "\n",
        eos,
        f"the end{eos}",
        f"a{eos}b {pad} c",
        f"{eos}{eos}",
        EXTRA[0],
        f"a {EXTRA[1]}b",
        eos[:-1],
        "👩‍👩‍👧‍👦 e\u0301",
    ]


def all_texts(tokenizer) -> list[str]:
    return [*ENGLISH[300:400], *GERMAN, *JAPANESE, *CHINESE, *CODE, *fuzz(), *awkward_texts(tokenizer)]


def expected_ids(tokenizer, text: str, parse: bool = False) -> list[int]:
    """The ids in a dataset: the tokenizer's own, and the eos token unless they end with it. Special tokens in the text
    are text, or those tokens if `parse`."""
    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    backend.encode_special_tokens = not parse
    ids = backend.encode(text).ids
    return ids if len(ids) > 1 and ids[-1] == tokenizer.eos_token_id else [*ids, tokenizer.eos_token_id]


def check_ids(encoder: Encoder, tokenizer, texts: list[str], parse: bool = False) -> None:
    ids, offsets = encoder(texts)
    assert ids.dtype == encoder.dtype == np.uint16 and offsets.dtype == np.int64
    assert len(offsets) == len(texts) + 1 and offsets[0] == 0 and offsets[-1] == len(ids)
    for index, text in enumerate(texts):
        assert ids[offsets[index] : offsets[index + 1]].tolist() == expected_ids(tokenizer, text, parse), text[:100]


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    folders = {}
    for algorithm in ALGORITHMS:
        tokenizer = train_tokenizer(
            TRAINING, algorithm=algorithm, vocab_size=800, special_tokens=EXTRA, chat_template=CHAT_TEMPLATE
        )
        folders[algorithm] = tmp_path_factory.mktemp("tokenizers") / algorithm
        tokenizer.save_pretrained(folders[algorithm])
        reloaded = AutoTokenizer.from_pretrained(folders[algorithm])
        for text in all_texts(tokenizer):
            assert reloaded(text)["input_ids"] == tokenizer(text)["input_ids"]
    return folders


@pytest.fixture(params=ALGORITHMS)
def tokenizer(request, folders):
    return load_tokenizer(str(folders[request.param]))


@pytest.fixture
def bpe(folders):
    return load_tokenizer(str(folders["bpe"]))


def test_document_ids_are_the_tokenizers_own_and_eos(tokenizer):
    check_ids(Encoder(tokenizer), tokenizer, all_texts(tokenizer))


def test_special_tokens_become_tokens_if_asked_for(tokenizer):
    check_ids(Encoder(tokenizer, parse_special_tokens=True), tokenizer, awkward_texts(tokenizer), parse=True)
    ids, _ = Encoder(tokenizer)(awkward_texts(tokenizer))
    assert not {tokenizer.pad_token_id, *tokenizer.convert_tokens_to_ids(EXTRA)} & set(ids.tolist())


def sentencepiece_like(model) -> Tokenizer:
    backend = Tokenizer(model)
    backend.normalizer = normalizers.Replace(" ", "▁")
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    backend.add_special_tokens(["<s>", "</s>", "<unk>"])
    backend.add_tokens(["<think>"])
    return backend


CHARACTERS = ["<s>", "</s>", "<unk>", *"▁abcdefghijklmnopqrstuvwxyz<>/|", "<think>"]


@pytest.mark.parametrize(
    "backend",
    [
        sentencepiece_like(models.Unigram([(piece, -float(rank)) for rank, piece in enumerate(CHARACTERS)], 2, False)),
        sentencepiece_like(
            models.BPE(
                {piece: id for id, piece in enumerate([*CHARACTERS, "</", "s>", "th"])},
                [("<", "/"), ("s", ">"), ("</", "s>"), ("<", "s>"), ("t", "h")],
                unk_token="<unk>",
            )
        ),
        sentencepiece_like(
            models.WordPiece(
                {piece: id for id, piece in enumerate([*CHARACTERS, *(f"##{c}" for c in CHARACTERS[3:-1])])},
                unk_token="<unk>",
            )
        ),
    ],
    ids=["unigram", "bpe", "wordpiece"],
)
def test_a_model_that_has_special_tokens_among_its_pieces_writes_none(backend):
    """encode_special_tokens alone would not do: unigram and BPE models write </s> as its id. All else is as it was."""
    special = [backend.token_to_id(token) for token in ("<s>", "</s>")]
    hidden, names = hide_special_tokens(backend)
    attribute = Tokenizer.from_str(backend.to_str())
    attribute.encode_special_tokens = True
    leaks = set(special) & set(attribute.encode("a </s>b <s>").ids)
    assert bool(leaks) != isinstance(backend.model, models.WordPiece)
    for text in ("a </s>b", "<s>", "x<s>struck</s> out", "</s></s>"):
        ids = hidden.encode(text).ids
        assert not set(special) & set(ids) and len(ids) >= 3
    for text in ("abc the th <think> x/y", "", "q <th", " </ s> ☃"):
        assert hidden.encode(text).ids == backend.encode(text).ids
    text = "<s>a thing</s> <think>b</s>"
    renamed = text.replace("</s>", names["</s>"]).replace("<s>", names["<s>"])
    assert hidden.encode(renamed).ids == backend.encode(text).ids
    again = pickle.loads(pickle.dumps(hidden))
    assert again.encode("a </s>b").ids == hidden.encode("a </s>b").ids


def test_gigatoken_gives_the_same_ids(bpe):
    pytest.importorskip("gigatoken")
    encoder = build_encoder(bpe, ENGLISH[:50])
    assert encoder.note.startswith("encoded by gigatoken")
    check_ids(encoder, bpe, all_texts(bpe))
    assert encoder.note.startswith("encoded by gigatoken"), "it fell back on the way"
    assert build_encoder(bpe, ENGLISH[:50], use_gigatoken=False).note == "encoded by tokenizers"


def test_byte_level_tokenizers_round_trip_and_know_every_text(folders):
    for algorithm in ("bpe", "unigram"):
        tokenizer = load_tokenizer(str(folders[algorithm]))
        assert len(tokenizer) == 800 and tokenizer.unk_token is None
        assert set(pre_tokenizers.ByteLevel.alphabet()) <= tokenizer.get_vocab().keys()
        for text in [*ENGLISH[300:400], *GERMAN, *JAPANESE, *CHINESE, *CODE, *fuzz()]:
            assert tokenizer.decode(tokenizer(text)["input_ids"], skip_special_tokens=True) == text


def test_wordpiece_is_cased_and_splits_as_bert_does(folders):
    tokenizer = load_tokenizer(str(folders["wordpiece"]))
    assert len(tokenizer) == 800
    tokens = tokenizer.convert_ids_to_tokens(tokenizer("The tokenizer's 猫である ☃")["input_ids"])
    assert tokens[:2] == ["[CLS]", "The"] and tokens[-1] == "[UNK]"
    assert "".join(tokens[2:]).replace("##", "").startswith("tokenizer's猫")
    assert any(token.startswith("##") for token in tokens)
    assert (
        tokenizer.decode(tokenizer("The state, of mind")["input_ids"], skip_special_tokens=True)
        == "The state , of mind"
    )


def test_bpe_is_the_trainers_own_result():
    reference = Tokenizer(models.BPE())
    reference.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    reference.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=600, special_tokens=["<|endoftext|>", "<|pad|>"], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    reference.train_from_iterator(TRAINING, trainer)
    reference.post_processor = processors.TemplateProcessing(
        single="<|endoftext|> $A", pair="<|endoftext|> $A <|endoftext|> $B", special_tokens=[("<|endoftext|>", 0)]
    )
    assert train_tokenizer(TRAINING, vocab_size=600).backend_tokenizer.to_str() == reference.to_str()


def test_special_tokens_and_chat_template_survive_saving(tokenizer):
    user, assistant = tokenizer.convert_tokens_to_ids(EXTRA)
    assert set(EXTRA) <= set(tokenizer.all_special_tokens)
    hello = tokenizer("hello", add_special_tokens=False)["input_ids"]
    for text, ids in ((EXTRA[0], [user]), (f"hello{EXTRA[1]}hello", [*hello, assistant, *hello])):
        assert tokenizer(text, add_special_tokens=False)["input_ids"] == ids
    conversation = [{"role": "user", "content": "hello"}]
    ids = tokenizer.apply_chat_template(conversation, add_generation_prompt=True)["input_ids"]
    assert ids == [user, *hello, assistant]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"vocab_size": 257}, "at least 258"),
        ({"vocab_size": 258, "algorithm": "unigram"}, "at least 259"),
        ({"vocab_size": 8, "algorithm": "wordpiece"}, "at least 9"),
        ({"vocab_size": 258, "special_tokens": ["<|x|>"]}, "at least 259"),
        ({"vocab_size": 2**31 + 1}, "at most 2^31"),
        ({"special_tokens": ["<|pad|>"]}, "'<|pad|>' is listed or built in already"),
        ({"special_tokens": ["<|x|>", "<|x|>"]}, "'<|x|>' is listed or built in already"),
        ({"special_tokens": [" "]}, "' ' is empty"),
        ({"special_tokens": ["<|x|>"], "pretrained": "gpt2"}, "only apply to a tokenizer trained here"),
    ],
)
def test_what_cannot_be_trained_is_refused_in_one_line(options, message):
    (problem,) = TokenizerConfig(**options).problems()
    assert problem.startswith("tokenizer.") and message in problem


def test_tokens_that_only_the_template_knows_are_refused(tmp_path):
    (tmp_path / "template").write_text("<|user|>{{ messages }}<|endoftext|><|bot|>")
    (problem,) = TokenizerConfig(chat_template=str(tmp_path / "template"), special_tokens=["<|bot|>"]).problems()
    assert "tokenizer.special_tokens lacks <|user|>" in problem


def test_a_template_with_a_syntax_error_is_refused_with_its_line():
    with pytest.raises(UserError, match="chat_template: line 2"):
        train_tokenizer([ENGLISH[:20]], vocab_size=300, chat_template="{% for x in messages %}\n{{ x }")


def test_the_smallest_vocabularies_are_respected():
    for algorithm, size in (("bpe", 258), ("unigram", 259), ("wordpiece", 9)):
        assert len(train_tokenizer([ENGLISH[:20]], algorithm=algorithm, vocab_size=size)) == size


def test_a_template_may_refuse_a_conversation():
    template = "{{ raise_exception('a system message comes first') }}"
    assert train_tokenizer([ENGLISH[:20]], vocab_size=258, chat_template=template).chat_template == template


def test_training_is_the_same_in_every_process():
    texts = [*ENGLISH[:60], *JAPANESE]
    program = (
        "import hashlib, json, sys; from preparation.tokenizer.build import train_tokenizer\n"
        "for algorithm in ['bpe', 'unigram', 'wordpiece']:\n"
        "    tokenizer = train_tokenizer([json.loads(sys.argv[1])], algorithm=algorithm, vocab_size=700)\n"
        "    print(hashlib.sha256(tokenizer.backend_tokenizer.to_str().encode()).hexdigest())"
    )
    settings = [{"RAYON_NUM_THREADS": "1"}, {"RAYON_NUM_THREADS": "2", "TOKENIZERS_PARALLELISM": "true"}]
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", program, json.dumps(texts)], env=environment() | setting,
            stdout=subprocess.PIPE, text=True,
        )
        for setting in settings
    ]  # fmt: skip
    here = [
        hashlib.sha256(
            train_tokenizer([texts], algorithm=name, vocab_size=700).backend_tokenizer.to_str().encode()
        ).hexdigest()
        for name in ALGORITHMS
    ]
    assert [process.communicate()[0].split() for process in processes] == [here, here]


def with_template(tokenizer, single: str) -> PreTrainedTokenizerFast:
    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    special = [(token, backend.token_to_id(token)) for token in (tokenizer.eos_token, tokenizer.pad_token)]
    backend.post_processor = processors.TemplateProcessing(single=single, special_tokens=special)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token=tokenizer.eos_token, pad_token=tokenizer.pad_token
    )


@pytest.mark.parametrize(
    ("single", "template"),
    [
        ("$A", ([], [])),
        ("$A <|endoftext|>", ([], [0])),
        ("<|pad|> <|endoftext|> $A <|endoftext|>", ([1, 0], [0])),
        ("<|endoftext|> $A <|pad|>", ([0], [1])),
        ("<|pad|> <|pad|> $A", ([1, 1], [])),
        ("$A <|pad|> $A", None),
    ],
)
@pytest.mark.parametrize("use_gigatoken", [True, False])
def test_every_template_gives_the_tokenizers_own_ids(bpe, single, template, use_gigatoken):
    tokenizer = with_template(bpe, single)
    assert find_template(tokenizer.backend_tokenizer) == template
    encoder = build_encoder(tokenizer, ENGLISH[:5], use_gigatoken)
    check_ids(encoder, tokenizer, [*ENGLISH[:20], *awkward_texts(tokenizer), "", ""])
    if template is None and use_gigatoken:
        assert "more than a fixed prefix and suffix" in encoder.note
    ids, offsets = encoder([])
    assert len(ids) == 0 and offsets.tolist() == [0]


def test_tokenizers_that_gigatoken_cannot_take_fall_back_and_say_so(folders):
    pytest.importorskip("gigatoken")
    for algorithm, reason in (("unigram", "Unigram"), ("wordpiece", "WordPiece")):
        tokenizer = load_tokenizer(str(folders[algorithm]))
        encoder = build_encoder(tokenizer, ENGLISH[:20])
        assert encoder.note.startswith("encoded by tokenizers (gigatoken: ") and reason in encoder.note
        check_ids(encoder, tokenizer, ENGLISH[300:320])
    lacking = Tokenizer(models.BPE())  # like published vocabularies that lack a byte that text never contains
    lacking.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    lacking.train_from_iterator(
        ENGLISH[:100], trainers.BpeTrainer(vocab_size=500, initial_alphabet=alphabet[:-1], special_tokens=["<eos>"])
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=lacking, eos_token="<eos>")
    encoder = build_encoder(tokenizer, ENGLISH[:20])
    assert encoder.note.startswith("encoded by tokenizers (gigatoken: "), encoder.note
    check_ids(encoder, tokenizer, ENGLISH[300:320])


def test_characters_that_are_new_to_unicode_go_to_tokenizers(bpe):
    """U+A7D4 is a letter in gigatoken 0.10 but not in tokenizers 0.23, so words end differently."""
    pytest.importorskip("gigatoken")
    texts = ["plain", "a \ua7d4뵸 b", "", "日本語", "\U000323bcs", "it\ua7d4s", "👩‍👩‍👧"]
    encoder = build_encoder(bpe, ENGLISH[:5])
    ids, offsets = encoder(texts)
    assert encoder.note.startswith("encoded by gigatoken")
    assert [has_new_characters(text) for text in texts] == [False, True, False, False, True, True, False]
    for text, start, stop in zip(texts, offsets[:-1], offsets[1:], strict=True):
        assert ids[start:stop].tolist() == [*bpe(text)["input_ids"], bpe.eos_token_id]


def test_other_ids_of_gigatoken_are_found_and_not_used(bpe, monkeypatch):
    gigatoken = pytest.importorskip("gigatoken")
    other = train_tokenizer([CODE], vocab_size=800, special_tokens=EXTRA)
    wrong = gigatoken.Tokenizer(other.backend_tokenizer)
    monkeypatch.setattr(gigatoken, "Tokenizer", lambda backend: wrong)
    # Single bytes have the same ids in both vocabularies, words do not.
    encoder = build_encoder(bpe, [*"abc" * 50, "", ENGLISH[0]])
    assert encoder.note == "encoded by tokenizers (gigatoken: ids differ on sample document 151)"
    check_ids(encoder, bpe, ENGLISH[300:320])
    assert "ids differ on probe" in build_encoder(bpe, ["a"]).note


class FailsLater:
    """gigatoken that fails on a certain text."""

    def __init__(self, real, failure: BaseException | None):
        self.real, self.failure = real, failure

    def encode_batch(self, texts: list[str]):
        if "fail" not in texts:
            return self.real.encode_batch(texts)
        if self.failure is None:
            return self.real.encode_batch(texts[1:])  # loses a document
        raise self.failure


class Panic(BaseException):
    """Like a panic in Rust, which in Python is not an Exception."""


@pytest.mark.parametrize("failure", [RuntimeError("no such merge\nat line 3"), Panic("index out of range"), None])
def test_a_later_failure_of_gigatoken_loses_no_document(bpe, failure):
    pytest.importorskip("gigatoken")
    encoder = build_encoder(bpe, ENGLISH[:20])
    encoder._gigatoken = FailsLater(encoder._gigatoken, failure)
    check_ids(encoder, bpe, ENGLISH[:10])
    assert encoder.note.startswith("encoded by gigatoken")
    check_ids(encoder, bpe, ["fail", *ENGLISH[10:20]])
    reason = "10 results for 11 documents" if failure is None else str(failure).partition("\n")[0]
    assert encoder.note == f"encoded by tokenizers from there on (gigatoken: {reason})"
    check_ids(encoder, bpe, ENGLISH[20:30])


def test_ctrl_c_in_gigatoken_ends_the_program(bpe):
    pytest.importorskip("gigatoken")
    encoder = build_encoder(bpe, ENGLISH[:20])
    encoder._gigatoken = FailsLater(encoder._gigatoken, KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        encoder(["fail"])


@pytest.mark.parametrize("algorithm", ["bpe", "unigram"])
def test_long_documents_are_cut_where_no_token_changes(folders, algorithm, monkeypatch):
    tokenizer = load_tokenizer(str(folders[algorithm]))
    assert splits_at_spaces(tokenizer.backend_tokenizer)
    monkeypatch.setattr(encoding, "PIECE_CHARACTERS", 40)
    monkeypatch.setattr(encoding, "BATCH_CHARACTERS", 200)
    texts = all_texts(tokenizer)
    long = "".join(texts)
    pieces = list(iter_pieces(long))
    assert len(pieces) > len(long) / 200 and "".join(pieces) == long
    check_ids(Encoder(tokenizer), tokenizer, [long, "", *texts, long])
    # Cuts elsewhere do change tokens.
    monkeypatch.setattr(encoding, "iter_pieces", lambda text: iter([text[:45], text[45:]]))
    with pytest.raises(AssertionError):
        check_ids(Encoder(tokenizer), tokenizer, texts)


def test_tokenizers_that_look_across_a_space_are_not_cut(bpe, folders):
    def changed(change) -> bool:
        backend = Tokenizer.from_str(bpe.backend_tokenizer.to_str())
        change(backend)
        return splits_at_spaces(backend)

    llama3_like = pre_tokenizers.Split(Regex(r"\p{L}+|[^\s\p{L}]+[\r\n]*|\s+"), "isolated")
    assert changed(lambda backend: None)
    assert not splits_at_spaces(load_tokenizer(str(folders["wordpiece"])).backend_tokenizer)
    assert not changed(lambda backend: setattr(backend, "pre_tokenizer", llama3_like))
    assert not changed(lambda backend: setattr(backend, "pre_tokenizer", pre_tokenizers.ByteLevel(use_regex=False)))
    assert not changed(
        lambda backend: setattr(backend, "pre_tokenizer", pre_tokenizers.ByteLevel(add_prefix_space=True))
    )
    assert not changed(lambda backend: backend.add_tokens(["two words"]))
    assert not changed(lambda backend: backend.add_special_tokens([AddedToken("<x>", rstrip=True)]))


def test_tables_of_documents_through_datasets(bpe):
    encoder = Encoder(bpe)
    texts = ENGLISH[:250]
    documents = datasets.Dataset.from_dict({"text": texts}, datasets.Features({"text": datasets.Value("large_string")}))
    encoded = documents.with_format("arrow").map(
        encoder.encode_table, batched=True, batch_size=100, remove_columns=["text"], new_fingerprint="encoded",
        features=encoder.features,
    )  # fmt: skip
    assert encoded.with_format(None)["input_ids"][:] == [expected_ids(bpe, text) for text in texts]
    assert encoder.encode_table(pa.table({"text": pa.array([], pa.large_string())})).num_rows == 0


def test_large_vocabularies_take_four_bytes(bpe):
    assert token_dtype(2**16) is np.uint16 and token_dtype(2**16 + 1) is np.uint32
    bpe.add_tokens([f"<{number}>" for number in range(65_000)])
    ids, _ = Encoder(bpe)(["<64999>"])
    assert ids.dtype == np.uint32 and ids.tolist() == expected_ids(bpe, "<64999>") and ids.max() > 2**16 - 800


def test_a_sample_lies_evenly_over_the_dataset_at_any_time():
    texts = [f"{number:06d}é" for number in range(10_000)]  # 8 bytes each
    dataset = datasets.Dataset.from_dict({"text": texts, "source": [0] * len(texts)})
    for count in (10, 100, 1000, 9_999):
        taken = [text for batch in iter_sample(dataset, count * 8) for text in batch]
        assert len(taken) == len(set(taken)) == count
        positions = np.sort([int(text[:6]) for text in taken])
        gaps = np.diff([*positions, positions[0] + len(texts)])
        assert gaps.max() <= 3 * len(texts) / count, "a stretch of the dataset is left out"
    assert taken == [text for batch in iter_sample(dataset, 9_999 * 8) for text in batch]
    assert taken != [text for batch in iter_sample(dataset, 9_999 * 8, seed=1) for text in batch]
    head = texts[:1000]  # a sample from the head would fail
    assert np.diff([*[int(text[:6]) for text in head], len(texts)]).max() > 3 * len(texts) / len(head)


def test_a_sample_keeps_to_its_bytes_and_its_rows():
    dataset = datasets.Dataset.from_dict({"text": ENGLISH})
    rows = list(range(3000, 10, -3))
    chosen = dataset.select(rows)
    everything = [text for batch in iter_sample(chosen, 10**9) for text in batch]
    assert sorted(everything) == sorted(ENGLISH[row] for row in rows)
    batches = list(iter_sample(datasets.concatenate_datasets([chosen] * 4), 1_800_000))
    sizes = [sum(len(text.encode()) for text in batch) for batch in batches]
    assert 1_800_000 - 4 < sum(sizes) <= 1_800_000 and max(sizes) < 1_100_000 and len(sizes) == 2
    assert [
        text for batch in iter_sample(datasets.Dataset.from_dict({"text": ["äöü" * 100]}), 9) for text in batch
    ] == ["äöüä"]
    assert list(iter_sample(dataset.select([]), 9)) == []


def test_the_description_is_that_of_a_plain_computation(tokenizer):
    samples = {
        "english": ENGLISH[300:350],
        "german": GERMAN,
        "japanese": JAPANESE,
        "chinese": CHINESE,
        "odd": ["☃ ☃"],
        "none": [],
    }
    report = {name: describe_tokenizer(tokenizer, texts) for name, texts in samples.items()}
    assert report == json.loads(json.dumps(report))
    assert [name for name, figures in report.items() if not figures["spaced"]] == ["japanese", "chinese"]
    for name, texts in samples.items():
        ids = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
        tokens = sum(map(len, ids))
        unknown = sum(token == tokenizer.unk_token_id for row in ids for token in row)
        back = [tokenizer.decode(row, clean_up_tokenization_spaces=False) for row in ids]
        same = sum(text == decoded for text, decoded in zip(texts, back, strict=True))
        figures = report[name]
        assert figures["texts"] == len(texts)
        if texts:
            assert figures["bytes_per_token"] == pytest.approx(len("".join(texts).encode()) / tokens)
            assert figures["fertility"] == pytest.approx(tokens / sum(len(text.split()) for text in texts))
            assert figures["unknown_rate"] == pytest.approx(unknown / tokens)
            assert figures["round_trip_share"] == pytest.approx(same / len(texts))
        assert len(figures["round_trip_failures"]) == min(3, len(texts) - same)
    if tokenizer.unk_token is None:
        assert report["english"]["round_trip_share"] == 1.0 and report["odd"]["unknown_rate"] == 0.0
    else:
        assert report["odd"]["unknown_rate"] == 1.0
        assert report["odd"]["round_trip_failures"] == [{"text": "☃ ☃", "decoded": ""}]


@pytest.mark.parametrize(
    ("text", "decoded", "share", "characters"),
    [
        ("Schöne Ｇrüße,\tİstanbul ﬁ", "schone gruße, istanbul fi", 0.0, ""),  # lower case, NFKC, no accents
        ("abcdefgh☃☃", "ab cd ef gh", 0.2, "☃"),
        ("日本語 text", "text", 3 / 7, "日本語"),
        ("한국어 문서", "한 어 문서", 3 / 13, "\u1100\u116e\u11a8"),
    ],
)
def test_what_is_lost_is_characters_and_not_their_form(text, decoded, share, characters, bpe, monkeypatch):
    monkeypatch.setattr(bpe, "decode", lambda ids, **options: decoded)
    figures = describe_tokenizer(bpe, [text])
    assert set(figures["lost_characters"]) == set(characters)
    assert figures["lost_share"] == pytest.approx(share)


def test_text_that_a_tokenizer_cannot_write_is_refused_or_named(tmp_path):
    """A BPE without unknown token drops the characters that it lacks: "unknown" is 0 for all of them."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=["</s>"], show_progress=False)
    backend.train_from_iterator([text for text in ENGLISH if text.isascii()], trainer)
    PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>").save_pretrained(tmp_path / "tokenizer")
    few = [*(text for text in ENGLISH[:90] if text.isascii()), "a snowman ☃ stands here"]
    for name, texts in (("few", few), ("many", [text + JAPANESE[0] for text in few])):
        lines = (json.dumps({"text": text}) + "\n" for text in texts)
        (tmp_path / f"{name}.jsonl").write_text("".join(lines))
    options = ("--tokenizer.pretrained", tmp_path / "tokenizer", "--output", tmp_path / "out")
    options = (*options, "--deduplication.near_threshold", "null", "--deduplication.contamination_overlap", "null")
    line = error_line("prepare_data.py", "--sources", f"[{tmp_path / 'many.jsonl'}]", *options)
    assert "many: the tokenizer" in line and "cannot write" in line and "。" in line
    assert not (tmp_path / "out").exists()
    options = (*options, "--validation_fraction", "0.05")
    code, out, _ = call("prepare_data.py", "--sources", f"[{tmp_path / 'few.jsonl'}]", *options)
    figures = load_manifest(tmp_path / "out")["tokenizer"]["sources"]["few"]
    assert code == 0 and figures["unknown_rate"] == 0.0 and 0 < figures["lost_share"] < 0.001
    for page in (out, *((tmp_path / "out" / name).read_text("utf-8") for name in ("README.md", "report.html"))):
        assert "cannot write" in page and "☃" in page
