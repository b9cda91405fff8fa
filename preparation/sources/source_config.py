"""One entry of a recipe's `sources`. No slow import here, so that a mistake is reported at once."""

import re
import string
from dataclasses import dataclass, fields
from typing import Any, Literal, get_args, get_origin

from utils.cli import nearest

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
    text_column: str | None = None
    """Column with the text. null: the recipe's text_column."""
    template: str | None = None
    """Text made from several columns, as in "{title}\\n\\n{body}"; instead of text_column."""
    messages_column: str | None = None
    """Column with a conversation, a list of messages; instead of text_column. null: the recipe's messages_column."""
    new_document: str | None = None
    """Text files: regular expression for the lines that begin a new document. null: one document per file."""
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

    def problems(self, where: str) -> list[str]:
        found = []
        if (self.path is None) == (self.hub is None):
            found.append("give either path or hub")
        if self.path == "":
            found.append("path is empty")
        if sum(option is not None for option in (self.text_column, self.template, self.messages_column)) > 1:
            found.append("give either text_column or template or messages_column")
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
        if not 0 <= self.weight <= 100:
            found.append(f"weight is {self.weight}; it must be between 0 and 100")
        if self.max_file_bytes < 1:
            found.append(f"max_file_bytes is {self.max_file_bytes}; it must be at least 1")
        return [f"{where}: {problem}" for problem in found]


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
