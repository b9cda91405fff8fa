"""Updates to skip: those without a target, those that are not finite, and spikes of loss or gradient norm."""

import json
import math
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object

from utils.checkpoints import TrainState
from utils.cli import UserError
from utils.config import GuardConfig

NO_TARGET = "no token of the global batch is a target"


def check_update(
    state: TrainState, config: GuardConfig, loss: float, grad_norm: float, *, targets: int, scaled: bool
) -> str | None:
    """Why to skip this update, or None; counts it in `state`. The numbers are global, so all ranks agree.

    `loss` is in nats per token, `grad_norm` that before clipping, `targets` the number of target tokens. Without any
    (all of a long conversation is the user's, say) the loss is 0 / 0, and an update would only apply momentum and decay.
    If gradients are `scaled` (fp16), the scaler handles those that are not finite.

    A spike lies more than `spike_deviations` standard deviations above the mean of the updates in the window. The rule
    is that of OLMo-core's `SkipStepOptimizer` (src/olmo_core/optim/skip_step_optimizer.py; there 6 and 128), except
    that a skipped spike does not enter the window.
    """
    if targets == 0:
        state.without_target += 1
        return NO_TARGET
    if not math.isfinite(loss) or not (scaled or math.isfinite(grad_norm)):
        state.nonfinite += 1
        return f"not finite: loss {loss}, gradient norm {grad_norm}"
    if config.spike_deviations is None or not math.isfinite(grad_norm):
        return None
    if len(state.recent) >= config.spike_window // 2:
        for place, (name, value) in enumerate((("loss", loss), ("gradient norm", grad_norm))):
            history = [figures[place] for figures in state.recent]
            mean, deviation = statistics.fmean(history), statistics.stdev(history)
            if value - mean > config.spike_deviations * deviation:
                state.spikes += 1
                return f"a spike: {name} {value:.4g}, where the last {len(history)} had {mean:.4g} ± {deviation:.2g}"
    state.recent = [*state.recent, [loss, grad_norm]][-config.spike_window :]
    return None


def check_limits(state: TrainState, config: GuardConfig, fault: str) -> None:
    """`UserError` if the run has skipped more updates than it may."""
    for name, count in {"max_nonfinite": state.nonfinite, "max_spikes": state.spikes}.items():
        if count > (limit := getattr(config, name)):
            raise UserError(
                f"step {state.optimizer_step + 1} is {fault}; the run may skip at most {limit} such updates "
                f"(guards.{name}). bad_batches/ holds its texts. Continue from the last checkpoint with "
                f"--checkpoint.resume auto and a higher --guards.{name}, or start again with a lower learning rate"
            )


def write_bad_batch(
    accelerator: Accelerator, run: Path, state: TrainState, micro_batches: list[dict[str, torch.Tensor]],
    tokenizer: Any, fault: str, warn: Callable[[str], None],
) -> None:  # fmt: skip
    """Write the rows of a global batch to `bad_batches/`, as ids and as text. All ranks call, the main process writes.

    Of speech only the text is written. With context parallelism a record holds one rank's two pieces of a row, one after the other.
    """
    rows = gather_object([
        {"rank": accelerator.process_index, "micro_batch": number, "input_ids": ids}
        for number, batch in enumerate(micro_batches)
        for ids in (batch["input_ids"] if "input_ids" in batch else batch["decoder_input_ids"]).tolist()
    ])  # fmt: skip
    if accelerator.is_main_process:
        where = {"step": state.optimizer_step + 1, "samples_seen": state.samples_seen, "fault": fault}
        records = [where | row | {"text": tokenizer.decode(row["input_ids"])} for row in rows]
        text = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
        path = run / "bad_batches" / f"samples-{state.samples_seen:010d}.jsonl"
        try:
            path.parent.mkdir(exist_ok=True)
            path.write_text(text, encoding="utf-8")
        except OSError as error:
            warn(f"{path} cannot be written: {error.strerror}")
