"""What a model writes about held-out pictures or sounds, and how far it agrees with the reference."""

from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel
from transformers.utils import logging as transformers_logging

from utils.data.loaders import Layout, to_tensors
from utils.data.packing import IGNORED, Batch
from utils.model.build import evaluating, longest_sequence

ROWS_AT_ONCE = 32  # of a generation
BYTES_AT_ONCE = 256 << 20  # of decoded pictures or sounds; one picture may take 50 MB, cut into tiles


@dataclass(frozen=True)
class Answer:
    """One document of a split: its number, what it says after its picture or sound, and what the model writes there."""

    document: int
    reference: str
    text: str


def write_answers(
    model: PreTrainedModel, collate: Any, layout: Layout, tokenizer: Any, *, max_new_tokens: int,
    at_most: int | None = None, generate: Callable[..., torch.Tensor] | None = None,
) -> list[Answer]:  # fmt: skip
    """The likeliest text, token by token, for each row that has something to answer, in their order.

    collate: the objective's collator. generate: called in place of the model's own.
    """
    answers: list[Answer] = []
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()  # Whisper's `generate` warns of its own arguments
    try:
        for prompts, references in iter_prompts(layout, collate, tokenizer, at_most):
            texts = continue_prompts(model, prompts, tokenizer, max_new_tokens, generate)
            answers += [Answer(row, reference, texts[row]) for row, reference in references.items()]
    finally:
        transformers_logging.set_verbosity(verbosity)
    return answers


def iter_prompts(
    layout: Layout, collate: Any, tokenizer: Any, at_most: int | None
) -> Iterator[tuple[dict[int, Batch], dict[int, str]]]:
    """Row → what the model reads, and row → the text that it should write, about BYTES_AT_ONCE at a time."""
    prompts: dict[int, Batch] = {}
    references: dict[int, str] = {}
    found = held = 0
    for row in range(len(layout)):
        if found == at_most:
            break
        prompt, ids = read_prompt(layout.__getitems__([row]), collate)
        if prompt is None or not (text := tokenizer.decode(ids, skip_special_tokens=True).strip()):
            continue
        prompts[row], references[row] = collate(prompt, []), text
        found += 1
        held += sum(values.nbytes for values in prompts[row].values())
        if held >= BYTES_AT_ONCE:
            yield prompts, references
            prompts, references, held = {}, {}, 0
    yield prompts, references


@torch.no_grad()
def continue_prompts(
    model: PreTrainedModel, prompts: dict[int, Batch], tokenizer: Any, max_new_tokens: int,
    generate: Callable[..., torch.Tensor] | None = None,
) -> dict[int, str]:  # fmt: skip
    """Row → what the model writes after its prompt. Prompts of the same shapes are computed together: none is padded."""
    groups: defaultdict[Any, list[int]] = defaultdict(list)
    for row, batch in prompts.items():
        groups[tuple((name, values.shape) for name, values in batch.items())].append(row)
    texts = {}
    with evaluating(model):
        for group in groups.values():
            for start in range(0, len(group), ROWS_AT_ONCE):
                rows = group[start : start + ROWS_AT_ONCE]
                names = prompts[rows[0]].keys() - {"targets"}
                batch = {name: np.concatenate([prompts[row][name] for row in rows]) for name in names}
                inputs = {name: values.to(model.device) for name, values in to_tensors(batch).items()}
                read = inputs["decoder_input_ids" if "decoder_input_ids" in inputs else "input_ids"]
                longest = min(max_new_tokens, longest_sequence(model) - read.shape[1])
                output = (generate or model.generate)(  # type: ignore[operator]
                    **inputs, do_sample=False, max_new_tokens=longest
                )
                for row, prompt, ids in zip(rows, read, output, strict=True):
                    if ids[: len(prompt)].equal(prompt):  # Whisper returns new tokens only
                        ids = ids[len(prompt) :]
                    texts[row] = tokenizer.decode(ids, skip_special_tokens=True).strip()
    return texts


def read_prompt(rows: Batch, collate: Any) -> tuple[Batch | None, list[int]]:
    """Of a row by itself, what the model reads before it answers, as a row, and the ids of the answer; None if it has
    nothing to answer."""
    size = int(rows["lengths"][0])
    last = rows["targets"][0, max(size - 1, 0)]
    ids = np.append(rows["input_ids"][0, :size], last if last != IGNORED else [])
    mask = None
    if "loss_mask" in rows:  # of a token's target; the first token is none
        mask = np.append(0, rows["loss_mask"][0, : len(ids) - 1])
    length = collate.prompt_length(ids, mask)
    if length is None or length >= len(ids):
        return None, []
    end = len(ids)
    if mask is not None:
        end = length + int(np.append(mask[length:], 0).argmin())
    prompt = {name: values[:, :length] for name, values in rows.items() if values.ndim == 2}
    return prompt | {"lengths": np.array([length]), "media": rows["media"]}, ids[length:end].astype(int).tolist()


def word_errors(reference: list[str], written: list[str]) -> int:
    """The fewest words to insert, delete or replace to turn one text into the other (Levenshtein, 1966)."""
    row = list(range(len(written) + 1))
    for number, word in enumerate(reference, 1):
        before, row[0] = row[0], number
        for place, other in enumerate(written, 1):
            before, row[place] = row[place], min(row[place] + 1, row[place - 1] + 1, before + (word != other))
    return row[-1]


def score_answers(answers: list[Answer]) -> dict[str, float]:
    """Shares of 1: texts that equal their reference; mean F1 of the words, in any order; and word errors per word of the
    references, which may exceed 1."""
    pairs = [(answer.reference.split(), answer.text.split()) for answer in answers]
    shared = [(Counter(reference) & Counter(text)).total() for reference, text in pairs]
    words = sum(len(reference) for reference, _ in pairs)
    f1 = [
        2 * count / max(1, len(reference) + len(text)) for count, (reference, text) in zip(shared, pairs, strict=True)
    ]
    return {
        "exact_match": sum(answer.reference == answer.text for answer in answers) / len(answers),
        "word_f1": sum(f1) / len(answers),
        "word_error_rate": sum(word_errors(*pair) for pair in pairs) / words,
    }
