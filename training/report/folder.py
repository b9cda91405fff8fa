"""What a run folder says about its run. Every part may be missing or damaged; memory does not grow with the run."""

import contextlib
import json
import re
import shlex
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

from training.report.curves import Curves, iter_lines, read_curves
from utils.checkpoints import list_checkpoints, load_state, read_pointers, step_of
from utils.cli import UserError
from utils.config import TrainConfig
from utils.files import flatten, read_json, read_yaml

SAMPLES, SAMPLE_CHARACTERS = 6, 1200  # shown; of each
EVENTS, CHECKPOINTS, LAUNCHES = 50, 30, 20  # shown: the newest
HEADING = re.compile(rb"## Step (\d{1,15})\r?\n")
LOG_LINE = re.compile(r"(\S+ \d\d:\d\d:\d\d)\S* ([A-Z]+) (.*)")
STEP_LINE = re.compile(r"step +(\d{1,15})/(\d{1,15})\b")
# INFO lines of training.log that are events. Warnings and errors are events too.
EVENT = re.compile(r"resumed |stopped |finished |changed since |nothing to do|hint: ")
Value = TypeVar("Value")


@dataclass
class RunFolder:
    """One run, as its files say."""

    path: Path
    options: dict[str, Any]  # config.yaml, flat; the defaults where it says nothing
    summary: dict[str, Any]  # summary.json; empty while the run is going on, and after a kill
    launches: list[dict[str, Any]]  # environment.json
    curves: Curves
    checkpoints: list[Path]
    pointers: dict[str, str]
    events: list[tuple[str, str, str]]  # time, level, message
    samples: list[tuple[int, str]]  # step, text
    max_steps: int | None
    tokens_per_step: float | None  # a mean
    dataset_key: str | None  # of the dataset that it is trained on

    @property
    def name(self) -> str:
        return self.path.resolve().name

    @property
    def step(self) -> int:
        """The newest step in metrics.jsonl or summary.json."""
        lasts = [series.last[0] for series in self.curves.series.values() if series]
        summarized = self.summary.get("optimizer_step")
        return max([0, *map(int, lasts), summarized if isinstance(summarized, int) else 0])

    def tokens(self, steps: Sequence[float]) -> list[float]:
        """Target tokens seen until each of `steps`, as far as the mean of all steps says."""
        return [step * (self.tokens_per_step or 0.0) for step in steps]


def read_run(path: Path) -> RunFolder:
    folder = path / "checkpoints"
    checkpoints = list_checkpoints(folder) if folder.is_dir() else []
    nothing: dict[str, Any] = {}
    summary = _or(lambda: read_json(path / "summary.json"), nothing)
    launches: list[Any] = _or(lambda: read_json(path / "environment.json", list), [])
    options = default_options() | _or(lambda: flatten(read_yaml(path / "config.yaml")), nothing)
    events, max_steps = read_events(path / "training.log")
    if max_steps is None and type(options["schedule.max_steps"]) is int:
        max_steps = options["schedule.max_steps"]
    state = _or(lambda: load_state(checkpoints[-1]), None) if checkpoints else None
    tokens, step = summary.get("tokens_seen"), summary.get("optimizer_step")
    if state is not None and not (type(tokens) is int and type(step) is int):
        tokens, step = state.tokens_seen, state.optimizer_step
    return RunFolder(
        path=path,
        options=options,
        summary=summary,
        launches=[item for item in launches if isinstance(item, dict)],
        curves=read_curves(path / "metrics.jsonl", {step_of(checkpoint) for checkpoint in checkpoints}),
        checkpoints=checkpoints,
        pointers=_or(lambda: read_pointers(folder), {}) if checkpoints else {},
        events=events,
        samples=read_samples(path / "samples.md"),
        max_steps=max_steps,
        tokens_per_step=tokens / step if type(tokens) is int and type(step) is int and step > 0 else None,
        dataset_key=None if state is None else state.dataset_key,
    )


def _or(read: Callable[[], Value], default: Value) -> Value:
    """What `read` returns, or `default` if the file is missing or damaged."""
    try:
        return read()
    except (UserError, OSError, TypeError):  # TypeError: a key that is no text
        return default


def default_options() -> dict[str, Any]:
    return flatten(asdict(TrainConfig()))


def read_events(path: Path) -> tuple[list[tuple[str, str, str]], int | None]:
    """The newest events of training.log, oldest first, and the last step of the run."""
    events: deque[tuple[str, str, str]] = deque(maxlen=EVENTS)
    step_line = b""
    for line in iter_lines(path):
        if b" INFO step " in line[:50]:
            step_line = line
        elif found := LOG_LINE.fullmatch(line.decode(errors="replace").rstrip("\r\n")):
            time, level, message = found.groups()
            if level != "INFO" or EVENT.match(message):
                events.append((time, level.lower() if level != "INFO" else "", message))
    steps = STEP_LINE.search(step_line.decode(errors="replace"))
    return list(events), int(steps[2]) if steps else None


def read_samples(path: Path) -> list[tuple[int, str]]:
    """(step, text) of the first sample in samples.md, the last, and some evenly between."""
    kept: list[list[Any]] = []
    newest: list[Any] | None = None
    number, stride = 0, 1
    for line in iter_lines(path):
        heading = HEADING.fullmatch(line)
        if heading and (newest is None or int(heading[1]) > newest[0]):  # else it belongs to the text of a sample
            newest = [int(heading[1]), b""]
            if number % stride == 0:
                kept.append(newest)
            if len(kept) == 16 * SAMPLES:
                kept, stride = kept[::2], 2 * stride
            number += 1
        elif newest is not None and len(newest[1]) < 4 * SAMPLE_CHARACTERS:
            newest[1] += line
    if newest is not None and kept[-1] is not newest:
        kept.append(newest)
    count = min(SAMPLES, len(kept))
    chosen = [kept[index * (len(kept) - 1) // max(count - 1, 1)] for index in range(count)]
    return [(step, _unfenced(text.decode(errors="replace"))) for step, text in chosen]


def _unfenced(text: str) -> str:
    text = text.strip("\n")
    return text.removeprefix("```\n").removesuffix("\n```") if text.startswith("```\n") else text


def changed_options(options: dict[str, Any]) -> list[tuple[str, str, str]]:
    """(name, value, default) of the options that do not have their default; "" for an option that this version lacks."""
    defaults = default_options()
    differing = [name for name, value in options.items() if name not in defaults or value != defaults[name]]
    return [(name, spell(options[name]), spell(defaults[name]) if name in defaults else "") for name in differing]


def spell(value: Any) -> str:
    """An option as one writes it on the command line."""
    return value if isinstance(value, str) and value else json.dumps(value, ensure_ascii=False, default=str)


def folder_bytes(folder: Path) -> int:
    total = 0
    with contextlib.suppress(OSError):  # a run that is going on may be removing this checkpoint
        for path in folder.rglob("*"):
            total += path.stat().st_size if path.is_file() else 0
    return total


# ---- How to go on


LAUNCH_FILES = {"MULTI_CPU": "cpu_2_processes", "MULTI_GPU": "multi_gpu", "FSDP": "fsdp2"}
SINGLE = {"cpu": "cpu", "cuda": "single_gpu", "mps": "mps"}


def commands(run: RunFolder) -> list[tuple[str, str]]:
    """(what for, a line for a shell): to go on from the newest checkpoint; to export and to evaluate the best one."""
    folder = str(run.path)
    launch = run.launches[-1] if run.launches else {}
    launched, processes = launch.get("command"), launch.get("num_processes")
    script = launched[0] if isinstance(launched, list) and launched else "train.py"
    kind, device = launch.get("distributed_type"), str(launch.get("device")).partition(":")[0]
    file = SINGLE.get(device) if kind == "NO" else LAUNCH_FILES.get(str(kind))
    words = ["accelerate", "launch"]
    words += ["--config_file", f"accelerate_configs/{file}.yaml"] if file else []
    words += ["--num_processes", processes] if processes not in (None, 1) else []
    words += ["--mixed_precision", launch["mixed_precision"]] if launch.get("mixed_precision") else []
    words += [script, "--config", f"{folder}/config.yaml", "--checkpoint.resume", "auto"]
    if run.options["output"] != folder:
        words += ["--output", folder]
    lines = [("continue", words)]
    if run.checkpoints:
        lines.append(("export", ["python", "export.py", "--checkpoint", folder, "--output", f"exports/{run.name}"]))
        lines.append(("evaluate", ["python", "evaluate.py", "--model", folder]))
    return [(what, shlex.join(map(str, words))) for what, words in lines]
