"""Initial weights."""

import math
from collections.abc import Callable

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from utils.cli import UserError

INITIAL_STD = 0.02
# Name endings of the linear layers of attention and MLP that write into the residual stream: llama and its relatives,
# gpt2, bert, modernbert, t5, gpt_neox.
RESIDUAL_PROJECTIONS = (
    ".o_proj", ".down_proj", ".c_proj", ".output.dense", ".Wo", ".o", ".wo", ".attention.dense", ".dense_4h_to_h"
)  # fmt: skip


@torch.no_grad()
def initialize_normal(model: nn.Module) -> None:
    """Weights and embeddings N(0, 0.02) (the standard deviation of GPT-2 and BERT), biases 0, norm weights 1."""
    for module in model.modules():
        if isinstance(module, nn.Linear | Conv1D | nn.Embedding):
            module.weight.normal_(0.0, INITIAL_STD)
        elif isinstance(module, nn.LayerNorm | nn.RMSNorm) and module.weight is not None:
            module.weight.fill_(1.0)  # transformers makes its own RMSNorms neutral (some by 0)
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
            unknown = f"the residual projections of {type(model).__name__} are not known"
            raise UserError(f"model.initialization gpt2: {unknown}; choose model or normal")
        for projection in projections:
            projection.weight.div_(math.sqrt(len(projections)))  # type: ignore[operator, union-attr]


def residual_projections(model: nn.Module) -> list[nn.Module]:
    """The linear layers of attention and MLP that write into the residual stream."""
    linear = ((name, module) for name, module in model.named_modules() if isinstance(module, nn.Linear | Conv1D))
    return [module for name, module in linear if name.endswith(RESIDUAL_PROJECTIONS)]


INITIALIZATIONS: dict[str, Callable[[PreTrainedModel], None]] = {
    "model": lambda model: None,  # transformers has done it
    "normal": initialize_normal,
    "gpt2": initialize_gpt2,
}


def is_norm(module: nn.Module) -> bool:
    """LayerNorm or an RMSNorm; each architecture in transformers has its own class of the latter."""
    return isinstance(module, nn.LayerNorm | nn.RMSNorm) or type(module).__name__.endswith(("RMSNorm", "LayerNorm"))
