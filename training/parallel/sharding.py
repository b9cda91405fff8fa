"""Parameters that are shared out over the ranks (FSDP2)."""

import dataclasses

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import nn
from torch.distributed.fsdp import register_fsdp_forward_method
from torch.distributed.tensor import DTensor


def is_sharded(accelerator: Accelerator) -> bool:
    """Whether a rank holds only a part of the parameters."""
    return accelerator.distributed_type == DistributedType.FSDP


def ranks_per_copy(accelerator: Accelerator) -> int:
    """Over how many ranks each parameter is shared out; 1 where each rank has all of them."""
    if not is_sharded(accelerator):
        return 1
    parallelism = accelerator.parallelism_config
    return accelerator.num_processes if parallelism is None else parallelism.dp_shard_size * parallelism.cp_size


def keep_sums_in_fp32(accelerator: Accelerator) -> None:
    """Under FSDP in bf16: sum gradients over the ranks in fp32, and return the loss as the model does.

    accelerate would have both in bf16, whose 8 bits make 9.0 of a loss of 9.03. To be called before `prepare`.
    """
    if is_sharded(accelerator) and (policy := accelerator.state.fsdp_plugin.mixed_precision_policy) is not None:
        policy = dataclasses.replace(policy, reduce_dtype=torch.float32, output_dtype=None)
        accelerator.state.fsdp_plugin.mixed_precision_policy = policy


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor itself, or all ranks' parts of it, on each rank: all must call."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def let_it_write(objective: nn.Module) -> None:
    """Let FSDP gather the parameters for `generate` and `predict` as it does for `forward`; else nothing."""
    for name in ("generate", "predict"):
        register_fsdp_forward_method(objective, name)
