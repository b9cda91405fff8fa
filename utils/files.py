"""Small files: read within bounds, written so that a kill or a full disk leaves them whole; a lock that a kill lets go.

What is read may have been written by somebody else: it is data, of a bounded size and depth, or a `UserError`.
"""

import contextlib
import fcntl
import json
import os
import socket
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

MAX_YAML_CHARACTERS = 1 << 18  # a configuration has some thousand; the parser takes seconds for this many
MAX_VALUE_CHARACTERS = (
    8000  # of one text in it: options read texts as YAML again, where C's stack bears 16,000 brackets
)


class UserError(Exception):
    """A mistake that the user can mend; the message names the file, option or record and says how."""


class BoundedLoader(yaml.SafeLoader):
    """Plain values only. Refuses aliases, by which a kilobyte becomes gigabytes, and a key that stands twice, of which
    YAML silently takes the last."""

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            event = self.peek_event()
            raise yaml.YAMLError(
                f"line {event.start_mark.line + 1}: alias *{event.anchor}: write out what it stands for"
            )
        return super().compose_node(parent, index)

    def construct_scalar(self, node: Any) -> Any:
        if isinstance(node.value, str) and len(node.value) > MAX_VALUE_CHARACTERS:
            line, size = node.start_mark.line + 1, len(node.value)
            raise yaml.YAMLError(
                f"line {line}: a value of {size:,} characters; at most {MAX_VALUE_CHARACTERS:,} are read"
            )
        return super().construct_scalar(node)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        seen: set[str] = set()
        for key_node, _ in node.value:
            key = str(key_node.value)
            if key in seen:
                raise yaml.YAMLError(f"line {key_node.start_mark.line + 1}: {key!r} stands twice")
            seen.add(key)
        return super().construct_mapping(node, deep)


def parse_yaml(text: str) -> Any:
    """The value of a YAML text; `yaml.YAMLError` whatever is wrong with it."""
    if len(text) > MAX_YAML_CHARACTERS:
        raise yaml.YAMLError(f"it has {len(text):,} characters; a configuration has at most {MAX_YAML_CHARACTERS:,}")
    try:
        return yaml.load(text, Loader=BoundedLoader)
    except RecursionError:
        raise yaml.YAMLError("it is nested too deeply") from None
    except ValueError as error:  # a number of thousands of digits, a date that is none
        raise yaml.YAMLError(str(error)) from None


def read_yaml(path: Path) -> dict[str, Any]:
    """The `option: value` lines of a YAML file; `UserError` if it holds anything else."""
    try:
        with path.open(encoding="utf-8") as file:
            value = parse_yaml(file.read(MAX_YAML_CHARACTERS + 1))
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: cannot be read as UTF-8 text: {error}") from None
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


def replace_text(path: Path, text: str) -> None:
    """Write `text` beside `path`, flush it to the disk, and put it in the place of `path` in one step."""
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
    """Whether this process got the lock on `path`; it is let go at the end of the block, or when the process ends.

    `lockf` belongs to the process: worker processes that outlive a killed parent do not keep it, as they would `flock`.
    Who has the lock writes its host and number into the file.
    """
    with path.open("a") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            yield False
        except OSError as error:  # some network file systems have no locks
            print(f"warning: {path.parent} cannot be locked ({error.strerror}); do not start it twice", file=sys.stderr)
            yield True
        else:
            file.truncate(0)
            file.write(f"process {os.getpid()} on {socket.gethostname()}")
            file.flush()
            yield True
