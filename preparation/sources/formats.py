"""From an open file to documents: one reader per format.

A record that cannot be read becomes a `Broken` with its position and the reason, and reading continues after it.
"""

import csv
import io
import json
import re
import string
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO, NamedTuple

import pyarrow as pa
import pyarrow.parquet

from preparation.sources.conversations import find_fault, join_messages
from preparation.sources.source_config import SourceConfig

TEXT_PART_BYTES = 4 << 20  # a longer text file becomes several documents, cut between paragraphs or lines
SNIFFED_BYTES = 1 << 16
CONTINUATION_BYTES = bytes(range(0x80, 0xC0))  # of a character in UTF-8, after its first
NOT_UTF8 = "not UTF-8 text"
LONE_SURROGATE = re.compile("[\ud800-\udfff]")  # half a character, which JSON can express and UTF-8 cannot
BINARY = "a binary file, not text (it holds zero bytes)"


class Document(NamedTuple):
    text: str
    id: str  # its file, and the line or record number in it


class Broken(NamedTuple):
    """A record that could not be read."""

    file: str
    why: str  # begins with its line or record number in the file


class Skipped(NamedTuple):
    """A file that is left out on purpose."""

    file: str
    why: str


Record = Document | Broken | Skipped


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
    """The main text of a page, without navigation, extracted by resiliparse."""
    from resiliparse.extract.html2text import extract_plain_text  # a slow import that only HTML needs
    from resiliparse.parse.encoding import detect_encoding
    from resiliparse.parse.html import HTMLTree

    data = stream.read()
    if b"\0" in data[:SNIFFED_BYTES]:
        yield Broken(name, BINARY)
    else:
        tree = HTMLTree.parse_from_bytes(data, detect_encoding(data) or "utf-8")
        yield Document(extract_plain_text(tree, main_content=True, alt_texts=False), name)


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
        try:
            value = _parse_json(stream.read())
        except ValueError as error:
            yield Broken(name, str(error))
        else:
            for number, record in enumerate(value if isinstance(value, list) else [value], start=1):
                yield make_document(record, name, number, "record", source)
    else:
        for number, line in enumerate(stream, start=1):
            if not line.strip():
                continue
            try:
                record = _parse_json(line.rstrip())
            except ValueError as error:
                yield Broken(name, f"line {number}: {error}")
            else:
                yield make_document(record, name, number, "line", source)


def _parse_json(data: bytes) -> Any:
    """`ValueError` with the reason on one line."""
    try:
        return json.loads(data.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise ValueError(f"{NOT_UTF8} ({error.reason} at byte {error.start})") from None
    except json.JSONDecodeError as error:
        line = f"line {error.lineno}, " if error.lineno > 1 else ""
        raise ValueError(f"not JSON ({error.msg}, {line}column {error.colno})") from None
    except (ValueError, RecursionError) as error:  # the first: an integer of thousands of digits
        reason = "nested too deeply" if isinstance(error, RecursionError) else str(error).partition(":")[0]
        raise ValueError(f"not JSON ({reason})") from None


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
    """The text of a record, from the source's column or template, or its conversation. Null is an empty document.

    `name` is the file; `number` counts its lines or records, as `unit` says.
    """
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


READERS: dict[str, Callable[[BinaryIO, str, SourceConfig], Iterator[Record]]] = {
    "text": read_text, "html": read_html, "code": read_code, "json": read_json, "csv": read_csv, "parquet": read_parquet,
}  # fmt: skip
