"""What a person sees of a run: console, training.log, metrics.jsonl, trackers, samples.md, and what its end adds.

Only the main process writes; on the other ranks every method returns at once.
"""

import contextlib
import html
import json
import logging
import os
import re
import threading
import uuid
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.tracking import filter_trackers
from transformers import AutoModelForCausalLM

from training.data import TrainingData
from training.monitoring.console import Console
from training.parallel.sharding import is_sharded, meeting_group
from training.report.plot import draw_losses
from training.report.report import RunReport
from utils.answers import write_answers
from utils.checkpoints import TrainState
from utils.cli import PEER_GONE
from utils.config import TrainConfig
from utils.data.packing import IGNORED
from utils.evaluation import generate_text
from utils.files import finite, flatten, replace_text, short
from utils.model.build import evaluating
from utils.objectives import Objective, objective_module
from utils.pretrained import tokenizer_of

SAMPLE_END = "\n\n---\n\n"  # between the samples of several prompts
WANDB_FILE = "wandb_id.txt"  # the id of the W&B run; the last step sent to it
MLFLOW_FILE = "mlflow_id.txt"  # the id of the MLflow run
SAMPLE_ROWS = 4  # with pictures or sounds


class RunTracker(contextlib.AbstractContextManager):
    """One per launch; it begins where `state` stands. A failure here never stops the run."""

    def __init__(self, accelerator: Accelerator, config: TrainConfig, state: TrainState, max_steps: int) -> None:
        self.accelerator, self.run, self.max_steps, self.state = accelerator, Path(config.output), max_steps, state
        self.is_main = accelerator.is_main_process
        self.meeting = meeting_group() if is_sharded(accelerator) else None
        if not self.is_main:
            return
        self.logger = logging.Logger("plainloop")  # a new one for each run in this process
        handler = logging.FileHandler(self.run / "training.log", encoding="utf-8")
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
        self.logger.addHandler(handler)
        step = state.optimizer_step
        looked = state.last_evaluated_step if step else -1
        self.sent_step, self.sent_evaluation = _cut_metrics(self.run / "metrics.jsonl", step, looked)
        _cut_samples(self.run / "samples.md", state.last_evaluated_step)
        self.metrics_file = (self.run / "metrics.jsonl").open("ab", buffering=0)
        self.unwritten = b""
        self.console = Console(config.console, max_steps, step)
        self.report = RunReport(self.run, self.warn)
        # On a full disk training.log misses a line and TensorBoard's thread ends; no traceback should hide the rest.
        logging.raiseExceptions = False
        self.thread_hook, threading.excepthook = threading.excepthook, self._thread_failed
        self._start_trackers(config, step)

    def say(self, *lines: str) -> None:
        """Lines for the reader."""
        if self.is_main:
            for line in lines:
                self.console.say(line)
                self.logger.info(line)

    def warn(self, text: str) -> None:
        if self.is_main:
            self.console.warn(text)
            self.logger.warning(text)

    def log(self, metrics: dict[str, float], step: int, seconds_left: float | None = None) -> None:
        """Write the numbers of a step to the console, metrics.jsonl and every tracker."""
        if not self.is_main:
            return
        self.logger.info(self.console.record(metrics, step, seconds_left))
        self._write({"step": step, **metrics})
        kind = next(iter(metrics)).partition("/")[0]
        for tracker in list(self.accelerator.trackers):
            # What an earlier launch sent: W&B accepts only increasing steps, others keep both. TensorBoard purges.
            if tracker.name != "tensorboard" and step <= self.sent_step:
                continue
            if kind != "eval" or step != self.sent_evaluation:
                self._send(tracker, metrics, step)
        if kind == "eval":
            self.report.write()

    def _send(self, tracker: Any, values: dict[str, Any], step: int) -> None:
        try:
            tracker.log(values, step=step)
        except Exception as error:  # whatever a tracker raises, the run matters more
            self.accelerator.trackers.remove(tracker)
            self._warn_off(tracker.name, error)

    def _write(self, record: dict[str, float]) -> None:
        """Append a line to metrics.jsonl. On a full disk the line waits for the next call, and no half of it stays."""
        self.unwritten += json.dumps(finite(record)).encode() + b"\n"
        size = os.fstat(self.metrics_file.fileno()).st_size
        left = self.unwritten
        try:
            while left:  # a full disk may take a part
                left = left[self.metrics_file.write(left) :]
            self.unwritten = b""
        except OSError as error:
            with contextlib.suppress(OSError):
                os.ftruncate(self.metrics_file.fileno(), size)
            self.warn(f"metrics.jsonl cannot be written: {error.strerror}; trying again with the next line")

    def advance(self) -> None:
        if self.is_main:
            self.console.advance()

    def progress(self, doing: str, done: int, total: int) -> None:
        if self.is_main:
            self.console.progress(doing, done, total)

    def sample(self, write: Callable[[], str | None], step: int) -> None:
        """Append what `write` returns to samples.md (all ranks call). If it fails, training goes on."""
        text = None
        try:
            text = write()
        except Exception as error:
            if PEER_GONE.search(str(error)):
                raise
            self.warn(f"no sample at step {step}: {type(error).__name__}: {short(error)}")
        if self.meeting is not None:  # every rank generates; if one alone has failed, the others wait for it in vain
            dist.barrier(self.meeting)
        if self.is_main and text is not None:
            try:
                with (self.run / "samples.md").open("a", encoding="utf-8") as file:
                    file.write(f"## Step {step}\n\n```\n{text}\n```\n\n")
            except OSError as error:
                self.warn(f"samples.md cannot be written: {error.strerror}")
            for tracker in list(self.accelerator.trackers):
                if tracker.name == "tensorboard":  # shows text; in W&B, as a page
                    self._send(tracker, {"sample": f"```\n{text}\n```"}, step)
                elif tracker.name == "wandb" and step > self.sent_step:
                    import wandb

                    self._send(tracker, {"sample": wandb.Html(f"<pre>{html.escape(text)}</pre>")}, step)

    def finish(self, summary: dict[str, Any]) -> None:
        """Write summary.json, loss.png and report.html, and close the trackers."""
        if not self.is_main:
            return
        self._write_summary(summary)
        try:
            draw_losses(self.run / "metrics.jsonl").savefig(self.run / "loss.png", dpi=120)
        except Exception as error:  # a picture is not worth the run's exit code
            self.warn(f"loss.png cannot be written: {short(error)}")
        self.report.write()
        for tracker in self.accelerator.trackers:
            try:
                tracker.finish()
            except Exception as error:  # the run is over, and on the disk
                self._warn_off(tracker.name, error)
        self.accelerator.trackers = []

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        """Close the files; after an error, say so in summary.json."""
        if not self.is_main:
            return
        if error is not None:
            message = " ".join(f"{error}".split()) or type(error).__name__
            # Another rank was killed, or has reported the error itself; the next launch may well continue.
            several = self.accelerator.num_processes > 1
            peer_gone = several and isinstance(error, RuntimeError) and PEER_GONE.search(message)
            summary = {"finished": False, "reason": "rank_gone" if peer_gone else "error", "error": message}
            with contextlib.suppress(OSError):  # one error is enough
                self._write_summary(summary | {"optimizer_step": self.state.optimizer_step})
            self.report.write()
        threading.excepthook, logging.raiseExceptions = self.thread_hook, True
        self.console.close()
        self.metrics_file.close()

    def _thread_failed(self, failed: threading.ExceptHookArgs) -> None:
        self.warn(f"a thread has ended: {type(failed.exc_value).__name__}: {failed.exc_value}")

    def _write_summary(self, summary: dict[str, Any]) -> None:
        replace_text(self.run / "summary.json", json.dumps(finite(summary), indent=2) + "\n")

    def _start_trackers(self, config: TrainConfig, step: int) -> None:
        values = flatten(asdict(config))
        values = {name: value if isinstance(value, int | float | str) else str(value) for name, value in values.items()}
        started = []
        for name in config.tracking.trackers:
            self.accelerator.trackers = []  # `init_trackers` starts everything in this list, each time
            try:
                self.accelerator.log_with = filter_trackers([name], self.accelerator.logging_dir)
                options = {name: self._options(name, step)}
                again = options[name].get("run_id") is not None  # MLflow never changes the options of a run
                self.accelerator.init_trackers(
                    config.tracking.project, config=None if again else values, init_kwargs=options
                )
                started += self.accelerator.trackers
                if name == "mlflow":
                    (self.run / MLFLOW_FILE).write_text(f"{self.accelerator.trackers[0].tracker.info.run_id}\n")
            except Exception as error:  # a dead network, a refused key: the files go on without it
                self._warn_off(name, error)
        self.accelerator.trackers = started

    def _options(self, name: str, step: int) -> dict[str, Any]:
        """What a tracker is started with, so that all launches of this folder are one run in it."""
        if name == "tensorboard":
            return {"purge_step": step + 1}
        if name == "wandb":
            return self._wandb_options()
        if name == "trackio":
            return {"name": self.run.name, "resume": "allow"}
        if name == "mlflow":
            path = self.run / MLFLOW_FILE
            return {"run_name": self.run.name, "run_id": path.read_text().strip() if path.exists() else None}
        return {}

    def _wandb_options(self) -> dict[str, Any]:
        """The same W&B run for every launch of this folder; offline if there is no key to log in with."""
        import wandb

        path = self.run / WANDB_FILE
        run_id, *sent = path.read_text(encoding="utf-8").split() if path.exists() else [uuid.uuid4().hex[:8]]
        self.sent_step = max(self.sent_step, *(int(step) for step in sent), -1)
        path.write_text(f"{run_id}\n{self.sent_step}\n", encoding="utf-8")
        options = {"name": self.run.name, "dir": str(self.run), "id": run_id, "resume": "allow"}
        if "WANDB_MODE" not in os.environ and not wandb.login(prompt=False):
            options["mode"] = "offline"
            self.warn("W&B has no API key: the run is kept offline; `wandb sync` uploads it later")
        return options

    def _warn_off(self, name: str, error: Exception) -> None:
        self.warn(f"tracker {name} is off from here: {short(error)}; metrics.jsonl has everything")


def _cut_samples(path: Path, step: int) -> None:
    """Drop the samples of steps after `step`: the resumed run writes them again."""
    if path.exists():
        text = path.read_text(encoding="utf-8", errors="replace")  # a full disk may have cut a character
        headings = re.finditer(r"(?m)^## Step (\d{1,15})$", text)  # the text of a sample may hold some, too
        replace_text(path, text[: next((heading.start() for heading in headings if int(heading[1]) > step), None)])


def _cut_metrics(path: Path, step: int, looked: int) -> tuple[int, int]:
    """Drop what the resumed run will log again: training after `step`, evaluations after `looked`, a broken last line.

    Returns what earlier launches have sent to the trackers, -1 if nothing: the last step in the file before the cut, and
    the step of an evaluation that this launch makes again at the step where it begins.
    """
    kept, last, again = [], -1, -1
    if not path.exists():
        return last, again
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        with contextlib.suppress(ValueError, TypeError, KeyError, StopIteration, RecursionError):
            record = json.loads(line)
            name = next(name for name in record if name != "step")
            if record["step"] <= (looked if name.startswith("eval/") else step):
                kept.append(line + "\n")
            elif record["step"] == step:
                again = step
            last = max(last, record["step"])
    replace_text(path, "".join(kept))
    return last, again


def write_sample(
    accelerator: Accelerator, prepared: Any, processor: Any, data: TrainingData, config: TrainConfig
) -> str | None:
    """A sample by the main process; None on the others. With FSDP all ranks must take part and get the same text.

    An objective that does not generate text predicts the targets of an example. For pictures and sounds, the model
    answers `SAMPLE_ROWS` of the validation rows.
    """
    if not accelerator.is_main_process and not is_sharded(accelerator):
        return None
    objective = accelerator.unwrap_model(prepared, keep_torch_compile=False)  # else DDP's wrapper stays around blocks
    tokenizer = tokenizer_of(processor)
    if "media" in data.manifest:
        collate = objective_module(config.objective.name).build_collator(config.objective, processor)
        answers = write_answers(
            objective.model, collate, data.validation_rows, tokenizer, at_most=SAMPLE_ROWS,
            max_new_tokens=config.tracking.sample_max_new_tokens, generate=objective.generate,
        )  # fmt: skip
        return "\n".join(f"reference: {answer.reference}\nwritten:   {answer.text}" for answer in answers)
    if objective_module(config.objective.name).AUTO_MODEL is not AutoModelForCausalLM:
        return write_predictions(objective, tokenizer, data.example)
    options: dict[str, Any] = {"max_new_tokens": config.tracking.sample_max_new_tokens, "seed": config.seed}
    options |= {"chat": config.objective.name == "instruction", "generate": objective.generate, "temperature": 0.8}
    prompts = config.tracking.sample_prompt
    prompts = [prompts] if isinstance(prompts, str) else prompts
    return SAMPLE_END.join(generate_text(objective.model, tokenizer, prompt, **options) for prompt in prompts)


@torch.no_grad()
def write_predictions(objective: Objective, tokenizer: Any, batch: dict[str, torch.Tensor]) -> str:
    """The input of the first row, its targets, and the likeliest token for each of them; for an encoder, the text filled
    with these."""
    inputs = {name: values.to(next(objective.parameters()).device) for name, values in batch.items()}
    targets = inputs.pop("targets")[0]
    with evaluating(objective):
        predicted = objective.predict(**inputs)[0][targets != IGNORED].tolist()
    wanted = targets[targets != IGNORED].tolist()
    ids, filled = batch["input_ids"][0].clone(), ""
    if objective.is_encoder:
        ids[(targets != IGNORED).cpu()] = torch.tensor(predicted)
        filled = f"\nfilled:    {tokenizer.decode(ids)}"
    right = sum(guess == target for guess, target in zip(predicted, wanted, strict=True))
    return (
        f"{tokenizer.decode(batch['input_ids'][0])}\n--- {right} of {len(wanted)} targets right\n"
        f"targets:   {tokenizer.decode(wanted)}\npredicted: {tokenizer.decode(predicted)}{filled}"
    )
