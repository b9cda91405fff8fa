"""Train a language model on a token dataset: the loop, in plain sight.

    accelerate launch train.py --config configs/demo.yaml --model.hidden_size 256

`accelerate launch` decides processes, devices and precision (see accelerate_configs/). A run folder holds everything
about a run. The same command with --checkpoint.resume auto continues from its newest checkpoint, on a CPU bit for bit.
"""

from training.options import read_options
from utils.cli import at_exit, run_script
from utils.config import TrainConfig

# Read before the slow imports, so that --help and mistakes answer at once.
config = read_options(__doc__) if __name__ == "__main__" else None

import gc
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from datetime import timedelta
from functools import partial
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import (
    DataLoaderConfiguration,
    DistributedDataParallelKwargs,
    GradientAccumulationPlugin,
    ProjectConfiguration,
    parse_flag_from_env,
    set_seed,
)

from training.data import TrainingData
from training.dry_run import describe_objective, print_dry_run
from training.fp8 import build_fp8_recipe
from training.hardware import avoid_faulty_attention, resolve_matmul_precision
from training.launch import BatchPlan, check_launch, context_parallel_size, plan_batches
from training.model import build_training_objective, check_nothing_leaks
from training.monitoring.guards import check_update
from training.monitoring.stopping import end_of_run, update_best
from training.monitoring.tracking import write_sample
from training.optimization.ema import WeightAverage
from training.optimization.optimizers import build_optimizer
from training.optimization.schedule import build_scheduler
from training.parallel.sharding import is_sharded, set_up_sharded
from training.run import Run
from utils.evaluation import evaluate
from utils.model.build import build_model, load_model, set_up_training
from utils.objectives import build_processor, count_targets, objective_module
from utils.pretrained import read_tokenizer


def main(config: TrainConfig) -> None:
    # ---- The launch: accelerate says how many processes there are, the recipe fixes the global batch.
    accelerator, plan = start_accelerator(config)
    at_exit.enter_context(orderly_end(accelerator))

    # ---- Data: rows laid out over stored tokens, or made of text while it is read. The objective decides what the model
    # sees of a row, and may add special tokens to the tokenizer; for pictures and sounds a processor holds it.
    tokenizer = read_tokenizer(Path(config.data.dataset) / "tokenizer")
    task = objective_module(config.objective.name)
    processor = build_processor(config.objective.name, config.model, tokenizer)
    data = TrainingData(config, accelerator, plan, tokenizer, task.build_collator(config.objective, processor))
    if config.dry_run:
        return print_dry_run(config, accelerator, data, tokenizer)

    # ---- The run: its folder, where it stands, what a person sees of it.
    run = Run(accelerator, config, data, processor)
    state, max_steps = run.state, data.max_steps

    # ---- Model and optimizer: the seed is the same on every rank, and so are the initial weights.
    set_seed(config.seed)
    if run.checkpoint:
        model = load_model(run.checkpoint, config.model.attention, dropout=config.model.dropout)
        set_up_training(model, config.model)
    else:
        model = build_model(config.model, tokenizer, task.AUTO_MODEL)
    objective = build_training_objective(model, config, accelerator, data)
    about = describe_objective(objective, config, data, new=not run.checkpoint) if accelerator.is_main_process else None
    optimizer = build_optimizer(model, config.optimizer, fused=accelerator.scaler is None)
    scheduler = build_scheduler(optimizer, config.schedule, max_steps)
    objective, optimizer, train_loader, validation_loader = accelerator.prepare(
        objective, optimizer, data.train_loader(state), data.validation_loader()
    )
    set_up_sharded(accelerator, accelerator.unwrap_model(objective))
    if "position_ids" in data.example and not is_sharded(accelerator):
        check_nothing_leaks(accelerator, objective)
    average = WeightAverage(model, config.optimizer.ema_decay) if config.optimizer.ema_decay else None
    run.begin(model, optimizer, scheduler, average, about)

    # ---- The loop. Each iteration evaluates and saves if it is time, then makes one optimizer step on one global batch.
    # Everything that decides a step is a function of (seed, samples seen, rank): a resumed run repeats it.
    objective.train()
    batches = iter(train_loader)
    evaluation, look = None, partial(evaluate, accelerator, objective, validation_loader)
    save = partial(run.save, model, optimizer, scheduler, average)
    sample = partial(write_sample, accelerator, objective, processor, data, config)
    if config.evaluation.at_start and state.optimizer_step == 0:
        run.beat("evaluating")
        run.log_evaluation(look(run.show_evaluation).metrics(data.scored_bytes))
    while True:
        step = state.optimizer_step

        # ---- Once in a while: the loss on the validation documents, and a sample (all ranks). Both may fail, so a
        # checkpoint that is due at this step is written first; its state says what is still to be done.
        improved, is_new = False, state.last_evaluated_step < step
        state.evaluation_due |= is_new and due(step, config.evaluation.every_steps, max_steps)
        state.sample_due |= is_new and due(step, config.tracking.sample_every_steps, max_steps)
        if state.evaluation_due and step > run.saved_step and due(step, config.checkpoint.every_steps, max_steps):
            save(wait=False)
        if is_new and run.stops.reason is None:
            with run.looking(save):
                if state.evaluation_due:
                    found = look(run.poll)
                    averaged = None if average is None else average.evaluate(look, run.poll)
                    evaluation, improved = found, update_best(state, config.evaluation, found, averaged)
                    run.log_evaluation(found.metrics(data.scored_bytes, averaged))
                if state.sample_due:
                    run.sample(sample)
                state.last_evaluated_step, state.evaluation_due, state.sample_due = step, False, False
        reason = end_of_run(state, config, max_steps) or run.stops.reason

        # ---- Once in a while: a checkpoint (all ranks call; the main process writes, with FSDP each rank its shard).
        if improved or (step > run.saved_step and (due(step, config.checkpoint.every_steps) or reason)):
            save(wait=reason is not None)
        if reason is not None:
            break

        # ---- One step. The loss is a mean over the target tokens of the *global* batch, so they are counted before the
        # first backward pass (all ranks; a small all-reduce). DDP takes the mean over ranks: `weight` undoes that.
        run.beat("fetching")
        started = time.perf_counter()
        micro_batches = [next(batches) for _ in range(plan.accumulation)]
        run.beat("training")
        num_targets = accelerator.reduce(sum(count_targets(batch) for batch in micro_batches), "sum")
        weight = plan.num_processes / num_targets.clamp(min=1)
        # Seeds dropout. After the fetch, because a loader's first batch draws from the same random numbers.
        set_seed(step_seed(config.seed, state.samples_seen, accelerator.process_index))
        loss_sum = torch.zeros((), device=accelerator.device)
        for number, batch in enumerate(micro_batches, 1):
            # Gradients are all-reduced once, with the last micro-batch.
            with nullcontext() if number == plan.accumulation else accelerator.no_sync(objective):
                micro_loss = objective(**batch)
                accelerator.backward(micro_loss * weight)
            loss_sum += micro_loss.detach()
        norm = accelerator.clip_grad_norm_(objective.parameters(), config.optimizer.max_grad_norm or math.inf)

        # ---- The vote: an all-reduce after which all ranks know the same loss, and whether one of them is asked to stop.
        loss, grad_norm, targets = run.vote(loss_sum / num_targets, norm, num_targets)
        scaled = accelerator.scaler is not None
        fault = check_update(state, config.guards, loss, grad_norm, targets=targets, scaled=scaled)
        if fault is None:
            optimizer.step()
        else:
            run.skip(fault, micro_batches)
        optimizer.zero_grad()
        state.samples_seen += plan.global_batch_size
        state.tokens_seen += targets
        state.train_seconds += time.perf_counter() - started
        if fault is not None or run.count_overflow():
            continue
        learning_rate = scheduler.get_last_lr()[0]
        scheduler.step()
        state.optimizer_step += 1
        if average is not None:
            average.update(state.optimizer_step)
        shown = state.optimizer_step == 1 or due(state.optimizer_step, config.tracking.log_every_steps, max_steps)
        run.log_step(loss, targets, float(learning_rate), grad_norm, shown=shown)

    # ---- The end: the last checkpoint, summary, plot, and how to continue.
    run.finish(reason, evaluation, partial(evaluate, accelerator, objective), model)


def start_accelerator(config: TrainConfig) -> tuple[Accelerator, BatchPlan]:
    """The Accelerator that the launch asked for, and how its processes split the global batch."""
    use_cpu = parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.accelerator.is_available()
    launch = PartialState(cpu=use_cpu, timeout=timedelta(minutes=max(30, 2 * config.guards.hang_minutes)))
    plan = plan_batches(
        config.batch.global_batch_size, config.batch.per_device_batch_size, launch.num_processes,
        context_parallel_size(launch),
    )  # fmt: skip
    accelerator = Accelerator(
        cpu=use_cpu,
        # DDP's buckets are the gradients, instead of a copy of them. The model's own buffers are the same on all ranks.
        kwargs_handlers=[
            DistributedDataParallelKwargs(gradient_as_bucket_view=True, broadcast_buffers=False),
            *build_fp8_recipe(launch),
        ],
        # The loop accumulates by itself. Without the plugin a variable of the launch would divide the gradients.
        gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1, sync_with_dataloader=False),
        dataloader_config=DataLoaderConfiguration(split_batches=True, non_blocking=True),
        project_config=ProjectConfiguration(config.output, logging_dir=f"{config.output}/tensorboard"),
    )
    check_launch(accelerator, plan, config)
    torch.set_float32_matmul_precision(resolve_matmul_precision(config.matmul_precision, accelerator.device))
    avoid_faulty_attention(accelerator.device, config.data.sequence_length, config.data.layout)
    return accelerator, plan


@contextmanager
def orderly_end(accelerator: Accelerator) -> Iterator[None]:
    """After a run without an error: all ranks free what they hold together. Otherwise a gloo rank may abort at exit."""
    yield
    accelerator.wait_for_everyone()
    accelerator.free_memory()
    gc.collect()
    gc.freeze()  # else Python searches all objects again at its exit, for a second
    accelerator.end_training()


def due(step: int, every: int, last_step: int | None = None) -> bool:
    """Whether something that happens every so many steps happens now. 0: never. `last_step` is always due."""
    return step > 0 and every > 0 and (step % every == 0 or step == last_step)


def step_seed(seed: int, samples_seen: int, rank: int) -> int:
    """Seed of one step's dropout on one rank, 32 bits. A resumed run needs no stored random state."""
    return int(np.random.SeedSequence([seed, samples_seen, rank]).generate_state(1)[0])


if __name__ == "__main__":
    run_script(main, config)
