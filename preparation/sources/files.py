"""Which files a recipe reads, of which kind each is, and whether they have changed since the last run."""

import contextlib
import fnmatch
import functools
import os
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

from preparation.recipe import COMPRESSED, KIND_OF_SUFFIX, TAR_ENDS, PrepareConfig, SourceConfig
from preparation.stages import hash_json
from utils.cli import UserError
from utils.data.token_dataset import FORMAT_VERSION
from utils.files import hash_file
from utils.pretrained import resolve_name

# Raise a stage's number when its result changes, so that results of older code are not reused.
VERSIONS = {"read": 4, "clean": 2, "sketch": 2, "select": 2, "tokenizer": 1, "encode": 2}
WITHOUT_EFFECT = ("output", "num_proc", "check_hashes")  # options that do not change the result

CODE_SUFFIXES = frozenset([
    ".c", ".h", ".cc", ".cpp", ".cxx", ".hpp", ".cs", ".css", ".dart", ".ex", ".exs", ".go", ".hs", ".java", ".jl",
    ".js", ".jsx", ".kt", ".lua", ".m", ".ml", ".php", ".pl", ".pm", ".py", ".r", ".rb", ".rs", ".S", ".s", ".scala",
    ".sh", ".sql", ".swift", ".ts", ".tsx", ".vue", ".zig",
])  # fmt: skip
OTHER_KIND = "file of another kind"
READ_ALREADY = "a link to a folder that is read already"
ANNEX_LINK = "a git-annex link without its file; `git annex get` brings it"
DANGLING = "a link to a missing file"
MISSING = (ANNEX_LINK, DANGLING)  # these are losses, unlike files that are left out on purpose
NOT_CODE = (".min.js", ".min.css", "_pb2.py", ".pb.go", "-lock.js")  # generated


class Found(NamedTuple):
    """What a walk through a source's path finds. Every file of a folder is in one of the lists."""

    files: list[tuple[str, str, os.stat_result]]  # to read: path, path without links, size and time; sorted by path
    left: list[tuple[str, str, int]]  # the others: path, why it is left out, its bytes
    media: Sequence[str] = ()  # pictures or sounds that records of the files name; sorted, none is in `left`

    @property
    def units(self) -> list[Path | None]:
        return [Path(path) for path, _, _ in self.files]


def find(source: SourceConfig) -> Found:
    """The files of a source, of which a folder is walked once, linked folders included. `UserError` for a path that
    does not exist, a file of an unknown kind, a folder with nothing to read."""
    path = Path(str(source.path or source.hub))
    if source.hub is not None and not path.is_dir():
        return Found([], [])
    if not path.exists():
        raise UserError(f"{path}: no such file or folder")
    if not path.is_dir():
        if not path.is_file():
            raise UserError(f"{path}: not a regular file; for a pipe, use - and standard input")
        if kind_of(source, path.name) is None and not is_tar(path.name):
            raise UserError(f"{path}: unknown kind of file; expected {known_suffixes()}, or give `kind:` in its entry")
        return Found([(str(path), os.path.realpath(path), path.stat())], [])
    found = _walk(source, str(path), whole=source.hub is not None or is_saved_dataset(path))
    if not found.files and source.hub is None:
        wanted = f"file like {source.include}" if source.include else f"{known_suffixes(source)} file"
        left = Counter(why for _, why, _ in found.left)
        but = f"; left out: {', '.join(f'{count:,} {why}' for why, count in left.items())}" if left else ""
        raise UserError(f"{path}: no {wanted} in this folder{but}")
    return found


def _walk(source: SourceConfig, root: str, *, whole: bool) -> Found:
    files, left, seen, folders = [], [], set(), [root]
    while folders:
        folder = folders.pop()
        real = os.path.realpath(folder)
        if real in seen:  # two links to one folder, or a link to a folder above
            left.append((folder, READ_ALREADY, 0))
            continue
        seen.add(real)
        try:
            entries = list(os.scandir(folder))
        except OSError as error:
            raise UserError(f"{folder}: cannot be read: {error.strerror}") from None
        for entry in entries:
            inside = entry.path[len(root) :].lstrip(os.sep)
            if entry.is_dir():
                folders.append(entry.path)
                continue
            try:
                stat = entry.stat()
            except OSError:  # a link to nothing
                why = ANNEX_LINK if ".git/annex/objects/" in os.readlink(entry.path) else DANGLING
                left.append((entry.path, why if whole or may_hold(source, inside) else OTHER_KIND, 0))
                continue
            why = "" if entry.is_file() else "not a regular file"
            if not (why := why or ("" if whole else why_left(source, inside))):
                resolved = os.path.realpath(entry.path) if entry.is_symlink() else os.path.join(real, entry.name)
                files.append((entry.path, resolved, stat))
            else:
                left.append((entry.path, why, stat.st_size))
    return Found(sorted(files, key=lambda item: item[0].split(os.sep)), sorted(left))


def why_left(source: SourceConfig, name: str) -> str:
    """Why the file `name` of a folder or archive is left out; "" if it is to be read."""
    patterns = [source.exclude] if isinstance(source.exclude, str) else source.exclude or []
    if any(fnmatch.fnmatch(name, pattern) for pattern in patterns):
        return "excluded"
    if os.path.basename(name).startswith("._"):
        return "AppleDouble file (attributes that macOS keeps of another file)"
    return "" if may_hold(source, name) else OTHER_KIND


def may_hold(source: SourceConfig, name: str) -> bool:
    return is_wanted(source, name) or (is_tar(name) and source.include is None)


def find_all(sources: list[SourceConfig]) -> dict[str, Found]:
    """What each source has, by its name. `UserError` for a file that belongs to two sources."""
    found = {str(source.name): find(source) for source in sources}
    owners: dict[str, str] = {}
    for name, here in found.items():
        for path, resolved, _ in here.files if len(found) > 1 else ():
            if (owner := owners.setdefault(resolved, name)) != name:
                advice = "name it in `exclude:` of one of them"
                raise UserError(f"{path}: belongs to two sources, {owner} and {name}; {advice}")
    return found


def reading_units(source: SourceConfig, found: Found | None = None) -> list[Path | None]:
    """The parts of a source that can be read separately: its files, one saved dataset, or None for a Hub dataset."""
    if source.hub is not None:
        return [None]
    path = Path(str(source.path))
    return [path] if is_saved_dataset(path) else (found or find(source)).units


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
        return _suffix(name) in _code_suffixes(tuple(source.extensions or CODE_SUFFIXES)) and not name.endswith(
            NOT_CODE
        )
    kind = KIND_OF_SUFFIX.get(_suffix(name))
    return kind is not None and source.kind in (None, kind)


@functools.cache
def _code_suffixes(suffixes: tuple[str, ...]) -> frozenset[str]:
    return frozenset("." + suffix.lstrip(".").lower() for suffix in suffixes)


def _suffix(name: str) -> str:
    stem, suffix = os.path.splitext(name.lower())
    return os.path.splitext(stem)[1] if suffix in COMPRESSED else suffix


def describe_files(
    sources: list[SourceConfig], found: dict[str, Found], known: list[dict[str, Any]], *, read_again: bool,
    by_size_only: bool,
) -> list[dict[str, Any]]:  # fmt: skip
    """One record per file of `found`: source, name within it, path, bytes, mtime_ns, and its SHA-256 as `content`. A
    file in `known` (records of an earlier call) with the same path, size and time is taken to be unchanged, unless
    `read_again`. `by_size_only` is for streamed sources: their size replaces the hash."""
    hashes = {(item["path"], item["bytes"], item["mtime_ns"]): item["content"] for item in known}
    records: list[dict[str, Any]] = []
    for source in sources:
        root = str(Path(str(source.path or source.hub)))
        is_folder = os.path.isdir(root)
        if source.hub is not None and not is_folder:
            name = f"{source.hub}/{source.config}/{source.split}@{source.revision}"
            record = {"source": source.name, "name": name, "path": name, "bytes": 0, "mtime_ns": 0, "content": name}
            records.append(record)
            continue
        for path, _, stat in found[str(source.name)].files:
            content = hashes.get((path, stat.st_size, stat.st_mtime_ns))
            if by_size_only:
                content = f"{stat.st_size} bytes"
            elif content is None or read_again:
                try:
                    content = hash_file(Path(path))
                except OSError as error:
                    raise UserError(f"{path}: cannot be read: {error.strerror}") from None
            name = path[len(root) :].lstrip(os.sep) if is_folder else os.path.basename(path)
            records.append({
                "source": source.name, "name": name, "path": path, "bytes": stat.st_size, "mtime_ns": stat.st_mtime_ns,
                "content": content,
            })  # fmt: skip
        if media := found[str(source.name)].media:
            records.append(_describe_media(str(source.name), root, media, hashes, read_again))
    return records


def _describe_media(
    source: str, root: str, paths: Sequence[str], hashes: dict[Any, str], read_again: bool
) -> dict[str, Any]:
    """One record for all `paths`, which may be millions: their bytes, and hashes of all their times and contents."""
    stats: list[tuple[int, int] | None] = []
    for path in paths:
        try:
            stat = os.stat(path)
            stats.append((stat.st_size, stat.st_mtime_ns))
        except OSError:
            stats.append(None)
    places = [os.path.relpath(path, root if os.path.isdir(root) else os.path.dirname(root)) for path in paths]
    num_bytes = sum(stat[0] for stat in stats if stat)
    times = int(hash_json(places, stats)[:12], 16)
    content = hashes.get((f"{root} (media)", num_bytes, times))
    if content is None or read_again:
        content = hash_json(list(zip(places, map(_hash_media, paths), strict=True)))
    return {
        "source": source, "name": f"{len(paths):,} files of pictures or sound", "path": f"{root} (media)",
        "bytes": num_bytes, "mtime_ns": times, "content": content,
    }  # fmt: skip


def _hash_media(path: str) -> str | None:
    """None for a file that cannot be read: only its record is broken."""
    with contextlib.suppress(OSError):
        return hash_file(Path(path))
    return None


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
    files = sorted(Path(resolve_name(pretrained)).glob("*")) if pretrained else []
    files = [path for path in files if path.suffix in (".json", ".jinja", ".txt", ".model")]
    files += [Path(template)] if template else []
    return {path.name: hash_file(path) for path in files if path.is_file()}


def hash_paths(paths: Iterable[str]) -> list[list[str]]:
    """Name and hash of every file with evaluation text."""
    return [[str(file), hash_file(Path(file))] for path in paths for file, _, _ in find(SourceConfig(path=path)).files]
