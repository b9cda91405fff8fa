"""The costly parts of a training step, computed with less work or memory; `KernelConfig` switches each off."""

from typing import Any

import torch
from torch import nn
from transformers.activations import GELUTanh, NewGELUActivation

import utils.kernels.attention  # noqa: F401  registers "blocked" with transformers
from utils.cli import UserError
from utils.config import KernelConfig
from utils.kernels.dropout import FastDropout


def use_kernels(model: Any, attention: str, config: KernelConfig, device: torch.device) -> None:
    """Choose the attention of `model`, built with its default for auto and blocked, and replace activations and dropout
    by faster equivalents on `device`. `UserError` for an attention that the model lacks."""
    wanted = attention == "blocked" or (attention == "auto" and device.type == "cpu")
    if wanted and model.config._attn_implementation == "sdpa":
        model.set_attn_implementation("blocked")
    if attention == "blocked" and model.config._attn_implementation != "blocked":
        raise UserError(f"model.attention blocked: {type(model).__name__} has its own attention; use auto or eager")
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if config.fused_activation and type(child) is NewGELUActivation:
                setattr(module, name, GELUTanh())
            if config.fast_dropout and device.type == "cpu" and type(child) is nn.Dropout:
                setattr(module, name, FastDropout(child.p).train(child.training))
