"""What a person sees of a run: console, training.log, metrics.jsonl, trackers, samples.md, loss.png, summary.json.

Only the main process writes; on the other ranks every method returns at once.
"""

import contextlib
import errno
import json
import logging
import os
import re
import sys
import threading
import uuid
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, TextIO

from accelerate import Accelerator
from accelerate.tracking import filter_trackers
from tqdm import tqdm

from utils.checkpoints import TrainState
from utils.cli import PEER_GONE
from utils.config import TrainConfig
from utils.files import flatten, replace_text

if TYPE_CHECKING:
    from matplotlib.figure import Figure

WANDB_FILE = "wandb_id.txt"  # the id of the W&B run; the last step sent to it
DIGITS = {"train/learning_rate": ".2e", "perf/tokens_per_second": ",.0f", "perf/train_seconds": ",.0f"}


class RunTracker:
    """One per launch; it begins where `state` stands. A failure here never stops the run."""

    def __init__(self, accelerator: Accelerator, config: TrainConfig, state: TrainState, max_steps: int) -> None:
        self.accelerator, self.run, self.max_steps = accelerator, Path(config.output), max_steps
        self.is_main, self.state = accelerator.is_main_process, state
        if not self.is_main:
            return
        self.logger = logging.getLogger("plainloop")
        self.logger.setLevel(logging.INFO)
        for old in list(self.logger.handlers):  # of an earlier run in this process
            self.logger.removeHandler(old)
            old.close()
        handler = logging.FileHandler(self.run / "training.log", encoding="utf-8")
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
        self.logger.addHandler(handler)
        self.logger.propagate = False
        step, looked = state.optimizer_step, state.last_evaluated_step
        self.sent_step = _cut_metrics(self.run / "metrics.jsonl", step, looked)
        _cut_samples(self.run / "samples.md", looked)
        self.metrics_file = (self.run / "metrics.jsonl").open("ab", buffering=0)
        self.unwritten = b""
        self.progress = tqdm(total=max_steps, initial=step, unit="step", disable=not sys.stderr.isatty(), leave=False)
        # On a full disk training.log misses a line and TensorBoard's thread ends; no traceback should hide the rest.
        logging.raiseExceptions = False
        self.thread_hook, threading.excepthook = threading.excepthook, self._thread_failed
        self._start_trackers(config, step)

    def say(self, text: str) -> None:
        """One line for the reader."""
        if self.is_main:
            self._show(text, sys.stdout)
            self.logger.info(text)

    def warn(self, text: str) -> None:
        if self.is_main:
            self._show(f"warning: {text}", sys.stderr)
            self.logger.warning(text)

    def _show(self, text: str, stream: TextIO) -> None:
        """Print to the console. A pipe's reader or a terminal may be gone, the disk of a file full."""
        try:
            tqdm.write(text, file=stream)
            stream.flush()
        except OSError as error:
            if error.errno in (errno.EPIPE, errno.EIO):  # gone for good: the buffer must not fail again at the exit
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())

    def log(self, metrics: dict[str, float], step: int) -> None:
        """Write the numbers of a step to the console, metrics.jsonl and every tracker."""
        if not self.is_main:
            return
        parts = [f"{name.partition('/')[2]} {value:{DIGITS.get(name, '.4f')}}" for name, value in metrics.items()]
        kind = next(iter(metrics)).partition("/")[0]
        self.say(f"step {step:>{len(str(self.max_steps))}}/{self.max_steps} | {kind:<5} | " + " | ".join(parts))
        self._write({"step": step, **metrics})
        for tracker in list(self.accelerator.trackers):
            if tracker.name == "wandb" and step <= self.sent_step:
                continue  # an earlier launch sent it: W&B accepts only increasing steps and cannot take one back
            try:
                tracker.log(metrics, step=step)
            except Exception as error:  # whatever a tracker raises, the run matters more
                self.accelerator.trackers.remove(tracker)
                self._warn_off(tracker.name, error)

    def _write(self, record: dict[str, float]) -> None:
        """Append a line to metrics.jsonl. On a full disk the line waits for the next call, and no half of it stays."""
        self.unwritten += json.dumps(record).encode() + b"\n"
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
            self.progress.update()

    def sample(self, text: str | None, step: int) -> None:
        """Append what the model wrote to samples.md; nothing if this rank wrote nothing."""
        if self.is_main and text is not None:
            try:
                with (self.run / "samples.md").open("a", encoding="utf-8") as file:
                    file.write(f"## Step {step}\n\n```\n{text}\n```\n\n")
            except OSError as error:
                self.warn(f"samples.md cannot be written: {error.strerror}")

    def finish(self, summary: dict[str, Any]) -> None:
        """Write summary.json and loss.png, and close the trackers."""
        if not self.is_main:
            return
        self._write_summary(summary)
        try:
            draw_losses(self.run / "metrics.jsonl").savefig(self.run / "loss.png", dpi=120)
        except (OSError, ValueError) as error:
            self.warn(f"loss.png cannot be written: {error}")
        for tracker in self.accelerator.trackers:
            try:
                tracker.finish()
            except Exception as error:  # the run is over, and on the disk
                self._warn_off(tracker.name, error)
        self.accelerator.trackers = []

    def __enter__(self) -> "RunTracker":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close the files; after an error, say so in summary.json."""
        if self.is_main:
            if error is not None:
                message = " ".join(f"{error}".split()) or type(error).__name__
                # Another rank was killed, or has reported the error itself; the next launch may well continue.
                peer_gone = (
                    self.accelerator.num_processes > 1 and isinstance(error, RuntimeError) and PEER_GONE.search(message)
                )
                reason = "rank_gone" if peer_gone else "error"
                with contextlib.suppress(OSError):  # one error is enough
                    self._write_summary({
                        "finished": False, "reason": reason, "error": message,
                        "optimizer_step": self.state.optimizer_step,
                    })  # fmt: skip
            threading.excepthook, logging.raiseExceptions = self.thread_hook, True
            self.progress.close()
            self.metrics_file.close()

    def _thread_failed(self, failed: threading.ExceptHookArgs) -> None:
        self.warn(f"a thread has ended: {type(failed.exc_value).__name__}: {failed.exc_value}")

    def _write_summary(self, summary: dict[str, Any]) -> None:
        replace_text(self.run / "summary.json", json.dumps(summary, indent=2) + "\n")

    def _start_trackers(self, config: TrainConfig, step: int) -> None:
        options: dict[str, dict[str, Any]] = {"tensorboard": {"purge_step": step + 1}, "wandb": {}}
        values = {
            name: value if isinstance(value, int | float | str) else str(value)
            for name, value in flatten(asdict(config)).items()
        }
        started = []
        for name in config.tracking.trackers:
            self.accelerator.trackers = []  # `init_trackers` starts everything in this list, each time
            try:
                if name == "wandb":
                    options["wandb"] = self._wandb_options()
                self.accelerator.log_with = filter_trackers([name], self.accelerator.logging_dir)
                self.accelerator.init_trackers(config.tracking.project, config=values, init_kwargs=options)
                started += self.accelerator.trackers
            except Exception as error:  # a dead network, a refused key: the files go on without it
                self._warn_off(name, error)
        self.accelerator.trackers = started

    def _wandb_options(self) -> dict[str, Any]:
        """The same W&B run for every launch of this folder; offline if there is no key to log in with."""
        import wandb

        path = self.run / WANDB_FILE
        run_id, *sent = path.read_text(encoding="utf-8").split() if path.exists() else [uuid.uuid4().hex[:8]]
        self.sent_step = max(self.sent_step, *(int(step) for step in sent), 0)
        path.write_text(f"{run_id}\n{self.sent_step}\n", encoding="utf-8")
        options = {"name": self.run.name, "dir": str(self.run), "id": run_id, "resume": "allow"}
        if "WANDB_MODE" not in os.environ and not wandb.login(prompt=False):
            options["mode"] = "offline"
            self.warn("W&B has no API key: the run is kept offline; `wandb sync` uploads it later")
        return options

    def _warn_off(self, name: str, error: Exception) -> None:
        reason = " ".join(str(error).split())[:200]
        self.warn(f"tracker {name} is off from here: {reason}; metrics.jsonl has everything")


def _cut_samples(path: Path, step: int) -> None:
    """Drop the samples of steps after `step`: the resumed run writes them again."""
    if path.exists():
        sections = re.split(r"(?m)^(?=## Step \d+$)", path.read_text(encoding="utf-8"))
        headings = [re.match(r"## Step (\d+)", text) for text in sections]
        kept = [text for text, found in zip(sections, headings, strict=True) if not found or int(found[1]) <= step]
        replace_text(path, "".join(kept))


def _cut_metrics(path: Path, step: int, looked: int) -> int:
    """Drop what the resumed run will log again: training after `step`, evaluations after `looked`, a broken last line.

    Returns the last step in the file before the cut, which earlier launches have sent to the trackers.
    """
    if not path.exists():
        return 0
    kept, last = [], 0
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            record = json.loads(line)
            name = next(name for name in record if name != "step")
            if record["step"] <= (looked if name.startswith("eval/") else step):
                kept.append(line + "\n")
            last = max(last, record["step"])
        except (ValueError, TypeError, KeyError, StopIteration):
            continue
    replace_text(path, "".join(kept))
    return last


def draw_losses(metrics: Path) -> "Figure":
    """Training and evaluation loss over the steps."""
    from matplotlib.figure import Figure

    records = [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines()]
    axes = (figure := Figure(figsize=(8, 4.5), layout="constrained")).subplots()
    for name, style in (("train/loss", "-"), ("eval/loss", "o-")):
        points = [(record["step"], record[name]) for record in records if name in record]
        if points:
            axes.plot(*zip(*points, strict=True), style, label=name, markersize=4, linewidth=1.2)
            step, loss = points[-1]
            axes.annotate(f"{loss:.3f}", (step, loss), textcoords="offset points", xytext=(4, 4), fontsize=8)
    axes.set(xlabel="optimizer step", ylabel="cross-entropy, nats per token")
    axes.grid(alpha=0.3)
    axes.legend()
    return figure
