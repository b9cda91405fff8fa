"""What a device computes fast: bf16, fp32 products, and its peak."""

import contextlib
import json
import math
import os
import platform
import re
import resource
import sys
import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import is_torch_version

from utils.files import UserError, read_json, replace_text

# Name → FLOP/s of dense matrix products by precision, and memory in GB: the vendor's figures, halved where they are for
# sparse matrices. bf16 also stands for fp16, fp8 for e4m3, both with sums in fp32; tf32 for fp32 that may round its
# factors. The A100 has no fp8.
# L4, RTX 4090: images.nvidia.com/aem-dam/Solutions/Data-Center/l4/nvidia-ada-gpu-architecture-whitepaper-v2.1.pdf,
#   appendices A and C. A100: www.nvidia.com/content/dam/en-zz/Solutions/Data-Center/a100/pdf/
#   nvidia-a100-datasheet-us-nvidia-1758950-r4-web.pdf. H100: resources.nvidia.com/en-us-tensor-core/
#   nvidia-tensor-core-gpu-datasheet.
HARDWARE: dict[str, dict[str, float]] = {
    "L4": {"fp8": 242e12, "bf16": 121e12, "tf32": 60e12, "fp32": 30.3e12, "memory": 24},
    "RTX 4090": {"fp8": 330.3e12, "bf16": 165.2e12, "tf32": 82.6e12, "fp32": 82.6e12, "memory": 24},
    "A100 80GB": {"bf16": 312e12, "tf32": 156e12, "fp32": 19.5e12, "memory": 80},
    "H100 SXM": {"fp8": 1979e12, "bf16": 989e12, "tf32": 494e12, "fp32": 67e12, "memory": 80},
}
# The names that CUDA gives these cards. The H100 as a PCIe card is slower, and is measured.
CARD_NAMES = {
    "L4": r"\bL4\b", "RTX 4090": r"RTX 4090$", "A100 80GB": r"\bA100\b", "H100 SXM": r"\bH100 80GB HBM",
}  # fmt: skip
MATMUL_SECONDS = 0.5


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
    On CUDA "high" is TF32: factors are rounded to 10 bits, sums are fp32.
    """
    if name != "auto":
        return name
    if device.type == "cuda":
        return "high"
    has = cpu_capabilities()
    return "medium" if device.type == "cpu" and has.get("avx512_bw") and not has.get("amx_bf16") else "highest"


def avoid_faulty_attention(device: torch.device, sequence_length: int, layout: str) -> None:
    """Turn cuDNN's attention off where rows may have a length of 64 mod 128: with a mask, torch's gradients may then be
    NaN on H100 and H200 (pytorch/pytorch issue 196678, in torch 2.13)."""
    may_occur = layout == "padded" or sequence_length % 128 == 64
    if device.type == "cuda" and may_occur and is_torch_version(">=", "2.13"):
        torch.backends.cuda.enable_cudnn_sdp(False)


def precision_of(mixed_precision: str, matmul_precision: str) -> str:
    """The key of `HARDWARE` for accelerate's `mixed_precision` and torch's `set_float32_matmul_precision`."""
    if mixed_precision == "fp8":
        return "fp8"
    if mixed_precision in ("bf16", "fp16"):
        return "bf16"
    return "fp32" if matmul_precision == "highest" else "tf32"


def measure_flops_per_second(device: torch.device, mixed_precision: str) -> float:
    """FLOP/s of square matrix products on `device`: of the fastest in half a second, as other processes slow some down.

    fp32 is computed as `torch.set_float32_matmul_precision` says at the time; a CPU with this process's threads.
    """
    size = {"cpu": 1024, "cuda": 8192}.get(device.type, 2048)
    if mixed_precision == "fp8":
        left, scale = torch.ones(size, size, device=device).to(torch.float8_e4m3fn), torch.ones((), device=device)
        multiply = partial(torch._scaled_mm, left, left.T, scale, scale, out_dtype=torch.bfloat16)
    else:
        dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(mixed_precision, torch.float32)
        left = torch.ones(size, size, dtype=dtype, device=device)
        multiply = partial(torch.mm, left, torch.ones_like(left))
    product = multiply()  # the first one chooses and prepares a kernel
    float(product[0, 0])  # waits for the device
    fastest, now = math.inf, time.perf_counter()
    end = now + MATMUL_SECONDS
    while now < end:
        product, started = multiply(), now
        float(product[0, 0])
        now = time.perf_counter()
        fastest = min(fastest, now - started)
    return 2 * size**3 / fastest


def find_card(device: torch.device) -> str | None:
    """The name in `HARDWARE` of the card `device`, None for other cards and a CPU."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    return next((card for card, pattern in CARD_NAMES.items() if re.search(pattern, name)), None)


def peak_flops_per_second(device: torch.device, mixed_precision: str) -> float:
    """FLOP/s that `device` could reach: the vendor's figure for a card in `HARDWARE`, else measured once per machine and
    kept in the user's cache folder."""
    matmul = torch.get_float32_matmul_precision()
    if (card := find_card(device)) is not None:
        return HARDWARE[card][precision_of(mixed_precision, matmul)]
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{platform.node()} {device.type}"
    path = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "plainloop" / "peaks.json"
    key = f"{name}, {torch.get_num_threads()} threads, {mixed_precision}, {matmul}, torch {torch.__version__}"
    peaks: dict[str, float] = {}
    with contextlib.suppress(UserError):
        peaks = read_json(path)
    if not isinstance(peaks.get(key), float):
        peaks[key] = measure_flops_per_second(device, mixed_precision)
        with contextlib.suppress(OSError):  # no home folder, or a full disk: it is measured again
            path.parent.mkdir(parents=True, exist_ok=True)
            replace_text(path, json.dumps(peaks, indent=2) + "\n")
    return peaks[key]


def blend_peaks(peak: float, bf16: float, share: float) -> float:
    """FLOP/s of work of which `share` is done at `peak`, and the rest at the peak in bf16."""
    return peak if share == 1 else 1 / (share / peak + (1 - share) / bf16)


def memory_bytes(device: torch.device) -> int:
    """All memory of the GPU, or of the machine."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def peak_memory_bytes(device: torch.device) -> int:
    """The most memory that this process has used so far: of the GPU, or the resident set on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
