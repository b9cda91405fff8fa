"""What a person sees of a run: console, training.log, metrics.jsonl, trackers, samples.md, loss.png, summary.json.

All of it happens on the main process only; on the others every method returns at once.
"""

import json
import logging
import os
import re
import sys
import uuid
from dataclasses import asdict
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.tracking import filter_trackers
from tqdm import tqdm

from utils.config import TrainConfig
from utils.files import replace_text
from utils.training.run_folder import flatten

DIGITS = {"train/learning_rate": ".2e", "perf/tokens_per_second": ",.0f"}


class RunTracker:
    """One per run and launch. `step` is the optimizer step at which the launch begins."""

    def __init__(self, accelerator: Accelerator, config: TrainConfig, step: int, max_steps: int) -> None:
        self.accelerator, self.run, self.max_steps = accelerator, Path(config.output), max_steps
        self.is_main = accelerator.is_main_process
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
        _cut_metrics(self.run / "metrics.jsonl", step)
        _cut_samples(self.run / "samples.md", step)
        self.metrics_file = (self.run / "metrics.jsonl").open("a", encoding="utf-8", buffering=1)
        self.progress = tqdm(total=max_steps, initial=step, unit="step", disable=not sys.stderr.isatty(), leave=False)
        self._start_trackers(config, step)

    def say(self, text: str) -> None:
        """One line for the reader."""
        if self.is_main:
            tqdm.write(text, file=sys.stdout)
            sys.stdout.flush()
            self.logger.info(text)

    def warn(self, text: str) -> None:
        if self.is_main:
            tqdm.write(f"warning: {text}", file=sys.stderr)
            self.logger.warning(text)

    def log(self, metrics: dict[str, float], step: int) -> None:
        """Numbers of a step, to the console, metrics.jsonl and every tracker."""
        if not self.is_main:
            return
        parts = [f"{name.partition('/')[2]} {value:{DIGITS.get(name, '.4f')}}" for name, value in metrics.items()]
        kind = next(iter(metrics)).partition("/")[0]
        self.say(f"step {step:>{len(str(self.max_steps))}}/{self.max_steps} | {kind:<5} | " + " | ".join(parts))
        self.metrics_file.write(json.dumps({"step": step, **metrics}) + "\n")
        for tracker in list(self.accelerator.trackers):
            try:
                tracker.log(metrics, step=step)
            except Exception as error:  # whatever a tracker raises, the run matters more
                self.accelerator.trackers.remove(tracker)
                self._warn_off(tracker.name, error)

    def advance(self) -> None:
        if self.is_main:
            self.progress.update()

    def sample(self, text: str, step: int) -> None:
        """Append what the model wrote to samples.md."""
        if self.is_main:
            with (self.run / "samples.md").open("a", encoding="utf-8") as file:
                file.write(f"## Step {step}\n\n```\n{text}\n```\n\n")

    def finish(self, summary: dict[str, Any]) -> None:
        """Write summary.json and loss.png."""
        if not self.is_main:
            return
        self.progress.close()
        self.metrics_file.close()
        replace_text(self.run / "summary.json", json.dumps(summary, indent=2) + "\n")
        plot_losses(self.run / "metrics.jsonl", self.run / "loss.png")

    def _start_trackers(self, config: TrainConfig, step: int) -> None:
        options: dict[str, dict[str, Any]] = {"tensorboard": {"purge_step": step + 1}, "wandb": {}}
        values = {
            name: value if isinstance(value, int | float | str) else str(value)
            for name, value in flatten(asdict(config)).items()
        }
        started = []
        for name in config.tracking.trackers:
            self.accelerator.trackers = []  # `init_trackers` starts all that are in this list, each time
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
        """The same W&B run for every launch of this folder; offline where there is no key to log in with."""
        import wandb

        id_file = self.run / "wandb_id.txt"
        if not id_file.exists():
            id_file.write_text(uuid.uuid4().hex[:8], encoding="utf-8")
        run_id = id_file.read_text(encoding="utf-8").strip()
        options = {"name": self.run.name, "dir": str(self.run), "id": run_id, "resume": "allow"}
        if "WANDB_MODE" not in os.environ and not wandb.login(prompt=False):
            options["mode"] = "offline"
            self.warn("W&B has no API key: the run is kept offline; `wandb sync` uploads it later")
        return options

    def _warn_off(self, name: str, error: Exception) -> None:
        reason = " ".join(str(error).split())[:200]
        self.warn(f"tracker {name} is off from here: {reason}; metrics.jsonl has everything")


def _cut_samples(path: Path, step: int) -> None:
    """Drop the texts of later steps than `step`: the resumed run writes them again."""
    if path.exists():
        sections = re.split(r"(?m)^(?=## Step \d+$)", path.read_text(encoding="utf-8"))
        headings = [re.match(r"## Step (\d+)", text) for text in sections]
        kept = [text for text, found in zip(sections, headings, strict=True) if not found or int(found[1]) <= step]
        replace_text(path, "".join(kept))


def _cut_metrics(path: Path, step: int) -> None:
    """Drop the lines of later steps than `step`, and a last one that a kill cut short."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line + "\n")
        except ValueError:
            continue
    replace_text(path, "".join(kept))


def plot_losses(metrics: Path, image: Path) -> None:
    """Training and evaluation loss over the steps, as a PNG."""
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
    figure.savefig(image, dpi=120)
