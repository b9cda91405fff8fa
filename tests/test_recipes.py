"""Every small recipe trains, whatever its objective: the same run however it is split and resumed, exported and scored."""

import json
import re
import shlex
import shutil
import sys
from pathlib import Path

import pytest
import transformers
import yaml
from conftest import ROOT, call, error_line, metrics, run, script, train_losses
from test_readme import make_copy

from utils.objectives import objective_module

RECIPES = {path.stem: path for path in sorted((ROOT / "configs" / "small").glob("*.yaml"))}
DATASETS = {"sft": "conversations"}
SHORT = [
    "--batch.global_batch_size", "4", "--schedule.warmup_steps", "1", "--schedule.num_epochs", "null",
    "--tracking.trackers", "[]", "--tracking.log_every_steps", "1", "--checkpoint.every_steps", "2",
    "--tracking.sample_every_steps", "4", "--tracking.sample_max_new_tokens", "8",
    "--model.hidden_size", "64", "--model.num_hidden_layers", "2",
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


@pytest.mark.parametrize(
    ("name", "commands"),
    [("llama_tiny", ["prepare_data.py", "launch", "evaluate.py"]),
     pytest.param("lora", ["prepare_data.py", "launch", "export.py", "make_instructions.py", "prepare_data.py", "launch",
                           "evaluate.py"], marks=pytest.mark.slow)],
)  # fmt: skip
def test_make_recipe_runs_what_the_file_says_and_can_be_repeated(name, commands, tmp_path):
    copy, tools = make_copy(tmp_path / "copy", max_steps=3), tmp_path / "tools"
    sample = copy / "sample_data" / "dictionaries.jsonl"
    sample.write_text("".join(sample.read_text(encoding="utf-8").splitlines(keepends=True)[::4]), encoding="utf-8")
    for recipe in {copy / "configs" / "small" / f"{each}.yaml" for each in ("llama_tiny", name)}:
        text, changes = re.subn(r"max_steps: \d+", "max_steps: 3", recipe.read_text())
        assert changes == 1
        recipe.write_text(text)
    tools.mkdir()
    for tool, first in (("python", ""), ("accelerate", "shift 2; ")):  # `accelerate launch --quiet` as one process
        forked = f'exec "{sys.executable}" -I -S "{ROOT}/tests/forked_python.py" "$@"'
        (tools / tool).write_text(f"#!/bin/sh\n{first}{forked}\n")
        (tools / tool).chmod(0o755)
    options = "--seed 5 --tracking.sample_every_steps 0 --model.hidden_size 32 --model.intermediate_size 64"
    planned = run("make", "--dry-run", "recipe", f"RECIPE=configs/small/{name}.yaml", f"OPTIONS={options}", cwd=copy,
                  VIRTUAL_ENV=str(Path(sys.prefix))).stdout.splitlines()[-1].split()  # fmt: skip
    assert planned[1:] == ["-m", "training.recipe", f"configs/small/{name}.yaml", *options.split()]
    first, again = (script(*planned[1:], cwd=copy, PLAINLOOP_PYTHON=str(tools / "python")).stdout for _ in range(2))
    shown = re.findall(r"^== (?:.*\|\| )?\w+ (?:examples/)?(\S+)", first, re.M)
    assert shown == commands
    run_folder = copy / "runs" / f"small_{name}"
    assert yaml.safe_load((run_folder / "config.yaml").read_text())["seed"] == 5
    assert json.loads((run_folder / "summary.json").read_text())["finished"] is True
    assert again.count("nothing to do") == len([each for each in commands if each in ("prepare_data.py", "launch")])
    scores = [re.findall(r"^model +loss .*\n\S+ +([\d.]+)", text, re.M) for text in (first, again)]
    assert scores[0] == scores[1] and len(scores[0]) == 1


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("", "usage: make recipe RECIPE="),
        ("none.yaml", "the recipe none.yaml does not exist; usage: make recipe RECIPE="),
        ("configs", "the recipe configs is no file"),
        ("configs/small/llama_tiny.yaml --nope", "unknown option --nope"),
        ("configs/small/llama_tiny.yaml --schedule.max_steps 0", "schedule.max_steps is 0"),
    ],
)
def test_make_recipe_refuses_before_its_first_command(arguments, words):
    done = script("-m", "training.recipe", *arguments.split(), cwd=ROOT, check=False)
    assert done.returncode == 2 and done.stdout == "" and done.stderr.count("\n") == 1
    assert words in done.stderr


def test_a_recipe_whose_dataset_is_missing_is_told_its_own_commands(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    for name, path in {"code_fim": RECIPES["code_fim"], "full lora": ROOT / "configs" / "lora.yaml"}.items():
        line = error_line("train.py", "--config", path)
        (command,) = re.findall(r"^# (python .*)", path.read_text(), re.M)
        assert line.endswith(f"make it with: {command}"), name
    line = error_line("train.py", "--config", RECIPES["code_fim"], "--data.dataset", "data/other")
    assert line.endswith("python prepare_data.py --sources '[my_texts/]' --output data/other")
    for name in ("sft", "lora"):  # and so is a copy under another name
        copy = Path(shutil.copy(RECIPES[name], tmp_path / "mine.yaml"))
        *_, command = re.findall(r"^# (python .*)", copy.read_text(), re.M)
        assert error_line("train.py", "--config", copy).endswith(f" && {command}")


def test_what_makes_a_missing_dataset_of_conversations_is_a_command_that_works(tmp_path, monkeypatch):
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    monkeypatch.chdir(tmp_path)
    turns = [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "Because."}]
    lines = (json.dumps({"messages": [turns[0] | {"content": f"Why {number}?"}, turns[1]]}) for number in range(40))
    Path("my_chats.jsonl").write_text("\n".join(lines))
    wanted = ["--objective.name", "instruction", "--data.dataset", "data/chats"]
    line = error_line("train.py", *wanted)
    code, _, err = call(*shlex.split(line.partition("python ")[2]), "--validation_fraction", "0.3")
    assert code == 0, err
    assert "--tokenizer.pretrained org/name --output data/others" in error_line(
        "train.py", *wanted[:-1], "data/others", "--model.pretrained", "org/name"
    )
