"""Fill-in-the-middle: next tokens of documents with the middle at the end (Bavarian et al., 2022, arXiv 2207.14255)."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from transformers import AutoModelForCausalLM

from utils.config import FillInTheMiddleConfig, ObjectiveConfig
from utils.data.packing import IGNORED, Batch, ranges

AUTO_MODEL = AutoModelForCausalLM
SPELLINGS = [
    ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"),  # Qwen's
    ("<fim_prefix>", "<fim_suffix>", "<fim_middle>"),  # StarCoder's
]
LEAST_CONTENT = 8  # tokens; a shorter document hardly has a middle


def build_collator(config: ObjectiveConfig, tokenizer: Any) -> "FillInTheMiddle":
    """Uses the tokenizer's own sentinels, or adds some in place: the model is built afterwards."""
    vocabulary = tokenizer.get_vocab()
    known = (spelling for spelling in SPELLINGS if all(token in vocabulary for token in spelling))
    spelling = next(known, SPELLINGS[0])
    if missing := [token for token in spelling if token not in vocabulary]:
        tokenizer.add_special_tokens({"extra_special_tokens": missing}, replace_extra_special_tokens=False)
    sentinels = np.array([*tokenizer.convert_tokens_to_ids(list(spelling)), tokenizer.eos_token_id])
    begins = {tokenizer.bos_token_id, tokenizer.eos_token_id} - {None}
    return FillInTheMiddle(config.fill_in_the_middle, sentinels, np.array(sorted(begins)))


@dataclass(frozen=True)
class FillInTheMiddle:
    """Moves the middle of documents to their end, each document with probability `rate`.

        <prefix> prefix <suffix> suffix <middle> middle eos
        <prefix> <suffix> suffix <middle> prefix middle eos      with `suffix_first_rate`

    The second order is the paper's SPM, variant 2 (appendix D). A document is cut between tokens at two places, drawn
    uniformly and independently (the paper cuts between characters). The cut is made in the row (the paper's
    context-level variant), so a piece of a document counts as a document.

    The row keeps its length: the sentinels, and an eos that the piece lacked, replace the last 3 or 4 tokens of its
    content. A bos or eos token in front stays there. A piece that would keep fewer than `LEAST_CONTENT` tokens stays.
    """

    config: FillInTheMiddleConfig
    sentinels: np.ndarray  # prefix, suffix, middle, eos
    begins: np.ndarray  # tokens that may stand before a document's text

    def __call__(self, rows: Batch, generators: Sequence[np.random.Generator]) -> Batch:
        """Rows → input_ids and targets (B, T), and the rows' position_ids or attention_mask; every token counts."""
        tokens, targets = rows["input_ids"].flatten(), rows["targets"].flatten()
        starts, stops, draws = find_pieces(rows, generators)
        firsts = starts + np.isin(tokens[starts], self.begins)
        contents = stops - firsts - len(self.sentinels)
        chosen = (draws[:, 0] < self.config.rate) & (contents >= LEAST_CONTENT)
        starts, stops, draws, firsts, contents = (values[chosen] for values in (starts, stops, draws, firsts, contents))
        cuts = np.sort((draws[:, 2:] * (contents + 1)[:, None]).astype(np.int64), axis=1).T
        order = arrange(len(tokens), firsts, cuts, contents, draws[:, 1] < self.config.suffix_first_rate)
        # `order` refers to the sentinels as the entries behind the tokens.
        tokens[ranges(firsts, stops - firsts)] = np.append(tokens, self.sentinels)[order]
        places = ranges(starts, stops - starts - 1)
        targets[places] = tokens[places + 1]
        targets[stops - 1] = IGNORED
        shape = rows["input_ids"].shape
        layout = {name: rows[name] for name in ("position_ids", "attention_mask") if name in rows}
        return {"input_ids": tokens.reshape(shape), "targets": targets.reshape(shape)} | layout


def find_pieces(rows: Batch, generators: Sequence[np.random.Generator]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Pieces of documents in the rows: begin and end of each in the flat batch, (P,), and random numbers, (P, 4)."""
    num_rows, width = rows["input_ids"].shape
    columns = np.arange(width)
    begins = np.broadcast_to(columns == 0, (num_rows, width))
    if "position_ids" in rows:
        begins = rows["position_ids"] == 0
    row, column = np.nonzero(begins & (columns < rows["lengths"][:, None]))
    starts = row * width + column
    stops = np.minimum(np.append(starts, num_rows * width)[1:], row * width + rows["lengths"][row])
    counts = np.bincount(row, minlength=num_rows).tolist()
    draws = [generator.random((count, 4)) for generator, count in zip(generators, counts, strict=True)]
    return starts, stops, np.concatenate(draws)


def arrange(
    end: int, firsts: np.ndarray, cuts: np.ndarray, contents: np.ndarray, suffix_first: np.ndarray
) -> np.ndarray:
    """The source index of each token of the rearranged documents; the sentinels have the indices from `end` on. Content
    i is the `contents[i]` tokens from `firsts[i]` on, cut at `cuts[0, i]` and `cuts[1, i]`."""
    (left, right), one = cuts, np.ones_like(contents)
    before, behind, fill, eos = (np.full_like(contents, end + number) for number in range(4))
    prefix, suffix, middle = (firsts, left), (firsts + right, contents - right), (firsts + left, right - left)
    plain = [(before, one), prefix, (behind, one), suffix, (fill, one), middle, (eos, one)]
    swapped = [(before, one), (behind, one), suffix, (fill, one), prefix, middle, (eos, one)]
    sources, sizes = np.where(suffix_first, np.array(swapped), np.array(plain)).transpose(1, 2, 0)
    return ranges(sources.ravel(), sizes.ravel())
