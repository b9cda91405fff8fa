"""Parameter groups, the optimizer, how many steps it makes, and the learning rate as a function of the step."""

import logging
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from transformers.pytorch_utils import Conv1D

from training.optimization.muon import Muon, MuonAdamW
from training.parameters import is_norm
from utils.cli import UserError
from utils.config import OptimizerConfig, ScheduleConfig

# Without a warm-up there is no natural scale for 1 / sqrt(step): that of big_vision and transformers.
INVERSE_SQRT_TIMESCALE = 10_000


def build_optimizer(model: nn.Module, config: OptimizerConfig, fused: bool = True) -> torch.optim.Optimizer:
    """The optimizer of `model`'s trainable parameters, with decay on matrices only.

    AdamW: Loshchilov and Hutter, 2019 (arXiv 1711.05101). Muon: see `MuonAdamW`. Adafactor: Shazeer and Stern, 2018
    (arXiv 1804.04235), as torch has it. SGD: Nesterov's momentum as in Sutskever et al., 2013. AdamW in 8 bits: Dettmers
    et al., 2022 (arXiv 2110.02861); parameters of fewer than 4,096 numbers keep an fp32 state.

    `model` is one of transformers, with or without adapters of peft. `fused` is for AdamW and SGD, and must be off where
    gradients are scaled (fp16): a fused step skips an overflow by itself, and accelerate then cannot tell that it was
    skipped. `UserError` if the library of adamw_8bit is missing.
    """
    decayed, others = split_by_decay(model)
    decay = config.weight_decay
    groups = [{"params": decayed, "weight_decay": decay}, {"params": others, "weight_decay": 0.0}]
    adamw: dict[str, Any] = {
        "lr": config.learning_rate, "betas": (config.beta1, config.beta2), "eps": config.epsilon
    }  # fmt: skip
    if config.name == "muon":
        matrices = hidden_matrices(model)
        hidden = [parameter for parameter in decayed if id(parameter) in matrices]
        groups[0]["params"] = [parameter for parameter in decayed if id(parameter) not in matrices]
        muon = Muon(
            [{"params": hidden}], lr=config.learning_rate, weight_decay=decay, momentum=config.momentum,
            nesterov=True, adjust_lr_fn="match_rms_adamw",
        )  # fmt: skip
        return MuonAdamW(muon, torch.optim.AdamW(groups, **adamw, fused=fused))
    if config.name == "adafactor":
        return torch.optim.Adafactor(groups, lr=config.learning_rate)
    if config.name == "sgd":
        return torch.optim.SGD(
            groups, lr=config.learning_rate, momentum=config.momentum, nesterov=config.momentum > 0, fused=fused
        )
    if config.name == "adamw_8bit":
        return import_adamw_8bit()(groups, **adamw)
    return torch.optim.AdamW(groups, **adamw, fused=fused)


def import_adamw_8bit() -> Any:
    """bitsandbytes' AdamW8bit: its state is plain tensors, and it needs no compiler."""
    # On a CPU it warns of a kernel for inference that it lacks.
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    try:
        from bitsandbytes.optim import AdamW8bit
    except ImportError:
        raise UserError(
            "optimizer.name adamw_8bit needs the library bitsandbytes: pip install -e '.[optim8bit]'"
        ) from None
    return AdamW8bit


def split_by_decay(model: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """Trainable parameters with and without weight decay, each shared one once.

    Decayed: parameters of two or more dimensions (linear maps, embeddings) that are neither a norm's nor biases. Chosen
    by what a parameter is, as lists of names miss GPT-2's `ln_1` and many an RMSNorm. A bias of two dimensions alone is
    known by its name: the biases of a mixture's experts, and T5's `relative_attention_bias`, which is stored as an
    embedding, but is added to attention scores, whose differences decay would level.
    """
    decayed: dict[int, nn.Parameter] = {}
    others: dict[int, nn.Parameter] = {}
    for path, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.requires_grad:
                is_bias = path.endswith("bias") or name.endswith("bias")
                chosen = decayed if parameter.ndim >= 2 and not is_norm(module) and not is_bias else others
                chosen[id(parameter)] = parameter
    return list(decayed.values()), list(others.values())


def hidden_matrices(model: nn.Module) -> set[int]:
    """Ids of the weights of linear maps that are neither an embedding nor the output head, also where these are tied."""
    head = model.get_output_embeddings()  # type: ignore[operator]
    outer = {
        id(parameter)
        for module in model.modules() if isinstance(module, nn.Embedding) or module is head
        for parameter in module.parameters()
    }  # fmt: skip
    return {id(module.weight) for module in model.modules() if isinstance(module, nn.Linear | Conv1D)} - outer


def resolve_max_steps(
    config: ScheduleConfig, *, num_rows: int | None, global_batch_size: int, sequence_length: int
) -> int:
    """Optimizer steps in all, from steps, epochs or positions.

    Args:
        num_rows: training rows of `sequence_length` positions; None for a stream.
        global_batch_size: rows per step.

    Raises `UserError` for epochs of a stream.
    """
    if config.max_steps is not None:
        return config.max_steps
    if config.max_tokens is not None:
        return -(-config.max_tokens // (global_batch_size * sequence_length))
    if num_rows is None:
        raise UserError("schedule.num_epochs has no meaning for a stream, whose length is not known; give "
                        "schedule.max_steps, and null for num_epochs")  # fmt: skip
    return math.ceil(config.num_epochs * num_rows / global_batch_size)  # type: ignore[operator]


def build_scheduler(optimizer: torch.optim.Optimizer, config: ScheduleConfig, max_steps: int) -> LambdaLR:
    """Not to be handed to `accelerator.prepare`, which would step it once per process."""
    return LambdaLR(optimizer, learning_rate_factor(config, max_steps))


def learning_rate_factor(config: ScheduleConfig, max_steps: int) -> Callable[[int], float]:
    """Optimizer steps done → share of the peak learning rate for the next one.

    Linear from 0 over `warmup_steps`, then by `shape` down to `min_learning_rate_ratio` at `max_steps`: the numbers of
    transformers' schedules with warm-up. warmup_stable_decay is its `get_wsd_schedule` with decay_type 1-sqrt, except
    that the warm-up begins at 0 and not at the ratio. Hägele et al., 2024 (arXiv 2405.18392), found this form better
    than a linear decay and, over the last fifth, as good as a cosine over all steps.
    """
    floor, warmup = config.min_learning_rate_ratio, config.warmup_steps
    timescale = warmup or INVERSE_SQRT_TIMESCALE
    start = warmup
    if config.shape == "warmup_stable_decay":
        start = max(warmup, max_steps - (config.decay_steps or max(1, max_steps // 5)))

    def factor(step: int) -> float:
        if step < warmup:
            return step / warmup
        if config.shape == "inverse_sqrt":
            return max(floor, math.sqrt(timescale / (step - warmup + timescale)))
        if config.shape == "constant" or step < start:
            return 1.0
        progress = min(1.0, (step - start) / max(1, max_steps - start))
        if config.shape == "linear":
            left = 1 - progress
        elif config.shape == "cosine":
            left = 0.5 * (1 + math.cos(math.pi * progress))
        else:
            left = 1 - math.sqrt(progress)
        return floor + (1 - floor) * left

    return factor
