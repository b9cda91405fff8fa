"""How devices compute: precision and kernels in use, peaks of named hardware, and the time that work will take."""

import time
from collections.abc import Mapping
from typing import Any

import torch

# Name → FLOP/s of dense matrix products by precision, and memory in GB: the vendor's figures, halved where they are for
# sparse matrices. bf16 also stands for fp16, with sums in fp32; tf32 for fp32 that may round its factors.
# L4, RTX 4090: images.nvidia.com/aem-dam/Solutions/Data-Center/l4/nvidia-ada-gpu-architecture-whitepaper-v2.1.pdf,
#   appendices A and C. A100: www.nvidia.com/content/dam/en-zz/Solutions/Data-Center/a100/pdf/
#   nvidia-a100-datasheet-us-nvidia-1758950-r4-web.pdf. H100: resources.nvidia.com/en-us-tensor-core/
#   nvidia-tensor-core-gpu-datasheet.
HARDWARE: dict[str, dict[str, float]] = {
    "L4": {"bf16": 121e12, "tf32": 60e12, "fp32": 30.3e12, "memory": 24},
    "RTX 4090": {"bf16": 165.2e12, "tf32": 82.6e12, "fp32": 82.6e12, "memory": 24},
    "A100 80GB": {"bf16": 312e12, "tf32": 156e12, "fp32": 19.5e12, "memory": 80},
    "H100 SXM": {"bf16": 989e12, "tf32": 494e12, "fp32": 67e12, "memory": 80},
}
# Share of the peak that training reaches. Llama 3 reached 38 to 43 % (Grattafiori et al., 2024, arXiv 2407.21783),
# PaLM 46 % (Chowdhery et al., 2022, arXiv 2204.02311); small models and short rows stay below.
UTILISATION = 0.4
MATMUL_SECONDS = 0.5
MATMUL_SIZE = {"cpu": 1024, "cuda": 8192}


def precision_of(mixed_precision: str, matmul_precision: str) -> str:
    """The key of `HARDWARE` for accelerate's `mixed_precision` and torch's `set_float32_matmul_precision`."""
    if mixed_precision in ("bf16", "fp16"):
        return "bf16"
    return "fp32" if matmul_precision == "highest" else "tf32"


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


def measure_flops_per_second(device: torch.device, mixed_precision: str) -> float:
    """FLOP/s of square matrix products on `device`, by half a second of them.

    fp32 is computed as `torch.set_float32_matmul_precision` says at the time; a CPU with this process's threads.
    """
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(mixed_precision, torch.float32)
    size = MATMUL_SIZE.get(device.type, 2048)
    left, right = torch.ones(size, size, dtype=dtype, device=device), torch.ones(size, size, dtype=dtype, device=device)
    product = left @ right  # the first one chooses and prepares a kernel
    count, started = 0, time.perf_counter()
    while (elapsed := time.perf_counter() - started) < MATMUL_SECONDS:
        product = left @ right
        float(product[0, 0])  # waits for the device
        count += 1
    return count * 2 * size**3 / elapsed


def estimate_time(flops: float, flops_per_second: float, num_devices: int = 1) -> float:
    """Seconds for `flops` in all on `num_devices`, at `UTILISATION` of their peak of `flops_per_second` each."""
    return flops / (flops_per_second * num_devices * UTILISATION)


def duration(seconds: float) -> str:
    """Two digits in the largest fitting unit, such as `4.2 h`."""
    for unit, length in (("years", 365 * 86400), ("days", 86400), ("h", 3600), ("min", 60)):
        if seconds >= length:
            return f"{_two_digits(seconds / length)} {unit}"
    return f"{_two_digits(seconds)} s"


def _two_digits(value: float) -> str:
    return f"{value:.1f}" if value < 10 else f"{value:,.0f}"
