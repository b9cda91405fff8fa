"""A model without memory: its tensors have a shape, a type and a device, and nothing is computed."""

import copy
from typing import Any, TypeVar

import torch
from torch import nn

Module = TypeVar("Module", bound=nn.Module)


def fake_copy(module: Module, device: str) -> Module:
    """`module` with parameters and buffers that have no memory. To be called, and used, in a `FakeTensorMode`."""
    memo: dict[int, Any] = {}  # what stands here is not copied: nothing is read, and shared parameters stay shared
    for tensor in [*module.parameters(), *module.buffers()]:
        fake = torch.empty(tensor.shape, dtype=tensor.dtype, device=device)
        memo[id(tensor)] = nn.Parameter(fake, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else fake
    return copy.deepcopy(module, memo)
