"""Loss over a whole split, counted over all ranks, and text that the model generates."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.utils.data import DataLoader
from transformers import GenerationConfig, PreTrainedModel

from utils.cli import UserError
from utils.model.adapters import without_adapters
from utils.model.build import as_list, evaluating, longest_sequence, stop_token_ids
from utils.objectives import count_targets
from utils.pretrained import chat_ids, prompt_ids


@dataclass
class Evaluation:
    """What a model scored on a split."""

    loss: float  # mean cross-entropy over all target tokens, in nats
    num_tokens: int  # target tokens scored, over all ranks

    @property
    def perplexity(self) -> float:
        return math.exp(self.loss) if self.loss < 700 else math.inf

    def bits_per_byte(self, num_bytes: int) -> float:
        """Bits to code the text, per byte of it: comparable between tokenizers. Slightly too low for a tokenizer that
        adds no token in front: each document's first token is not predicted."""
        return self.loss * self.num_tokens / math.log(2) / num_bytes

    def metrics(self, num_bytes: int | None, average: "Evaluation | None" = None) -> dict[str, float]:
        """`num_bytes` is the length of the text; None where the targets are not all of its tokens. `average`: what the
        average of the weights scored."""
        found = {"eval/loss": self.loss, "eval/perplexity": self.perplexity}
        found |= {} if num_bytes is None else {"eval/bits_per_byte": self.bits_per_byte(num_bytes)}
        return found | ({} if average is None else {"eval/average_loss": average.loss})


@torch.no_grad()
def evaluate(
    accelerator: Accelerator, objective: nn.Module, loader: DataLoader,
    after_batch: Callable[[int, int], None] | None = None,
) -> Evaluation:  # fmt: skip
    """Mean loss over the target tokens of `loader`, over all ranks, each counted once; all ranks call this. `UserError`
    if there is none. `after_batch` gets the number of batches scored and that of all; it may raise, on all ranks alike,
    to abort the evaluation."""
    losses, counts = [], []
    try:
        with evaluating(objective):
            for done, batch in enumerate(loader, 1):
                losses.append(objective(**batch))
                counts.append(count_targets(batch))
                if after_batch is not None:
                    after_batch(done, len(loader))
    finally:
        if isinstance(objective, FSDPModule):  # without a backward pass the gathered parameters would stay
            objective.reshard()
    local_loss = torch.stack(losses).cpu().double().sum().to(torch.float32)
    loss_sum = accelerator.reduce(local_loss.to(accelerator.device), "sum")
    num_tokens = int(accelerator.reduce(torch.stack(counts).sum(), "sum"))
    if num_tokens == 0:
        raise UserError("the objective finds nothing to predict in the rows to score; score other text")
    return Evaluation(loss=float(loss_sum) / num_tokens, num_tokens=num_tokens)


@torch.no_grad()
def generate_text(
    model: PreTrainedModel, tokenizer: Any, prompt: str, *, max_new_tokens: int, temperature: float, seed: int,
    chat: bool = False, generate: Callable[..., torch.Tensor] | None = None,
) -> str:  # fmt: skip
    """Continue `prompt` (empty: start a document) on this rank alone; returns prompt and continuation.

    Of a prompt that is longer than the model's positions the end counts. temperature: 0 takes the likeliest token.
    seed: for torch's generators, whose state is lost. chat: the prompt is the user's message, and the model answers as
    the assistant. generate: called instead of the model's own. What the model's generation settings say beyond special
    tokens, such as a repetition penalty, does not count.
    """
    settings = model.generation_config
    plain = GenerationConfig(
        bos_token_id=settings.bos_token_id, pad_token_id=settings.pad_token_id,
        eos_token_id=sorted({*stop_token_ids(tokenizer), *as_list(settings.eos_token_id)}),
        decoder_start_token_id=settings.decoder_start_token_id,
    )  # fmt: skip
    positions = longest_sequence(model)
    if chat and prompt:
        ids = chat_ids(tokenizer, [{"role": "user", "content": prompt}], add_generation_prompt=True)
    else:
        ids = prompt_ids(tokenizer, prompt)
    ids = ids[1 - positions :] or [tokenizer.eos_token_id]
    torch.manual_seed(seed)
    input_ids = torch.tensor([ids], device=model.device)
    # `generate` reads the model's settings too, and those of a model within adapters.
    owners = [model, without_adapters(model)]
    try:
        for owner in owners:
            owner.generation_config = plain
        with evaluating(model):
            output = (generate or model.generate)(  # type: ignore[operator]
                input_ids, attention_mask=torch.ones_like(input_ids), do_sample=temperature > 0,
                max_new_tokens=min(max_new_tokens, positions - len(ids)), temperature=temperature or None,
            )  # fmt: skip
    finally:
        for owner in owners:
            owner.generation_config = settings
    return tokenizer.decode(output[0], skip_special_tokens=True)
