"""The costly parts of a training step, computed with less work or memory than in the plain way, to the same result.

Each has its plain twin in torch or transformers, which the tests compare it with, and a switch in `KernelConfig`.
"""

from typing import Any

import torch
from torch import nn
from transformers.activations import GELUTanh, NewGELUActivation

import utils.kernels.attention  # noqa: F401  registers "blocked" with transformers
from utils.cli import UserError
from utils.config import KernelConfig
from utils.hardware import cpu_capabilities
from utils.kernels.dropout import FastDropout


def use_kernels(model: Any, attention: str, config: KernelConfig, device: torch.device) -> None:
    """Choose `model`'s attention for `device`, and replace modules without parameters by faster ones of one function.

    Args:
        model: of transformers, built with its default attention where `attention` is auto or blocked.

    Raises `UserError` for an attention that the model lacks.
    """
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


def resolve_matmul_precision(name: str, device: torch.device) -> str:
    """The name for torch of `matmul_precision`.

    With "medium" torch leaves fp32 products on a CPU with AVX-512 to oneDNN, twice as fast as MKL on AMD's and as exact;
    only with AMX would that round to bf16. Without AVX-512 it changes nothing (torch, aten/src/ATen/native/mkldnn).
    """
    if name != "auto":
        return name
    has = cpu_capabilities()
    return "medium" if device.type == "cpu" and has.get("avx512_bw") and not has.get("amx_bf16") else "highest"


def describe_kernels(objective: Any) -> str:
    """A line: what is in use."""
    modules = {type(module) for module in objective.modules() if getattr(module, "p", 1)}  # but for dropout of 0
    parts = [
        f"attention {objective.model.config._attn_implementation}",
        f"head {'chunked' if objective.chunked_head else 'with all logits'}",
        *(["activation fused"] if GELUTanh in modules else []), *(["dropout fast"] if FastDropout in modules else []),
        f"fp32 products {torch.get_float32_matmul_precision()}",
    ]  # fmt: skip
    return f"kernels: {', '.join(parts)}"
