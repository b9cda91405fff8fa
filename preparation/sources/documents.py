"""From the entries of a recipe to documents: opens files, archives and tables; one reader per format.

A record that cannot be read becomes a `Broken` with its position and the reason, and reading continues after it.
"""

import bz2
import codecs
import contextlib
import datetime
import decimal
import gzip
import io
import itertools
import json
import lzma
import math
import os
import re
import shutil
import string
import sys
import tarfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import datasets
import pyarrow as pa
import pyarrow.parquet
from tqdm import tqdm

from preparation.recipe import MARK, SourceConfig
from preparation.sources.conversations import SEPARATOR, find_conversation, without_system
from preparation.sources.csv_lines import CsvLines, sniff_csv
from preparation.sources.files import (
    ANNEX_LINK,
    MISSING,
    Found,
    find,
    is_saved_dataset,
    is_tar,
    kind_of,
    known_suffixes,
    reading_units,
    why_left,
)
from preparation.sources.html import Page, decode_page, read_page
from preparation.sources.media import (
    BrokenMedia,
    Checked,
    References,
    find_references,
    load_all,
    resolve,
)
from preparation.stages import SLICE_BYTES, SLICE_DOCUMENTS
from utils.cli import UserError

DOCUMENT_FEATURES = {
    "text": datasets.Value("large_string"), "source": datasets.Value("string"), "id": datasets.Value("string"),
}  # fmt: skip
MEDIA_FEATURES = {"media": datasets.List(datasets.Value("large_binary"))}
TEXT_PART_BYTES = 4 << 20  # a longer text file becomes several documents, cut between paragraphs or lines
SNIFFED_BYTES = 1 << 16
CONTINUATION_BYTES = bytes(range(0x80, 0xC0))  # of a character in UTF-8, after its first
LONE_RETURN = re.compile(rb"(?<=\r)(?!\n)")  # after a carriage return that ends a line by itself
LONE_SURROGATE = re.compile("[\ud800-\udfff]")  # half a character, which JSON can express and UTF-8 cannot
BINARY = "a binary file, not text (it holds zero bytes)"
MAX_BROKEN_LISTED = 1000
EMPTY = "the file is empty"
# What stands in a file's place when a repository or a download gave something else than the file.
LFS_POINTER = re.compile(rb"version https://git-lfs\.github\.com/spec/v1\n.*?\bsize (\d+)", re.DOTALL)
ANNEX_POINTER = re.compile(rb"(?:(?:\.\./)*\.git|)/annex/objects/[^\n]+\n?\Z")
WEB_PAGE = re.compile(rb"\s*(?:<!doctype html|<html\b|<\?xml[^>]*>\s*<error>)", re.IGNORECASE)
SMALL_SHARE = 0.1  # of a page's characters; of 879 pages of documentation 5 %, nearly all lists of links, keep less
DAMAGED = (EOFError, zlib.error, lzma.LZMAError, tarfile.TarError, OSError)


class Document(NamedTuple):
    text: str
    id: str  # its file, and the line or record number in it
    page: Page | None = None  # of HTML
    group: str | None = None  # the value of `group_column`
    media: References | Checked | None = None  # its pictures or sound: first as the record names them, then read


class Broken(NamedTuple):
    """A record that could not be read."""

    file: str
    why: str  # begins with its line or record number in the file
    bytes: int = 0  # of the file that are lost with it, 0 if unknown
    lines: int = 0
    is_file: bool = False  # all of the file is lost, or all after a place in it

    @property
    def reason(self) -> str:
        """`why` without place, names and numbers, to count by."""
        plain = re.split(r" \(|; | after \d|: ", re.sub(r"^(?:lines?|record) [\d,–]+: ", "", self.why))[0]
        return re.sub(r"(?<![\w-])\d[\d,]*", "N", re.sub(r"'[^']*'|\{.*\}", "…", plain))


class Skipped(NamedTuple):
    """A file that is left out on purpose."""

    file: str
    why: str
    bytes: int = 0


Record = Document | Broken | Skipped


def open_zstd(file: Any, mode: str) -> BinaryIO:
    """Arrow's reader, because python-zstandard's does not notice that a file was cut off."""
    return pa.CompressedInputStream(pa.OSFile(str(file)) if isinstance(file, Path) else pa.PythonFile(file), "zstd")


OPENERS = {".zst": open_zstd, ".xz": lzma.open, ".bz2": bz2.open} | dict.fromkeys((".gz", ".dz", ".tgz"), gzip.open)


def read_sources(
    sources: list[SourceConfig], folder: Path, limit: int | None = None, found: dict[str, Found] | None = None,
    units: list[Path | None] | None = None, features: dict[str, Any] | None = None,
) -> None:  # fmt: skip
    """Write every document to `folder`/documents.arrow and the counts to read.json; at most `limit` per source. `found`
    is what `find` gives for each source. A caller that reads a single source in parts gives some of its
    `reading_units`, and the `document_features` of all sources; the files that `find` left out are then not counted."""
    schema = datasets.Features(features or document_features(sources)).arrow_schema
    counts = start_counts(sources)
    with (
        pa.OSFile(str(folder / "documents.arrow"), "wb") as file,
        pa.ipc.new_stream(file, schema) as writer,
        tqdm(desc="read", unit=" documents", disable=None) as bar,
    ):
        for source in sources:
            figures = counts["sources"][source.name]
            tally: Counter[str] = Counter()
            if units is None:
                here = (found or {}).get(str(source.name)) or find(source)
                count_left(here, counts, str(source.name))
                parts = reading_units(source, here)
            else:
                parts = units
            rows: list[Document] = []
            held = 0
            for record in itertools.islice(iter_records(source, parts, tally), limit):
                if isinstance(record, Document):
                    size = len(record.text.encode())
                    figures["documents"] += 1
                    figures["bytes"] += size
                    if record.page is not None:
                        _count_page(str(source.name), record, record.page, figures, counts["small_pages"])
                    if isinstance(record.media, Checked):
                        size += _count_media(record.media, figures, str(source.media_kind))
                    rows.append(record)
                    held += size
                    if held >= SLICE_BYTES or len(rows) >= SLICE_DOCUMENTS:
                        _write_rows(writer, schema, rows, source)
                        rows, held = [], 0
                    bar.update()
                else:
                    _count(record, counts, str(source.name))
            _write_rows(writer, schema, rows, source)
            counts["files"] += tally["files"]
            counts["file_bytes"] += tally["bytes"] or figures["bytes"] + figures.get("media_bytes", 0)
    (folder / "read.json").write_text(json.dumps(counts), encoding="utf-8")


def document_features(sources: list[SourceConfig]) -> dict[str, Any]:
    """The columns of documents.arrow: `media` and `group` only if a source has them."""
    features: dict[str, Any] = dict(DOCUMENT_FEATURES)
    if any(source.group_column for source in sources):
        features["group"] = datasets.Value("string")
    return features | (MEDIA_FEATURES if any(source.media_column for source in sources) else {})


def _count_media(media: Checked, figures: dict[str, Any], kind: str) -> int:
    """Add to the source's `figures` the files of a document, and return their bytes."""
    size = sum(map(len, media.files))
    unit = "pixels" if kind == "image" else "milliseconds"
    for what, number in {"media": len(media.files), "media_bytes": size, unit: media.amount}.items():
        figures[what] = figures.get(what, 0) + number
    return size


def _count_page(
    source: str, record: Document, page: Page, figures: dict[str, Any], small_pages: list[dict[str, Any]]
) -> None:
    """Add to the source's `figures` a page and its characters; list it if little of it is text."""
    small = page.kept < SMALL_SHARE * page.characters
    counted = {"pages": 1, "small_pages": small, "page_characters": page.characters, "kept_characters": page.kept}
    for what, number in counted.items():
        figures[what] = figures.get(what, 0) + number
    if small and len(small_pages) < MAX_BROKEN_LISTED:
        small_pages.append({"source": source, "file": record.id, "kept": page.kept, "characters": page.characters})


def start_counts(sources: list[SourceConfig]) -> dict[str, Any]:
    """The counts of read.json before anything is read. `file_bytes` are those of the files, decompressed; `broken_*`
    and `skipped_*` say what is lost or left out, by record or file, in bytes, by reason."""
    return {
        "sources": {source.name: {"documents": 0, "bytes": 0} for source in sources}, "files": 0, "file_bytes": 0,
        "broken": 0, "broken_bytes": 0, "broken_lines": 0, "lost_files": 0,
        "broken_reasons": {}, "broken_files": {}, "broken_records": [], "skipped": {}, "skipped_bytes": {},
        "skipped_files": [], "small_pages": [],
    }  # fmt: skip


def count_left(found: Found, counts: dict[str, Any], source: str) -> None:
    """Count the files that `find` did not give to read: a link without its file is lost, the others are left out."""
    for path, why, size in found.left:
        is_lost = why in MISSING
        counts["files"] += is_lost
        name = printable(path)
        _count(Broken(name, why, is_file=True) if is_lost else Skipped(name, why, size), counts, source)


def _count(record: "Broken | Skipped", counts: dict[str, Any], source: str) -> None:
    listed: dict[str, Any] = {"file": record.file, "why": record.why, "bytes": record.bytes}
    add: dict[str, Any]
    if isinstance(record, Skipped):
        add = {"skipped": {record.why: 1}, "skipped_bytes": {record.why: record.bytes}, "skipped_files": [listed]}
    else:
        one = {"records": 1, "bytes": record.bytes, "lines": record.lines, "files": int(record.is_file)}
        add = {
            "broken": 1, "broken_bytes": record.bytes, "broken_lines": record.lines, "lost_files": one["files"],
            "broken_reasons": {record.reason: one}, "broken_files": {record.file: one},
            "broken_records": [listed | {"source": source}],
        }  # fmt: skip
    merge_counts(counts, add)


def merge_counts(counts: dict[str, Any], part: dict[str, Any]) -> None:
    """Add the counts of a part. Records, files and reasons are listed up to MAX_BROKEN_LISTED."""
    for key, value in part.items():
        if key not in counts and len(counts) >= MAX_BROKEN_LISTED:
            continue
        if isinstance(value, dict):
            merge_counts(counts.setdefault(key, {}), value)
        elif isinstance(value, list):
            listed = counts.setdefault(key, [])
            listed += value[: max(MAX_BROKEN_LISTED - len(listed), 0)]
        else:
            counts[key] = counts.get(key, 0) + value


def _write_rows(writer: Any, schema: pa.Schema, rows: list[Document], source: SourceConfig) -> None:
    if rows:
        values = {
            "text": [row.text for row in rows], "source": [source.name] * len(rows), "id": [row.id for row in rows],
            "group": [row.group for row in rows],
            "media": [row.media.files if isinstance(row.media, Checked) else [] for row in rows],
        }  # fmt: skip
        writer.write_table(pa.table([pa.array(values[field.name], field.type) for field in schema], schema=schema))


def check_broken(counts: dict[str, Any], max_share: float) -> None:
    """`UserError` if too much is lost, of the records or the files or their bytes, or if a source has no document."""
    records = sum(figures["documents"] for figures in counts["sources"].values()) + counts["broken"]
    shares = {
        "records are broken": (counts["broken"], records),
        "files are lost": (counts["lost_files"], counts["files"]),
        "bytes of the files are lost": (counts["broken_bytes"], counts["file_bytes"]),
    }
    over = [f"{lost:,} of {of:,} {what}" for what, (lost, of) in shares.items() if lost > max_share * of]
    if over:
        first = counts["broken_records"][0]
        raise UserError(
            f"{first['file']}: {first['why']}; {', '.join(over)}, more than max_broken_share {max_share:g} allows; "
            "repair or remove the files, or raise max_broken_share"
        )
    for name, figures in counts["sources"].items():
        if not figures["documents"]:
            if first := next((item for item in counts["broken_records"] if item["source"] == name), None):
                raise UserError(f"no documents in {name}; {first['file']}: {first['why']}")
            skipped = ", ".join(f"{count:,} {why}" for why, count in counts["skipped"].items())
            known = f"known kinds are {known_suffixes()}; code needs `kind: code` in its entry"
            raise UserError(f"no documents in {name}{f' ({skipped})' if skipped else ''}; {known}")


def iter_records(
    source: SourceConfig, units: Iterable[Path | None], tally: Counter[str] | None = None
) -> Iterator[Record]:
    """The documents and the broken records of some `reading_units` of the source; `tally` counts the `files` and their
    `bytes`, decompressed."""
    tally = Counter() if tally is None else tally
    for unit in units:
        records = _iter_unit(source, unit, tally)
        yield from records if source.media_column is None else _load_media(source, unit, records, tally)


def _iter_unit(source: SourceConfig, unit: Path | None, tally: Counter[str]) -> Iterator[Record]:
    if unit is None or (unit == Path(str(source.path)) and unit.is_dir()):
        return _read_table(source, unit)
    return _read_file(source, unit, tally)


def _media_folder(source: SourceConfig, unit: Path | None) -> Path | None:
    """Where the paths begin that a unit's records name; None if they lead nowhere."""
    if unit is None:
        folder = Path(str(source.hub))
        return folder if folder.is_dir() else None
    return unit if unit.is_dir() else None if is_tar(unit.name) else unit.parent


def _load_media(
    source: SourceConfig, unit: Path | None, records: Iterator[Record], tally: Counter[str]
) -> Iterator[Record]:
    """The documents with their pictures or sounds; `Broken` for one whose files cannot be used."""
    pairs = (
        (record, record.media.items if isinstance(record, Document) and isinstance(record.media, References) else [])
        for record in records
    )
    for record, loaded in load_all(pairs, str(source.media_kind), _media_folder(source, unit)):
        if not isinstance(record, Document) or not isinstance(record.media, References):
            yield record
            continue
        tally["bytes"] += loaded.from_disk
        if isinstance(loaded, BrokenMedia):
            name = record.id.rpartition(":")[0]
            yield Broken(name, f"{record.media.place}: column {source.media_column!r} {loaded}", loaded.lost)
        else:
            yield record._replace(media=loaded)


def find_media(source: SourceConfig, found: Found) -> Found:
    """`found` with the files of pictures or sounds that the records of JSON, CSV and parquet files name."""
    paths: set[str] = set()
    by_path = source.media_column and source.hub is None and not is_saved_dataset(Path(str(source.path)))
    for unit in found.units if by_path else []:
        folder = _media_folder(source, unit)
        if unit is not None and folder is not None:
            for reference in _iter_references(source, unit):
                with contextlib.suppress(ValueError, OSError):
                    if (path := resolve(reference, folder)).is_file():
                        paths.add(os.path.normpath(path))
    left = [item for item in found.left if os.path.normpath(item[0]) not in paths]
    return found._replace(left=left, media=sorted(paths))


def _iter_references(source: SourceConfig, path: Path) -> Iterator[str]:
    """The paths in a file's column of pictures or sounds, without the bytes beside them."""
    if kind_of(source, path.name) == "parquet" and path.suffix.lower() not in OPENERS:
        with contextlib.suppress(pa.ArrowException, ValueError, OSError):
            file = pyarrow.parquet.ParquetFile(path)
            start = str(source.media_column)
            columns = [
                column.path for column in (file.schema.column(number) for number in range(len(file.schema)))
                if column.path.split(".")[0] == start and column.logical_type.type == "STRING"
            ]  # fmt: skip
            for batch in file.iter_batches(columns=columns) if columns else ():
                yield from _iter_strings(batch.to_pylist())
        return
    for record in _read_file(source, path, Counter()):
        if isinstance(record, Document) and isinstance(record.media, References):
            yield from (item for item in record.media.items if isinstance(item, str))


def _iter_strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _iter_strings(item)


class Counting(io.RawIOBase):
    """Counts the bytes read from a decompressor."""

    def __init__(self, file: Any) -> None:
        self.file, self.count = file, 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = self.file.read1(min(len(buffer), 1 << 16))  # not `read`, which gives nothing of what precedes damage
        buffer[: len(data)] = data
        self.count += len(data)
        return len(data)


def _read_file(source: SourceConfig, path: Path, tally: Counter[str]) -> Iterator[Record]:
    name, records = printable(str(path)), 0
    opener: Any = OPENERS.get(path.suffix.lower())
    try:
        raw: Any = open(path, "rb", buffering=SNIFFED_BYTES)  # noqa: SIM115
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    tally["files"] += not is_tar(path.name)  # of an archive, its files count, and it itself if it is lost
    unpacked = None
    with raw:
        size = os.fstat(raw.fileno()).st_size
        try:
            packed = opener or is_tar(path.name)
            if packed and (lost := _stand_in(raw.peek(), name, kind_of(source, path.name), size, source)):
                tally["bytes"] += max(lost.bytes - size, 0)
                tally["files"] += is_tar(path.name)
                yield lost
                return
            unpacked = Counting(opener(raw, "rb")) if opener else None
            stream = io.BufferedReader(unpacked, 1 << 20) if unpacked else raw
            for record in _read_tar(source, stream, path, tally) if is_tar(path.name) else _read(source, stream, name):
                records += 1
                if isinstance(record, Broken):  # a pointer stands for more than itself
                    tally["bytes"] += max(record.bytes - max(size, unpacked.count if unpacked else 0), 0)
                yield record
        except DAMAGED as error:
            read = unpacked.count if unpacked else raw.tell()
            left = size - raw.tell()  # as well packed as what was read; nothing was read of a file that is not packed
            lost_bytes = left * read // max(raw.tell(), 1) if read else size
            tally["bytes"] += lost_bytes
            tally["files"] += is_tar(path.name)
            why = str(error) or type(error).__name__
            if "too much memory" in why:
                why = "its zstd window is longer than this reader's; repack it, as in `zstd -d FILE.zst && zstd FILE`"
            yield Broken(name, f"damaged or cut off after {records:,} records ({why})", lost_bytes, is_file=True)
        finally:
            tally["bytes"] += unpacked.count if unpacked else size


def _stand_in(head: bytes, name: str, kind: str | None, size: int, source: SourceConfig) -> Broken | None:
    """What `size` bytes that begin with `head` are instead of the file that their name promises, or None."""
    if not head:
        return None if kind == "code" else Broken(name, EMPTY, is_file=True)
    if pointer := LFS_POINTER.match(head):
        missing = int(pointer[1])
        why = f"a Git LFS pointer to {missing:,} bytes, not the file; `git lfs pull` brings it"
        return Broken(name, why, missing, is_file=True)
    if size < 4096 and ANNEX_POINTER.match(head):
        return Broken(name, ANNEX_LINK, size, is_file=True)
    # A page is read as text or code only by one who says so.
    if kind not in ("html", "code") and source.kind != "text" and WEB_PAGE.match(head):
        hint = "; `kind: html` or `kind: text` would read it" if kind == "text" else ""
        return Broken(name, f"a web page in place of the file, as of a failed download{hint}", size, is_file=True)
    return None


def _read(source: SourceConfig, stream: BinaryIO, name: str) -> Iterator[Record]:
    kind = kind_of(source, name)
    head = stream.peek(SNIFFED_BYTES)[:SNIFFED_BYTES]  # type: ignore[attr-defined]
    if lost := _stand_in(head, name, kind, len(head), source):
        yield lost
    elif kind is None:  # chosen by `include` alone
        why = "unknown kind of file; give `kind:` in its entry, or name it in `exclude:`"
        yield Broken(name, why, _count_rest(stream), is_file=True)
    elif kind in ("text", "html", "code") and (column := _column_of_records(source)):
        why = f"kind {kind} has no column {column!r}; `kind: json` passes over such files"
        yield Broken(name, why, _count_rest(stream), is_file=True)
    elif kind == "parquet":
        yield from read_parquet(stream, name, source)
    elif source.encoding is not None:
        yield from READERS[kind](io.BufferedReader(Recoded(stream, source.encoding), 1 << 17), name, source)
    elif kind != "html" and (encoding := _utf_16(head)):
        hint = f"it looks like {encoding}: give `encoding: {encoding}` in its entry"
        yield Broken(name, f"{not_text(source)}; {hint}", len(head), is_file=True)
    else:
        yield from READERS[kind](stream, name, source)


def _column_of_records(source: SourceConfig) -> str | None:
    """A column that only files with records can have."""
    return source.messages_column or source.media_column or source.group_column


def _count_rest(stream: BinaryIO) -> int:
    """The bytes of a stream from here on."""
    return sum(map(len, iter(lambda: stream.read(1 << 20), b"")))


class Recoded(io.RawIOBase):
    """A file in another encoding as UTF-8. What cannot be decoded becomes a byte that is no UTF-8, so that the readers
    lose only its record."""

    def __init__(self, file: BinaryIO, encoding: str) -> None:
        self.file, self.rest = file, b""
        self.decoder = codecs.getincrementaldecoder(encoding)(LOST)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self.rest and (data := self.file.read(1 << 16)):
            self.rest = self.decoder.decode(data).encode("utf-8", "surrogateescape")
        if not self.rest:
            self.rest = self.decoder.decode(b"", final=True).encode("utf-8", "surrogateescape")
        size = min(len(buffer), len(self.rest))
        buffer[:size], self.rest = self.rest[:size], self.rest[size:]
        return size


LOST = "plainloop-lost"
codecs.register_error(LOST, lambda error: ("\udcff", error.end))  # type: ignore[attr-defined]


def not_text(source: SourceConfig) -> str:
    return f"not {source.encoding or 'UTF-8'} text"


def _utf_16(head: bytes) -> str | None:
    """The encoding of text in UTF-16, by its mark, or by the zero bytes of its many characters from Latin-1."""
    if head[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE):
        return "utf-16"
    zeros = [head[start::2].count(0) for start in (0, 1)]
    if len(head) >= 16 and max(zeros) > len(head) / 4 and min(zeros) == 0:
        return "utf-16-be" if zeros[0] else "utf-16-le"
    return None


def _hint(data: bytes, source: SourceConfig) -> str:
    """Which encoding undecodable data looks like, in words; "" if that is unknown or one is given."""
    from resiliparse.parse.encoding import detect_encoding

    found = None if source.encoding else detect_encoding(data)
    try:
        data.decode(found or "utf-8")
    except (UnicodeDecodeError, LookupError):
        return ""
    return f"; it looks like {found}: give `encoding: {found}` in its entry"


class StrictTarInfo(tarfile.TarInfo):
    """Raises an error at a damaged header, which `tarfile` takes for the end of the archive."""

    @classmethod
    def fromtarfile(cls, archive: tarfile.TarFile) -> "StrictTarInfo":
        try:
            return super().fromtarfile(archive)
        except tarfile.EOFHeaderError:  # type: ignore[attr-defined]
            raise
        except tarfile.HeaderError as error:
            raise tarfile.ReadError(str(error)) from error


def printable(name: str) -> str:
    """A file name as text that can be stored; file names need not be UTF-8."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "replace")


def _read_tar(source: SourceConfig, stream: BinaryIO, path: Path, tally: Counter[str]) -> Iterator[Record]:
    with tarfile.open(fileobj=stream, mode="r|", tarinfo=StrictTarInfo) as archive:
        for member in archive:
            if member.isdir():
                continue
            if why := why_left(source, member.name) or ("" if member.isfile() else "a link or device in an archive"):
                yield Skipped(printable(f"{path.name}/{member.name}"), why, member.size)
                continue
            tally["files"] += 1
            inside: Any = archive.extractfile(member)
            opener: Any = OPENERS.get(Path(member.name.lower()).suffix)
            data = io.BufferedReader(opener(inside, "rb") if opener else inside)
            name = printable(f"{path.name}/{member.name}")
            try:
                yield from _read(source, data, name)
            except DAMAGED as error:
                if not opener:
                    raise
                yield Broken(name, f"damaged or cut off ({error or type(error).__name__})", member.size, is_file=True)


def _read_table(source: SourceConfig, folder: Path | None) -> Iterator[Record]:
    table, columns = load_table(source), needed_columns(source)
    if table.column_names and set(columns) <= set(table.column_names):
        # The others need not even be readable.
        table = table.select_columns([*columns, *read_with(source, table.column_names)])
    if (column := source.media_column) and column in (table.features or {}):
        table = table.cast_column(column, _undecoded(table.features[column]))
    for number, record in enumerate(table, start=1):
        yield make_document(record, str(source.hub or folder), number, "record", source)


def _undecoded(feature: Any) -> Any:
    """The feature of a column of pictures or sounds such that reading gives their bytes."""
    if isinstance(feature, datasets.Image | datasets.Audio):
        return type(feature)(decode=False)
    return datasets.List(_undecoded(feature.feature)) if isinstance(feature, datasets.List) else feature


def load_table(source: SourceConfig) -> datasets.Dataset | datasets.IterableDataset:
    """A dataset on the Hub or a folder written by `save_to_disk`; `UserError` if unreadable or without the split."""
    try:
        if source.hub is not None:
            return datasets.load_dataset(
                source.hub, source.config, split=source.split, revision=source.revision, streaming=source.streaming
            )
        table = datasets.load_from_disk(str(source.path))
    except Exception as error:  # network, names, formats: the library raises many types
        name = source.path if source.hub is None else f"hub {source.hub}"
        raise UserError(f"{name}: cannot be read as a dataset: {error}") from None
    if isinstance(table, datasets.Dataset):
        return table
    if source.split not in table:
        raise UserError(f"{source.path}: no split {source.split!r}; it has {', '.join(map(str, table))}")
    return table[source.split]


@contextlib.contextmanager
def standard_input_in_file(sources: list[SourceConfig], folder: Path) -> Iterator[None]:
    """Copy standard input to a temporary file, so that the source `-` is read like any other."""
    path = folder / f".pipe-{os.getpid()}" / "standard_input"
    piped = [source for source in sources if source.path == "-"]
    for source in piped:
        source.path, source.kind = str(path), source.kind or "text"
    try:
        if piped:
            path.parent.mkdir(parents=True)
            with path.open("wb") as file:
                shutil.copyfileobj(sys.stdin.buffer, file)
        yield
    finally:
        shutil.rmtree(path.parent, ignore_errors=True)


def iter_file_texts(paths: list[str], text_column: str, messages_column: str | None) -> Iterator[list[str]]:
    """Batches of the texts in evaluation files; of conversations, the part that is compared."""
    for path in paths:
        source = SourceConfig(path=path, name=path, text_column=text_column, messages_column=messages_column)
        records = iter_records(source, reading_units(source))
        found = 0
        while batch := list(itertools.islice(records, 1000)):
            if broken := next((record for record in batch if isinstance(record, Broken)), None):
                raise UserError(f"evaluation file {broken.file}: {broken.why}")  # else it may be trained on
            texts = [without_system(record.text) for record in batch if isinstance(record, Document)]
            found += len(texts)
            yield texts
        if not found:
            raise UserError(f"evaluation file {path}: no documents in it")


def read_text(stream: BinaryIO, name: str, source: SourceConfig) -> Iterator[Record]:
    """One document per file, or one per line that `new_document` matches; a very long document is split into parts."""
    if b"\0" in stream.peek(SNIFFED_BYTES)[:SNIFFED_BYTES]:  # type: ignore[attr-defined]
        yield Broken(name, BINARY, _count_rest(stream), is_file=True)
        return
    separators: Counter[str] = Counter()
    pieces = _split_at(stream, source, separators) if source.new_document else [(1, stream)]
    parts = 0
    for line, piece in pieces:
        for part in _cut(piece):
            parts += 1
            id = name if parts == 1 and not source.new_document else f"{name}:{line}"
            record = _decode(part, name, id, source, line)
            yield record._replace(is_file=not source.new_document) if isinstance(record, Broken) else record
            line += part.count(b"\n")
    if separators:
        yield Skipped(name, "text: lines that only separate documents", separators["bytes"])


def _split_at(stream: BinaryIO, source: SourceConfig, separators: Counter[str]) -> Iterator[tuple[int, BinaryIO]]:
    """(number of its first line, its bytes) of each document."""
    pattern, buffer, first = re.compile(str(source.new_document)), io.BytesIO(), 1
    for number, line in enumerate(_lines(stream), start=1):
        # Without a carriage return, before which $ does not match, and without the mark at the beginning of a file.
        text = line.decode("utf-8-sig" if number == 1 else "utf-8", "replace")
        text = text.replace("\r\n", "\n").replace("\r", "\n")
        match = pattern.search(text)
        if (match or buffer.tell() >= TEXT_PART_BYTES) and buffer.tell():
            buffer.seek(0)
            yield first, buffer
            buffer = io.BytesIO()
        if match and not source.keep_separator and text[: match.start()] + text[match.end() :] in ("", "\n"):
            separators["bytes"] += len(line)
            continue
        if not buffer.tell():
            first = number
        buffer.write(line)
    if buffer.tell():
        buffer.seek(0)
        yield first, buffer


def _lines(stream: BinaryIO) -> Iterator[bytes]:
    """Lines with their ends, \\n, \\r\\n or \\r alone; a line longer than TEXT_PART_BYTES in pieces."""
    for line in iter(lambda: stream.readline(TEXT_PART_BYTES), b""):
        if line.endswith(b"\r"):  # a piece: its \n, if it has one, comes next
            line += stream.readline(1) if stream.peek(1)[:1] == b"\n" else b""  # type: ignore[attr-defined]
        yield from (part for part in LONE_RETURN.split(line) if part) if b"\r" in line else (line,)


def _cut(stream: BinaryIO) -> Iterator[bytes]:
    rest = stream.read(SNIFFED_BYTES)
    if 0 < len(rest) < SNIFFED_BYTES:  # a small file
        yield rest
        return
    while chunk := stream.read(TEXT_PART_BYTES - len(rest)):
        rest += chunk
        if len(rest) < TEXT_PART_BYTES:
            continue
        ends = (rest.rfind(mark, len(rest) // 2) + len(mark) for mark in (b"\n\n", b"\n"))
        cut = next((end for end in ends if end > 1), len(rest))
        if cut == len(rest):  # never inside a character: back to where the last one begins
            cut = len(rest.rstrip(CONTINUATION_BYTES))
            cut = max(cut - (rest[cut - 1 : cut] >= b"\xc0"), 1)
        yield rest[:cut]
        rest = rest[cut:]
    if rest:
        yield rest


def _decode(data: bytes, name: str, id: str, source: SourceConfig, first_line: int = 1) -> Document | Broken:
    try:
        return Document(data.decode("utf-8-sig"), id)
    except UnicodeDecodeError as error:
        line = first_line + data.count(b"\n", 0, error.start)
        start = data.rfind(b"\n", 0, error.start) + 1
        where = f"({error.reason} at byte {error.start - start} of the line){_hint(data, source)}"
        return Broken(name, f"line {line}: {not_text(source)} {where}", len(data), data.count(b"\n") + 1)


def read_html(stream: BinaryIO, name: str, source: SourceConfig) -> Iterator[Record]:
    """The main text of a page, without navigation."""
    data = stream.read()
    if b"\0" in data[:SNIFFED_BYTES]:
        yield Broken(name, BINARY, len(data), is_file=True)
    else:
        page = read_page(data.decode("utf-8", "replace") if source.encoding else decode_page(data))
        yield Document(page.text, name, page)


def read_code(stream: BinaryIO, name: str, source: SourceConfig) -> Iterator[Record]:
    """A file of source code, unchanged."""
    data = stream.read(source.max_file_bytes + 1)
    if len(data) > source.max_file_bytes:
        yield Skipped(name, "code: file too long", len(data) + len(stream.read()))
    elif b"\0" in data[:SNIFFED_BYTES]:
        yield Skipped(name, "code: binary file", len(data))
    else:
        record = _decode(data, name, name, source)
        yield record._replace(is_file=True) if isinstance(record, Broken) else record


def read_json(stream: BinaryIO, name: str, source: SourceConfig) -> Iterator[Record]:
    """JSON lines, or a file that is one JSON value: a list of records, or one record."""
    head = stream.peek(SNIFFED_BYTES)[:SNIFFED_BYTES]  # type: ignore[attr-defined]
    head = head.removeprefix(b"\xef\xbb\xbf").lstrip()
    keys = [] if source.messages_column else [f'"{column}"'.encode() for column in needed_columns(source)]
    if not head:
        yield Broken(name, EMPTY, is_file=True)
    elif head[:1] == b"[" or (head[:1] == b"{" and head[1:].lstrip(b" \t")[:1] in (b"\n", b"\r")):
        data = stream.read()
        value = _parse_json(data, name, "", source, keys)
        if isinstance(value, Broken):
            yield value._replace(bytes=len(data), lines=data.count(b"\n") + 1, is_file=True)
            return
        for number, record in enumerate(value if isinstance(value, list) else [value], start=1):
            yield make_document(record, name, number, "record", source)
    else:
        for number, line in enumerate(stream, start=1):
            if line.strip():
                value = _parse_json(line.rstrip(), name, f"line {number}: ", source, keys)
                document = make_document(value, name, number, "line", source)
                yield document._replace(bytes=len(line), lines=1) if isinstance(document, Broken) else document


def _parse_json(data: bytes, name: str, where: str, source: SourceConfig, keys: list[bytes]) -> Any:
    """The value, or a `Broken` with the reason. Whether a key stands twice is only looked at, as it takes time, if one
    of `keys` may, or if there are none."""
    try:
        if not keys or any(data.count(key) > 1 for key in keys):
            return json.loads(data.decode("utf-8-sig"), object_pairs_hook=_distinct)
        return json.loads(data.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        reason = f"{not_text(source)} ({error.reason} at byte {error.start}){_hint(data, source)}"
    except json.JSONDecodeError as error:
        line = f"line {error.lineno}, " if error.lineno > 1 else ""
        reason = f"not JSON ({error.msg}, {line}column {error.colno})"
    except RecursionError:
        reason = "not JSON (nested too deeply)"
    except KeyError as error:
        reason = f"the key {error.args[0]!r} stands twice"
    except ValueError as error:  # an integer of thousands of digits
        reason = f"not JSON ({str(error).partition(':')[0]})"
    return Broken(name, where + reason)


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object; `KeyError` for a key that stands twice in it, of which `json` keeps the last."""
    record = dict(pairs)
    if len(record) < len(pairs):
        raise KeyError(next(key for key, count in Counter(key for key, _ in pairs).items() if count > 1))
    return record


def read_csv(stream: BinaryIO, name: str, source: SourceConfig) -> Iterator[Record]:
    """Values separated by commas, tabs, semicolons or what a first line such as `sep=;` says, with column names on the
    first line. A stray quote loses its row, not those up to the next quote; the inside of a broken cell is lost too."""
    # Bytes that are not UTF-8 pass through as surrogates, so that only their record is lost.
    head = stream.peek(SNIFFED_BYTES)[:SNIFFED_BYTES].decode("utf-8-sig", "surrogateescape")  # type: ignore[attr-defined]
    text = io.TextIOWrapper(stream, encoding="utf-8-sig", errors="surrogateescape", newline="")
    table = CsvLines(text, *sniff_csv(head, name, needed_columns(source)))
    columns: list[str] = []
    for first, row, fault in table.rows():
        if fault is None and columns and len(row) != len(columns):
            fault = f"{len(row)} fields, but the first line names {len(columns)}"
        if fault is None and LONE_SURROGATE.search("".join(row)):
            fault = not_text(source) + _hint("".join(row).encode("utf-8", "surrogateescape"), source)
        if fault is not None:
            lost = table.drop()
            size = len("".join(lost).encode("utf-8", "surrogateescape"))
            where = f"line {first}" if len(lost) == 1 else f"lines {first}–{first + len(lost) - 1}"
            yield Broken(name, f"{where}: {fault}", size, len(lost))
        elif columns:
            document = make_document(dict(zip(columns, row, strict=True)), name, first, "line", source)
            if isinstance(document, Broken):
                size = len("".join(table.pending).encode("utf-8", "surrogateescape"))
                document = document._replace(bytes=size, lines=len(table.pending))
            yield document
        else:
            columns = table.columns = row  # at first the fields of any row
            if twice := [column for column in needed_columns(source) if row.count(column) > 1]:
                size = len(text.read().encode("utf-8", "surrogateescape"))
                yield Broken(name, f"line {first}: column {twice[0]!r} stands twice", size, is_file=True)
                return
    if not columns:
        yield Broken(name, EMPTY, is_file=True)


def read_parquet(stream: BinaryIO, name: str, source: SourceConfig) -> Iterator[Record]:
    number, rows = 0, 0
    # The footer is at the end, so a stream that cannot seek is read into memory.
    data: Any = stream if stream.seekable() else io.BytesIO(stream.read())
    size = data.seek(0, io.SEEK_END)
    # By default whole row groups are read ahead, which may hold gigabytes of pictures.
    reading = {"pre_buffer": False, "buffer_size": 1 << 20} if source.media_column else {}
    try:
        file = pyarrow.parquet.ParquetFile(data, **reading)
        rows = file.metadata.num_rows
        columns, have = needed_columns(source), file.schema_arrow.names
        if twice := [column for column in columns if have.count(column) > 1]:
            yield Broken(name, f"column {twice[0]!r} stands twice", size, is_file=True)
            return
        # All of them if one is missing, so that the error can list them.
        columns = [*columns, *read_with(source, have)] if set(columns) <= set(have) else have
        decoded = sum(file.metadata.row_group(group).total_byte_size for group in range(file.metadata.num_row_groups))
        fitting = SLICE_BYTES * rows // max(decoded, 1)
        for batch in file.iter_batches(batch_size=min(max(fitting, 1), 256), columns=columns):
            for row in batch.to_pylist():
                number += 1
                yield make_document(row, name, number, "record", source)
    except (pa.ArrowException, ValueError, OverflowError, OSError) as error:
        why = f"cannot be read as parquet after {number:,} records: {' '.join(str(error).split())[:200]}"
        lost = size * (rows - number) // rows if rows else size  # as many bytes in each row
        yield Broken(name, why if number else why.replace(" after 0 records", ""), lost, is_file=True)


def needed_columns(source: SourceConfig) -> list[str]:
    """The columns that `make_document` reads."""
    more = [name for name in (source.media_column, source.group_column) if name is not None]
    if source.template is None:
        return list(dict.fromkeys([str(source.messages_column or source.text_column), *more]))
    names = [name for _, name, _, _ in string.Formatter().parse(source.template) if name is not None]
    return list(dict.fromkeys([*names, *more]))


def read_with(source: SourceConfig, have: list[str]) -> list[str]:
    """The columns that belong to a conversation besides its messages."""
    return [name for name in ("tools", "system") if source.messages_column and name in have]


def make_document(record: Any, name: str, number: int, unit: str, source: SourceConfig) -> Document | Broken:
    """The text of a record, from the source's column or template, or its conversation. Null is an empty document; a
    `Broken` stays. `name` is the file; `number` counts its lines or records, as `unit` says."""
    if isinstance(record, Broken):
        return record
    if not isinstance(record, dict):
        return Broken(name, f"{unit} {number}: expected named fields, found {type(record).__name__}")
    try:
        if source.template is not None:
            text = _fill(source.template, record)
        elif source.messages_column is not None:
            text = find_conversation(record, source.messages_column, pictures=source.image_column is not None)
        else:
            text = record[str(source.text_column)]
    except KeyError as error:
        have = ", ".join(map(str, list(record)[:20])) or "nothing"
        option = "template" if source.template else "messages_column" if source.messages_column else "text_column"
        return Broken(name, f"{unit} {number}: no column {error.args[0]!r}; it has {have} (see {option})")
    except ValueError as error:
        return Broken(name, f"{unit} {number}: {error}")
    if text is not None and not isinstance(text, str):
        return Broken(name, f"{unit} {number}: column {source.text_column!r} holds {type(text).__name__}, not text")
    document = Document(LONE_SURROGATE.sub("\ufffd", text or ""), f"{name}:{number}")
    if source.media_column is None and source.group_column is None:
        return document
    try:
        return _add_columns(document, record, f"{unit} {number}", source)
    except ValueError as error:
        return Broken(name, f"{unit} {number}: {error}")


def _add_columns(document: Document, record: dict[str, Any], place: str, source: SourceConfig) -> Document:
    """The document with its group and with what the record says of its pictures or sound. `ValueError` if it says
    nothing that can be used."""
    for option, column in (("image_column", source.image_column), ("audio_column", source.audio_column),
                           ("group_column", source.group_column)):  # fmt: skip
        if column is not None and column not in record:
            have = ", ".join(map(str, list(record)[:20]))
            raise ValueError(f"no column {column!r}; it has {have} (see {option})")
    if source.group_column is not None:
        value = record[source.group_column]
        if not isinstance(value, str | int | None):
            raise ValueError(f"column {source.group_column!r} holds {type(value).__name__}, not text or a number")
        group = None if value in (None, "") else LONE_SURROGATE.sub("\ufffd", str(value))
        document = document._replace(group=group)
    if (column := source.media_column) is None:
        return document
    try:
        references = find_references(record[column])
    except ValueError as error:
        raise ValueError(f"column {column!r} {error}") from None
    marks = document.text.count(MARK)
    if source.image_column is not None and marks not in (0, len(references)):
        raise ValueError(
            f"the text has {marks:,} marks {MARK}, but column {column!r} holds {len(references):,} pictures"
        )
    if source.messages_column is not None and references and not marks and f"{SEPARATOR}user\n" not in document.text:
        raise ValueError(f"column {column!r} holds pictures, but no message of the user says where they stand")
    if source.audio_column is not None and len(references) != 1:
        raise ValueError(f"column {column!r} holds {len(references):,} sounds, where one is expected")
    return document._replace(media=References(references, place))


def _fill(template: str, record: dict[str, Any]) -> str:
    """The template with the fields of a record, where `{a[b]}` and `{a.b}` stand for `b` in `a`, and null for no text.
    `KeyError` for a column that is missing, `ValueError` for a value that is neither text nor a number."""
    parts = []
    for literal, name, _, _ in string.Formatter().parse(template):
        parts.append(literal)
        if name is None:
            continue
        value: Any = record
        for step in [name] if name in record else re.findall(r"[^.\[\]]+", name):
            if isinstance(value, list) and step.isdecimal() and int(step) < len(value):
                value = value[int(step)]
            elif isinstance(value, dict) and step in value:
                value = value[step]
            elif value is record:
                raise KeyError(step)
            else:
                raise ValueError(f"template field {{{name}}} finds no {step!r} in {type(value).__name__}")
        if isinstance(value, bool):
            value = str(value).lower()  # as JSON writes it
        if not (value is None or isinstance(value, str | int | datetime.date | decimal.Decimal) or _is_number(value)):
            kind = value if isinstance(value, float) else type(value).__name__
            inside = f"; name what is in it, as in {{{name}[{step}]}}" if (step := _first_key(value)) else ""
            raise ValueError(f"template field {{{name}}} holds {kind}, not text{inside}")
        parts.append("" if value is None else str(value))
    return "".join(parts)


def _first_key(value: Any) -> Any:
    """A key of a mapping, or the number of an item of a list, as a template names it; "" if there is none."""
    return "0" if isinstance(value, list) and value else next(iter(value), "") if isinstance(value, dict) else ""


def _is_number(value: Any) -> bool:
    return isinstance(value, float) and math.isfinite(value)


Reader = Callable[[BinaryIO, str, SourceConfig], Iterator[Record]]
READERS: dict[str, Reader] = {"text": read_text, "html": read_html, "code": read_code}
READERS |= {"json": read_json, "csv": read_csv, "parquet": read_parquet}
