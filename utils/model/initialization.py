"""Initial weights by kind of parameter, and a summary of what they are."""

import math
from collections import defaultdict
from collections.abc import Callable, Iterator

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from utils.cli import UserError

INITIAL_STD = 0.02
# Ends of the names of the maps that write into the residual stream, of attention and MLP: llama and its kin, gpt2,
# bert, modernbert, t5, gpt_neox.
RESIDUAL_PROJECTIONS = (
    ".o_proj", ".down_proj", ".c_proj", ".output.dense", ".Wo", ".o", ".wo", ".attention.dense", ".dense_4h_to_h"
)  # fmt: skip


@torch.no_grad()
def initialize_normal(model: nn.Module) -> None:
    """Weights and embeddings N(0, 0.02) (GPT-2 and BERT's standard deviation), biases 0, norm weights 1."""
    for module in model.modules():
        if isinstance(module, nn.Linear | Conv1D | nn.Embedding):
            module.weight.normal_(0.0, INITIAL_STD)
        elif isinstance(module, nn.LayerNorm | nn.RMSNorm) and module.weight is not None:
            module.weight.fill_(1.0)  # an RMSNorm of transformers is at its neutral value, with some 0, as it comes
        for name, parameter in module.named_parameters(recurse=False):
            if name.endswith("bias"):
                parameter.zero_()


@torch.no_grad()
def initialize_gpt2(model: PreTrainedModel) -> None:
    """`initialize_normal`, residual projections divided by √N, N of them in a stack (Radford et al., 2019, 2.3)."""
    initialize_normal(model)
    stacks = [model.get_encoder(), model.get_decoder()] if model.config.is_encoder_decoder else [model]
    for stack in stacks:
        projections = residual_projections(stack)
        if len(projections) < 2 * model.config.num_hidden_layers:
            raise UserError(
                f"model.initialization gpt2: which maps of {type(model).__name__} write into the residual stream is not "
                "known; choose model or normal"
            )
        for projection in projections:
            projection.weight.div_(math.sqrt(len(projections)))  # type: ignore[operator, union-attr]


def residual_projections(model: nn.Module) -> list[nn.Module]:
    """The linear maps of attention and MLP that write into the residual stream."""
    return [
        module for name, module in model.named_modules()
        if isinstance(module, nn.Linear | Conv1D) and name.endswith(RESIDUAL_PROJECTIONS)
    ]  # fmt: skip


INITIALIZATIONS: dict[str, Callable[[PreTrainedModel], None]] = {
    "model": lambda model: None,  # transformers has done it
    "normal": initialize_normal,
    "gpt2": initialize_gpt2,
}


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
