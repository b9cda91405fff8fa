"""Sample texts: what a person is shown of a model in training."""

from typing import Any

import torch
from transformers import AutoModelForCausalLM

from utils.config import TrainConfig
from utils.data.packing import IGNORED
from utils.evaluation import generate_text
from utils.model.modules import evaluating
from utils.objectives import Objective, objective_module


def write_sample(objective: Objective, tokenizer: Any, example: dict[str, torch.Tensor], config: TrainConfig) -> str:
    """A text that the model generates; if it generates none, its predictions for the batch `example`.

    With sharded parameters all ranks call this, and all return the same.
    """
    if objective_module(config.objective.name).AUTO_MODEL is not AutoModelForCausalLM:
        return write_predictions(objective, tokenizer, example)
    return generate_text(
        objective.model,  # type: ignore[arg-type]
        tokenizer,
        config.tracking.sample_prompt,
        max_new_tokens=config.tracking.sample_max_new_tokens,
        temperature=0.8,
        seed=config.seed,
        chat=config.objective.name == "instruction",
        generate=objective.generate,
    )


@torch.no_grad()
def write_predictions(objective: Objective, tokenizer: Any, batch: dict[str, torch.Tensor]) -> str:
    """The first row of `batch` as the model reads it, its targets, and the likeliest token for each of them."""
    inputs = {name: values.to(next(objective.parameters()).device) for name, values in batch.items()}
    targets = inputs.pop("targets")[0]
    with evaluating(objective):
        predicted = objective.predict(**inputs)[0][targets != IGNORED].tolist()
    wanted = targets[targets != IGNORED].tolist()
    right = sum(token == target for token, target in zip(predicted, wanted, strict=True))
    return (
        f"{tokenizer.decode(batch['input_ids'][0])}\n--- {right} of {len(wanted)} targets right\n"
        f"targets:   {tokenizer.decode(wanted)}\npredicted: {tokenizer.decode(predicted)}"
    )
