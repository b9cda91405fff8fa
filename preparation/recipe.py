"""The options of prepare_data.py, one dataclass per subject. No slow import here, so mistakes are reported at once."""

import re
import string
from collections import Counter
from dataclasses import dataclass, field, fields
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

from utils.cli import Fraction, NonNegativeInt, PositiveInt, nearest
from utils.pretrained import TOKENIZER_FILES, check_name

# The special tokens of a tokenizer trained here, and the fewest other entries that each algorithm works with: the bytes
# (the unigram trainer overshoots unless there is room for one more piece), or a few characters.
END_OF_TEXT, PADDING = BYTE_LEVEL_TOKENS = "<|endoftext|>", "<|pad|>"
WORDPIECE_TOKENS = {f"{name}_token": f"[{name.upper()}]" for name in ("pad", "unk", "cls", "sep", "mask")}
BUILT_IN_TOKENS = {"bpe": BYTE_LEVEL_TOKENS, "unigram": BYTE_LEVEL_TOKENS, "wordpiece": (*WORDPIECE_TOKENS.values(),)}
LEAST_ENTRIES = {"bpe": 256, "unigram": 257, "wordpiece": 4}
MARK = "<image>"  # in a text: here stands a picture
TEMPLATE_TOKEN = re.compile(r"<\|[\w-]+\|>")

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
    """Instead of a path: a dataset on the Hub, or a local folder in the Hub's layout; `load_dataset` reads it."""
    name: str | None = None
    """Name of this source in tables. null: the last part of the path, up to its first dot."""
    kind: Kind | None = None
    """How to read the files. null: by their suffix. code: one document per file, with the filters for code."""
    include: str | None = None
    """Only files whose path within the folder or archive matches this pattern, as in "*.rst.gz"."""
    exclude: str | list[str] | None = None
    """No files whose path within the folder or archive matches this pattern or one of these, as in "drafts/*"."""
    encoding: str | None = None
    """Of text, CSV, JSON, HTML and code, as in windows-1252, utf-16 or shift_jis. null: UTF-8; HTML finds it out."""
    text_column: str | None = None
    """Column with the text. null: the recipe's text_column."""
    template: str | None = None
    """Text made from several columns, as in "{title}\\n\\n{body}"; instead of text_column."""
    messages_column: str | None = None
    """Column with a conversation, a list of messages; instead of text_column. null: the recipe's messages_column."""
    image_column: str | None = None
    """Column with a document's pictures: bytes, `{bytes, path}`, a path relative to the record's file, a list of these,
    or null. The mark <image> in the text says where each one stands; without marks they stand before the text."""
    audio_column: str | None = None
    """Column with a document's sound, given like a picture; the text is its transcript."""
    group_column: str | None = None
    """Column whose value keeps documents together: all with the same one are in train, or all in validation."""
    new_document: str | None = None
    """Text files: regular expression for the lines that begin a new document. null: one document per file."""
    keep_separator: bool = False
    """Whether a line that new_document matches from end to end stays in the text. A line matched in part stays."""
    weight: float = 1.0
    """How often each training document is used per epoch: 2 is twice; 0.5 is half of them, chosen by a hash."""
    extensions: list[str] | None = None
    """code: suffixes to read. null: those of common programming languages."""
    max_file_bytes: int = 1_000_000
    """code: longer files are skipped."""
    config: str | None = None
    """hub: name of the dataset's configuration."""
    split: str = "train"
    """hub: name of the split."""
    revision: str | None = None
    """hub: commit, tag or branch."""
    streaming: bool = False
    """hub: read over the network on the fly, without storing the files."""

    @property
    def media_column(self) -> str | None:
        return self.image_column or self.audio_column

    @property
    def media_kind(self) -> Literal["image", "audio"] | None:
        return "image" if self.image_column else "audio" if self.audio_column else None

    def problems(self, where: str) -> list[str]:
        found = []
        if (self.path is None) == (self.hub is None):
            found.append("give either path or hub")
        if self.path == "":
            found.append("path is empty")
        if sum(option is not None for option in (self.text_column, self.template, self.messages_column)) > 1:
            found.append("give either text_column or template or messages_column")
        if self.image_column is not None and self.audio_column is not None:
            found.append("give either image_column or audio_column")
        found += _lacking_libraries(self)
        if self.template is not None:
            try:
                parts = [part for part in string.Formatter().parse(self.template) if part[1] is not None]
                if not parts or any(form or convert or not str(name).strip() for _, name, form, convert in parts):
                    found.append(f'template {self.template!r} should name columns, as in "{{title}}: {{body}}"')
            except ValueError as error:
                found.append(f"template {self.template!r}: {error}")
        try:
            re.compile(self.new_document or "")
        except re.error as error:
            found.append(f"new_document {self.new_document!r} is not a regular expression: {error}")
        if self.encoding is not None:
            try:
                "".encode(self.encoding)
            except (LookupError, UnicodeError):
                found.append(f"encoding {self.encoding!r} is unknown; give one such as windows-1252, utf-16, shift_jis")
        if not 0 <= self.weight <= 100:
            found.append(f"weight is {self.weight}; it must be between 0 and 100")
        if self.max_file_bytes < 1:
            found.append(f"max_file_bytes is {self.max_file_bytes}; it must be at least 1")
        return [f"{where}: {problem}" for problem in found]


def _lacking_libraries(source: SourceConfig) -> list[str]:
    """What must be installed to read the source's pictures or sounds, in words."""
    if source.image_column is not None and find_spec("PIL") is None:
        return ["image_column needs the library pillow: pip install pillow"]
    if source.audio_column is not None and find_spec("soundfile") is None:
        return ["audio_column needs the library soundfile: pip install -e '.[audio]'"]
    return []


def parse_source(entry: Any, where: str) -> tuple[SourceConfig | None, list[str]]:
    """One entry of `sources` → (source, problems). Entries are plain YAML mappings, so their types are checked too."""
    if isinstance(entry, str):
        entry = {"path": entry}
    if not isinstance(entry, dict):
        return None, [f"{where}: expected a path or a mapping with a path, found {entry!r}"]
    types = {item.name: item.type for item in fields(SourceConfig)}
    found = []
    for key, value in entry.items():
        if key not in types:
            hint = nearest(key, types) or f"; known are {', '.join(types)}"
            found.append(f"{where}: unknown key {key!r}{hint}")
        elif not _fits(value, types[key]):
            found.append(f"{where}: {key} cannot be {value!r}")
    if found:
        return None, found
    source = SourceConfig(**entry)
    return source, source.problems(where)


def _fits(value: Any, expected: Any) -> bool:
    """Whether a YAML value has the type of a field. An int is a float too; a bool is no int."""
    if get_origin(expected) is Literal:
        return value in get_args(expected)
    if get_origin(expected) is list:
        return isinstance(value, list) and all(_fits(item, *get_args(expected)) for item in value)
    if alternatives := get_args(expected):
        return any(_fits(value, alternative) for alternative in alternatives)
    return type(value) is expected or (expected is float and type(value) is int)


@dataclass
class CleaningConfig:
    """The steps that change or drop documents, in order."""

    steps: list[str] = field(default_factory=lambda: ["standard"])
    """Names of steps, in order. standard is short for fix_unicode, remove_controls, nfc, tidy_whitespace. Other steps
    change the text (basic, remove_boilerplate, mask_personal_data, c4_lines) or drop documents (language, length, c4,
    gopher_quality, gopher_repetition, fineweb; for code generated_code, code_lines, licence)."""
    languages: list[str] = field(default_factory=list)
    """Step language: ISO 639-1 codes to keep, as in [en, de]."""
    min_language_score: Fraction = 0.65
    """Step language: documents below this probability are dropped (FineWeb uses 0.65)."""
    min_characters: NonNegativeInt = 1
    """Step length: shorter documents are dropped."""
    max_characters: PositiveInt | None = None
    """Step length: longer documents are dropped."""
    licences: list[str] = field(default_factory=list)
    """Step licence: SPDX identifiers to keep, as in [MIT, Apache-2.0]; NONE keeps files that name no licence."""

    def problems(self) -> list[str]:
        from preparation.cleaning.steps import check_steps  # here, because that module needs this one

        found = check_steps(self.steps)
        for code in self.languages:
            if not re.fullmatch("[a-z]{2,3}", code):
                found.append(f"cleaning.languages: {code!r} is not a language code such as en or de")
        if "language" in self.steps and not self.languages:
            found.append("cleaning.languages is empty; step language needs the codes to keep, as in [en]")
        if "licence" in self.steps and not self.licences:
            found.append("cleaning.licences is empty; step licence needs the identifiers to keep, as in [MIT]")
        return found


@dataclass
class DeduplicationConfig:
    """Near duplicates, and training documents that contain evaluation text. Exact duplicates, which differ in nothing
    but white space, are always dropped."""

    ignore_case_and_punctuation: bool = False
    """Drop documents that equal another one but for case, punctuation and symbols; `C`, `C++` and `C#` are then equal."""

    # Below 0.5 the bands of `duplicates.py` begin to miss pairs.
    near_threshold: Annotated[float, ">= 0.5 and <= 1"] | None = 0.55
    """Jaccard similarity of word n-grams above which documents are near duplicates; the longest is kept. null: off."""
    contamination_overlap: Fraction | None = 0.5
    """A training document is dropped if it contains this share of an evaluation document's 13-grams. null: off."""
    evaluation_files: list[str] = field(default_factory=list)
    """Files with more evaluation text that training documents must not contain, besides the validation split."""


@dataclass
class TokenizerConfig:
    """The tokenizer: trained on the training documents, or one you supply."""

    pretrained: str | None = None
    """Folder or Hub name of a tokenizer to use unchanged. null: train one on the training documents."""
    algorithm: Literal["bpe", "wordpiece", "unigram"] = "bpe"
    """bpe and unigram work on bytes, so they encode and decode any text; wordpiece works on words, as BERT's does."""
    vocab_size: int = 2048
    """Entries of a tokenizer trained here, including special tokens."""
    special_tokens: list[str] = field(default_factory=list)
    """More special tokens, as in [<|user|>, <|assistant|>]."""
    parse_special_tokens: bool = False
    """Special tokens that a text spells out become these tokens. false: they are text, encoded like any other."""
    chat_template: str | None = None
    """File with a Jinja chat template, which is saved with the tokenizer."""
    sample_bytes: PositiveInt = 30_000_000
    """Bytes of UTF-8 to train on, sampled evenly from the training documents. With 30 MB of English, bpe takes 12 s
    and 240 MB of memory; with 100 MB it takes 36 s and 490 MB and gains 0.4 % in bytes per token."""

    def problems(self) -> list[str]:
        found = []
        template = ""
        if self.chat_template:
            try:
                template = Path(self.chat_template).read_text(encoding="utf-8")
            except (OSError, UnicodeDecodeError) as error:
                found.append(f"tokenizer.chat_template: {self.chat_template} cannot be read: {error}")
        if self.pretrained is not None:
            check_name("tokenizer.pretrained", self.pretrained, (*TOKENIZER_FILES, "tokenizer_config.json"))
            if self.special_tokens:
                found.append("tokenizer.special_tokens only apply to a tokenizer trained here; leave them out")
            return found
        special = [*BUILT_IN_TOKENS[self.algorithm], *self.special_tokens]
        for token, count in Counter(special).items():
            if count > 1 or not token.strip():
                problem = "listed or built in already" if token.strip() else "empty"
                found.append(f"tokenizer.special_tokens: {token!r} is {problem}")
        if lacking := sorted(set(TEMPLATE_TOKEN.findall(template)) - set(special)):
            found.append(f"tokenizer.special_tokens lacks {', '.join(lacking)}, which tokenizer.chat_template writes")
        least = len(special) + LEAST_ENTRIES[self.algorithm]
        if not least <= self.vocab_size <= 2**31:
            needs = f"{self.algorithm} with {len(special)} special tokens needs at least {least}, and at most 2^31"
            found.append(f"tokenizer.vocab_size is {self.vocab_size}; {needs}")
        return found


@dataclass
class PrepareConfig:
    """Options of prepare_data.py; the defaults are those of the demo."""

    # Not `Any`, under which jsonargparse would parse a string as YAML once more.
    sources: list[str | dict[str, str | int | float | bool | list[str] | None]] = field(
        default_factory=lambda: ["sample_data/dictionaries.jsonl"]
    )
    """Files or folders of .txt, .md, .rst, .jsonl, .json, .csv, .parquet or .html, also with .gz or .zst; tar archives;
    folders written by `datasets`; - for standard input. An entry may be a mapping: path or hub, name, kind, weight,
    text_column, template or messages_column, include, and more (see docs/data.md)."""
    text_column: str = "text"
    """Column with the text in JSON lines, CSV and parquet."""
    messages_column: str | None = None
    """Column with a conversation in JSON lines and parquet: a list of messages with role and content. Only the
    assistant's messages are trained on. null: the sources are plain text."""
    output: str = "data/demo"
    """Folder to write."""
    stream: bool = False
    """Do not store the training tokens: train.py reads, cleans, tokenizes and packs the sources on the fly. The
    tokenizer and the validation split come from the first stream_head_documents documents."""
    stream_head_documents: Annotated[int, ">= 10"] = 10_000
    """stream: documents to read for the tokenizer and the validation split."""
    max_broken_share: Fraction = 0.01
    """Share of records that may be broken (not UTF-8, not JSON, cut off, ...); they are skipped and listed."""
    validation_fraction: Annotated[float, "> 0 and < 1"] = 0.1
    """Share of the documents held out for validation, chosen by a hash of their text."""
    keep_dropped: bool = False
    """Write the dropped documents, with the reasons, to dropped.jsonl in the output folder."""
    check_hashes: bool = False
    """Read every source file to detect changes, instead of trusting its size and modification time."""
    num_proc: PositiveInt = 1
    """Processes for cleaning, sketching and the search for evaluation text; tokenizing always uses all cores."""
    cleaning: CleaningConfig = field(default_factory=CleaningConfig)
    deduplication: DeduplicationConfig = field(default_factory=DeduplicationConfig)
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)

    def problems(self) -> list[str]:
        found = []
        if not self.sources:
            found.append("sources is empty; name at least one file or folder")
        for number, entry in enumerate(self.sources, start=1):
            found += parse_source(entry, f"sources entry {number}")[1]
        if self.sources and not found:
            sources = resolve_sources(self)
            names = Counter(source.name for source in sources)
            found += [f"two entries of sources are called {n!r}; give one a name" for n in names if names[n] > 1]
            if self.stream and any(source.path == "-" for source in sources):
                found.append("sources: standard input cannot be read again while training; write it to a file first")
            if not any(source.weight for source in sources):
                found.append("sources: every weight is 0, so there is nothing to train on")
            found += self._problems_with_media(sources)
            if not holds_conversations(sources):
                return found
            if plain := [source.name for source in sources if source.messages_column is None]:
                found.append(
                    f"sources: {plain[0]} holds plain text, others conversations; prepare them as two datasets"
                )
            if self.stream:
                found.append("stream: conversations cannot be streamed; leave stream out")
            if self.tokenizer.pretrained is None and self.tokenizer.chat_template is None:
                found.append(
                    "tokenizer: conversations need a chat template; give tokenizer.pretrained, or "
                    "tokenizer.chat_template and its tokens, as in --tokenizer.chat_template "
                    "configs/chat_template.jinja --tokenizer.special_tokens '[<|im_start|>, <|im_end|>]'"
                )
        return found

    def _problems_with_media(self, sources: list[SourceConfig]) -> list[str]:
        found = []
        kind = media_kind(sources)
        silent = [source.name for source in sources if source.audio_column is None]
        if {source.media_kind for source in sources} >= {"image", "audio"}:
            found.append("sources: a dataset holds pictures or sounds, not both; prepare them as two datasets")
        elif kind == "audio" and silent:
            found.append(f"sources: {silent[0]} has no audio_column, others have; prepare them as two datasets")
        if kind and self.stream:
            found.append("stream: pictures and sounds cannot be streamed; leave stream out")
        if self.stream and any(source.group_column for source in sources):
            found.append("stream: group_column needs a dataset that is stored; leave stream out")
        if kind and any(source.path == "-" for source in sources):
            found.append("sources: records on standard input cannot name files; write them to a file beside these")
        if any(source.audio_column and source.messages_column for source in sources):
            found.append("sources: audio_column goes with a text, not with a conversation")
        return found


def media_kind(sources: list[SourceConfig]) -> Literal["image", "audio"] | None:
    """Whether pictures or sounds go with the texts; None for text alone."""
    return next((source.media_kind for source in sources if source.media_kind), None)


def holds_conversations(sources: list[SourceConfig]) -> bool:
    """Whether the documents are conversations: in all sources or in none, as `PrepareConfig.problems` ensures."""
    return any(source.messages_column is not None for source in sources)


def resolve_sources(config: PrepareConfig) -> list[SourceConfig]:
    """The entries of `sources` as dataclasses, with their names and columns filled in."""
    parsed = [parse_source(entry, "")[0] for entry in config.sources]
    sources = [source for source in parsed if source]  # all of them, once `problems()` has found none
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
