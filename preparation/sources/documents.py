"""From the entries of a recipe to documents: opens files, archives and tables and passes them to their readers."""

import bz2
import contextlib
import gzip
import io
import itertools
import json
import lzma
import os
import shutil
import sys
import tarfile
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import datasets
import pyarrow as pa
from tqdm import tqdm

from preparation.sources.conversations import without_system
from preparation.sources.files import count_other_files, is_tar, is_wanted, kind_of, known_suffixes, reading_units
from preparation.sources.formats import READERS, Broken, Document, Record, Skipped, make_document, needed_columns
from preparation.sources.source_config import SourceConfig
from preparation.stages import SLICE_BYTES, SLICE_DOCUMENTS
from utils.cli import UserError

DOCUMENT_FEATURES = {
    "text": datasets.Value("large_string"), "source": datasets.Value("string"), "id": datasets.Value("string"),
}  # fmt: skip
MAX_BROKEN_LISTED = 1000
OTHER_KIND = "file of another kind"
DAMAGED = (EOFError, zlib.error, lzma.LZMAError, tarfile.TarError, OSError)


def open_zstd(file: Any, mode: str) -> BinaryIO:
    """Arrow's reader, because python-zstandard's does not notice that a file was cut off."""
    return pa.CompressedInputStream(pa.OSFile(str(file)) if isinstance(file, Path) else pa.PythonFile(file), "zstd")


OPENERS = {".zst": open_zstd, ".xz": lzma.open, ".bz2": bz2.open} | dict.fromkeys((".gz", ".dz", ".tgz"), gzip.open)


def read_sources(
    sources: list[SourceConfig], folder: Path, limit: int | None = None, units: list[Path | None] | None = None
) -> None:
    """Write every document to `folder`/documents.arrow and the counts to read.json; at most `limit` per source.

    A caller that reads a single source in parts gives some of its reading units as `units`; files of other kinds belong
    to no part and are then not counted.
    """
    schema = datasets.Features(DOCUMENT_FEATURES).arrow_schema
    counts: dict[str, Any] = {"sources": {}, "broken": 0, "broken_records": [], "skipped": Counter()}
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


def _write_rows(writer: Any, schema: pa.Schema, rows: list[Document], source: SourceConfig) -> None:
    if rows:
        texts, ids = zip(*rows, strict=True)
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
    """A dataset on the Hub, or a folder written by `save_to_disk`; `UserError` if it cannot be read or lacks the split."""
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
