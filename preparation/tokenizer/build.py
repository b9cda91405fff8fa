"""Training, loading and describing a tokenizer; `encoding` and `conversations` apply it."""

import json
import math
import random
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from typing import TYPE_CHECKING, Any

import jinja2
import numpy as np
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from preparation.recipe import BUILT_IN_TOKENS, END_OF_TEXT, PADDING, TEMPLATE_TOKEN, WORDPIECE_TOKENS
from utils.cli import UserError
from utils.pretrained import read_tokenizer

# transformers is imported where it is used: it imports torch, which takes two seconds that an up-to-date call can save.
if TYPE_CHECKING:
    import datasets
    from transformers import PreTrainedTokenizerFast


LONG_WORD = re.compile(r"(\S{1000})(?=\S)")
SAMPLE_BATCH_BYTES = 1_000_000
NOT_TEXT = ("Cc", "Cf", "Cn", "Mn", "Zl", "Zp", "Zs")  # Unicode categories
# Scripts that put no space between words: Thai to Lao, Burmese, Khmer, kana, Chinese characters.
UNSPACED = re.compile(
    "[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]"
)


def train_tokenizer(
    texts: Iterable[list[str]], *, algorithm: str = "bpe", vocab_size: int, special_tokens: Sequence[str] = (),
    chat_template: str | None = None,
) -> "PreTrainedTokenizerFast":  # fmt: skip
    """Train a tokenizer on batches of texts; the same texts give the same tokenizer, whatever the number of threads.

    - "bpe": byte-level BPE (Sennrich et al. 2016, arXiv:1508.07909) with GPT-2's bytes and pre-tokenizer.
    - "unigram": a unigram language model (Kudo 2018, arXiv:1804.10959) over the same. Takes several times as long.
    - "wordpiece": as in BERT (Devlin et al. 2019, arXiv:1810.04805), cased. Holds `texts` in memory. Loses white space
      and knows only the characters of `texts`; the others encode any text without an unknown token and decode it.

    One special token, the eos token, stands before and after each document, so that the first word is predicted too
    (WordPiece: [CLS] before, [SEP] after). The tokenizer adds the one before. `encoding` adds the one after, because a
    prompt must not end with it. `special_tokens` are more tokens of one id each; all of them count in `vocab_size`.
    `chat_template` is Jinja text, saved with the tokenizer; `UserError` if it has a syntax error.
    """
    from transformers import PreTrainedTokenizerFast

    special = [*BUILT_IN_TOKENS[algorithm], *special_tokens]
    # The trainers need time quadratic in a word's length: minutes for a million characters. No piece is that long.
    texts = ([LONG_WORD.sub(r"\1 ", text) for text in batch] for batch in texts)
    if algorithm == "wordpiece":
        backend = _train_wordpiece(texts, vocab_size, special)
        names = WORDPIECE_TOKENS | {"bos_token": "[CLS]", "eos_token": "[SEP]"}
    else:
        backend = _train_byte_level(texts, algorithm, vocab_size, special)
        names = {"bos_token": END_OF_TEXT, "eos_token": END_OF_TEXT, "pad_token": PADDING}
    bos, eos = names["bos_token"], names["eos_token"]
    ids = [(token, backend.token_to_id(token)) for token in sorted({bos, eos})]
    backend.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A {eos} $B", special_tokens=ids
    )
    options: dict[str, Any] = {"extra_special_tokens": list(special_tokens)} if special_tokens else {}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, clean_up_tokenization_spaces=False, **names, **options
    )
    if chat_template is not None:
        tokenizer.chat_template = chat_template
        check_chat_template(tokenizer)
    return tokenizer


def _train_byte_level(texts: Iterable[list[str]], algorithm: str, vocab_size: int, special: list[str]) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE() if algorithm == "bpe" else models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = (trainers.BpeTrainer if algorithm == "bpe" else trainers.UnigramTrainer)(
        vocab_size=vocab_size, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )  # fmt: skip
    tokenizer.train_from_iterator(texts, trainer)
    if algorithm == "unigram":
        tokenizer.model = models.Unigram(_settle_scores(tokenizer, len(special)))
    return tokenizer


def _settle_scores(tokenizer: Tokenizer, num_special: int) -> list[tuple[str, float]]:
    """A trained unigram vocabulary with scores and order made reproducible.

    The trainer sums in the order of a hash map, which differs from run to run: scores differ by up to 4e-11, and bytes
    that the texts lack get the lowest score plus a multiple of 1e-4 in that order. So here those bytes get the lowest
    score, all scores (log probabilities) are rounded to 1e-4, and equal ones are ordered by their piece.
    """
    vocab = [tuple(item) for item in json.loads(tokenizer.to_str())["model"]["vocab"]]
    special, pieces = vocab[:num_special], dict(vocab[num_special:])
    lowest = min(pieces.values())
    for piece, score in pieces.items():
        pieces[piece] = round(lowest if len(piece) == 1 and score < lowest + 256e-4 else score, 4)
    return special + sorted(pieces.items(), key=lambda item: (-item[1], item[0]))


def _train_wordpiece(texts: Iterable[list[str]], vocab_size: int, special: list[str]) -> Tokenizer:
    batches = list(texts)  # read twice; the trainer's own tables are several times as large
    normalizer = normalizers.BertNormalizer(lowercase=False, strip_accents=False)
    splitter = pre_tokenizers.BertPreTokenizer()
    counts = Counter(chain.from_iterable(chain.from_iterable(batches)))  # of characters
    # A character takes up to two entries, alone and after ##, so characters take at most half of the vocabulary (BERT:
    # 1,000 characters of 30,522 entries). A word with any other character is unknown.
    known = sorted((c for c in counts if normalizer.normalize_str(c).strip()), key=lambda c: (-counts[c], c))
    known = known[: (vocab_size - len(special)) // 4]
    inside = [f"##{c}" for c in known if len(splitter.pre_tokenize_str(normalizer.normalize_str(f"a{c}"))) == 1]
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizer, splitter
    # The trainer numbers ## characters in the order of a hash map, and breaks ties between pairs by these numbers.
    # Special tokens come first, in the order given, so list the ## characters among them.
    trainer = trainers.WordPieceTrainer(
        vocab_size=vocab_size, special_tokens=[*special, *inside], initial_alphabet=known, limit_alphabet=len(known),
        show_progress=False,
    )  # fmt: skip
    tokenizer.train_from_iterator(batches, trainer)
    trained = Tokenizer(models.WordPiece(tokenizer.get_vocab(), unk_token="[UNK]"))  # here ## characters are ordinary
    trained.normalizer, trained.pre_tokenizer = normalizer, splitter
    trained.decoder = decoders.WordPiece(prefix="##", cleanup=False)
    trained.add_special_tokens(special)
    return trained


def check_chat_template(tokenizer: "PreTrainedTokenizerFast") -> None:
    """`UserError` if the template has a syntax error, or writes special tokens that the tokenizer lacks."""
    added = {token.content for token in tokenizer.added_tokens_decoder.values()}
    if lacking := sorted(set(TEMPLATE_TOKEN.findall(tokenizer.chat_template)) - added):
        raise UserError(f"tokenizer.chat_template writes {', '.join(lacking)}, which the tokenizer does not have")
    try:
        tokenizer.apply_chat_template([{"role": "user", "content": "Hello"}], tokenize=False)
    except jinja2.TemplateSyntaxError as error:
        raise UserError(f"tokenizer.chat_template: line {error.lineno}: {error.message}") from None
    except Exception:
        pass  # a template may refuse this conversation


def iter_sample(dataset: "datasets.Dataset", sample_bytes: int, seed: int = 0) -> Iterator[list[str]]:
    """Batches of the documents of `dataset` (column `text`), `sample_bytes` of UTF-8 in all.

    Positions advance by the golden section of the dataset's length, which spreads any number of them evenly (the
    three-distance theorem; Knuth, The Art of Computer Programming 3, section 6.4). The last document is cut. Holds one
    batch in memory; a dataset smaller than `sample_bytes` is yielded completely, in that order.
    """
    size = len(dataset)
    step = max(1, round(size * (math.sqrt(5) - 1) / 2))
    while math.gcd(step, size) > 1:
        step += 1
    position = random.Random(seed).randrange(size) if size else 0
    tables = dataset.select_columns("text").with_format("arrow")
    batch, batch_bytes, left = [], 0, sample_bytes
    for start in range(0, size, 1000):
        positions = [(position + step * index) % size for index in range(start, min(start + 1000, size))]
        for scalar in tables[positions]["text"]:  # slices of the file: each text is read only here
            text = scalar.as_py().encode()
            batch.append(text[:left].decode(errors="ignore"))
            batch_bytes, left = batch_bytes + len(text), left - len(text)
            if batch_bytes >= SAMPLE_BATCH_BYTES or left <= 0:
                yield batch
                batch, batch_bytes = [], 0
            if left <= 0:
                return
    if batch:
        yield batch


def fold(text: str) -> Counter[str]:
    """The characters that a tokenizer should keep, with their numbers: none of white space, control characters and
    combining marks, and case and compatibility forms alike, as an uncased BERT or NFKC change these on purpose."""
    folded = unicodedata.normalize("NFKD", unicodedata.normalize("NFKD", text).casefold())
    counts = Counter(folded)
    return Counter({c: counts[c] for c in counts if unicodedata.category(c) not in NOT_TEXT})


def describe_tokenizer(tokenizer: Any, texts: list[str], backend: Tokenizer | None = None) -> dict[str, Any]:
    """How well a tokenizer works on sample texts, encoded by `backend` (its own), as values for JSON:

    - bytes_per_token: UTF-8 bytes of text per token, without template and eos;
    - fertility: tokens per word, words being separated by white space (as in Rust et al. 2021, arXiv:2012.15613);
      meaningless if `spaced` is false;
    - spaced: whether most of the text is in scripts that put spaces between words (not Chinese, Japanese, Thai...);
    - unknown_rate: share of tokens that are the unknown token;
    - lost_share: share of the characters that are not among those which the tokens decode to (see `fold`);
      lost_characters: the ten that are lost most often, as one string;
    - round_trip_share: share of texts that decode to themselves; round_trip_failures: up to three that do not, as
      {text, decoded}, each cut to some characters around the first difference.
    """
    total: Counter[str] = Counter()
    lost: Counter[str] = Counter()
    failures: list[dict[str, str]] = []
    backend = backend or tokenizer.backend_tokenizer
    for text in texts:
        ids = backend.encode(text, add_special_tokens=False).ids
        known = [id for id in ids if id != tokenizer.unk_token_id]  # other special tokens stand in the text
        decoded = tokenizer.decode(known, clean_up_tokenization_spaces=False)
        words = text.split()
        total.update(
            bytes=len(text.encode()), words=len(words), tokens=len(ids), unknown=ids.count(tokenizer.unk_token_id),
            characters=sum(map(len, words)), unspaced=len(UNSPACED.findall(text)), same=decoded == text,
        )  # fmt: skip
        written = fold(text) if decoded != text else Counter(kept=len("".join(words)))
        total["written"] += written.total()
        if decoded != text:
            lost += written - fold(decoded)
        if decoded != text and len(failures) < 3:
            pairs = enumerate(zip(text, decoded, strict=False))
            start = max(0, next((i for i, (a, b) in pairs if a != b), min(len(text), len(decoded))) - 20)
            failures.append({"text": text[start : start + 60], "decoded": decoded[start : start + 60]})
    return {
        "texts": len(texts),
        "bytes_per_token": total["bytes"] / max(total["tokens"], 1),
        "fertility": total["tokens"] / max(total["words"], 1),
        "spaced": total["unspaced"] <= total["characters"] / 2,
        "unknown_rate": total["unknown"] / max(total["tokens"], 1),
        "lost_share": lost.total() / max(total["written"], 1),
        "lost_characters": "".join(character for character, _ in lost.most_common(10)),
        "round_trip_share": total["same"] / max(len(texts), 1),
        "round_trip_failures": failures,
    }


def load_tokenizer(name: str) -> Any:
    """A tokenizer from a folder or the Hub; `UserError` if it is missing or not fast, or has no end-of-text token."""
    tokenizer = read_tokenizer(name)
    if not getattr(tokenizer, "is_fast", False):
        raise UserError(f"{name}: only tokenizers with a tokenizer.json (fast ones) are supported")
    if tokenizer.eos_token_id is None and tokenizer.sep_token_id is not None:  # BERT's names for the same
        tokenizer.bos_token, tokenizer.eos_token = tokenizer.cls_token, tokenizer.sep_token
    if tokenizer.eos_token_id is None:
        raise UserError(f"{name}: the tokenizer has no eos_token, which ends each document")
    # A saved tokenizer may have the length limits of its model; here a document is encoded whole.
    tokenizer.backend_tokenizer.no_truncation()
    tokenizer.backend_tokenizer.no_padding()
    return tokenizer


def token_dtype(vocab_size: int) -> type[np.unsignedinteger]:
    return np.uint16 if vocab_size <= 2**16 else np.uint32
