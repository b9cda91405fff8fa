"""From an entry of the recipe to its documents: which files, what is inside them, which reader."""

import bz2
import contextlib
import fnmatch
import gzip
import io
import itertools
import lzma
import os
import shutil
import sys
import tarfile
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa

from preparation.sources.conversations import without_system
from preparation.sources.readers import READERS, Broken, Document, Record, Skipped, make_document, needed_columns
from preparation.sources.source_config import COMPRESSED, KIND_OF_SUFFIX, TAR_ENDS, SourceConfig
from preparation.sources.tables import load_hub, load_saved
from utils.cli import UserError

CODE_SUFFIXES = frozenset(
    [
        ".c",
        ".h",
        ".cc",
        ".cpp",
        ".cxx",
        ".hpp",
        ".cs",
        ".css",
        ".dart",
        ".ex",
        ".exs",
        ".go",
        ".hs",
        ".java",
        ".jl",
        ".js",
        ".jsx",
        ".kt",
        ".lua",
        ".m",
        ".ml",
        ".php",
        ".pl",
        ".pm",
        ".py",
        ".r",
        ".rb",
        ".rs",
        ".S",
        ".s",
        ".scala",
        ".sh",
        ".sql",
        ".swift",
        ".ts",
        ".tsx",
        ".vue",
        ".zig",
    ]
)
NOT_CODE = (".min.js", ".min.css", "_pb2.py", ".pb.go", "-lock.js")  # written by programs


def open_zstd(file: Any, mode: str) -> BinaryIO:
    """Arrow's reader: python-zstandard's takes a file that was cut off for one that ends there."""
    return pa.CompressedInputStream(pa.OSFile(str(file)) if isinstance(file, Path) else pa.PythonFile(file), "zstd")


OPENERS = {
    ".gz": gzip.open,
    ".dz": gzip.open,
    ".tgz": gzip.open,
    ".zst": open_zstd,
    ".xz": lzma.open,
    ".bz2": bz2.open,
}
OTHER_KIND = "file of another kind"
DAMAGED = (EOFError, gzip.BadGzipFile, zlib.error, lzma.LZMAError, tarfile.TarError, OSError)


def find_files(source: SourceConfig) -> list[Path]:
    """The files behind a source with a path, sorted; files of other kinds in a folder are passed over.

    Raises `UserError` for a path that does not exist, a file of an unknown kind, a folder with nothing to read.
    """
    path = Path(str(source.path))
    if not path.exists():
        raise UserError(f"{path}: no such file or folder")
    if not path.is_dir():
        if not path.is_file():
            raise UserError(f"{path}: not a regular file; for a pipe, use - and standard input")
        if kind_of(source, path.name) is None and not is_tar(path.name):
            raise UserError(f"{path}: unknown kind of file; expected {known_suffixes()}, or say `kind:` in its entry")
        return [path]
    files = sorted(item for item in path.rglob("*") if item.is_file())
    if not is_saved_dataset(path):
        files = [item for item in files if is_tar(item.name) or is_wanted(source, str(item.relative_to(path)))]
    if not files:
        wanted = f"file like {source.include}" if source.include else f"{known_suffixes(source)} file"
        raise UserError(f"{path}: no {wanted} in this folder")
    return files


def count_other_files(source: SourceConfig) -> int:
    """Files in a source's folder that are passed over."""
    path = Path(str(source.path))
    if source.hub is not None or not path.is_dir() or is_saved_dataset(path):
        return 0
    return sum(item.is_file() for item in path.rglob("*")) - len(find_files(source))


def known_suffixes(source: SourceConfig | None = None) -> str:
    suffixes = sorted(CODE_SUFFIXES) if source and source.kind == "code" else KIND_OF_SUFFIX
    return ", ".join(source.extensions if source and source.extensions else suffixes)


def is_tar(name: str) -> bool:
    return name.lower().endswith(TAR_ENDS)


def is_saved_dataset(path: Path) -> bool:
    return (path / "state.json").is_file() or (path / "dataset_dict.json").is_file()


def kind_of(source: SourceConfig, name: str) -> str | None:
    """The kind of the file `name`, compression aside; None if unknown."""
    return source.kind or KIND_OF_SUFFIX.get(_suffix(name))


def is_wanted(source: SourceConfig, name: str) -> bool:
    """Whether the file `name` of a folder or archive belongs to the source."""
    if source.include is not None and not fnmatch.fnmatch(name, source.include):
        return False
    if source.kind == "code" and source.include is None:
        suffixes = {"." + suffix.lstrip(".").lower() for suffix in source.extensions or CODE_SUFFIXES}
        return _suffix(name) in suffixes and not name.endswith(NOT_CODE)
    if source.include is not None:
        return True
    kind = KIND_OF_SUFFIX.get(_suffix(name))
    return kind is not None and source.kind in (None, kind)


def _suffix(name: str) -> str:
    path = Path(name.lower())
    return path.with_suffix("").suffix if path.suffix in COMPRESSED else path.suffix


def iter_records(source: SourceConfig, units: Iterable[Path | None]) -> Iterator[Record]:
    """The documents and the broken records of `units`: the source's files, one saved dataset, or None for the Hub's."""
    for unit in units:
        if unit is None:
            yield from _read_table(load_hub(source), str(source.hub), source)
        elif unit.is_dir():
            yield from _read_table(load_saved(unit, source.split), str(unit), source)
        else:
            yield from _read_file(source, unit)


def reading_units(source: SourceConfig) -> list[Path | None]:
    """What `iter_records` takes: the parts of a source that can be read one by one."""
    if source.hub is not None:
        return [None]
    path = Path(str(source.path))
    if path.is_dir() and is_saved_dataset(path):
        return [path]
    return list(find_files(source))


def _read_file(source: SourceConfig, path: Path) -> Iterator[Record]:
    records = 0
    try:
        with _open(path) as stream:
            for record in (
                _read_tar(source, stream, path) if is_tar(path.name) else _read(source, stream, printable(str(path)))
            ):
                records += 1
                yield record
    except DAMAGED as error:
        reason = str(error) or type(error).__name__
        yield Broken(printable(str(path)), f"damaged or cut off after {records:,} records ({reason})")


def _open(path: Path) -> BinaryIO:
    opener: Any = OPENERS.get(path.suffix.lower(), open)
    try:
        return io.BufferedReader(opener(path, "rb"), 1 << 20)
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None


def _read(source: SourceConfig, stream: BinaryIO, name: str) -> Iterator[Record]:
    kind = kind_of(source, name)
    if kind is None:  # chosen by `include` alone
        yield Broken(name, "unknown kind of file; say `kind:` in its entry")
    elif source.messages_column is not None and kind in ("text", "html", "code"):
        yield Broken(name, f"kind {kind} has no column {source.messages_column!r}; `kind: json` passes over such files")
    else:
        yield from READERS[kind](stream, name, source)


class StrictTarInfo(tarfile.TarInfo):
    """Raises where `tarfile` takes a damaged header for the archive's end."""

    @classmethod
    def fromtarfile(cls, archive: tarfile.TarFile) -> "StrictTarInfo":
        try:
            return super().fromtarfile(archive)
        except tarfile.HeaderError as error:
            if isinstance(error, tarfile.EOFHeaderError):  # type: ignore[attr-defined]
                raise
            raise tarfile.ReadError(str(error)) from error


def printable(name: str) -> str:
    """A file's name as text that can be stored; names need not be UTF-8."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "replace")


def _read_tar(source: SourceConfig, stream: BinaryIO, path: Path) -> Iterator[Record]:
    with tarfile.open(fileobj=stream, mode="r|", tarinfo=StrictTarInfo) as archive:
        for member in archive:
            if member.isfile() and not is_wanted(source, member.name):
                yield Skipped(member.name, OTHER_KIND)
            elif member.isfile():
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


def _read_table(table: Any, name: str, source: SourceConfig) -> Iterator[Record]:
    columns = needed_columns(source)
    if table.column_names and set(columns) <= set(table.column_names):
        table = table.select_columns(columns)  # the others need not even be readable
    for number, record in enumerate(table, start=1):
        yield make_document(record, name, number, "record", source)


@contextlib.contextmanager
def standard_input_in_file(sources: list[SourceConfig], folder: Path) -> Iterator[None]:
    """Copy standard input to a file, so that a source `-` is read like any other while this lasts."""
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


def iter_documents(source: SourceConfig, units: list[Path | None]) -> Iterator[dict[str, str]]:
    """For streams: `text`, `source`, `id` of each document; broken records are passed over."""
    for record in iter_records(source, units):
        if isinstance(record, Document):
            yield {"text": record.text, "source": str(source.name), "id": record.id}


def iter_file_texts(paths: list[str], text_column: str, messages_column: str | None) -> Iterator[list[str]]:
    """Batches of the texts in evaluation files, or of what is compared of their conversations."""
    for path in paths:
        source = SourceConfig(path=path, name=path, text_column=text_column, messages_column=messages_column)
        records = iter_records(source, reading_units(source))
        found = 0
        while batch := list(itertools.islice(records, 1000)):
            for record in batch:
                if isinstance(record, Broken):  # what cannot be read cannot be kept out of training
                    raise UserError(f"evaluation file {record.file}: {record.why}")
            texts = [without_system(record.text) for record in batch if isinstance(record, Document)]
            found += len(texts)
            yield texts
        if not found:
            raise UserError(f"evaluation file {path}: no documents in it")
