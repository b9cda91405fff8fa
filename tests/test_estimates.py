"""What is said before a training starts: parameters by part, operations, memory and time."""

import copy
import itertools
import json
import platform
import re
import time
from types import SimpleNamespace

import pytest
import torch
from conftest import SMALL, call, error_line, flags, metrics, script
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.distributed._tools.mem_tracker import MemTracker
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    BertConfig,
    GPT2Config,
    LlamaConfig,
    ModernBertConfig,
    Qwen3Config,
    T5Config,
)

from training import hardware
from training.dry_run import (
    UTILISATION,
    count_flops,
    count_step_flops,
    dry_run_report,
    duration,
    estimate_evaluation_activations,
    estimate_memory,
    estimate_time,
    fake_batch,
    find_fitting_micro_batch,
    resized,
)
from training.hardware import HARDWARE, fast_bf16, measure_flops_per_second, precision_of
from training.launch import plan_batches
from training.model import count_parameters_by_part, describe_model
from training.optimization.optimizers import build_optimizer
from utils.config import KernelConfig, ModelConfig, ObjectiveConfig, OptimizerConfig, TrainConfig
from utils.model.build import count_parameters, enable_activation_checkpointing, fake_copy
from utils.objectives import Objective, build_objective

D, L, H, M, V, P = 64, 2, 4, 160, 500, 128  # width, blocks, heads, MLP, vocabulary, positions
SIZES = {"hidden_size": D, "num_hidden_layers": L, "num_attention_heads": H, "intermediate_size": M}
SPECIAL = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
LLAMA = LlamaConfig(**SIZES, **SPECIAL, vocab_size=V, num_key_value_heads=2, tie_word_embeddings=False)
GPT2 = GPT2Config(
    **SPECIAL, n_embd=D, n_layer=L, n_head=H, n_inner=M, vocab_size=V, n_positions=P,
    resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
)  # fmt: skip
BERT = BertConfig(
    **SIZES, **SPECIAL, vocab_size=V, max_position_embeddings=P, hidden_dropout_prob=0.0,
    attention_probs_dropout_prob=0.0,
)  # fmt: skip
MODERNBERT = ModernBertConfig(
    **SIZES, **SPECIAL, vocab_size=V, cls_token_id=0, sep_token_id=1, global_attn_every_n_layers=2
)
T5 = T5Config(
    vocab_size=V, d_model=D, d_kv=D // H, d_ff=M, num_layers=L, num_heads=H, dropout_rate=0.0, pad_token_id=2,
    decoder_start_token_id=2,
)  # fmt: skip
QWEN3 = Qwen3Config(**SIZES, **SPECIAL, vocab_size=V, num_key_value_heads=2, head_dim=D // H, tie_word_embeddings=True)
ROWS, LENGTH, TARGETS = 2, 32, 12
PACKED = dict.fromkeys(("input_ids", "targets", "position_ids"), (ROWS, LENGTH))
PAIRS = dict.fromkeys(("input_ids", "attention_mask"), (ROWS, LENGTH)) | dict.fromkeys(
    ("decoder_input_ids", "targets"), (ROWS, TARGETS)
)


def objective_of(config, attention: str = "sdpa", device: str = "cpu", **options) -> Objective:
    """A small model of `config` with the objective that it is made for."""
    auto_model, name = AutoModelForCausalLM, "causal"
    if isinstance(config, BertConfig | ModernBertConfig):
        auto_model, name = AutoModelForMaskedLM, "masked"
    elif isinstance(config, T5Config):
        auto_model, name = AutoModelForSeq2SeqLM, "span_corruption"
    torch.manual_seed(0)
    with torch.device(device):
        model = auto_model.from_config(copy.deepcopy(config), attn_implementation=attention, dtype=torch.float32)
    return Objective(model, ObjectiveConfig(name, **options))


def real_batch(shapes: dict[str, tuple[int, int]]) -> dict[str, torch.Tensor]:
    """Token ids; two documents a row; a mask with a padded end."""
    torch.manual_seed(1)
    batch = {name: torch.randint(3, V, shape) for name, shape in shapes.items()}
    if "position_ids" in batch:
        batch["position_ids"] = (torch.arange(shapes["targets"][1]) % 20).expand(shapes["targets"]).contiguous()
    if "attention_mask" in batch:
        batch["attention_mask"] = (torch.arange(LENGTH) < LENGTH - 3).long().expand(ROWS, LENGTH).contiguous()
    return batch


def with_adapters(model: torch.nn.Module, rank: int) -> torch.nn.Module:
    peft = pytest.importorskip("peft")
    return peft.get_peft_model(model, peft.LoraConfig(r=rank, target_modules="all-linear"))


def tensors_of(parts: dict[str, int]) -> int:
    return sum(parts.values()) - parts["libraries"]


def shapes_of(config) -> dict[str, tuple[int, int]]:
    return PAIRS if isinstance(config, T5Config) else PACKED


# ---- Parameters by part, by the formulas of each architecture's paper or code.
K = D // 2  # width of the keys and values of two heads out of four
EXPECTED = {
    "llama": (LLAMA, {
        "embeddings": V * D, "attention": L * (2 * D * D + 2 * D * K), "MLP": L * 3 * D * M,
        "norms": (2 * L + 1) * D, "head": V * D, "other": 0,
    }),
    "gpt2": (GPT2, {
        "embeddings": (V + P) * D, "attention": L * 4 * (D * D + D), "MLP": L * (2 * D * M + M + D),
        "norms": (2 * L + 1) * 2 * D, "head": 0, "other": 0,
    }),
    "bert": (BERT, {
        "embeddings": (V + P + 2) * D, "attention": L * 4 * (D * D + D), "MLP": L * (2 * D * M + M + D),
        "norms": (2 * L + 2) * 2 * D, "head": D * D + D + V, "other": 0,
    }),
    "modernbert": (MODERNBERT, {  # the first block has no norm before its attention; the head has one
        "embeddings": V * D, "attention": L * 4 * D * D, "MLP": L * 3 * D * M,
        "norms": (2 * L - 1 + 3) * D, "head": D * D + V, "other": 0,
    }),
    "t5": (T5, {
        "embeddings": V * D, "attention": 3 * L * 4 * D * D + 2 * 32 * H, "MLP": 2 * L * 2 * D * M,
        "norms": (2 * L + 1 + 3 * L + 1) * D, "head": 0, "other": 0,
    }),
    "qwen3": (QWEN3, {
        "embeddings": V * D, "attention": L * (2 * D * D + 2 * D * K), "MLP": L * 3 * D * M,
        "norms": (2 * L + 1) * D + 2 * L * D // H, "head": 0, "other": 0,
    }),
}  # fmt: skip


@pytest.mark.parametrize("name", EXPECTED)
def test_parameters_by_part_are_those_of_the_architecture(name: str) -> None:
    config, expected = EXPECTED[name]
    model = objective_of(config, device="meta").model
    counts = count_parameters_by_part(model)
    assert {part: trainable for part, (trainable, _) in counts.items()} == expected
    assert sum(frozen for _, frozen in counts.values()) == 0
    assert sum(expected.values()) == count_parameters(model)
    lines = describe_model(model)
    assert f"{count_parameters(model):,} parameters, all trainable" in lines[0]
    assert [line.split()[0] for line in lines[1:]] == [part for part, number in expected.items() if number]


def test_adapters_are_trainable_and_the_rest_is_frozen() -> None:
    model = with_adapters(objective_of(LLAMA).model, 4)
    counts = count_parameters_by_part(model)
    assert {part: frozen for part, (_, frozen) in counts.items()} == EXPECTED["llama"][1]
    assert counts["attention"][0] == L * 4 * (2 * (D + D) + 2 * (D + K))  # rank × (inputs + outputs)
    assert counts["MLP"][0] == L * 4 * 3 * (D + M)
    assert sum(trainable for trainable, _ in counts.values()) == sum(
        parameter.numel() for parameter in model.parameters() if parameter.requires_grad
    )
    assert "trainable (" in describe_model(model)[0]


# ---- Operations.
@pytest.mark.parametrize("name", EXPECTED)
def test_as_many_operations_are_counted_as_a_real_step_computes(name: str) -> None:
    """Eager attention is made of matrix products that torch's counter sees in a real step."""
    config = EXPECTED[name][0]
    objective = objective_of(config, "eager").train()
    with FlopCounterMode(display=False) as counter:
        objective(**real_batch(shapes_of(config))).backward()
    objective.zero_grad()
    assert count_flops(objective, shapes_of(config)) == counter.get_total_flops() > 0


@pytest.mark.parametrize("name", ["llama", "gpt2", "t5"])
def test_operations_agree_with_six_per_parameter_and_token(name: str) -> None:
    config, parts = EXPECTED[name]
    rows, length, targets = 2, 96, 24
    # Per pair of positions 2 products forward and 5 backward, or 4 where the scores are kept; each 2 × D operations.
    fused, kept = 14 * rows * D * L, 12 * rows * D * L
    if name == "t5":  # keeps the scores of self-attention, to which it adds a trained bias
        shapes = dict.fromkeys(("input_ids", "attention_mask"), (rows, length))
        shapes |= dict.fromkeys(("decoder_input_ids", "targets"), (rows, targets))
        square, mlp = L * D * D, L * 2 * D * M
        encoder = length * (4 * square + mlp + 2 * square)  # its own attention; keys and values for the decoder's
        decoder = targets * (4 * square + mlp + 2 * square + V * D)
        by_hand = 6 * rows * (encoder + decoder) + kept * (length**2 + targets**2) + fused * length * targets
    else:
        shapes = dict.fromkeys(PACKED, (rows, length))
        by_hand = 6 * rows * length * (parts["attention"] + parts["MLP"] + V * D) + fused * length**2
    assert count_flops(objective_of(config, device="meta"), shapes) == pytest.approx(by_hand, rel=0.02)


def test_checkpointing_computes_the_blocks_again_and_adapters_save_the_gradients_of_weights() -> None:
    plain, checkpointed = objective_of(GPT2, "eager", "meta"), objective_of(GPT2, "eager", "meta")
    enable_activation_checkpointing(checkpointed.model, ModelConfig(activation_checkpointing=True))
    # All of the forward pass but the head and each block's last product, whose result the backward pass does not need.
    not_again = 2 * ROWS * LENGTH * (V * D + L * M * D)
    total = count_flops(plain, PACKED)
    assert count_flops(checkpointed, PACKED) - total == total / 3 - not_again
    adapted = objective_of(LLAMA, device="meta")
    all_trained = count_flops(adapted, PACKED)
    adapted.model = with_adapters(adapted.model, 1)
    assert 0.6 * all_trained < count_flops(adapted, PACKED) < 0.8 * all_trained


# ---- Memory.
def real_peak(objective: Objective, batch: dict[str, torch.Tensor], precision: str) -> int:
    """Bytes at the peak of one forward and backward pass, by torch's own tracker."""
    tracker = MemTracker()
    tracker.track_external(objective)
    with tracker:
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            loss = objective(**batch)
        loss.backward()
    return tracker.get_tracker_snapshot("peak")[torch.device("cpu")]["Total"]


@pytest.mark.parametrize("precision", ["no", "bf16"])
@pytest.mark.parametrize("name", EXPECTED)
def test_the_peak_is_that_of_a_real_step(name: str, precision: str) -> None:
    """Against torch's own tracker, which follows the tensors of a real step."""
    config = EXPECTED[name][0]
    objective = objective_of(config).train()
    batch = real_batch(shapes_of(config))
    parts = estimate_memory(objective, batch, OptimizerConfig("sgd", momentum=0.0), mixed_precision=precision)
    real = real_peak(objective, batch, precision)
    assert tensors_of(parts) == pytest.approx(real, rel=0.02)
    assert parts["optimizer state"] == 0


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_the_peak_of_the_fast_kernels_is_that_of_a_real_step(precision: str) -> None:
    config = copy.deepcopy(GPT2)
    config.resid_pdrop = config.embd_pdrop = config.attn_pdrop = 0.1
    model = objective_of(config).model
    objective = build_objective(model, ObjectiveConfig(), "auto", KernelConfig(), torch.device("cpu")).train()
    batch = real_batch(shapes_of(config))
    parts = estimate_memory(objective, batch, OptimizerConfig("sgd", momentum=0.0), mixed_precision=precision)
    real = real_peak(objective, batch, precision)
    assert tensors_of(parts) == pytest.approx(real, rel=0.02)


def test_dropout_and_checkpointing_change_the_activations_as_they_should() -> None:
    config = copy.deepcopy(GPT2)
    kept = estimate_memory(objective_of(config), PACKED, OptimizerConfig())["activations"]
    config.resid_pdrop = config.embd_pdrop = config.attn_pdrop = 0.1
    with_dropout = estimate_memory(objective_of(config), PACKED, OptimizerConfig())["activations"]
    scores = ROWS * H * LENGTH**2 * 4
    assert with_dropout > kept + L * 2 * scores  # without a fused kernel on a CPU: scores and masks are kept
    checkpointed = objective_of(GPT2)
    enable_activation_checkpointing(checkpointed.model, ModelConfig(activation_checkpointing=True))
    all_blocks = estimate_memory(checkpointed, PACKED, OptimizerConfig())["activations"]
    assert all_blocks < 0.7 * kept
    some = objective_of(GPT2)
    enable_activation_checkpointing(
        some.model, ModelConfig(activation_checkpointing=True, activation_checkpointing_every=2)
    )
    assert all_blocks < estimate_memory(some, PACKED, OptimizerConfig())["activations"] < kept


@pytest.mark.parametrize("name", ["adamw", "muon", "adafactor", "sgd", "adamw_8bit"])
def test_the_state_is_that_of_the_real_optimizer(name: str) -> None:
    if name == "adamw_8bit":
        pytest.importorskip("bitsandbytes")
    objective = objective_of(GPT2)
    config = OptimizerConfig(name)
    optimizer = build_optimizer(objective.model, config)
    for parameter in objective.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    storages = {
        value.untyped_storage()._cdata: value.untyped_storage().nbytes()
        for state in optimizer.state.values() for value in state.values() if isinstance(value, torch.Tensor)
    }  # fmt: skip
    objective.zero_grad()
    estimated = estimate_memory(objective, PACKED, config)["optimizer state"]
    assert estimated == pytest.approx(sum(storages.values()), rel=0.03)


def test_what_a_launch_and_a_recipe_add_is_counted() -> None:
    objective = objective_of(LLAMA, device="meta")
    weights = 4 * count_parameters(objective)
    once = estimate_memory(objective, PACKED, OptimizerConfig())
    assert once["weights"] == pytest.approx(weights, rel=0.01) and once["optimizer state"] == pytest.approx(
        2 * weights, rel=0.01
    )
    assert once["moving average"] == once["communication"] == 0
    many = estimate_memory(
        objective, PACKED, OptimizerConfig(ema_decay=0.999), num_processes=2, accumulation=4, mixed_precision="bf16"
    )
    assert many["moving average"] == many["communication"] == many["gradients"] == weights
    # With next to no activations, the peak is the update's: weights, gradients and two of AdamW.
    tiny = estimate_memory(objective, dict.fromkeys(PACKED, (1, 2)), OptimizerConfig())
    assert 4 * weights <= tensors_of(tiny) < 4.3 * weights
    objective.model = with_adapters(objective.model, 1)
    adapters = 4 * sum(parameter.numel() for parameter in objective.parameters() if parameter.requires_grad)
    parts = estimate_memory(objective, PACKED, OptimizerConfig(ema_decay=0.9), num_processes=2)
    assert parts["optimizer state"] == pytest.approx(2 * adapters, rel=0.02)
    assert parts["moving average"] == parts["communication"] + parts["gradients"] == adapters


def test_the_peak_of_an_evaluation_is_that_of_a_real_one() -> None:
    objective = objective_of(LLAMA).eval()
    batch = real_batch(PACKED)
    tracker = MemTracker()
    tracker.track_external(objective)
    with torch.no_grad(), tracker:
        objective(**batch)
    real = tracker.get_tracker_snapshot("peak")[torch.device("cpu")]["Total"] - 4 * count_parameters(objective)
    found = estimate_evaluation_activations(objective, batch)
    assert found == pytest.approx(real, rel=0.02)
    assert found < estimate_memory(objective, batch, OptimizerConfig())["activations"] / 2


def test_nothing_is_computed_changed_or_drawn() -> None:
    objective = objective_of(GPT2).eval()
    before, drawn = copy.deepcopy(objective.state_dict()), torch.get_rng_state()
    count_flops(objective, PACKED)
    estimate_memory(objective, PACKED, OptimizerConfig())
    assert torch.equal(drawn, torch.get_rng_state()) and not objective.training
    assert all(parameter.grad is None and not parameter._backward_hooks for parameter in objective.parameters())
    for name, value in objective.state_dict().items():
        assert torch.equal(value, before[name])
    with FakeTensorMode():
        fake, inputs = fake_copy(objective, "cpu").train(), fake_batch(PACKED, "cpu")
        assert isinstance(fake(**inputs), FakeTensor)
        assert fake.model.lm_head.weight is fake.model.transformer.wte.weight  # shared as before


# ---- Time, and what is printed.
def test_time_is_work_over_speed_at_the_stated_share_of_the_peak() -> None:
    assert estimate_time(312e12 * 0.4 * 3600, HARDWARE["A100 80GB"]["bf16"]) == pytest.approx(3600)
    assert estimate_time(312e12 * 0.4 * 3600, HARDWARE["A100 80GB"]["bf16"], 8) == pytest.approx(450)
    assert [duration(seconds) for seconds in (0.3, 59, 90, 5400, 86400 * 30, 86400 * 800)] == [
        "0.3 s", "59 s", "1.5 min", "1.5 h", "30 days", "2.2 years",
    ]  # fmt: skip
    assert [precision_of(*pair) for pair in (("bf16", "highest"), ("fp16", "highest"), ("fp8", "high"), ("no", "highest"), ("no", "high"))] == [
        "bf16", "bf16", "fp8", "fp32", "tf32",
    ]  # fmt: skip


def test_the_measured_speed_is_that_of_matrix_products(monkeypatch) -> None:
    """torch's own count of the FLOPs of a product, over the seconds of the fastest."""
    read: list[float] = []
    clock = SimpleNamespace(perf_counter=lambda: read.append(time.perf_counter()) or read[-1])
    monkeypatch.setattr(hardware, "time", clock)
    with FlopCounterMode(display=False) as counter:
        speed = measure_flops_per_second(torch.device("cpu"), "no")
    products = len(read)  # one before the clock starts, and one between any two readings
    fastest = min(after - before for before, after in itertools.pairwise(read))
    assert products > 2 and speed == pytest.approx(counter.get_total_flops() / products / fastest)


def test_a_dry_run_says_what_there_is_to_know() -> None:
    config = TrainConfig()
    config.data.sequence_length = LENGTH
    plan = plan_batches(16, 4, 2)
    objective = objective_of(LLAMA, device="meta")
    lines = dry_run_report(
        objective, real_batch(PACKED), config, plan, max_steps=100, num_rows=800, mixed_precision="bf16",
        device=torch.device("cpu"), measure=False,
    )  # fmt: skip
    text = "\n".join(lines)
    assert "100 steps of 16 rows of 32: 1,600 rows, 51,200 positions, 2.00 epochs of 800 rows" in text
    assert "time on 2 device(s)" in text and "(micro-batch 4, precision bf16)" in text
    flops = 4 * count_flops(objective, resized(PACKED, 4))  # 2 processes × 2 micro-batches
    assert f"work: {flops:.3g} FLOPs a step, {flops * 100:.3g} in all" in text
    assert flops == count_step_flops(objective, PACKED, config, plan)
    assert all(name in text for name in HARDWARE) and "this machine" not in text
    config.data.layout = "padded"
    assert resized({"input_ids": (1, 5), "targets": (1, 5)}, 4, 32) == {"input_ids": (4, 32), "targets": (4, 32)}


def test_seven_billion_parameters_take_little_time_and_memory() -> None:
    """Four times the layers take some four times the CPU time, 10 s in all, and no memory for weights."""
    program = """
import json, resource, sys, time
import torch
from transformers import AutoModelForCausalLM, LlamaConfig
from training.launch import plan_batches
from utils.config import TrainConfig
from training.dry_run import dry_run_report
from utils.objectives import Objective
seconds = []
for layers in (2, 8, 32):
    started = time.process_time()
    with torch.device("meta"):
        config = LlamaConfig(num_hidden_layers=layers)
        model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa", dtype=torch.float32)
    lines = dry_run_report(
        Objective(model), dict.fromkeys(("input_ids", "targets", "position_ids"), (1, 4096)), TrainConfig(),
        plan_batches(8, 1, 8), max_steps=10, num_rows=None, mixed_precision="bf16", device=torch.device("cpu"),
        measure=False,
    )
    seconds.append(time.process_time() - started)
print(json.dumps([lines, seconds, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss]))
"""
    lines, seconds, kilobytes = json.loads(script("-c", program).stdout)
    assert "6,738,415,616 parameters" in lines[0]
    assert seconds[2] / seconds[1] < 9 and kilobytes < 2e6, seconds  # the smallest has warmed up what all need
    assert any("H100" in line and "80 GB are too few" in line for line in lines)


# ---- Cards and CPUs.
# Name → processors (SMs), clock in GHz at which the vendor counts, and operations of one SM per clock: fp8 and bf16 with
# sums in fp32, tf32, fp32; memory in GB. In fp8 a tensor core does twice what it does in bf16. Dense products; a multiplication and an addition are two.
# A100: NVIDIA A100 Tensor Core GPU Architecture, V1.0, tables 1 and 3: 108 SMs, 1,410 MHz; 1,024 fused multiply-adds per
#   SM and clock in bf16, half as many in tf32, 64 FP32 cores. H100 SXM5: NVIDIA H100 Tensor Core GPU Architecture, V1.04,
#   table 3: 132 SMs with twice an A100's tensor cores, 1,830 MHz for them, 1,980 MHz for the 128 FP32 cores.
# L4, RTX 4090: NVIDIA Ada GPU Architecture, V2.1, appendices A and C: 58 SMs at 2,040 MHz, 128 at 2,520 MHz, 128 FP32
#   cores each; a GeForce halves the rate of the tensor cores where their sums are fp32.
PUBLISHED = {
    "L4": (58, {"fp8": (2.04, 2048), "bf16": (2.04, 1024), "tf32": (2.04, 512), "fp32": (2.04, 256)}, 24),
    "RTX 4090": (128, {"fp8": (2.52, 1024), "bf16": (2.52, 512), "tf32": (2.52, 256), "fp32": (2.52, 256)}, 24),
    "A100 80GB": (108, {"bf16": (1.41, 2048), "tf32": (1.41, 1024), "fp32": (1.41, 128)}, 80),
    "H100 SXM": (132, {"fp8": (1.83, 8192), "bf16": (1.83, 4096), "tf32": (1.83, 2048), "fp32": (1.98, 256)}, 80),
}


def test_the_peaks_of_the_cards_are_what_their_processors_can_do() -> None:
    """Each figure of the vendor's is its number of processors × clock × operations per clock."""
    assert PUBLISHED.keys() == HARDWARE.keys()
    for name, (processors, precisions, memory) in PUBLISHED.items():
        peaks = {precision: processors * clock * 1e9 * each for precision, (clock, each) in precisions.items()}
        assert HARDWARE[name] == pytest.approx(peaks | {"memory": memory}, rel=0.015), name


def report_of(objective: Objective, rows: int, evaluation_rows: int, device: str = "cpu") -> str:
    config = TrainConfig()
    config.data.sequence_length = LENGTH
    config.evaluation.per_device_batch_size = evaluation_rows
    return "\n".join(dry_run_report(
        objective, real_batch(PACKED), config, plan_batches(rows, rows, 1), max_steps=1_000_000, num_rows=None,
        mixed_precision="bf16", device=torch.device(device), measure=False,
    ))  # fmt: skip


def test_the_dry_run_divides_the_work_by_each_cards_peak() -> None:
    objective = objective_of(LLAMA, device="meta")
    text = report_of(objective, 8, 8)
    flops = 1e6 * count_flops(objective, resized(PACKED, 8))
    for name, (processors, precisions, _) in PUBLISHED.items():
        clock, each = precisions["bf16"]
        (said,) = re.findall(rf"^  {name} +([\d.]+) (s|min|h)", text, re.M)
        seconds = float(said[0]) * {"s": 1, "min": 60, "h": 3600}[said[1]]
        assert seconds == pytest.approx(flops / (processors * clock * 1e9 * each) / UTILISATION, rel=0.06), text


def test_the_evaluations_memory_in_a_dry_run_is_that_of_a_real_one() -> None:
    """Weights, the optimizer's state and the forward pass, by torch's own tracker, after a real update."""
    config = copy.deepcopy(LLAMA)
    config.hidden_size, config.intermediate_size, config.vocab_size = 384, 1024, 8000
    objective, batch = objective_of(config), real_batch(PACKED)
    text = report_of(objective, ROWS, ROWS)
    said = {name: float(size.replace(",", "")) for name, size in re.findall(r"^  (\D+?) +([\d.,]+) MB$", text, re.M)}
    (evaluation,) = re.findall(r"([\d.,]+) MB in an evaluation", text)
    found = float(evaluation.replace(",", "")) - said["libraries"]

    optimizer = torch.optim.AdamW(objective.parameters())
    objective(**batch).backward()
    optimizer.step()
    optimizer.zero_grad()
    tracker = MemTracker()
    tracker.track_external(objective, optimizer)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16), tracker:
        objective.eval()(**batch)
    real = tracker.get_tracker_snapshot("peak")[torch.device("cpu")]["Total"] / 1e6
    weights = 4 * count_parameters(objective) / 1e6
    assert 3 * weights < real < 4 * weights  # the parts that could be forgotten are most of it
    assert found == pytest.approx(real, rel=0.04)


def test_whether_bf16_is_fast_is_what_the_processor_says(monkeypatch) -> None:
    """By what torch would say on machines of each kind; it does know these names."""
    if platform.machine() == "x86_64" and hasattr(torch.cpu, "get_capabilities"):
        assert {"avx512_bf16", "amx_bf16"} <= torch.cpu.get_capabilities().keys()
    for names in (["avx512_bf16"], ["amx_bf16"], ["bf16"], []):
        said = {"architecture": "any", "avx2": True, "avx512_f": True, "avx512_bf16": False, "amx_bf16": False}
        said |= dict.fromkeys(names, True)
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda said=said: said, raising=False)
        assert fast_bf16(torch.device("cpu")) == bool(names), names
    monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)  # torch 2.9
    assert not fast_bf16(torch.device("cpu"))
    for generation, fast in (((7, 5), False), ((8, 0), True), ((9, 0), True)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, generation=generation: generation)
        assert fast_bf16(torch.device("cuda")) == fast


def test_a_model_that_cannot_compute_gets_no_estimate_instead_of_a_traceback(small_dataset, tmp_path) -> None:
    options = ["--data.dataset", small_dataset, "--model.architecture", "t5", "--objective.name", "span_corruption",
               "--model.overrides", "{relative_attention_num_buckets: 0}", "--output", tmp_path / "run"]  # fmt: skip
    code, out, err = call("train.py", *options, "--dry_run")
    assert code == 0 and "no estimate for this model: " in out, err


# ---- A step that runs out of memory


@pytest.mark.parametrize(
    ("total", "advice"), [(10**12, "--batch.per_device_batch_size 4 "), (1, "model.activation_checkpointing true")]
)
def test_a_step_without_memory_ends_with_the_micro_batch_that_would_fit(total, advice, dataset, tmp_path, monkeypatch):
    forward, steps = Objective.forward, []

    def fail_at_the_third(self: Objective, targets: torch.Tensor, **inputs: torch.Tensor) -> torch.Tensor:
        if self.training and not isinstance(targets, FakeTensor):
            steps.append(len(targets))
            if len(steps) == 3:
                raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9")
        return forward(self, targets, **inputs)

    monkeypatch.setattr(Objective, "forward", fail_at_the_third)
    monkeypatch.setattr("training.dry_run.memory_bytes", lambda device: total)
    output = tmp_path / "run"
    line = error_line("train.py", *flags(SMALL | {"data.dataset": dataset, "output": output}))
    assert "step 3 ran out of memory" in line and "micro-batch of 8 needs" in line and advice in line
    assert steps == [8, 8, 8] and len(metrics(output)) >= 2


@pytest.mark.parametrize(("total", "size"), [(50, 4), (25, 2), (12, 1)])
def test_the_largest_micro_batch_that_fits_divides_the_share(total, size, monkeypatch):
    objective, plan = objective_of(LLAMA, device="meta"), plan_batches(8, 8, 1)
    monkeypatch.setattr("training.dry_run.build_without_weights", lambda *_: objective)
    monkeypatch.setattr("training.dry_run.memory_bytes", lambda device: total)
    monkeypatch.setattr("training.dry_run.estimate_step", lambda *a: {"activations": 10 * a[4]})
    monkeypatch.setattr("training.dry_run.ranks_per_copy", lambda _: 1)
    launch = SimpleNamespace(device=torch.device("cpu"), mixed_precision="no")
    found = find_fitting_micro_batch(TrainConfig(), launch, SimpleNamespace(plan=plan, example=PACKED), None)
    assert f"--batch.per_device_batch_size {size} " in found


def test_an_error_of_another_kind_stays_as_it_is(dataset, tmp_path, monkeypatch):
    monkeypatch.setattr("training.run.Run.vote", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        call("train.py", *flags(SMALL | {"data.dataset": dataset, "output": tmp_path / "run"}))
