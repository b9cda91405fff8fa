"""Span corruption: a decoder predicts spans cut out of the encoder's text (Raffel et al., 2020, arXiv 1910.10683)."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from transformers import AutoModelForSeq2SeqLM

from utils.config import ObjectiveConfig, SpanCorruptionConfig
from utils.data.packing import IGNORED, Batch
from utils.model.build import pad_token_id

AUTO_MODEL = AutoModelForSeq2SeqLM
SENTINELS = [f"<extra_id_{number}>" for number in range(100)]  # as many as T5 has


def build_collator(config: ObjectiveConfig, tokenizer: Any) -> "SpanCorruption":
    """Adds T5's sentinels that the tokenizer lacks, in place: the model is built afterwards."""
    vocabulary = tokenizer.get_vocab()
    if missing := [token for token in SENTINELS if token not in vocabulary]:
        tokenizer.add_special_tokens({"extra_special_tokens": missing}, replace_extra_special_tokens=False)
    sentinels = np.array(tokenizer.convert_tokens_to_ids(SENTINELS))
    return SpanCorruption(config.span_corruption, sentinels, tokenizer.eos_token_id, pad_token_id(tokenizer))


@dataclass(frozen=True)
class SpanCorruption:
    """Cuts spans out of each row's text: a sentinel replaces each in the input, and precedes it in the target.

        text     Thank you for inviting me to your party last week
        input    Thank you <0> me to your party <1> eos
        target   <0> for inviting <1> last week eos

    Text and spans follow T5's code (github.com/google-research/text-to-text-transfer-transformer, t5/data:
    preprocessors.py, `random_spans_noise_mask` and `span_corruption`; tasks.py). A row counts as one text even if it
    holds several documents, as in T5; their eos tokens stay as separators, except one at the row's end. The text ends
    with a span, so the target ends with eos, without the last sentinel of the paper's figures. All cuts with the
    numbers of `counts` are equally likely. A text that would need more spans than sentinels has longer spans.
    """

    config: SpanCorruptionConfig
    sentinels: np.ndarray
    eos_token_id: int
    pad_token_id: int

    def __call__(self, rows: Batch, generators: Sequence[np.random.Generator]) -> Batch:
        """Rows → input_ids, attention_mask (B, S), decoder_input_ids, targets (B, U); a text of T tokens needs S and U.
        decoder_input_ids are the targets shifted right behind the padding token, T5's decoder start."""
        tokens = rows["input_ids"]
        input_width, target_width = self.widths(tokens.shape[1])
        inputs = np.full((len(tokens), input_width), self.pad_token_id)
        mask, targets = np.zeros_like(inputs), np.full((len(tokens), target_width), IGNORED)
        for number, (length, generator) in enumerate(zip(rows["lengths"].tolist(), generators, strict=True)):
            text = tokens[number, :length]
            if length and text[-1] == self.eos_token_id:
                text = text[:-1]
            left, cut_out = self.corrupt(text, generator)
            inputs[number, : len(left)], mask[number, : len(left)] = left, 1
            targets[number, : len(cut_out)] = cut_out
        # The decoder is causal and padded on the right, so it needs no mask.
        shifted = np.full_like(targets, self.pad_token_id)
        shifted[:, 1:] = np.where(targets[:, :-1] == IGNORED, self.pad_token_id, targets[:, :-1])
        return {"input_ids": inputs, "attention_mask": mask, "decoder_input_ids": shifted, "targets": targets}

    def corrupt(self, text: np.ndarray, generator: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """Input and target of one text (L,), each with its eos; for L < 2 the text with eos and an empty target."""
        if len(text) < 2:
            return np.append(text, self.eos_token_id), text[:0]
        num_noise, num_spans = self.counts(len(text))
        noise = random_segments(num_noise, num_spans, generator)
        kept = random_segments(len(text) - num_noise, num_spans, generator)
        is_noise = np.tile([False, True], num_spans).repeat(np.stack([kept, noise], axis=1).ravel())
        sentinels = self.sentinels[:num_spans]
        left = np.insert(text[~is_noise], kept.cumsum(), sentinels)
        cut_out = np.insert(text[is_noise], noise.cumsum() - noise, sentinels)
        return np.append(left, self.eos_token_id), np.append(cut_out, self.eos_token_id)

    def counts(self, length: int) -> tuple[int, int]:
        """Number of tokens cut out of a text of `length` ≥ 2, and number of spans."""
        num_noise = min(max(round(length * self.config.noise_density), 1), length - 1)
        num_spans = max(round(num_noise / self.config.mean_span_length), 1)
        return num_noise, min(num_spans, length - num_noise, len(self.sentinels))

    def widths(self, length: int) -> tuple[int, int]:
        """Tokens of input and target for a text of `length`; a shorter text needs no more."""
        if length < 2:
            return length + 1, 1
        num_noise, num_spans = self.counts(length)
        return length - num_noise + num_spans + 1, num_noise + num_spans + 1


def random_segments(total: int, parts: int, generator: np.random.Generator) -> np.ndarray:
    """`parts` positive lengths that add up to `total`, each such sequence equally likely."""
    cuts = np.sort(generator.choice(total - 1, parts - 1, replace=False, shuffle=False)) + 1
    return np.diff(cuts, prepend=0, append=total)
