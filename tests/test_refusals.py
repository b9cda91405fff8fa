"""Wrong input is refused before the slow imports, with one line, and leaves nothing behind."""

import re
import sys
from pathlib import Path

import pytest
from conftest import ROOT, SMALL, error_line, flags, run, script

BENCHMARKS = sorted(path.stem for path in (ROOT / "benchmarks").glob("*.py") if path.stem != "common")


@pytest.fixture(scope="module")
def without(tmp_path_factory):
    """name of libraries → variables with which a fresh Python cannot import them."""
    folder = tmp_path_factory.mktemp("without")
    (folder / "sitecustomize.py").write_text(
        "import os, sys\nsys.modules.update(dict.fromkeys(os.environ['WITHOUT'].split(',')))\n"
    )
    return lambda *names: {"PYTHONPATH": str(folder), "WITHOUT": ",".join(names)}


def refusal(without, arguments: str, *libraries: str, **extra: str) -> str:
    """The one line of a script that is refused although torch (and `libraries`) cannot be imported."""
    name, *options = arguments.split()
    done = run(sys.executable, name, *options, check=False, **without("torch", *libraries), **extra)
    script_name = Path(name).name
    assert done.returncode == 2 and done.stderr.startswith(f"{script_name}: error: "), done.stderr[-2000:]
    assert done.stderr.count("\n") == 1
    return done.stderr


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("train.py --data.dataset {data} --model.size huge", "no size huge"),
        ("train.py --data.dataset {data} --objective.name instruction", "needs conversations"),
        (
            "train.py --data.dataset {data} --objective.name masked",
            "choose from bert, modernbert",
        ),
        ("train.py --data.dataset {data} --output README.md", "it is a file"),
        ("train.py --data.dataset {data} --output {data}", "is not empty and not a run folder"),
        ("train.py --data.dataset {data} --output {run}", "already holds a run"),
        ("train.py --data.dataset {data} --model.pretrained {run}", "export it first"),
        ("export.py --checkpoint runs/none --output {new}", "does not exist"),
        ("export.py --checkpoint {data} --output {new}", "is no run and no checkpoint"),
        ("evaluate.py --model runs/none --prompt x", "does not exist"),
        ("evaluate.py --model {data} --prompt x", "is no run and no checkpoint"),
        ("evaluate.py --model {run} --report none/report.json", "there is no folder to write it to"),
        ("evaluate.py --model {run} --report {data}", "{data} is a folder; name a file"),
        ("evaluate.py --model {run} --text_file {data}", "--text_file {data} is no file"),
        (
            "evaluate.py --model {run} --prompt x --seed 100000000000000000000",
            "seed is 100000000000000000000; it must be",
        ),
        ("export.py --checkpoint {run} --output {new} --max_logit_difference -1", "max_logit_difference is -1.0"),
        ("export.py --checkpoint {run} --output=", "output is empty"),
        ("export.py --checkpoint {run} --output {new} --push_to_hub a/b/c", "push_to_hub is 'a/b/c'"),
        ("export.py --checkpoint {run} --output {new} --push_to_hub a/b", "unset HF_HUB_OFFLINE"),
        ("train.py --data.dataset none --objective.name instruction", "'[my_chats.jsonl]' --messages_column messages"),
        ("prepare_data.py --tokenizer.pretrained {data}", "its tokenizer is in {data}/tokenizer"),
        ("prepare_data.py --tokenizer.chat_template none.jinja", "none.jinja cannot be read"),
        ("examples/lr_range_test.py --recipe configs/small/sft.yaml", "python prepare_data.py --sources"),
        ("examples/lr_range_test.py --recipe {run}/config.yaml --plot {data}", "plot {data} is a folder"),
        ("examples/find_micro_batch.py --recipe none.yaml", "none.yaml: no such file"),
        ("examples/baselines.py --run {data}", "is not a run folder"),
    ],
)
def test_what_needs_no_model_is_refused_without_torch(arguments, words, without, small_dataset, finished_run, tmp_path):
    places = {"data": small_dataset, "run": finished_run, "new": tmp_path / "new"}
    if arguments.startswith("train.py") and "--output" not in arguments:
        arguments += " --output {new}"
    assert words.format_map(places) in refusal(without, arguments.format_map(places))
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("options", "library", "extra", "remedy"),
    [
        ("--tracking.trackers [wandb]", "wandb", {}, "pip install wandb"),
        ("", "tensorboard", {}, "pip install tensorboard"),
        ("--optimizer.name adamw_8bit", "bitsandbytes", {}, "pip install -e '.[optim8bit]'"),
        ("--model.pretrained org/name --model.lora.rank 4", "peft", {}, "pip install -e '.[lora]'"),
        ("", "torchao", {"ACCELERATE_MIXED_PRECISION": "fp8"}, "pip install -e '.[fp8]'"),
    ],
)
def test_a_missing_library_is_named_without_torch(options, library, extra, remedy, without, small_dataset, tmp_path):
    arguments = f"train.py --data.dataset {small_dataset} --output {tmp_path / 'run'} {options}"
    assert remedy in refusal(without, arguments, library, **extra)
    assert not (tmp_path / "run").exists()


def test_an_export_of_adapters_names_their_library(without, tmp_path):
    checkpoint = tmp_path / "run" / "checkpoints" / "step-00000001"
    checkpoint.mkdir(parents=True)
    (checkpoint / "adapter_config.json").touch()
    line = refusal(without, f"export.py --checkpoint {tmp_path / 'run'} --output {tmp_path / 'new'}", "peft")
    assert "pip install -e '.[lora]'" in line


def test_a_push_needs_a_token(without, finished_run, tmp_path):
    nobody = {"HF_HUB_OFFLINE": "0", "HF_TOKEN": "", "HF_TOKEN_PATH": str(tmp_path / "none")}
    arguments = f"export.py --checkpoint {finished_run} --output {tmp_path / 'new'} --push_to_hub a/b"
    assert "hf auth login" in refusal(without, arguments, **nobody)
    assert not (tmp_path / "new").exists()


def test_a_launch_that_is_refused_late_leaves_no_folder(small_dataset, tmp_path):
    """Not even those above it; but a folder that was there stays, and so does what its user put there."""
    options = SMALL | {"data.dataset": small_dataset, "model.overrides": "{num_key_value_heads: 3}"}
    assert "key-value heads" in error_line("train.py", *flags(options | {"output": tmp_path / "runs" / "new" / "run"}))
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "asked" / "run").mkdir(parents=True)
    (tmp_path / "asked" / "run" / "stop").touch()
    error_line("train.py", *flags(options | {"output": tmp_path / "asked" / "run"}))
    assert [path.name for path in (tmp_path / "asked" / "run").iterdir()] == ["stop"]


def test_a_tokenizer_that_cannot_be_used_is_refused_before_the_text_is_read(small_dataset, tmp_path):
    """Which may take hours. The text is wrong as well, and that would be said second; nothing is left."""
    (tmp_path / "chats.jsonl").write_text("broken\n" * 20)
    (tmp_path / "template.jinja").write_text("{% for m in messages %}{{ m }")
    options = {"sources": f"[{tmp_path / 'chats.jsonl'}]", "messages_column": "messages", "output": tmp_path / "data"}
    for choice, words in {
        "tokenizer.pretrained": (small_dataset / "tokenizer", "has no chat template"),
        "tokenizer.chat_template": (tmp_path / "template.jinja", "tokenizer.chat_template: line 1"),
    }.items():
        assert words[1] in error_line("prepare_data.py", *flags(options | {choice: words[0]}))
    assert not [path for path in tmp_path.iterdir() if "data" in path.name]


@pytest.mark.parametrize("name", BENCHMARKS)
def test_a_benchmark_names_an_unknown_option_before_it_starts(name):
    done = script(f"benchmarks/{name}.py", "--no_such_option", "1", check=False)
    assert done.returncode == 2 and done.stdout == "", done.stderr
    last = done.stderr.splitlines()[-1]
    assert last.startswith(f"{name}.py: error: ") and re.search("no_such_option|is not a dataset|is not a run", last)
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("benchmarks/loss_curves.py --steps 0", "must be a whole number, 1 or more"),
        ("benchmarks/loss_curves.py --data.dataset none", "dataset none does not exist"),
        ("benchmarks/reliability.py --steps 50 --data.dataset {data}", "must be more than 54"),
        ("benchmarks/chaos.py --dataset none", "is not a dataset"),
        ("benchmarks/chaos.py --kills x", "x must be a whole number, 1 or more"),
        ("benchmarks/chaos.py --kills inf", "inf must be a whole number, 1 or more"),
        ("benchmarks/chaos.py --folder README.md", "README.md is a file"),
        ("benchmarks/prepare_data.py --megabytes 0", "0 must be a number above 0"),
        ("benchmarks/quality.py --bits nan", "nan must be a number above 0"),
        ("benchmarks/loss_curves.py --plot {data}", "is a folder; name a file"),
        ("examples/import_gguf.py README.md models/none", "README.md is not a GGUF file"),
        ("examples/import_gguf.py docs models/none", "docs is no file"),
        ("examples/make_instructions.py README.md/none.jsonl", "README.md is a file"),
        ("examples/make_instructions.py {data}", "{data} is a folder; name a file"),
        ("examples/demo_summary.py", "make demo"),
    ],
)
def test_wrong_values_of_benchmarks_and_examples_are_one_line(command, words, small_dataset):
    done = script(*command.format(data=small_dataset).split(), check=False)
    assert done.returncode in (1, 2) and words.format(data=small_dataset) in done.stderr.splitlines()[-1], done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("name", ["train.py", "prepare_data.py", "export.py", "evaluate.py", "chat.py"])
def test_any_console_can_show_the_help(name):
    """Fresh processes: the encoding is read at the start. The texts hold characters that ASCII lacks."""
    done = run(sys.executable, name, "--help", PYTHONIOENCODING="ascii")
    assert name != "train.py" or "\\u221a" in done.stdout


def test_a_console_that_is_not_utf8_does_not_end_a_run(small_dataset, tmp_path):
    """train.py's own lines hold `×` and `±`."""
    command = [sys.executable, "train.py", *flags(SMALL | {"data.dataset": small_dataset, "output": tmp_path / "run"})]
    done = run(*command, "--schedule.max_steps", "2", PYTHONIOENCODING="ascii", OMP_NUM_THREADS="1")
    assert "\\xd7" in done.stdout and "finished (max_steps)" in done.stdout
    assert "×" in (tmp_path / "run" / "training.log").read_text(encoding="utf-8")
