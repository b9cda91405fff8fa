"""Configuration: names, types and values, quickly and in one line."""

import dataclasses
import re
import sys

import pytest
import yaml
from conftest import ROOT, run

from training.saving.folders import _differences
from utils.cli import _bound_of, parse_config
from utils.config import TrainConfig

RECIPES = sorted((ROOT / "configs").rglob("*.yaml"))


def parse(*arguments: str) -> TrainConfig:
    return parse_config(TrainConfig, "", list(arguments))


# What takes a good part of a second to import, or more.
SLOW = {"torch", "transformers", "accelerate", "datasets", "pandas", "matplotlib", "tokenizers", "ray", "peft", "wandb"}


@pytest.mark.parametrize("arguments", [["--help"], ["--model.hiden_size", "3"]], ids=["help", "typo"])
@pytest.mark.parametrize("name", ["prepare_data.py", "train.py", "export.py", "evaluate.py", "chat.py"])
def test_help_and_typos_answer_before_the_slow_imports(name, arguments):
    """A fresh process has imported few modules by then, and none of those that take seconds."""
    result = run(sys.executable, "-X", "importtime", name, *arguments, check=False)
    imported = [
        line.rpartition("|")[2].strip() for line in result.stderr.splitlines() if line.startswith("import time")
    ]
    assert "utils.cli" in imported and not SLOW & {module.partition(".")[0] for module in imported}
    assert len(imported) < 500
    if arguments != ["--help"]:
        last = [line for line in result.stderr.splitlines() if not line.startswith("import time")]
        assert result.returncode == 2 and len(last) == 1 and "hiden_size" in last[0]
        return
    assert result.returncode == 0
    if name == "train.py":
        text = " ".join(result.stdout.split())
        for section in dataclasses.fields(TrainConfig):
            for option in dataclasses.fields(section.type) if dataclasses.is_dataclass(section.type) else [section]:
                assert option.name in text
        assert (
            "Sequences per optimizer step, over all processes and micro-batches. (type: int >= 1, default: 8)" in text
        )
        assert "Annotated" not in text and "Optional" not in text


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--model.hiden_size", "3"], "unknown option --model.hiden_size (did you mean --model.hidden_size?)"),
        (["--optimizer.learning_rat", "3"], "did you mean --optimizer.learning_rate?"),
        (["--rank", "3"], "did you mean --model.lora.rank?"),
        (["--model.hidden_size", "wide"], "model.hidden_size: Expected int or null. Got value: wide"),
        (["--model.architecture", "qwen3"], "model.architecture qwen3 has no size tiny"),
        (["--optimizer.learning_rate", "nan"], "optimizer.learning_rate"),
        (["somewhere"], "unexpected argument 'somewhere'"),
        (["--config", "no/such.yaml"], "no/such.yaml: no such file"),
        (
            ["--model.dropout", "2", "--seed=-1"],
            "model.dropout is 2.0; it must be >= 0 and < 1; seed is -1",
        ),
        (
            ["--data.sequence_length", "512"],
            "data.sequence_length (512) is longer than model.max_position_embeddings (256)",
        ),
        (
            ["--schedule.num_epochs", "3"],
            "exactly one of schedule.max_steps, schedule.num_epochs and schedule.max_tokens",
        ),
        (["--schedule.max_steps", "5.5"], "schedule.max_steps: Expected int or null. Got value: 5.5"),
        (["--tracking.trackers", "wandb"], "Expected a list. Write '[wandb]'"),
        (["--tracking.trackers", "[wandb,"], "put '…' around it"),
        (["--seed", "5000000000"], "seed is 5000000000; it must be >= 0 and < 4294967296"),
        (["--batch.per_device_batch_size", "0"], "batch.per_device_batch_size is 0; it must be >= 1"),
        (["--batch.per_device_batch_size", "1.5"], "Expected int or null. Got value: 1.5"),
        (["--optimizer.ema_decay", "1"], "optimizer.ema_decay is 1.0; it must be > 0 and < 1"),
        (["--config", "configs"], "configs: not a file"),
        (["--model.num_attention_heads", "5"], "does not divide model.hidden_size"),
        (["--model.num_attention_heads", "0"], "model.num_attention_heads is 0; it must be >= 1"),
        (["--model.overrides", "{vocab_size: 9}"], "model.overrides: leave out vocab_size; the dataset's tokenizer"),
        (
            ["--model.lora", "null"],
            "model.lora cannot be null: it is a section; give its options, such as --model.lora.alpha",
        ),
    ],
)
def test_mistakes_on_the_command_line(arguments, expected, capsys):
    with pytest.raises(SystemExit) as ended:
        parse(*arguments)
    assert ended.value.code == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and expected in lines[0]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("model: {hidden_siz: 3}", "unknown option model.hidden_siz (did you mean model.hidden_size?)"),
        ("modl: {hidden_size: 3}", "unknown option modl.hidden_size (did you mean model.hidden_size?)"),
        ("hidden_size: 3", "did you mean model.hidden_size?"),
        ("model:\n  hidden_size: 4\n  hidden_size: 5", "line 3: duplicate key 'hidden_size'"),
        ("model: {hidden_size: 3.5}", "model.hidden_size: Expected int or null"),
        ("model: [1", "expected ',' or ']'"),
        ("output: null", "output is null"),
        ("seed: null", "seed is null"),
        ("data: null", "data is null"),
        ("model: {lora: null}", "model.lora is null"),
        ("optimizer: {learning_rate: null}", "optimizer.learning_rate is null"),
        ("checkpoint: {resume: null}", "checkpoint.resume is null"),
        ("tracking: {trackers: null}", "tracking.trackers is null"),
        ("? [a, b]\n: 3", "unhashable"),
        ("only words", "expected `option: value` lines"),
        ("seed: !!python/object/apply:os.system ['touch hacked']", "could not determine a constructor"),
    ],
)
def test_mistakes_in_a_file_are_reported_under_its_name(text, expected, tmp_path, capsys):
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    with pytest.raises(SystemExit):
        parse("--config", str(path))
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and expected in lines[0] and (str(path) in lines[0] or "null" in expected)


def test_every_bound_is_one_that_is_checked():
    """A bound that is misspelt would hold for every number."""

    def kinds(cls) -> list[object]:
        types = [item.type for item in dataclasses.fields(cls)]
        return [kind for each in types for kind in (kinds(each) if dataclasses.is_dataclass(each) else [each])]

    bounds = {bound for bound in map(_bound_of, kinds(TrainConfig)) if bound}
    assert len(bounds) >= 8 and all(re.fullmatch(r"[<>]=? \d+( and [<>]=? \d+)?", bound) for bound in bounds)


def test_flags_win_over_files_over_defaults(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text("optimizer: {learning_rate: 1e-4, weight_decay: 0.3}")
    config = parse("--config", str(path), "--optimizer.weight_decay", "0.5")
    assert (config.optimizer.learning_rate, config.optimizer.weight_decay, config.seed) == (1e-4, 0.5, 1234)


def test_the_demo_recipe_has_the_defaults_data_and_model():
    """So that `train.py` without options trains the demo's model on the demo's rows, with AdamW."""
    demo, default = parse("--config", str(ROOT / "configs/demo.yaml")), TrainConfig()
    assert demo.output == default.output and demo.seed == default.seed
    assert demo.data == default.data and demo.batch == default.batch
    assert demo.model.architecture == default.model.architecture and demo.model.sizes() == default.model.sizes()


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_recipes_parse(path):
    config = parse("--config", str(path))
    first, *_, last = path.read_text().splitlines()
    name = path.relative_to(ROOT)
    assert re.fullmatch(f"# accelerate launch (--config_file accelerate_configs/.*)?train.py --config {name}", first)
    assert last.startswith("# expect: ")
    given = yaml.safe_load(path.read_text())
    assert given["output"] == config.output


def test_the_lesson_recipe_has_the_lessons_numbers():
    config = parse("--config", str(ROOT / "configs/lesson.yaml"))
    model = config.model
    assert (model.hidden_size, model.num_hidden_layers, model.num_attention_heads) == (768, 12, 12)
    assert (model.intermediate_size, model.max_position_embeddings, model.dropout) == (3072, 512, 0.1)
    assert (config.optimizer.learning_rate, config.optimizer.weight_decay) == (5e-5, 0.01)
    assert (config.optimizer.max_grad_norm, config.schedule.warmup_steps, config.schedule.num_epochs) == (1.0, 1000, 3)
    assert config.batch.global_batch_size == 16


def test_an_option_that_is_newer_than_a_run_does_not_keep_it_from_going_on():
    current = dataclasses.asdict(TrainConfig())
    saved = dataclasses.asdict(TrainConfig())
    del saved["data"]["stream_lanes"]
    assert _differences(saved, current) == []
    current["data"]["stream_lanes"] = 4
    assert _differences(saved, current) == [("data.stream_lanes", "data.stream_lanes 8 → 4")]
