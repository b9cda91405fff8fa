"""What a pretrained folder says is still said by the export of a run that started from it."""

import hashlib
import json
import shlex
import shutil
from pathlib import Path

import peft
import pytest
import torch
from conftest import ROOT, SMALL, call, error_line, flags, script
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from utils.checkpoints import find_checkpoint
from utils.config import ModelConfig
from utils.model.build import build_model, load_model
from utils.pretrained import check_name, read_tokenizer

CHAT = "{% for message in messages %}<|im_start|>{{ message['content'] }}<|im_end|>{% endfor %}"
# What train.py sets or measures itself: fp32 weights, `model.dropout`, the version that wrote the file.
OWN = {"dtype", "transformers_version", "attention_dropout", "dropout_rate"}
SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
         "num_key_value_heads": 1, "max_position_embeddings": 128}  # fmt: skip


def change(path: Path, values: dict) -> None:
    path.write_text(json.dumps((json.loads(path.read_text()) if path.exists() else {}) | values))


def write_model(kind: str, tokenizer: Path, folder: Path) -> None:
    """A folder as published ones are: `chat` like Qwen2.5-Instruct, `base` like a Llama's, `t5`."""
    words = AutoTokenizer.from_pretrained(tokenizer)
    eos, special = words.eos_token_id, {"bos_token_id": words.eos_token_id, "eos_token_id": words.eos_token_id}
    torch.manual_seed(0)
    if kind == "chat":
        words.add_special_tokens({"extra_special_tokens": ["<|im_start|>", "<|im_end|>"]})
        words.bos_token, words.eos_token, words.pad_token = None, "<|im_end|>", words.eos_token
        words.chat_template = {"default": CHAT, "tool_use": CHAT}
        sizes = SIZES | {"vocab_size": len(words) + 8, "attention_dropout": 0.1}  # a few rows without a token
        model = Qwen2ForCausalLM(Qwen2Config(**sizes, bos_token_id=eos, eos_token_id=words.eos_token_id))
        generation = {"eos_token_id": [words.eos_token_id, eos], "pad_token_id": eos, "do_sample": True, "top_p": 0.8,
                      "temperature": 0.7, "top_k": 20, "repetition_penalty": 1.05, "bos_token_id": eos}  # fmt: skip
    elif kind == "base":
        words.pad_token, words.model_max_length = None, 77
        model = LlamaForCausalLM(LlamaConfig(**SIZES, vocab_size=len(words), tie_word_embeddings=False, **special))
        generation = {**special, "temperature": 0.6, "max_length": 4096}  # no do_sample, as Llama 2 had it
    else:
        model = T5ForConditionalGeneration(T5Config(
            vocab_size=len(words), d_model=32, d_ff=64, num_layers=2, num_heads=2, d_kv=16, eos_token_id=eos,
            pad_token_id=words.pad_token_id, decoder_start_token_id=words.pad_token_id,
        ))  # fmt: skip
        generation = {"eos_token_id": eos, "pad_token_id": words.pad_token_id, "num_beams": 4,
                      "decoder_start_token_id": words.pad_token_id}  # fmt: skip
    model.to(torch.bfloat16).save_pretrained(folder)
    words.save_pretrained(folder)
    change(folder / "tokenizer_config.json", {"padding_side": "left", "a_key_of_theirs": 1})
    change(folder / "generation_config.json", generation)
    change(folder / "config.json", {"a_key_of_theirs": {"a": 1}, "auto_map": {"AutoModelForCausalLM": "code.Model"}})
    (folder / "LICENSE.txt").write_text("their terms")
    (folder / "README.md").write_text("their model card")


@pytest.fixture
def pretrained(small_dataset, tmp_path):
    """kind → the folder of a model, and of data prepared with its tokenizer."""

    def make(kind: str) -> tuple[Path, Path]:
        folder, data = tmp_path / kind, tmp_path / f"{kind}-data"
        write_model(kind, small_dataset / "tokenizer", folder)
        options = {"sources": f"[{small_dataset.parent / 'texts.jsonl'}]", "output": data,
                   "tokenizer.pretrained": folder, "validation_fraction": 0.1}  # fmt: skip
        code, _, err = call("prepare_data.py", *flags(options))
        assert code == 0, err
        return folder, data

    return make


def options_for(folder: Path | str, data: Path, output: Path, **more: object) -> list[str]:
    kept = {name: value for name, value in SMALL.items() if not name.startswith("model.")}
    more = {name.replace("__", "."): value for name, value in more.items()}
    return flags(kept | {"data.dataset": data, "model.pretrained": folder, "output": output} | more)


def said(folder: Path, name: str) -> dict:
    return {key: value for key, value in json.loads((folder / name).read_text()).items() if key not in OWN}


@pytest.mark.parametrize("rank", [0, 4], ids=["all", "lora"])
@pytest.mark.parametrize(("kind", "objective"), [("chat", "causal"), ("base", "causal"), ("t5", "span_corruption")])
def test_training_and_export_keep_it(kind, objective, rank, pretrained, tmp_path):
    if kind == "t5" and rank:
        pytest.skip("its tokenizer gets new tokens, which adapters do not train")
    folder, data = pretrained(kind)
    output, export = tmp_path / "run", tmp_path / "export"
    for steps in (2, 4):  # the second launch resumes
        options = options_for(folder, data, output, objective__name=objective, model__lora__rank=rank,
                              schedule__max_steps=steps, checkpoint__resume="auto")  # fmt: skip
        code, _, err = call("train.py", *options)
        assert code == 0, err
    code, _, err = call("export.py", "--checkpoint", output, "--output", export)
    assert code == 0, err

    theirs, ours = (said(each, "config.json") for each in (folder, export))
    added = {"auto_map"} ^ (theirs.keys() ^ ours.keys())
    if kind == "t5":  # the sentinels are new rows
        theirs["vocab_size"], added = ours["vocab_size"], added - {"bos_token_id"}
    assert not added and ours == {key: theirs.get(key, value) for key, value in ours.items()}
    theirs, ours = (said(each, "generation_config.json") for each in (folder, export))
    extra = {key: value for key, value in ours.items() if theirs.get(key) != value}
    tokenizer = AutoTokenizer.from_pretrained(export)
    assert (
        extra
        == {
            "chat": {},
            "base": {"pad_token_id": tokenizer.eos_token_id, "do_sample": True},
            "t5": {"bos_token_id": tokenizer.bos_token_id},
        }[kind]
    )
    assert theirs.keys() <= ours.keys()

    if kind == "chat":
        assert ours["eos_token_id"] == [tokenizer.eos_token_id, ours["bos_token_id"]]
        assert tokenizer.bos_token is None and tokenizer.chat_template["default"] == CHAT
    assert tokenizer.padding_side == "left" and tokenizer.init_kwargs["a_key_of_theirs"] == 1
    assert kind != "base" or tokenizer.model_max_length == 77
    assert (export / "LICENSE.txt").read_text() == "their terms"
    assert "their model card" not in (export / "README.md").read_text()  # it would speak of another model
    assert json.loads((export / "export_report.json").read_text())["pretrained"] == str(folder)


def weights(run: Path) -> str:
    return hashlib.sha256((run / "checkpoints" / "last" / "model.safetensors").read_bytes()).hexdigest()


def test_a_resumed_run_trains_the_same_rows_of_the_embedding(pretrained, tmp_path):
    """Where a folder names no padding token, the checkpoint must not name the eos token: torch's embedding does not train
    the padding's row, and each document begins with it."""
    folder, data = pretrained("base")
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    more = {"schedule__shape": "constant", "schedule__warmup_steps": 0}
    for output, steps in ((whole, 6), (parts, 2), (parts, 6)):
        options = options_for(folder, data, output, schedule__max_steps=steps, checkpoint__resume="auto", **more)
        assert call("train.py", *options)[0] == 0
    assert weights(whole) == weights(parts)
    trained, before = (
        AutoModelForCausalLM.from_pretrained(each).get_input_embeddings().weight
        for each in (whole / "checkpoints" / "last", folder)
    )
    eos = AutoTokenizer.from_pretrained(folder).eos_token_id
    assert not torch.equal(trained[eos], before[eos].float())


def test_a_new_decoder_trains_the_row_of_its_eos_token_too(pretrained, tmp_path):
    _, data = pretrained("base")  # its tokenizer has no padding token
    assert call("train.py", *flags(SMALL | {"data.dataset": data, "output": tmp_path / "run"}))[0] == 0
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "checkpoints" / "last")
    assert model.get_input_embeddings().padding_idx is None
    assert model.generation_config.pad_token_id == model.config.eos_token_id


def test_generation_settings_that_cannot_be_saved_are_refused_first(pretrained, tmp_path):
    folder, data = pretrained("base")
    change(folder / "generation_config.json", {"length_penalty": 2.0})
    line = error_line("train.py", *options_for(folder, data, tmp_path / "run"))
    assert str(folder) in line and "generation_config.json" in line and not (tmp_path / "run").exists()


def test_a_run_or_adapters_in_place_of_a_model_name_the_command_that_works(
    pretrained, finished_run, tmp_path, monkeypatch
):
    folder, data = pretrained("base")
    for path in ROOT.iterdir():  # commands name scripts and exports/ relative to the clone
        if path.name not in ("data", "runs", "exports") and not path.name.startswith("."):
            (tmp_path / path.name).symlink_to(path)
    monkeypatch.chdir(tmp_path)
    options = options_for(folder, data, "runs/adapters", model__lora__rank=4, schedule__max_steps=2)
    assert call("train.py", *options)[0] == 0
    foreign = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(folder), peft.LoraConfig())
    foreign.save_pretrained("theirs")
    for wrong, script_name in {
        finished_run: "export.py",
        Path("runs/adapters"): "export.py",
        Path("runs/adapters/checkpoints/best"): "export.py",
        Path("theirs"): "-c",
    }.items():
        line = error_line("train.py", *options_for(wrong, data, "runs/next"))
        output = line.partition("give ")[2].partition(":")[0]
        _, *command = shlex.split(line.partition(f"{output}: ")[2])
        assert script_name in command and not Path(output).exists()
        script(*command, cwd=tmp_path)
        assert (Path(output) / "model.safetensors").is_file()
    assert error_line("prepare_data.py", "--tokenizer.pretrained", "runs/adapters").count("export.py") == 1
    assert not Path("runs/next").exists()


def test_the_best_of_a_copied_run_is_the_one_that_its_file_names(small_dataset, finished_run, tmp_path):
    """`cp -rL` makes a folder of the link `best`, which stays as it was when the copy is trained further."""
    copy = shutil.copytree(finished_run, tmp_path / "copy")
    best = copy / "checkpoints" / "best"
    change(best / "config.json", {"hidden_size": 1})
    expected = load_file(find_checkpoint(finished_run) / "model.safetensors")
    for _ in range(2):
        tokenizer = read_tokenizer(best)
        model = build_model(ModelConfig(pretrained=str(best)), tokenizer)
        assert load_model(best).state_dict()["model.norm.weight"].equal(expected["model.norm.weight"])
        assert model.state_dict()["model.norm.weight"].equal(expected["model.norm.weight"])
        check_name("model.pretrained", str(best), ("config.json",))
        shutil.rmtree(best, ignore_errors=True)  # a disk without links has nothing of that name
    shutil.rmtree(find_checkpoint(copy))
    assert "is gone" in error_line("train.py", *options_for(best, small_dataset, tmp_path / "run"))


def test_a_damaged_file_of_generation_settings_is_named(pretrained, tmp_path):
    folder, data = pretrained("base")
    (folder / "generation_config.json").write_text('{"temperature": 0.5')
    for arguments in (["train.py", *options_for(folder, data, tmp_path / "run")],
                      ["evaluate.py", "--model", folder, "--dataset", data]):  # fmt: skip
        assert "generation_config.json: cannot be read as JSON" in error_line(*arguments)


@pytest.mark.parametrize(
    ("name", "words"),
    [("{data}", "{data}/tokenizer"), ("README.md", "is a file"), ("docs", "holds no config.json"),
     ("runs/none", "there is no such folder"), ("./none", "there is no such folder"), ("model.gguf", "import_gguf.py model.gguf")],
)  # fmt: skip
def test_other_paths_in_place_of_a_model_are_refused_with_a_remedy(name, words, small_dataset, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "docs").mkdir()
    for file in ("README.md", "model.gguf"):
        (tmp_path / file).touch()
    line = error_line("train.py", *options_for(name.format(data=small_dataset), small_dataset, "run"))
    assert words.format(data=small_dataset) in line and not (tmp_path / "run").exists()
