"""What a launch shows on the console: lines, bars on a terminal, and the time that is left. Main process only."""

import contextlib
import errno
import json
import os
import sys
import time
from collections import Counter
from collections.abc import Iterable
from typing import Literal, TextIO

from tqdm import tqdm

from utils.files import finite

Mode = Literal["lines", "quiet", "json"]
PROGRESS_SECONDS = 30.0  # between the lines about one evaluation, where there is no terminal
LABEL = 11  # characters before the text of a banner's line
# Metric → its text in a status line. Metrics without an entry are shown by their name.
FORMATS = {
    "train/loss": "loss {:.4f}", "train/learning_rate": "lr {:.2e}", "train/grad_norm": "norm {:.3g}",
    "train/epoch": "epoch {:.2f}", "perf/tokens_per_second": "{:,.0f} tokens/s", "perf/mfu": "MFU {:.0%}",
    "perf/peak_memory_gb": "{:.1f} GB", "eval/loss": "loss {:.4f}", "eval/perplexity": "perplexity {:.2f}",
    "eval/bits_per_byte": "{:.3f} bits per byte", "eval/average_loss": "loss of the average {:.4f}",
    "perf/eval_seconds": "{:.1f} s", "perf/save_pause_seconds": "training paused {:.2f} s",
}  # fmt: skip
HIDDEN = ("perf/train_seconds",)  # in metrics.jsonl only
# Without tqdm's own time left, which takes an evaluation for a slow step.
STEPS_BAR = "{percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} steps"


class Console:
    """`mode` quiet leaves out all but warnings; json prints the records of metrics.jsonl in place of lines."""

    def __init__(self, mode: Mode, max_steps: int, step: int) -> None:
        self.mode, self.max_steps = mode, max_steps
        self.live = mode == "lines" and sys.stderr.isatty()
        self._steps = tqdm(
            total=max_steps, initial=step, bar_format=STEPS_BAR, disable=not self.live, leave=False,
        )  # fmt: skip
        self._bar: tqdm | None = None  # of the evaluation under way
        self._began = self._shown = 0.0

    def say(self, text: str) -> None:
        if self.mode == "lines":
            _print(text, sys.stdout)

    def warn(self, text: str) -> None:
        _print(f"warning: {text}", sys.stderr)

    def record(self, metrics: dict[str, float], step: int, seconds_left: float | None) -> str:
        """Show the numbers of a step; returns the line."""
        share = f"{100 * step // self.max_steps:3}%" if self.max_steps else ""  # 100 only at the end
        kinds = [name.partition("/")[0] for name in metrics]
        kind = next((kind for kind in kinds if kind != "perf"), "save")
        parts = [_format(name, value, kind) for name, value in metrics.items() if name not in HIDDEN]
        if seconds_left is not None and seconds_left >= 0.5:
            parts.append(f"{duration(seconds_left)} left")
        line = f"step {step:>{len(str(self.max_steps))}}/{self.max_steps} {share} | {kind:<5} | {' | '.join(parts)}"
        if self.mode == "json":
            _print(json.dumps(finite({"step": step, **metrics})), sys.stdout)
        self.say(line)
        return line

    def advance(self) -> None:
        self._steps.update()

    def progress(self, doing: str, done: int, total: int) -> None:
        """How much of something long is done: a bar on a terminal, elsewhere a line now and then."""
        now = time.monotonic()
        if done == 1:
            self._began = self._shown = now
            self._bar = tqdm(total=total, desc=doing, unit="batch", disable=not self.live, leave=False)
        if self._bar is not None:
            self._bar.update(done - self._bar.n)
        if not self.live and now - self._shown >= PROGRESS_SECONDS:
            self._shown = now
            left = (now - self._began) / (done - 1) * (total - done)
            self.say(f"{doing}: {done:,} of {total:,} batches, {duration(left)} left")
        if done >= total and self._bar is not None:
            self._bar.close()
            self._bar = None

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
        self._steps.close()


class Clock:
    """How this launch spends its time: seconds by what it is doing, and how often it began to do so."""

    def __init__(self) -> None:
        self.seconds: Counter[str] = Counter()  # type: ignore[assignment]
        self.times: Counter[str] = Counter()
        self.doing = "starting"
        self._began = self._since = time.perf_counter()

    def turn(self, doing: str) -> None:
        now = time.perf_counter()
        self.seconds[self.doing] += now - self._since  # type: ignore[assignment]
        if doing != self.doing:
            self.times[doing] += 1
            self._began = now
        self.doing, self._since = doing, now

    def so_far(self) -> float:
        """Seconds since the present activity began."""
        return time.perf_counter() - self._began

    def mean(self, doing: str) -> float | None:
        """Seconds of `doing`, each time; None before the first time has ended."""
        return self.seconds[doing] / self.times[doing] if self.seconds[doing] else None


def banner(lines: Iterable[str]) -> list[str]:
    """Lines `label: text` with their texts below each other; lines of another form as they are."""
    found = []
    for line in lines:
        label, colon, text = line.partition(": ")
        aligned = colon and len(label) < LABEL and " " not in label
        found.append(f"{label:<{LABEL}} {text}" if aligned else line)
    return found


def duration(seconds: float) -> str:
    """Two digits in the largest fitting unit, such as `4.2 h`."""
    units = {"years": 365 * 86400, "days": 86400, "h": 3600, "min": 60, "s": 1}
    unit = next((unit for unit, length in units.items() if seconds >= length), "s")
    value = seconds / units[unit]
    return f"{value:.1f} {unit}" if value < 10 else f"{value:,.0f} {unit}"


def _format(name: str, value: float, kind: str) -> str:
    if name in FORMATS:
        return FORMATS[name].format(value)
    shown = name.partition("/")[2] if name.startswith(f"{kind}/") else name
    return f"{shown} {value:.4g}"


def _print(text: str, stream: TextIO) -> None:
    """A pipe's reader or a terminal may be gone, the disk of a file full."""
    try:
        tqdm.write(text, file=stream)
        stream.flush()
    except OSError as error:
        if error.errno in (errno.EPIPE, errno.EIO):  # gone for good: the buffer must not fail again at the exit
            with contextlib.suppress(OSError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def times_due(every: int, first: int, last: int) -> int:
    """How many steps in first … last are multiples of `every`, or the last one. 0: never."""
    if every <= 0 or first > last:
        return 0
    return last // every - (first - 1) // every + (last % every != 0)
