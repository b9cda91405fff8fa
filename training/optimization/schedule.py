"""How many steps a run makes, and the learning rate as a function of the step."""

import math
from collections.abc import Callable

import torch
from torch.optim.lr_scheduler import LambdaLR

from utils.cli import UserError
from utils.config import ScheduleConfig

# Without a warm-up, 1 / sqrt(step) has no natural time scale; big_vision and transformers take this one.
INVERSE_SQRT_TIMESCALE = 10_000


def resolve_max_steps(
    config: ScheduleConfig, *, num_rows: int | None, global_batch_size: int, sequence_length: int
) -> int:
    """Optimizer steps of the whole run, from steps, epochs or positions.

    `num_rows` is the number of training rows; None for a stream, for which epochs raise `UserError`.
    """
    if config.max_steps is not None:
        return config.max_steps
    if config.max_tokens is not None:
        return -(-config.max_tokens // (global_batch_size * sequence_length))
    if num_rows is None:
        raise UserError("schedule.num_epochs is not for a stream; give schedule.max_steps, and null for num_epochs")
    return math.ceil(config.num_epochs * num_rows / global_batch_size)  # type: ignore[operator]


def warn_of_warmup(config: ScheduleConfig, max_steps: int) -> str:
    """A line if the run ends before its warm-up does, with hardly trained weights; else nothing."""
    if config.warmup_steps < max_steps:
        return ""
    share = (max_steps - 1) / config.warmup_steps
    reached = f"the learning rate rises to {share:.2g} of its peak" if share else "the learning rate stays 0"
    return (
        f"schedule.warmup_steps ({config.warmup_steps}) is not shorter than the run ({max_steps} steps): {reached}; lower it, or "
        "train for longer"
    )


def build_scheduler(optimizer: torch.optim.Optimizer, config: ScheduleConfig, max_steps: int) -> LambdaLR:
    """Do not hand it to `accelerator.prepare`, which would step it once per process."""
    return LambdaLR(optimizer, learning_rate_factor(config, max_steps))


def learning_rate_factor(config: ScheduleConfig, max_steps: int) -> Callable[[int], float]:
    """Optimizer steps done → share of the peak learning rate for the next step.

    The warm-up is linear from 0 over `warmup_steps`. Then `shape` falls to `min_learning_rate_ratio` at `max_steps`.
    The numbers are those of transformers' schedules with warm-up. warmup_stable_decay is its `get_wsd_schedule` with
    decay_type 1-sqrt, except that the warm-up begins at 0 and not at the ratio. Hägele et al., 2024 (arXiv 2405.18392)
    found this decay better than a linear one and, over the last fifth, as good as a cosine over all steps.
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
