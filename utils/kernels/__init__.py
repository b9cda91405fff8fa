"""The costly parts of a training step, computed with less work or memory; `KernelConfig` switches each off."""

from typing import Any

import torch
from torch import nn
from transformers.activations import GELUTanh, NewGELUActivation

from utils.cli import UserError
from utils.config import KernelConfig
from utils.kernels.attention import RANDOM_VALUES, random_mask, scale_kept  # registers "blocked" with transformers


def use_kernels(model: Any, attention: str, config: KernelConfig, device: torch.device) -> None:
    """Choose the attention of `model`, built with its default for auto and blocked, and replace activations and dropout
    by faster equivalents on `device`. `UserError` for an attention that the model lacks."""
    wanted = attention == "blocked" or (attention == "auto" and device.type == "cpu")
    if model.config._attn_implementation == "sdpa" and (wanted or device.type != "cpu"):
        model.set_attn_implementation("blocked" if wanted else "sdpa_shared_mask")
    if attention == "blocked" and model.config._attn_implementation != "blocked":
        raise UserError(f"model.attention blocked: {type(model).__name__} has its own attention; use auto or eager")
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if config.fused_activation and type(child) is NewGELUActivation:
                setattr(module, name, GELUTanh())
            if config.fast_dropout and device.type == "cpu" and type(child) is nn.Dropout:
                setattr(module, name, FastDropout(child.p).train(child.training))


class FastDropout(nn.Dropout):
    """`nn.Dropout` with its probability rounded to 1/65,536; torch's own on GPUs, and where it rounds to 0 or 1."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        if not self.training or not 0 < round(self.p * RANDOM_VALUES) < RANDOM_VALUES or input.device.type != "cpu":
            return super().forward(input)
        return scale_kept(input, random_mask(input, self.p), self.p)
