"""Train a language model on a token dataset: the loop, in plain sight.

    accelerate launch train.py --config configs/demo.yaml --model.hidden_size 256

Processes, devices and precision belong to `accelerate launch` (see accelerate_configs/). A run folder holds
everything about a run; the same command with --checkpoint.resume auto goes on from its newest checkpoint, bit for bit.
"""

from utils.cli import UserError, at_exit, parse_config, run_script
from utils.config import TrainConfig

# The command line is read before the slow imports, so that --help and a typing mistake answer at once.
config = parse_config(TrainConfig, __doc__) if __name__ == "__main__" else None

import gc
import math
import time
from datetime import timedelta
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from accelerate import Accelerator, PartialState
from accelerate.utils import (
    DataLoaderConfiguration,
    DistributedDataParallelKwargs,
    GradientAccumulationPlugin,
    ProjectConfiguration,
    parse_flag_from_env,
    set_seed,
)
from torch.utils.data import DataLoader
from transformers.utils import logging as transformers_logging

from training.batch_plan import plan_batches
from training.checks import check_documents_stay_apart, check_length, check_tokenizer
from training.dry_run import describe_model, describe_work, dry_run_report
from training.hardware import describe_kernels, resolve_matmul_precision
from training.launch_check import check_launch, check_launcher_file, context_parallel_size, describe_launch
from training.monitoring.guards import check_limits, find_fault, write_bad_batch
from training.monitoring.samples import write_sample
from training.monitoring.stopping import StopAsked, StopRequests
from training.monitoring.tracking import RunTracker
from training.monitoring.watchdog import Watchdog
from training.optimization.ema import WeightAverage
from training.optimization.optimizer import build_optimizer, build_scheduler, resolve_max_steps
from training.parallel.context_parallel import collate_columns, use_context_parallel
from training.parallel.sharding import is_sharded, keep_sums_in_fp32, let_it_write, ranks_per_copy, whole
from training.parameters import describe_initialization
from training.saving.checkpoint_writer import CheckpointWriter
from training.saving.run_folder import open_run, record_launch
from training.saving.shards import check_shards
from training.stream_loader import StreamLoader, check_stream_options, describe_stream
from utils.checkpoints import TrainState, check_disk, checkpoint_bytes, load_state, load_training_state
from utils.data.loaders import (
    EVALUATION_SEED,
    CollatedRows,
    Layout,
    build_evaluation_loader,
    build_layout,
    build_train_loader,
    end_workers,
    to_tensors,
)
from utils.data.token_dataset import load_manifest, open_split
from utils.evaluation import evaluate
from utils.model.build import (
    build_model,
    count_parameters,
    enable_activation_checkpointing,
    load_model,
    pad_token_id,
)
from utils.objectives import build_objective, count_targets, objective_module
from utils.pretrained import read_tokenizer

END_REASONS = ("max_steps", "early_stopping")  # all others are reasons to stop before the end


def main(config: TrainConfig) -> None:
    transformers_logging.disable_progress_bar()
    check_launcher_file()
    manifest = load_manifest(config.data.dataset)

    # ---- The launch: accelerate says how many processes there are, the recipe fixes the global batch.
    use_cpu = parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.accelerator.is_available()
    launch = PartialState(cpu=use_cpu, timeout=timedelta(minutes=max(30, 2 * config.guards.hang_minutes)))
    plan = plan_batches(
        config.batch.global_batch_size, config.batch.per_device_batch_size, launch.num_processes,
        context_parallel_size(launch),
    )  # fmt: skip
    accelerator = Accelerator(
        cpu=use_cpu,
        # DDP's buffers are the gradients, in place of a copy of them.
        kwargs_handlers=[DistributedDataParallelKwargs(gradient_as_bucket_view=True)],
        gradient_accumulation_plugin=GradientAccumulationPlugin(plan.accumulation, sync_with_dataloader=False),
        dataloader_config=DataLoaderConfiguration(split_batches=True, non_blocking=True),
        project_config=ProjectConfiguration(config.output, logging_dir=f"{config.output}/tensorboard"),
    )
    check_launch(accelerator, plan, config)
    torch.set_float32_matmul_precision(resolve_matmul_precision(config.matmul_precision, accelerator.device))

    # ---- Data: rows laid out over the mapped token stream, nothing is copied; or made of a source as it is being read.
    # The objective turns them into what the model reads, and may add special tokens to the tokenizer for it.
    tokenizer = read_tokenizer(Path(config.data.dataset) / "tokenizer")
    kind = objective_module(config.objective.name)
    collate_rows = collate = kind.build_collator(config.objective, tokenizer)
    context_group = accelerator.torch_device_mesh["cp"].get_group() if plan.context_parallel_size > 1 else None
    if context_group is not None:
        collate = partial(collate_columns, collate_rows, dist.get_rank(context_group), plan.context_parallel_size)

    def lay_out(split: str) -> Layout:
        return build_layout(
            open_split(config.data.dataset, split), config.data.layout, config.data.sequence_length,
            pad_token_id=pad_token_id(tokenizer), vocab_size=len(tokenizer),
            fixed_length=config.data.pad_to == "max_length",
        )  # fmt: skip

    validation_rows = lay_out("validation")
    train_rows = None if manifest.get("stream") else lay_out("train")
    max_steps = resolve_max_steps(
        config.schedule, num_rows=None if train_rows is None else len(train_rows),
        global_batch_size=plan.global_batch_size, sequence_length=config.data.sequence_length,
    )  # fmt: skip
    example = to_tensors(CollatedRows(validation_rows, collate_rows, EVALUATION_SEED).__getitems__([0]))
    if config.dry_run:
        with torch.device("meta"):
            model = build_model(config.model, tokenizer, kind.AUTO_MODEL, weights=False)
        check_length(model, config.data.sequence_length)
        planned = build_objective(model, config.objective, config.model.attention, config.kernels, accelerator.device)
        if accelerator.is_main_process:
            print(*describe_launch(accelerator, plan), sep="\n")
            print(*dry_run_report(
                planned, example, config, plan, max_steps=max_steps, device=accelerator.device,
                num_rows=None if train_rows is None else len(train_rows), mixed_precision=accelerator.mixed_precision,
                ranks_per_copy=ranks_per_copy(accelerator),
            ), sep="\n")  # fmt: skip
        return accelerator.end_training()
    run = Path(config.output)
    checkpoint, notes = open_run(accelerator, config, manifest["key"])
    state = load_state(checkpoint) if checkpoint else TrainState(dataset_key=manifest["key"])
    train_loader: DataLoader | StreamLoader
    if train_rows is not None:
        train_loader = build_train_loader(
            train_rows, collate, plan.micro_batch * plan.data_parallel_size, samples_seen=state.samples_seen, seed=config.seed,
            num_workers=config.data.num_workers,
        )  # fmt: skip
    else:
        check_stream_options(config, plan)
        from preparation.stream import TextStream  # here, as stored tokens need nothing that reads text

        documents = TextStream(manifest["options"], Path(config.data.dataset), config.data.stream_lanes, config.seed)
        train_loader = StreamLoader(
            documents, collate, plan, rank=accelerator.process_index // plan.context_parallel_size,
            sequence_length=config.data.sequence_length,
            num_workers=config.data.num_workers, device=accelerator.device, state=state.stream,
            samples_seen=state.samples_seen, seed=config.seed,
        )  # fmt: skip
    validation_loader = build_evaluation_loader(
        validation_rows, collate, config.evaluation.per_device_batch_size * plan.data_parallel_size
    )
    # Bits per byte of text: where every token of it is a target, and read in its order.
    validation_bytes = manifest["splits"]["validation"]["bytes"] if config.objective.name == "causal" else None

    # ---- Model: the same seed on every rank, so every rank starts from the same weights.
    set_seed(config.seed)
    if checkpoint:
        check_tokenizer(checkpoint, tokenizer)
        model = load_model(checkpoint, config.model.attention, dropout=config.model.dropout)
        enable_activation_checkpointing(model, config.model)
    else:
        model = build_model(config.model, tokenizer, kind.AUTO_MODEL)
    check_length(model, config.data.sequence_length)
    objective = build_objective(model, config.objective, config.model.attention, config.kernels, accelerator.device)
    if "position_ids" in example:
        check_documents_stay_apart(objective)
    optimizer = build_optimizer(model, config.optimizer, fused=accelerator.scaler is None)
    scheduler = build_scheduler(optimizer, config.schedule, max_steps)
    about_model = []  # said before the parameters may be shared out
    if accelerator.is_main_process:
        about_model += [*describe_model(model), describe_work(objective, example, config, plan)]
        if not checkpoint:
            about_model.append(describe_initialization(model))
    if context_group is not None:
        use_context_parallel(objective, context_group)
    about_model.append(describe_kernels(objective))
    keep_sums_in_fp32(accelerator)
    objective, optimizer, train_loader, validation_loader = accelerator.prepare(
        objective, optimizer, train_loader, validation_loader
    )
    let_it_write(accelerator.unwrap_model(objective))
    average = WeightAverage(model, config.optimizer.ema_decay) if config.optimizer.ema_decay else None
    if checkpoint:
        load_training_state(checkpoint, accelerator, optimizer, scheduler, average)

    if is_sharded(accelerator):
        check_shards(run, model)
    bytes_each = checkpoint_bytes(model, config.optimizer)
    if accelerator.is_main_process:
        notes.append(check_disk(run / "checkpoints", config.checkpoint, bytes_each, max_steps - state.optimizer_step))
        record_launch(accelerator, config)  # from here on the folder is this run's: whatever can be refused has been
    stops = at_exit.enter_context(StopRequests(accelerator, run, config.max_minutes, bytes_each))
    tracker = at_exit.enter_context(RunTracker(accelerator, config, state, max_steps))
    hang_seconds = 60 * config.guards.hang_minutes + 2 * stops.save_seconds  # ranks may be waiting for a save
    watchdog = at_exit.enter_context(Watchdog(run, accelerator.process_index, accelerator.num_processes, hang_seconds))
    writer = at_exit.enter_context(CheckpointWriter(
        accelerator, run / "checkpoints", config.checkpoint, tokenizer, warn=tracker.warn, note=watchdog.note_writing
    ))  # fmt: skip
    at_exit.callback(end_workers)
    for line in [*describe_launch(accelerator, plan), *notes, *about_model]:
        tracker.say(line)
    if train_rows is None:
        tracker.say(
            f"data: a stream of {config.data.stream_lanes} lanes, rows of {config.data.sequence_length}; {max_steps} steps"
        )
    else:
        epochs = max_steps * plan.global_batch_size / len(train_rows)
        tracker.say(
            f"data: {len(train_rows):,} rows of {config.data.sequence_length}, {train_rows.utilisation:.2%} used; "
            f"{max_steps} steps, {epochs:.2f} epochs"
        )
    if checkpoint:
        tracker.say(f"resumed from {checkpoint} at step {state.optimizer_step}")

    def while_evaluating() -> None:
        watchdog.beat(state.optimizer_step, "evaluating")
        stops.poll()

    # ---- The loop: one turn looks at the model, saves it, and makes one optimizer step on one global batch. Everything
    # that decides a step is a function of (seed, samples seen, rank), so a resumed run repeats the uninterrupted one.
    objective.train()
    batches = iter(train_loader)
    evaluation, saved_step = None, state.optimizer_step
    logged = (state.tokens_seen, state.train_seconds)
    if config.evaluation.at_start and state.optimizer_step == 0:
        at_start = evaluate(accelerator, objective, validation_loader, partial(watchdog.beat, 0, "evaluating"))
        tracker.log(at_start.metrics(validation_bytes), 0)
    while True:
        step = state.optimizer_step
        is_last = step == max_steps

        # ---- Once in a while: the loss on all validation documents (all ranks), and a text by the model as it is (main
        # process).
        improved = False
        if state.looked_step < step and stops.reason is None:
            try:
                if step % config.evaluation.every_steps == 0 or is_last:
                    found = evaluate(accelerator, objective, validation_loader, while_evaluating)
                    figures = found.metrics(validation_bytes)
                    if average is not None:
                        with average.swapped():
                            averaged = evaluate(accelerator, objective, validation_loader, while_evaluating)
                        figures["eval/average_loss"] = averaged.loss
                    evaluation = found
                    improved = update_best(state, evaluation.loss, config.evaluation.early_stopping_min_delta)
                    tracker.log(figures, step)
                sample_every = config.tracking.sample_every_steps
                is_writing = accelerator.is_main_process or is_sharded(accelerator)
                if sample_every and (step % sample_every == 0 or is_last) and is_writing:
                    watchdog.beat(step, "sampling")
                    tracker.sample(write_sample(accelerator.unwrap_model(objective), tokenizer, example, config), step)
                state.looked_step = step
            except StopAsked:  # they are made when the run goes on
                pass
        stop_reason = end_of_run(state, config, max_steps) or stops.reason

        # ---- Once in a while: a checkpoint (all ranks call; the main process writes, under FSDP each rank its part).
        if improved or (step > saved_step and (step % config.checkpoint.every_steps == 0 or stop_reason)):
            watchdog.beat(step, "saving")
            if isinstance(train_loader, StreamLoader):
                state.stream = train_loader.state()
            writer.save(state, model, optimizer, scheduler, average, wait=stop_reason is not None)
            saved_step = step
            tracker.log({"perf/save_pause_seconds": writer.pause_seconds}, step)
            if warning := stops.time_for_save(writer.write_seconds):
                tracker.warn(warning)
        if stop_reason is not None:
            break

        # ---- One step. The loss is a mean over the target tokens of the *global* batch, so they are counted before the
        # first backward pass (all ranks; one small reduction).
        watchdog.beat(step + 1, "fetching")
        step_started = time.perf_counter()
        micro_batches = [next(batches) for _ in range(plan.accumulation)]
        watchdog.beat(step + 1, "training")
        num_targets = accelerator.reduce(sum(count_targets(batch) for batch in micro_batches), "sum").clamp(min=1)
        # Dropout starts from here. After the fetch: a loader's first batch draws from the same random numbers.
        set_seed(step_seed(config.seed, state.samples_seen, accelerator.process_index))
        # `backward` divides by the accumulation and DDP by the number of ranks: both are multiplied back in.
        weight = plan.accumulation * plan.num_processes / num_targets

        loss_sum = torch.zeros((), device=accelerator.device)
        for batch in micro_batches:
            with accelerator.accumulate(objective):  # gradients are reduced over the ranks on the last one only
                micro_loss = objective(**batch)
                accelerator.backward(micro_loss * weight)
                loss_sum += micro_loss.detach()
        norm = accelerator.clip_grad_norm_(objective.parameters(), config.optimizer.max_grad_norm or math.inf)

        # ---- The vote: from here on all ranks know the same numbers, and whether one of them is asked to stop.
        loss, grad_norm = stops.agree(loss_sum / num_targets, whole(norm) / plan.num_processes)
        fault = find_fault(state, config.guards, loss, grad_norm, scaled=accelerator.scaler is not None)
        if fault is None:
            optimizer.step()
        else:
            write_bad_batch(accelerator, run, state, micro_batches, tokenizer, fault, tracker.warn)
            if accelerator.scaler is not None:
                accelerator.scaler.update()
        optimizer.zero_grad()

        state.samples_seen += plan.global_batch_size
        state.tokens_seen += int(num_targets)
        state.train_seconds += time.perf_counter() - step_started
        if fault is not None:
            state.skipped += 1
            check_limits(state, config.guards, fault)
            tracker.warn(f"step {step + 1}: the update is left out: {fault}")
            continue
        if accelerator.optimizer_step_was_skipped:  # fp16: the scaler met an overflow and has halved its scale
            state.skipped += 1
            if accelerator.scaler.get_scale() < 1:
                raise UserError(f"fp16 overflows at every scale after step {step}; try bf16, or a lower "
                                "optimizer.learning_rate from the last checkpoint")  # fmt: skip
            continue
        learning_rate = float(scheduler.get_last_lr()[0])
        scheduler.step()
        state.optimizer_step += 1
        if average is not None:
            average.update(state.optimizer_step)
        tracker.advance()

        # ---- Once in a while: a log line.
        if state.optimizer_step % config.tracking.log_every_steps == 0 or state.optimizer_step in (1, max_steps):
            tracker.log({
                "train/loss": loss, "train/learning_rate": learning_rate, "train/grad_norm": grad_norm,
                "perf/tokens_per_second": (state.tokens_seen - logged[0]) / (state.train_seconds - logged[1]),
                "perf/train_seconds": state.train_seconds,
                **({"train/epoch": state.samples_seen / len(train_rows)} if train_rows is not None else {}),
            }, state.optimizer_step)  # fmt: skip
            logged = (state.tokens_seen, state.train_seconds)

    # ---- The end: what came out, and an orderly way down, without which a gloo rank may abort at exit.
    finished = stop_reason in END_REASONS
    if finished and evaluation is None:  # this launch had no step left to make
        tracker.say(f"nothing to do: the run had reached its end ({stop_reason}) at step {state.optimizer_step}")
        evaluation = evaluate(
            accelerator, objective, validation_loader, partial(watchdog.beat, max_steps, "evaluating")
        )
        if state.best_loss is None:  # nor had an earlier one come to its first evaluation
            update_best(state, evaluation.loss, config.evaluation.early_stopping_min_delta)
    watchdog.beat(state.optimizer_step, "ending")
    writer.finish()
    bits = None if evaluation is None or validation_bytes is None else evaluation.bits_per_byte(validation_bytes)
    tracker.finish({
        "finished": finished, "reason": stop_reason, "optimizer_step": state.optimizer_step,
        "parameters": count_parameters(model), "tokens_seen": state.tokens_seen, "skipped": state.skipped,
        "eval_loss": evaluation and evaluation.loss, "perplexity": evaluation and evaluation.perplexity,
        "bits_per_byte": bits, "best_loss": state.best_loss, "best_step": state.best_step,
        "train_seconds": state.train_seconds, "tokens_per_second": state.tokens_seen / state.train_seconds,
    })  # fmt: skip
    if state.stream is not None:
        tracker.say(describe_stream(state.stream))
    if finished:
        tracker.say(
            f"finished ({stop_reason}); best loss {state.best_loss:.4f} at step {state.best_step}; see {config.output}"
        )
    else:
        tracker.say(
            f"stopped ({stop_reason}) at step {state.optimizer_step}, which is saved; go on with: {stops.how_to_go_on()}"
        )
    accelerator.wait_for_everyone()
    del batches, model, scheduler
    objective, optimizer, train_loader, validation_loader = accelerator.free_memory(
        objective, optimizer, train_loader, validation_loader
    )
    gc.collect()
    accelerator.end_training()


def step_seed(seed: int, samples_seen: int, rank: int) -> int:
    """Seed of one step's dropout on one rank, 32 bits: resume needs no stored random state."""
    return int(np.random.SeedSequence([seed, samples_seen, rank]).generate_state(1)[0])


def update_best(state: TrainState, loss: float, min_delta: float) -> bool:
    """Whether `loss` (nats per token) is the lowest so far; counts the evaluations that lower it by too little."""
    if state.patience_loss is None or loss < state.patience_loss - min_delta:
        state.patience_loss, state.evaluations_without_improvement = loss, 0
    else:
        state.evaluations_without_improvement += 1
    if state.best_loss is not None and not loss < state.best_loss:
        return False
    state.best_loss, state.best_step = loss, state.optimizer_step
    return True


def end_of_run(state: TrainState, config: TrainConfig, max_steps: int) -> str | None:
    """One of `END_REASONS` where the run has come to its end and its last model has been looked at, else None."""
    if state.looked_step < state.optimizer_step:
        return None
    if state.optimizer_step >= max_steps:
        return "max_steps"
    patience = config.evaluation.early_stopping_patience
    return "early_stopping" if patience is not None and state.evaluations_without_improvement >= patience else None


if __name__ == "__main__":
    run_script(main, config)
