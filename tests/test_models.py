"""Building a model: sizes, initial weights, vocabulary, adapters."""

import json
import math
import re
import shutil

import pytest
import torch
import transformers
from conftest import call, error_line, metrics
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, AutoModelForSeq2SeqLM, AutoTokenizer

from training.model import check_documents_stay_apart, describe_initialization
from utils.cli import UserError
from utils.config import SIZES, LoraConfig, ModelConfig, ObjectiveConfig
from utils.model.adapters import add_adapters, hash_weights
from utils.model.build import build_model, count_parameters
from utils.objectives import Objective

HEADS = {
    "llama": AutoModelForCausalLM, "gpt2": AutoModelForCausalLM, "bert": AutoModelForMaskedLM,
    "modernbert": AutoModelForMaskedLM, "t5": AutoModelForSeq2SeqLM,
}  # fmt: skip
# What each architecture calls the maps that write into the residual stream, and how many of them a stack has per block.
RESIDUAL = {
    "llama": (r"o_proj|down_proj", 2), "gpt2": (r"c_proj", 2),
    "bert": (r"(attention|\d)\.output\.dense", 2), "modernbert": (r"Wo", 2), "t5": (r"\.o|wo", None),
}  # fmt: skip


@pytest.fixture(scope="module")
def tokenizer(dataset):
    return AutoTokenizer.from_pretrained(dataset / "tokenizer")


def build(tokenizer, architecture: str, **options):
    torch.manual_seed(0)
    return build_model(ModelConfig(architecture=architecture, **options), tokenizer, HEADS[architecture])


@pytest.mark.parametrize("architecture", HEADS)
@pytest.mark.parametrize("initialization", ["normal", "gpt2"])
def test_initial_weights_have_the_spread_that_their_kind_asks_for(architecture, initialization, tokenizer):
    model = build(tokenizer, architecture, initialization=initialization)
    pattern, per_block = RESIDUAL[architecture]
    for name, values in model.named_parameters():
        expected_mean, expected_std = 0.0, 0.02
        if re.search(r"norm|ln_|LayerNorm|layer_norm", name):
            expected_mean, expected_std = (0.0 if name.endswith("bias") else 1.0), 0.0
        elif name.endswith("bias"):
            expected_std = 0.0
        elif initialization == "gpt2" and re.search(rf"({pattern})\.weight$", name):
            # T5: two such maps in a block of the encoder, three in one of the decoder.
            number = (per_block or (2 if name.startswith("encoder") else 3)) * model.config.num_hidden_layers
            expected_std = 0.02 / math.sqrt(number)
        # The mean of n values spreads by std / √n, their standard deviation by std / √(2 n): five times that.
        tolerance = 5 * expected_std / math.sqrt(values.numel())
        assert abs(values.mean() - expected_mean) <= tolerance + 1e-9, name
        assert abs(values.std() - expected_std) <= tolerance + 1e-9, name


@pytest.mark.parametrize("architecture", HEADS)
def test_the_architectures_own_initialization_is_transformers_own(architecture, tokenizer):
    model = build(tokenizer, architecture)
    torch.manual_seed(0)
    reference = HEADS[architecture].from_config(model.config)
    for (name, ours), theirs in zip(model.named_parameters(), reference.parameters(), strict=True):
        assert torch.equal(ours, theirs), name


@pytest.mark.parametrize("architecture", HEADS)
def test_one_value_sets_every_dropout(architecture, tokenizer):
    model = build(tokenizer, architecture, dropout=0.25)
    rates = {module.p for module in model.modules() if isinstance(module, torch.nn.Dropout)}
    assert rates <= {0.25}
    assert rates or (architecture == "llama" and model.config.attention_dropout == 0.25)


@pytest.mark.parametrize(
    ("architecture", "size", "millions"),  # as published; T5 and ModernBERT with their own vocabularies
    [("gpt2", "124m", 124.4), ("gpt2", "1.5b", 1557.6), ("bert", "base", 109.5), ("llama", "135m", 134.5),
     ("llama", "1b", 1235.8), ("llama", "7b", 6738.4), ("t5", "small", 60.5), ("modernbert", "base", 149.7)],
)  # fmt: skip
def test_sizes_have_the_published_number_of_parameters(architecture, size, millions, tokenizer):
    vocabulary = {"gpt2": 50257, "bert": 30522, "t5": 32128, "modernbert": 50368}.get(architecture, 32000)
    vocabulary = {"135m": 49152, "1b": 128256}.get(size, vocabulary)
    with torch.device("meta"):
        model = build_model(
            ModelConfig(
                architecture=architecture, size=size, vocabulary_multiple=vocabulary, tie_word_embeddings=size != "7b"
            ),
            tokenizer, HEADS[architecture],
        )  # fmt: skip
    assert count_parameters(model) / 1e6 == pytest.approx(millions, rel=2e-3)


def test_every_named_size_makes_a_model(tokenizer):
    for architecture, sizes in SIZES.items():
        for size in sizes:
            with torch.device("meta"):
                model = build(tokenizer, architecture, size=size)
            assert model.config.hidden_size == sizes[size][0]


def test_any_architecture_of_transformers_by_its_own_names(tokenizer):
    options = {"size": None, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    HEADS["qwen3"] = AutoModelForCausalLM
    model = build(tokenizer, "qwen3", **options, overrides={"head_dim": 32, "num_key_value_heads": 2})
    assert type(model).__name__ == "Qwen3ForCausalLM" and model.config.head_dim == 32
    check_documents_stay_apart(Objective(model))
    with pytest.raises(UserError, match=r"Qwen3Config has no head_dimension \(did you mean head_dim\?\)"):
        build(tokenizer, "qwen3", **options, overrides={"head_dimension": 32})
    HEADS["qwen33"] = AutoModelForCausalLM
    with pytest.raises(UserError, match=r"transformers has no qwen33 \(did you mean qwen3"):
        build(tokenizer, "qwen33", **options)


def test_a_model_that_mixes_packed_documents_is_found_out(tokenizer):
    HEADS["opt"] = AutoModelForCausalLM
    sizes = {"size": None, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    with pytest.raises(UserError, match="OPTForCausalLM does not keep the documents of a packed row apart"):
        check_documents_stay_apart(Objective(build(tokenizer, "opt", **sizes)))
    HEADS["eurobert"] = AutoModelForMaskedLM
    for architecture, chunked in (("bert", False), ("modernbert", False), ("eurobert", False), ("eurobert", True)):
        model = build(tokenizer, architecture, **(sizes if architecture == "eurobert" else {}))
        check_documents_stay_apart(Objective(model, ObjectiveConfig(name="masked"), chunked_head=chunked))
        with pytest.raises(UserError, match="apart"):  # without the objective's block mask
            check_documents_stay_apart(Objective(model, chunked_head=chunked))
    for positions in (2, 3, 17):  # the passes are as short as the model
        check_documents_stay_apart(Objective(build(tokenizer, "gpt2", max_position_embeddings=positions)))

    class OnlySingleRows(Objective):
        """As an attention does that finds packed documents at batch size 1 only."""

        def model_inputs(self, inputs):
            rows, columns = inputs["input_ids"].shape
            one_document = {"position_ids": torch.arange(columns).expand(rows, -1)} if rows > 1 else {}
            return super().model_inputs(inputs | one_document)

    with pytest.raises(UserError, match="apart"):
        check_documents_stay_apart(OnlySingleRows(build(tokenizer, "llama")))


def test_checkpointed_activations_give_the_same_gradients(tokenizer):
    ids = torch.arange(64)[None]
    gradients = []
    for checkpointing in (False, True):
        model = build(tokenizer, "llama", activation_checkpointing=checkpointing).train()
        Objective(model)(ids.flip(1), input_ids=ids).backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    assert all(torch.equal(one, other) for one, other in zip(*gradients, strict=True))


def test_a_pretrained_vocabulary_grows_with_the_tokenizer(dataset, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(dataset / "tokenizer")
    base = build(tokenizer, "llama")
    base.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    tokenizer.add_special_tokens({"mask_token": "<|mask|>"})
    options = {"pretrained": str(tmp_path), "vocabulary_multiple": 64}
    grown = build_model(ModelConfig(**options), tokenizer)
    rows = grown.get_input_embeddings().weight
    assert len(rows) == 2112 and grown.config.vocab_size == 2112  # 2048 + 1, in multiples of 64
    assert torch.equal(rows[:2048], base.get_input_embeddings().weight)
    with pytest.raises(UserError, match="adapters do not train the embedding"):
        build_model(ModelConfig(**options, lora=LoraConfig(rank=4)), tokenizer)
    other = AutoTokenizer.from_pretrained(dataset / "tokenizer")
    other.add_tokens(["something"])
    other.save_pretrained(tmp_path)
    with pytest.raises(UserError, match="was trained with another tokenizer"):
        build_model(ModelConfig(**options), tokenizer)


def test_adapters_train_alone_are_saved_resumed_and_merged_on_export(dataset, finished_run, tmp_path):
    base, output, merged = tmp_path / "base", tmp_path / "run", tmp_path / "merged"
    assert call("export.py", "--checkpoint", finished_run, "--output", base)[0] == 0
    settings = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(settings | {"attention_dropout": 0.5}))  # the run's own is 0
    options = [
        "--data.dataset", dataset, "--data.sequence_length", "64", "--model.pretrained", base, "--model.lora.rank", "4",
        "--output", output, "--schedule.max_steps", "6", "--schedule.warmup_steps", "1", "--tracking.trackers", "[]",
        "--tracking.sample_every_steps", "0", "--tracking.log_every_steps", "1", "--optimizer.learning_rate", "0.01",
        "--checkpoint.every_steps", "3", "--evaluation.every_steps", "6",
    ]  # fmt: skip
    assert call("train.py", *options)[0] == 0
    whole = metrics(output)
    checkpoint = output / "checkpoints" / "step-00000006"
    assert (checkpoint / "adapter_model.safetensors").stat().st_size < 100_000
    assert not (checkpoint / "model.safetensors").exists()

    last = (checkpoint / "optimizer.safetensors").read_bytes()
    shutil.rmtree(checkpoint)
    assert call("train.py", *options, "--checkpoint.resume", "auto")[0] == 0
    again = (checkpoint / "optimizer.safetensors").read_bytes()
    assert [item["train/loss"] for item in metrics(output) if "train/loss" in item] == [
        item["train/loss"] for item in whole if "train/loss" in item
    ]
    assert last == again

    weights = (base / "model.safetensors").read_bytes()
    (base / "model.safetensors").write_bytes(weights[:-4] + b"\0\0\0\1")
    hash_weights.cache_clear()
    assert "whose weights have changed since" in error_line("export.py", "--checkpoint", output, "--output", merged)
    (base / "model.safetensors").write_bytes(weights)
    hash_weights.cache_clear()
    code, out, _ = call("export.py", "--checkpoint", output, "--output", merged)
    assert code == 0 and "opens with AutoModelForCausalLM" in out
    # Rounding, and so not nothing: what is merged was compared with what was not.
    assert 0 < json.loads((merged / "export_report.json").read_text())["max_logit_difference_of_merging"] < 1e-4
    before, after = (AutoModelForCausalLM.from_pretrained(folder) for folder in (base, merged))
    changed = {
        name for (name, old), new in zip(before.named_parameters(), after.parameters(), strict=True)
        if not torch.equal(old, new)
    }  # fmt: skip
    assert changed and all(name.endswith("proj.weight") for name in changed)


def test_adapters_have_the_scale_that_is_asked_for(tokenizer):
    model = build(tokenizer, "llama")
    model.config.architectures = [type(model).__name__]
    layer = add_adapters(model, LoraConfig(rank=4, alpha=12.0)).base_model.model.model.layers[0].self_attn.q_proj
    inner, outer = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    nn.init.normal_(outer)
    values = torch.randn(5, inner.shape[1])
    expected = layer.base_layer(values) + 12 / 4 * values @ inner.T @ outer.T
    torch.testing.assert_close(layer(values), expected, rtol=1e-5, atol=1e-5)


def test_mistakes_are_named(dataset, tmp_path):
    common = ["--data.dataset", dataset, "--output", tmp_path / "run"]
    line = error_line("train.py", *common, "--model.size", "huge")
    assert "model.architecture llama has no size huge; it has tiny, 135m, 1b, 7b" in line
    line = error_line("train.py", *common, "--model.lora.rank", "4")
    assert "model.lora.rank" in line and "model.pretrained" in line
    line = error_line("train.py", *common, "--model.num_attention_heads", "8", "--model.size", "135m",
                      "--model.overrides", "{num_key_value_heads: 3}")  # fmt: skip
    assert "3 key-value heads do not divide 8 attention heads" in line
    line = error_line("train.py", *common, "--model.architecture", "qwen3")
    assert "give model.size null and the sizes one by one" in line


@pytest.mark.parametrize(
    ("architecture", "overrides", "words"),
    [
        ("llama", {"num_key_value_heads": 0}, "num_key_value_heads is 0; it must be 1 or more"),
        ("llama", {"head_dim": -2}, "head_dim is -2; it must be 1 or more"),
        ("gpt2", {"n_embd": 0}, "n_embd is 0; it must be 1 or more"),
        ("llama", {"attention_dropout": -0.5}, "attention_dropout is -0.5; it must be >= 0 and < 1"),
        ("t5", {"num_heads": 0}, "num_heads is 0; it must be 1 or more"),
        ("llama", {"rope_parameters": {"rope_typ": "linear", "factor": 2.0}}, "'rope_typ'"),
        ("llama", {"rope_parameters": {"rope_type": "linaer", "rope_theta": 1e4}}, "linaer"),
        ("llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 0.5}}, "got 0.5"),
        ("llama", {"hidden_act": "sulu"}, "hidden_act cannot be 'sulu' (did you mean silu?)"),
        ("gpt2", {"activation_function": "gelu_newer"}, "activation_function cannot be 'gelu_newer' (did you mean"),
        ("t5", {"feed_forward_proj": "gated-gelo"}, "feed_forward_proj cannot be 'gated-gelo'"),
    ],
)
def test_mistakes_in_overrides_are_named(architecture, overrides, words, tokenizer, capfd):
    with pytest.raises(UserError, match=re.escape(words)):
        build(tokenizer, architecture, overrides=overrides)
    assert capfd.readouterr().err == ""  # transformers' own warnings


def test_mistakes_in_nested_configurations_are_named(tokenizer):
    HEADS["llava"] = transformers.AutoModelForImageTextToText
    for inner, words in {"hidden_siz": "text_config: LlamaConfig has no hidden_siz", "hidden_size": "is 0"}.items():
        with torch.device("meta"), pytest.raises(UserError, match=words):  # if it is not refused, it has no 7 billion
            build(tokenizer, "llava", size=None, overrides={"text_config": {inner: 0}})


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "t5"])
def test_the_line_on_initial_weights_has_the_figures_of_each_kind(architecture, tokenizer):
    """Against all numbers of a kind in one array, the kinds told apart by their names; one is shifted to be seen."""
    model = build(tokenizer, architecture, initialization="gpt2", hidden_size=64, num_hidden_layers=2)
    with torch.no_grad():
        model.get_input_embeddings().weight.add_(0.5)
    pattern, found = RESIDUAL[architecture][0], {}
    for name, values in model.named_parameters():
        kind = next(kind for kind, part in [
            ("bias", r"bias$"), ("norm", r"norm|ln_"), ("residual projection", rf"({pattern})\.weight$"),
            ("embedding", r"embed|wte|wpe|shared|relative_attention"), ("linear", ""),
        ] if re.search(part, name))  # fmt: skip
        found.setdefault(kind, []).append(values.detach().double().flatten())
    line = describe_initialization(model)
    said = {kind: (float(mean), float(std)) for kind, mean, std in re.findall(r"([a-z ]+) (-?[\d.]+) ± ([\d.]+)", line)}
    expected = {kind: torch.cat(values) for kind, values in found.items()}
    assert {kind.strip() for kind in said} == expected.keys()
    for kind, (mean, std) in said.items():
        values = expected[kind.strip()]
        assert mean == pytest.approx(float(values.mean()), abs=6e-4), kind
        assert std == pytest.approx(float(values.std(correction=0)), abs=6e-5), kind
