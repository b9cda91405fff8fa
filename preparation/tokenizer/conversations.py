"""Conversations to token ids, with a mask of the tokens that the assistant says."""

import itertools
import re
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
from tokenizers import Tokenizer

from preparation.sources.conversations import split_messages
from preparation.tokenizer.build import token_dtype
from preparation.tokenizer.encoding import iter_batches
from utils.cli import UserError

GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")

Messages = list[dict[str, str]]
Span = tuple[int, int]  # of characters: the first, and the one after the last


class ConversationEncoder:
    """Encodes conversations as transformers' `apply_chat_template` does, and finds the assistant's turns in them.

    A turn is what the template puts between {% generation %} and {% endgeneration %}. If the template has no such
    marks, a turn is what the conversation up to and including it adds to the conversation before it plus the generation
    prompt; white space after a special token that ends the turn is left out. A token that overlaps a turn counts as
    part of it, as in transformers' `return_assistant_tokens_mask`.

    The eos token follows, and belongs to the last speaker, unless the template itself ends with a special token.
    `encode_table` reads `columns` of the documents; its table has `features`. `note` says how turns are found.
    """

    columns = ("text", "id")

    def __init__(self, tokenizer: Any) -> None:
        """`UserError` if the tokenizer has no chat template."""
        self.dtype = token_dtype(len(tokenizer))
        self.features = datasets.Features(
            input_ids=datasets.List(datasets.Value(self.dtype.__name__)),
            loss_mask=datasets.List(datasets.Value("uint8")),
        )
        try:
            self._template: str = tokenizer.get_chat_template()
        except ValueError:
            advice = "give one with tokenizer.chat_template configs/chat_template.jinja"
            raise UserError(f"the tokenizer has no chat template; {advice}") from None
        self._marks_turns = GENERATION.search(self._template) is not None
        how = "as the chat template marks them" if self._marks_turns else "the text after a generation prompt"
        self.note = f"encoded by tokenizers; the assistant's turns: {how}"
        self._variables = tokenizer.special_tokens_map  # for templates, such as {{ bos_token }}
        self._special = tuple(item.content for item in tokenizer.added_tokens_decoder.values() if item.special)
        self._eos: str = tokenizer.eos_token
        self._backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
        self._backend.post_processor = None  # some of them remove white space from a token's span of characters

    def encode_table(self, batch: pa.Table) -> pa.Table:
        """Columns `text` and `id` → columns `input_ids` (uint16 or uint32) and `loss_mask` (uint8), lists. `UserError`
        for a conversation that the template refuses, or whose turns cannot be found."""
        rendered = list(map(self.render, batch["text"].to_pylist(), batch["id"].to_pylist()))
        encodings = itertools.chain.from_iterable(
            self._backend.encode_batch(texts, add_special_tokens=False)
            for texts, _ in iter_batches([text for text, _ in rendered], cut=False)
        )
        ids, masks = [np.empty(0, self.dtype)], [np.empty(0, np.uint8)]
        for (_, turns), encoding in zip(rendered, encodings, strict=True):
            first, after = np.array(encoding.offsets, np.int64).T  # of each token's characters
            mask = np.zeros(len(first), np.uint8)
            for start, stop in turns:
                mask[(first < stop) & (after > start)] = 1
            ids.append(np.array(encoding.ids, self.dtype))
            masks.append(mask)
        offsets = pa.array(np.cumsum([len(mask) for mask in masks], dtype=np.int32))
        columns = {"input_ids": ids, "loss_mask": masks}
        return pa.table({
            name: pa.ListArray.from_arrays(offsets, pa.array(np.concatenate(parts))) for name, parts in columns.items()
        })  # fmt: skip

    def render(self, stored: str, id: str) -> tuple[str, list[Span]]:
        """A stored conversation as the template formats it, and the assistant's turns; `id` is for a `UserError`."""
        messages = split_messages(stored)
        try:
            text, turns = self._apply_template(messages)
            if not self._marks_turns:
                turns = self._find_turns(messages, text, id)
        except UserError:
            raise
        except Exception as error:  # a template is a program, which can raise anything
            reason = str(error) or type(error).__name__
            raise UserError(f"{id}: the chat template refuses this conversation: {reason}") from None
        if not text.rstrip().endswith(self._special):
            if messages[-1]["role"] == "assistant":
                turns = [*turns, (len(text), len(text) + len(self._eos))]
            text += self._eos
        if not any(start < stop for start, stop in turns):
            raise UserError(f"{id}: the chat template's {{% generation %}} marks nothing of this conversation")
        return text, turns

    def _apply_template(self, messages: Messages, *, add_generation_prompt: bool = False) -> tuple[str, list[Span]]:
        """The formatted text, and the spans that the template marks in it."""
        from transformers.utils.chat_template_utils import render_jinja_template

        rendered: Any = render_jinja_template(
            [messages], chat_template=self._template, add_generation_prompt=add_generation_prompt,
            return_assistant_tokens_mask=self._marks_turns, **self._variables,
        )  # fmt: skip
        (text,), marks = rendered
        return text, marks[0] if self._marks_turns else []

    def _find_turns(self, messages: Messages, text: str, id: str) -> list[Span]:
        turns = []
        for number, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            prompt, _ = self._apply_template(messages[:number], add_generation_prompt=True)
            whole, _ = self._apply_template(messages[: number + 1])
            if not (whole.startswith(prompt) and text.startswith(whole)):
                raise UserError(
                    f"{id}: the chat template formats message {number + 1} differently when more messages follow, so "
                    "the assistant's turn cannot be found; put {% generation %} and {% endgeneration %} around it in "
                    "the template (tokenizer.chat_template)"
                )
            said = whole[len(prompt) :]
            if said.rstrip().endswith(self._special):
                said = said.rstrip()
            turns.append((len(prompt), len(prompt) + len(said)))
        return turns
