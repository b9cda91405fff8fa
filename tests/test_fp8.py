"""fp8 through accelerate's recipe for torchao, on a CPU: what it converts, trains, saves, prices and refuses."""

import shutil
from types import SimpleNamespace

import pytest
import torch
from accelerate.state import AcceleratorState
from conftest import SMALL, call, error_line, flags, train, train_losses
from safetensors.torch import load_file
from test_estimates import LLAMA, PACKED, objective_of, with_adapters
from transformers import LlamaConfig

from training import hardware
from training.dry_run import count_fp8_share, dry_run_report
from training.fp8 import build_fp8_recipe, check_fp8, fp8_layers
from training.launch import plan_batches
from utils.cli import UserError
from utils.config import TrainConfig

pytest.importorskip("torchao")
OPTIONS = {
    "schedule__max_steps": 6, "checkpoint__every_steps": 3, "checkpoint__keep_last": 3, "evaluation__max_tokens": 512,
    "tracking__sample_every_steps": 6, "tracking__sample_max_new_tokens": 4,
}  # fmt: skip


@pytest.fixture(autouse=True)
def own_precision():
    """accelerate keeps the first precision of a process."""
    AcceleratorState._reset_state(True)
    yield
    AcceleratorState._reset_state(True)


@pytest.fixture(scope="module")
def runs(small_dataset, tmp_path_factory):
    """The same recipe in bf16 and in fp8: name → (run folder, its metrics)."""
    folder, made = tmp_path_factory.mktemp("fp8"), {}
    for precision in ("bf16", "fp8"):
        AcceleratorState._reset_state(True)
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("ACCELERATE_MIXED_PRECISION", precision)
            made[precision] = folder / precision, train(folder / precision, data__dataset=small_dataset, **OPTIONS)
    return made


def test_it_trains_to_the_losses_of_bf16(runs):
    losses = {name: train_losses(records) for name, (_, records) in runs.items()}
    assert losses["fp8"] == pytest.approx(losses["bf16"], abs=0.02) and losses["fp8"] != losses["bf16"]
    log = (runs["fp8"][0] / "training.log").read_text()
    assert "precision fp8" in log and "13 of 15 linear layers" in log


def test_every_weight_trains_and_stays_fp32(runs):
    """By accelerate's default the converted layers would keep their first weights."""
    folder = runs["fp8"][0] / "checkpoints"
    early, late = (load_file(folder / f"step-0000000{step}/model.safetensors") for step in (3, 6))
    assert all(tensor.dtype == torch.float32 for tensor in late.values())
    assert [name for name in late if torch.equal(early[name], late[name])] == []


def test_a_resumed_run_and_its_export_are_those_of_the_whole_run(runs, small_dataset, tmp_path, monkeypatch):
    whole, records = runs["fp8"]
    shutil.copytree(whole, tmp_path / "run", symlinks=True)
    shutil.rmtree(tmp_path / "run/checkpoints/step-00000006")
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp8")
    resumed = train(tmp_path / "run", data__dataset=small_dataset, checkpoint__resume="auto", **OPTIONS)
    assert train_losses(resumed) == train_losses(records) and len(train_losses(records)) == 6
    weights = [load_file(run / "checkpoints/step-00000006/model.safetensors") for run in (whole, tmp_path / "run")]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    code, _, err = call("export.py", "--checkpoint", tmp_path / "run", "--output", tmp_path / "export")
    assert code == 0, err
    exported = load_file(tmp_path / "export/model.safetensors")
    assert {tensor.dtype for tensor in exported.values()} == {torch.float32}
    assert "fp8" not in (tmp_path / "export/config.json").read_text().lower()


# ---- The price
def test_the_share_of_the_work_in_fp8_is_that_of_the_converted_layers():
    """By hand: two operations per weight and position, and in attention four per width and pair of positions."""
    objective = objective_of(LLAMA, device="meta")
    layers = [objective.get_submodule(name) for name in fp8_layers(objective)]
    assert len(layers) == 7 * 2 - 1  # not the first; the head is the last
    length = PACKED["targets"][1]
    weights = sum(layer.weight.numel() for layer in layers)
    others = objective.model.lm_head.weight.numel() + objective.model.model.layers[0].self_attn.q_proj.weight.numel()
    attention = 4 * length * LLAMA.hidden_size * LLAMA.num_hidden_layers // 2
    share = count_fp8_share(objective, PACKED)
    assert share == pytest.approx(weights / (weights + others + attention))


def test_a_dry_run_prices_the_share_at_the_peak_of_fp8():
    config = TrainConfig()
    config.data.sequence_length = PACKED["targets"][1]
    lines = {}
    for precision in ("bf16", "fp8"):
        found = dry_run_report(
            objective_of(LLAMA, device="meta"), PACKED, config, plan_batches(16, 4, 2), max_steps=10**8, num_rows=800,
            mixed_precision=precision, device=torch.device("cpu"), measure=False,
        )  # fmt: skip
        lines[precision] = {line.split()[0]: line.split() for line in found if line.startswith("  ")}
    assert " ".join(lines["fp8"]["A100"]).endswith("has no fp8") and "no" not in lines["bf16"]["A100"]
    share = count_fp8_share(objective_of(LLAMA, device="meta"), PACKED)
    times = [float(lines[precision]["H100"][2]) for precision in ("fp8", "bf16")]
    assert times[0] / times[1] == pytest.approx(1 - share + share * 989 / 1979, rel=0.05)


def test_the_peak_is_measured_in_fp8_where_no_figure_is_known(monkeypatch):
    products, multiply = [], torch._scaled_mm
    monkeypatch.setattr(
        torch, "_scaled_mm", lambda *factors, **options: products.append(1) or multiply(*factors, **options)
    )
    monkeypatch.setattr(hardware, "MATMUL_SECONDS", 1e-3)
    assert hardware.measure_flops_per_second(torch.device("cpu"), "fp8") > 0 and len(products) >= 2


# ---- What it does not suit
def test_a_model_without_layers_to_convert_is_refused(small_dataset, tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp8")
    options = SMALL | {"data.dataset": small_dataset, "output": tmp_path / "run", "model.architecture": "gpt2"}
    for further in ({}, {"dry_run": "true"}):
        line = error_line("train.py", *flags(options | further))
        AcceleratorState._reset_state(True)
        assert "Conv1D" in line and "--mixed_precision bf16" in line and not (tmp_path / "run").exists()


def test_adapters_and_odd_sizes_are_refused():
    sizes = {"hidden_size": 20, "intermediate_size": 24, "num_attention_heads": 2, "num_hidden_layers": 1}
    with pytest.raises(UserError, match="multiples of 16"):
        check_fp8(objective_of(LlamaConfig(**sizes, vocab_size=64)).model)
    with pytest.raises(UserError, match=r"model\.lora"):
        check_fp8(with_adapters(objective_of(LLAMA).model, 16))
    check_fp8(objective_of(LLAMA).model)


@pytest.mark.parametrize(("variables", "word"), [
    ({"ACCELERATE_FP8_BACKEND": "te"}, "fp8_backend te"),
    ({"ACCELERATE_USE_FSDP": "true", "FSDP_CPU_RAM_EFFICIENT_LOADING": "true"}, "fsdp_cpu_ram_efficient_loading: false"),
])  # fmt: skip
def test_a_launch_that_fp8_does_not_suit_is_refused(variables, word, monkeypatch):
    launch = SimpleNamespace(device=torch.device("cpu"))
    assert build_fp8_recipe(launch) == []
    for name, value in (variables | {"ACCELERATE_MIXED_PRECISION": "fp8"}).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=word):
        build_fp8_recipe(launch)
