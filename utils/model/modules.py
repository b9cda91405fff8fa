"""Small tools for modules: evaluation mode for a block, and copies without memory."""

import contextlib
import copy
from collections.abc import Iterator
from typing import Any, TypeVar

import torch
from torch import nn

Module = TypeVar("Module", bound=nn.Module)


@contextlib.contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Put `module` in evaluation mode for the block, and back in its own mode after it."""
    was_training = module.training
    module.eval()
    try:
        yield
    finally:
        module.train(was_training)


def fake_copy(module: Module, device: str) -> Module:
    """`module` with parameters and buffers that have no memory. Call it, and use the result, in a `FakeTensorMode`."""
    memo: dict[int, Any] = {}  # deepcopy takes these as copied: it reads nothing, and shared parameters stay shared
    for tensor in [*module.parameters(), *module.buffers()]:
        fake = torch.empty(tensor.shape, dtype=tensor.dtype, device=device)
        memo[id(tensor)] = nn.Parameter(fake, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else fake
    return copy.deepcopy(module, memo)
