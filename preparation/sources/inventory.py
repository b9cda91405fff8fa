"""Which files a recipe reads, and whether they are the same as last time."""

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from preparation.recipe import PrepareConfig
from preparation.sources.source_config import SourceConfig
from preparation.sources.sources import find_files
from preparation.stages import hash_json
from utils.cli import UserError
from utils.data.token_dataset import FORMAT_VERSION

# Raise a stage's number when its result changes, so that what older code made no longer counts.
VERSIONS = {"read": 1, "clean": 1, "sketch": 1, "select": 1, "tokenizer": 1, "encode": 1}
WITHOUT_EFFECT = ("output", "num_proc", "check_hashes")  # options that do not change the result


def list_sources(sources: Iterable[SourceConfig]) -> Iterator[tuple[SourceConfig, str, Path | None]]:
    """(source, name within the source, file) of all that is read; None for a dataset fetched from the Hub."""
    seen: dict[Path, str] = {}
    for source in sources:
        root = Path(str(source.path or source.hub))
        if source.hub is not None and not root.is_dir():
            yield source, f"{source.hub}/{source.config}/{source.split}@{source.revision}", None
            continue
        files = find_files(source) if source.path else sorted(item for item in root.rglob("*") if item.is_file())
        for path in files:
            real = path.resolve()
            if seen.setdefault(real, str(source.name)) != source.name:
                raise UserError(f"{path}: belongs to two sources, {seen[real]} and {source.name}")
            yield source, str(path.relative_to(root)) if root.is_dir() else path.name, path


def describe_files(
    sources: list[SourceConfig], known: list[dict[str, Any]], *, read_again: bool, by_size_only: bool
) -> list[dict[str, Any]]:
    """One record per file: source, name, path, bytes, mtime_ns, and its SHA-256 as `content`.

    A file in `known` (records of an earlier call) with the same path, size and time is believed to be the same, unless
    `read_again`. `by_size_only`: for sources that are streamed, the size stands in for the hash.
    """
    hashes = {(item["path"], item["bytes"], item["mtime_ns"]): item["content"] for item in known}
    records = []
    for source, name, path in list_sources(sources):
        record: dict[str, Any] = {"source": source.name, "name": name, "path": str(path or name)}
        if path is None:
            records.append(record | {"bytes": 0, "mtime_ns": 0, "content": name})
            continue
        try:
            stat = path.stat()
            content = hashes.get((str(path), stat.st_size, stat.st_mtime_ns))
            if by_size_only:
                content = f"{stat.st_size} bytes"
            elif content is None or read_again:
                content = file_hash(path)
        except OSError as error:
            raise UserError(f"{path}: cannot be read: {error.strerror}") from None
        records.append(record | {"bytes": stat.st_size, "mtime_ns": stat.st_mtime_ns, "content": content})
    return records


def file_hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def recipe_key(config: PrepareConfig, sources: list[SourceConfig], files: list[dict[str, Any]]) -> str:
    """Hash of all that decides the result: the sources' content, the options, this code's version."""
    options = {name: value for name, value in asdict(config).items() if name not in WITHOUT_EFFECT}
    del options["sources"]  # their content and their entries stand for them: the same files elsewhere are the same
    contents = identify(files, config)
    entries = [reading_options(source) | {"weight": source.weight} for source in sources]
    # What is null is not there, so that an option that is newer than a dataset leaves its key as it was.
    options, entries = without_nulls(options), without_nulls(entries)
    evaluation = hash_paths(config.deduplication.evaluation_files)
    return hash_json(FORMAT_VERSION, VERSIONS, options, entries, contents, tokenizer_files(config), evaluation)


def identify(files: list[dict[str, Any]], config: PrepareConfig) -> list[list[Any]]:
    """What stands for the content of the sources; in a stream, whose files are not hashed, size and time."""
    return [[item["source"], item["name"], item["content"], config.stream and item["mtime_ns"]] for item in files]


def reading_options(source: SourceConfig) -> dict[str, Any]:
    """What decides the documents that are read from given files."""
    return {name: value for name, value in asdict(source).items() if name not in ("path", "hub", "weight")} | {
        "hub": source.hub is not None
    }


def without_nulls(values: Any) -> Any:
    """Nested mappings and lists without the keys whose value is None."""
    if isinstance(values, dict):
        return {name: without_nulls(value) for name, value in values.items() if value is not None}
    return [without_nulls(value) for value in values] if isinstance(values, list) else values


def tokenizer_files(config: PrepareConfig) -> dict[str, str]:
    """Hashes of the files that the tokenizer is made of, where it is not trained here."""
    folder = Path(config.tokenizer.pretrained or "")
    files = [path for path in sorted(folder.glob("*")) if path.suffix in (".json", ".jinja", ".txt", ".model")]
    files = files if config.tokenizer.pretrained else []
    files += [Path(config.tokenizer.chat_template)] if config.tokenizer.chat_template else []
    return {path.name: file_hash(path) for path in files if path.is_file()}


def hash_paths(paths: Iterable[str]) -> list[list[str]]:
    """Name and hash of every file that evaluation text is read from."""
    return [[str(file), file_hash(file)] for path in paths for file in find_files(SourceConfig(path=path))]
