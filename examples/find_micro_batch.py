"""Which micro-batch is fastest on this device: try all that divide the recipe's global batch, which stays as it is.

    accelerate launch examples/find_micro_batch.py --recipe configs/demo.yaml --num_processes 1

Times forward and backward passes of growing micro-batches on the recipe's own rows, until memory ends.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from training.options import read_options
from utils.cli import PositiveInt, UserError, parse_config, run_script


@dataclass
class MicroBatchConfig:
    """Options of find_micro_batch.py."""

    recipe: str = "configs/demo.yaml"
    """YAML file for train.py."""
    num_processes: PositiveInt = 1
    """Number of processes that will train. This script itself runs on one."""
    repeats: PositiveInt = 3
    """Timed passes per size, after one warm-up pass; the median counts."""

    def problems(self) -> list[str]:
        read_options(None, ["--config", self.recipe], runs=False)  # exits if the recipe has a mistake
        return []


config = parse_config(MicroBatchConfig, __doc__) if __name__ == "__main__" else None

import resource
import statistics
import time

import psutil
import torch
from accelerate import Accelerator
from accelerate.utils import release_memory, send_to_device, set_seed
from accelerate.utils.memory import should_reduce_batch_size

from train import start_accelerator
from training.data import TrainingData
from training.launch import plan_batches
from training.model import build_training_objective
from training.optimization.optimizers import build_optimizer
from utils.data.loaders import CollatedRows, to_tensors
from utils.model.build import build_model
from utils.objectives import build_processor, count_targets, objective_module
from utils.pretrained import read_tokenizer


def main(config: MicroBatchConfig) -> None:
    recipe = read_options(None, ["--config", config.recipe], runs=False)
    recipe.data.pad_to = "max_length"  # padded rows as in the longest batch
    recipe.batch.per_device_batch_size = None
    accelerator, plan = start_accelerator(recipe)
    if accelerator.num_processes > 1:
        raise UserError(
            "find_micro_batch.py measures one device; launch it with --num_processes 1, and tell its own option "
            "--num_processes how many will train"
        )
    tokenizer = read_tokenizer(Path(recipe.data.dataset) / "tokenizer")
    task = objective_module(recipe.objective.name)
    processor = build_processor(recipe.objective.name, recipe.model, tokenizer)
    collate = task.build_collator(recipe.objective, processor)
    data = TrainingData(recipe, accelerator, plan, tokenizer, collate)
    if data.train_rows is None:
        raise UserError(f"{recipe.data.dataset} is a stream; find_micro_batch.py needs a dataset with stored tokens")
    rows = CollatedRows(data.train_rows, collate, recipe.seed)
    set_seed(recipe.seed)
    model = build_model(recipe.model, tokenizer, task.AUTO_MODEL)
    objective = build_training_objective(model, recipe, accelerator, data)
    optimizer = build_optimizer(model, recipe.optimizer, fused=accelerator.scaler is None)
    objective, optimizer = accelerator.prepare(objective, optimizer)
    objective.train()

    share = plan_batches(recipe.batch.global_batch_size, None, config.num_processes).micro_batch
    print(f"{share} sequences per process and step, precision {accelerator.mixed_precision}, {accelerator.device}")
    found: dict[int, float] = {}
    peaks: dict[int, int] = {}
    for size in [size for size in range(1, share + 1) if share % size == 0]:
        if wanted := memory_lacking(size, peaks, accelerator.device):
            print(f"{size:>5}: would need some {wanted / 2**30:.1f} GiB, more than there is")
            break
        batch = send_to_device(to_tensors(rows.__getitems__(list(range(size)))), accelerator.device)
        try:
            seconds = [time_pass(accelerator, objective, batch) for _ in range(config.repeats + 1)][1:]
            optimizer.step()  # not timed, as it is once per step; its state takes memory from here on
        except RuntimeError as error:
            if not should_reduce_batch_size(error):
                raise
            print(f"{size:>5}: out of memory")
            break
        finally:
            optimizer.zero_grad()
        peaks[size] = peak_bytes(accelerator.device)
        found[size] = statistics.median(seconds) * share / size
        print(
            f"{size:>5}: {found[size]:.3f} s per step with {share // size} micro-batch(es), "
            f"peak {peaks[size] / 2**30:.2f} GiB"
        )
    if not found:
        raise UserError(
            "not even one sequence fits; lower data.sequence_length, or set model.activation_checkpointing true"
        )
    best = min(found, key=lambda size: found[size])
    print(f"fastest: --batch.per_device_batch_size {best}")
    release_memory(objective, optimizer)


def time_pass(accelerator: Accelerator, objective: torch.nn.Module, batch: dict[str, torch.Tensor]) -> float:
    """Seconds of one forward and backward pass."""
    synchronize(accelerator.device)
    started = time.perf_counter()
    accelerator.backward(objective(**batch) / count_targets(batch).clamp(min=1))
    synchronize(accelerator.device)
    return time.perf_counter() - started


def synchronize(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize()


def peak_bytes(device: torch.device) -> int:
    """The most memory used so far; sizes only grow, so it is that of the last one."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def memory_lacking(size: int, peaks: dict[int, int], device: torch.device) -> int:
    """On a CPU, where the kernel would end the process: bytes that `size` would take if they are more than there are,
    by the line through the last two sizes. Else 0."""
    if device.type != "cpu" or len(peaks) < 2:
        return 0
    (first, first_peak), (second, second_peak) = list(peaks.items())[-2:]
    wanted = second_peak + (second_peak - first_peak) * (size - second) // (second - first)
    return wanted if wanted - second_peak > psutil.virtual_memory().available else 0


if __name__ == "__main__":
    run_script(main, config)
