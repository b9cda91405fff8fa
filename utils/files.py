"""Small files that a kill or a full disk leaves whole, and a lock that a kill lets go."""

import contextlib
import fcntl
import os
import socket
from collections.abc import Iterator
from pathlib import Path


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
        except OSError:
            yield False
        else:
            file.truncate(0)
            file.write(f"process {os.getpid()} on {socket.gethostname()}")
            file.flush()
            yield True
