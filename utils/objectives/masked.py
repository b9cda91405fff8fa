"""Masked language modelling: an encoder predicts hidden tokens (Devlin et al., 2019, arXiv 1810.04805)."""

import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from tokenizers.models import WordPiece
from transformers import AutoModelForMaskedLM
from transformers.convert_slow_tokenizer import bytes_to_unicode

from utils.cli import UserError
from utils.config import MaskedConfig, ObjectiveConfig
from utils.data.packing import IGNORED, Batch

AUTO_MODEL = AutoModelForMaskedLM
MASK = "<|mask|>"
BYTE_TOKEN = re.compile("<0x([0-9A-F]{2})>")
# Thai to Lao, Burmese, Khmer, kana, Chinese characters: scripts without spaces between words.
UNSPACED = "[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]"


def build_collator(config: ObjectiveConfig, tokenizer: Any) -> "Masking":
    """Adds a mask token to a tokenizer without one, in place: the model is built afterwards."""
    if tokenizer.mask_token is None:
        tokenizer.add_special_tokens({"mask_token": MASK})
    vocabulary = tokenizer.get_vocab()
    is_special = np.zeros(max(vocabulary.values()) + 1, bool)
    is_special[tokenizer.all_special_ids] = True
    is_special[[id_ for id_, token in tokenizer.added_tokens_decoder.items() if token.special]] = True
    ids = np.array(sorted(vocabulary.values()))
    edges = word_edges(tokenizer, is_special) if config.masked.whole_words else None
    return Masking(config.masked, tokenizer.mask_token_id, is_special, ids[~is_special[ids]], edges)


@dataclass(frozen=True)
class Masking:
    """Chooses tokens to predict, each independently with probability `mask_rate`, and hides most of them.

    Special tokens are neither chosen nor inserted. With `whole_words` all tokens of a word are chosen together, at the
    same rate; each of them is then replaced independently, as in BERT's own whole word masking
    (github.com/google-research/bert, create_pretraining_data.py). A row may end up without a target.
    """

    config: MaskedConfig
    mask_token_id: int
    is_special: np.ndarray  # (V,) bool
    ordinary_ids: np.ndarray  # random tokens are drawn from these
    edges: tuple[np.ndarray, np.ndarray] | None  # see `word_edges`

    def __call__(self, rows: Batch, generators: Sequence[np.random.Generator]) -> Batch:
        """Rows → input_ids and targets (B, T), and the rows' position_ids or attention_mask."""
        tokens, width = rows["input_ids"], rows["input_ids"].shape[1]
        # One draw per position: what a row draws does not depend on how far its batch is padded.
        draws = np.stack([generator.random((width, 3)) for generator in generators])
        choice, change, substitute = draws.transpose(2, 0, 1)
        if self.edges is not None:
            choice = np.take_along_axis(choice, self.word_starts(rows), axis=1)
        chosen = (choice < self.config.mask_rate) & ~self.is_special[tokens]
        chosen &= np.arange(width) < rows["lengths"][:, None]
        replaced = chosen & (change < self.config.replace_rate)
        randomized = chosen & ~replaced & (change < self.config.replace_rate + self.config.random_rate)
        inputs = np.where(replaced, self.mask_token_id, tokens)
        inputs[randomized] = self.ordinary_ids[(substitute[randomized] * len(self.ordinary_ids)).astype(np.int64)]
        layout = {name: rows[name] for name in ("position_ids", "attention_mask") if name in rows}
        return {"input_ids": inputs, "targets": np.where(chosen, tokens, IGNORED)} | layout

    def word_starts(self, rows: Batch) -> np.ndarray:
        """The column where the word of each position begins, (B, T); no word goes beyond its document."""
        assert self.edges is not None
        tokens, (open_left, open_right) = rows["input_ids"], self.edges
        begins = np.ones(tokens.shape, bool)
        begins[:, 1:] = ~(open_left[tokens[:, 1:]] & open_right[tokens[:, :-1]])
        if "position_ids" in rows:
            begins |= rows["position_ids"] == 0
        return np.maximum.accumulate(np.where(begins, np.arange(tokens.shape[1]), 0), axis=1)


def word_edges(tokenizer: Any, is_special: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Two tables over the vocabulary, (V,) bool: tokens that may continue a word, and tokens that may precede those.
    `UserError` if the tokens do not show where a word begins.

    WordPiece marks the tokens that continue a word. Other tokens continue one if they begin with a letter, digit or
    mark and the token before ends with one; a space is part of the token (Ġ in byte-level vocabularies, ▁ in
    SentencePiece's). In scripts without spaces each token is a word.
    """
    model, vocabulary = tokenizer.backend_tokenizer.model, tokenizer.get_vocab()
    open_left, open_right = np.zeros_like(is_special), np.zeros_like(is_special)
    if isinstance(model, WordPiece):
        prefix = model.continuing_subword_prefix
        open_left[[id_ for token, id_ in vocabulary.items() if token.startswith(prefix)]] = True
        return open_left & ~is_special, ~is_special
    byte_of = {char: byte for byte, char in bytes_to_unicode().items()}
    byte_level = "ByteLevel" in str(tokenizer.backend_tokenizer.decoder)
    if not byte_level and not any(token.startswith("▁") for token in vocabulary):
        raise UserError("objective.masked.whole_words: the tokens of this tokenizer do not show where a word begins")
    for token, id_ in vocabulary.items():
        if is_special[id_]:
            continue
        if byte_level and all(char in byte_of for char in token):
            raw = bytes(byte_of[char] for char in token)
        elif match := BYTE_TOKEN.fullmatch(token):
            raw = bytes([int(match[1], 16)])
        else:
            raw = token.replace("▁", " ").encode()
        text = raw.decode(errors="replace")
        # A piece of a character: later bytes continue it. First bytes of 0xC3 to 0xDF nearly always begin letters
        # (Latin to Arabic); higher ones begin a Chinese character, an emoji or a dash just as often.
        piece = text.startswith("\ufffd") and (0x80 <= raw[0] <= 0xBF or 0xC3 <= raw[0] <= 0xDF)
        open_left[id_] = piece or is_word_character(text[:1])
        open_right[id_] = text.endswith("\ufffd") or is_word_character(text[-1:])
    return open_left, open_right


def is_word_character(char: str) -> bool:
    """Whether `char` is a letter, digit or mark of a script with spaces between words; False for the empty string."""
    return char != "" and unicodedata.category(char)[0] in "LNM" and not re.match(UNSPACED, char)
