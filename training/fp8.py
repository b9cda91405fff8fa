"""fp8: the products of linear layers in 8 bits, by accelerate's recipe for torchao.

    accelerate launch --config_file accelerate_configs/single_gpu.yaml --mixed_precision fp8 train.py

Weights stay fp32 parameters, and so do checkpoints and exports. In each of a layer's three products (output, gradient of
the input, gradient of the weight) torchao divides a tensor by its largest number and rounds it to fp8. Everything else
is as under bf16: attention's own products, norms, embeddings, the loss, and a model's first and last linear layer.
"""

import os

import torch
from accelerate import PartialState
from accelerate.utils import AORecipeKwargs, parse_flag_from_env
from accelerate.utils.ao import filter_linear_layers, find_first_last_linear_layers
from torch import nn

from utils.cli import UserError
from utils.model.adapters import without_adapters

OLDEST_GPU = (8, 9)  # compute capability of Ada, the first with fp8


def build_fp8_recipe(launch: PartialState) -> list[AORecipeKwargs]:
    """What the Accelerator needs for fp8, if this launch asks for it; `UserError` for a launch that fp8 does not suit."""
    if os.environ.get("ACCELERATE_MIXED_PRECISION") != "fp8":
        return []
    backend = os.environ.get("ACCELERATE_FP8_BACKEND", "ao")
    if backend.lower() not in ("ao", "no"):
        raise UserError(
            f"fp8_config: fp8_backend {backend} is not supported; use ao (torchao), or leave fp8_config out"
        )
    if launch.device.type == "cuda" and torch.cuda.get_device_capability(launch.device) < OLDEST_GPU:
        raise UserError(f"{torch.cuda.get_device_name(launch.device)} has no fp8; launch with --mixed_precision bf16")
    if parse_flag_from_env("ACCELERATE_USE_FSDP") and parse_flag_from_env("FSDP_CPU_RAM_EFFICIENT_LOADING"):
        raise UserError("fp8 with FSDP needs fsdp_cpu_ram_efficient_loading: false in fsdp_config")
    # accelerate's default, meant for FSDP, wraps each weight in a new parameter. An optimizer made before `prepare` does
    # not know it, and the weights would silently never change.
    return [AORecipeKwargs(enable_fsdp_float8_all_gather=False)]


def fp8_layers(module: nn.Module) -> list[str]:
    """Names of the layers within `module` that accelerate will convert."""
    ends = list(find_first_last_linear_layers(module))
    linear = [(name, layer) for name, layer in module.named_modules() if isinstance(layer, nn.Linear)]
    return [name for name, layer in linear if filter_linear_layers(layer, name, ends)]


def check_fp8(module: nn.Module) -> None:
    """`UserError` if fp8 would change nothing for this model, or more than it should."""
    model = without_adapters(module)
    if hasattr(module, "peft_config"):
        raise UserError(
            "model.lora is not supported in fp8, which would also compute gradients of the frozen weights: "
            "launch with --mixed_precision bf16"
        )
    if not fp8_layers(module):
        only = "apart from the first and the last it has no nn.Linear whose sizes are multiples of 16"
        if any(type(layer).__name__ == "Conv1D" for layer in module.modules()):
            only = "its layers are Conv1D, which torchao does not convert"
        raise UserError(
            f"fp8 would compute no layer of {type(model).__name__}: {only}; launch with --mixed_precision bf16"
        )
