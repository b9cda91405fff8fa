"""The learning rates at which a recipe stays stable: raise the rate a little with every step, and look at the loss.

    accelerate launch examples/lr_range_test.py --recipe configs/demo.yaml

The learning-rate range test of Smith (2017, arXiv 1506.01186), with the recipe's model, data, batch and optimizer, on
any number of processes. A peak learning rate of a third to a tenth of where the loss is lowest is a good first guess.
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from training.options import read_options
from utils.cli import PositiveFloat, UserError, at_exit, parse_config, run_script
from utils.files import find_obstacle


@dataclass
class RangeTestConfig:
    """Options of lr_range_test.py."""

    recipe: str = "configs/demo.yaml"
    """YAML file for train.py."""
    min_learning_rate: PositiveFloat = 1e-5
    """First learning rate."""
    max_learning_rate: float = 1.0
    """Last learning rate, unless the test ends earlier."""
    num_steps: Annotated[int, ">= 10"] = 100
    """Optimizer steps; the learning rate grows by the same factor at each."""
    stop_ratio: Annotated[float, "> 1"] = 1.5
    """End when the smoothed loss reaches this multiple of its minimum."""
    plot: str = "runs/lr_range.png"
    """Image to write."""

    def problems(self) -> list[str]:
        read_options(None, ["--config", self.recipe], runs=False)  # exits if the recipe has a mistake
        found = []
        if self.min_learning_rate >= self.max_learning_rate:
            found.append("min_learning_rate must be less than max_learning_rate")
        if obstacle := find_obstacle(self.plot):
            found.append(f"plot {self.plot} {obstacle}")
        return found


config = parse_config(RangeTestConfig, __doc__) if __name__ == "__main__" else None

import math
from contextlib import nullcontext

import torch
from accelerate.utils import set_seed
from matplotlib.figure import Figure

from train import orderly_end, start_accelerator
from training.data import TrainingData
from training.model import build_training_objective
from training.monitoring.hints import record_range_test
from training.optimization.optimizers import build_optimizer
from utils.checkpoints import TrainState
from utils.model.build import build_model
from utils.objectives import build_processor, count_targets, objective_module
from utils.pretrained import read_tokenizer

SMOOTHING = 0.9  # of the exponential moving average of the loss


def main(config: RangeTestConfig) -> None:
    recipe = read_options(None, ["--config", config.recipe], runs=False)
    if recipe.optimizer.name == "adafactor":
        raise UserError(
            "optimizer.name adafactor caps the learning rate at 1 / √step, so this test shows nothing; use another"
        )
    accelerator, plan = start_accelerator(recipe)
    at_exit.enter_context(orderly_end(accelerator))
    if plan.context_parallel_size > 1:
        raise UserError(
            "lr_range_test.py does not support context parallelism; launch it without parallelism_config_cp_size"
        )
    tokenizer = read_tokenizer(Path(recipe.data.dataset) / "tokenizer")
    task = objective_module(recipe.objective.name)
    processor = build_processor(recipe.objective.name, recipe.model, tokenizer)
    data = TrainingData(recipe, accelerator, plan, tokenizer, task.build_collator(recipe.objective, processor))
    if data.train_rows is None:
        raise UserError(f"{recipe.data.dataset} is a stream; lr_range_test.py needs a dataset with stored tokens")
    set_seed(recipe.seed)
    model = build_model(recipe.model, tokenizer, task.AUTO_MODEL)
    objective = build_training_objective(model, recipe, accelerator, data)
    optimizer = build_optimizer(model, recipe.optimizer, fused=accelerator.scaler is None)
    loader = data.train_loader(TrainState(dataset_key=data.key))
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
        for number, batch in enumerate(micro_batches, 1):
            with nullcontext() if number == plan.accumulation else accelerator.no_sync(objective):
                loss = objective(**batch)
                accelerator.backward(loss * plan.num_processes / num_targets)
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
        record_range_test(recipe, data.key, report(config, rates, losses), Path(config.plot).with_suffix(".json"))


def report(config: RangeTestConfig, rates: list[float], losses: list[float]) -> float:
    """Print and return where the loss was lowest, and plot it over the learning rate."""
    finite = [(loss, rate) for loss, rate in zip(losses, rates, strict=True) if math.isfinite(loss)]
    if not finite:
        raise UserError(f"the loss is not finite at {rates[0]:.1e} already; lower --min_learning_rate")
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
    return lowest


if __name__ == "__main__":
    run_script(main, config)
