"""The memory that is estimated before a training against what its steps take (Linux, CPU).

    python benchmarks/memory.py            # a few minutes, at most 6 GB
    python benchmarks/memory.py --only bert t5

Each configuration is trained for three steps in a process of its own, as train.py does it. Measured is the largest
resident size (VmHWM) less that before the model was built. A second process does the same with
MALLOC_MMAP_THRESHOLD_=1048576, which takes blocks of 1 MiB and more straight from the system: it has no heap full of
holes, so it shows the tensors alone, at a cost in time.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # `utils` is not installed

STEPS = 3
# Options of the model, then: entries of the vocabulary, rows, positions, precision, micro-batches, optimizer.
LLAMA = {"hidden_size": 512, "num_hidden_layers": 8, "num_attention_heads": 8, "intermediate_size": 1376,
         "max_position_embeddings": 512}  # fmt: skip
CONFIGURATIONS: dict[str, tuple[dict[str, Any], int, int, int, str, int, str]] = {
    "gpt2": ({"architecture": "gpt2", "size": "124m"}, 50257, 2, 512, "no", 1, "adamw"),
    "gpt2 dropout": ({"architecture": "gpt2", "size": "124m", "dropout": 0.1}, 50257, 2, 512, "no", 1, "adamw"),
    "gpt2 accumulation": ({"architecture": "gpt2", "size": "124m"}, 50257, 1, 512, "bf16", 2, "adamw"),
    "bert": ({"architecture": "bert", "size": "base"}, 30522, 4, 256, "no", 1, "adamw"),
    "llama": (LLAMA, 8192, 8, 512, "bf16", 1, "adamw"),
    "llama checkpointing": (LLAMA | {"activation_checkpointing": True}, 8192, 8, 512, "bf16", 1, "adamw"),
    "llama muon": (LLAMA, 8192, 4, 512, "no", 1, "muon"),
    "t5": ({"architecture": "t5", "size": "small"}, 32128, 8, 512, "no", 1, "adamw"),
}


class Vocabulary:
    """What `build_model` asks of a tokenizer."""

    bos_token_id, eos_token_id, pad_token_id = 0, 1, 2

    def __init__(self, size: int) -> None:
        self.size = size

    def __len__(self) -> int:
        return self.size


def build(name: str) -> tuple[Any, dict[str, tuple[int, int]], Any]:
    """Objective, shapes of a micro-batch, and options of the optimizer; on torch's default device."""
    from utils.model_config import ModelConfig
    from utils.objective_config import ObjectiveConfig
    from utils.optimizer_config import OptimizerConfig
    from utils.training.modeling import build_model
    from utils.training.objectives import Objective, objective_module

    options, vocabulary, rows, positions, _, _, optimizer = CONFIGURATIONS[name]
    kinds: dict[str, Any] = {"bert": "masked", "t5": "span_corruption"}
    objective = ObjectiveConfig(kinds.get(options.get("architecture", "llama"), "causal"))
    model = build_model(ModelConfig(**options), Vocabulary(vocabulary), objective_module(objective.name).AUTO_MODEL)
    names = ["input_ids", "targets", "position_ids"]
    shapes = dict.fromkeys(names, (rows, positions))
    if objective.name == "span_corruption":  # 15 % of the input, in spans of 3, become the target
        shapes = dict.fromkeys(("input_ids", "attention_mask"), (rows, positions)) | dict.fromkeys(
            ("decoder_input_ids", "targets"), (rows, positions // 5)
        )
    return Objective(model, objective), shapes, OptimizerConfig(optimizer)


def estimate(name: str) -> dict[str, int]:
    import torch

    from utils.training.estimates import estimate_memory

    *_, precision, accumulation, _ = CONFIGURATIONS[name]
    with torch.device("meta"):
        objective, shapes, optimizer = build(name)
    return estimate_memory(objective, shapes, optimizer, accumulation=accumulation, mixed_precision=precision)


def status(field: str) -> int:
    """A line of /proc/self/status in bytes."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines[field].split()[0]) * 1024


def measure(name: str) -> dict[str, float]:
    """Train in this process; bytes at the peak, and seconds of the last step."""
    import torch
    from accelerate import Accelerator
    from accelerate.utils import GradientAccumulationPlugin

    from utils.training import modeling, objectives  # noqa: F401 # before the memory is looked at
    from utils.training.optimization import build_optimizer

    _, vocabulary, _, _, precision, accumulation, _ = CONFIGURATIONS[name]
    accelerator = Accelerator(
        cpu=True, mixed_precision=precision,
        gradient_accumulation_plugin=GradientAccumulationPlugin(accumulation, sync_with_dataloader=False),
    )  # fmt: skip
    before = status("VmRSS")
    torch.manual_seed(0)
    bare, shapes, options = build(name)
    objective, optimizer = accelerator.prepare(bare, build_optimizer(bare.model, options))
    objective.train()
    for _ in range(STEPS):
        started = time.perf_counter()
        for _ in range(accumulation):
            batch = {key: torch.randint(3, vocabulary, shape) for key, shape in shapes.items()}
            if "position_ids" in batch:  # three documents a row
                batch["position_ids"] = (torch.arange(shapes["targets"][1]) % 200).expand(shapes["targets"])
            if "attention_mask" in batch:
                batch["attention_mask"] = (
                    (torch.arange(shapes["input_ids"][1]) < 500).long().expand(shapes["input_ids"])
                )
            with accelerator.accumulate(objective):
                accelerator.backward(objective(**batch) / batch["targets"].numel())
        accelerator.clip_grad_norm_(objective.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return {"peak": status("VmHWM") - before, "seconds": time.perf_counter() - started}


def run(name: str, **environment: str) -> dict[str, float]:
    command = [sys.executable, __file__, "--measure", name]
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("ACCELERATE_", "MALLOC_"))}
    result = subprocess.run(command, capture_output=True, text=True, env=kept | environment)
    if result.returncode:
        raise SystemExit(f"{name} failed:\n{result.stderr[-2000:]}")
    return json.loads(result.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=CONFIGURATIONS, default=list(CONFIGURATIONS), metavar="NAME")
    parser.add_argument("--measure", choices=CONFIGURATIONS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        print(json.dumps(measure(arguments.measure)))
        return
    print(f"{'MB':<20} {'tensors':>8} {'measured':>9} {'ratio':>6}   {'estimate':>8} {'measured':>9} {'ratio':>6}")
    results = {}
    for name in arguments.only:
        parts = estimate(name)
        total = sum(parts.values())
        default, mapped = run(name), run(name, MALLOC_MMAP_THRESHOLD_=str(2**20))
        tensors = total - parts["allocator"]
        results[name] = {
            "estimate": total, "tensors": tensors, "measured": default["peak"], "measured_mapped": mapped["peak"],
            "ratio": total / default["peak"], "ratio_tensors": tensors / mapped["peak"], "parts": parts,
            "seconds": default["seconds"], "seconds_mapped": mapped["seconds"],
        }  # fmt: skip
        print(
            f"{name:<20} {tensors / 1e6:>8.0f} {mapped['peak'] / 1e6:>9.0f} {tensors / mapped['peak']:>6.2f}   "
            f"{total / 1e6:>8.0f} {default['peak'] / 1e6:>9.0f} {total / default['peak']:>6.2f}",
            flush=True,
        )
    print(json.dumps(results))


if __name__ == "__main__":
    main()
