"""Every fast part of a step against its plain twin."""

import copy
import itertools
import json
import re
import shutil
import sys
import types

import pytest
import torch
import torch.nn.functional as F
from conftest import SMALL, call, flags, metrics, run, train, train_losses
from torch import nn
from torch._dynamo.testing import EagerAndRecordGraphs
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, AutoModelForMaskedLM
from transformers.activations import NewGELUActivation

from training.hardware import resolve_matmul_precision
from utils.cli import UserError
from utils.config import KernelConfig, ObjectiveConfig
from utils.data.packing import IGNORED
from utils.kernels import FastDropout, use_kernels
from utils.kernels.attention import blocked_attention, sdpa_attention_forward
from utils.kernels.head_loss import _compiled_score, _HeadLoss, head_loss, rows_at_once
from utils.objectives import Objective, build_objective, has_linear_head

CPU = torch.device("cpu")
PLAIN = KernelConfig(chunked_head=False, fused_activation=False, fast_dropout=False)
ARCHITECTURES = {
    "gpt2": {"n_embd": 64, "n_layer": 2, "n_head": 4, "resid_pdrop": 0, "embd_pdrop": 0, "attn_pdrop": 0},
    "llama": {"num_key_value_heads": 4},
    "qwen3": {"num_key_value_heads": 2, "head_dim": 16},
    "gpt_neox": {},
    "mistral": {"num_key_value_heads": 2, "sliding_window": 100, "head_dim": 16},
    "gemma2": {"num_key_value_heads": 2, "head_dim": 16, "sliding_window": 100},
    "bert": {"hidden_dropout_prob": 0, "attention_probs_dropout_prob": 0},
    "gemma": {"num_key_value_heads": 2, "head_dim": 16},
    "modernbert": {"local_attention": 20},
    "eurobert": {"num_key_value_heads": 2, "mask_token_id": 5},
    "gpt_oss": {"num_key_value_heads": 2, "head_dim": 16, "num_local_experts": 2, "num_experts_per_tok": 1},
}
ENCODERS = ("bert", "modernbert", "eurobert")
SIZES = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 96}


def build(architecture: str, **changes):
    torch.manual_seed(3)
    sizes = {} if architecture == "gpt2" else SIZES
    special = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
    options = sizes | ARCHITECTURES.get(architecture, {}) | special | changes
    config = CONFIG_MAPPING[architecture](vocab_size=101, max_position_embeddings=512, **options)
    auto_model = AutoModelForMaskedLM if architecture in ENCODERS else AutoModelForCausalLM
    return auto_model.from_config(config, dtype=torch.float32).train()


def gradients(loss: torch.Tensor, model: nn.Module) -> list[torch.Tensor]:
    found = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
    return [torch.zeros(()) if gradient is None else gradient for gradient in found]


def largest_difference(found: list[torch.Tensor], expected: list[torch.Tensor]) -> float:
    """Of all numbers, relative to the largest of their tensor."""
    pairs = zip(found, expected, strict=True)
    return max(float((left - right).abs().max() / right.abs().max().clamp(min=1e-12)) for left, right in pairs)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("smoothing", "z_loss"), [(0.0, 0.0), (0.1, 0.0), (0.0, 1e-2), (0.1, 1e-2)])
def test_the_chunked_head_has_the_loss_and_the_gradients_of_all_logits(bias, smoothing, z_loss, monkeypatch):
    monkeypatch.setattr("utils.kernels.head_loss.LOGITS_AT_ONCE", 101 * 64)  # five chunks, the last one short
    torch.manual_seed(0)
    head = nn.Linear(32, 101, bias=bias).double()
    hidden = torch.randn(300, 32, dtype=torch.double, requires_grad=True)
    targets = torch.randint(0, 101, (300,))
    targets[::7] = IGNORED
    logits = head(hidden)
    expected = F.cross_entropy(logits, targets, reduction="sum", label_smoothing=smoothing)
    expected = expected + z_loss * logits[targets != IGNORED].logsumexp(-1).square().sum()
    wanted = torch.autograd.grad(expected / 2, [hidden, *head.parameters()])

    head, near = head.float(), hidden.detach().float().requires_grad_()
    loss = head_loss(near, head, targets, label_smoothing=smoothing, z_loss=z_loss)
    found = torch.autograd.grad(loss / 2, [near, *head.parameters()])
    assert float(loss.detach()) == pytest.approx(float(expected.detach()), rel=1e-6)
    assert largest_difference(list(found), [gradient.float() for gradient in wanted]) < 1e-5
    with torch.no_grad():
        assert float(head_loss(near, head, targets, label_smoothing=smoothing, z_loss=z_loss)) == float(loss)


def test_under_autocast_the_chunked_head_keeps_its_loss_and_the_weights_gradient_in_fp32():
    torch.manual_seed(0)
    head = nn.Linear(64, 500, bias=False)
    hidden, targets = torch.randn(256, 64, requires_grad=True), torch.randint(0, 500, (256,))
    exact = F.cross_entropy(head(hidden), targets, reduction="sum")
    wanted = torch.autograd.grad(exact, [hidden, head.weight])
    with torch.autocast("cpu", torch.bfloat16):
        loss = head_loss(hidden, head, targets)
    found = torch.autograd.grad(loss, [hidden, head.weight])
    assert loss.dtype == found[1].dtype == torch.float32
    assert float(loss.detach()) == pytest.approx(float(exact.detach()), rel=1e-3)
    assert largest_difference(list(found), list(wanted)) < 2e-2


HEADS = {"gpt2": True, "llama": True, "qwen3": True, "gemma2": False, "cohere": False, "granite": False, "bert": False}


@pytest.mark.parametrize("architecture", HEADS)
def test_a_head_that_is_more_than_a_linear_map_is_found_with_and_without_weights(architecture):
    """Gemma 2 bends its logits, Cohere and Granite scale them, BERT has layers in between."""
    changes = {"logits_scaling": 8.0} if architecture == "granite" else {}
    assert has_linear_head(build(architecture, **changes)) == HEADS[architecture]
    with torch.device("meta"):
        planned = build(architecture, **changes)
    objective = build_objective(planned, ObjectiveConfig(), "auto", KernelConfig(), CPU)
    assert objective.chunked_head == HEADS[architecture]


def test_blocked_attention_that_a_model_does_not_take_is_refused():
    with pytest.raises(UserError, match="has its own attention"):
        use_kernels(build("gpt_oss"), "blocked", KernelConfig(), CPU)


@pytest.mark.parametrize("shape", [(3, 1, 1, 300), (3, 1, 300, 300)])
@pytest.mark.parametrize("kind", [torch.bool, torch.float32])
def test_masks_of_every_form_are_those_of_sdpa(shape, kind):
    torch.manual_seed(0)
    module, mask = nn.Module(), torch.rand(shape) > 0.3
    module.is_causal = False
    if kind == torch.float32:
        mask = torch.where(mask, 0.0, torch.finfo(kind).min)
    tensors = [torch.randn(3, 4, 300, 8, requires_grad=True) for _ in range(3)]
    both = (blocked_attention, sdpa_attention_forward)
    found, expected = (attention(module, *tensors, mask)[0] for attention in both)
    assert float((found - expected).detach().abs().max()) < 1e-5


def packed_rows() -> tuple[torch.Tensor, torch.Tensor, list[tuple[int, int, int]]]:
    """ids and position_ids (3, 300), and the documents: (row, start, end)."""
    torch.manual_seed(1)
    ids, positions = torch.randint(0, 101, (3, 300)), torch.arange(300)[None].repeat(3, 1)
    documents = [(0, 0, 300), (1, 0, 128), (1, 128, 300), (2, 0, 5), (2, 5, 290), (2, 290, 300)]
    for row, start, end in documents:
        positions[row, start:end] = torch.arange(end - start)
    return ids, positions, documents


@pytest.mark.parametrize("attention", ["auto", "blocked", "sdpa", "eager"])
@pytest.mark.parametrize("architecture", ["gpt2", "llama", "qwen3", "gpt_neox", "mistral"])
def test_every_attention_keeps_packed_documents_apart_exactly(architecture, attention):
    """Logits and gradients are those of each document alone, by plain matrix products."""
    ids, positions, documents = packed_rows()
    reference = build(architecture)
    reference.set_attn_implementation("eager")
    alone = torch.zeros(3, 300, 101)
    for row, start, end in documents:
        alone[row, start:end] = reference(input_ids=ids[row : row + 1, start:end], use_cache=False).logits[0]
    model = build(architecture)
    if attention in ("sdpa", "eager"):
        model.set_attn_implementation(attention)
    use_kernels(model, attention, KernelConfig(), CPU)
    assert model.config._attn_implementation == ("blocked" if attention == "auto" else attention)
    packed = model(input_ids=ids, position_ids=positions, use_cache=False).logits
    assert float((packed - alone).abs().max()) < 1e-5
    loss, expected = (logits.logsumexp(-1).square().sum() for logits in (packed, alone))
    assert largest_difference(gradients(loss, model), gradients(expected, reference)) < 1e-4


@pytest.mark.parametrize(
    ("name", "architecture"),
    [
        *itertools.product(["masked"], ENCODERS),
        *itertools.product(["causal"], ["gpt2", "llama", "gemma", "qwen3"]),
        *itertools.product(["fill_in_the_middle", "instruction"], ["llama"]),
    ],
)
def test_the_loss_of_packed_documents_is_that_of_each_alone_with_every_kernel(name, architecture):
    """In training and in evaluation, by the chunked head and by all logits; alone by transformers' own loss."""
    ids, positions, documents = packed_rows()
    targets = ids.masked_fill(torch.rand(ids.shape, generator=torch.Generator().manual_seed(2)) < 0.5, IGNORED)
    heads = set()
    for attention, chunked in itertools.product(["auto", "sdpa", "eager"], [True, False]):
        model = build(architecture, initializer_range=0.2)
        reference = copy.deepcopy(model)
        reference.set_attn_implementation("eager")
        expected = 0.0
        for row, start, end in documents:
            place = slice(row, row + 1), slice(start, end)
            logits = reference(input_ids=ids[place], use_cache=False).logits
            expected += F.cross_entropy(logits.flatten(0, 1), targets[place].flatten(), reduction="sum")
        wanted = torch.cat([gradient.flatten() for gradient in gradients(expected, reference)])
        if attention in ("sdpa", "eager"):
            model.set_attn_implementation(attention)
        kernels = KernelConfig(chunked_head=chunked)
        objective = build_objective(model, ObjectiveConfig(name=name), attention, kernels, CPU)
        heads.add(objective.chunked_head)
        loss = objective(targets, input_ids=ids, position_ids=positions)
        with torch.no_grad():
            evaluated = objective.eval()(targets, input_ids=ids, position_ids=positions)
        assert float(loss.detach()) == pytest.approx(float(expected.detach()), rel=1e-5)
        assert float(evaluated) == pytest.approx(float(expected.detach()), rel=1e-5)
        found = torch.cat([gradient.flatten() for gradient in gradients(loss, model)])
        assert float((found - wanted).abs().max() / wanted.abs().max()) < 1e-5
    assert heads == ({False} if architecture in ("bert", "modernbert") else {True, False})


@pytest.mark.parametrize("architecture", ["eurobert", "llama"])
def test_evaluate_py_scores_packed_rows_as_the_run_did(architecture, small_dataset, tmp_path):
    name = "masked" if architecture in ENCODERS else "causal"
    options = {"data__dataset": small_dataset, "model__architecture": architecture, "model__size": "null"}
    options |= {"objective__name": name, "optimizer__learning_rate": 0.03}
    train(tmp_path / "run", **options)
    assert "head chunked" in (tmp_path / "run" / "training.log").read_text()
    code, _, err = call("evaluate.py", "--model", tmp_path / "run", "--report", tmp_path / "report.json")
    assert code == 0, err
    scored = json.loads((tmp_path / "report.json").read_text())["loss"]
    assert scored == pytest.approx(json.loads((tmp_path / "run" / "summary.json").read_text())["eval_loss"], rel=1e-6)


def test_queries_and_values_of_two_widths_and_a_mask_that_is_learned():
    """As in DeepSeek's latent attention, and in Doge."""
    torch.manual_seed(0)
    module = nn.Module()
    module.is_causal = True
    shapes = [(2, 4, 150, 24), (2, 4, 150, 24), (2, 4, 150, 16)]
    tensors = [torch.randn(shape, requires_grad=True) for shape in shapes]
    mask = torch.randn(2, 4, 150, 150).requires_grad_()
    for inputs, given in ((tensors, None), ([*tensors, mask], mask)):
        pair = []
        for attention in (blocked_attention, sdpa_attention_forward):
            output, _ = attention(module, *tensors, given)
            assert output.is_contiguous()
            pair.append([output, *torch.autograd.grad(output.square().sum(), inputs)])
        assert largest_difference(*pair) < 1e-5


@pytest.mark.parametrize("architecture", ["llama", "bert", "modernbert", "gpt_oss", "gemma2"])
def test_blocked_attention_is_the_default_one_under_padding(architecture):
    ids, _, _ = packed_rows()
    mask = torch.ones_like(ids)
    mask[1, 200:], mask[2, :50] = 0, 0
    plain, fast = build(architecture), build(architecture)
    before = plain.config._attn_implementation
    use_kernels(fast, "auto", KernelConfig(), CPU)
    assert fast.config._attn_implementation == ("blocked" if before == "sdpa" else before)
    for model in (plain, fast):
        model.eval()
    logits, expected = (model(input_ids=ids, attention_mask=mask).logits for model in (fast, plain))
    assert float(((logits - expected) * mask[..., None]).abs().max()) < 1e-5


@pytest.mark.parametrize("spread", [1, 5])
def test_under_autocast_blocked_attention_is_as_exact_as_eager_attention(spread):
    """Also for scores that are not tiny, where `sdpa`, which does not round them, is more exact than both."""
    model = build("llama")
    for layer in model.model.layers:
        layer.self_attn.q_proj.weight.data *= 50 * spread
    ids, positions, _ = packed_rows()
    errors = {}
    for attention in ("eager", "blocked"):
        model.set_attn_implementation("eager")
        exact = model(input_ids=ids, position_ids=positions, use_cache=False).logits
        model.set_attn_implementation(attention)
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(input_ids=ids, position_ids=positions, use_cache=False).logits
        errors[attention] = float((logits - exact).detach().abs().mean())
    assert 0 < errors["blocked"] < 1.5 * errors["eager"]


@pytest.mark.parametrize("architecture", ["gpt2", "llama", "bert"])
def test_under_autocast_the_loss_is_fp32_and_has_gradients(architecture):
    ids, positions, _ = packed_rows()
    objective = build_objective(build(architecture), ObjectiveConfig(), "auto", KernelConfig(), CPU).train()
    with torch.autocast("cpu", torch.bfloat16):
        loss = objective(ids.roll(-1, 1), input_ids=ids, position_ids=positions)
    loss.backward()
    assert loss.dtype == torch.float32
    assert all(parameter.grad is None or parameter.grad.isfinite().all() for parameter in objective.parameters())


def test_the_heads_gradients_stay_finite_under_fp16_before_they_are_scaled():
    """One frequent token and large hidden states: its row of the weight's gradient is beyond fp16 until it is scaled."""
    torch.manual_seed(0)
    head, targets = nn.Linear(64, 500, bias=False), torch.zeros(4096, dtype=torch.long)
    hidden = (150 * torch.rand(4096, 64)).requires_grad_()
    with torch.autocast("cpu", torch.float16):
        loss = head_loss(hidden, head, targets)
    (loss / 4096).backward()
    assert head.weight.grad.isfinite().all() and hidden.grad.isfinite().all()
    assert float(head.weight.grad.abs().max()) * 4096 > torch.finfo(torch.float16).max  # or this shows nothing


def test_blocked_attention_generates_the_same_text():
    ids = packed_rows()[0][:1, :10]
    plain, fast = build("llama"), build("llama")
    use_kernels(fast, "blocked", KernelConfig(), CPU)
    options = {"max_new_tokens": 20, "do_sample": False, "attention_mask": torch.ones_like(ids)}
    assert torch.equal(fast.eval().generate(ids, **options), plain.eval().generate(ids, **options))


def test_fast_dropout_keeps_its_share_and_repeats_after_a_seed():
    dropout, ones = FastDropout(0.1).train(), torch.ones(1000, 1003, requires_grad=True)
    torch.manual_seed(5)
    values = dropout(ones)
    dropped = float((values == 0).float().mean())
    assert abs(dropped - 0.1) < 5 * (0.09 / ones.numel()) ** 0.5  # five standard deviations
    assert float(values.max()) == pytest.approx(1 / 0.9, rel=1e-4)
    values.sum().backward()
    assert torch.equal(ones.grad, values.detach())  # the same numbers are dropped on the way back
    torch.manual_seed(5)
    assert torch.equal(dropout(ones), values)
    assert not torch.equal(dropout(ones), values)
    neighbours = (values == 0).float().flatten()
    together = float((neighbours[1:] * neighbours[:-1]).mean())  # four numbers share one draw, and not their fate
    assert abs(together - 0.01) < 5 * (0.01 / ones.numel()) ** 0.5
    assert torch.equal(dropout.eval()(ones), ones)
    assert torch.equal(FastDropout(0.0).train()(ones), ones) and not FastDropout(1.0).train()(ones).any()


def test_gradients_are_right_under_activation_checkpointing_with_dropout_in_attention_and_layers():
    ids, positions, _ = packed_rows()
    drop = {"resid_pdrop": 0.2, "embd_pdrop": 0.2, "attn_pdrop": 0.2}
    found = []
    for checkpointed in (False, True):
        objective = build_objective(build("gpt2", **drop), ObjectiveConfig(), "auto", KernelConfig(), CPU).train()
        assert any(isinstance(module, FastDropout) for module in objective.modules())
        if checkpointed:
            objective.model.activation_checkpointing_enable({"use_reentrant": False})
        torch.manual_seed(7)
        loss = objective(ids.flip(1), input_ids=ids, position_ids=positions)
        found.append((float(loss.detach()), gradients(loss, objective)))
    assert found[0][0] == found[1][0]
    assert largest_difference(found[1][1], found[0][1]) < 1e-6


def test_dropout_in_blocked_attention_has_the_gradient_of_what_it_computed():
    """By differences: with one seed the dropped numbers are the same, so the function is smooth."""
    torch.manual_seed(0)
    module = nn.Module()
    module.is_causal = True
    tensors = [
        torch.randn(2, 4, 150, 8, requires_grad=True),
        *(torch.randn(2, 2, 150, 8, requires_grad=True) for _ in "kv"),
    ]
    weights = torch.randn(2, 150, 4, 8)

    def value(*inputs: torch.Tensor) -> torch.Tensor:
        torch.manual_seed(1)
        return (blocked_attention(module, *inputs, None, dropout=0.3)[0] * weights).double().sum()

    found = torch.autograd.grad(value(*tensors), tensors)
    for index, gradient in enumerate(found):
        direction = torch.randn_like(tensors[index])
        ends = []
        for sign in (1, -1):
            moved = list(tensors)
            moved[index] = tensors[index] + sign * 1e-2 * direction
            ends.append(float(value(*moved)))
        expected = float((gradient * direction).sum())
        assert (ends[0] - ends[1]) / 2e-2 == pytest.approx(expected, rel=2e-2, abs=1e-2)


def test_the_fused_activation_is_the_same_function():
    model = build("gpt2")
    before = [module for module in model.modules() if isinstance(module, NewGELUActivation)]
    values = torch.randn(10_000) * 3
    expected = before[0](values)
    use_kernels(model, "eager", KernelConfig(), CPU)
    assert not [module for module in model.modules() if isinstance(module, NewGELUActivation)]
    assert torch.allclose(model.transformer.h[0].mlp.act(values), expected, atol=1e-6)
    plain = build("gpt2")
    use_kernels(plain, "eager", PLAIN, CPU)
    assert [module for module in plain.modules() if isinstance(module, NewGELUActivation)]


@pytest.mark.parametrize("config", [ObjectiveConfig(), ObjectiveConfig(label_smoothing=0.1, z_loss=1e-2)])
def test_the_objectives_loss_and_gradients_are_those_of_the_plain_one(config):
    ids, positions, _ = packed_rows()
    found = []
    for attention, options in (("auto", KernelConfig()), ("sdpa", PLAIN)):
        objective = build_objective(build("gpt2"), config, attention, options, CPU).train()
        assert objective.chunked_head == options.chunked_head
        loss = objective(ids.roll(-1, 1), input_ids=ids, position_ids=positions)
        found.append((float(loss.detach()), gradients(loss, objective)))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-6)
    assert largest_difference(found[0][1], found[1][1]) < 1e-5
    assert not Objective(build("gpt2")).chunked_head  # whoever makes one without asking gets the plain loss


PLAIN_OPTIONS = {
    "model__attention": "eager", "kernels__chunked_head": False, "kernels__fused_activation": False,
    "kernels__fast_dropout": False, "matmul_precision": "highest",
}  # fmt: skip


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_steps_on_the_fast_path_are_those_on_the_plain_one(architecture, dataset, tmp_path):
    options = {"data__dataset": dataset, "model__architecture": architecture, "schedule__max_steps": 25}
    fast = train_losses(train(tmp_path / "fast", **options))
    plain = train_losses(train(tmp_path / "plain", **options, **PLAIN_OPTIONS))
    assert len(fast) == 25 and fast == pytest.approx(plain, rel=1e-4)
    log = (tmp_path / "fast" / "training.log").read_text()
    assert re.search("kernels +attention blocked, head chunked", log)
    assert re.search(
        "kernels +attention eager, head with all logits", (tmp_path / "plain" / "training.log").read_text()
    )


@pytest.mark.parametrize(("smoothing", "z_loss"), [(0.0, 0.0), (0.1, 1e-2)])
def test_where_a_launch_compiles_on_a_gpu_the_head_is_compiled_by_itself(smoothing, z_loss, monkeypatch):
    """A CPU in its place: the same numbers, and a model compiled whole has no chunk of logits in its graphs."""
    monkeypatch.setattr("utils.kernels.head_loss.ROWS_AT_ONCE", 16)
    objective = build_objective(build("llama"), ObjectiveConfig(label_smoothing=smoothing, z_loss=z_loss), "auto",
                                KernelConfig(), CPU).train()  # fmt: skip
    ids = torch.randint(5, 101, (4, 20))
    targets = ids.roll(-1, 1).masked_fill(ids % 7 == 0, IGNORED)
    loss = objective(targets, input_ids=ids)
    expected = [loss.detach(), *gradients(loss, objective.model)]
    monkeypatch.setattr("utils.kernels.head_loss.COMPILED_APART", ("cpu",))
    objective.head_backend = "aot_eager"
    _compiled_score.cache_clear()
    torch._dynamo.reset()
    graphs = EagerAndRecordGraphs()
    loss = torch.compile(objective, backend=graphs)(targets, input_ids=ids)
    assert largest_difference([loss.detach(), *gradients(loss, objective.model)], expected) < 1e-5
    shapes = [node.meta["example_value"].shape for graph in graphs.graphs for node in graph.graph.nodes
              if isinstance(node.meta.get("example_value"), torch.Tensor)]  # fmt: skip
    assert shapes and not [shape for shape in shapes if shape[-1:] == (101,)]
    assert _compiled_score.cache_info().currsize == 1


def test_dropout_leaves_the_compiled_graph_whole():
    dropout = {"resid_pdrop": 0.1, "embd_pdrop": 0.1, "attn_pdrop": 0.1}
    objective = build_objective(build("gpt2", **dropout), ObjectiveConfig(), "auto", KernelConfig(), CPU).train()
    ids, _, _ = packed_rows()
    explained = torch._dynamo.explain(objective)(ids.roll(-1, 1), input_ids=ids)
    assert explained.graph_count == 1 and explained.graph_break_count == 0


@pytest.mark.slow
def test_a_compiled_model_trains_evaluates_and_resumes_as_the_plain_one_does(dataset, tmp_path):
    """Compiled by the launch, as accelerate has it."""
    options = {"data__dataset": dataset, "evaluation__every_steps": 5, "checkpoint__every_steps": 5}
    options["model__num_hidden_layers"] = 1
    plain = train_losses(train(tmp_path / "plain", **options))
    settings = SMALL | {key.replace("__", "."): value for key, value in options.items()}
    settings |= {"output": tmp_path / "compiled", "checkpoint.resume": "auto"}
    command = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "1"]
    run(*command, "--dynamo_backend", "inductor", "train.py", *flags(settings))
    shutil.rmtree(tmp_path / "compiled" / "checkpoints" / "step-00000010")  # as if it had been killed before
    run(*command, "--dynamo_backend", "inductor", "train.py", *flags(settings))
    assert "resumed from" in (tmp_path / "compiled" / "training.log").read_text()
    assert train_losses(metrics(tmp_path / "compiled")) == pytest.approx(plain, rel=1e-4)


AVX2 = {"avx2": True, "avx512_bw": False, "amx_bf16": False}


@pytest.mark.parametrize(
    ("has", "expected"),
    [
        (AVX2, "highest"), (AVX2 | {"avx512_bw": True}, "medium"), ({"avx512_bw": True, "amx_bf16": True}, "highest"),
        ({"neon": True}, "highest"), (None, "highest"),
    ],
)  # fmt: skip
def test_the_precision_of_products_is_chosen_by_the_processor(has, expected, monkeypatch):
    """None: torch 2.9, which does not say."""
    if has is None:
        monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    else:
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: has, raising=False)
    assert resolve_matmul_precision("auto", CPU) == expected
    assert resolve_matmul_precision("auto", torch.device("cuda")) == "high"  # TF32
    for name in ("highest", "high", "medium"):
        assert resolve_matmul_precision(name, CPU) == name


def test_the_chosen_precision_is_in_use_and_rounds_no_product(finished_run, dataset, tmp_path):
    """On this machine, whichever it is: bf16 factors would be off by 2e-3. One that is given is used."""
    before, chosen = torch.get_float32_matmul_precision(), resolve_matmul_precision("auto", CPU)
    assert f"fp32 products {chosen}" in (finished_run / "training.log").read_text()
    torch.manual_seed(0)
    left, right = torch.randn(256, 256), torch.randn(256, 256)
    exact = left.double() @ right.double()
    try:
        torch.set_float32_matmul_precision(chosen)
        error = (left @ right - exact).norm() / exact.norm()
        train(tmp_path / "run", data__dataset=dataset, schedule__max_steps=1, matmul_precision="high")
    finally:
        torch.set_float32_matmul_precision(before)
    assert float(error) < 1e-6
    assert "fp32 products high\n" in (tmp_path / "run" / "training.log").read_text()


class BytesMoved(TorchDispatchMode):
    """Bytes that the operations read and write, each tensor once per operation; views move nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        views = func.is_view or func is torch.ops.aten.detach.default or "empty" in func.name()
        if not views:
            tensors = [leaf for leaf in tree_leaves((args, kwargs, result)) if isinstance(leaf, torch.Tensor)]
            self.total += sum(tensor.numel() * tensor.element_size() for tensor in tensors)
        return result


# GB per step by the head, with 2^24 logits and 512 rows at a time, and as sized for a device of 80 GB.
HEADS_OF_MODELS = {
    "124M at 32 × 1024": (32 * 1024, 768, 50_304, 1.5),
    "1B at 8 × 2048": (8 * 2048, 2048, 128_256, 3.0),
    "8B at 1 × 8192": (8192, 4096, 128_256, 3.0),
}


@pytest.mark.parametrize("name", HEADS_OF_MODELS)
def test_the_head_moves_fewer_bytes_on_a_device_with_much_memory(name, monkeypatch):
    tokens, width, entries, least = HEADS_OF_MODELS[name]
    moved = []
    for rows in (min(512, 2**24 // entries), rows_at_once(torch.device("cuda"), entries)):
        monkeypatch.setattr("utils.kernels.head_loss.rows_at_once", lambda device, entries, rows=rows: rows)
        hidden = torch.empty(tokens, width, dtype=torch.bfloat16, device="meta", requires_grad=True)
        weight = torch.empty(entries, width, device="meta", requires_grad=True)
        targets = torch.empty(tokens, dtype=torch.int64, device="meta")
        with BytesMoved() as counter:
            _HeadLoss.apply(hidden, weight, None, targets, 0.0, 0.0, torch.bfloat16, True, None).backward()
        moved.append(counter.total)
    print(f"{name}: {moved[0] / 1e9:.0f} GB, then {moved[1] / 1e9:.0f}")
    assert moved[0] > least * moved[1]


def test_a_cpu_and_a_small_card_hold_fewer_logits(monkeypatch):
    assert rows_at_once(CPU, 8192) == 512
    assert rows_at_once(CPU, 128_256) == 2**24 // 128_256
    assert rows_at_once(torch.device("cuda"), 50_304) == 2**28 // 50_304
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    card = types.SimpleNamespace(total_memory=8 * 10**9)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: card)
    assert rows_at_once(torch.device("cuda"), 1000) == 60_000
