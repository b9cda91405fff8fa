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

import datasets
import pyarrow as pa

from utils.cli import UserError
from utils.text.readers import READERS, Broken, Document, Record, Skipped, make_document
from utils.text.recipe import COMPRESSED, KIND_OF_SUFFIX, TAR_ENDS, SourceConfig

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
    suffixes = CODE_SUFFIXES if source and source.kind == "code" else KIND_OF_SUFFIX
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
        suffixes = {"." + suffix.lstrip(".") for suffix in source.extensions or CODE_SUFFIXES}
        return Path(name).suffix in suffixes and not name.endswith(NOT_CODE)
    return source.include is not None or _suffix(name) in KIND_OF_SUFFIX


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
            for record in _read_tar(source, stream, path) if is_tar(path.name) else _read(source, stream, str(path)):
                records += 1
                yield record
    except DAMAGED as error:
        reason = str(error) or type(error).__name__
        yield Broken(str(path), f"damaged or cut off after {records:,} records ({reason})")


def _open(path: Path) -> BinaryIO:
    opener: Any = OPENERS.get(path.suffix.lower(), open)
    try:
        return io.BufferedReader(opener(path, "rb"), 1 << 20)
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None


def _read(source: SourceConfig, stream: BinaryIO, name: str) -> Iterator[Record]:
    kind = kind_of(source, name)
    assert kind is not None  # `is_wanted` and `find_files` let no other file pass
    yield from READERS[kind](stream, name, source)


def _read_tar(source: SourceConfig, stream: BinaryIO, path: Path) -> Iterator[Record]:
    with tarfile.open(fileobj=stream, mode="r|") as archive:
        for member in archive:
            if member.isfile() and not is_wanted(source, member.name):
                yield Skipped(member.name, OTHER_KIND)
            elif member.isfile():
                inside: Any = archive.extractfile(member)
                opener: Any = OPENERS.get(Path(member.name.lower()).suffix)
                data = io.BufferedReader(opener(inside, "rb") if opener else inside)
                yield from _read(source, data, f"{path.name}/{member.name}")


def load_saved(path: Path, split: str) -> datasets.Dataset:
    """A folder written by `save_to_disk`; `UserError` if it cannot be read or has no such split."""
    try:
        table = datasets.load_from_disk(str(path))
    except Exception as error:  # the library raises whatever its parts meet
        raise UserError(f"{path}: cannot be read as a saved dataset: {' '.join(str(error).split())[:200]}") from None
    if isinstance(table, datasets.DatasetDict):
        if split not in table:
            raise UserError(f"{path}: no split {split!r}; it has {', '.join(map(str, table))}")
        return table[split]
    return table


def load_hub(source: SourceConfig) -> datasets.Dataset | datasets.IterableDataset:
    """`load_dataset` of a Hub name, or of a local folder in the Hub's layout."""
    try:
        return datasets.load_dataset(
            str(source.hub), source.config, split=source.split, revision=source.revision, streaming=source.streaming
        )
    except Exception as error:  # network, names, formats: the library has many kinds
        raise UserError(f"hub {source.hub}: cannot be loaded: {' '.join(str(error).split())[:300]}") from None


def _read_table(table: Any, name: str, source: SourceConfig) -> Iterator[Record]:
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


def iter_file_texts(paths: list[str], text_column: str) -> Iterator[list[str]]:
    """Batches of the texts in evaluation files."""
    for path in paths:
        source = SourceConfig(path=path, name=path, text_column=text_column)
        texts = (document["text"] for document in iter_documents(source, reading_units(source)))
        while batch := list(itertools.islice(texts, 1000)):
            yield batch
