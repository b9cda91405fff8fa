"""Architectures of transformers without a named size: each makes steps, on packed and on padded rows, or is refused in
one line before the first."""

import json
import math
from typing import Any

import pytest
from conftest import SMALL, call, flags, train, train_losses
from transformers import AutoConfig

TRAINS, MIXES, CHEATS, FAILS = None, "does not keep the documents", "reads the tokens", "does not train on rows"
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
# Objective, architecture, overrides; what becomes of packed rows, and of padded ones.
FAMILIES: list[tuple[str, str, dict[str, Any], str | None, str | None]] = [
    ("causal", "gemma3_text", {"head_dim": 16, "layer_types": ["sliding_attention", "full_attention"]}, TRAINS, TRAINS),
    ("causal", "qwen3_moe", EXPERTS, TRAINS, TRAINS),
    ("causal", "gpt_neo", {"attention_types": [[["global", "local"], 1]], "window_size": 8}, TRAINS, TRAINS),
    ("causal", "opt", {}, MIXES, TRAINS),
    ("causal", "mamba", {"state_size": 4, "expand": 1}, MIXES, TRAINS),
    ("causal", "xlnet", {}, CHEATS, CHEATS),
    ("masked", "roberta", {}, TRAINS, TRAINS),
    ("masked", "eurobert", {}, TRAINS, TRAINS),
    ("masked", "deberta-v2", {}, FAILS, TRAINS),
    ("masked", "mbart", {"encoder_layers": 1, "decoder_layers": 1}, MIXES, FAILS),
    ("span_corruption", "bart", {"decoder_layers": 1, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64}, TRAINS, TRAINS),
]  # fmt: skip
HYBRID = {
    "layer_types": ["linear_attention", "full_attention"], "rope_parameters": {"rope_theta": 5e5, "rope_type": "default"},
    "linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
    "head_dim": 16, "shared_expert_intermediate_size": 32, **EXPERTS,
}  # fmt: skip


# Our names of sizes that a configuration does not have.
LACKS = {
    "bart": ["intermediate_size"], "mbart": ["intermediate_size"], "xlnet": ["intermediate_size", "max_position_embeddings"],
    "mamba": ["num_attention_heads", "intermediate_size", "max_position_embeddings"],
}  # fmt: skip


def options_of(architecture: str, overrides: dict[str, Any]) -> dict[str, Any]:
    named = {"model__architecture": architecture, "model__size": "null", "model__overrides": json.dumps(overrides)}
    positions = (
        {"model__max_position_embeddings": 512} if architecture == "roberta" else {}
    )  # they begin behind padding
    return named | positions | {f"model__{name}": "null" for name in LACKS.get(architecture, [])}


@pytest.mark.parametrize("layout", ["packed", "padded"])
@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: "-".join(family[:2]))
def test_an_architecture_makes_steps_or_is_refused_in_one_line(family, layout, small_dataset, tmp_path):
    objective, architecture, overrides, packed, padded = family
    options = options_of(architecture, overrides) | {"objective__name": objective, "data__layout": layout}
    options |= {"data__dataset": small_dataset, "data__sequence_length": 32, "schedule__max_steps": 2}
    expected = packed if layout == "packed" else padded
    if expected is TRAINS:
        losses = train_losses(train(tmp_path / "run", **options))
        assert len(losses) == 2 and all(map(math.isfinite, losses))
        return
    settings = SMALL | {"output": tmp_path / "run"} | {name.replace("__", "."): v for name, v in options.items()}
    code, _, err = call("train.py", *flags(settings))
    assert code == 2 and err.count("\n") == 1 and expected in err, err
    assert not list(tmp_path.glob("run/*"))


def test_overrides_take_lists_and_nested_values(small_dataset, tmp_path):
    """From the command line to the run's configuration, which runs again, and to the checkpoint's."""
    options = options_of("qwen3_next", HYBRID) | {"data__dataset": small_dataset, "data__layout": "padded"}
    first = train_losses(train(tmp_path / "run", **options, schedule__max_steps=2))
    saved = AutoConfig.from_pretrained(tmp_path / "run" / "checkpoints" / "last")
    assert saved.layer_types == HYBRID["layer_types"] and saved.rope_parameters["rope_theta"] == 5e5
    code, _, err = call("train.py", "--config", tmp_path / "run" / "config.yaml", "--output", tmp_path / "again")
    assert code == 0, err
    again = (tmp_path / "again" / "metrics.jsonl").read_text().splitlines()
    assert train_losses([json.loads(line) for line in again]) == first


def test_parameters_that_the_loss_does_not_use_train_on_two_processes(small_dataset, tmp_path):
    """BigBird's pooler is one of them; DDP alone would raise in the second step."""
    options = options_of("big_bird", {"attention_type": "original_full"}) | {"objective__name": "masked"}
    options |= {"data__dataset": small_dataset, "data__layout": "padded", "schedule__max_steps": 3}
    one, two = (train(tmp_path / str(number), processes=number, **options) for number in (1, 2))
    for name in ("train/loss", "train/grad_norm"):
        found, expected = ([record[name] for record in records if name in record] for records in (two, one))
        assert len(found) == 3 and found == pytest.approx(expected, rel=1e-5)
