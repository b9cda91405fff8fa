"""Dropout on a CPU: one draw of 64 bits decides about four numbers."""

import torch
from torch import nn

RANDOM_VALUES = 1 << 16  # of the 16 bits that decide whether a number is kept


def random_mask(like: torch.Tensor, probability: float) -> torch.Tensor:
    """Which numbers are kept, a bool each; from torch's own generator, which activation checkpointing restores."""
    quarter = -(-like.numel() // 4)
    if torch.compiler.is_compiling():  # `random_` would break the graph
        bits = torch.randint(-(2**63), 2**63 - 1, (quarter,), device=like.device)
    else:
        bits = torch.empty(quarter, dtype=torch.int64, device=like.device).random_(-(2**63), None)  # type: ignore[call-overload]
    kept = bits.view(torch.int16)[: like.numel()] >= round(probability * RANDOM_VALUES) - RANDOM_VALUES // 2
    return kept.view(like.shape)


def scale_kept(values: torch.Tensor, kept: torch.Tensor, probability: float) -> torch.Tensor:
    """`values` where `kept`, divided by the share that is kept, else 0."""
    return values * kept * (RANDOM_VALUES / (RANDOM_VALUES - round(probability * RANDOM_VALUES)))


class FastDropout(nn.Dropout):
    """`nn.Dropout` with its probability rounded to 1/65,536; torch's own on GPUs, and where it rounds to 0 or 1."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        if not self.training or not 0 < round(self.p * RANDOM_VALUES) < RANDOM_VALUES or input.device.type != "cpu":
            return super().forward(input)
        return scale_kept(input, random_mask(input, self.p), self.p)
