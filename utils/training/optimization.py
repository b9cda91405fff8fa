"""Parameter groups, the optimizer, and the learning rate as a function of the step."""

import math
from collections.abc import Callable

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from utils.config import OptimizerConfig, ScheduleConfig
from utils.training.modeling import is_norm


def build_optimizer(model: nn.Module, config: OptimizerConfig, fused: bool = True) -> torch.optim.AdamW:
    """AdamW (Loshchilov and Hutter, 2019) with decay on matrices only.

    `fused` must be off where gradients are scaled (fp16): a fused step skips an overflow by itself, and accelerate then
    cannot tell that it was skipped.
    """
    decayed, others = split_by_decay(model)
    groups = [
        {"params": decayed, "weight_decay": config.weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        groups, lr=config.learning_rate, betas=(config.beta1, config.beta2), eps=config.epsilon, fused=fused
    )


def split_by_decay(model: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """Trainable parameters with and without weight decay, each shared one once.

    Decayed: parameters of two or more dimensions (linear maps, embeddings) that are not a norm's. Chosen by what a
    parameter is and not by its name: lists of names miss every RMSNorm and GPT-2's `ln_1`.
    """
    decayed: dict[int, nn.Parameter] = {}
    others: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            if parameter.requires_grad:
                chosen = decayed if parameter.ndim >= 2 and not is_norm(module) else others
                chosen[id(parameter)] = parameter
    return list(decayed.values()), list(others.values())


def build_scheduler(optimizer: torch.optim.Optimizer, config: ScheduleConfig, max_steps: int) -> LambdaLR:
    """Not to be handed to `accelerator.prepare`, which would step it once per process."""
    return LambdaLR(optimizer, learning_rate_factor(config, max_steps))


def learning_rate_factor(config: ScheduleConfig, max_steps: int) -> Callable[[int], float]:
    """Optimizer steps done → share of the peak learning rate for the next one.

    Linear from 0 over `warmup_steps`, then by `shape` down to `min_learning_rate_ratio` at `max_steps`; with ratio 0
    the same numbers as transformers' linear and cosine schedules with warm-up.
    """
    floor = config.min_learning_rate_ratio

    def factor(step: int) -> float:
        if step < config.warmup_steps:
            return step / config.warmup_steps
        progress = min(1.0, (step - config.warmup_steps) / max(1, max_steps - config.warmup_steps))
        if config.shape == "linear":
            return floor + (1 - floor) * (1 - progress)
        if config.shape == "cosine":
            return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress))
        return 1.0

    return factor
