"""Check that this machine computes what it should, and how fast: about a minute.

    python examples/doctor.py --folder runs

Prints a table of ok / slow / WRONG and ends with one JSON object; the exit code is 1 if something is WRONG. The checks
train models of two small layers by Plainloop's own parts, on a GPU if there is one. Run it on a new machine, and after
a new driver or a new torch. "slow" says only that the machine could do better; the results are right.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from utils.cli import UserError, parse_config, run_script


@dataclass
class DoctorConfig:
    """Options of doctor.py."""

    folder: str = "runs"
    """Folder for the run folders to come; its disk is tried."""

    def problems(self) -> list[str]:
        return []


config = parse_config(DoctorConfig, __doc__) if __name__ == "__main__" else None

import contextlib
import itertools
import json
import os
import platform
import shutil
import socket
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any, get_args, get_type_hints

import accelerate
import torch
import transformers
from torch.nn.parallel import DistributedDataParallel

from training.hardware import HARDWARE, find_card, measure_flops_per_second, precision_of, resolve_matmul_precision
from training.model import add_places, check_documents_stay_apart, check_future_is_hidden, random_ids
from training.saving.folders import try_disk
from utils.config import KernelConfig, ModelConfig, ObjectiveConfig
from utils.data.packing import IGNORED
from utils.files import short
from utils.model.build import enable_activation_checkpointing
from utils.objectives import Objective, build_objective

SIZES = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128}
SPECIAL = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": None}
# Grouped heads and rotary positions; learned positions, and a function that gelu_pytorch_tanh replaces.
FURTHER: dict[str, dict[str, Any]] = {
    "llama": {"num_key_value_heads": 2},
    "gpt2": {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
}
PLAIN = KernelConfig(chunked_head=False, fused_activation=False, fast_dropout=False)
ATTENTIONS = tuple(name for name in get_args(get_type_hints(ModelConfig)["attention"]) if name != "auto")
LENGTHS = (1, 64, 131, 192, 320)  # 64 mod 128, one token, a prime
TOLERANCES = {"no": 1e-4, "bf16": 0.05}  # of the largest number, by the mixed precision
SHARE_EXPECTED = 0.6  # of the vendor's peak, which square matrix products should reach
TRIAL_BYTES = 64 * 2**20
SECONDS_TO_SUM = 120  # a fresh process imports torch, and opens its GPU


class Slow(Exception):
    """The result is right, but the machine could do better."""


# ---- Models and batches


def build_small(
    architecture: str, attention: str, kernels: KernelConfig, device: torch.device, precision: str = "no",
    **changes: Any,
) -> Objective:  # fmt: skip
    """A model of two layers with its loss, always with the same weights. `precision`: accelerate's `mixed_precision`."""
    torch.manual_seed(0)
    options = {"vocab_size": 211, "max_position_embeddings": 512} | SIZES | SPECIAL | FURTHER[architecture] | changes
    settings = transformers.CONFIG_MAPPING[architecture](**options)
    default = attention if attention == "eager" else None
    model = transformers.AutoModelForCausalLM.from_config(settings, attn_implementation=default, dtype=torch.float32)
    return build_objective(model.to(device), ObjectiveConfig(), attention, kernels, device, precision).train()


def packed_batch(objective: Objective, rows: int = 4, length: int = 192) -> dict[str, torch.Tensor]:
    """Rows of three documents, the first of one token; in the last row one document. With the documents' places."""
    device = next(objective.parameters()).device
    ids = random_ids(objective.model, rows, length)
    positions = torch.arange(length).repeat(rows, 1)
    for start in (min(1, length - 1), length // 3):
        positions[:-1, start:] = torch.arange(length - start)
    targets = ids.roll(-1, 1)
    targets[:, -1] = IGNORED
    targets[:, :-1][positions[:, 1:] == 0] = IGNORED
    batch = add_places({"input_ids": ids, "position_ids": positions, "targets": targets})
    return {name: values.to(device) for name, values in batch.items()}


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """torch's autocast as accelerate uses it for this `mixed_precision`."""
    return torch.autocast(
        device.type, {"fp16": torch.float16}.get(precision, torch.bfloat16), enabled=precision != "no"
    )


def gradients(objective: Objective, *batches: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    """The loss and all gradients, summed over `batches`."""
    objective.zero_grad()
    losses = [objective(**batch) for batch in batches]
    for loss in losses:
        loss.backward()
    total = torch.stack([loss.detach() for loss in losses]).sum()
    return [total, *(parameter.grad.clone() for parameter in objective.parameters() if parameter.grad is not None)]


def compare(
    found: list[torch.Tensor], expected: list[torch.Tensor], what: str, tolerance: float = TOLERANCES["no"]
) -> float:
    """The largest difference, relative to the largest number of its tensor; `UserError` if it is too large."""
    pairs = zip(found, expected, strict=True)
    differences = [float((left - right).abs().max() / right.abs().max().clamp(min=1e-12)) for left, right in pairs]
    worst = max(differences, key=lambda value: float("inf") if value != value else value)
    if not worst <= tolerance:
        raise UserError(f"{what} differs by {worst:.1e} of the largest number")
    return worst


# ---- The checks: each returns what it found; it raises `Slow`, or any other exception for a wrong result.


def check_apart(device: torch.device) -> str:
    """Packed documents are computed as if they were alone, and no token sees a later one."""
    for architecture in FURTHER:
        objective = build_small(architecture, "auto", KernelConfig(), device)
        check_documents_stay_apart(objective)
        check_future_is_hidden(objective)
    return "packed = alone, later tokens hidden"


def check_kernels(device: torch.device) -> str:
    """Each attention, and the head and activation with it, gives the loss and gradients of its plain twin."""
    on_cuda = device.type == "cuda"
    attentions = [name for name in ATTENTIONS if on_cuda or name != "varlen"]  # a CPU has only a stand-in for it
    precisions = ["no", "bf16"] if on_cuda else ["no"]
    worst, served = dict.fromkeys(precisions, 0.0), set()
    for architecture, attention, precision in itertools.product(FURTHER, attentions, precisions):
        plain = build_small(architecture, "eager", PLAIN, device)
        batch = packed_batch(plain)
        try:
            fast = build_small(architecture, attention, KernelConfig(), device, precision)
        except UserError:  # this device lacks it, or lacks it in this precision
            continue
        served.add(attention)
        with autocast(device, precision):
            found = gradients(fast, batch)
        what = f"{architecture} with attention {attention}, mixed precision {precision},"
        difference = compare(found, gradients(plain, batch), what, TOLERANCES[precision])
        worst[precision] = max(worst[precision], difference)
    differences = ", in bf16 ".join(f"{value:.0e}" for value in worst.values())
    return f"{', '.join(sorted(served))}: largest difference {differences}"


def check_split(device: torch.device) -> str:
    """Micro-batches add up to the whole batch."""
    objective = build_small("llama", "auto", KernelConfig(), device)
    batch = packed_batch(objective)
    rows = {name: values for name, values in batch.items() if name != "cu_seqlens"}  # in fp32 nothing reads it
    parts = [{name: values[start : start + 1] for name, values in rows.items()} for start in range(4)]
    worst = compare(gradients(objective, *parts), gradients(objective, batch), "the sum of four micro-batches")
    return f"split = whole: largest difference {worst:.0e}"


def check_checkpointing(device: torch.device) -> str:
    """Activation checkpointing repeats the forward pass with the same dropout."""
    dropout: dict[str, Any] = dict.fromkeys(FURTHER["gpt2"], 0.1)
    found: list[list[torch.Tensor]] = []
    for recompute in (False, True):
        objective = build_small("gpt2", "auto", KernelConfig(), device, **dropout)
        enable_activation_checkpointing(objective.model, ModelConfig(activation_checkpointing=recompute))
        torch.manual_seed(1)
        found.append(gradients(objective, packed_batch(objective)))
    worst = compare(found[1], found[0], "activation checkpointing")
    return f"checkpointed = plain: largest difference {worst:.0e}"


def check_awkward_lengths(device: torch.device) -> str:
    """Gradients are finite at lengths at which kernels take other paths."""
    precisions = ("no", "bf16", "fp16") if device.type == "cuda" else ("no", "bf16")
    for length, precision in itertools.product(LENGTHS, precisions):
        objective = build_small("llama", "auto", KernelConfig(), device, precision)
        batch = packed_batch(objective, rows=2, length=length)
        batch["targets"][:, 0] = 1  # the row of one token has a target too
        with autocast(device, precision):
            found = gradients(objective, batch)
        if not all(bool(values.isfinite().all()) for values in found):
            raise UserError(f"not finite at {length} positions with mixed precision {precision}")
    return f"finite at {', '.join(map(str, LENGTHS))} positions"


def check_sum_over_devices(device: torch.device) -> str:
    """DDP's gradients are the mean over the ranks: one for each visible GPU, else two CPU processes."""
    ranks = torch.cuda.device_count() if device.type == "cuda" else 2
    if ranks == 1 or device.type not in ("cpu", "cuda"):
        return "one device, nothing to sum"
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    # CUDA does not survive a fork; without it a forked process starts at once.
    method = "spawn" if device.type == "cuda" else "fork"
    arguments = (ranks, port, device.type)
    group = torch.multiprocessing.start_processes(average_on_rank, arguments, ranks, join=False, start_method=method)
    deadline = time.monotonic() + SECONDS_TO_SUM
    try:
        while not group.join(timeout=1):
            if time.monotonic() > deadline:
                raise UserError(
                    f"the ranks did not end in {SECONDS_TO_SUM} s; look at NCCL_DEBUG=INFO and the firewall"
                )
    except torch.multiprocessing.ProcessRaisedException as error:  # its last line says what is wrong
        raise UserError(str(error).strip().splitlines()[-1]) from None
    finally:
        for process in group.processes:
            process.kill()
    return f"{ranks} ranks agree"


def average_on_rank(rank: int, ranks: int, port: int, kind: str) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE=str(ranks))
    torch.set_num_threads(1)
    device = torch.device(f"cuda:{rank}" if kind == "cuda" else kind)
    if kind == "cuda":
        torch.cuda.set_device(device)
    torch.distributed.init_process_group("nccl" if kind == "cuda" else "gloo", rank=rank, world_size=ranks)
    layer = torch.nn.Linear(8, 1, bias=False).to(device)
    wrapped = DistributedDataParallel(layer)  # kept: without it nothing is reduced
    wrapped(torch.full((1, 8), rank + 1.0, device=device)).sum().backward()
    expected = torch.full_like(layer.weight, (ranks + 1) / 2)
    if not torch.equal(layer.weight.grad, expected):  # type: ignore[arg-type]
        raise RuntimeError(f"rank {rank} has {float(layer.weight.grad[0, 0])}, not {float(expected[0, 0])}")  # type: ignore[index]
    del wrapped  # before the group; the other way round gloo may wait for ever
    torch.distributed.destroy_process_group()


def check_disk(folder: Path) -> str:
    """Checkpoints can be written, flushed, renamed and read back here."""
    trial = folder / f"doctor-{os.getpid()}"
    try:
        notes = try_disk(trial)
        trial.mkdir(parents=True, exist_ok=True)
        data, started = os.urandom(TRIAL_BYTES), time.perf_counter()
        with (trial / "new").open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(trial / "new", trial / "file")
        speed = TRIAL_BYTES / (time.perf_counter() - started) / 1e6
        if (trial / "file").read_bytes() != data:
            raise UserError(f"{folder}: a file is not what was written")
    finally:
        shutil.rmtree(trial, ignore_errors=True)
    if notes:
        raise Slow("; ".join(notes))
    return f"{speed:,.0f} MB/s with fsync"


# ---- Speed


def check_peak(device: torch.device, precision: str, matmul: str) -> str:
    """Matrix products reach most of the vendor's peak."""
    with matmul_precision(matmul):
        measured = measure_flops_per_second(device, precision)
    line = f"{measured / 1e12:.3g} TFLOP/s"
    if (card := find_card(device)) is None:
        return line
    published = HARDWARE[card][precision_of(precision, matmul)]
    line += f", {measured / published:.0%} of the vendor's figure for {card}"
    if measured < SHARE_EXPECTED * published:
        raise Slow(f"{line}; look for other processes, a power limit or heat")
    return line


def check_bandwidth(device: torch.device) -> str:
    """GB/s of a copy, read and written."""
    values = torch.ones(2**26 if device.type == "cpu" else 2**28, dtype=torch.float32, device=device)
    copied, seconds = torch.empty_like(values), []
    for _ in range(5):
        started = time.perf_counter()
        copied.copy_(values)
        float(copied[0])  # waits for the device
        seconds.append(time.perf_counter() - started)
    return f"{2 * values.nbytes / statistics.median(seconds) / 1e9:,.0f} GB/s"


def chosen_kernels(device: torch.device) -> str:
    """What `auto` chooses here, and why."""
    objective = build_small("llama", "auto", KernelConfig(), device, "bf16")
    attention = objective.model.config._attn_implementation  # type: ignore[union-attr]
    products = resolve_matmul_precision("auto", device)
    return (
        f"attention {attention} (model.attention auto on {device.type} in bf16), head "
        f"{'chunked' if objective.chunked_head else 'with all logits'}, fp32 products {products}"
    )


@contextlib.contextmanager
def matmul_precision(name: str) -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(name)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


# ---- The table

CHECKS: dict[str, Callable[[torch.device], str]] = {
    "sum over devices": check_sum_over_devices,  # first: a process that has computed on many threads cannot be forked
    "documents apart": check_apart, "kernels": check_kernels, "micro-batches": check_split,
    "checkpointing": check_checkpointing, "awkward lengths": check_awkward_lengths,
}  # fmt: skip


def examine(check: Callable[..., str], *arguments: Any) -> tuple[str, str]:
    """State and finding of one check; comparisons are made in full fp32."""
    try:
        with matmul_precision("highest"):
            return "ok", check(*arguments)
    except Slow as found:
        return "slow", str(found)
    except Exception as error:
        return "WRONG", short(error)


def main(config: DoctorConfig) -> None:
    started = time.perf_counter()
    device = torch.accelerator.current_accelerator() or torch.device("cpu")
    names = [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())]
    print(f"torch {torch.__version__}, transformers {transformers.__version__}, accelerate {accelerate.__version__}, "
          f"Python {platform.python_version()}, CUDA {torch.version.cuda}, {torch.get_num_threads()} threads")  # fmt: skip
    print(f"devices: {', '.join(names) or device.type}")
    peaks = {"fp32 products": ("no", "highest"), "bf16 products": ("bf16", "highest")}
    if device.type == "cuda":
        peaks |= {"tf32 products": ("no", "high"), "fp16 products": ("fp16", "highest")}
    tasks: list[tuple[str, Callable[..., str], tuple[Any, ...]]] = [
        *((name, check, (device,)) for name, check in CHECKS.items()),
        ("disk", check_disk, (Path(config.folder),)), ("chosen kernels", chosen_kernels, (device,)),
        ("bandwidth", check_bandwidth, (device,)), *((name, check_peak, (device, *how)) for name, how in peaks.items()),
    ]  # fmt: skip
    results = {}
    for name, check, arguments in tasks:
        state, finding = examine(check, *arguments)
        results[name] = {"state": state, "finding": finding}
        print(f"{name:<18}{state:<7}{finding}", flush=True)
    seconds = time.perf_counter() - started
    print(json.dumps({"device": names or device.type, "seconds": round(seconds, 1), "checks": results}))
    if any(result["state"] == "WRONG" for result in results.values()):
        sys.exit(1)


if __name__ == "__main__":
    run_script(main, config)
