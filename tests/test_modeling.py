"""Models, layouts and optimization against independent references."""

import math

import pytest
import torch
import transformers
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from transformers import AutoTokenizer

from utils.batches.batch_plan import sample_ids
from utils.batches.loaders import _collate_tensors
from utils.batches.packing import IGNORED, PackedLayout, PaddedLayout
from utils.batches.token_dataset import open_split
from utils.config import ModelConfig, OptimizerConfig, ScheduleConfig
from utils.training.modeling import build_model, pad_token_id
from utils.training.objectives import CausalObjective, count_targets
from utils.training.optimization import build_optimizer, build_scheduler, learning_rate_factor, split_by_decay

ATTENTIONS = ModelConfig.__dataclass_fields__["attention"].type.__args__  # every one that can be chosen
SMALL = {"hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 128}


@pytest.fixture(scope="module")
def tokenizer(dataset):
    return AutoTokenizer.from_pretrained(dataset / "tokenizer")


def small_model(architecture: str, tokenizer, **options):
    torch.manual_seed(0)
    return build_model(ModelConfig(architecture=architecture, **SMALL, **options), tokenizer).eval()


@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_packed_and_padded_losses_equal_unpacked_ones(architecture, attention, dataset, tokenizer):
    """Reference: transformers' own loss on each piece of a document by itself, without padding."""
    model = small_model(architecture, tokenizer, attention=attention, initialization="normal")
    with torch.no_grad():
        for parameter in model.parameters():  # away from the initialisation, where any attention gives near the same
            parameter.mul_(4.0 if parameter.ndim == 2 else 1.0)
    tokens, pad, length = open_split(dataset, "train"), pad_token_id(tokenizer), 128
    objective = CausalObjective(model)
    for layout in (PackedLayout(tokens, length), PaddedLayout(tokens, length, pad)):
        rows = [layout[index] for index in (*sample_ids(0, 12, len(layout), seed=3).tolist(), len(layout) - 1)]
        batch = _collate_tensors([*rows, layout[-1]], pad)
        loss = logit_error = 0.0
        with torch.no_grad():
            logits = model(**{k: v for k, v in batch.items() if k != "shift_labels"}, use_cache=False).logits
            for row, values in enumerate(rows):
                for start, stop in pieces(values):
                    ids = torch.from_numpy(values["input_ids"][start:stop])[None]
                    labels = torch.from_numpy(values["shift_labels"][start:stop])[None]
                    out = model(input_ids=ids, use_cache=False)
                    logit_error = max(logit_error, float((out.logits[0] - logits[row, start:stop]).abs().max()))
                    count = int((labels != IGNORED).sum())
                    if count:
                        mean = model.loss_function(out.logits, None, len(tokenizer), shift_labels=labels)
                        loss += float(mean) * count
            ours = float(objective(**batch))
        assert abs(ours - loss) / int(count_targets(batch)) < 1e-5
        assert logit_error < 1e-5 * max(1.0, float(logits.abs().max()))


def pieces(row) -> list[tuple[int, int]]:
    """(start, stop) of each document's piece in a row."""
    if "attention_mask" in row:
        return [(0, int(row["attention_mask"].sum()))]
    starts = [index for index, position in enumerate(row["position_ids"]) if position == 0]
    return list(zip(starts, [*starts[1:], len(row["position_ids"])], strict=True))


def test_packing_without_restarts_would_be_noticed(dataset, tokenizer):
    """The test above can fail: with plain positions the documents of a row see each other."""
    model = small_model("llama", tokenizer, initialization="normal")
    batch = _collate_tensors([PackedLayout(open_split(dataset, "train"), 128)[index] for index in range(8)], 0)
    wrong = batch | {"position_ids": torch.arange(128).expand(8, -1)}
    with torch.no_grad():
        right_loss, wrong_loss = (float(CausalObjective(model)(**item)) for item in (batch, wrong))
    assert abs(right_loss - wrong_loss) / int(count_targets(batch)) > 1e-4


@pytest.mark.parametrize("shape", ["linear", "cosine", "constant"])
def test_schedules_equal_transformers(shape):
    reference = {
        "linear": transformers.get_linear_schedule_with_warmup, "cosine": transformers.get_cosine_schedule_with_warmup,
        "constant": transformers.get_constant_schedule_with_warmup,
    }[shape]  # fmt: skip
    horizon = {} if shape == "constant" else {"num_training_steps": 300}
    ours, theirs = (torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1) for _ in range(2))
    schedule = build_scheduler(ours, ScheduleConfig(shape=shape, warmup_steps=20), max_steps=300)
    expected = reference(theirs, num_warmup_steps=20, **horizon)
    for _ in range(300):  # up to the end: behind it transformers' cosine rises again
        assert abs(schedule.get_last_lr()[0] - expected.get_last_lr()[0]) < 1e-12
        for optimizer, scheduler in ((ours, schedule), (theirs, expected)):
            optimizer.step()
            scheduler.step()


@pytest.mark.parametrize("shape", ["linear", "cosine"])
def test_schedules_end_at_the_floor(shape):
    factor = learning_rate_factor(ScheduleConfig(shape=shape, warmup_steps=10, min_learning_rate_ratio=0.1), 100)
    assert factor(0) == 0 and factor(10) == 1
    assert math.isclose(factor(100), 0.1) and math.isclose(factor(500), 0.1)


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_only_matrices_are_decayed(architecture, tokenizer):
    model = small_model(architecture, tokenizer, tie_word_embeddings=False)
    decayed, others = split_by_decay(model)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    assert len(decayed) + len(others) == len(names)
    assert {names[id(parameter)] for parameter in others} == {
        name for name in names.values() if "norm" in name or ".ln_" in name or name.endswith(".bias")
    }
    groups = build_optimizer(model, OptimizerConfig(weight_decay=0.3)).param_groups
    assert [group["weight_decay"] for group in groups] == [0.3, 0.0]


@pytest.mark.parametrize("fused", [True, False])
def test_a_scaled_overflow_is_seen_as_skipped_only_without_fusing(fused, tokenizer):
    """Why train.py does not fuse under fp16: torch's scaler and accelerate's optimizer, on an infinite gradient."""
    model = small_model("llama", tokenizer)
    scaler = torch.amp.GradScaler("cpu")
    Accelerator(cpu=True)
    optimizer = AcceleratedOptimizer(build_optimizer(model, OptimizerConfig(), fused=fused), scaler=scaler)
    scaler.scale(sum(parameter.sum() for parameter in model.parameters()) * 1e38).backward()
    before = [parameter.detach().clone() for parameter in model.parameters()]
    optimizer.step()
    assert all(torch.equal(old, new) for old, new in zip(before, model.parameters(), strict=True))
    assert optimizer.step_was_skipped is not fused


def test_a_shared_matrix_is_optimized_once(tokenizer):
    model = small_model("llama", tokenizer, tie_word_embeddings=True)
    decayed, others = split_by_decay(model)
    assert (
        len({id(parameter) for parameter in decayed + others}) == len(decayed + others) == len(list(model.parameters()))
    )


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_normal_initialization(architecture, tokenizer):
    model = small_model(architecture, tokenizer, initialization="normal", tie_word_embeddings=False)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            assert (parameter == 0).all(), name
        elif "norm" in name or ".ln_" in name:
            assert (parameter == 1).all(), name
        else:  # the standard error of a standard deviation is std / sqrt(2 n)
            assert abs(float(parameter.detach().std()) / 0.02 - 1) < 5 / math.sqrt(2 * parameter.numel()), name
            assert abs(float(parameter.detach().mean())) < 5 * 0.02 / math.sqrt(parameter.numel()), name


def test_dropout_reaches_every_knob_of_gpt2(tokenizer):
    model = small_model("gpt2", tokenizer, dropout=0.25)
    rates = {module.p for module in model.modules() if isinstance(module, torch.nn.Dropout)}
    assert rates == {0.25}
    assert small_model("llama", tokenizer, dropout=0.25).config.attention_dropout == 0.25
