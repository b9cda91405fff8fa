"""The options of prepare_data.py: one dataclass per subject. No heavy import, so that mistakes are answered at once."""

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from preparation.sources.source_config import SourceConfig, parse_source
from utils.cli import at_least


@dataclass
class CleaningConfig:
    """What is done to each document, in order, and which are dropped."""

    steps: list[str] = field(default_factory=lambda: ["standard"])
    """Names of steps, in order. standard stands for fix_unicode, remove_controls, nfc, tidy_whitespace. Others change
    the text (basic, remove_boilerplate, mask_personal_data, c4_lines) or drop documents (language, length, c4,
    gopher_quality, gopher_repetition, fineweb; for code generated_code, code_lines, licence)."""
    languages: list[str] = field(default_factory=list)
    """Step language: codes to keep, as in [en, de]."""
    min_language_score: float = 0.65
    """Step language: documents under this probability are dropped (0.65 is FineWeb's)."""
    min_characters: int = 1
    """Step length: shorter documents are dropped."""
    max_characters: int | None = None
    """Step length: longer documents are dropped."""
    licences: list[str] = field(default_factory=list)
    """Step licence: SPDX identifiers to keep, as in [MIT, Apache-2.0]; NONE keeps files that name no licence."""

    def problems(self) -> list[str]:
        from preparation.cleaning.cleaning import (
            check_steps,  # here, as that module's own imports are light only by its promise
        )

        found = check_steps(self.steps)
        found += at_least("cleaning", self, min_characters=0, max_characters=1)
        if not 0 <= self.min_language_score <= 1:
            found.append(f"cleaning.min_language_score is {self.min_language_score}; it must be between 0 and 1")
        for code in self.languages:
            if not re.fullmatch("[a-z]{2,3}", code):
                found.append(f"cleaning.languages: {code!r} is no code of a language, as en or de")
        if "language" in self.steps and not self.languages:
            found.append("cleaning.languages is empty; step language needs the codes to keep, as in [en]")
        if "licence" in self.steps and not self.licences:
            found.append("cleaning.licences is empty; step licence needs the identifiers to keep, as in [MIT]")
        return found


@dataclass
class DeduplicationConfig:
    """Documents that say the same, and training documents that hold evaluation text. Exact duplicates always go."""

    near_threshold: float | None = 0.55
    """Jaccard similarity of word n-grams from which two documents are near duplicates; the longest is kept. null: off."""
    contamination_overlap: float | None = 0.5
    """Share of an evaluation document's 13-grams from which a training document that holds them is dropped. null: off."""
    evaluation_files: list[str] = field(default_factory=list)
    """More evaluation text, besides the validation split, that training documents must not hold: files as in sources."""

    def problems(self) -> list[str]:
        found = []
        for name in ("near_threshold", "contamination_overlap"):
            value = getattr(self, name)
            low = 0.5 if name == "near_threshold" else 0  # below, the bands of `deduplication.py` would miss pairs
            if value is not None and not low <= value <= 1:
                found.append(f"deduplication.{name} is {value}; it must be between {low} and 1, or null")
        return found


@dataclass
class TokenizerConfig:
    """The tokenizer: trained on the training documents, or taken as given."""

    pretrained: str | None = None
    """Folder or Hub name of a tokenizer to take as it is. null: train one on the training documents."""
    algorithm: Literal["bpe", "wordpiece", "unigram"] = "bpe"
    """bpe and unigram work on bytes, so that any text encodes and comes back; wordpiece on words, as BERT's."""
    vocab_size: int = 2048
    """Entries of a tokenizer trained here, special tokens included."""
    special_tokens: list[str] = field(default_factory=list)
    """More special tokens, as in [<|user|>, <|assistant|>]."""
    chat_template: str | None = None
    """File with a Jinja chat template to save with the tokenizer."""
    sample_bytes: int = 30_000_000
    """How much text to train on, taken evenly from the training documents, in bytes of UTF-8. 30 MB of English take bpe
    12 s and 240 MB of memory; 100 MB gain 0.4 % in bytes per token and take 36 s and 490 MB."""

    def problems(self) -> list[str]:
        found = at_least("tokenizer", self, sample_bytes=1)
        least = 258 + len(self.special_tokens)
        if self.pretrained is None and self.algorithm != "wordpiece" and self.vocab_size < least:
            found.append(
                f"tokenizer.vocab_size is {self.vocab_size}; 256 bytes and {least - 256} special tokens need at least "
                f"{least}"
            )
        found += at_least("tokenizer", self, vocab_size=10)
        if self.pretrained is not None and self.special_tokens:
            found.append(
                "tokenizer.special_tokens are for a tokenizer that is trained here, not for tokenizer.pretrained"
            )
        if len(set(self.special_tokens)) < len(self.special_tokens) or not all(self.special_tokens):
            found.append("tokenizer.special_tokens holds an empty or a repeated token")
        if self.vocab_size > 2**31:
            found.append(f"tokenizer.vocab_size is {self.vocab_size}; it must be at most 2^31")
        if self.chat_template:
            try:
                Path(self.chat_template).read_text(encoding="utf-8")
            except (OSError, UnicodeDecodeError) as error:
                found.append(f"tokenizer.chat_template: {self.chat_template} cannot be read: {error}")
        return found


@dataclass
class PrepareConfig:
    """Options of prepare_data.py; the defaults are the demo's."""

    # The values are spelled out, as jsonargparse would read a string under `Any` as YAML once more.
    sources: list[str | dict[str, str | int | float | bool | list[str] | None]] = field(
        default_factory=lambda: ["sample_data/dictionaries.jsonl"]
    )
    """Files or folders of .txt, .md, .rst, .jsonl, .json, .csv, .parquet or .html, also .gz and .zst; tar archives;
    folders saved by `datasets`; - for standard input. An entry may be a mapping: path or hub, name, kind, weight,
    text_column, template or messages_column, include, and more (see docs/data.md)."""
    text_column: str = "text"
    """Column that holds the text in JSON lines, CSV and parquet."""
    messages_column: str | None = None
    """Column that holds a conversation in JSON lines and parquet: a list of messages with role and content, of which the
    assistant's are learnt. null: the sources are plain text."""
    output: str = "data/demo"
    """Folder to write."""
    stream: bool = False
    """Do not store the training tokens: train.py reads, cleans, tokenizes and packs the sources as it goes. The
    tokenizer and the validation split come from the first stream_head_documents documents."""
    stream_head_documents: int = 10_000
    """stream: documents to read for the tokenizer and the validation split."""
    max_broken_share: float = 0.01
    """Share of records that may be broken (not UTF-8, not JSON, cut off, ...); they are left out and listed."""
    validation_fraction: float = 0.1
    """Share of the documents held out, chosen by a hash of each document's text."""
    keep_dropped: bool = False
    """Write the dropped documents and the reasons to dropped.jsonl in the output folder."""
    check_hashes: bool = False
    """Read every source file to see whether it has changed, instead of believing its size and time."""
    num_proc: int = 1
    """Processes for cleaning, sketching and the search for evaluation text; tokenizing uses all cores by itself."""
    cleaning: CleaningConfig = field(default_factory=CleaningConfig)
    deduplication: DeduplicationConfig = field(default_factory=DeduplicationConfig)
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)

    def problems(self) -> list[str]:
        found = at_least("", self, num_proc=1, stream_head_documents=10)
        if not self.sources:
            found.append("sources is empty; name at least one file or folder")
        for number, entry in enumerate(self.sources, start=1):
            found += parse_source(entry, f"sources entry {number}")[1]
        if self.sources and not found:
            sources = resolve_sources(self)
            names = [str(source.name) for source in sources]
            found += [
                f"two entries of sources are called {name!r}"
                for name in sorted({n for n in names if names.count(n) > 1})
            ]
            if self.stream and any(source.path == "-" for source in sources):
                found.append("sources: standard input cannot be read again while training, as stream asks")
            if not any(source.weight for source in sources):
                found.append("sources: every weight is 0, so there is nothing to train on")
            found += self._conversation_problems(sources)
        if not 0 < self.validation_fraction < 1:
            found.append(f"validation_fraction is {self.validation_fraction}; it must lie between 0 and 1")
        if not 0 <= self.max_broken_share <= 1:
            found.append(f"max_broken_share is {self.max_broken_share}; it must be between 0 and 1")
        return found

    def _conversation_problems(self, sources: list[SourceConfig]) -> list[str]:
        conversations = [str(source.name) for source in sources if source.messages_column is not None]
        plain = [str(source.name) for source in sources if source.messages_column is None]
        if not conversations:
            return []
        found = []
        if plain:
            found.append(
                f"sources: {conversations[0]} holds conversations, {plain[0]} plain text; prepare them as two datasets"
            )
        if self.stream:
            found.append("stream: conversations cannot be streamed; leave stream out")
        if self.tokenizer.pretrained is None and self.tokenizer.chat_template is None:
            found.append(
                "tokenizer: conversations need a chat template; give tokenizer.pretrained, or tokenizer.chat_template "
                "and its tokens, as in --tokenizer.chat_template configs/chat_template.jinja --tokenizer.special_tokens "
                "'[<|im_start|>, <|im_end|>]'"
            )
        return found


def holds_conversations(sources: list[SourceConfig]) -> bool:
    """Whether the documents are conversations: of all sources or of none, as `PrepareConfig.problems` sees to."""
    return any(source.messages_column is not None for source in sources)


def resolve_sources(config: PrepareConfig) -> list[SourceConfig]:
    """The entries of `sources` as dataclasses, with their names and columns filled in."""
    parsed = [parse_source(entry, "")[0] for entry in config.sources]
    sources = [source for source in parsed if source]  # all of them: `problems()` has been asked before
    short = [Path(source.path or str(source.hub)).name.split(".")[0] for source in sources]
    for source, name in zip(sources, short, strict=True):
        if source.path == "-":
            name = "standard input"
        elif short.count(name) > 1 or not name:
            name = source.path or str(source.hub)
        source.name = source.name or name
        if source.template is None and source.text_column is None:
            source.messages_column = source.messages_column or config.messages_column
            if source.messages_column is None:
                source.text_column = config.text_column
    return sources
