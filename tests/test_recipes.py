"""Every small recipe trains, whatever its objective: the same run however it is split and resumed, exported and scored."""

import json
import shutil

import pytest
import transformers
import yaml
from conftest import ROOT, call, metrics, train_losses

from utils.objectives import objective_module

RECIPES = {path.stem: path for path in sorted((ROOT / "configs" / "small").glob("*.yaml"))}
DATASETS = {"sft": "conversations"}
SHORT = [
    "--batch.global_batch_size", "4", "--schedule.warmup_steps", "1", "--schedule.num_epochs", "null",
    "--tracking.trackers", "[]", "--tracking.log_every_steps", "1", "--checkpoint.every_steps", "2",
    "--tracking.sample_every_steps", "4", "--tracking.sample_max_new_tokens", "8",
]  # fmt: skip


@pytest.fixture(scope="module")
def datasets(tmp_path_factory):
    """A few dozen documents of the sample, as text and as conversations about them."""
    folder = tmp_path_factory.mktemp("datasets")
    lines = (ROOT / "sample_data" / "dictionaries.jsonl").read_text(encoding="utf-8").splitlines()[:120]
    (folder / "text.jsonl").write_text("\n".join(lines), encoding="utf-8")
    with (folder / "chats.jsonl").open("w", encoding="utf-8") as file:
        for line in lines:
            text = json.loads(line)["text"]
            turns = [{"role": "user", "content": text[:20]}, {"role": "assistant", "content": text[20:200]}]
            file.write(json.dumps({"messages": turns}) + "\n")
    common = ["--validation_fraction", "0.1", "--tokenizer.vocab_size", "500"]
    assert (
        call("prepare_data.py", "--sources", f"[{folder / 'text.jsonl'}]", "--output", folder / "text", *common)[0] == 0
    )
    code, _, err = call(
        "prepare_data.py", "--sources", f"[{folder / 'chats.jsonl'}]", "--messages_column", "messages",
        "--output", folder / "conversations", "--tokenizer.chat_template", ROOT / "configs/chat_template_plain.jinja",
        *common,
    )  # fmt: skip
    assert code == 0, err
    return folder


def train(name, datasets, output, *options, max_steps=4):
    code, _, err = call(
        "train.py", "--config", RECIPES[name], "--data.dataset", datasets / DATASETS.get(name, "text"),
        "--output", output, *SHORT, "--schedule.max_steps", str(max_steps), *options,
    )  # fmt: skip
    assert code == 0, err
    return train_losses(metrics(output))


@pytest.mark.parametrize("name", ["gpt2_124m", "bert_mlm", "t5_span", "sft"])
def test_a_run_is_the_same_split_or_resumed_and_opens_as_the_class_of_its_objective(name, datasets, tmp_path):
    """The other recipes differ from gpt2_124m in nothing that matters here; adapters: test_models.py."""
    whole = train(name, datasets, tmp_path / "whole")
    assert len(whole) == 4
    if name in ("sft", "t5_span"):  # whose rows differ most in their number of targets; causal rows: test_train.py
        split = train(name, datasets, tmp_path / "split", "--batch.per_device_batch_size", "1")
        assert split == pytest.approx(whole, rel=1e-4)

    resumed = tmp_path / "whole"  # as if killed after the second step
    shutil.rmtree(resumed / "checkpoints" / "step-00000004")
    assert train(name, datasets, resumed, "--checkpoint.resume", "auto") == whole

    code, out, err = call("export.py", "--checkpoint", resumed, "--output", tmp_path / "export")
    auto_model = objective_module(yaml.safe_load((resumed / "config.yaml").read_text())["objective"]["name"]).AUTO_MODEL
    assert code == 0 and f"opens with {auto_model.__name__}" in out, err
    getattr(transformers, auto_model.__name__).from_pretrained(tmp_path / "export")

    report = tmp_path / "report.json"
    code, _, err = call("evaluate.py", "--model", resumed, "--report", report)
    assert code == 0, err
    best = json.loads((resumed / "summary.json").read_text())["best_loss"]
    assert json.loads(report.read_text())["loss"] == pytest.approx(best, rel=1e-5)
    figures = [item for item in metrics(resumed) if "eval/average_loss" in item]
    if name == "gpt2_124m":  # the recipe that keeps an average of the weights
        assert call("export.py", "--checkpoint", resumed, "--output", tmp_path / "ema", "--weights", "average")[0] == 0
        code, _, err = call(
            "evaluate.py", "--model", tmp_path / "ema", "--dataset", datasets / "text", "--report", report
        )
        assert code == 0, err
        average = json.loads(report.read_text())["loss"]
        assert average == pytest.approx(figures[-1]["eval/average_loss"], rel=1e-5)
        assert average != pytest.approx(best, rel=1e-4)
    assert "## Step 4" in (resumed / "samples.md").read_text(encoding="utf-8")


def test_each_recipe_has_a_small_variant_and_each_its_row_of_figures():
    table = (ROOT / "configs" / "README.md").read_text(encoding="utf-8")
    full = {path.stem for path in (ROOT / "configs").glob("*.yaml")} - {"demo"}
    assert full == set(RECIPES)
    for name in RECIPES:
        assert f"| [{name}](small/{name}.yaml) |" in table
