"""Muon, and its pairing with AdamW."""

import math
from collections.abc import Callable
from typing import Any

import torch

from training.hardware import fast_bf16


class Muon(torch.optim.Muon):
    """torch's Muon with one group. On a CPU that emulates bf16, its matrix products run in fp32, which is faster there.

    It implements Nesterov momentum and `match_rms_adamw` only, see `MuonAdamW`.
    """

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        (group,) = self.param_groups
        if not group["params"] or fast_bf16(group["params"][0].device):
            return super().step(closure)
        for parameter in group["params"]:
            if parameter.grad is None:
                continue
            state = self.state[parameter]
            if "momentum_buffer" not in state:
                state["momentum_buffer"] = torch.zeros_like(parameter)
            momentum = state["momentum_buffer"].lerp_(parameter.grad, 1 - group["momentum"])
            update = orthogonalize(parameter.grad.lerp(momentum, group["momentum"]))
            parameter.mul_(1 - group["lr"] * group["weight_decay"])
            parameter.add_(update, alpha=-group["lr"] * 0.2 * math.sqrt(max(parameter.shape)))
        return None


def orthogonalize(matrix: torch.Tensor) -> torch.Tensor:
    """(M, N) → (M, N): the same singular vectors, singular values near 1, in the precision of `matrix`.

    Newton-Schulz iterations as in Jordan, 2024 (kellerjordan.github.io/posts/muon).
    """
    linear, cubic, quintic = 3.4445, -4.7750, 2.0315  # of Jordan's post
    wide = matrix.T if matrix.shape[0] > matrix.shape[1] else matrix
    wide = wide / wide.norm().clamp(min=1e-7)  # now no singular value exceeds 1
    for _ in range(5):
        gram = wide @ wide.T
        wide = torch.addmm(wide, torch.addmm(gram, gram, gram, beta=cubic, alpha=quintic), wide, beta=linear)
    return wide.T if matrix.shape[0] > matrix.shape[1] else wide


class MuonAdamW(torch.optim.Optimizer):
    """Muon (Jordan, 2024, kellerjordan.github.io/posts/muon) and AdamW as one optimizer, each for its own parameters.

    Muon's update is scaled by 0.2 √max(rows, columns), which makes it as large as AdamW's, so that both use the same
    learning rate and weight decay (Liu et al., 2025, arXiv 2502.16982).

    This optimizer shares its parameter groups and its state with the two, so a scheduler, a gradient scaler or
    accelerate that works on it works on both. AdamW may be fused under a gradient scaler, because the scaler asks this
    optimizer, which does not unscale by itself.
    """

    def __init__(self, muon: torch.optim.Muon, adamw: torch.optim.AdamW) -> None:
        self.parts = (muon, adamw)
        super().__init__([*muon.param_groups, *adamw.param_groups], {})
        self._share()

    def _share(self) -> None:
        """Give groups and state to the two; loading a state dict replaces them."""
        muon, adamw = self.parts
        muon.param_groups, adamw.param_groups = self.param_groups[:1], self.param_groups[1:]
        muon.state = adamw.state = self.state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self._share()

    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        loss = None if closure is None else closure()
        for part in self.parts:
            part.step()
        return loss
