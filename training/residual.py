"""The type of the residual stream in bf16."""

from typing import Any

import torch
from torch import nn

from utils.kernels.head_loss import product_dtype
from utils.model.initialization import is_norm


def carry_in_bf16(model: nn.Module) -> None:
    """Under autocast to bf16, let embeddings and norms of `model` return bf16: so the blocks add up bf16.

    Autocast alone leaves them in fp32, and with them the residual stream, queries and keys: twice the memory traffic, and
    other numbers than under FSDP2, which gathers the parameters in bf16. Norms still compute in fp32.
    """

    def narrow(_: nn.Module, __: Any, output: Any) -> Any:
        dtype = product_dtype(output)
        return output.to(dtype) if dtype == torch.bfloat16 else output

    for module in model.modules():
        if isinstance(module, nn.Embedding) or is_norm(module):
            module.register_forward_hook(narrow)
