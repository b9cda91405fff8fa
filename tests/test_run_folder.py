"""A run folder says what ran, and its files have the permissions that its user's other files have."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, SMALL, call, flags

from training.saving import source


def git(folder: Path, *arguments: str) -> None:
    names = ["-c", "user.name=n", "-c", "user.email=e", "-c", "commit.gpgsign=false"]
    subprocess.run(["git", *names, *arguments], cwd=folder, check=True, capture_output=True)


def test_the_folder_holds_what_no_commit_holds(tmp_path, monkeypatch):
    """An untracked script with an untracked module, and a changed file; a second launch with another script."""
    clone, run = tmp_path / "clone", tmp_path / "run"
    clone.mkdir()
    run.mkdir()
    (clone / "module.py").write_text("rate = 1\n")
    git(clone, "init", "-q")
    git(clone, "add", ".")
    git(clone, "commit", "-qm", "first")
    script = clone / "my_train.py"
    monkeypatch.setattr(sys, "argv", [str(script), "--option", "1"])
    script.write_text("print(1)\n")
    first = source.record_source(run)
    assert len(first["git_commit"]) == 40 and first["changes"] is None and first["untracked"] == ["my_train.py"]
    (clone / "module.py").write_text("rate = 2\n")
    (clone / "mine.py").touch()
    script.write_text("print(2)\n")
    second = source.record_source(run)
    assert second["git_commit"].endswith("-dirty") and second["untracked"] == ["mine.py", "my_train.py"]
    assert [(run / each["script"]).read_text() for each in (first, second)] == ["print(1)\n", "print(2)\n"]
    assert "-rate = 1\n+rate = 2\n" in (run / second["changes"]).read_text()
    assert source.record_source(run) == second and len(list((run / "source").iterdir())) == 3
    (clone / "module.py").write_text("x = 1\n" * 300_000)
    cut = run / source.record_source(run)["changes"]
    assert source.LARGEST < cut.stat().st_size < source.LARGEST + 100
    assert b"cut here" in cut.read_bytes()[-100:]


def test_outside_of_git_the_script_is_kept_all_the_same(tmp_path, monkeypatch):
    (tmp_path / "run").mkdir()
    (tmp_path / "my_train.py").write_text("print(1)\n")
    monkeypatch.setattr(sys, "argv", [str(tmp_path / "my_train.py")])
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    found = source.record_source(tmp_path / "run")
    assert (tmp_path / "run" / found.pop("script")).read_text() == "print(1)\n"
    assert found == {"git_commit": None, "changes": None, "untracked": []}


def test_every_launch_has_its_script(finished_run):
    launch, *_ = json.loads((finished_run / "environment.json").read_text())
    assert (finished_run / launch["script"]).read_bytes() == (ROOT / "train.py").read_bytes()


@pytest.fixture(params=[0o027, 0o007], ids=["027", "007"])
def umask(request):
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


def modes(folder: Path) -> set[int]:
    return {path.stat().st_mode & 0o777 for path in folder.rglob("*") if path.is_file()}


def test_files_follow_the_umask(umask, small_dataset, tmp_path):
    """Checkpoints with an average, the export, adapters and their export (safetensors writes 0600), and a dataset."""
    run, export = tmp_path / "run", tmp_path / "export"
    texts = {"sources": f"[{small_dataset.parent / 'texts.jsonl'}]", "tokenizer.vocab_size": 400}
    assert call("prepare_data.py", *flags(texts | {"output": tmp_path / "data"}))[0] == 0
    options = SMALL | {"data.dataset": small_dataset, "schedule.max_steps": 2}
    assert call("train.py", *flags(options | {"output": run, "optimizer.ema_decay": 0.9}))[0] == 0
    assert call("export.py", "--checkpoint", run, "--output", export)[0] == 0
    own = {name: value for name, value in options.items() if not name.startswith("model.")}
    adapters = {"output": tmp_path / "adapters", "model.pretrained": export, "model.lora.rank": 2}
    assert call("train.py", *flags(own | adapters))[0] == 0
    assert call("export.py", "--checkpoint", tmp_path / "adapters", "--output", tmp_path / "merged")[0] == 0
    for folder in ("data", "run", "export", "adapters", "merged"):
        assert modes(tmp_path / folder) == {0o666 & ~umask}, folder
        assert folder == "data" or list((tmp_path / folder).rglob("*.safetensors"))
