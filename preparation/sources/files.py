"""Which files a recipe reads, of which kind each is, and whether they have changed since the last run."""

import fnmatch
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from preparation.recipe import COMPRESSED, KIND_OF_SUFFIX, TAR_ENDS, PrepareConfig, SourceConfig
from preparation.stages import hash_json
from utils.cli import UserError
from utils.data.token_dataset import FORMAT_VERSION
from utils.files import hash_file

# Raise a stage's number when its result changes, so that results of older code are not reused.
VERSIONS = {"read": 1, "clean": 1, "sketch": 2, "select": 2, "tokenizer": 1, "encode": 2}
WITHOUT_EFFECT = ("output", "num_proc", "check_hashes")  # options that do not change the result

CODE_SUFFIXES = frozenset([
    ".c", ".h", ".cc", ".cpp", ".cxx", ".hpp", ".cs", ".css", ".dart", ".ex", ".exs", ".go", ".hs", ".java", ".jl",
    ".js", ".jsx", ".kt", ".lua", ".m", ".ml", ".php", ".pl", ".pm", ".py", ".r", ".rb", ".rs", ".S", ".s", ".scala",
    ".sh", ".sql", ".swift", ".ts", ".tsx", ".vue", ".zig",
])  # fmt: skip
NOT_CODE = (".min.js", ".min.css", "_pb2.py", ".pb.go", "-lock.js")  # generated


def find_files(source: SourceConfig) -> list[Path]:
    """The files of a source with a path, sorted; files of other kinds in a folder are passed over. `UserError` for a
    path that does not exist, a file of an unknown kind, a folder with nothing to read."""
    path = Path(str(source.path))
    if not path.exists():
        raise UserError(f"{path}: no such file or folder")
    if not path.is_dir():
        if not path.is_file():
            raise UserError(f"{path}: not a regular file; for a pipe, use - and standard input")
        if kind_of(source, path.name) is None and not is_tar(path.name):
            raise UserError(f"{path}: unknown kind of file; expected {known_suffixes()}, or give `kind:` in its entry")
        return [path]
    files = sorted(item for item in path.rglob("*") if item.is_file())
    if not is_saved_dataset(path):
        files = [item for item in files if is_tar(item.name) or is_wanted(source, str(item.relative_to(path)))]
    if not files:
        wanted = f"file like {source.include}" if source.include else f"{known_suffixes(source)} file"
        raise UserError(f"{path}: no {wanted} in this folder")
    return files


def reading_units(source: SourceConfig) -> list[Path | None]:
    """The parts of a source that can be read separately: its files, one saved dataset, or None for a Hub dataset."""
    if source.hub is not None:
        return [None]
    path = Path(str(source.path))
    return [path] if is_saved_dataset(path) else list(find_files(source))


def count_other_files(source: SourceConfig) -> int:
    """Files in a source's folder that are passed over."""
    path = Path(str(source.path))
    if source.hub is not None or not path.is_dir() or is_saved_dataset(path):
        return 0
    return sum(item.is_file() for item in path.rglob("*")) - len(find_files(source))


def known_suffixes(source: SourceConfig | None = None) -> str:
    suffixes = sorted(CODE_SUFFIXES) if source and source.kind == "code" else KIND_OF_SUFFIX
    return ", ".join((source and source.extensions) or suffixes)


def is_tar(name: str) -> bool:
    return name.lower().endswith(TAR_ENDS)


def is_saved_dataset(path: Path) -> bool:
    return (path / "state.json").is_file() or (path / "dataset_dict.json").is_file()


def kind_of(source: SourceConfig, name: str) -> str | None:
    """The kind of the file `name`, ignoring compression; None if unknown."""
    return source.kind or KIND_OF_SUFFIX.get(_suffix(name))


def is_wanted(source: SourceConfig, name: str) -> bool:
    """Whether the file `name` of a folder or archive belongs to the source."""
    if source.include is not None:
        return fnmatch.fnmatch(name, source.include)
    if source.kind == "code":
        suffixes = {"." + suffix.lstrip(".").lower() for suffix in source.extensions or CODE_SUFFIXES}
        return _suffix(name) in suffixes and not name.endswith(NOT_CODE)
    kind = KIND_OF_SUFFIX.get(_suffix(name))
    return kind is not None and source.kind in (None, kind)


def _suffix(name: str) -> str:
    path = Path(name.lower())
    return path.with_suffix("").suffix if path.suffix in COMPRESSED else path.suffix


def describe_files(
    sources: list[SourceConfig], known: list[dict[str, Any]], *, read_again: bool, by_size_only: bool
) -> list[dict[str, Any]]:
    """One record per file: source, name within it, path, bytes, mtime_ns, and its SHA-256 as `content`. A file in
    `known` (records of an earlier call) with the same path, size and time is taken to be unchanged, unless
    `read_again`. `by_size_only` is for streamed sources: their size replaces the hash."""
    hashes = {(item["path"], item["bytes"], item["mtime_ns"]): item["content"] for item in known}
    records: list[dict[str, Any]] = []
    owners: dict[Path, str] = {}
    for source in sources:
        root = Path(str(source.path or source.hub))
        if source.hub is not None and not root.is_dir():
            name = f"{source.hub}/{source.config}/{source.split}@{source.revision}"
            record = {"source": source.name, "name": name, "path": name, "bytes": 0, "mtime_ns": 0, "content": name}
            records.append(record)
            continue
        for path in find_files(source) if source.path else sorted(item for item in root.rglob("*") if item.is_file()):
            owner = owners.setdefault(path.resolve(), str(source.name))
            if owner != source.name:
                raise UserError(f"{path}: belongs to two sources, {owner} and {source.name}")
            try:
                stat = path.stat()
                content = hashes.get((str(path), stat.st_size, stat.st_mtime_ns))
                if by_size_only:
                    content = f"{stat.st_size} bytes"
                elif content is None or read_again:
                    content = hash_file(path)
            except OSError as error:
                raise UserError(f"{path}: cannot be read: {error.strerror}") from None
            records.append({
                "source": source.name, "name": str(path.relative_to(root)) if root.is_dir() else path.name,
                "path": str(path), "bytes": stat.st_size, "mtime_ns": stat.st_mtime_ns, "content": content,
            })  # fmt: skip
    return records


def recipe_key(config: PrepareConfig, sources: list[SourceConfig], files: list[dict[str, Any]]) -> str:
    """Hash of everything that decides the result: the sources' content, the options, the version of this code."""
    options = {name: value for name, value in asdict(config).items() if name not in WITHOUT_EFFECT}
    del options["sources"]  # represented by their content and entries: the same files elsewhere give the same key
    entries = [reading_options(source) | {"weight": source.weight} for source in sources]
    # Nulls are left out, so that an option added later does not change the key of an existing dataset.
    decided_by = [without_nulls(options), without_nulls(entries), identify(files, config), tokenizer_files(config)]
    return hash_json(FORMAT_VERSION, VERSIONS, *decided_by, hash_paths(config.deduplication.evaluation_files))


def identify(files: list[dict[str, Any]], config: PrepareConfig) -> list[list[Any]]:
    """What identifies the content of the sources: hashes, or size and time for a stream, whose files are not hashed."""
    return [[item["source"], item["name"], item["content"], config.stream and item["mtime_ns"]] for item in files]


def reading_options(source: SourceConfig) -> dict[str, Any]:
    """The options that decide which documents are read from given files."""
    options = {name: value for name, value in asdict(source).items() if name not in ("path", "hub", "weight")}
    return options | {"hub": source.hub is not None}


def without_nulls(values: Any) -> Any:
    """Nested mappings and lists without the keys whose value is None."""
    if isinstance(values, dict):
        return {name: without_nulls(value) for name, value in values.items() if value is not None}
    return [without_nulls(value) for value in values] if isinstance(values, list) else values


def tokenizer_files(config: PrepareConfig) -> dict[str, str]:
    """Hashes of the tokenizer's files, if it is not trained here."""
    pretrained, template = config.tokenizer.pretrained, config.tokenizer.chat_template
    files = sorted(Path(pretrained).glob("*")) if pretrained else []
    files = [path for path in files if path.suffix in (".json", ".jinja", ".txt", ".model")]
    files += [Path(template)] if template else []
    return {path.name: hash_file(path) for path in files if path.is_file()}


def hash_paths(paths: Iterable[str]) -> list[list[str]]:
    """Name and hash of every file with evaluation text."""
    return [[str(file), hash_file(file)] for path in paths for file in find_files(SourceConfig(path=path))]
