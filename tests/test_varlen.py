"""Attention over documents laid end to end: the numbers of documents alone, without a mask."""

import json
from functools import partial

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.utils import compile_regions
from conftest import SMALL, call, error_line, flags, metrics, script, train_losses
from test_kernels import build
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AttentionInterface, masking_utils

from utils.cli import UserError
from utils.config import KernelConfig, ObjectiveConfig
from utils.data.packing import IGNORED, document_places
from utils.kernels import varlen
from utils.kernels.varlen import kernel_fault
from utils.objectives import build_objective

CPU = torch.device("cpu")
LENGTH = 60
# The documents of four rows: a single token first, last and in between, and a whole row.
ROWS = [(1, 59), (30, 1, 29), (60,), (7, 52, 1)]
CHANGES = {
    "llama": {"num_key_value_heads": 2, "head_dim": 16},
    "gemma3_text": {"num_key_value_heads": 2, "head_dim": 16, "sliding_window": 12, "num_hidden_layers": 6},
    "mistral": {"sliding_window": 12},
    "modernbert": {"local_attention": 20},
}
MODELS = ["llama", "gpt2", "qwen3", "gemma3_text", "mistral", "bert", "modernbert"]


def objective_of(architecture: str, attention: str):
    name = "masked" if "bert" in architecture else "causal"
    changes = CHANGES.get(architecture, {})
    return build_objective(build(architecture, **changes), ObjectiveConfig(name=name), attention, KernelConfig(), CPU)


def packed() -> dict[str, torch.Tensor]:
    torch.manual_seed(1)
    positions = torch.stack([torch.cat([torch.arange(size) for size in row]) for row in ROWS])
    ids = torch.randint(5, 101, positions.shape)
    targets = torch.randint(0, 101, positions.shape)
    targets[:, ::9] = IGNORED
    return with_places({"input_ids": ids, "position_ids": positions, "targets": targets})


def with_places(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    places = document_places({name: values.numpy() for name, values in batch.items()})
    return batch | {"cu_seqlens": torch.from_numpy(places)}


def loss_and_gradients(objective, batches: list[dict[str, torch.Tensor]]) -> tuple[float, list[torch.Tensor]]:
    objective.zero_grad()
    losses = [objective(**batch) for batch in batches]
    sum(losses).backward()
    found = [p.grad if p.grad is not None else torch.zeros(()) for p in objective.parameters()]
    return float(sum(losses).detach()), [gradient.clone() for gradient in found]


def assert_equal(found, expected) -> None:
    assert found[0] == pytest.approx(expected[0], rel=1e-5)
    largest = max(float(gradient.abs().max()) for gradient in expected[1])
    for left, right in zip(found[1], expected[1], strict=True):
        assert float((left - right).abs().max()) <= 1e-5 * max(float(right.abs().max()), 0.01 * largest)


@pytest.mark.parametrize("architecture", MODELS)
def test_packed_rows_have_the_loss_and_gradients_of_their_documents_alone(architecture, monkeypatch):
    batch, alone = packed(), []
    for row, sizes in enumerate(ROWS):
        for start, size in zip(np.cumsum((0, *sizes)), sizes, strict=False):
            part = {name: batch[name][row : row + 1, start : start + size] for name in ("input_ids", "targets")}
            alone.append(part)
    expected = loss_and_gradients(objective_of(architecture, "sdpa"), alone)
    objective = objective_of(architecture, "varlen")
    made = []
    for name in ("sdpa_mask", "find_packed_sequence_indices"):
        original = getattr(masking_utils, name)
        monkeypatch.setattr(masking_utils, name, lambda *a, original=original, **k: made.append(1) or original(*a, **k))
    assert_equal(loss_and_gradients(objective, [batch]), expected)
    assert not made


@pytest.mark.parametrize("architecture", ["llama", "bert", "modernbert"])
def test_padded_rows_have_the_loss_and_gradients_that_a_mask_gives(architecture):
    batch = packed()
    del batch["position_ids"], batch["cu_seqlens"]
    batch["attention_mask"] = (torch.arange(LENGTH) < torch.tensor([60, 1, 33, 59])[:, None]).long()
    batch["targets"][batch["attention_mask"] == 0] = IGNORED
    expected = loss_and_gradients(objective_of(architecture, "sdpa"), [batch])
    assert_equal(loss_and_gradients(objective_of(architecture, "varlen"), [with_places(batch)]), expected)


def test_the_places_of_documents_are_those_of_a_loop_and_their_number_is_a_power_of_two():
    places = packed()["cu_seqlens"].tolist()
    begins = [60 * row + sum(sizes[:number]) for row, sizes in enumerate(ROWS) for number in range(len(sizes))]
    assert places == begins + [240] * (16 - len(begins))
    assert packed()["cu_seqlens"].dtype == torch.int32


def test_varlen_attention_never_guesses_where_documents_are():
    objective, batch = objective_of("llama", "varlen"), packed()
    del batch["cu_seqlens"]
    with pytest.raises(ValueError, match="cu_seqlens"):
        objective(**batch)


def test_samples_and_predictions_are_those_of_sdpa():
    prompt = torch.tensor([[0, 0, 0, 7, 8, 9], [11, 12, 13, 14, 15, 16]])
    given = {"attention_mask": (prompt > 0).long(), "do_sample": False, "max_new_tokens": 12}
    texts, logits = [], []
    for attention in ("sdpa", "varlen"):
        objective = objective_of("llama", attention).eval()
        texts.append(objective.generate(prompt, **given).tolist())
        batch = packed()
        del batch["targets"], batch["cu_seqlens"]
        logits.append(objective.logits(**batch))
    assert texts[0] == texts[1]
    assert torch.equal(*logits)
    assert objective.model.config._attn_implementation == "varlen"


@pytest.mark.parametrize(
    ("architecture", "changes", "word"),
    [
        ("gpt2", {"attn_pdrop": 0.1}, "dropout"),
        ("gemma2", {}, "own attention"),
        ("llama", {"head_dim": 12}, "multiples of 8"),
        ("gpt_oss", {}, "own attention"),
    ],
)
def test_a_model_that_varlen_attention_cannot_serve_is_refused(architecture, changes, word):
    model = build(architecture, **changes)
    with pytest.raises(UserError, match=word):
        build_objective(model, ObjectiveConfig(), "varlen", KernelConfig(), CPU)
    assert model.config._attn_implementation != "varlen"


def test_a_kernel_with_other_numbers_is_found(monkeypatch):
    """In place of a GPU's kernel: one that leaks across documents."""
    config = build("llama").config
    assert kernel_fault(config, CPU, torch.bfloat16) is None
    original = varlen.varlen.varlen_attn

    def leaky(query, key, value, places, *rest, **options):
        if query.dtype == torch.bfloat16:
            places = places[[0, -1]]
        return original(query, key, value, places, places, *rest[1:], **options)

    monkeypatch.setattr(varlen.varlen, "varlen_attn", leaky)
    assert "other numbers" in kernel_fault(config, CPU, torch.bfloat16)


def test_a_whole_compile_is_one_graph_with_the_same_numbers():
    objective, batch = objective_of("llama", "varlen"), packed()
    objective.chunked_head = False
    expected = loss_and_gradients(objective, [batch])
    torch._dynamo.reset()
    compiled = torch.compile(objective, backend="aot_eager", fullgraph=True)
    objective.zero_grad()
    loss = compiled(**batch)
    loss.backward()
    assert_equal((float(loss.detach()), [p.grad for p in objective.parameters()]), expected)


def test_a_run_with_varlen_attention_compiled_block_by_block_trains_as_one_with_sdpa(small_dataset, tmp_path):
    """As the files for GPUs compile: the checkpoint has the model's own names, and a sample is written."""
    settings = SMALL | {"data.dataset": small_dataset, "schedule.max_steps": 3, "tracking.sample_every_steps": 3}
    regional = {"ACCELERATE_DYNAMO_BACKEND": "AOT_EAGER", "ACCELERATE_DYNAMO_USE_REGIONAL_COMPILATION": "true"}
    found = []
    for attention, extra in (("sdpa", {}), ("varlen", regional)):
        output = tmp_path / attention
        script("train.py", *flags(settings | {"model.attention": attention, "output": output}), **extra)
        found.append(train_losses(metrics(output)))
    assert found[1] == pytest.approx(found[0], rel=1e-4)
    saved = [path.read_text() for path in (tmp_path / "varlen").rglob("config.json")]
    assert saved and "varlen" not in "".join(saved)


class MasksMade(TorchDispatchMode):
    """The types of tensors with a number for every pair of positions, views left out."""

    def __init__(self) -> None:
        super().__init__()
        self.types: list[torch.dtype] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        pairs = isinstance(result, torch.Tensor) and result.shape[-2:] == (LENGTH, LENGTH) and result.dim() == 4
        if pairs and result.is_floating_point() and not func.is_view:
            self.types.append(result.dtype)
        return result


@pytest.mark.parametrize("architecture", ["llama", "bert"])
def test_where_varlen_cannot_serve_all_layers_share_one_mask_in_the_precision_of_the_products(architecture):
    """As on a GPU; torch's own way is to convert a boolean mask in every layer."""
    name = "masked" if architecture == "bert" else "causal"
    device, kernels, batch = torch.device("cuda"), KernelConfig(), packed()
    model = build(architecture, **CHANGES.get(architecture, {}))
    objective = build_objective(model, ObjectiveConfig(name=name), "sdpa", kernels, device)
    layers = model.config.num_hidden_layers
    assert_equal(
        loss_and_gradients(objective, [batch]), loss_and_gradients(objective_of(architecture, "sdpa"), [batch])
    )
    for attention, expected in (("sdpa_shared_mask", 1), ("sdpa", layers)):
        model.set_attn_implementation(attention)
        with torch.autocast("cpu", torch.bfloat16), MasksMade() as made:
            objective(**batch).backward()
        if attention == "sdpa_shared_mask" or architecture == "llama":  # an encoder's mask is ours
            assert made.types == [torch.bfloat16] * expected


def test_evaluate_takes_varlen_attention_where_it_is_the_default_and_writes_without(
    finished_run, tmp_path, monkeypatch
):
    found, used = [], []
    attend = varlen.varlen.varlen_attn
    monkeypatch.setattr(varlen.varlen, "varlen_attn", lambda *a, **k: used.append(len(a[3])) or attend(*a, **k))
    for name, default in (("sdpa", False), ("varlen", True)):
        monkeypatch.setattr("evaluate.varlen_is_default", lambda *_, default=default: default)
        report = tmp_path / f"{name}.json"
        code, _, errors = call("evaluate.py", "--model", finished_run, "--prompt", "a", "--report", report)
        assert code == 0, errors
        found.append(json.loads(report.read_text()))
        assert bool(used) == default
    assert found[1]["loss"] == pytest.approx(found[0]["loss"], rel=1e-5)
    assert found[1]["text"] == found[0]["text"]


@pytest.mark.parametrize("attention", ["varlen", "sdpa_shared_mask"])
@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gemma3_text", "bert"])
def test_blocks_compile_without_a_break_and_give_the_same_numbers(architecture, attention):
    """As the files for GPUs compile them; `fullgraph` raises at a break."""
    objective, batch = objective_of(architecture, "varlen"), packed()
    objective.model.set_attn_implementation(attention)
    expected = loss_and_gradients(objective, [batch])
    torch._dynamo.reset()
    compiled = compile_regions(objective, backend="aot_eager", fullgraph=True)
    blocks = [module for module in compiled.modules() if isinstance(module, torch._dynamo.OptimizedModule)]
    assert len(blocks) >= objective.model.config.num_hidden_layers
    assert_equal(loss_and_gradients(compiled, [batch]), expected)


@pytest.mark.parametrize("attention", ["varlen", "auto"])
def test_a_leak_that_only_the_path_that_trains_has_is_found(attention, small_dataset, tmp_path, monkeypatch):
    """It begins once accelerate has prepared the model, as one of a device or of its precision would."""
    prepare, attend = Accelerator.prepare, varlen.varlen.varlen_attn
    blocked = AttentionInterface._global_mapping["blocked"]

    def leaky(query, key, value, places, *rest, **options):
        return attend(query, key, value, places[[0, -1]], places[[0, -1]], *rest[1:], **options)

    def spoil(*arguments, **options):
        monkeypatch.setattr(varlen.varlen, "varlen_attn", leaky)
        without = partial(blocked, attention_mask=None)
        monkeypatch.setitem(AttentionInterface._global_mapping, "blocked", lambda *a, **k: without(*a[:4], **k))
        return prepare(*arguments, **options)

    monkeypatch.setattr(Accelerator, "prepare", spoil)
    settings = SMALL | {"data.dataset": small_dataset, "model.attention": attention, "output": tmp_path / "run"}
    assert "apart" in error_line("train.py", *flags(settings))
    assert not (tmp_path / "run").exists()
