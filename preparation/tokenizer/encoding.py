"""Documents to token ids, as flat arrays; conversations also to a mask of the tokens that the assistant says."""

import contextlib
import functools
import itertools
import json
import random
import re
import unicodedata
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from itertools import chain
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute
from tokenizers import Tokenizer

from preparation.recipe import MARK
from preparation.sources.conversations import OPTIONAL_PARTS, SEPARATOR, split_messages, split_tools
from preparation.tokenizer.build import token_dtype
from utils.cli import UserError
from utils.pretrained import hide_special_tokens

# Characters passed to `tokenizers` at a time. A byte of text takes 30 to 70 bytes of memory there in short documents,
# and 110 to 180 in a long one.
BATCH_CHARACTERS = 2_000_000
PIECE_CHARACTERS = 250_000  # a longer document is cut where that changes no token
GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
CUT = re.compile(r"\S(?=[ \n])")
# Stands for a picture while a chat template runs; letters, which templates leave alone and no text holds.
PICTURE = "zpictureqxjvkwzfhgbd"
SPELLED_FEATURE = datasets.List(datasets.Value("string"))

Encoded = tuple[np.ndarray, np.ndarray]
Messages = list[dict[str, Any]]
Span = tuple[int, int]  # of characters: the first, and the one after the last


class SpecialTokens:
    """The special tokens of a tokenizer, as strings that a text may spell out; those of one character do not count."""

    def __init__(self, backend: Tokenizer) -> None:
        added = backend.get_added_tokens_decoder().values()
        self.names = sorted(token.content for token in added if token.special and len(token.content.strip()) > 1)
        longest_first = sorted(self.names, key=len, reverse=True)
        self.pattern = re.compile("|".join(map(re.escape, longest_first)) or "(?!)")
        self._beginnings = {name[:2] for name in self.names}

    def find(self, text: str) -> list[str]:
        """All that occur in a text, in order. Most texts lack the beginnings of all, which is found out faster."""
        for beginning in self._beginnings:
            if beginning in text:
                return self.pattern.findall(text)
        return []


def without_marks(text: str, pictures: int) -> str:
    """The text of a document with so many pictures, without the marks for them. Without pictures a mark is text."""
    return text.replace(MARK, "") if pictures else text


def put_marks(text: str, pictures: int) -> str:
    """The text with a mark for each picture: if it has none, in front, of a conversation in front of what the user
    says first."""
    if not pictures or MARK in text:
        return text
    head = f"{SEPARATOR}user\n" if text.startswith(SEPARATOR) else ""
    return text.replace(head, head + MARK * pictures, 1)


class Pictures:
    """The token that stands for a picture, in texts to encode."""

    def __init__(self, tokenizer: Any, placeholder: str, names: dict[str, str]) -> None:
        """`names`: what stands for special tokens in the input of `hide_special_tokens`; {} if it reads their own."""
        self.token = placeholder
        self.name = names.get(placeholder, placeholder)
        self._id: int = tokenizer.convert_tokens_to_ids(placeholder)

    def put(self, text: str, pictures: int) -> str:
        return put_marks(text, pictures).replace(MARK, self.name) if pictures else text

    def check(self, id: str, pictures: int, ids: np.ndarray) -> None:
        """`UserError` unless the ids (n,) of a document hold one placeholder per picture."""
        if (found := int((ids == self._id).sum())) != pictures:
            raise UserError(f"{id}: has {pictures:,} pictures, but its tokens hold {self.token} {found:,} times")


class Encoder:
    """Encodes documents to the tokenizer's own ids, followed by its eos token unless they already end with it.

    Special tokens that a text spells out are encoded as ordinary text, unless `parse_special_tokens`.

    A document longer than PIECE_CHARACTERS is cut at white space if the tokenizer always splits there
    (`splits_at_spaces`). Any other tokenizer encodes it whole, which takes up to 180 times its bytes of memory.

    `placeholder` is the special token for a picture, if there are pictures. It stands where the text has the mark
    <image>, or before the text if it has none.

    `encode_table` reads `columns` of the documents; its table has `features`, among them `spelled`, the special tokens
    that each text spells out. `note` says which library encodes, and why; read it after the last document, as gigatoken
    may fail on the way.
    """

    def __init__(self, tokenizer: Any, parse_special_tokens: bool = False, placeholder: str | None = None) -> None:
        self.columns = ("text",) if placeholder is None else ("text", "id", "pictures")
        self.dtype = token_dtype(len(tokenizer))
        self.features = datasets.Features(
            input_ids=datasets.List(datasets.Value(self.dtype.__name__)), spelled=SPELLED_FEATURE
        )
        self.note = "encoded by tokenizers"
        self._uses_gigatoken = False
        self._backend: Tokenizer = tokenizer.backend_tokenizer
        self._special = SpecialTokens(self._backend)
        names: dict[str, str] = {}
        if not parse_special_tokens:
            self._backend, names = hide_special_tokens(self._backend)
        self._pictures = Pictures(tokenizer, placeholder, names) if placeholder is not None else None
        self._eos: int = tokenizer.eos_token_id
        self._template = find_template(self._backend)
        self._cut = self._template is not None and splits_at_spaces(self._backend)

    @functools.cached_property
    def _gigatoken(self) -> Any:
        import gigatoken

        return gigatoken.Tokenizer(self._backend)

    def __getstate__(self) -> dict[str, Any]:
        """For another process, which builds gigatoken's tokenizer again because it cannot be pickled."""
        return {name: value for name, value in vars(self).items() if name != "_gigatoken"}

    def __call__(self, texts: list[str]) -> Encoded:
        """Ids of all documents (T,), uint16 or uint32, and the offsets (N + 1,), int64, of each document in them. If
        gigatoken fails, `tokenizers` encodes these documents and all later ones, and `note` says so."""
        if self._uses_gigatoken:
            try:
                return self._frame(*self._encode_by_gigatoken(texts))
            except BaseException as error:
                self._drop_gigatoken(error, " from there on")
        return self._frame(*self._encode_by_tokenizers(texts))

    def encode_table(self, batch: pa.Table) -> pa.Table:
        """`columns` → columns `input_ids`, a list of uint16 or uint32 per document, and `spelled`. `UserError` if a
        text that is parsed for special tokens has other placeholders than those of its pictures."""
        texts = batch["text"].to_pylist()
        plain = texts
        if self._pictures is not None:
            counts = batch["pictures"].to_pylist()
            plain = list(map(without_marks, texts, counts))
            texts = list(map(self._pictures.put, texts, counts))
        ids, offsets = self(texts)
        if self._pictures is not None:
            for id, count, part in zip(batch["id"].to_pylist(), counts, np.split(ids, offsets[1:-1]), strict=True):
                self._pictures.check(id, count, part)
        spelled = pa.array(map(self._special.find, plain), pa.list_(pa.string()))
        # Arrow's 32-bit offsets allow 2^31 tokens, some 8 GB of text in one batch.
        lists = pa.ListArray.from_arrays(pa.array(offsets.astype(np.int32)), pa.array(ids))
        return pa.table({"input_ids": lists, "spelled": spelled})

    def try_gigatoken(self, sample: Sequence[str]) -> None:
        """Encode with gigatoken from now on, if it gives the ids of `tokenizers` on `sample` and on `iter_probes`."""
        if self._template is None:
            self.note = "encoded by tokenizers (gigatoken: the tokenizer adds more than a fixed prefix and suffix)"
            return
        try:
            self._compare("sample document", list(sample))
            added = [token.content for token in self._backend.get_added_tokens_decoder().values()]
            self._compare("probe", list(iter_probes([*self._special.names, *added])))
            self._uses_gigatoken = True
            agreed = f"same ids as tokenizers on {len(sample)} documents"
            self.note = f"encoded by gigatoken {version('gigatoken')} ({agreed})"
        except BaseException as error:
            self._drop_gigatoken(error, "")

    def _compare(self, what: str, texts: list[str]) -> None:
        """Raises `ValueError` at the first text for which gigatoken and `tokenizers` give different ids."""
        encoded = self._encode_by_tokenizers(texts), self._encode_by_gigatoken(texts)
        pairs = zip(*(np.split(ids, offsets[1:-1]) for ids, offsets in encoded), strict=True)
        for index, (expected, actual) in enumerate(pairs):
            if not np.array_equal(expected, actual):
                raise ValueError(f"ids differ on {what} {index}")

    def _drop_gigatoken(self, error: BaseException, when: str) -> None:
        if isinstance(error, KeyboardInterrupt | SystemExit):  # not `Exception`: a panic in Rust is none
            raise error
        self._uses_gigatoken = False
        reason = str(error).strip().partition("\n")[0][:150] or type(error).__name__
        self.note = f"encoded by tokenizers{when} (gigatoken: {reason})"

    def _encode_by_gigatoken(self, texts: list[str]) -> Encoded:
        """Ids and offsets without the template; `tokenizers` encodes texts with characters that are new to Unicode."""
        new = np.array([has_new_characters(text) for text in texts], bool)
        known = ["" if is_new else text for text, is_new in zip(texts, new, strict=True)]
        layout = self._gigatoken.encode_batch(known).layout
        offsets = np.asarray(layout.offsets, dtype=np.int64)
        if len(offsets) != len(texts) + 1:
            raise ValueError(f"{len(offsets) - 1} results for {len(texts)} documents")
        ids = np.asarray(layout.content.data)[offsets[0] : offsets[-1]].astype(self.dtype)
        offsets = offsets - offsets[0]
        if not new.any():
            return ids, offsets
        rare_ids, rare_offsets = self._encode_by_tokenizers([texts[index] for index in np.flatnonzero(new)])
        counts = np.diff(offsets)
        counts[new] = np.diff(rare_offsets)
        ids = np.insert(ids, offsets[:-1][new].repeat(counts[new]), rare_ids)
        return ids, np.concatenate([[0], counts.cumsum()])

    def _encode_by_tokenizers(self, texts: list[str]) -> Encoded:
        """Ids and offsets, without the template if there is one."""
        arrays, lengths = [np.empty(0, self.dtype)], np.zeros(len(texts), np.int64)
        for pieces, owners in iter_batches(texts, self._cut):
            encodings = self._backend.encode_batch_fast(pieces, add_special_tokens=self._template is None)
            counts = np.fromiter(map(len, encodings), np.int64, len(encodings))
            ids = chain.from_iterable(encoding.ids for encoding in encodings)
            arrays.append(np.fromiter(ids, self.dtype, counts.sum()))
            np.add.at(lengths, owners, counts)
        return np.concatenate(arrays), np.concatenate([[0], lengths.cumsum()])

    def _frame(self, ids: np.ndarray, offsets: np.ndarray) -> Encoded:
        """Put the template around each document, and the eos token after it unless it ends with it."""
        prefix, suffix = self._template or ([], [])
        starts, stops = offsets[:-1], offsets[1:]
        last = np.full(len(starts), [-1, *prefix, *suffix][-1], np.int64)
        if not suffix:
            filled = stops > starts
            last[filled] = ids[stops[filled] - 1]
        lacks_eos = (last != self._eos) | (stops - starts + len(prefix) + len(suffix) <= 1)
        # One row per document: where its prefix, suffix and eos are inserted.
        positions = np.concatenate([np.tile(starts, (len(prefix), 1)), np.tile(stops, (len(suffix) + 1, 1))]).T
        chosen = np.ones(positions.shape, bool)
        chosen[:, -1] = lacks_eos
        added = np.broadcast_to(np.array([*prefix, *suffix, self._eos], ids.dtype), positions.shape)
        framed = np.insert(ids, positions[chosen], added[chosen])
        return framed, offsets + np.concatenate([[0], chosen.sum(axis=1).cumsum()])


def build_encoder(
    tokenizer: Any, sample: Sequence[str], use_gigatoken: bool = True, *, parse_special_tokens: bool = False,
    placeholder: str | None = None,
) -> Encoder:  # fmt: skip
    """An encoder for `tokenizer` that uses gigatoken if it is installed and gives the ids of `tokenizers` on `sample`.

    `sample` should be a few hundred documents like those to come. The encoder falls back to `tokenizers` if gigatoken
    does not support this tokenizer (WordPiece, unigram, a byte-level vocabulary that lacks a byte), or later fails.
    """
    encoder = Encoder(tokenizer, parse_special_tokens, placeholder)
    if use_gigatoken:
        encoder.try_gigatoken(sample)
    return encoder


def has_new_characters(text: str) -> bool:
    """Whether a text has characters that this Python's Unicode tables do not know yet.

    Whether such a character is a letter, and so where words end, depends on each library's Unicode version: gigatoken
    0.10 and tokenizers 0.23 differ on 4,657 characters that Unicode 17 added and no Python up to 3.14 knows.
    """
    return not text.isascii() and any(unicodedata.category(found) == "Cn" for found in _possibly_new().findall(text))


@functools.cache
def _possibly_new() -> re.Pattern[str]:
    """Unassigned 16-bit characters, and all characters beyond: `re` is only fast with few ranges above 16 bits."""
    unknown = [unicodedata.category(chr(code)) == "Cn" for code in range(0x10000)]
    edges = np.flatnonzero(np.diff([False, *unknown, False])).tolist()
    ranges = (f"\\u{first:04x}-\\u{last - 1:04x}" for first, last in zip(edges[::2], edges[1::2], strict=True))
    return re.compile(f"[{''.join(ranges)}\\U00010000-\\U0010ffff]")


def find_template(backend: Tokenizer) -> tuple[list[int], list[int]] | None:
    """The ids that a tokenizer puts before and after each text; None if it does more than that."""
    fixed = backend.encode("").ids
    whole, bare = (backend.encode("The end, 42.", add_special_tokens=added).ids for added in (True, False))
    templates = [(fixed[:length], fixed[length:]) for length in range(len(fixed) + 1)]
    return next((found for found in templates if whole == [*found[0], *bare, *found[1]]), None)


def splits_at_spaces(backend: Tokenizer) -> bool:
    """Whether cutting a text between a character and the space or newline after it changes no token.

    True for GPT-2's pre-tokenizer, ByteLevel: no alternative of its pattern continues from another character into white
    space, so a token always starts at the cut. Nothing else may look across the cut: no normalizer, and no added token
    that contains or takes white space. Others count as not splitting (Llama 3's takes newlines after punctuation).
    """
    if backend.normalizer is not None or backend.pre_tokenizer is None:
        return False
    splitter = json.loads(backend.pre_tokenizer.__getstate__())
    added = backend.get_added_tokens_decoder().values()
    return (
        splitter["type"] == "ByteLevel" and splitter["use_regex"] and not splitter["add_prefix_space"]
        and not any(token.lstrip or token.rstrip or re.search(r"\s", token.content) for token in added)
    )  # fmt: skip


def iter_batches(texts: list[str], cut: bool) -> Iterator[tuple[list[str], list[int]]]:
    """Batches of about BATCH_CHARACTERS, long texts in pieces if `cut`; with the index of each piece's text."""
    pieces: list[str] = []
    owners: list[int] = []
    size = 0
    for index, text in enumerate(texts):
        for piece in iter_pieces(text) if cut else [text]:
            if size + len(piece) > BATCH_CHARACTERS and pieces:
                yield pieces, owners
                pieces, owners, size = [], [], 0
            pieces.append(piece)
            owners.append(index)
            size += len(piece)
    if pieces:
        yield pieces, owners


def iter_pieces(text: str) -> Iterator[str]:
    """`text` in pieces of PIECE_CHARACTERS or a little more; all but the last end where white space begins."""
    start = 0
    while len(text) - start > PIECE_CHARACTERS and (found := CUT.search(text, start + PIECE_CHARACTERS)):
        yield text[start : found.end()]
        start = found.end()
    yield text[start:]


def iter_probes(tokens: Sequence[str]) -> Iterator[str]:
    """Texts on which two implementations of a tokenizer with such added tokens are likely to differ."""
    yield from (
        "", " ", "\n", " \n\n \t\t  \r\n x   y\n\n\n", "it's I'LL they'Ve ’s 's'", "12,345.67 ١٢٣ ²½",
        "x" * 999, " " * 999, "吾輩は猫である。名前はまだ無い。", "道可道，非常道。", "👩‍👩‍👧‍👦🏳️‍🌈 ☕️", "e\u0301 ﬁ ǅ ß İ",
        "\0\x7f\x85\xa0\u180e\u2028\u3000\ufeff.",
    )  # fmt: skip
    for token in tokens:
        yield from (token, f"a{token}b {token}{token}\n", token[:-1])
    rng = random.Random(0)
    for last in (0x7F, 0x24F, 0x2FFF, 0xD7FF, 0x10FFFF) * 20:
        codes = [rng.randint(0, last) for _ in range(200)]
        yield "".join(" " if 0xD800 <= code < 0xE000 else chr(code) for code in codes)


def split_parts(text: str) -> list[dict[str, str]]:
    """A content as parts of the types text and image, which stands where PICTURE does."""
    parts: list[dict[str, str]] = []
    for number, part in enumerate(text.split(PICTURE)):
        parts += [{"type": "image"}] if number else []
        parts += [{"type": "text", "text": part}] if part else []
    return parts


class ConversationEncoder:
    """Encodes conversations as transformers' `apply_chat_template` does, and finds the assistant's turns in them.

    A turn is what the template puts between {% generation %} and {% endgeneration %}. If the template has no such
    marks, a turn is what the conversation up to and including it adds to the conversation before it plus the generation
    prompt; white space after a special token that ends the turn is left out. A token that overlaps a turn counts as
    part of it, as in transformers' `return_assistant_tokens_mask`.

    Special tokens are those that the template writes. One that a message spells out is encoded as ordinary text, unless
    `parse_special_tokens`, as transformers does. To tell them apart, a placeholder stands for it while the template
    runs.

    `placeholder` is the special token for a picture, if there are pictures. Where the text has the mark <image>, the
    template gets a part of the type image if it can write one, else text that becomes the placeholder afterwards.

    The eos token follows, and belongs to the last speaker, unless the template itself ends with a special token.
    `encode_table` reads `columns` of the documents; its table has `features`, among them `spelled`, the special tokens
    that messages spell out. `note` says how turns are found.
    """

    def __init__(self, tokenizer: Any, parse_special_tokens: bool = False, placeholder: str | None = None) -> None:
        """`UserError` if the tokenizer has no chat template."""
        self.columns = ("text", "id") if placeholder is None else ("text", "id", "pictures")
        self.dtype = token_dtype(len(tokenizer))
        self.features = datasets.Features(
            input_ids=datasets.List(datasets.Value(self.dtype.__name__)),
            loss_mask=datasets.List(datasets.Value("uint8")),
            spelled=SPELLED_FEATURE,
        )
        try:
            self._template: str = tokenizer.get_chat_template()
        except ValueError:
            has_marks = {"<|im_start|>", "<|im_end|>"} <= tokenizer.get_vocab().keys()
            fitting = "chat_template.jinja" if has_marks else "chat_template_plain.jinja"
            advice = f"give one with tokenizer.chat_template configs/{fitting}"
            raise UserError(f"the tokenizer has no chat template; {advice}") from None
        self._marks_turns = GENERATION.search(self._template) is not None
        how = "as the chat template marks them" if self._marks_turns else "the text after a generation prompt"
        self.note = f"encoded by tokenizers; the assistant's turns: {how}"
        self._variables = tokenizer.special_tokens_map  # for templates, such as {{ bos_token }}
        self._special = tuple(item.content for item in tokenizer.added_tokens_decoder.values() if item.special)
        self._eos: str = tokenizer.eos_token
        self._backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
        self._backend.post_processor = None  # some of them remove white space from a token's span of characters
        self._spelled = SpecialTokens(self._backend)
        self._hidden, names = hide_special_tokens(self._backend)
        # What stands for a special token of a message while the template runs; letters, which templates leave alone.
        self._placeholders = {} if parse_special_tokens else {name: f"z{names[name][1:-1]}" for name in names}
        self._final = names | {letters: name for name, letters in self._placeholders.items()}
        self._pictures: Pictures | None = None
        self._takes_parts = False
        if placeholder is not None:
            self._pictures = Pictures(tokenizer, placeholder, {} if parse_special_tokens else names)
            self._final = (self._final if not parse_special_tokens else {}) | {PICTURE: self._pictures.name}
            self._takes_parts = self._writes_parts(placeholder)
        self._to_replace = re.compile("|".join(map(re.escape, sorted(self._final, key=len, reverse=True))) or "(?!)")

    def check_parts(self, documents: pa.Table) -> None:
        """`UserError` for the first conversation (columns `text` and `id`) that has tools or reasoning which the
        template does not write."""
        for key, head in OPTIONAL_PARTS.items():
            if key in self._template:
                continue
            has_part = pa.compute.match_substring(documents.column("text").cast(pa.large_string()), head)
            if (place := pa.compute.index(has_part, True).as_py()) >= 0:
                id = documents.column("id")[place].as_py()
                raise UserError(f"{id}: this conversation has {key}, which the chat template does not write; remove the "
                                "key, or give a template that writes it (tokenizer.chat_template)")  # fmt: skip

    def encode_table(self, batch: pa.Table) -> pa.Table:
        """Columns `text` and `id` → columns `input_ids` (uint16 or uint32), `loss_mask` (uint8) and `spelled`, lists.
        `UserError` for a conversation that the template refuses, or whose turns cannot be found."""
        stored, names = batch["text"].to_pylist(), batch["id"].to_pylist()
        pictures = batch["pictures"].to_pylist() if self._pictures is not None else [0] * len(stored)
        spelled = list(map(self._spelled.find, map(without_marks, stored, pictures)))
        rendered = list(map(self.render, stored, names, pictures))
        encodings = self._encode([text for text, _ in rendered], list(map(self._is_hidden, spelled, pictures)))
        ids, masks = [np.empty(0, self.dtype)], [np.empty(0, np.uint8)]
        for (_, turns), encoding in zip(rendered, encodings, strict=True):
            first, after = np.array(encoding.offsets, np.int64).T  # of each token's characters
            mask = np.zeros(len(first), np.uint8)
            for start, stop in turns:
                mask[(first < stop) & (after > start)] = 1
            ids.append(np.array(encoding.ids, self.dtype))
            masks.append(mask)
        if self._pictures is not None:
            for id, count, part in zip(names, pictures, ids[1:], strict=True):
                self._pictures.check(id, count, part)
        offsets = pa.array(np.cumsum([len(mask) for mask in masks], dtype=np.int32))
        columns = {"input_ids": ids, "loss_mask": masks}
        lists = {
            name: pa.ListArray.from_arrays(offsets, pa.array(np.concatenate(parts))) for name, parts in columns.items()
        }
        return pa.table(lists | {"spelled": pa.array(spelled, pa.list_(pa.string()))})

    def _is_hidden(self, spelled: list[str], pictures: int) -> bool:
        """Whether the rendered text is for `_hidden`, because special tokens and text must be told apart in it."""
        return bool(self._placeholders and (spelled or pictures))

    def _encode(self, texts: list[str], hidden: list[bool]) -> Iterator[Any]:
        """The encoding of each rendered text, by `_hidden` or the tokenizer's own."""
        plain = [text for text, is_hidden in zip(texts, hidden, strict=True) if not is_hidden]
        encodings = chain.from_iterable(
            self._backend.encode_batch(part, add_special_tokens=False) for part, _ in iter_batches(plain, cut=False)
        )
        for text, is_hidden in zip(texts, hidden, strict=True):
            yield self._hidden.encode(text, add_special_tokens=False) if is_hidden else next(encodings)

    def render(self, stored: str, id: str, pictures: int = 0) -> tuple[str, list[Span]]:
        """A stored conversation as the template formats it, and the assistant's turns; `id` is for a `UserError`. If
        `_is_hidden`, the text is for `_hidden`."""
        if pictures:
            stored = put_marks(stored, pictures).replace(MARK, PICTURE)
        spelled = self._spelled.find(stored)
        if self._placeholders and spelled:
            stored = self._spelled.pattern.sub(lambda found: self._placeholders[found[0]], stored)
        self.check_parts(pa.table({"text": [stored], "id": [id]}))
        messages, tools = split_messages(stored), split_tools(stored)
        if self._takes_parts:
            messages = [message | {"content": split_parts(message["content"])} for message in messages]
        learnt = [message.pop("weight", 1) for message in messages if message["role"] == "assistant"]
        try:
            text, turns = self._apply_template(messages, tools)
            if not self._marks_turns:
                turns = self._find_turns(messages, text, id, tools)
            if not all(learnt):
                if len(turns) != len(learnt):
                    raise UserError(f"{id}: a message has the weight 0, but the chat template marks {len(turns)} turns "
                                    f"of {len(learnt)} messages of the assistant, so it is unclear which")  # fmt: skip
                turns = list(itertools.compress(turns, learnt))
        except UserError:
            raise
        except Exception as error:  # a template is a program, which can raise anything
            reason = str(error) or type(error).__name__
            raise UserError(f"{id}: the chat template refuses this conversation: {reason}") from None
        if not text.rstrip().endswith(self._special):
            if messages[-1]["role"] == "assistant" and learnt[-1]:
                turns = [*turns, (len(text), len(text) + len(self._eos))]
            text += self._eos
        if not any(start < stop for start, stop in turns):
            raise UserError(f"{id}: the chat template's {{% generation %}} marks nothing of this conversation")
        return self._put_names(text, turns) if pictures or self._is_hidden(spelled, 0) else (text, turns)

    def _writes_parts(self, placeholder: str) -> bool:
        """Whether the template formats contents that are lists of parts, as those for processors do."""
        content = [{"type": "image"}, {"type": "text", "text": "zzz"}]
        with contextlib.suppress(Exception):  # a template is a program, which can raise anything
            text, _ = self._apply_template([{"role": "user", "content": content}], None)
            return placeholder in text and "zzz" in text and "'type'" not in text
        return False

    def _put_names(self, text: str, turns: list[Span]) -> tuple[str, list[Span]]:
        """Replace the template's special tokens by the names that `_hidden` reads as them, and placeholders by the
        special tokens that they stand for; the turns move along."""
        found = list(self._to_replace.finditer(text))
        longer = np.cumsum([0, *(len(self._final[item[0]]) - len(item[0]) for item in found)])
        ends = [item.end() for item in found]

        def moved(place: int) -> int:
            return place + int(longer[np.searchsorted(ends, place, side="right")])

        replaced = self._to_replace.sub(lambda item: self._final[item[0]], text)
        return replaced, [(moved(start), moved(stop)) for start, stop in turns]

    def _apply_template(
        self, messages: Messages, tools: Any, *, add_generation_prompt: bool = False
    ) -> tuple[str, list[Span]]:
        """The formatted text, and the spans that the template marks in it."""
        from transformers.utils.chat_template_utils import render_jinja_template

        rendered: Any = render_jinja_template(
            [messages], tools=tools, chat_template=self._template, add_generation_prompt=add_generation_prompt,
            return_assistant_tokens_mask=self._marks_turns, **self._variables,
        )  # fmt: skip
        (text,), marks = rendered
        return text, marks[0] if self._marks_turns else []

    def _find_turns(self, messages: Messages, text: str, id: str, tools: Any) -> list[Span]:
        turns = []
        for number, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            prompt, _ = self._apply_template(messages[:number], tools, add_generation_prompt=True)
            whole, _ = self._apply_template(messages[: number + 1], tools)
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
