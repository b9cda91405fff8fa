"""bf16 under FSDP2 against bf16 on one device: the residual stream is fp32 in both."""

import copy
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from test_kernels import CPU, build
from torch.distributed.fsdp import fully_shard

from training.fp8 import fp8_layers
from training.parallel.sharding import keep_sums_in_fp32, set_up_sharded
from utils.config import KernelConfig, ObjectiveConfig
from utils.model.initialization import is_norm
from utils.objectives import Objective, build_objective


@pytest.fixture(autouse=True)
def one_rank():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def batch() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    ids = torch.randint(1, 101, (4, 65))
    return {"targets": ids[:, 1:], "input_ids": ids[:, :-1]}


def shard(objective: Objective, precision: str) -> list[torch.dtype]:
    """As accelerate does it for train.py; the types of the blocks' inputs will be appended to what it returns."""
    plugin = FullyShardedDataParallelPlugin(fsdp_version=2)
    plugin.set_mixed_precision(precision)
    accelerator = SimpleNamespace(
        distributed_type=DistributedType.FSDP, state=SimpleNamespace(fsdp_plugin=plugin), device=CPU
    )
    keep_sums_in_fp32(accelerator, objective)
    blocks = [module for module in objective.modules() if type(module).__name__ in objective.model._no_split_modules]
    for module in [*blocks, objective]:
        fully_shard(module, mp_policy=plugin.mixed_precision_policy)
    set_up_sharded(accelerator, objective)
    seen: list[torch.dtype] = []
    for block in blocks:
        block.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].dtype))
    return seen


def gradient_of(objective: Objective) -> tuple[float, torch.Tensor]:
    loss = objective(**batch())
    loss.backward()
    found = [parameter.grad for parameter in objective.parameters()]
    return float(loss.detach()) / 256, torch.cat([getattr(each, "_local_tensor", each).flatten() for each in found])


@pytest.mark.parametrize("architecture", ["llama", "qwen3"])
def test_one_device_and_fsdp2_compute_the_same_in_bf16(architecture):
    """But for norm weights and embeddings, which FSDP2 gathers in bf16, and the rounding of each weight's gradient."""
    model = build(architecture)
    for module in filter(is_norm, model.modules()):
        torch.nn.init.normal_(module.weight, 1.0, 0.1)
    objective = build_objective(model, ObjectiveConfig(), "auto", KernelConfig(), CPU)
    sharded = copy.deepcopy(objective)
    seen = shard(sharded, "bf16")
    with torch.autocast("cpu", torch.bfloat16):
        loss, gradient = gradient_of(objective)
    sharded_loss, sharded_gradient = gradient_of(sharded)
    assert set(seen) == {torch.float32} and len(seen) >= 2
    assert sharded_loss == pytest.approx(loss, abs=2e-4)
    assert float((gradient - sharded_gradient).norm() / gradient.norm()) < 0.015
    with torch.no_grad():
        assert sharded.predict(input_ids=batch()["input_ids"]).shape == (4, 64)  # under autocast and gathered


def test_fp8_layers_train_when_they_are_sharded():
    """By torchao's own conversion, as accelerate calls it, without its parameters for FSDP."""
    torchao = pytest.importorskip("torchao.float8")
    objective = build_objective(build("llama"), ObjectiveConfig(), "auto", KernelConfig(), CPU)
    names = fp8_layers(objective)
    plain = copy.deepcopy(objective)
    torchao.convert_to_float8_training(objective, module_filter_fn=lambda _, name: name in names)
    shard(objective, "fp8")
    with torch.autocast("cpu", torch.bfloat16):
        loss, gradient = gradient_of(plain)
    fp8_loss, fp8_gradient = gradient_of(objective)
    assert fp8_loss == pytest.approx(loss, abs=0.02) and fp8_loss != loss
    assert float((gradient - fp8_gradient).norm() / gradient.norm()) < 0.2
