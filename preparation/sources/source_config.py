"""One entry of a recipe's `sources`. No heavy import, so that mistakes are answered at once."""

import difflib
import re
import string
from dataclasses import dataclass, fields
from typing import Any, Literal

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
    messages_column: str | None = None
    """Column with a conversation, a list of messages; instead of text_column. null: the recipe's messages_column."""
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
        if sum(option is not None for option in (self.text_column, self.template, self.messages_column)) > 1:
            found.append(f"{where}: give either text_column or template or messages_column")
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
