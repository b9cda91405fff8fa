"""export.py --push_to_hub, against a hub on this machine."""

import shutil
import sys
from pathlib import Path

import pytest
from conftest import ROOT, call, error_line, run
from hub_server import TOKEN, USER, Hub
from huggingface_hub import constants

from exporting.hub import push
from utils.cli import UserError

RUN = ROOT / "tests" / "fixtures" / "28d2910" / "run"


@pytest.fixture
def hub(monkeypatch):
    """A hub, and this process as if it had been started with the variables that name it."""
    with Hub() as server:
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        for name, value in {"ENDPOINT": server.url, "HF_HUB_OFFLINE": False, "HF_HUB_DISABLE_XET": True}.items():
            monkeypatch.setattr(constants, name, value)
        yield server


def content(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def test_an_export_is_pushed_and_an_interrupted_push_is_resumed(hub, tmp_path):
    shutil.copytree(RUN, tmp_path / "run")
    command = [
        "export.py",
        "--checkpoint",
        tmp_path / "run",
        "--output",
        tmp_path / "export",
        "--max_shard_size",
        "4KB",
    ]
    command += ["--push_to_hub", "ann/poet"]
    hub.upload_limit = 1
    variables = {"HF_ENDPOINT": hub.url, "HF_TOKEN": TOKEN, "HF_HUB_OFFLINE": "0"}
    variables |= {"HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    failed = run(sys.executable, *command, cwd=ROOT, check=False, **variables)
    assert failed.returncode == 2 and failed.stderr.count("\n") == 1, failed.stderr
    assert "403" in failed.stderr and "same command" in failed.stderr
    assert hub.repositories["ann/poet"] == {"private": True, "files": {}}

    here = content(tmp_path / "export")
    shards = [name for name in here if name.endswith(".safetensors")]
    assert len(shards) > 2 and len(hub.uploads) == 1 and "README.md" in here
    hub.upload_limit = None
    code, out, err = call(*command)
    assert code == 0 and f"{hub.url}/ann/poet (private)" in out, err
    assert len(hub.uploads) == len(set(hub.uploads)) == len(shards)  # each of them once, in both pushes together
    assert hub.repositories["ann/poet"] == {"private": True, "files": here} and content(tmp_path / "export") == here

    assert call(*command)[0] == 0
    assert len(hub.uploads) == len(shards) and len(hub.commits) == 1  # nothing was missing


def test_an_existing_folder_is_pushed_only_if_it_is_this_export(hub, tmp_path):
    command = ["export.py", "--checkpoint", RUN, "--output", tmp_path / "export"]
    assert call(*command)[0] == 0
    assert "exists; remove it" in error_line(*command)
    command += ["--push_to_hub", "poet"]
    assert "its weights;" in error_line(*command, "--weights", "average")
    assert "its license;" in error_line(*command, "--license", "mit")
    (tmp_path / "notes").mkdir()
    assert "optimizer_step" in error_line(*command, "--output", tmp_path / "notes")
    assert hub.repositories == {}
    assert call(*command, "--private", "false")[0] == 0
    assert hub.repositories == {f"{USER}/poet": {"private": False, "files": content(tmp_path / "export")}}


def test_a_private_push_leaves_a_public_repository_alone(hub, tmp_path):
    hub.repositories["ann/poet"] = {"private": False, "files": {}}
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError, match="ann/poet is public"):
        push(tmp_path, "ann/poet", private=True)
    assert hub.commits == [] and hub.uploads == []
    push(tmp_path, "ann/poet", private=False)
    assert hub.commits == [["config.json"]]


def test_weights_of_an_earlier_push_do_not_stay(hub, tmp_path):
    """`from_pretrained` would prefer model.safetensors to the new shards."""
    old = ["model.safetensors", "model.safetensors.index.json", "model-q8_0.gguf", "photo.png"]
    hub.repositories["ann/poet"] = {"private": True, "files": dict.fromkeys(old, b"old")}
    (tmp_path / "model-q8_0.gguf").write_bytes(b"new")
    push(tmp_path, "ann/poet", private=True)
    assert hub.repositories["ann/poet"]["files"] == dict.fromkeys(old, b"old") | {"model-q8_0.gguf": b"new"}
    for name in ("model-00001-of-00002.safetensors", "model.safetensors.index.json"):
        (tmp_path / name).write_bytes(name.encode())
    push(tmp_path, "ann/poet", private=True)
    assert hub.repositories["ann/poet"]["files"] == content(tmp_path) | {"photo.png": b"old"}


def test_a_push_that_fails_is_one_line(hub, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "wrong")
    with pytest.raises(UserError, match=r"cannot push to ann/poet: .*401"):
        push(tmp_path, "ann/poet", private=True)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:1")
    with pytest.raises(UserError, match=r"cannot push to ann/poet: .*same command"):
        push(tmp_path, "ann/poet", private=True)
