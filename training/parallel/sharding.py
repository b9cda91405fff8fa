"""Parameters sharded over the ranks (FSDP2)."""

import dataclasses
from datetime import timedelta

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import nn
from torch.distributed.fsdp import register_fsdp_forward_method
from torch.distributed.tensor import DTensor


def is_sharded(accelerator: Accelerator) -> bool:
    """Whether a rank holds only a shard of each parameter."""
    return accelerator.distributed_type == DistributedType.FSDP


def ranks_per_copy(accelerator: Accelerator) -> int:
    """The number of ranks that share each parameter; 1 if each rank has all of them."""
    if not is_sharded(accelerator):
        return 1
    parallelism = accelerator.parallelism_config
    return accelerator.num_processes if parallelism is None else parallelism.dp_shard_size * parallelism.cp_size


def keep_sums_in_fp32(accelerator: Accelerator, objective: nn.Module) -> None:
    """With FSDP in bf16: add up the residual stream and the gradients in fp32, and return the loss in the model's own type,
    as one device and DDP do. Call before `prepare`, and `set_up_sharded` after it.

    accelerate would do all three in bf16, whose 8 bits turn a loss of 9.03 into 9.0.
    """
    if is_sharded(accelerator) and (policy := accelerator.state.fsdp_plugin.mixed_precision_policy) is not None:
        accelerator.state.fsdp_plugin.mixed_precision_policy = dataclasses.replace(
            policy, reduce_dtype=torch.float32, output_dtype=None, cast_forward_inputs=False
        )
        for module in objective.modules():
            if isinstance(module, nn.Embedding):  # gathered in bf16
                module.register_forward_hook(lambda _, __, output: output.float())


def set_up_sharded(accelerator: Accelerator, objective: nn.Module) -> None:
    """After `prepare`, let FSDP gather the parameters for `generate` and `predict`, as it does for `forward`, and compute
    all three under autocast, which accelerate leaves out with FSDP. Without FSDP a no-op."""
    if not is_sharded(accelerator):
        return
    policy = accelerator.state.fsdp_plugin.mixed_precision_policy
    for name in ("forward", "generate", "predict"):
        if policy is not None:
            autocast = torch.autocast(accelerator.device.type, policy.param_dtype)
            setattr(objective, name, autocast(getattr(objective, name)))
        if name != "forward":
            register_fsdp_forward_method(objective, name)


def meeting_group() -> dist.ProcessGroup:
    """A group of all ranks whose barrier fails after 20 seconds, to find out whether one has left the others (all call)."""
    return dist.new_group(backend="gloo", timeout=timedelta(seconds=20))


def full_tensor(tensor: torch.Tensor) -> torch.Tensor:
    """The whole of a sharded tensor, on every rank (all must call); any other tensor as it is."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
