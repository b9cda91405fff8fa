"""The optimizers that `optimizer.name` can choose, and which parameters they decay.

To add one, write a function that builds it and give it an entry in `OPTIMIZERS`; no other code names the optimizers.
The module imports torch inside its functions, so that an unknown name is refused before torch's slow import.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from utils.cli import UserError, nearest
from utils.config import OptimizerConfig

if TYPE_CHECKING:
    import torch
    from torch import nn


@dataclass(frozen=True)
class Entry:
    """What the rest of the code has to know about an optimizer."""

    build: Callable[[nn.Module, OptimizerConfig, bool], torch.optim.Optimizer]  # (model, config, fused)
    state_size: float  # bytes of state per byte of trainable weights
    shards: bool = True  # whether its state follows the sharding of the parameters, so that FSDP can use it
    library: str | None = None  # that only this optimizer needs
    extra: str | None = None  # of pyproject.toml, which installs `library`


def check_optimizer(config: OptimizerConfig, installed: bool = True) -> None:
    """`UserError` if there is no such optimizer or, with `installed`, its library is missing."""
    if config.name not in OPTIMIZERS:
        hint = nearest(config.name, OPTIMIZERS)
        raise UserError(f"optimizer.name {config.name} is unknown{hint}; it is one of {', '.join(OPTIMIZERS)}")
    entry = OPTIMIZERS[config.name]
    if installed and entry.library and find_spec(entry.library) is None:
        raise UserError(f"optimizer.name {config.name} needs {entry.library}: pip install -e '.[{entry.extra}]'")


def build_optimizer(model: nn.Module, config: OptimizerConfig, fused: bool = True) -> torch.optim.Optimizer:
    """The optimizer of `model`'s trainable parameters, with weight decay on matrices only.

    `fused` uses torch's fused kernels where the optimizer has them. Turn it off if gradients are scaled (fp16): a fused
    step skips an overflow by itself, and accelerate then cannot tell that it was skipped. In its place come torch's
    operations on lists of tensors (`foreach`): without either torch updates one tensor after the other.
    """
    check_optimizer(config)
    return OPTIMIZERS[config.name].build(model, config, fused)


def build_adamw(model: nn.Module, config: OptimizerConfig, fused: bool) -> torch.optim.Optimizer:
    """AdamW: Loshchilov and Hutter, 2019 (arXiv 1711.05101)."""
    import torch

    return torch.optim.AdamW(decay_groups(model, config), **adamw_options(config), fused=fused, foreach=not fused)


def build_muon(model: nn.Module, config: OptimizerConfig, fused: bool) -> torch.optim.Optimizer:
    """Muon for the hidden matrices, AdamW for everything else; see `MuonAdamW`."""
    import torch

    from training.optimization.muon import Muon, MuonAdamW

    matrices = hidden_matrices(model)
    groups = decay_groups(model, config)
    hidden = [parameter for parameter in groups[0]["params"] if id(parameter) in matrices]
    groups[0]["params"] = [parameter for parameter in groups[0]["params"] if id(parameter) not in matrices]
    muon = Muon(
        [{"params": hidden}], lr=config.learning_rate, weight_decay=config.weight_decay, momentum=config.momentum,
        nesterov=True, adjust_lr_fn="match_rms_adamw",
    )  # fmt: skip
    return MuonAdamW(muon, torch.optim.AdamW(groups, **adamw_options(config), fused=fused, foreach=not fused))


def build_adafactor(model: nn.Module, config: OptimizerConfig, fused: bool) -> torch.optim.Optimizer:
    """torch's Adafactor: Shazeer and Stern, 2018 (arXiv 1804.04235)."""
    import torch

    return torch.optim.Adafactor(decay_groups(model, config), lr=config.learning_rate)


def build_sgd(model: nn.Module, config: OptimizerConfig, fused: bool) -> torch.optim.Optimizer:
    """SGD with Nesterov momentum, as in Sutskever et al., 2013."""
    import torch

    options: dict[str, Any] = {"lr": config.learning_rate, "momentum": config.momentum, "nesterov": config.momentum > 0}
    return torch.optim.SGD(decay_groups(model, config), **options, fused=fused, foreach=not fused)


def build_adamw_8bit(model: nn.Module, config: OptimizerConfig, fused: bool) -> torch.optim.Optimizer:
    """AdamW with 8-bit state: Dettmers et al., 2022 (arXiv 2110.02861). Small parameters keep an fp32 state.

    Its state is plain tensors, and it needs no compiler.
    """
    # On a CPU it warns that it lacks a kernel for inference.
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    from bitsandbytes.optim import AdamW8bit

    return AdamW8bit(decay_groups(model, config), **adamw_options(config))


OPTIMIZERS = {
    "adamw": Entry(build_adamw, state_size=2),
    "muon": Entry(build_muon, state_size=2),
    "adafactor": Entry(build_adafactor, state_size=0, shards=False),
    "sgd": Entry(build_sgd, state_size=1),
    "adamw_8bit": Entry(build_adamw_8bit, state_size=0.5, shards=False, library="bitsandbytes", extra="optim8bit"),
}


def adamw_options(config: OptimizerConfig) -> dict[str, Any]:
    return {"lr": config.learning_rate, "betas": (config.beta1, config.beta2), "eps": config.epsilon}


def decay_groups(model: nn.Module, config: OptimizerConfig) -> list[dict[str, Any]]:
    """Two parameter groups: with weight decay, and without. Two more for each module with a learning rate of its own; of
    modules inside each other, the inner one's rate applies to it."""
    from utils.model.build import find_modules

    decays = (config.weight_decay, 0.0)
    groups: list[dict[str, Any]] = [
        {"params": params, "weight_decay": decay} for params, decay in zip(split_by_decay(model), decays, strict=True)
    ]
    modules = find_modules(model, config.learning_rates, "optimizer.learning_rates")
    owned = {name: {id(parameter) for parameter in module.parameters()} for name, module in modules.items()}
    for name, own in sorted(owned.items(), key=lambda item: len(item[1])):  # inner modules first
        for group in groups[:2]:
            taken = [parameter for parameter in group["params"] if id(parameter) in own]
            group["params"] = [parameter for parameter in group["params"] if id(parameter) not in own]
            if taken:
                groups.append(group | {"params": taken, "lr": config.learning_rates[name]})
    return groups


def split_by_decay(model: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """Trainable parameters with and without weight decay, each shared one once.

    Weight decay applies to parameters of two or more dimensions (linear maps, embeddings) that belong to no norm and
    are no bias. The choice goes by what a parameter is, because lists of names miss GPT-2's `ln_1` and many an RMSNorm.
    Only two-dimensional biases are recognised by name: those of a mixture's experts, and T5's
    `relative_attention_bias`, which is stored as an embedding but added to attention scores.
    """
    from utils.model.initialization import is_norm

    decayed: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for path, parameter in model.named_parameters():
        if parameter.requires_grad:
            where, _, name = path.rpartition(".")
            module, is_bias = model.get_submodule(where), where.endswith("bias") or name.endswith("bias")
            chosen = decayed if parameter.ndim >= 2 and not is_norm(module) and not is_bias else others
            chosen.append(parameter)
    return decayed, others


def hidden_matrices(model: nn.Module) -> set[int]:
    """Ids of the weights of linear maps that are neither an embedding nor the output head, also if these are tied."""
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    head = model.get_output_embeddings()  # type: ignore[operator]
    ends = [module for module in model.modules() if isinstance(module, nn.Embedding) or module is head]
    outer = {id(parameter) for module in ends for parameter in module.parameters()}
    return {id(module.weight) for module in model.modules() if isinstance(module, nn.Linear | Conv1D)} - outer
