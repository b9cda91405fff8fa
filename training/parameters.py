"""Parameters by kind, and a summary of their initial values."""

import math
from collections import defaultdict
from collections.abc import Iterator

import torch
from torch import nn

from utils.model.initialization import residual_projections


def is_norm(module: nn.Module) -> bool:
    """LayerNorm or one of the RMSNorms, of which each architecture in transformers has its own class."""
    return isinstance(module, nn.LayerNorm | nn.RMSNorm) or type(module).__name__.endswith(("RMSNorm", "LayerNorm"))


def iter_kinds(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """(kind, parameter) for each parameter, a shared one once: embedding, linear, residual projection, norm, bias,
    other."""
    residual = {id(module) for module in residual_projections(model)}
    seen: set[int] = set()
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if id(parameter) in seen:
                continue
            seen.add(id(parameter))
            if name.endswith("bias"):
                kind = "bias"
            elif is_norm(module):
                kind = "norm"
            elif isinstance(module, nn.Embedding):
                kind = "embedding"
            elif id(module) in residual:
                kind = "residual projection"
            else:
                kind = "linear" if parameter.ndim >= 2 else "other"
            yield kind, parameter


@torch.no_grad()
def describe_initialization(model: nn.Module) -> str:
    """Mean and standard deviation of each kind of parameter, on one line."""
    counts: defaultdict[str, int] = defaultdict(int)
    sums: defaultdict[str, float] = defaultdict(float)
    squares: defaultdict[str, float] = defaultdict(float)
    for kind, parameter in iter_kinds(model):
        counts[kind] += parameter.numel()
        sums[kind] += float(parameter.sum(dtype=torch.float64))
        squares[kind] += float(torch.linalg.vector_norm(parameter, dtype=torch.float64)) ** 2
    parts = []
    for kind, count in counts.items():
        mean = sums[kind] / count
        parts.append(f"{kind} {mean:.3f} ± {math.sqrt(max(0.0, squares[kind] / count - mean**2)):.4f}")
    return "weights at the start, mean ± standard deviation: " + ", ".join(parts)
