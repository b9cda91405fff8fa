"""From the entries of a recipe to documents: opens files, archives and tables; one reader per format.

A record that cannot be read becomes a `Broken` with its position and the reason, and reading continues after it.
"""

import bz2
import contextlib
import csv
import gzip
import io
import itertools
import json
import lzma
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

from preparation.recipe import SourceConfig
from preparation.sources.conversations import find_fault, join_messages, without_system
from preparation.sources.files import count_other_files, is_tar, is_wanted, kind_of, known_suffixes, reading_units
from preparation.sources.html import Page, decode_page, read_page
from preparation.stages import SLICE_BYTES, SLICE_DOCUMENTS
from utils.cli import UserError

DOCUMENT_FEATURES = {
    "text": datasets.Value("large_string"), "source": datasets.Value("string"), "id": datasets.Value("string"),
}  # fmt: skip
TEXT_PART_BYTES = 4 << 20  # a longer text file becomes several documents, cut between paragraphs or lines
SNIFFED_BYTES = 1 << 16
CONTINUATION_BYTES = bytes(range(0x80, 0xC0))  # of a character in UTF-8, after its first
NOT_UTF8 = "not UTF-8 text"
LONE_SURROGATE = re.compile("[\ud800-\udfff]")  # half a character, which JSON can express and UTF-8 cannot
BINARY = "a binary file, not text (it holds zero bytes)"
MAX_BROKEN_LISTED = 1000
SMALL_SHARE = 0.1  # of a page's characters in its text; 5 % of 879 pages of documentation, all lists of links, had less
OTHER_KIND = "file of another kind"
DAMAGED = (EOFError, zlib.error, lzma.LZMAError, tarfile.TarError, OSError)


class Document(NamedTuple):
    text: str
    id: str  # its file, and the line or record number in it
    page: Page | None = None  # of HTML


class Broken(NamedTuple):
    """A record that could not be read."""

    file: str
    why: str  # begins with its line or record number in the file


class Skipped(NamedTuple):
    """A file that is left out on purpose."""

    file: str
    why: str


Record = Document | Broken | Skipped


def open_zstd(file: Any, mode: str) -> BinaryIO:
    """Arrow's reader, because python-zstandard's does not notice that a file was cut off."""
    return pa.CompressedInputStream(pa.OSFile(str(file)) if isinstance(file, Path) else pa.PythonFile(file), "zstd")


OPENERS = {".zst": open_zstd, ".xz": lzma.open, ".bz2": bz2.open} | dict.fromkeys((".gz", ".dz", ".tgz"), gzip.open)


def read_sources(
    sources: list[SourceConfig], folder: Path, limit: int | None = None, units: list[Path | None] | None = None
) -> None:
    """Write every document to `folder`/documents.arrow and the counts to read.json; at most `limit` per source. A
    caller that reads a single source in parts gives some of its `reading_units`; other files are then not counted."""
    schema = datasets.Features(DOCUMENT_FEATURES).arrow_schema
    counts: dict[str, Any] = {"sources": {}, "broken": 0, "broken_records": [], "skipped": Counter()}
    counts["small_pages"] = []
    with (
        pa.OSFile(str(folder / "documents.arrow"), "wb") as file,
        pa.ipc.new_stream(file, schema) as writer,
        tqdm(desc="read", unit=" documents", disable=None) as bar,
    ):
        for source in sources:
            figures = counts["sources"][source.name] = {"documents": 0, "bytes": 0}
            counts["skipped"][OTHER_KIND] += count_other_files(source) if units is None else 0
            rows: list[Document] = []
            held = 0
            for record in itertools.islice(iter_records(source, units or reading_units(source)), limit):
                if isinstance(record, Document):
                    size = len(record.text.encode())
                    figures["documents"] += 1
                    figures["bytes"] += size
                    if record.page is not None:
                        _count_page(str(source.name), record, record.page, figures, counts["small_pages"])
                    rows.append(record)
                    held += size
                    if held >= SLICE_BYTES or len(rows) >= SLICE_DOCUMENTS:
                        _write_rows(writer, schema, rows, source)
                        rows, held = [], 0
                    bar.update()
                elif isinstance(record, Broken):
                    counts["broken"] += 1
                    if len(counts["broken_records"]) < MAX_BROKEN_LISTED:
                        counts["broken_records"].append(record._asdict())
                else:
                    counts["skipped"][record.why] += 1
            _write_rows(writer, schema, rows, source)
    counts["skipped"] = {why: count for why, count in counts["skipped"].items() if count}
    (folder / "read.json").write_text(json.dumps(counts), encoding="utf-8")


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


def _write_rows(writer: Any, schema: pa.Schema, rows: list[Document], source: SourceConfig) -> None:
    if rows:
        texts, ids = [row.text for row in rows], [row.id for row in rows]
        columns = [pa.array(texts, pa.large_string()), pa.array([source.name] * len(rows)), pa.array(ids)]
        writer.write_table(pa.table(columns, schema=schema))


def check_broken(counts: dict[str, Any], max_share: float) -> None:
    """`UserError` if too many records are broken, or if a source has no document at all."""
    documents = sum(figures["documents"] for figures in counts["sources"].values())
    broken = counts["broken"]
    if broken > max_share * (documents + broken):
        first = counts["broken_records"][0]
        raise UserError(
            f"{first['file']}: {first['why']}; {broken:,} of {documents + broken:,} records are broken, more than "
            f"max_broken_share {max_share:g} allows; repair or remove the files, or raise max_broken_share"
        )
    for name, figures in counts["sources"].items():
        if not figures["documents"]:
            skipped = ", ".join(f"{count:,} {why}" for why, count in counts["skipped"].items())
            known = f"known kinds are {known_suffixes()}; code needs `kind: code` in its entry"
            raise UserError(f"no documents in {name}{f' ({skipped})' if skipped else ''}; {known}")


def iter_records(source: SourceConfig, units: Iterable[Path | None]) -> Iterator[Record]:
    """The documents and the broken records of some `reading_units` of the source."""
    for unit in units:
        yield from _read_table(source, unit) if unit is None or unit.is_dir() else _read_file(source, unit)


def _read_file(source: SourceConfig, path: Path) -> Iterator[Record]:
    name, records = printable(str(path)), 0
    opener: Any = OPENERS.get(path.suffix.lower(), open)
    try:
        file = opener(path, "rb")
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    try:
        with io.BufferedReader(file, 1 << 20) as stream:
            read = _read_tar(source, stream, path) if is_tar(path.name) else _read(source, stream, name)
            for record in read:
                records += 1
                yield record
    except DAMAGED as error:
        yield Broken(name, f"damaged or cut off after {records:,} records ({str(error) or type(error).__name__})")


def _read(source: SourceConfig, stream: BinaryIO, name: str) -> Iterator[Record]:
    kind = kind_of(source, name)
    if kind is None:  # chosen by `include` alone
        yield Broken(name, "unknown kind of file; give `kind:` in its entry")
    elif source.messages_column is not None and kind in ("text", "html", "code"):
        yield Broken(name, f"kind {kind} has no column {source.messages_column!r}; `kind: json` passes over such files")
    else:
        yield from READERS[kind](stream, name, source)


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


def _read_tar(source: SourceConfig, stream: BinaryIO, path: Path) -> Iterator[Record]:
    with tarfile.open(fileobj=stream, mode="r|", tarinfo=StrictTarInfo) as archive:
        for member in filter(tarfile.TarInfo.isfile, archive):
            if not is_wanted(source, member.name):
                yield Skipped(member.name, OTHER_KIND)
                continue
            inside: Any = archive.extractfile(member)
            opener: Any = OPENERS.get(Path(member.name.lower()).suffix)
            data = io.BufferedReader(opener(inside, "rb") if opener else inside)
            name = printable(f"{path.name}/{member.name}")
            try:
                yield from _read(source, data, name)
            except DAMAGED as error:
                if not opener:
                    raise
                yield Broken(name, f"damaged or cut off ({error or type(error).__name__})")


def _read_table(source: SourceConfig, folder: Path | None) -> Iterator[Record]:
    table, columns = load_table(source), needed_columns(source)
    if table.column_names and set(columns) <= set(table.column_names):
        table = table.select_columns(columns)  # the others need not even be readable
    for number, record in enumerate(table, start=1):
        yield make_document(record, str(source.hub or folder), number, "record", source)


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
        yield Broken(name, BINARY)
        return
    pieces = _split_at(stream, re.compile(source.new_document)) if source.new_document else [stream]
    line, parts = 1, 0
    for piece in pieces:
        for part in _cut(piece):
            parts += 1
            id = name if parts == 1 and not source.new_document else f"{name}:{line}"
            yield _decode(part, name, id, line)
            line += part.count(b"\n")
    if parts == 0:
        yield Document("", name)


def _split_at(stream: BinaryIO, pattern: re.Pattern) -> Iterator[BinaryIO]:
    buffer = io.BytesIO()
    for line in iter(lambda: stream.readline(TEXT_PART_BYTES), b""):
        begins = pattern.search(line.decode("utf-8", "replace")) or buffer.tell() >= TEXT_PART_BYTES
        if begins and buffer.tell():
            buffer.seek(0)
            yield buffer
            buffer = io.BytesIO()
        buffer.write(line)
    buffer.seek(0)
    yield buffer


def _cut(stream: BinaryIO) -> Iterator[bytes]:
    rest = b""
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


def _decode(data: bytes, name: str, id: str, first_line: int = 1) -> Record:
    try:
        return Document(data.decode("utf-8-sig"), id)
    except UnicodeDecodeError as error:
        line = first_line + data.count(b"\n", 0, error.start)
        start = data.rfind(b"\n", 0, error.start) + 1
        return Broken(name, f"line {line}: {NOT_UTF8} ({error.reason} at byte {error.start - start} of the line)")


def read_html(stream: BinaryIO, name: str, source: SourceConfig) -> Iterator[Record]:
    """The main text of a page, without navigation."""
    data = stream.read()
    if b"\0" in data[:SNIFFED_BYTES]:
        yield Broken(name, BINARY)
    else:
        page = read_page(decode_page(data))
        yield Document(page.text, name, page)


def read_code(stream: BinaryIO, name: str, source: SourceConfig) -> Iterator[Record]:
    """A file of source code, unchanged."""
    data = stream.read(source.max_file_bytes + 1)
    if len(data) > source.max_file_bytes:
        yield Skipped(name, "code: file too long")
    elif b"\0" in data[:SNIFFED_BYTES]:
        yield Skipped(name, "code: binary file")
    else:
        yield _decode(data, name, name)


def read_json(stream: BinaryIO, name: str, source: SourceConfig) -> Iterator[Record]:
    """JSON lines, or a file that is one JSON value: a list of records, or one record."""
    head = stream.peek(SNIFFED_BYTES)[:SNIFFED_BYTES]  # type: ignore[attr-defined]
    head = head.removeprefix(b"\xef\xbb\xbf").lstrip()
    if not head:
        yield Broken(name, "the file is empty")
    elif head[:1] == b"[" or (head[:1] == b"{" and head[1:].lstrip(b" \t")[:1] in (b"\n", b"\r")):
        value = _parse_json(stream.read(), name, "")
        for number, record in enumerate(value if isinstance(value, list) else [value], start=1):
            yield make_document(record, name, number, "record", source)
    else:
        for number, line in enumerate(stream, start=1):
            if line.strip():
                record = _parse_json(line.rstrip(), name, f"line {number}: ")
                yield make_document(record, name, number, "line", source)


def _parse_json(data: bytes, name: str, where: str) -> Any:
    """The value, or a `Broken` with the reason."""
    try:
        return json.loads(data.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        reason = f"{NOT_UTF8} ({error.reason} at byte {error.start})"
    except json.JSONDecodeError as error:
        line = f"line {error.lineno}, " if error.lineno > 1 else ""
        reason = f"not JSON ({error.msg}, {line}column {error.colno})"
    except RecursionError:
        reason = "not JSON (nested too deeply)"
    except ValueError as error:  # an integer of thousands of digits
        reason = f"not JSON ({str(error).partition(':')[0]})"
    return Broken(name, where + reason)


def read_csv(stream: BinaryIO, name: str, source: SourceConfig) -> Iterator[Record]:
    """Comma-separated values, or tab-separated ones in .tsv files, with column names on the first line."""
    csv.field_size_limit(2**31 - 1)
    # Bytes that are not UTF-8 pass through as surrogates, so that only their record is lost.
    text = io.TextIOWrapper(stream, encoding="utf-8-sig", errors="surrogateescape", newline="")
    rows = csv.reader(text, delimiter="\t" if re.search(r"\.tsv(\.\w+)?$", name.lower()) else ",", strict=True)
    columns: list[str] = []
    while True:
        line = rows.line_num + 1  # a record may span several lines
        try:
            row = next(rows, None)
        except csv.Error as error:
            yield Broken(name, f"line {line}: not a CSV record ({error})")
            continue
        if row is None:
            break
        if not row:  # a blank line
            continue
        if not columns:
            columns = row
        elif len(row) != len(columns):
            yield Broken(name, f"line {line}: {len(row)} fields, but the first line names {len(columns)}")
        elif LONE_SURROGATE.search("".join(row)):
            yield Broken(name, f"line {line}: {NOT_UTF8}")
        else:
            yield make_document(dict(zip(columns, row, strict=True)), name, line, "line", source)
    if not columns:
        yield Broken(name, "the file is empty")


def read_parquet(stream: BinaryIO, name: str, source: SourceConfig) -> Iterator[Record]:
    try:  # the footer is at the end, so a stream that cannot seek is read into memory
        file = pyarrow.parquet.ParquetFile(stream if stream.seekable() else io.BytesIO(stream.read()))
        number, columns = 0, needed_columns(source)
        if not set(columns) <= set(file.schema_arrow.names):
            columns = file.schema_arrow.names  # so that the error can list them
        for batch in file.iter_batches(batch_size=256, columns=columns):
            for row in batch.to_pylist():
                number += 1
                yield make_document(row, name, number, "record", source)
    except (pa.ArrowException, ValueError, OverflowError) as error:
        yield Broken(name, f"cannot be read as parquet: {' '.join(str(error).split())[:200]}")


def needed_columns(source: SourceConfig) -> list[str]:
    """The columns that `make_document` reads."""
    if source.template is None:
        return [str(source.messages_column or source.text_column)]
    return list(dict.fromkeys(name for _, name, _, _ in string.Formatter().parse(source.template) if name is not None))


def make_document(record: Any, name: str, number: int, unit: str, source: SourceConfig) -> Document | Broken:
    """The text of a record, from the source's column or template, or its conversation. Null is an empty document; a
    `Broken` stays. `name` is the file; `number` counts its lines or records, as `unit` says."""
    if isinstance(record, Broken):
        return record
    if not isinstance(record, dict):
        return Broken(name, f"{unit} {number}: expected named fields, found {type(record).__name__}")
    try:
        if source.template is not None:
            text = source.template.format_map({key: "" if value is None else value for key, value in record.items()})
        elif source.messages_column is not None:
            messages = record[source.messages_column]
            if fault := find_fault(messages):
                return Broken(name, f"{unit} {number}: column {source.messages_column!r} {fault}")
            text = join_messages(messages)
        else:
            text = record[str(source.text_column)]
    except KeyError as error:
        have = ", ".join(map(str, list(record)[:20])) or "nothing"
        option = "messages_column" if source.messages_column else "text_column"
        return Broken(name, f"{unit} {number}: no column {error.args[0]!r}; it has {have} (see {option})")
    if text is not None and not isinstance(text, str):
        return Broken(name, f"{unit} {number}: column {source.text_column!r} holds {type(text).__name__}, not text")
    return Document(LONE_SURROGATE.sub("\ufffd", text or ""), f"{name}:{number}")


Reader = Callable[[BinaryIO, str, SourceConfig], Iterator[Record]]
READERS: dict[str, Reader] = {"text": read_text, "html": read_html, "code": read_code}
READERS |= {"json": read_json, "csv": read_csv, "parquet": read_parquet}
