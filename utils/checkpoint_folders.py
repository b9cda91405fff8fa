"""Checkpoint folders on the disk: whole or not there, hashed, found again, removed only when a newer one is safe.

step-00000100/manifest.json    size and SHA-256 of every other file in the folder; written last
best, last                     links to two of the folders
.tmp-…                         not yet a checkpoint, or no longer one; removed at the next start or save
"""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from utils.cli import UserError
from utils.files import read_json

PREFIX = "step-"
TEMPORARY_PREFIX = ".tmp-"
LINKS = ("best", "last")


def checkpoint_name(step: int) -> str:
    return f"{PREFIX}{step:08d}"


def list_checkpoints(folder: Path) -> list[Path]:
    """The checkpoint folders of a run, oldest first, valid or not. What has another name, or is a link to elsewhere, is
    somebody else's."""
    found = (path for path in folder.glob(PREFIX + "*") if re.fullmatch(r"step-[0-9]{8,18}", path.name))
    return sorted((path for path in found if not path.is_symlink()), key=step_of)


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix(PREFIX))


@contextmanager
def new_checkpoint(folder: Path, step: int) -> Iterator[Path]:
    """A folder to write into, which becomes `folder/step-N` at the end of the block, flushed and hashed.

    If the block raises, or is killed, there is no such checkpoint, and the older ones are untouched.
    """
    target = folder / checkpoint_name(step)
    temporary = folder / f"{TEMPORARY_PREFIX}{target.name}"
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        yield temporary
        (temporary / "manifest.json").write_text(json.dumps(_describe_files(temporary), indent=2), encoding="utf-8")
        for path in [*temporary.rglob("*"), temporary]:
            _flush_to_disk(path)
        if target.exists():  # one that a resume passed over as damaged
            _remove(target)
        temporary.rename(target)
        _flush_to_disk(folder)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def link_checkpoint(folder: Path, link: str, step: int | None) -> bool:
    """Let `folder/link` point to the checkpoint of `step`, in one step; False if there is none."""
    target = checkpoint_name(step or 0)
    if not (folder / target).exists():
        return False
    temporary = folder / f"{TEMPORARY_PREFIX}{link}"
    temporary.unlink(missing_ok=True)
    temporary.symlink_to(target)
    temporary.replace(folder / link)
    return True


def remove_old_checkpoints(folder: Path, keep_last: int, archive_every_steps: int | None) -> None:
    """Remove all but the newest `keep_last`, the linked and the archived checkpoints."""
    kept = {(folder / link).resolve().name for link in LINKS}
    found = list_checkpoints(folder)
    kept |= {path.name for path in found[-keep_last:]}
    for path in found:
        archived = archive_every_steps and step_of(path) % archive_every_steps == 0
        if path.name not in kept and not archived:
            _remove(path)
    remove_leftovers(folder)


def remove_leftovers(folder: Path) -> None:
    """Remove what a killed save or removal has left."""
    for path in folder.glob(f"{TEMPORARY_PREFIX}{PREFIX}*"):
        shutil.rmtree(path, ignore_errors=True)


def find_newest_valid(folder: Path) -> tuple[Path | None, list[str]]:
    """The newest checkpoint whose files agree with their hashes, and one line per newer one that was passed over."""
    problems: list[str] = []
    for checkpoint in reversed(list_checkpoints(folder)):
        problem = find_problem(checkpoint)
        if problem is None:
            return checkpoint, problems
        problems.append(f"{checkpoint} is not valid and is passed over: {problem}")
    return None, problems


def find_problem(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint folder, or None; reads every byte of it."""
    try:
        manifest = read_json(checkpoint / "manifest.json")
        expected = {name: (int(file["bytes"]), str(file["sha256"])) for name, file in manifest.items()}
    except (UserError, ValueError, TypeError, KeyError, OverflowError):
        return "manifest.json is missing or unreadable"
    for name, (size, digest) in expected.items():
        path = checkpoint / name
        if not is_inside(path, checkpoint):
            return f"manifest.json names {name[:200]!r}, which is outside of the checkpoint"
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != size:
            return f"{name} has {path.stat().st_size} bytes in place of {size}"
        if hash_file(path) != digest:
            return f"{name} has changed since it was saved"
    return None if "state.json" in expected else "manifest.json does not name state.json"


def resolve_checkpoint(path: str | Path) -> Path:
    """A run folder (its best checkpoint, else its last) or a checkpoint folder → a verified checkpoint folder."""
    path = Path(path)
    if not path.exists():
        raise UserError(f"{path}: no such run or checkpoint folder")
    if (path / "checkpoints").is_dir():
        links = [path / "checkpoints" / link for link in LINKS]
        link = next((link for link in links if link.exists()), links[-1])
        if not is_inside(link, path / "checkpoints"):
            raise UserError(f"{link} is a link to {os.readlink(link)}, outside of the run; give that folder itself")
        path = link
    if not (path / "state.json").is_file():
        raise UserError(f"{path}: not a checkpoint folder (it has no state.json)")
    problem = find_problem(path)
    if problem:
        raise UserError(f"{path}: {problem}; `python -m utils.checkpoints verify RUN` shows which checkpoints are "
                        "valid; give the folder of one")  # fmt: skip
    return path.resolve()


def is_inside(path: Path, folder: Path) -> bool:
    """Whether `path`, all links followed, lies in `folder`; False for what can be no path."""
    try:
        return path.resolve().is_relative_to(folder.resolve())
    except (OSError, ValueError):
        return False


def hash_file(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _describe_files(folder: Path) -> dict[str, dict[str, Any]]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): {"bytes": path.stat().st_size, "sha256": hash_file(path)} for path in files}


def _flush_to_disk(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _remove(checkpoint: Path) -> None:
    """Away under its name in one step, so that a kill leaves no half of a checkpoint; then file by file."""
    leaving = checkpoint.with_name(f"{TEMPORARY_PREFIX}{checkpoint.name}.removed")
    shutil.rmtree(leaving, ignore_errors=True)
    checkpoint.rename(leaving)
    shutil.rmtree(leaving, ignore_errors=True)
