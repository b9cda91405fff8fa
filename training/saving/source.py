"""What a launch ran, kept in the run folder: the commit, the script, and the changes that are in no commit.

source/NAME-HASH.py            the launched script
source/changes-HASH.diff       `git diff HEAD`

The names hold a hash of the content, so launches with the same code share the files, and none overwrites another's.
"""

import subprocess
import sys
import tempfile
from hashlib import sha256
from pathlib import Path
from typing import Any

LARGEST = 1_000_000  # bytes of a script or a diff that is kept
UNTRACKED = 100  # names that are kept


def record_source(run: Path) -> dict[str, Any]:
    """Keep script and changes in `run`; returns the entries of environment.json: `git_commit` (None outside of git),
    `script` and `changes` (files in the run folder; None if there are none), `untracked` (.py files not in git)."""
    script = Path(sys.argv[0]).resolve()
    commit = _git(script, "describe", "--always", "--dirty", "--abbrev=40")
    changes = _git(script, "diff", "HEAD", "--no-ext-diff", "--no-color")
    untracked = _git(script, "ls-files", "--others", "--exclude-standard", "--full-name", "*.py")
    content = script.read_bytes() if script.is_file() else b""
    return {
        "git_commit": commit.decode().strip() or None,
        "script": _keep(run, script.stem, script.suffix, content),
        "changes": _keep(run, "changes", ".diff", changes),
        "untracked": untracked.decode(errors="replace").splitlines()[:UNTRACKED],
    }


def _keep(run: Path, name: str, suffix: str, content: bytes) -> str | None:
    if not content:
        return None
    if len(content) > LARGEST:
        content = content[:LARGEST] + f"\n[cut here by train.py, which keeps {LARGEST:,} bytes]\n".encode()
    path = run / "source" / f"{name}-{sha256(content).hexdigest()[:12]}{suffix}"
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(content)
    return str(path.relative_to(run))


def _git(script: Path, *arguments: str) -> bytes:
    """What git prints in the script's folder, up to one byte more than is kept; nothing if it fails."""
    command = ["git", "-C", str(script.parent), *arguments]
    try:
        with tempfile.TemporaryFile() as printed:  # not memory: a changed data file may make a diff of gigabytes
            subprocess.run(command, stdout=printed, stderr=subprocess.DEVNULL, check=True, timeout=10)
            printed.seek(0)
            return printed.read(LARGEST + 1)
    except (OSError, subprocess.SubprocessError):
        return b""
