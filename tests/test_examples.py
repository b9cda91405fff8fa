"""The side tools, on the recipe of a small run."""

import ast
import itertools
import json
import re

import gguf
import numpy as np
import pytest
import torch
from conftest import ROOT, script
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from utils.data.token_dataset import open_split


def test_every_example_is_run_by_a_test():
    """By its name as a string, as a script is started here; the Makefile's are run by the README's test."""
    tests = [ast.parse(path.read_text(encoding="utf-8")) for path in (ROOT / "tests").glob("*.py")]
    strings = {node.value for tree in tests for node in ast.walk(tree) if isinstance(node, ast.Constant)}
    words = strings | set((ROOT / "Makefile").read_text(encoding="utf-8").split())
    assert [path.name for path in (ROOT / "examples").glob("*.py") if f"examples/{path.name}" not in words] == []


def test_the_range_test_finds_a_learning_rate_between_too_low_and_too_high(finished_run, tmp_path):
    plot = tmp_path / "plot.png"
    output = script(
        "examples/lr_range_test.py", "--recipe", finished_run / "config.yaml", "--num_steps", "60", "--plot", plot,
        "--max_learning_rate", "10",
    ).stdout  # fmt: skip
    loss, lowest = map(float, re.search(r"lowest smoothed loss ([\d.]+) at (\S+);", output).groups())
    first = float(re.search(r"smoothed loss ([\d.]+)", output)[1])
    assert loss < first - 0.3 and 1e-4 < lowest < 1 and plot.stat().st_size > 10_000


def test_the_micro_batch_finder_tries_what_divides_the_global_batch(finished_run):
    output = script("examples/find_micro_batch.py", "--recipe", finished_run / "config.yaml", "--repeats", "1").stdout
    tried = [int(size) for size in re.findall(r"^ +(\d+): [\d.]+ s per step", output, re.M)]
    assert tried == [1, 2, 4, 8]
    assert int(re.search(r"fastest: --batch.per_device_batch_size (\d+)", output)[1]) in tried


def test_the_bigram_baseline_is_the_one_counted_by_hand(finished_run, dataset):
    output = script("examples/baselines.py", "--run", finished_run).stdout
    counts: dict[int, dict[int, int]] = {}
    unigram = np.ones(2048)
    pairs = {}
    for split in ("train", "validation"):
        tokens = open_split(dataset, split)
        bounds = tokens.offsets.tolist()
        documents = [tokens.read(start, stop).tolist() for start, stop in itertools.pairwise(bounds)]
        pairs[split] = [pair for ids in documents for pair in itertools.pairwise(ids)]
    for left, right in pairs["train"]:
        unigram[right] += 1
        row = counts.setdefault(left, {})
        row[right] = row.get(right, 0) + 1
    unigram /= unigram.sum()
    totals = {left: sum(row.values()) for left, row in counts.items()}

    def loss(strength):
        return -np.mean([
            np.log((counts.get(left, {}).get(right, 0) + strength * unigram[right]) / (totals.get(left, 0) + strength))
            for left, right in pairs["validation"]
        ])  # fmt: skip

    assert f"bigram       {min(map(loss, (30.0, 100.0, 300.0))):.4f}" in output
    assert f"unigram      {-np.mean([np.log(unigram[right]) for _, right in pairs['validation']]):.4f}" in output
    best = json.loads((finished_run / "summary.json").read_text())["best_loss"]
    assert f"this run     {best:.4f}" in output


def write_gguf(model, tokenizer, path, quantization):
    """A Llama as llama.cpp lays it out: its names, q and k permuted for its rotary embedding; matrices quantised."""
    config, writer = model.config, gguf.GGUFWriter(path, "llama")
    writer.add_name("tiny")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_vocab_size(config.vocab_size)
    description = json.loads(tokenizer.backend_tokenizer.to_str())
    entries = tokenizer.convert_ids_to_tokens(range(config.vocab_size))
    special = set(tokenizer.all_special_ids)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(entries)
    writer.add_token_types([3 if number in special else 1 for number in range(len(entries))])
    writer.add_token_merges([" ".join(pair) for pair in description["model"]["merges"]])
    writer.add_bos_token_id(tokenizer.bos_token_id)
    writer.add_eos_token_id(tokenizer.eos_token_id)
    writer.add_add_bos_token(True)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight":
            continue  # tied
        values = tensor.numpy()
        heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(name.split(".")[-2])
        if heads:
            values = values.reshape(heads, 2, -1, values.shape[1]).swapaxes(1, 2).reshape(values.shape)
        kind = quantization if values.ndim == 2 else gguf.GGMLQuantizationType.F32
        writer.add_tensor(
            names.get_name(name, (".weight",)), gguf.quants.quantize(np.ascontiguousarray(values), kind), raw_dtype=kind
        )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize(("quantization", "error"), [("F32", 1e-5), ("Q8_0", 0.1)])
def test_a_model_in_gguf_keeps_its_logits_and_token_ids(dataset, quantization, error, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(dataset / "tokenizer")
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, tie_word_embeddings=True, initializer_range=0.2,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=None,
    )).eval()  # fmt: skip
    write_gguf(model, tokenizer, tmp_path / "tiny.gguf", gguf.GGMLQuantizationType[quantization])
    output = script("examples/import_gguf.py", tmp_path / "tiny.gguf", tmp_path / "models" / "tiny").stdout
    assert f"LlamaForCausalLM, {model.num_parameters():,} parameters" in output

    text = "A hacker is someone who enjoys 1,024 bits — or so it's said.\n\n  Really?"
    imported = AutoTokenizer.from_pretrained(tmp_path / "models" / "tiny")
    assert imported(text)["input_ids"] == tokenizer(text)["input_ids"]
    assert imported.eos_token == tokenizer.eos_token
    ids = torch.tensor([tokenizer(text)["input_ids"]])
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "models" / "tiny")
    with torch.no_grad():
        expected, found = model(ids).logits, again(ids).logits
    assert (found - expected).abs().max() < error * expected.abs().max(), (found - expected).abs().max()
