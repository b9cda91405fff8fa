"""Exports and evaluations, read by strangers."""

import json
import lzma
import math
import shutil
import sys
from itertools import pairwise

import pytest
import torch
from accelerate import Accelerator
from conftest import SMALL, call, error_line, flags, run, script, train
from tokenizers import processors
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, GPT2Config, GPT2LMHeadModel

from evaluating.texts import encode_documents
from preparation.tokenizer.encoding import Encoder
from utils.config import ModelConfig
from utils.data.token_dataset import load_manifest, open_split
from utils.evaluation import evaluate, generate_text
from utils.model.build import build_model
from utils.objectives import Objective

STRANGER = """
import sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline
assert not any("utils" == name.split(".")[0] for name in sys.modules)
for folder in sys.argv[1:]:
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer("A hacker is", return_tensors="pt")
    torch.save(model(**ids).logits, f"{folder}.pt")
    write = pipeline("text-generation", model=folder)
    print(write("A hacker is", max_new_tokens=8, do_sample=False)[0]["generated_text"])
"""


@pytest.fixture(scope="module")
def export(finished_run, tmp_path_factory):
    folder = tmp_path_factory.mktemp("exports") / "export"
    script("export.py", "--checkpoint", finished_run, "--output", folder)
    return folder


def test_a_stranger_loads_the_export(finished_run, export, dataset, tmp_path):
    """A Llama's and a GPT-2's, by transformers alone, in another place."""
    train(tmp_path / "run", data__dataset=dataset, model__architecture="gpt2", model__initialization="normal")
    script("export.py", "--checkpoint", tmp_path / "run", "--output", tmp_path / "export")
    runs = {"llama": (finished_run, export), "gpt2": (tmp_path / "run", tmp_path / "export")}
    elsewhere = tmp_path / "elsewhere"
    for name, (_, exported) in runs.items():
        shutil.copytree(exported, elsewhere / name)
    result = run(sys.executable, "-I", "-c", STRANGER, *(elsewhere / name for name in runs), cwd=elsewhere)
    assert result.stdout.count("A hacker is") == 2
    for name, (trained, exported) in runs.items():
        model = AutoModelForCausalLM.from_pretrained(trained / "checkpoints" / "best").eval()
        assert model.config.model_type == name
        tokenizer = AutoTokenizer.from_pretrained(trained / "checkpoints" / "best")
        with torch.no_grad():
            logits = model(**tokenizer("A hacker is", return_tensors="pt")).logits
        assert torch.equal(logits, torch.load(elsewhere / f"{name}.pt").detach())
        report = json.loads((exported / "export_report.json").read_text())
        assert report["max_logit_difference"] == 0.0 and report["optimizer_step"] == 10
        assert not list(exported.parent.glob(".*"))


def test_an_export_that_differs_is_not_written(finished_run, tmp_path, monkeypatch):
    """The comparison can fail: with weights damaged between saving and reloading, there is no export."""
    import export as module
    from utils.cli import UserError

    monkeypatch.setattr(module, "saved_class", lambda config: DamagedReader)
    with pytest.raises(UserError, match="logits differ from the checkpoint's by"):
        module.main(module.ExportConfig(checkpoint=str(finished_run), output=str(tmp_path / "export")))
    assert list(tmp_path.iterdir()) == []


class DamagedReader:
    @staticmethod
    def from_pretrained(folder):
        model = AutoModelForCausalLM.from_pretrained(folder)
        with torch.no_grad():
            model.get_input_embeddings().weight[:, 0] += 0.01
        return model


def test_evaluate_agrees_with_training_and_with_xz(finished_run, export, dataset, tmp_path):
    """Run and export score what train.py logged; xz's figure is its own on the cleaned text."""
    summary = json.loads((finished_run / "summary.json").read_text())
    for name, extra in {
        "run": [finished_run],
        "export": [export, "--dataset", dataset, "--sequence_length", "64"],
    }.items():
        arguments = ["--model", *extra, "--compare_with_xz", "true", "--report", tmp_path / f"{name}.json"]
        output = script("evaluate.py", *arguments, "--prompt", "").stdout
        report = json.loads((tmp_path / f"{name}.json").read_text())
        assert report["loss"] == pytest.approx(summary["best_loss"], abs=1e-5)
        assert report["perplexity"] == pytest.approx(math.exp(summary["best_loss"]), rel=1e-4)
        assert "xz -9" in output and report["text"]
    tokenizer = AutoTokenizer.from_pretrained(dataset / "tokenizer")
    tokens = open_split(dataset, "validation")
    text = "\n".join(
        tokenizer.decode(tokens.read(a, b), skip_special_tokens=True)
        for a, b in zip(tokens.offsets[:-1], tokens.offsets[1:], strict=True)
    ).encode()
    documents = load_manifest(dataset)["splits"]["validation"]
    assert len(text) == documents["bytes"] + documents["documents"] - 1  # the decoded text is the cleaned text
    compressed = len(lzma.compress(text, preset=9))
    assert report["xz_bits_per_byte"] == pytest.approx(8 * compressed / len(text))


def test_an_evaluation_is_without_dropout():
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=50, n_positions=16, n_embd=16, n_layer=1, n_head=2, embd_pdrop=0.5))
    objective, ids = Objective(model).train(), torch.arange(32).reshape(2, 16)
    found = evaluate(Accelerator(cpu=True), objective, [{"targets": ids.flip(1), "input_ids": ids}] * 2)
    assert found.num_tokens == 64 and objective.training and model.training
    with torch.no_grad():
        logits = model.eval()(ids).logits
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids.flip(1).flatten())
    assert found.loss == pytest.approx(float(expected), rel=1e-6)


def test_of_a_long_prompt_the_end_counts(finished_run):
    """Reference: the likeliest token behind as much of the prompt's end as leaves one of the 64 positions free."""
    folder = finished_run / "checkpoints" / "last"
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    prompt = " ".join(f"word {number}" for number in range(100))
    end = tokenizer(prompt)["input_ids"][-63:]
    with torch.no_grad():
        token = int(model(torch.tensor([end])).logits[0, -1].argmax())
    text = generate_text(model, tokenizer, prompt, max_new_tokens=20, temperature=0, seed=0)
    assert text == tokenizer.decode([*end, token], skip_special_tokens=True)


@pytest.mark.parametrize(
    "template", [None, "$A", "<|endoftext|> $A", "$A <|endoftext|>", "<|endoftext|> $A <|endoftext|>"]
)
def test_a_text_file_is_encoded_as_a_document_of_a_dataset(template, dataset):
    """Reference: the encoder of prepare_data.py, with tokenizers that add eos in front, at the end, both or neither."""
    tokenizer = AutoTokenizer.from_pretrained(dataset / "tokenizer")
    if template is not None:
        special = [("<|endoftext|>", tokenizer.eos_token_id)]
        tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
            single=template, special_tokens=special
        )
    for text in ("A hacker is", " \n", "", "x", "naïve 東京\n\n", "one<|endoftext|>two", "it ends<|endoftext|>"):
        assert encode_documents([text], tokenizer)[0][0].tolist() == Encoder(tokenizer)([text])[0].tolist(), text


def test_evaluate_scores_a_text_file(export, tmp_path):
    """Reference: transformers' own loss on the same tokens in one row."""
    text = "A hacker is a person who enjoys the details of systems."
    (tmp_path / "note.txt").write_text(text)
    script("evaluate.py", "--model", export, "--text_file", tmp_path / "note.txt", "--report", tmp_path / "report.json")
    report = json.loads((tmp_path / "report.json").read_text())
    model, tokenizer = AutoModelForCausalLM.from_pretrained(export).eval(), AutoTokenizer.from_pretrained(export)
    ids = torch.tensor([[*tokenizer(text)["input_ids"], tokenizer.eos_token_id]])
    with torch.no_grad():
        loss = float(model(input_ids=ids, labels=ids).loss)
    assert report["loss"] == pytest.approx(loss, abs=1e-5)
    assert report["bits_per_byte"] == pytest.approx(loss * (ids.shape[1] - 1) / math.log(2) / len(text), rel=1e-5)


@pytest.mark.parametrize(
    ("name", "arguments", "expected"),
    [
        ("export.py", ["--checkpoint", "no/such"], "does not exist"),
        ("export.py", ["--checkpoint", "docs"], "is no run and no checkpoint"),
        ("evaluate.py", ["--model", "no/such"], "does not exist"),
        ("evaluate.py", ["--model", "docs"], "is no run and no checkpoint"),
        ("evaluate.py", ["--dataset", "a"], "dataset a does not exist"),
    ],
)
def test_mistakes_get_one_line(name, arguments, expected, tmp_path):
    output = ["--output", tmp_path / "x"] if name == "export.py" else []
    assert expected in error_line(name, *arguments, *output)


def test_train_mistakes_get_one_line_and_touch_nothing(dataset, tmp_path):
    (tmp_path / "occupied").mkdir()
    (tmp_path / "occupied" / "thesis.txt").write_text("years of work")
    (tmp_path / "file").write_text("a file")
    damaged = tmp_path / "damaged"
    shutil.copytree(dataset, damaged)
    (damaged / "train" / "data-00000-of-00001.arrow").write_bytes(b"garbage")
    cases = [
        ({"data.dataset": tmp_path / "nowhere"}, "does not exist; make it with: python prepare_data.py"),
        ({"data.dataset": tmp_path / "occupied"}, "is not a dataset folder"),
        ({"data.dataset": damaged}, "the train split cannot be read"),
        ({"output": tmp_path / "occupied"}, "not empty and not a run folder"),
        ({"output": tmp_path / "file"}, "cannot be made"),
        ({"model.pretrained": tmp_path / "nowhere"}, "no such folder"),
        ({"batch.per_device_batch_size": 3}, "1, 2, 4, 8 would fit"),
    ]
    for options, expected in cases:
        settings = SMALL | {"output": tmp_path / "run", "data.dataset": dataset} | options
        assert expected in error_line("train.py", *flags(settings))
        assert not (tmp_path / "run").exists()
    assert (tmp_path / "occupied" / "thesis.txt").read_text() == "years of work"
    assert len(list((tmp_path / "occupied").iterdir())) == 1


@pytest.fixture(scope="module")
def sharp(dataset):
    """A model of random weights whose logits spread by 3, with the sample's tokenizer."""
    tokenizer = AutoTokenizer.from_pretrained(dataset / "tokenizer")
    torch.manual_seed(0)
    options = {name.removeprefix("model."): value for name, value in SMALL.items() if name.startswith("model.")}
    model = build_model(ModelConfig(**options, tie_word_embeddings=False), tokenizer).eval()
    with torch.no_grad():
        model.get_input_embeddings().weight.normal_()
        model.get_output_embeddings().weight.normal_(std=3 / math.sqrt(options["hidden_size"]))
    return model, tokenizer


def sampled(sharp, temperature: float, seed: int = 0) -> tuple[torch.Tensor, float, float]:
    """The ids of a text, the mean surprise of its tokens, in nats, to the model itself, and how large that would be on
    average for tokens drawn at this temperature."""
    model, tokenizer = sharp
    outputs = []

    def generate(*arguments, **options) -> torch.Tensor:
        outputs.append(model.generate(*arguments, **options))
        return outputs[-1]

    text = generate_text(
        model, tokenizer, "A", max_new_tokens=60, temperature=temperature, seed=seed, generate=generate
    )  # fmt: skip
    (ids,) = outputs[0]
    assert text == tokenizer.decode(ids, skip_special_tokens=True)
    start = len(tokenizer("A")["input_ids"])
    with torch.no_grad():
        logits = model(input_ids=ids[None]).logits[0, start - 1 : -1].double()
    surprise = -logits.log_softmax(-1)
    chances, likeliest = logits.topk(50)  # transformers draws from so many
    chances = (chances / max(temperature, 1e-9)).softmax(-1)
    expected = (surprise.gather(1, likeliest) * chances).sum(-1)
    return ids, float(surprise.gather(1, ids[start:, None]).mean()), float(expected.mean())


def test_a_models_own_generation_settings_do_not_count(sharp):
    model, tokenizer = sharp
    ids, *_ = sampled(sharp, 1.0)
    mine = {"suppress_tokens": ids.tolist(), "return_dict_in_generate": True, "num_return_sequences": 3, "min_p": 0.9,
            "repetition_penalty": 9.0, "do_sample": True, "stop_strings": [tokenizer.decode(ids[1:2])], "max_time": 1e-9}  # fmt: skip
    before, model.generation_config = model.generation_config, GenerationConfig(**mine)
    try:
        assert sampled(sharp, 1.0)[0].tolist() == ids.tolist()
        assert model.generation_config.suppress_tokens == ids.tolist()
    finally:
        model.generation_config = before


def test_texts_are_drawn_at_their_temperature(sharp):
    """At zero and near zero the likeliest tokens; from there the tokens are as surprising as at their temperature."""
    greedy, surprise, _ = sampled(sharp, 0.0)
    model, tokenizer = sharp
    likeliest = tokenizer("A", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        while likeliest.shape[1] < len(greedy):  # a plain loop
            likeliest = torch.cat([likeliest, model(input_ids=likeliest).logits[:, -1:].argmax(-1)], 1)
    assert torch.equal(greedy, likeliest[0]) and torch.equal(sampled(sharp, 1e-3, seed=5)[0], greedy)
    means = [surprise]
    for temperature in (0.5, 1.0, 2.0):
        texts = [sampled(sharp, temperature, seed) for seed in range(4)]
        assert len({tuple(ids.tolist()) for ids, _, _ in texts}) == 4  # a text for each seed
        assert torch.equal(sampled(sharp, temperature, 3)[0], texts[3][0])  # the same one
        means.append(sum(found for _, found, _ in texts) / 4)
        assert means[-1] == pytest.approx(sum(expected for _, _, expected in texts) / 4, rel=0.1), temperature
    assert all(high > 1.15 * low for low, high in pairwise(means)), means


def test_evaluate_writes_at_the_temperature_and_seed_that_are_given(export, tmp_path):
    def text(*options: object) -> str:
        arguments = ["--model", export, "--prompt", "A", "--max_new_tokens", 20, "--report", tmp_path / "report.json"]
        code, out, err = call("evaluate.py", *arguments, *options)
        assert code == 0, err
        written = json.loads((tmp_path / "report.json").read_text())["text"]
        assert f"---\n{written}\n---" in out
        return written

    model, tokenizer = AutoModelForCausalLM.from_pretrained(export), AutoTokenizer.from_pretrained(export)

    def reference(seed: int, **options: object) -> str:
        torch.manual_seed(seed)
        ids = model.generate(**tokenizer("A", return_tensors="pt"), max_new_tokens=20, **options)
        return tokenizer.decode(ids[0], skip_special_tokens=True)

    likeliest = reference(0, do_sample=False)
    assert text("--temperature", 0) == text("--temperature", 0, "--seed", 7) == likeliest
    by_default, hot, other = text(), text("--temperature", 3, "--seed", 7), text("--seed", 7)
    assert by_default == reference(1234, do_sample=True, temperature=0.8)
    assert hot == reference(7, do_sample=True, temperature=3.0)
    assert other == reference(7, do_sample=True, temperature=0.8)
    assert len({likeliest, by_default, hot, other}) == 4
