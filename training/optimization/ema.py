"""An exponential moving average of the weights (Polyak and Juditsky, 1992), kept beside them."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


class WeightAverage:
    """The average of a model's trainable parameters, which are in fp32, each shared one once.

    It costs four bytes per parameter and one pass over them per step. Like the weights, it is the same on all ranks.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        """Starts as a copy of the weights on their device, so move the model there first."""
        self.decay = decay
        named = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
        self.names = list(named)
        self.parameters: list[torch.Tensor] = list(named.values())
        self.averages = [parameter.detach().clone() for parameter in self.parameters]

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Include the weights after optimizer step `step` (1, 2, …).

        The decay is min(decay, (1 + step) / (10 + step)), so that the initial weights are soon forgotten, as in
        TensorFlow's `tf.train.ExponentialMovingAverage` with `num_updates`. It follows from the step alone.
        """
        decay = min(self.decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(self.averages, self.parameters, 1 - decay)

    @torch.no_grad()
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

    def _swap(self) -> None:
        for parameter, average in zip(self.parameters, self.averages, strict=True):
            weight = parameter.detach().clone()
            parameter.copy_(average)
            average.copy_(weight)

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Parameter name → average, not copied; under FSDP this rank's part of it."""
        return dict(zip(self.names, self.averages, strict=True))

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        for name, average in zip(self.names, self.averages, strict=True):
            average.copy_(state[name])
