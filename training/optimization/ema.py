"""An exponential moving average of the weights (Polyak and Juditsky, 1992), kept beside them."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn


class WeightAverage:
    """The average of a model's trainable parameters, which are in fp32, each shared one once.

    It costs four bytes per parameter and one pass over them per step. Like the weights, it is the same on all ranks.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        """Starts as a copy of the weights on their device, so move the model there first."""
        self.decay = decay
        named = model.named_parameters()
        self.parameters: dict[str, torch.Tensor] = {name: weight for name, weight in named if weight.requires_grad}
        self.averages = {name: parameter.detach().clone() for name, parameter in self.parameters.items()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Include the weights after optimizer step `step` (1, 2, …).

        The decay is min(decay, (1 + step) / (10 + step)), so that the initial weights are soon forgotten, as in
        TensorFlow's `tf.train.ExponentialMovingAverage` with `num_updates`. It follows from the step alone.
        """
        decay = min(self.decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(list(self.averages.values()), list(self.parameters.values()), 1 - decay)

    def evaluate(self, look: Callable[..., Any], *arguments: Any) -> Any:
        """What `look` finds of a model with the average as its weights."""
        with self.swapped():
            return look(*arguments)

    @contextmanager
    def swapped(self) -> Iterator[None]:
        """Within the block, the model's weights are the average, to evaluate or save, not to train.

        The values are exchanged in place, one by one, because optimizer, DDP and FSDP hold the parameters.
        """
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        for name, average in self.averages.items():
            weight = self.parameters[name].detach().clone()
            self.parameters[name].copy_(average)
            average.copy_(weight)

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Parameter name → average, not copied; under FSDP this rank's part of it."""
        return dict(self.averages)

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        for name, average in self.averages.items():
            average.copy_(state[name])
