"""What a model in training writes: a text, or for other objectives its predictions for one row."""

from typing import Any

import torch
from accelerate import Accelerator
from transformers import AutoModelForCausalLM

from training.parallel.sharding import is_sharded
from utils.config import TrainConfig
from utils.data.packing import IGNORED
from utils.evaluation import generate_text
from utils.model.modules import evaluating
from utils.objectives import Objective, objective_module


def write_sample(
    accelerator: Accelerator, prepared: Any, tokenizer: Any, example: dict[str, torch.Tensor], config: TrainConfig
) -> str | None:
    """A sample by the main process; None on the others. With FSDP all ranks must take part and get the same text.

    Args:
        prepared: the objective, as `accelerator.prepare` returned it.
        example: a batch, from which an objective that does not generate text predicts its targets.
    """
    if not accelerator.is_main_process and not is_sharded(accelerator):
        return None
    objective = accelerator.unwrap_model(prepared)
    if objective_module(config.objective.name).AUTO_MODEL is not AutoModelForCausalLM:
        return write_predictions(objective, tokenizer, example)
    return generate_text(
        objective.model, tokenizer, config.tracking.sample_prompt, temperature=0.8, seed=config.seed,
        max_new_tokens=config.tracking.sample_max_new_tokens, chat=config.objective.name == "instruction",
        generate=objective.generate,
    )  # fmt: skip


@torch.no_grad()
def write_predictions(objective: Objective, tokenizer: Any, batch: dict[str, torch.Tensor]) -> str:
    """The input of the first row, its targets, and the likeliest token for each of them."""
    inputs = {name: values.to(next(objective.parameters()).device) for name, values in batch.items()}
    targets = inputs.pop("targets")[0]
    with evaluating(objective):
        predicted = objective.predict(**inputs)[0][targets != IGNORED].tolist()
    wanted = targets[targets != IGNORED].tolist()
    right = sum(guess == target for guess, target in zip(predicted, wanted, strict=True))
    return (
        f"{tokenizer.decode(batch['input_ids'][0])}\n--- {right} of {len(wanted)} targets right\n"
        f"targets:   {tokenizer.decode(wanted)}\npredicted: {tokenizer.decode(predicted)}"
    )
