"""Find the learning rates at which a recipe stays stable: raise the rate with every step, and watch the loss.

    accelerate launch examples/lr_range_test.py --recipe configs/demo.yaml

This is the learning-rate range test of Smith (2017, arXiv 1506.01186). It uses the recipe's model, data, batch and
optimizer, on any number of processes. A good first guess for the peak is a tenth to a third of the rate with the
lowest loss.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from utils.cli import UserError, at_least, parse_config, run_script
from utils.config import TrainConfig


@dataclass
class RangeTestConfig:
    """Options of lr_range_test.py."""

    recipe: str = "configs/demo.yaml"
    """YAML file for train.py."""
    min_learning_rate: float = 1e-5
    """First learning rate."""
    max_learning_rate: float = 1.0
    """Last learning rate, unless the test ends earlier."""
    num_steps: int = 100
    """Optimizer steps; the learning rate grows by the same factor at each."""
    stop_ratio: float = 1.5
    """End when the smoothed loss reaches this multiple of its minimum."""
    plot: str = "runs/lr_range.png"
    """Image file to write."""

    def problems(self) -> list[str]:
        found = at_least("", self, num_steps=10)
        if self.stop_ratio <= 1:
            found.append(f"stop_ratio is {self.stop_ratio}; it must be more than 1")
        if not 0 < self.min_learning_rate < self.max_learning_rate:
            found.append("min_learning_rate must be positive and less than max_learning_rate")
        return found


config = parse_config(RangeTestConfig, __doc__) if __name__ == "__main__" else None

import gc
import math

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import DataLoaderConfiguration, GradientAccumulationPlugin, parse_flag_from_env, set_seed
from matplotlib.figure import Figure

from training.launch_check import context_parallel_size
from training.optimization.optimizer import build_optimizer
from utils.data.batch_plan import plan_batches
from utils.data.loaders import build_layout, build_train_loader
from utils.data.token_dataset import load_manifest, open_split
from utils.kernels import resolve_matmul_precision
from utils.model.build import build_model, pad_token_id
from utils.objectives import build_objective, count_targets, objective_module
from utils.pretrained import read_tokenizer

SMOOTHING = 0.9  # of the exponential moving average of the loss


def main(config: RangeTestConfig) -> None:
    recipe = parse_config(TrainConfig, None, ["--config", config.recipe])
    if recipe.optimizer.name == "adafactor":
        raise UserError(
            "optimizer.name adafactor caps the learning rate at 1 / √step, so this test shows nothing; use another"
        )
    if load_manifest(recipe.data.dataset).get("stream"):
        raise UserError(f"{recipe.data.dataset} is a stream; lr_range_test.py needs a dataset with stored tokens")
    use_cpu = parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.accelerator.is_available()
    if context_parallel_size(PartialState(cpu=use_cpu)) > 1:
        raise UserError(
            "lr_range_test.py does not support context parallelism; launch it without parallelism_config_cp_size"
        )
    plan = plan_batches(
        recipe.batch.global_batch_size, recipe.batch.per_device_batch_size, PartialState(cpu=use_cpu).num_processes
    )
    accelerator = Accelerator(
        cpu=use_cpu,
        gradient_accumulation_plugin=GradientAccumulationPlugin(plan.accumulation, sync_with_dataloader=False),
        dataloader_config=DataLoaderConfiguration(split_batches=True),
    )
    torch.set_float32_matmul_precision(resolve_matmul_precision(recipe.matmul_precision, accelerator.device))
    tokenizer = read_tokenizer(Path(recipe.data.dataset) / "tokenizer")
    kind = objective_module(recipe.objective.name)
    collate = kind.build_collator(recipe.objective, tokenizer)
    rows = build_layout(
        open_split(recipe.data.dataset, "train"), recipe.data.layout, recipe.data.sequence_length,
        pad_token_id=pad_token_id(tokenizer), vocab_size=len(tokenizer),
    )  # fmt: skip
    loader = build_train_loader(rows, collate, plan, samples_seen=0, seed=recipe.seed, num_workers=0)
    set_seed(recipe.seed)
    model = build_model(recipe.model, tokenizer, kind.AUTO_MODEL)
    objective = build_objective(model, recipe.objective, recipe.model.attention, recipe.kernels, accelerator.device)
    optimizer = build_optimizer(model, recipe.optimizer, fused=accelerator.scaler is None)
    objective, optimizer, loader = accelerator.prepare(objective, optimizer, loader)

    objective.train()
    batches = iter(loader)
    ratio = (config.max_learning_rate / config.min_learning_rate) ** (1 / (config.num_steps - 1))
    rates: list[float] = []
    losses: list[float] = []
    average = 0.0
    for step in range(config.num_steps):
        rate = config.min_learning_rate * ratio**step
        for group in optimizer.param_groups:
            group["lr"] = rate
        micro_batches = [next(batches) for _ in range(plan.accumulation)]
        num_targets = accelerator.reduce(sum(count_targets(batch) for batch in micro_batches), "sum").clamp(min=1)
        loss_sum = torch.zeros((), device=accelerator.device)
        for batch in micro_batches:
            with accelerator.accumulate(objective):
                loss = objective(**batch)
                accelerator.backward(loss * plan.accumulation * plan.num_processes / num_targets)
                loss_sum += loss.detach()
        accelerator.clip_grad_norm_(objective.parameters(), recipe.optimizer.max_grad_norm or math.inf)
        optimizer.step()
        optimizer.zero_grad()
        average = SMOOTHING * average + (1 - SMOOTHING) * float(accelerator.reduce(loss_sum, "sum") / num_targets)
        rates.append(rate)
        losses.append(average / (1 - SMOOTHING ** (step + 1)))
        if step % 10 == 0:
            accelerator.print(f"learning rate {rate:.2e} | smoothed loss {losses[-1]:.4f}")
        if not losses[-1] < config.stop_ratio * min(losses):
            break
    if accelerator.is_main_process:
        report(config, rates, losses)
    accelerator.wait_for_everyone()
    del batches, model
    objective, optimizer, loader = accelerator.free_memory(objective, optimizer, loader)
    gc.collect()
    accelerator.end_training()


def report(config: RangeTestConfig, rates: list[float], losses: list[float]) -> None:
    """Print the learning rate with the lowest loss, and plot the loss over the learning rate."""
    finite = [(loss, rate) for loss, rate in zip(losses, rates, strict=True) if math.isfinite(loss)]
    if not finite:
        raise UserError(f"the loss is not finite even at {rates[0]:.1e}; lower --min_learning_rate")
    loss, lowest = min(finite)
    print(f"lowest smoothed loss {loss:.4f} at {lowest:.2e}; try a peak of {lowest / 10:.1e} to {lowest / 3:.1e}")
    axes = (figure := Figure(figsize=(8, 4.5), layout="constrained")).subplots()
    axes.semilogx(rates, losses)
    axes.axvspan(lowest / 10, lowest / 3, alpha=0.2)
    axes.set(xlabel="learning rate", ylabel="smoothed loss, nats per target")
    axes.grid(alpha=0.3)
    Path(config.plot).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(config.plot, dpi=120)
    print(f"wrote {config.plot}")


if __name__ == "__main__":
    run_script(main, config)
