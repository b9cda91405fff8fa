"""Hints: where a person would otherwise be lost, one line each, with what to type. None of them is a fault of the run.

A hint comes once, at the start of a launch, or as soon as the run shows it. Only the main process needs them.
"""

import json
import math
import os
from pathlib import Path

import psutil
import torch
from accelerate import Accelerator
from accelerate.commands.config.config_args import default_config_file

from training.data import TrainingData
from training.hardware import fast_bf16
from training.launch import launcher_options
from utils.config import TrainConfig

# Repeated text is worth nearly as much as new text for four epochs (Muennighoff et al., 2023, arXiv 2305.16264).
MAX_EPOCHS = 4
# The loss of a token varies by some 3 nats, so that of 10,000 tokens is known to 0.03 at best.
MIN_VALIDATION_TOKENS = 10_000
LOSS_STEPS = 100  # after the warm-up, in which a model from scratch leaves the loss of guessing
RANGE_TEST = Path("runs/lr_range.json")  # written by examples/lr_range_test.py


def hints_on_launch(accelerator: Accelerator) -> list[str]:
    """What the machine could do better, and what else decides about this launch."""
    found, device = [], accelerator.device
    threads, cores, processes = torch.get_num_threads(), usable_cores(), accelerator.num_processes
    options = launcher_options()
    chose_none = options is not None and options.config_file is None and not options.cpu
    if chose_none and os.path.isfile(default_config_file):
        found.append(
            f"accelerate's default file {default_config_file} takes part in this launch; to leave it out, name another: "
            "`accelerate launch --config_file accelerate_configs/cpu.yaml`, say"
        )
    here = int(os.environ.get("LOCAL_WORLD_SIZE") or processes)
    if torch.accelerator.is_available():
        gpus = torch.accelerator.device_count()
        if device.type == "cpu":
            found.append(f"{gpus} GPU(s) are idle; without --cpu and `use_cpu: true` a launch uses them")
        elif here < gpus:
            found.append(
                f"{here} of {gpus} GPUs in use; `accelerate launch --multi_gpu --num_processes {gpus}` uses all"
            )
    elif threads * here < cores:
        option = f"--num_cpu_threads_per_process {cores // here}"
        found.append(f"{threads * here} of {cores} cores in use; `accelerate launch {option}` uses them all")
    if accelerator.mixed_precision == "no" and fast_bf16(device):
        found.append("this machine computes bf16 fast; `accelerate launch --mixed_precision bf16` uses it")
    return [f"hint: {hint}" for hint in found]


def usable_cores() -> int:
    """Physical cores, as accelerate counts them for a CPU launch; fewer if Slurm or `taskset` grants fewer."""
    cores = psutil.cpu_count(logical=False) or os.cpu_count() or 1
    return min(cores, len(os.sched_getaffinity(0))) if hasattr(os, "sched_getaffinity") else cores


def hints_on_data(config: TrainConfig, data: TrainingData) -> list[str]:
    """Too little text for so many steps, or to trust an evaluation; a learning rate that the range test advises against."""
    found = []
    if data.num_rows is not None and data.num_epochs > MAX_EPOCHS and config.model.pretrained is None:
        steps = math.floor(MAX_EPOCHS * data.num_rows / data.plan.global_batch_size)
        found.append(
            f"the run reads its text {data.num_epochs:.1f} times; repeating text more than {MAX_EPOCHS} times helps little: "
            f"prepare more text, or give --schedule.max_steps {max(steps, 1)}"
        )
    if (tokens := data.validation_tokens) < MIN_VALIDATION_TOKENS:
        found.append(
            f"{tokens:,} validation tokens are few: loss differences below {3 / math.sqrt(tokens):.2f} nats are noise; "
            "prepare the data with a larger --validation_fraction"
        )
    if (lowest := read_range_test(config, data.key)) is not None:
        rate = config.optimizer.learning_rate
        if not lowest / 30 <= rate <= lowest:
            found.append(
                f"optimizer.learning_rate {rate:.1e} is far from what the range test found ({RANGE_TEST}): try "
                f"--optimizer.learning_rate {lowest / 5:.1e}"
            )
    return [f"hint: {hint}" for hint in found]


def hint_on_loss(config: TrainConfig, step: int, loss: float, vocabulary: int) -> str | None:
    """A model from scratch whose loss, in nats per token, is no better than guessing."""
    if config.model.pretrained is not None or step < config.schedule.warmup_steps + LOSS_STEPS:
        return None
    guessing = math.log(vocabulary)
    if loss < 0.97 * guessing:
        return None
    rate = config.optimizer.learning_rate
    return (
        f"hint: at step {step} the loss of {loss:.2f} is no better than guessing ({guessing:.2f} nats): {rate:.1e} may be "
        "too high or too low a learning rate; `python examples/lr_range_test.py --recipe FILE` finds one for your recipe"
    )


def record_range_test(config: TrainConfig, key: str, lowest: float, path: Path) -> None:
    """Keep the learning rate of the lowest loss for `hints_on_data`, with what it depends on."""
    path.write_text(json.dumps({"lowest": lowest, "of": _identity(config, key)}, indent=2) + "\n", encoding="utf-8")


def read_range_test(config: TrainConfig, key: str) -> float | None:
    """The learning rate that `record_range_test` has kept for the same data, model, batch and optimizer."""
    try:
        found = json.loads(RANGE_TEST.read_text(encoding="utf-8"))
        return float(found["lowest"]) if found["of"] == _identity(config, key) else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _identity(config: TrainConfig, key: str) -> list[str]:
    return [key, repr(config.model), config.objective.name, str(config.batch.global_batch_size), config.optimizer.name]
