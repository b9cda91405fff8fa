"""What a device computes fast: bf16, and fp32 products."""

from collections.abc import Mapping
from typing import Any

import torch


def cpu_capabilities() -> Mapping[str, Any]:
    """Whether this CPU has instructions such as `avx512_bf16`, by name; empty where torch does not know (2.9)."""
    return getattr(torch.cpu, "get_capabilities", dict)()


def fast_bf16(device: torch.device) -> bool:
    """Whether matrix products in bf16 are faster than in fp32: by the CPU's instructions or the GPU's generation."""
    if device.type == "cpu":
        return any(present for name, present in cpu_capabilities().items() if "bf16" in name)
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)


def resolve_matmul_precision(name: str, device: torch.device) -> str:
    """torch's name of the option `matmul_precision`.

    With "medium" torch leaves fp32 products on a CPU with AVX-512 to oneDNN, twice as fast as MKL on AMD and as exact;
    only with AMX would it round to bf16. Without AVX-512 it changes nothing (torch, aten/src/ATen/native/mkldnn).
    """
    if name != "auto":
        return name
    has = cpu_capabilities()
    return "medium" if device.type == "cpu" and has.get("avx512_bw") and not has.get("amx_bf16") else "highest"
