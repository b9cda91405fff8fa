"""What earlier versions wrote (tests/fixtures/): today's scripts read it, to the same numbers, or refuse it in one line."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import call, metrics
from safetensors.torch import load_file
from transformers import AutoTokenizer

from utils.data.token_dataset import load_manifest, open_split
from utils.model.adapters import hash_weights

FIXTURES = Path(__file__).parent / "fixtures"
RUNS = ("run", "lora_run", "fsdp2_run")
# (version, folder in it, script) → words of the line that refuses it: the file that it names, and the remedy. A refusal
# without an entry here fails the test, since nobody has decided on it.
REFUSED: dict[tuple[str, str, str], tuple[str, str]] = {}


@pytest.fixture(params=sorted(path.name for path in FIXTURES.iterdir() if path.is_dir()))
def version(request, tmp_path, monkeypatch) -> str:
    """A copy of one version's folder is the working directory, as all paths in it are relative to it."""
    shutil.copytree(FIXTURES / request.param, tmp_path / "copy", symlinks=True)
    monkeypatch.chdir(tmp_path / "copy")
    hash_weights.cache_clear()  # by name, and each version has an `export`
    return request.param


def is_read(version: str, folder: str, name: str, *arguments: str) -> bool:
    """Whether a script reads an old folder; if it does not, it must have said so in one line with a remedy."""
    code, _, err = call(name, *arguments)
    expected = REFUSED.get((version, folder, name))
    if expected is None:
        assert code == 0, err
        return True
    assert code == 2 and err.count("\n") == 1 and all(words in err for words in expected), err
    return False


def recorded(run: str, name: str) -> dict[int, float]:
    """A figure of metrics.jsonl by step."""
    return {record["step"]: record[name] for record in metrics(Path(run)) if name in record}


def test_a_dataset_holds_the_same_text(version):
    if not is_read(version, "dataset", "train.py", "--dry_run", "--data.dataset", "dataset", "--output", "new"):
        return
    tokenizer, documents = AutoTokenizer.from_pretrained("dataset/tokenizer"), []
    for split, figures in load_manifest("dataset")["splits"].items():
        tokens = open_split("dataset", split)
        assert (len(tokens.offsets) - 1, tokens.num_tokens) == (figures["documents"], figures["tokens"])
        for document in np.split(tokens.read(0, tokens.num_tokens), tokens.offsets[1:-1]):
            documents.append(tokenizer.decode(document, skip_special_tokens=True))
    assert sorted(documents) == sorted(
        json.loads(line)["text"] for line in Path("texts.jsonl").read_text().splitlines()
    )


@pytest.mark.parametrize("run", RUNS)
def test_a_run_goes_on_from_its_own_configuration_on_one_process(run, version):
    names = ["train/loss", "train/grad_norm", "train/learning_rate", "eval/loss"]
    names += ["eval/average_loss"] * (run != "lora_run")
    before = {name: recorded(run, name) for name in names}
    arguments = ["--config", f"{run}/config.yaml", "--checkpoint.resume", "auto"]
    if is_read(version, run, "train.py", *arguments):
        assert "step-00000004 at step 4" in Path(run, "training.log").read_text()
        for name in names:
            assert sorted(before[name]) == ([4, 6] if name.startswith("eval") else [1, 2, 3, 4, 5, 6])
            assert recorded(run, name) == pytest.approx(before[name], abs=1e-5)
        assert json.loads(Path(run, "summary.json").read_text())["optimizer_step"] == 6


@pytest.mark.parametrize("folder", [*RUNS, "export"])
def test_a_model_is_scored_as_when_it_was_trained(folder, version):
    loss = recorded("run" if folder == "export" else folder, "eval/loss")[4]
    extra = ["--dataset", "dataset"] if folder == "export" else []
    if is_read(version, folder, "evaluate.py", "--model", folder, *extra, "--report", "report.json"):
        assert json.loads(Path("report.json").read_text())["loss"] == pytest.approx(loss, abs=1e-5)


@pytest.mark.parametrize(("run", "weights"), [
    ("run", "trained"), ("run", "average"), ("lora_run", "trained"), ("fsdp2_run", "trained"), ("fsdp2_run", "average"),
])  # fmt: skip
def test_a_run_is_exported_to_the_loss_that_it_had(run, weights, version):
    loss = recorded(run, "eval/loss" if weights == "trained" else "eval/average_loss")[4]
    if not is_read(version, run, "export.py", "--checkpoint", run, "--weights", weights, "--output", "new"):
        return
    report = json.loads(Path("new/export_report.json").read_text())
    assert report["optimizer_step"] == 4 and report["parameters"] == 6640
    if is_read(version, "dataset", "evaluate.py", "--model", "new", "--dataset", "dataset", "--report", "report.json"):
        assert json.loads(Path("report.json").read_text())["loss"] == pytest.approx(loss, abs=1e-5)
    if run == "lora_run":  # merged: W + alpha / rank · B A
        base, merged = (load_file(Path(folder, "model.safetensors")) for folder in ("export", "new"))
        adapters = load_file("lora_run/checkpoints/last/adapter_model.safetensors")
        name = "model.layers.0.self_attn.q_proj"
        a, b = (adapters[f"base_model.model.{name}.lora_{part}.weight"] for part in "AB")
        assert b.abs().max() > 0
        assert torch.allclose(merged[f"{name}.weight"], base[f"{name}.weight"] + 16 / 2 * b @ a, atol=1e-7)


def test_the_parts_of_two_ranks_are_two_files(version):
    """Else the fixture would not be what it claims to be."""
    for kind in ("optimizer", "average"):
        assert len(list(Path("fsdp2_run/checkpoints/step-00000004", kind).glob("*.safetensors"))) == 2
