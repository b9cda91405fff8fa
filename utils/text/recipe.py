"""The options of prepare_data.py: one dataclass per subject. No heavy import, so that mistakes are answered at once."""

import difflib
import re
import string
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from utils.cli import at_least

Kind = Literal["text", "json", "csv", "parquet", "html", "code"]

KIND_OF_SUFFIX: dict[str, Kind] = {
    ".txt": "text", ".md": "text", ".rst": "text", ".jsonl": "json", ".ndjson": "json", ".json": "json",
    ".csv": "csv", ".tsv": "csv", ".parquet": "parquet", ".html": "html", ".htm": "html",
}  # fmt: skip
COMPRESSED = (".gz", ".dz", ".zst")  # .dz is gzip with an index
TAR_ENDS = (".tar", ".tar.gz", ".tgz", ".tar.xz", ".tar.bz2", ".tar.zst")


@dataclass
class SourceConfig:
    """One entry of `sources`; a bare string is short for `path: string`."""

    path: str | None = None
    """File, folder, tar archive, folder saved by `datasets`, or - for standard input."""
    hub: str | None = None
    """Instead of a path: a dataset on the Hub, or a local folder in the Hub's layout, read by `load_dataset`."""
    name: str | None = None
    """What tables call this source. null: the last part of the path, up to its first dot."""
    kind: Kind | None = None
    """How to read the files. null: by their suffix. code: every file one document, with the filters for code."""
    include: str | None = None
    """Only files whose path within the folder or archive matches this pattern, as in "*.rst.gz"."""
    text_column: str | None = None
    """Column with the text. null: the recipe's text_column."""
    template: str | None = None
    """Text made from several columns, as in "{title}\\n\\n{body}"; instead of text_column."""
    new_document: str | None = None
    """Text files: a regular expression; a line that it matches begins a new document. null: one file, one document."""
    weight: float = 1.0
    """How often each training document is used per epoch: 2 is twice, 0.5 a half of them, chosen by a hash."""
    extensions: list[str] | None = None
    """code: suffixes to take. null: those of common programming languages."""
    max_file_bytes: int = 1_000_000
    """code: longer files are passed over."""
    config: str | None = None
    """hub: name of the dataset's configuration."""
    split: str = "train"
    """hub: name of the split."""
    revision: str | None = None
    """hub: commit, tag or branch."""
    streaming: bool = False
    """hub: read over the network as it goes, without storing the files."""

    def problems(self, where: str) -> list[str]:
        found = []
        if (self.path is None) == (self.hub is None):
            found.append(f"{where}: give either path or hub")
        if self.path == "":
            found.append(f"{where}: path is empty")
        if self.text_column is not None and self.template is not None:
            found.append(f"{where}: give either text_column or template")
        if self.template is not None:
            try:
                parts = [part for part in string.Formatter().parse(self.template) if part[1] is not None]
                if not parts or any(form or convert or not str(name).strip() for _, name, form, convert in parts):
                    found.append(
                        f'{where}: template {self.template!r} should name columns, as in "{{title}}: {{body}}"'
                    )
            except ValueError as error:
                found.append(f"{where}: template {self.template!r}: {error}")
        if self.new_document is not None:
            try:
                re.compile(self.new_document)
            except re.error as error:
                found.append(f"{where}: new_document {self.new_document!r} is no regular expression: {error}")
        if not 0 <= self.weight <= 100:
            found.append(f"{where}: weight is {self.weight}; it must be between 0 and 100")
        if self.max_file_bytes < 1:
            found.append(f"{where}: max_file_bytes is {self.max_file_bytes}; it must be at least 1")
        return found


def parse_source(entry: Any, where: str) -> tuple[SourceConfig | None, list[str]]:
    """One entry of `sources` → (source, problems); the types are checked too, as these are plain YAML mappings."""
    if isinstance(entry, str):
        entry = {"path": entry}
    if not isinstance(entry, dict):
        return None, [f"{where}: expected a path or a mapping with a path, found {entry!r}"]
    kinds = {item.name: item for item in fields(SourceConfig)}
    found = []
    for key, value in entry.items():
        if key not in kinds:
            close = difflib.get_close_matches(str(key), kinds, n=1, cutoff=0.5)
            hint = f" (did you mean {close[0]}?)" if close else f"; known are {', '.join(kinds)}"
            found.append(f"{where}: unknown key {key!r}{hint}")
        elif not _fits(value, kinds[key].name):
            found.append(f"{where}: {key} cannot be {value!r}")
    if found:
        return None, found
    source = SourceConfig(**entry)
    return source, source.problems(where)


def _fits(value: Any, name: str) -> bool:
    if name == "kind":
        return value is None or value in Kind.__args__  # type: ignore[attr-defined]
    if name in ("weight", "max_file_bytes"):
        accepted: tuple[type, ...] = (int, float) if name == "weight" else (int,)
        return isinstance(value, accepted) and not isinstance(value, bool)
    if name == "streaming":
        return isinstance(value, bool)
    if name == "extensions":
        return value is None or (isinstance(value, list) and all(isinstance(item, str) for item in value))
    return isinstance(value, str) or (value is None and name != "split")


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
        from utils.text.cleaning import check_steps  # here, as that module's own imports are light only by its promise

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
    text_column or template, include, and more (see docs/data.md)."""
    text_column: str = "text"
    """Column that holds the text in JSON lines, CSV and parquet."""
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
    """Processes for cleaning and sketching; tokenizing uses all cores by itself."""
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
        if not 0 < self.validation_fraction < 1:
            found.append(f"validation_fraction is {self.validation_fraction}; it must lie between 0 and 1")
        if not 0 <= self.max_broken_share <= 1:
            found.append(f"max_broken_share is {self.max_broken_share}; it must be between 0 and 1")
        return found


def resolve_sources(config: PrepareConfig) -> list[SourceConfig]:
    """The entries of `sources` as dataclasses, with their names and text columns filled in."""
    parsed = [parse_source(entry, "")[0] for entry in config.sources]
    sources = [source for source in parsed if source]  # all of them: `problems()` has been asked before
    short = [Path(source.path or str(source.hub)).name.split(".")[0] for source in sources]
    for source, name in zip(sources, short, strict=True):
        if source.path == "-":
            name = "standard input"
        elif short.count(name) > 1 or not name:
            name = source.path or str(source.hub)
        source.name = source.name or name
        if source.template is None:
            source.text_column = source.text_column or config.text_column
    return sources
