"""Training, loading and applying the tokenizer."""

from collections.abc import Iterable
from typing import Any

import numpy as np
import pyarrow as pa
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from utils.cli import UserError

END_OF_TEXT = "<|endoftext|>"
PADDING = "<|pad|>"


def train_byte_level_bpe(texts: Iterable[list[str]], vocab_size: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE (GPT-2's pre-tokenizer): any text encodes without an unknown token and decodes to itself
    (unless it spells out one of the special tokens).

    One special token, END_OF_TEXT, stands before and after each document, so that the first word is predicted too.
    The tokenizer adds the one before; the one after is `encode_documents`' work, as a prompt must not end with it.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT, PADDING],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{END_OF_TEXT} $A",
        pair=f"{END_OF_TEXT} $A {END_OF_TEXT} $B",
        special_tokens=[(END_OF_TEXT, tokenizer.token_to_id(END_OF_TEXT))],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=END_OF_TEXT, eos_token=END_OF_TEXT, pad_token=PADDING,
        clean_up_tokenization_spaces=False,
    )  # fmt: skip


def load_tokenizer(name: str) -> Any:
    """A tokenizer from a folder or the Hub; `UserError` if it is not there, not fast, or has no end-of-text token."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{name}: no tokenizer can be loaded from here: {' '.join(str(error).split())[:200]}") from None
    if not getattr(tokenizer, "is_fast", False):
        raise UserError(f"{name}: only tokenizers with a tokenizer.json (fast ones) are supported")
    if tokenizer.eos_token_id is None:
        raise UserError(f"{name}: the tokenizer has no eos_token, which ends each document")
    # A saved tokenizer may carry the limits of the model it was made for; here a document is encoded whole.
    tokenizer.backend_tokenizer.no_truncation()
    tokenizer.backend_tokenizer.no_padding()
    return tokenizer


def token_dtype(vocab_size: int) -> type[np.unsignedinteger]:
    return np.uint16 if vocab_size <= 2**16 else np.uint32


def encode_documents(batch: pa.Table, tokenizer: Any) -> pa.Table:
    """Column `text` → column `input_ids`: what the tokenizer itself gives for the text, and its end-of-text token."""
    dtype = token_dtype(len(tokenizer))
    encodings = tokenizer.backend_tokenizer.encode_batch_fast(batch["text"].to_pylist())
    eos = tokenizer.eos_token_id
    documents = []
    for encoding in encodings:
        ids = encoding.ids
        documents.append(np.asarray(ids if len(ids) > 1 and ids[-1] == eos else [*ids, eos], dtype=dtype))
    flat = np.concatenate(documents) if documents else np.empty(0, dtype)
    offsets = np.cumsum([0, *map(len, documents)], dtype=np.int32)
    return pa.table({"input_ids": pa.ListArray.from_arrays(pa.array(offsets), pa.array(flat))})
