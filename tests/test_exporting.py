"""Formats of export.py, and the receipts: what the readers say, and the faults that they find."""

import copy
import json
import os
import re
import shutil
import signal
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import PATIENCE, ROOT, call, error_line, run, small_disk, start
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    BertConfig,
    BertForMaskedLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

import exporting
from exporting import check_formats, gguf_file, read_onnxruntime, read_transformers, receipts
from exporting.model_card import write_card
from exporting.onnx_graph import quantize_onnx, suit_transformers_js, write_onnx
from utils.cli import UserError
from utils.model.build import add_special_tokens, stop_token_ids

CHAT = "{% for m in messages %}<turn>{{ m['role'] }}\n{{ m['content'] }}<end>{% endfor %}{% if add_generation_prompt %}<turn>{% endif %}"
OTHER_CHAT = CHAT.replace("<turn>{{", "<turn> {{")
TRANSFORMERS_JS = "4.3.2"
WIDTH = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 64}
LLAMA = {**WIDTH, "intermediate_size": 48, "num_key_value_heads": 2}


def build_tokenizer(pre_tokenizer=None, model=None, chat_template: str | None = CHAT) -> PreTrainedTokenizerFast:
    """Bytes and some merges; a name for eos that llama.cpp does not know by itself."""
    backend = Tokenizer(model or models.BPE())
    backend.pre_tokenizer = pre_tokenizer or pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    special = ["<stop>", "<turn>", "<end>"]
    settings = {"vocab_size": 400, "special_tokens": special, "initial_alphabet": pre_tokenizers.ByteLevel.alphabet()}
    kind = trainers.UnigramTrainer if isinstance(model, models.Unigram) else trainers.BpeTrainer
    text = (ROOT / "sample_data" / "README.md").read_text(encoding="utf-8")
    backend.train_from_iterator([text, "1984 1984 3,141 3,141 won't"], kind(show_progress=False, **settings))
    backend.post_processor = processors.TemplateProcessing(single="<stop> $A", special_tokens=[("<stop>", 0)])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<stop>", eos_token="<stop>", chat_template=chat_template,
        extra_special_tokens=["<turn>", "<end>"],
    )  # fmt: skip


def build(name: str, tokenizer: PreTrainedTokenizerFast):
    """A model with larger weights than a new one's, so that its log-probabilities depend on all of them."""
    torch.manual_seed(0)
    rows = {"vocab_size": len(tokenizer) + 3}  # more rows than tokens
    if name == "gpt2":
        model = GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=2, n_head=4, n_positions=64, **rows))
    elif name == "qwen3":
        model = Qwen3ForCausalLM(Qwen3Config(**LLAMA, head_dim=16, tie_word_embeddings=False, **rows))
    else:
        model = LlamaForCausalLM(LlamaConfig(**LLAMA, tie_word_embeddings=False, **rows))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(6 if parameter.ndim > 1 else 1)
    add_special_tokens(model, tokenizer)
    return model.eval()


def ask(model, tokenizer) -> receipts.Questions:
    rows = [tokenizer(text)["input_ids"][:24] for text in receipts.TEXTS.values()]
    return receipts.ask_checkpoint(model, tokenizer, rows, "AutoModelForCausalLM", True)


def check_gguf(tmp_path: Path, model, tokenizer, precision="f32", written_by=None) -> dict:
    """The receipt of a file that was written with the tokenizer `written_by`."""
    path = tmp_path / f"model-{precision}.gguf"
    gguf_file.write_gguf(model, written_by or tokenizer, path, precision, "test")
    return receipts.check_file(f"gguf-{precision}", path, ask(model, tokenizer), model.config.model_type)


def test_a_receipt_writes_nothing_beside_the_export(tmp_path, monkeypatch):
    """Another export may be under way there, and would read its questions."""
    ended, commands = SimpleNamespace(returncode=1, stderr="no"), []
    monkeypatch.setattr(receipts.subprocess, "run", lambda command, **_: commands.append(command) or ended)
    questions = receipts.Questions({}, [], None, None, None, [])
    monkeypatch.setattr(receipts, "find_spec", lambda name: True)
    (folder := tmp_path / "folder").mkdir()
    (folder / "model.gguf").touch()
    for format, path in (("safetensors", folder), ("gguf-f32", folder / "model.gguf")):
        receipts.check_file(format, path, questions, "llama")
    assert [Path(file).parent.name for command in commands for file in command[-2:]] == ["folder"] * 4


@pytest.mark.parametrize("name", ["llama", "qwen3", "gpt2"])
def test_llama_cpp_says_what_the_model_says(tmp_path, name):
    tokenizer = build_tokenizer()
    row = check_gguf(tmp_path, build(name, tokenizer), tokenizer)
    assert row["faults"] == [] and row["receipt"] == "passed" and "llama.cpp" in row["reader"]
    assert row["texts_with_equal_ids"] == 4 and row["chat_template"] == "equal" and row["stops"]
    assert row["positions"] == 4 * 23 and row["max_log_probability_difference"] < (1e-2 if name == "gpt2" else 1e-4)
    assert row["perplexity"] == pytest.approx(row["perplexity_before"], rel=1e-3)


def plant_gguf(fault: str, monkeypatch) -> PreTrainedTokenizerFast:
    """Break the writer; returns the tokenizer that it is given."""
    if fault == "the pre-tokenizer":
        monkeypatch.setattr(gguf_file, "name_pre_tokenizer", lambda tokenizer: "smollm")
    if fault == "a transposed weight":
        arrange = gguf_file.arrange
        turn = lambda name, tensor, config: arrange(name, tensor.T if "o_proj" in name else tensor, config)  # noqa: E731
        monkeypatch.setattr(gguf_file, "arrange", turn)
    if fault == "no permutation":
        monkeypatch.setattr(gguf_file, "arrange", lambda name, tensor, config: tensor)
    if fault == "no eos":
        monkeypatch.setattr("gguf.GGUFWriter.add_eos_token_id", lambda self, id: self.add_uint32("x", id))
    return build_tokenizer(chat_template=OTHER_CHAT if fault == "the template" else CHAT)


@pytest.mark.parametrize(
    ("fault", "said"),
    [("an added bos", "ids of the English text"), ("the pre-tokenizer", "ids of the English text"),
     ("a transposed weight", "log-probabilities differ"), ("no permutation", "log-probabilities differ"),
     ("no eos", "does not end the text"), ("the template", "the chat template writes")],
)  # fmt: skip
def test_a_fault_in_a_gguf_file_is_found(tmp_path, monkeypatch, fault, said):
    tokenizer = build_tokenizer()
    if fault == "an added bos":
        tokenizer.backend_tokenizer.post_processor = processors.ByteLevel()
    row = check_gguf(tmp_path, build("llama", tokenizer), tokenizer, written_by=plant_gguf(fault, monkeypatch))
    assert any(said in line for line in row["faults"]) and row["receipt"].startswith("failed"), row


def test_llama_cpps_quantiser_writes_what_llama_cpp_reads(tmp_path):
    tokenizer = build_tokenizer()
    model = build("llama", tokenizer)
    (path,) = exporting._write("gguf-q4_k_m", model, tokenizer, tmp_path, True, "test")
    assert [file.name for file in sorted(tmp_path.iterdir())] == ["Modelfile", "model-q4_k_m.gguf"]
    assert len({part.tensor_type for part in gguf_reader(path).tensors}) > 1
    row = receipts.check_file("gguf-q4_k_m", path, ask(model, tokenizer), "llama")
    assert row["receipt"] == "passed" and row["texts_with_equal_ids"] == 4 and row["stops"]
    assert row["max_log_probability_difference"] > 1e-4 and row["perplexity"] == pytest.approx(
        row["perplexity_before"], rel=0.2
    )


def test_a_quantiser_that_fails_is_one_line(tmp_path, monkeypatch):
    tokenizer = build_tokenizer()
    monkeypatch.setattr(gguf_file, "write_gguf", lambda model, tokenizer, path, *rest: path.write_bytes(b"GGUF"))
    with pytest.raises(UserError, match="q4_k_m: llama"):
        exporting._write("gguf-q4_k_m", build("llama", tokenizer), tokenizer, tmp_path, True, "test")
    assert list(tmp_path.iterdir()) == []


def gguf_reader(path: Path):
    import gguf

    return gguf.GGUFReader(path)


def test_rounded_weights_are_held_to_the_perplexity(tmp_path):
    tokenizer = build_tokenizer()
    model = build("llama", tokenizer)
    row = check_gguf(tmp_path, model, tokenizer, "q8_0")
    assert row["max_log_probability_difference"] > 1e-4 and row["receipt"] == "passed"
    questions = ask(model, tokenizer)
    answers = {"reader": "a test", "ids": questions.ids, "chat_ids": questions.chat_ids, "greedy": questions.greedy,
               "stops": [True, True]}  # fmt: skip
    for shift, noise, found in ((0.005, 0, False), (0.02, 0, True), (0.02, 0.1, False), (0.2, 0.1, True)):
        # Alternating noise does not change the mean of 88 positions.
        moved = [[a - shift + noise * (-1) ** i for i, a in enumerate(row[:22])] for row in questions.log_probabilities]
        faults = receipts.compare("gguf-q8_0", answers | {"log_probabilities": moved}, questions, "llama")["faults"]
        assert any("perplexity" in line for line in faults) == found, (shift, noise, faults)


def test_what_llama_cpp_cannot_read_is_refused():
    tokenizer = build_tokenizer()
    model = build("llama", tokenizer)
    model.config.hidden_act = "gelu"
    with pytest.raises(UserError, match="hidden_act"):
        check_formats(["gguf"], model, tokenizer, "AutoModelForCausalLM")
    model.config.hidden_act = "silu"
    with pytest.raises(UserError, match="Unigram"):
        gguf_file.name_pre_tokenizer(build_tokenizer(model=models.Unigram()))
    with pytest.raises(UserError, match="pre-tokenizer"):
        gguf_file.name_pre_tokenizer(build_tokenizer(pre_tokenizers.ByteLevel(add_prefix_space=True)))
    digits = [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    assert gguf_file.name_pre_tokenizer(build_tokenizer(pre_tokenizers.Sequence(digits))) == "smollm"
    model = T5ForConditionalGeneration(T5Config(vocab_size=9, d_model=8, d_ff=8, num_layers=1, num_heads=1, d_kv=8))
    for format in ("gguf", "onnx"):
        with pytest.raises(UserError, match=format):
            check_formats([format], model, tokenizer, "AutoModelForSeq2SeqLM")


def plant_in_folder(fault: str, folder: Path) -> None:
    """Break an exported folder's tokenizer or settings."""
    state = json.loads((folder / "tokenizer.json").read_text())
    if fault == "a doubled bos":
        state["post_processor"]["single"].insert(0, state["post_processor"]["single"][0])
    if fault == "the pre-tokenizer":
        digits = {"type": "Digits", "individual_digits": True}
        state["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [digits, state["pre_tokenizer"]]}
    if fault == "no eos":
        settings = json.loads((folder / "generation_config.json").read_text())
        (folder / "generation_config.json").write_text(json.dumps(settings | {"eos_token_id": 7}))
    if fault == "the template":
        (folder / "chat_template.jinja").write_text(OTHER_CHAT)
    if fault == "the template for transformers.js":
        settings = json.loads((folder / "tokenizer_config.json").read_text())
        (folder / "tokenizer_config.json").write_text(json.dumps(settings | {"chat_template": OTHER_CHAT}))
    (folder / "tokenizer.json").write_text(json.dumps(state))


FAULTS = [
    (None, None), ("a doubled bos", "ids of the English text"), ("the pre-tokenizer", "ids of the"),
    ("a transposed weight", "log-probabilities differ"), ("no eos", "does not end the text"),
    ("the template", "the chat template"),
]  # fmt: skip


def compare(read, target: Path, questions: receipts.Questions, format: str, tmp_path: Path) -> list[str]:
    """What differs, by a reader in this process."""
    (tmp_path / "asked.json").write_text(json.dumps(questions.asked))
    read(str(target), str(tmp_path / "asked.json"), str(tmp_path / "answers.json"))
    return receipts.compare(format, json.loads((tmp_path / "answers.json").read_text()), questions, "llama")["faults"]


@pytest.mark.parametrize(("precision", "dtype"), [("bf16", "bfloat16"), ("f16", "float16")])
def test_rounded_weights_in_several_files(tmp_path, precision, dtype):
    """In half of the bytes; the receipt finds weights that are rounded too far."""
    tokenizer = build_tokenizer()
    model = build("llama", tokenizer)
    format, folder, questions = f"safetensors-{precision}", tmp_path / "export", ask(model, tokenizer)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    whole = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    files = exporting._write_weights(format, model, folder, "20KB")
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    assert len(files) > 2 and {path.name for path in files} == set(index["weight_map"].values())
    assert sum(path.stat().st_size for path in files) == pytest.approx(whole / 2, rel=0.1)
    assert json.loads((folder / "config.json").read_text())["dtype"] == dtype and model.dtype == torch.float32
    assert compare(read_transformers.main, folder, questions, format, tmp_path) == []
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_((parameter * 4).round() / 4)
    exporting._write_weights(format, model, folder, "5GB")
    assert [path.name for path in folder.glob("model*")] == ["model.safetensors"]
    faults = compare(read_transformers.main, folder, questions, format, tmp_path)
    assert any("log-probabilities differ" in line for line in faults), faults


def test_adapters_alone_belong_to_their_base(tmp_path):
    import peft

    tokenizer = build_tokenizer()
    base = tmp_path / "base"
    build("llama", tokenizer).save_pretrained(base)
    torch.manual_seed(1)
    options = {"r": 4, "target_modules": "all-linear", "init_lora_weights": False}
    model = peft.get_peft_model(LlamaForCausalLM.from_pretrained(base), peft.LoraConfig(**options)).eval()
    questions, folder = ask(copy.deepcopy(model).merge_and_unload(), tokenizer), tmp_path / "export" / "adapter"
    (file,) = exporting._write_adapter(model, tokenizer, folder)
    assert file.name == "adapter_model.safetensors" and not (folder / "README.md").exists()
    assert compare(read_transformers.main, folder, questions, "adapter", tmp_path) == []
    wrong = LlamaForCausalLM.from_pretrained(base)
    with torch.no_grad():
        wrong.lm_head.weight.add_(0.01 * torch.randn_like(wrong.lm_head.weight))
    wrong.save_pretrained(base)
    faults = compare(read_transformers.main, folder, questions, "adapter", tmp_path)
    assert any("log-probabilities differ" in line for line in faults), faults


@pytest.fixture(scope="module")
def graph(tmp_path_factory):
    """A folder with weights and a graph, and the questions; nothing writes to it."""
    folder, tokenizer = tmp_path_factory.mktemp("graph") / "export", build_tokenizer()
    model = build("llama", tokenizer)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    suit_transformers_js(folder, tokenizer)
    write_onnx(model, folder / "onnx" / "model.onnx", has_cache=True)
    return folder, ask(model, tokenizer)


@pytest.mark.parametrize(("fault", "said"), FAULTS)
def test_a_fault_in_a_folder_is_found(graph, tmp_path, fault, said):
    """By transformers and by onnxruntime; without a fault both agree with the model."""
    folder = shutil.copytree(graph[0], tmp_path / "export")
    plant_in_folder(fault or "", folder)
    if fault == "a transposed weight":
        transpose_weights(folder)
    for read, target, format in (
        (read_transformers.main, folder, "safetensors"),
        (read_onnxruntime.main, folder / "onnx" / "model.onnx", "onnx"),
    ):
        faults = compare(read, target, graph[1], format, tmp_path)
        assert any(said in line for line in faults) if said else faults == [], (format, faults)


def test_the_template_for_transformers_js_is_compared_too(graph, tmp_path):
    folder = shutil.copytree(graph[0], tmp_path / "export")
    plant_in_folder("the template for transformers.js", folder)
    faults = compare(read_onnxruntime.main, folder / "onnx" / "model.onnx", graph[1], "onnx", tmp_path)
    assert faults == ["the chat template is another one"]


def transpose_weights(folder: Path) -> None:
    """The square matrix of a block's output, in both files."""
    import numpy as np
    import onnx
    from safetensors.torch import load_file, save_file

    weights = load_file(folder / "model.safetensors")
    name = "model.layers.0.self_attn.o_proj.weight"
    weights[name] = weights[name].T.contiguous()
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    graph = onnx.load(folder / "onnx" / "model.onnx")
    square = next(part for part in graph.graph.initializer if list(part.dims) == [32, 32])
    array = onnx.numpy_helper.to_array(square)
    square.CopyFrom(onnx.numpy_helper.from_array(np.ascontiguousarray(array.T), square.name))
    onnx.save(graph, folder / "onnx" / "model.onnx")


def test_the_graph_has_the_names_that_transformers_js_knows(graph):
    import onnxruntime

    session = onnxruntime.InferenceSession(graph[0] / "onnx" / "model.onnx", providers=["CPUExecutionProvider"])
    shapes = {value.name: value.shape for value in session.get_inputs()}
    assert list(shapes)[:3] == ["input_ids", "attention_mask", "past_key_values.0.key"]
    assert shapes["past_key_values.1.value"] == ["batch_size", 2, "past_sequence_length", 8]
    assert [value.name for value in session.get_outputs()][:2] == ["logits", "present.0.key"]
    assert json.loads((graph[0] / "tokenizer_config.json").read_text())["add_bos_token"] is True


def test_a_masked_model_has_a_graph_without_cache(tmp_path):
    """It says what the model says, also to rows of other lengths and to a padded batch."""
    import onnxruntime

    tokenizer, folder = build_tokenizer(chat_template=None), tmp_path / "export"
    torch.manual_seed(0)
    model = BertForMaskedLM(BertConfig(**WIDTH, intermediate_size=48, vocab_size=len(tokenizer))).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(6 if parameter.ndim > 1 else 1)
    tokenizer.save_pretrained(folder)
    path = folder / "onnx" / "model.onnx"
    write_onnx(model, path, has_cache=False)
    rows = [tokenizer(text)["input_ids"][: 9 + 5 * i] for i, text in enumerate(receipts.TEXTS.values())]
    questions = receipts.ask_checkpoint(model, tokenizer, rows, "AutoModelForMaskedLM", False)
    assert compare(read_onnxruntime.main, path, questions, "onnx", tmp_path) == []
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    assert [value.name for value in session.get_inputs()] == ["input_ids", "attention_mask"]
    batch = {
        "input_ids": torch.zeros(4, 24, dtype=torch.int64),
        "attention_mask": torch.zeros(4, 24, dtype=torch.int64),
    }
    for index, row in enumerate(rows):
        batch["input_ids"][index, : len(row)] = torch.tensor(row)
        batch["attention_mask"][index, : len(row)] = 1
    (found,) = session.run(None, {name: value.numpy() for name, value in batch.items()})
    with torch.no_grad():
        for index, row in enumerate(rows):
            alone = model(input_ids=torch.tensor([row])).logits[0]
            torch.testing.assert_close(torch.from_numpy(found[index, : len(row)]), alone, atol=1e-4, rtol=0)
        model.bert.encoder.layer[0].output.dense.weight.mul_(1.01)
    other = receipts.ask_checkpoint(model, tokenizer, rows, "AutoModelForMaskedLM", False)
    assert any("log-prob" in line for line in compare(read_onnxruntime.main, path, other, "onnx", tmp_path))


@pytest.fixture(scope="module")
def transformers_js(tmp_path_factory):
    """A folder with transformers.js, without the binaries that only its GPU code needs."""
    if shutil.which("node") is None or shutil.which("npm") is None:
        pytest.skip("node and npm are not installed: apt-get install nodejs npm")
    folder = tmp_path_factory.mktemp("js")
    (folder / "package.json").write_text("{}")
    install = ["npm", "install", "--no-audit", "--no-fund", f"@huggingface/transformers@{TRANSFORMERS_JS}"]
    if run(*install, cwd=folder, check=False, ONNXRUNTIME_NODE_INSTALL="skip").returncode:
        pytest.skip("npm cannot install @huggingface/transformers")
    shutil.copy(ROOT / "tests" / "transformers_js.mjs", folder)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_transformers_js_says_what_transformers_says(transformers_js, tmp_path, name):
    """In Node: ids, the rendered chat, greedy text, and a stop at a forced end of text or turn."""
    folder, tokenizer = tmp_path / "exports" / name, build_tokenizer()
    model = build(name, tokenizer)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    suit_transformers_js(folder, tokenizer)
    write_onnx(model, folder / "onnx" / "model.onnx", has_cache=True)
    asked = {"texts": list(receipts.TEXTS.values()), "messages": receipts.MESSAGES, "prompt": "A hacker", "dtype": "fp32",
             "new_tokens": 24, "stop_ids": stop_token_ids(tokenizer)}  # fmt: skip
    (tmp_path / "asked.json").write_text(json.dumps(asked))
    script = transformers_js / "transformers_js.mjs"
    answers = json.loads(run("node", script, folder.parent, name, tmp_path / "asked.json").stdout.splitlines()[-1])
    assert answers["ids"] == [tokenizer(text)["input_ids"] for text in asked["texts"]]
    assert answers["chat"] == tokenizer.apply_chat_template(
        receipts.MESSAGES, tokenize=False, add_generation_prompt=True
    )
    written = model.generate(**tokenizer("A hacker", return_tensors="pt"), do_sample=False, max_new_tokens=24)[0]
    assert answers["written"] == tokenizer.decode(written, skip_special_tokens=True)
    assert answers["stops"] == [True, True]


def test_an_export_holds_the_files_and_their_receipts(finished_run, dataset, tmp_path):
    options = ["--checkpoint", finished_run, "--output", tmp_path / "export", "--formats", "[safetensors, gguf]",
               "--license", "mit"]  # fmt: skip
    code, out, err = call("export.py", *options)
    assert code == 0, err
    rows = json.loads((tmp_path / "export" / "export_report.json").read_text())["files"]
    assert [row["file"] for row in rows] == ["model.safetensors", "model-f32.gguf"]
    assert [row["receipt"] for row in rows] == ["passed", "passed"] and out.count("passed") == 2
    assert rows[0]["max_log_probability_difference"] == 0.0 and rows[0]["bytes"] > 10_000
    assert (tmp_path / "export" / "Modelfile").read_text().startswith("FROM ./model-f32.gguf")
    assert not list((tmp_path / "export").glob(".*"))
    card = (tmp_path / "export" / "README.md").read_text()
    loss = json.loads((finished_run / "summary.json").read_text())["best_loss"]
    tokens = json.loads((dataset / "manifest.json").read_text())["splits"]["train"]["tokens"]
    assert "license: mit" in card and f"{loss:.4f}" in card and f"{tokens:,}" in card and "1 × cpu" in card
    assert card.count("passed") == 2 and (tmp_path / "export" / "loss.png").exists()


def test_a_card_leaves_out_what_it_does_not_know(tmp_path):
    """A checkpoint without a run; a run with a file of another kind."""
    report = {"parameters": 5, "opens_with": "AutoModel", "pretrained": None, "optimizer_step": 1, "files": []}
    for content in (None, "[]"):
        if content:
            (tmp_path / "environment.json").write_text(content)
        write_card(tmp_path, "name", tmp_path / "checkpoints" / "step-1", report, None)
        card = (tmp_path / "README.md").read_text()
        assert re.findall("^## (.*)", card, re.M) == ["Limits"] and "license" not in card and "| |" not in card
        assert "opens it" not in card and "library_name" not in card  # no weights that transformers reads
    (tmp_path / "model.safetensors").touch()
    write_card(tmp_path, "name", tmp_path / "checkpoints" / "step-1", report, None)
    assert "`AutoModel` opens it" in (tmp_path / "README.md").read_text()


def test_a_failed_receipt_writes_nothing(finished_run, tmp_path, monkeypatch):
    monkeypatch.setattr(gguf_file, "arrange", lambda name, tensor, config: tensor)
    options = ["--checkpoint", finished_run, "--output", tmp_path / "export", "--formats", "[gguf]"]
    code, _, err = call("export.py", *options)
    assert code == 2 and "model-f32.gguf: log-probabilities differ" in err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("format", "begun"), [("gguf-q4_k_m", "model-q4_k_m.gguf"), ("onnx", "onnx")])
def test_a_killed_export_leaves_nothing_under_its_name(finished_run, tmp_path, format, begun):
    """And the next call removes what it left under another name."""
    output, work = tmp_path / "export", tmp_path / ".export.exporting"
    arguments = ["export.py", "--checkpoint", finished_run, "--output", output, "--formats", f"[{format}]"]
    with (tmp_path / "log").open("w") as log:
        (process,) = start([*map(str, arguments)], stdout=log, stderr=log)
        deadline = time.monotonic() + PATIENCE
        while not (work / begun).exists():
            assert process.poll() is None and time.monotonic() < deadline, (tmp_path / "log").read_text()
            time.sleep(0.005)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    assert work.exists() and not output.exists()
    code, _, err = call(*arguments[:5], "--formats", "[gguf-q4_0]")
    assert code == 0, err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["export", "log"]
    assert not (output / begun).exists() and (output / "model-q4_0.gguf").exists()


# Weights and tokenizer take 490 KB, the file in f32 410 KB, the graph 620 KB.
@pytest.mark.parametrize(("format", "size"), [("gguf", "700K"), ("gguf-q4_k_m", "960K"), ("onnx", "700K")])
def test_a_full_disk_gets_one_line(finished_run, tmp_path, format, size):
    """Whatever the libraries say of it."""
    with small_disk(tmp_path / "disk", size):
        line = error_line(
            "export.py",
            "--checkpoint",
            finished_run,
            "--output",
            tmp_path / "disk" / "export",
            "--formats",
            f"[{format}]",
        )
        assert "MB free" in line
        assert list((tmp_path / "disk").iterdir()) == []


def test_a_full_disk_while_a_graph_is_quantised_gets_one_line(graph, tmp_path):
    source = graph[0] / "onnx" / "model.onnx"
    with small_disk(tmp_path / "disk", f"{source.stat().st_size // 1024 + 16}K"):
        path = Path(shutil.copy(source, tmp_path / "disk"))
        with pytest.raises(UserError, match="MB free"):
            quantize_onnx(path, path.with_name("model_quantized.onnx"))


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json", "config.json"])
def test_a_corrupted_checkpoint_gets_one_line(finished_run, tmp_path, name):
    checkpoint = shutil.copytree((finished_run / "checkpoints" / "best").resolve(), tmp_path / "step-00000010")
    content = (checkpoint / name).read_bytes()
    (checkpoint / name).write_bytes(content[: len(content) // 2])
    options = ["--checkpoint", checkpoint, "--output", tmp_path / "export", "--formats", "[gguf, onnx]"]
    assert str(checkpoint) in error_line("export.py", *options)
    assert [path.name for path in tmp_path.iterdir()] == [checkpoint.name]


def test_a_missing_library_is_one_early_line(finished_run, tmp_path, monkeypatch):
    options = ["--checkpoint", finished_run, "--output", tmp_path / "export"]
    monkeypatch.setattr(exporting, "find_spec", lambda name: None)
    assert "pip install -e '.[gguf]'" in error_line("export.py", *options, "--formats", "[gguf-q8_0]")
    assert "pip install -e '.[onnx]'" in error_line("export.py", *options, "--formats", "[onnx]")
    assert "pip install -e '.[quantize]'" in error_line("export.py", *options, "--formats", "[gguf-q4_k_m]")
    assert "formats is empty" in error_line("export.py", *options, "--formats", "[]")


def test_formats_that_do_not_fit_are_one_early_line(finished_run, tmp_path):
    options = ["--checkpoint", finished_run, "--output", tmp_path / "export"]
    line = error_line("export.py", *options, "--formats", "[safetensors, safetensors-bf16]")
    assert "safetensors and safetensors-bf16" in line and "--output" in line
    assert "holds no adapters" in error_line("export.py", *options, "--formats", "[adapter]")
    assert "max_shard_size is 5 apples" in error_line("export.py", *options, "--max_shard_size", "5 apples")


def test_a_missing_reader_is_named(tmp_path, monkeypatch):
    tokenizer = build_tokenizer()
    questions = ask(build("llama", tokenizer), tokenizer)
    monkeypatch.setattr(receipts, "find_spec", lambda name: None)
    row = receipts.check_file("gguf-f32", tmp_path / "model-f32.gguf", questions, "llama")
    assert row["receipt"].startswith("not run: install xllamacpp")
