"""Loss over a whole split, counted over all ranks, and text written by the model."""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn
from torch.distributed.fsdp import FSDPModule
from transformers import AutoModelForCausalLM, PreTrainedModel

from utils.config import TrainConfig
from utils.data.packing import IGNORED
from utils.model.build import longest_sequence, stop_token_ids
from utils.objectives import Objective, count_targets, objective_module
from utils.pretrained import chat_ids


@dataclass
class Evaluation:
    """What a model scored on a split."""

    loss: float
    """Mean cross-entropy over all target tokens, in nats."""
    num_tokens: int
    """Target tokens scored, over all ranks."""

    @property
    def perplexity(self) -> float:
        return math.exp(self.loss) if self.loss < 700 else math.inf

    def bits_per_byte(self, num_bytes: int) -> float:
        """Bits to code the text, per byte of it: comparable across tokenizers, and with a compressor.

        A tokenizer that adds no token in front leaves each document's first token unpredicted: then a little too low.
        """
        return self.loss * self.num_tokens / math.log(2) / num_bytes

    def metrics(self, num_bytes: int | None) -> dict[str, float]:
        """`num_bytes` is the length of the text; None where the targets are not all of its tokens."""
        found = {"eval/loss": self.loss, "eval/perplexity": self.perplexity}
        return found | ({} if num_bytes is None else {"eval/bits_per_byte": self.bits_per_byte(num_bytes)})


@torch.no_grad()
def evaluate(
    accelerator: Accelerator, objective: nn.Module, loader: Iterable[dict[str, torch.Tensor]],
    after_batch: Callable[[], None] | None = None,
) -> Evaluation:  # fmt: skip
    """Mean loss over the target tokens of `loader`, over all ranks (which all call this), each counted once.

    `after_batch` may raise, on all ranks alike, to leave the evaluation.
    """
    was_training = objective.training
    objective.eval()
    losses, counts = [], []
    try:
        for batch in loader:
            losses.append(objective(**batch))
            counts.append(count_targets(batch))
            if after_batch is not None:
                after_batch()
    finally:
        objective.train(was_training)
        if isinstance(objective, FSDPModule):  # without a backward pass what was gathered stays, whatever becomes of it
            objective.reshard()
    local_loss = torch.stack(losses).cpu().double().sum().to(torch.float32)
    loss_sum = accelerator.reduce(local_loss.to(accelerator.device), "sum")
    num_tokens = int(accelerator.reduce(torch.stack(counts).sum(), "sum"))
    return Evaluation(loss=float(loss_sum) / max(1, num_tokens), num_tokens=num_tokens)


@torch.no_grad()
def write_text(
    model: PreTrainedModel, tokenizer: Any, prompt: str, *, max_new_tokens: int, temperature: float, seed: int,
    chat: bool = False, generate: Callable[..., torch.Tensor] | None = None,
) -> str:  # fmt: skip
    """Continue `prompt` (empty: start a document) on this rank alone; returns prompt and continuation.

    `generate` is called in the place of the model's own.
    With `chat`, a prompt that is not empty is what a user says, and the model takes the assistant's turn. Of a prompt longer than the model's positions the end counts. Seeds torch's generators: the caller's own random
    numbers must not depend on their state.
    """
    positions = longest_sequence(model)
    if chat and prompt:
        turns = [{"role": "user", "content": prompt}]
        ids = chat_ids(tokenizer, turns, add_generation_prompt=True)
    else:
        ids = tokenizer(prompt)["input_ids"]
    if len(ids) > 1 and ids[-1] == tokenizer.eos_token_id:  # some tokenizers end every text with it
        ids = ids[:-1]
    ids = ids[1 - positions :] or [tokenizer.eos_token_id]
    was_training = model.training
    model.eval()
    torch.manual_seed(seed)
    input_ids = torch.tensor([ids], device=model.device)
    output = (generate or model.generate)(  # type: ignore[operator]
        input_ids,
        attention_mask=torch.ones_like(input_ids),
        max_new_tokens=min(max_new_tokens, positions - len(ids)),
        do_sample=temperature > 0,
        temperature=temperature or None,
        eos_token_id=stop_token_ids(tokenizer),
    )
    model.train(was_training)
    return tokenizer.decode(output[0], skip_special_tokens=True)


def write_sample(objective: Objective, tokenizer: Any, example: dict[str, torch.Tensor], config: TrainConfig) -> str:
    """What a person is shown of a model in training: a text by it, or, if it writes none, its guesses in `example`.

    Where the parameters are shared out all ranks call, and write the same.
    """
    if objective_module(config.objective.name).AUTO_MODEL is not AutoModelForCausalLM:
        return write_predictions(objective, tokenizer, example)
    return write_text(
        objective.model, tokenizer, config.tracking.sample_prompt, temperature=0.8, seed=config.seed,  # type: ignore[arg-type]
        max_new_tokens=config.tracking.sample_max_new_tokens, chat=config.objective.name == "instruction",
        generate=objective.generate,
    )  # fmt: skip


@torch.no_grad()
def write_predictions(objective: Objective, tokenizer: Any, batch: dict[str, torch.Tensor]) -> str:
    """For models that do not continue a text: what the first row reads, and the likeliest token for each target."""
    was_training = objective.training
    objective.eval()
    inputs = {name: values.to(next(objective.parameters()).device) for name, values in batch.items()}
    targets = inputs.pop("targets")[0]
    predicted = objective.guess(**inputs)[0][targets != IGNORED].tolist()
    objective.train(was_training)
    wanted = targets[targets != IGNORED].tolist()
    right = sum(guess == target for guess, target in zip(predicted, wanted, strict=True))
    return (
        f"{tokenizer.decode(batch['input_ids'][0])}\n--- {right} of {len(wanted)} targets right\n"
        f"targets:   {tokenizer.decode(wanted)}\npredicted: {tokenizer.decode(predicted)}"
    )
