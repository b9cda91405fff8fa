"""Options of the optimizer and of the learning rate's schedule; see training/optimization/optimizer.py."""

from dataclasses import dataclass
from typing import Literal

from utils.cli import at_least


@dataclass
class OptimizerConfig:
    """The optimizer. What an option means to it, and whether it has it at all, is said at the option."""

    name: Literal["adamw", "muon", "adafactor", "sgd", "adamw_8bit"] = "adamw"
    """adamw: AdamW. muon: Muon for the matrices of hidden layers, scaled so that learning_rate and weight_decay are
    those of AdamW, which does the rest: embeddings, output head, norms, biases. adafactor: one row and one column in
    place of each matrix of squared gradients, no momentum; learning_rate is relative to the size of each parameter, at
    most 1 / sqrt(step). sgd: Nesterov momentum, by which transformers learn slowly, also at ten times the learning_rate.
    adamw_8bit: AdamW, its state in 8 bits; it needs bitsandbytes (`[optim8bit]`) and saves memory, not time."""
    learning_rate: float = 3e-3
    """Peak learning rate."""
    weight_decay: float = 0.1
    """Decoupled weight decay, on matrices only: never on biases and norm weights. sgd has it in the gradient instead."""
    beta1: float = 0.9
    """Decay rate of the gradient's running mean. adamw, adamw_8bit, and the AdamW beside muon."""
    beta2: float = 0.95
    """Decay rate of the squared gradient's running mean. adamw, adamw_8bit, and the AdamW beside muon."""
    epsilon: float = 1e-8
    """Added to the denominator. adamw, adamw_8bit, and the AdamW beside muon."""
    momentum: float = 0.95
    """Decay rate of the gradient's running mean (muon) or sum (sgd)."""
    max_grad_norm: float = 1.0
    """Clip the gradient's global norm to this. 0: measure but do not clip."""
    ema_decay: float | None = None
    """Keep a moving average of the weights beside them, with this decay per step, such as 0.999. null: none."""

    def problems(self) -> list[str]:
        found = at_least("optimizer", self, weight_decay=0, max_grad_norm=0)
        for name in ("learning_rate", "epsilon"):
            if getattr(self, name) <= 0:
                found.append(f"optimizer.{name} is {getattr(self, name)}; it must be positive")
        for name in ("beta1", "beta2", "momentum"):
            if not 0 <= getattr(self, name) < 1:
                found.append(f"optimizer.{name} is {getattr(self, name)}; it must be at least 0 and less than 1")
        if self.ema_decay is not None and not 0 < self.ema_decay < 1:
            found.append(f"optimizer.ema_decay is {self.ema_decay}; it must lie between 0 and 1, or be null")
        return found


@dataclass
class ScheduleConfig:
    """The learning rate as a function of the step, and how long to train."""

    shape: Literal["linear", "cosine", "warmup_stable_decay", "inverse_sqrt", "constant"] = "cosine"
    """What follows the linear warm-up. linear, cosine: down over all steps. warmup_stable_decay: constant, then down
    over the last decay_steps as 1 - sqrt. inverse_sqrt: down as 1 / sqrt(step), whatever the number of steps.
    constant: the peak."""
    warmup_steps: int = 40
    """Steps from 0 to the peak learning rate."""
    decay_steps: int | None = None
    """warmup_stable_decay only: steps of the decay at the end. null: a fifth of all steps, or what the warm-up leaves."""
    min_learning_rate_ratio: float = 0.0
    """Learning rate at the last step, as a share of the peak. inverse_sqrt: it falls no lower. constant: not used."""
    max_steps: int | None = 800
    """Optimizer steps in all. Give one of this, num_epochs and max_tokens, and null for the others."""
    num_epochs: float | None = None
    """Passes over the training rows; the last global batch is filled up from the next pass."""
    max_tokens: int | None = None
    """Positions in all, rows × data.sequence_length, rounded up to a whole global batch."""

    def problems(self) -> list[str]:
        found = at_least("schedule", self, warmup_steps=0, decay_steps=1, max_steps=1, max_tokens=1)
        if [self.max_steps, self.num_epochs, self.max_tokens].count(None) != 2:
            found.append(
                "give exactly one of schedule.max_steps, schedule.num_epochs and schedule.max_tokens (null for the others)"
            )
        if self.num_epochs is not None and self.num_epochs <= 0:
            found.append(f"schedule.num_epochs is {self.num_epochs}; it must be positive")
        if not 0 <= self.min_learning_rate_ratio <= 1:
            found.append(f"schedule.min_learning_rate_ratio is {self.min_learning_rate_ratio}; it must lie in [0, 1]")
        if self.decay_steps is not None:
            if self.shape != "warmup_stable_decay":
                found.append(f"schedule.decay_steps is for shape warmup_stable_decay, not {self.shape}; leave it null")
            elif self.max_steps is not None and self.warmup_steps + self.decay_steps > self.max_steps:
                found.append(
                    f"schedule.warmup_steps ({self.warmup_steps}) and decay_steps ({self.decay_steps}) are more than "
                    f"schedule.max_steps ({self.max_steps}); lower one of them"
                )
        return found
