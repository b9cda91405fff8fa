"""Small files: read as plain data (every fault is a `UserError`), replaced in one step, hashed, locked."""

import contextlib
import fcntl
import hashlib
import json
import math
import os
import socket
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml


class UserError(Exception):
    """A mistake that the user can fix. The message names the file, option or record and says how."""


def short(error: Exception) -> str:
    """The beginning of a library's message, on one line."""
    return " ".join(str(error).split())[:200] or type(error).__name__


def finite(value: Any) -> Any:
    """`value` of JSON with null for infinity and NaN, which JSON does not have: other programs would not read the file."""
    if isinstance(value, dict):
        return {name: finite(each) for name, each in value.items()}
    if isinstance(value, list):
        return [finite(each) for each in value]
    return value if not isinstance(value, float) or math.isfinite(value) else None


class PlainLoader(yaml.SafeLoader):
    """Plain values only. Refuses aliases, which can turn a kilobyte into gigabytes, and duplicate keys, which YAML
    silently resolves to the last."""

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            event = self.peek_event()
            line = event.start_mark.line + 1
            raise yaml.YAMLError(f"line {line}: alias *{event.anchor}: write out what it stands for")
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        seen: set[str] = set()
        for key_node, _ in node.value:
            if (key := str(key_node.value)) in seen:
                raise yaml.YAMLError(f"line {key_node.start_mark.line + 1}: duplicate key {key!r}")
            seen.add(key)
        return super().construct_mapping(node, deep)


def parse_yaml(text: str) -> Any:
    """The value of a YAML text; every fault is a `yaml.YAMLError`."""
    try:
        return yaml.load(text, Loader=PlainLoader)
    except RecursionError:
        raise yaml.YAMLError("it is nested too deeply") from None
    except ValueError as error:  # a number of thousands of digits, an impossible date
        raise yaml.YAMLError(str(error)) from None


def read_yaml(path: Path) -> dict[str, Any]:
    """The `option: value` lines of a YAML file; `UserError` if it holds anything else."""
    try:
        value = parse_yaml(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read: {getattr(error, 'strerror', error)}") from None
    except yaml.YAMLError as error:
        raise UserError(f"{path}: {error}") from None
    if not isinstance(value, dict):
        raise UserError(f"{path}: expected `option: value` lines, found {type(value).__name__}")
    return value


def read_json(path: Path, kind: type = dict) -> Any:
    """The value of a JSON file, a `kind`; `UserError` if it cannot be read or holds anything else."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        why = "it is nested too deeply" if isinstance(error, RecursionError) else error
        raise UserError(f"{path}: cannot be read as JSON: {why}") from None
    if not isinstance(value, kind):
        raise UserError(f"{path}: holds {type(value).__name__} in place of {kind.__name__}")
    return value


def flatten(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mapping → one level, keys joined by dots."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        flat |= flatten(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return flat


def hash_file(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal digits; a second per GB."""
    with path.open("rb", buffering=0) as file:
        if os.fstat(file.fileno()).st_size < 1 << 16:  # without the 256 KB that `file_digest` allocates
            return hashlib.sha256(file.readall()).hexdigest()
        return hashlib.file_digest(file, "sha256").hexdigest()


def readable(size: int, of: int | None = None) -> str:
    """`size` in bytes as text, in the unit that suits it, or that suits the sum that it is part `of`."""
    if (of or size) < 1e7:
        return f"{size / 1e6:.1f} MB"
    return f"{size / 1e6:,.0f} MB" if (of or size) < 1e10 else f"{size / 1e9:,.1f} GB"


def find_obstacle(path: str | Path) -> str | None:
    """Why no file can be written at `path`, for a line that names it; None if one can, with new folders above it."""
    path = Path(path).absolute()
    above = next(folder for folder in path.parents if folder.exists())
    if path.is_dir():
        return "is a folder; name a file"
    if not above.is_dir():
        return f"cannot be written: {above} is a file"
    return None if os.access(path if path.exists() else above, os.W_OK) else "cannot be written: no permission"


def follow_umask(folder: Path) -> None:
    """Give every file in a folder that this process made the permissions of other new files: safetensors lets only their
    owner read what it writes (0600), whatever the umask."""
    mode = folder.stat().st_mode & 0o666
    for path in folder.rglob("*"):
        if path.is_file():
            with contextlib.suppress(OSError):  # some file systems have no permissions
                path.chmod(mode)


def replace_text(path: Path, text: str) -> None:
    """Write `text` beside `path`, flush it to the disk, and rename it to `path` in one step."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with temporary.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise


@contextlib.contextmanager
def hold_lock(path: Path) -> Iterator[bool]:
    """Whether this process got the lock on `path`, which names its owner, until the end of the block or the process.
    Workers that outlive a killed parent do not keep a `lockf`, as they would a `flock`."""
    with path.open("a") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            yield False
        except OSError as error:  # some network file systems have no locks
            print(f"warning: {path.parent} cannot be locked ({error.strerror}); do not start it twice", file=sys.stderr)
            yield True
        else:
            try:
                os.ftruncate(file.fileno(), 0)
                os.write(file.fileno(), f"process {os.getpid()} on {socket.gethostname()}".encode())
            except OSError as error:  # a full disk
                path.unlink()
                raise OSError(error.errno, error.strerror, str(path)) from None
            yield True
