"""Parameter groups, optimizers, schedules and the weights' average against torch, transformers and plain loops."""

import io
import itertools
import json
import math
import re
import sys

import pytest
import torch
import transformers
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from conftest import ROOT, SMALL, call, flags
from safetensors.torch import load, save
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, AutoModelForSeq2SeqLM

from training.optimization.ema import WeightAverage
from training.optimization.muon import Muon, orthogonalize
from training.optimization.optimizers import (
    OPTIMIZERS,
    build_optimizer,
    check_optimizer,
    hidden_matrices,
    split_by_decay,
)
from training.optimization.schedule import build_scheduler, learning_rate_factor, resolve_max_steps, warn_of_warmup
from utils.cli import UserError, find_problems
from utils.config import OptimizerConfig, ScheduleConfig

SHAPES = ScheduleConfig.__dataclass_fields__["shape"].type.__args__
# Learning rates at which 20 steps do something.
PEAK = {"adamw": 1e-2, "muon": 1e-2, "adafactor": 3e-2, "sgd": 1.0, "adamw_8bit": 1e-2}


def tiny_llama(**options) -> transformers.PreTrainedModel:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(transformers.LlamaConfig(
        vocab_size=256, hidden_size=64, num_hidden_layers=2, num_attention_heads=2, intermediate_size=128,
        max_position_embeddings=64, **options,
    ))  # fmt: skip


def batches(count: int) -> list[torch.Tensor]:
    """(4, 64) each: the bytes of the sample's documents."""
    lines = (ROOT / "sample_data" / "dictionaries.jsonl").read_text(encoding="utf-8").splitlines()
    text = "\n".join(json.loads(line)["text"] for line in lines[:200]).encode()
    return list(torch.tensor(list(text[: count * 256])).view(count, 4, 64))


def loss_of(model, ids: torch.Tensor) -> torch.Tensor:
    return model(input_ids=ids, labels=ids).loss


def weights(model) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def make(name: str, **options) -> tuple:
    """Model, optimizer and scheduler as train.py makes them, for a run of 20 steps."""
    if name == "adamw_8bit":
        pytest.importorskip("bitsandbytes")
    model = tiny_llama(**options)
    optimizer = build_optimizer(model, OptimizerConfig(name=name, learning_rate=PEAK[name], weight_decay=0.3))
    return model, optimizer, build_scheduler(optimizer, ScheduleConfig(warmup_steps=3), max_steps=20)


def run_steps(model, optimizer, scheduler, data: list[torch.Tensor]) -> list[float]:
    losses = []
    for ids in data:
        loss = loss_of(model, ids)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
        losses.append(float(loss.detach()))
    return losses


# ---- Which parameters: names that a person has read off `named_parameters`, "N" for each number.

SIZES = {
    "vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48,
    "max_position_embeddings": 32, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
T5_SIZES = {"vocab_size": 64, "d_model": 32, "d_ff": 48, "d_kv": 16, "num_heads": 2, "num_layers": 2}
BLOCK = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj",
         "mlp.down_proj")  # fmt: skip
BLOCK_NORMS = ("input_layernorm", "post_attention_layernorm")
HEAD_NORMS = ("self_attn.q_norm", "self_attn.k_norm")


def named(*parts: tuple[str, tuple[str, ...]], ends: tuple[str, ...] = ("weight",)) -> set[str]:
    return {f"{prefix}{name}.{end}" for prefix, names in parts for name in names for end in ends}


# architecture → configuration, class, undecayed parameters, weights that Muon takes
T5_STACKS = ("encoder.block.N.layer.N.", "decoder.block.N.layer.N.")
ARCHITECTURES = {
    "llama": (
        transformers.LlamaConfig(**SIZES), AutoModelForCausalLM,
        named(("model.layers.N.", BLOCK_NORMS), ("model.", ("norm",))), named(("model.layers.N.", BLOCK)),
    ),
    "mistral": (
        transformers.MistralConfig(**SIZES, num_key_value_heads=1), AutoModelForCausalLM,
        named(("model.layers.N.", BLOCK_NORMS), ("model.", ("norm",))), named(("model.layers.N.", BLOCK)),
    ),
    "qwen3": (
        transformers.Qwen3Config(**SIZES, num_key_value_heads=1, head_dim=16), AutoModelForCausalLM,
        named(("model.layers.N.", (*BLOCK_NORMS, *HEAD_NORMS)), ("model.", ("norm",))),
        named(("model.layers.N.", BLOCK)),
    ),
    "gemma3": (
        transformers.Gemma3TextConfig(**SIZES, num_key_value_heads=1, head_dim=16), AutoModelForCausalLM,
        named(
            ("model.layers.N.", (*BLOCK_NORMS, *HEAD_NORMS, "pre_feedforward_layernorm", "post_feedforward_layernorm")),
            ("model.", ("norm",)),
        ),
        named(("model.layers.N.", BLOCK)),
    ),
    "gpt2": (
        transformers.GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=2, n_positions=32), AutoModelForCausalLM,
        named(("transformer.h.N.", ("ln_N",)), ("transformer.", ("ln_f",)), ends=("weight", "bias"))
        | named(("transformer.h.N.", ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")), ends=("bias",)),
        named(("transformer.h.N.", ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"))),
    ),
    "gpt_neox": (
        transformers.GPTNeoXConfig(**SIZES), AutoModelForCausalLM,
        named(("gpt_neox.layers.N.", BLOCK_NORMS), ("gpt_neox.", ("final_layer_norm",)), ends=("weight", "bias"))
        | named(("gpt_neox.layers.N.", ("attention.query_key_value", "attention.dense", "mlp.dense_h_to_Nh",
                                        "mlp.dense_Nh_to_h")), ends=("bias",)),
        named(("gpt_neox.layers.N.", ("attention.query_key_value", "attention.dense", "mlp.dense_h_to_Nh",
                                      "mlp.dense_Nh_to_h"))),
    ),
    "bert": (
        transformers.BertConfig(**SIZES), AutoModelForMaskedLM,
        named(
            ("bert.embeddings.", ("LayerNorm",)), ("cls.predictions.transform.", ("LayerNorm",)),
            ("bert.encoder.layer.N.", ("attention.output.LayerNorm", "output.LayerNorm")), ends=("weight", "bias"),
        )
        | named(
            ("bert.encoder.layer.N.", ("attention.self.query", "attention.self.key", "attention.self.value",
                                       "attention.output.dense", "intermediate.dense", "output.dense")),
            ("cls.predictions.", ("transform.dense", "decoder")), ends=("bias",),
        )
        | {"cls.predictions.bias"},
        named(
            ("bert.encoder.layer.N.", ("attention.self.query", "attention.self.key", "attention.self.value",
                                       "attention.output.dense", "intermediate.dense", "output.dense")),
            ("cls.predictions.", ("transform.dense",)),
        ),
    ),
    "modernbert": (
        transformers.ModernBertConfig(**SIZES, cls_token_id=1, sep_token_id=2), AutoModelForMaskedLM,
        named(("model.", ("embeddings.norm", "final_norm")), ("model.layers.N.", ("attn_norm", "mlp_norm")),
              ("head.", ("norm",))) | {"decoder.bias"},
        named(("model.layers.N.", ("attn.Wqkv", "attn.Wo", "mlp.Wi", "mlp.Wo")), ("head.", ("dense",))),
    ),
    "t5": (
        transformers.T5Config(**T5_SIZES), AutoModelForSeq2SeqLM,
        named(*((stack, ("layer_norm", "SelfAttention.relative_attention_bias")) for stack in T5_STACKS),
              ("encoder.", ("final_layer_norm",)), ("decoder.", ("final_layer_norm",))),
        named(*((stack, tuple(f"SelfAttention.{name}" for name in "qkvo")) for stack in T5_STACKS),
              *((stack, ("DenseReluDense.wi", "DenseReluDense.wo")) for stack in T5_STACKS),
              (T5_STACKS[1], tuple(f"EncDecAttention.{name}" for name in "qkvo"))),
    ),
}  # fmt: skip


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_decay_and_muon_go_by_the_kind_of_a_parameter(architecture, tied):
    config, auto_model, undecayed, hidden = ARCHITECTURES[architecture]
    config.tie_word_embeddings = tied
    model = auto_model.from_config(config)
    head, embedding = model.get_output_embeddings().weight, model.get_input_embeddings().weight
    assert (head is embedding) is tied
    names = {id(parameter): re.sub(r"\d+", "N", name) for name, parameter in model.named_parameters()}

    decayed, others = split_by_decay(model)
    assert len(decayed) + len(others) == len({id(p) for p in decayed + others}) == len(names)
    assert {names[id(parameter)] for parameter in others} == {name for name in undecayed if name in names.values()}
    assert undecayed - set(names.values()) <= {"cls.predictions.decoder.bias"}  # another name of cls.predictions.bias
    assert {names[matrix] for matrix in hidden_matrices(model)} == hidden

    groups = build_optimizer(model, OptimizerConfig(weight_decay=0.3)).param_groups
    assert [group["weight_decay"] for group in groups] == [0.3, 0.0]
    muon, *rest = build_optimizer(model, OptimizerConfig(name="muon", weight_decay=0.3)).param_groups
    assert [muon["weight_decay"], *(group["weight_decay"] for group in rest)] == [0.3, 0.3, 0.0]
    assert {names[id(parameter)] for parameter in muon["params"]} == hidden
    assert sum(len(group["params"]) for group in (muon, *rest)) == len(names)
    assert any(parameter is head for parameter in rest[0]["params"])


def test_biases_of_experts_are_not_decayed():
    """They are matrices: one row per expert."""
    model = AutoModelForCausalLM.from_config(transformers.GptOssConfig(
        vocab_size=64, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1, head_dim=16,
        intermediate_size=48, num_local_experts=2, num_experts_per_tok=1, pad_token_id=0,
    ))  # fmt: skip
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    others = {names[id(parameter)] for parameter in split_by_decay(model)[1]}
    assert {f"model.layers.0.mlp.experts.{name}_proj_bias" for name in ("gate_up", "down")} <= others
    assert "model.layers.0.mlp.experts.down_proj" not in others


def test_a_second_head_that_is_tied_to_an_embedding_is_no_hidden_matrix():
    """LUKE predicts entities as well as words, and names its words' head alone as its output head."""
    config = transformers.LukeConfig(**SIZES, entity_vocab_size=40, entity_emb_size=32)
    model = AutoModelForMaskedLM.from_config(config)
    embedding = model.luke.entity_embeddings.entity_embeddings.weight
    heads = [module for module in model.modules() if getattr(module, "weight", None) is embedding]
    assert {type(module) for module in heads} == {torch.nn.Embedding, torch.nn.Linear}
    assert id(embedding) not in hidden_matrices(model)


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_of_a_model_with_adapters_only_these_are_trained(name):
    peft = pytest.importorskip("peft")
    options = peft.LoraConfig(r=4, target_modules=["q_proj", "down_proj"], modules_to_save=["lm_head"])
    model = peft.get_peft_model(tiny_llama(), options)
    optimizer = build_optimizer(model, OptimizerConfig(name=name, learning_rate=1e-2))
    names = {id(parameter): label for label, parameter in model.named_parameters()}
    groups = [{names[id(parameter)] for parameter in group["params"]} for group in optimizer.param_groups]
    adapters = {label for label in names.values() if ".lora_A." in label or ".lora_B." in label}
    head = {"base_model.model.lm_head.modules_to_save.default.weight"}
    assert len(adapters) == 8
    assert groups == ([adapters, head, set()] if name == "muon" else [adapters | head, set()])
    before = weights(model)
    scheduler = build_scheduler(optimizer, ScheduleConfig(shape="constant", warmup_steps=0), max_steps=2)
    run_steps(model, optimizer, scheduler, batches(2))
    changed = {label for label, parameter in model.named_parameters() if not torch.equal(before[label], parameter)}
    assert changed == adapters | head


# ---- What a step does: torch's own optimizers in a plain loop, groups by name.


def reference_optimizers(model, name: str, decay_norms: bool = False) -> list[torch.optim.Optimizer]:
    norms = [parameter for label, parameter in model.named_parameters() if "norm" in label]
    hidden = [parameter for label, parameter in model.named_parameters() if "_proj" in label]
    outer = [model.model.embed_tokens.weight, model.lm_head.weight]
    assert len(norms) + len(hidden) + len(outer) == len(list(model.parameters()))
    groups = [
        {"params": outer if name == "muon" else hidden + outer, "weight_decay": 0.3},
        {"params": norms, "weight_decay": 0.3 if decay_norms else 0.0},
    ]
    adam = {"lr": PEAK[name], "betas": (0.9, 0.95), "eps": 1e-8}
    if name == "adamw_8bit":
        return [pytest.importorskip("bitsandbytes").optim.AdamW8bit(groups, **adam)]
    if name == "adafactor":
        return [torch.optim.Adafactor(groups, lr=PEAK[name])]
    if name == "sgd":
        return [torch.optim.SGD(groups, lr=PEAK[name], momentum=0.95, nesterov=True, fused=True)]
    adamw = torch.optim.AdamW(groups, **adam, fused=True)
    if name == "adamw":
        return [adamw]
    muon = torch.optim.Muon(hidden, lr=PEAK[name], weight_decay=0.3, momentum=0.95, adjust_lr_fn="match_rms_adamw")
    return [muon, adamw]


def reference_run(name: str, data: list[torch.Tensor], **options: bool) -> dict[str, torch.Tensor]:
    model = tiny_llama()
    optimizers = reference_optimizers(model, name, **options)
    schedulers = [transformers.get_cosine_schedule_with_warmup(optimizer, 3, 20) for optimizer in optimizers]
    for ids in data:
        loss_of(model, ids).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for stepping in (*optimizers, *schedulers):
            stepping.step()
        model.zero_grad()
    return weights(model)


@pytest.mark.parametrize("name", PEAK)
def test_steps_equal_a_plain_loop_with_torchs_own_optimizers(name, monkeypatch):
    monkeypatch.setattr("training.optimization.muon.fast_bf16", lambda device: True)  # torch's Muon computes in bf16
    model, optimizer, scheduler = make(name)
    before, data = weights(model), batches(20)
    losses = run_steps(model, optimizer, scheduler, data)
    after, expected = weights(model), reference_run(name, data)
    assert max(float((after[label] - expected[label]).abs().max()) for label in after) < 1e-7
    assert losses[-1] < losses[0] - 0.5 and not any(torch.equal(before[label], after[label]) for label in after)
    wrong = reference_run(name, data, decay_norms=True)  # the comparison notices a norm that is decayed
    assert max(float((after[label] - wrong[label]).abs().max()) for label in after) > 1e-4


def test_where_bf16_is_slow_muon_computes_the_same_update_in_fp32(monkeypatch):
    monkeypatch.setattr("training.optimization.muon.fast_bf16", lambda device: False)
    for shape in ((6, 40), (40, 6), (16, 16)):
        gradient = torch.randn(shape)
        ours, theirs = (torch.nn.Parameter(torch.ones(shape)) for _ in range(2))
        options = {"lr": 0.1, "weight_decay": 0.3, "adjust_lr_fn": "match_rms_adamw"}
        steps = [(kind([parameter], **options), parameter) for kind, parameter in
                 ((Muon, ours), (torch.optim.Muon, theirs))]  # fmt: skip
        for optimizer, parameter in steps * 3:
            parameter.grad = gradient.clone()
            optimizer.step()
        assert (ours - theirs).norm() < 0.02 * (theirs - 1).norm()  # bf16 has 8 bits
        left, values, right = torch.linalg.svd(gradient.double(), full_matrices=False)
        values = values / values.norm()
        for _ in range(5):  # what the iteration makes of each singular value
            values = 3.4445 * values - 4.7750 * values**3 + 2.0315 * values**5
        assert torch.allclose(orthogonalize(gradient).double(), left @ values.diag() @ right, atol=1e-5)


@pytest.mark.parametrize("name", PEAK)
def test_a_run_goes_on_from_saved_state_bit_for_bit(name):
    """As train.py saves and loads it: after `prepare`, by torch.save and a load of weights only."""
    data = batches(8)
    accelerator = Accelerator(cpu=True)

    def prepared() -> tuple:
        model, optimizer, scheduler = make(name)
        return *accelerator.prepare(model, optimizer), scheduler

    whole = prepared()
    run_steps(*whole, data)

    model, optimizer, scheduler = prepared()
    run_steps(model, optimizer, scheduler, data[:4])
    file = io.BytesIO()
    torch.save([model.state_dict(), optimizer.state_dict()], file)
    schedule = json.dumps(scheduler.state_dict())

    file.seek(0)
    saved_weights, saved_state = torch.load(file, weights_only=True)
    model, optimizer, scheduler = prepared()
    model.load_state_dict(saved_weights)
    fresh = weights(model)
    optimizer.load_state_dict(saved_state)
    scheduler.load_state_dict(json.loads(schedule))
    run_steps(model, optimizer, scheduler, data[4:])
    assert same(weights(model), weights(whole[0])) and not same(weights(model), fresh)

    model, optimizer, scheduler = prepared()  # without the optimizer's state it is another run
    model.load_state_dict(saved_weights)
    scheduler.load_state_dict(json.loads(schedule))
    run_steps(model, optimizer, scheduler, data[4:])
    assert not same(weights(model), weights(whole[0]))


def test_accelerate_schedulers_and_clipping_work_on_both_parts_of_muon():
    data = batches(6)
    plain_model, plain_optimizer, plain_scheduler = make("muon")
    run_steps(plain_model, plain_optimizer, plain_scheduler, data)

    model, optimizer, scheduler = make("muon")
    accelerator = Accelerator(cpu=True)
    prepared_model, prepared = accelerator.prepare(model, optimizer)
    # `prepare` loads the state, which replaces groups and state: the parts have to follow.
    groups = itertools.chain.from_iterable(part.param_groups for part in optimizer.parts)
    assert all(mine is its for mine, its in zip(prepared.param_groups, groups, strict=True))
    for step, ids in enumerate(data):
        before = weights(model)
        accelerator.backward(loss_of(prepared_model, ids))
        norm = torch.linalg.vector_norm(
            torch.stack([parameter.grad.norm() for group in prepared.param_groups for parameter in group["params"]])
        )
        assert torch.isclose(accelerator.clip_grad_norm_(model.parameters(), 1.0), norm)
        prepared.step()
        prepared.zero_grad()
        assert not accelerator.optimizer_step_was_skipped
        assert all(parameter.grad is None for parameter in model.parameters())
        assert any(torch.equal(before[name], value) for name, value in weights(model).items()) is (step == 0)
        scheduler.step()
        rate = PEAK["muon"] * learning_rate_factor(ScheduleConfig(warmup_steps=3), 20)(step + 1)
        assert [group["lr"] for part in optimizer.parts for group in part.param_groups] == [rate] * 3
    assert same(weights(model), weights(plain_model))


@pytest.mark.parametrize(
    ("name", "fused", "seen"),
    [
        ("adamw", True, False), ("adamw", False, True), ("muon", True, True), ("muon", False, True),
        ("sgd", True, False), ("sgd", False, True), ("adafactor", False, True), ("adamw_8bit", False, True),
    ],
)  # fmt: skip
def test_a_scaled_overflow_is_skipped_and_seen_as_skipped_unless_fused(name, fused, seen):
    """Why train.py does not fuse under fp16: torch's scaler and accelerate's optimizer, on an infinite gradient."""
    if name == "adamw_8bit":
        pytest.importorskip("bitsandbytes")
    model = tiny_llama()
    scaler = torch.amp.GradScaler("cpu")
    Accelerator(cpu=True)
    optimizer = AcceleratedOptimizer(build_optimizer(model, OptimizerConfig(name=name), fused=fused), scaler=scaler)
    scaler.scale(sum(parameter.sum() for parameter in model.parameters()) * 1e38).backward()
    before = weights(model)
    optimizer.step()
    assert same(before, weights(model))
    assert optimizer.step_was_skipped is seen


def test_eight_bits_need_a_quarter_of_the_state_and_learn_alike():
    losses, sizes = {}, {}
    for name in ("adamw", "adamw_8bit"):
        model, optimizer, scheduler = make(name)
        losses[name] = run_steps(model, optimizer, scheduler, batches(20))
        file = io.BytesIO()
        torch.save(optimizer.state_dict(), file)
        sizes[name] = file.tell()
    assert sizes["adamw_8bit"] < 0.4 * sizes["adamw"]
    assert losses["adamw"] != losses["adamw_8bit"] and abs(losses["adamw"][-1] - losses["adamw_8bit"][-1]) < 0.05


def test_without_bitsandbytes_the_message_says_what_to_install(monkeypatch):
    for module in [name for name in sys.modules if name.split(".")[0] == "bitsandbytes"] + ["bitsandbytes.optim"]:
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(UserError, match=re.escape("pip install -e '.[optim8bit]'")):
        check_optimizer(OptimizerConfig(name="adamw_8bit"))


def test_an_unknown_optimizer_is_named_with_those_there_are():
    with pytest.raises(UserError, match=r"optimizer.name adamv is unknown .*adamw") as refusal:
        check_optimizer(OptimizerConfig(name="adamv"))
    assert all(name in str(refusal.value) for name in OPTIMIZERS)


# ---- The schedule


def transformers_schedule(shape: str, optimizer, warmup: int, steps: int, ratio: float):
    horizon = {"num_warmup_steps": warmup, "num_training_steps": steps}
    if shape == "linear":  # transformers' linear schedule ends at 0; its polynomial one of power 1 elsewhere
        if not ratio:
            return transformers.get_linear_schedule_with_warmup(optimizer, **horizon)
        end = ratio * optimizer.defaults["lr"]
        return transformers.get_polynomial_decay_schedule_with_warmup(optimizer, **horizon, lr_end=end)
    if shape == "cosine":
        if not ratio:
            return transformers.get_cosine_schedule_with_warmup(optimizer, **horizon)
        return transformers.get_scheduler(
            "cosine_with_min_lr", optimizer, **horizon, scheduler_specific_kwargs={"min_lr_rate": ratio}
        )
    if shape == "warmup_stable_decay":
        return transformers.get_wsd_schedule(
            optimizer, **horizon, num_decay_steps=steps // 5, decay_type="1-sqrt", min_lr_ratio=ratio
        )
    if shape == "inverse_sqrt":
        return transformers.get_inverse_sqrt_schedule(optimizer, warmup)
    return transformers.get_constant_schedule_with_warmup(optimizer, warmup)


@pytest.mark.parametrize("ratio", [0.0, 0.1])
@pytest.mark.parametrize("warmup", [0, 20])
@pytest.mark.parametrize("shape", SHAPES)
def test_schedules_equal_transformers_at_every_step(shape, warmup, ratio):
    config = ScheduleConfig(shape=shape, warmup_steps=warmup, min_learning_rate_ratio=ratio)
    ours, theirs = (torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1) for _ in range(2))
    schedule = build_scheduler(ours, config, max_steps=300)
    expected = transformers_schedule(shape, theirs, warmup, 300, ratio)
    for step in range(301):  # up to the end: behind it transformers' cosine rises again
        their_rate = expected.get_last_lr()[0]
        if shape == "warmup_stable_decay" and step < warmup:  # theirs begins at the ratio, as no other shape's does
            their_rate = (their_rate / 0.1 - ratio) / (1 - ratio) * 0.1
        assert abs(schedule.get_last_lr()[0] - their_rate) < 1e-12, step
        for optimizer, scheduler in ((ours, schedule), (theirs, expected)):
            optimizer.step()
            scheduler.step()


@pytest.mark.parametrize("ratio", [0.0, 0.1, 1 / 3])
@pytest.mark.parametrize("shape", ["linear", "cosine", "constant"])
def test_the_first_three_shapes_keep_their_last_bit(shape, ratio):
    """Stored curves and checkpoints rest on these expressions."""
    factor = learning_rate_factor(ScheduleConfig(shape=shape, warmup_steps=7, min_learning_rate_ratio=ratio), 90)
    for step in range(7, 120):
        progress = min(1.0, (step - 7) / 83)
        expected = {
            "linear": ratio + (1 - ratio) * (1 - progress),
            "cosine": ratio + (1 - ratio) * 0.5 * (1 + math.cos(math.pi * progress)),
            "constant": 1.0,
        }[shape]
        assert factor(step) == expected
    assert [factor(step) for step in range(7)] == [step / 7 for step in range(7)]


@pytest.mark.parametrize("shape", ["linear", "cosine", "warmup_stable_decay", "inverse_sqrt"])
def test_schedules_end_at_the_floor(shape):
    factor = learning_rate_factor(ScheduleConfig(shape=shape, warmup_steps=2, min_learning_rate_ratio=0.2), 100)
    assert factor(0) == 0 and factor(2) == 1
    assert math.isclose(factor(100), 0.2) and math.isclose(factor(500), 0.2)
    assert min(factor(step) for step in range(2, 500)) >= 0.2 - 1e-15


def test_the_decay_at_the_end_has_the_length_that_is_asked_for_and_never_reaches_into_the_warm_up():
    def decaying(steps: int, **options) -> list[int]:
        factor = learning_rate_factor(ScheduleConfig(shape="warmup_stable_decay", **options), steps)
        return [step for step in range(options["warmup_steps"], steps + 1) if factor(step) < 1]

    assert decaying(100, warmup_steps=10, decay_steps=30) == list(range(71, 101))
    assert decaying(100, warmup_steps=10) == list(range(81, 101))
    assert decaying(100, warmup_steps=90) == list(range(91, 101))
    assert decaying(3, warmup_steps=0) == [3]


def test_a_warm_up_as_long_as_the_run_is_mentioned_once_before_it(small_dataset, tmp_path):
    assert not warn_of_warmup(ScheduleConfig(warmup_steps=9), 10) and not warn_of_warmup(
        ScheduleConfig(warmup_steps=0), 1
    )
    assert "0.9 of its peak" in warn_of_warmup(ScheduleConfig(warmup_steps=10), 10)
    assert "stays 0" in warn_of_warmup(ScheduleConfig(warmup_steps=10), 1)
    settings = SMALL | {"data.dataset": small_dataset, "output": tmp_path / "run", "schedule.max_steps": 2}
    code, _, err = call("train.py", *flags(settings))
    assert code == 0 and err.count("schedule.warmup_steps (2)") == 1
    log = (tmp_path / "run" / "training.log").read_text()
    assert log.index("schedule.warmup_steps (2)") < log.index("step 1/2")
    code, out, _ = call("train.py", *flags(settings | {"dry_run": "true"}))
    assert code == 0 and "schedule.warmup_steps (2)" in out


def test_the_horizon_is_given_in_steps_epochs_or_positions():
    def steps(num_rows: int | None = 100, **horizon) -> int:
        config = ScheduleConfig(**({"max_steps": None} | horizon))
        return resolve_max_steps(config, num_rows=num_rows, global_batch_size=8, sequence_length=64)

    assert steps(max_steps=7) == steps(None, max_steps=7) == 7
    assert (steps(num_epochs=1.0), steps(num_epochs=2.0), steps(num_epochs=0.02)) == (13, 25, 1)
    assert (steps(max_tokens=512), steps(None, max_tokens=513), steps(max_tokens=1)) == (1, 2, 1)
    assert steps(max_tokens=512 * 10**15 + 1) == 10**15 + 1  # beyond what a float holds
    with pytest.raises(UserError, match=r"schedule.num_epochs .*stream.*give schedule.max_steps"):
        steps(None, num_epochs=1.0)


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (OptimizerConfig(momentum=1.0), "optimizer.momentum is 1.0; it must be >= 0 and < 1"),
        (OptimizerConfig(learning_rate=0.0), "optimizer.learning_rate is 0.0; it must be > 0"),
        (OptimizerConfig(ema_decay=1.0), "optimizer.ema_decay is 1.0; it must be > 0 and < 1"),
        (OptimizerConfig(ema_decay=0.0), "optimizer.ema_decay is 0.0"),
        (
            ScheduleConfig(max_tokens=1),
            "exactly one of schedule.max_steps, schedule.num_epochs and schedule.max_tokens",
        ),
        (ScheduleConfig(max_steps=None), "exactly one of"),
        (ScheduleConfig(max_steps=None, max_tokens=0), "schedule.max_tokens is 0; it must be >= 1"),
        (ScheduleConfig(decay_steps=10), "schedule.decay_steps is for shape warmup_stable_decay, not cosine"),
        (
            ScheduleConfig(shape="warmup_stable_decay", decay_steps=90, max_steps=100),
            "schedule.warmup_steps (40) and decay_steps (90) are more than schedule.max_steps (100)",
        ),
    ],
)
def test_values_out_of_range_are_named_on_one_line(config, expected):
    section = "optimizer." if isinstance(config, OptimizerConfig) else "schedule."
    (line,) = find_problems(config, section)
    assert expected in line and "\n" not in line


@pytest.mark.parametrize(
    "config",
    [
        OptimizerConfig(name="sgd", momentum=0.0, ema_decay=0.999),
        ScheduleConfig(max_steps=None, max_tokens=10),
        ScheduleConfig(shape="warmup_stable_decay", decay_steps=60, max_steps=100),
        ScheduleConfig(shape="warmup_stable_decay", decay_steps=60, max_steps=None, num_epochs=1.0),
    ],
)
def test_values_within_range_are_accepted(config):
    assert find_problems(config) == []


# ---- The average of the weights


def test_the_average_equals_torchs_averaged_model_with_the_same_decay():
    model, optimizer, scheduler = make("adamw")
    used = []

    def average_with_schedule(averages, current, num_averaged):
        decay = min(0.6, (1 + int(num_averaged)) / (10 + int(num_averaged)))
        used.append(decay)
        torch.optim.swa_utils.get_ema_multi_avg_fn(decay)(averages, current, None)

    average = WeightAverage(model, 0.6)
    expected = torch.optim.swa_utils.AveragedModel(model, multi_avg_fn=average_with_schedule)
    expected.update_parameters(model)  # the first call copies
    by_hand = {name: value.double() for name, value in weights(model).items()}
    for step, ids in enumerate(batches(16), 1):
        run_steps(model, optimizer, scheduler, [ids])
        average.update(step)
        expected.update_parameters(model)
        for name, value in weights(model).items():
            by_hand[name] = used[-1] * by_hand[name] + (1 - used[-1]) * value
    assert used[:2] == [2 / 11, 3 / 12] and used[-1] == 0.6
    assert same(average.state_dict(), dict(expected.module.named_parameters()))
    assert max(float((by_hand[name] - value).abs().max()) for name, value in average.state_dict().items()) < 1e-6
    assert not same(average.state_dict(), weights(model))


def test_averaged_and_live_weights_change_places_and_come_back():
    model, optimizer, scheduler = make("adamw", tie_word_embeddings=True)
    average = WeightAverage(model, 0.9)
    data = batches(6)
    for step, ids in enumerate(data[:5], 1):
        run_steps(model, optimizer, scheduler, [ids])
        average.update(step)
    live, parameters = weights(model), list(model.parameters())
    averaged = {name: value.clone() for name, value in average.state_dict().items()}
    copy = tiny_llama(tie_word_embeddings=True)
    copy.load_state_dict(averaged, strict=False)
    with torch.no_grad(), average.swapped():
        assert same(weights(model), averaged) and model.lm_head.weight is model.model.embed_tokens.weight
        assert torch.equal(loss_of(model, data[5]), loss_of(copy, data[5]))
    assert same(weights(model), live) and same(average.state_dict(), averaged) and not same(live, averaged)
    with pytest.raises(RuntimeError, match="on the way"), average.swapped():
        raise RuntimeError("on the way")
    assert same(weights(model), live)
    assert all(now is before for now, before in zip(model.parameters(), parameters, strict=True))
    run_steps(model, optimizer, scheduler, data[5:])  # what trains on are the live weights, and the average stays
    assert not any(torch.equal(live[name], value) for name, value in weights(model).items())
    assert same(average.state_dict(), averaged)


def test_an_average_goes_on_from_a_file_bit_for_bit():
    """As train.py saves it: safetensors, each shared tensor once, without what is frozen."""
    model, optimizer, scheduler = make("adamw", tie_word_embeddings=True)
    model.model.norm.weight.requires_grad_(False)
    average = WeightAverage(model, 0.9)
    expected = {name for name, _ in model.named_parameters()} - {"model.norm.weight"}
    assert average.state_dict().keys() == expected and "lm_head.weight" not in expected
    for step, ids in enumerate(batches(6), 1):
        run_steps(model, optimizer, scheduler, [ids])
        average.update(step)
        if step == 3:
            file = save(average.state_dict())
            loaded = WeightAverage(model, 0.9)
            loaded.load_state_dict(load(file))
        elif step > 3:
            loaded.update(step)
    assert same(loaded.state_dict(), average.state_dict())
