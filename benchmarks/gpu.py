"""Measure on one GPU, in at most 25 minutes, what the documentation states about GPUs.

    python benchmarks/gpu.py --output gpu.jsonl     # needs data/demo: python prepare_data.py
    python benchmarks/gpu.py --tiny                 # the same parts with tiny sizes, also on a CPU: do they run?

Each part is its own process with a time limit (none with --tiny). Its figures go to --output before the next part
begins, and after an interruption the same command continues; remove the file to begin again. A part that this machine
or this version cannot run is skipped, and the table says why. Prints a table and one JSON object.

All contestants train a GPT-2 of one shape in bf16, unless the name says otherwise: 124m on 32 x 1024 positions, 1b with
131,072 entries on 8 x 2048. `packed` rows hold many documents, which are kept apart; `one` rows hold a single text.
MFU counts the products of the model (training/dry_run.py), whoever trains it. `syncs` are the waits for the device in
one step, `idle` is the share of two profiled steps in which the device computes nothing.
"""

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args, get_type_hints

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # `utils` is not installed
from benchmarks import train as race
from benchmarks.common import ONE_PROCESS, ROOT, STEPS_ONLY, TRAIN, add_dataset, build_parser, environment, flags
from utils.config import ModelConfig

race.SHAPES |= {"124m": race.Shape(768, 12, 12, 50304, 32, 1024), "1b": race.Shape(2048, 16, 16, 131072, 8, 2048)}
TINY = {name: race.Shape(32, 2, 2, 8192, 2, 64) for name in ("124m", "1b")}
WARM_UP, STEPS, PROFILED = 5, 20, 2
TINY_STEPS = (2, 2)
REGIONAL = {"ACCELERATE_DYNAMO_BACKEND": "INDUCTOR", "ACCELERATE_DYNAMO_USE_REGIONAL_COMPILATION": "true"}
WHOLE = {"ACCELERATE_DYNAMO_BACKEND": "INDUCTOR"}
LOGITS = (1 << 24, 1 << 26, 1 << 28)


@dataclass
class Part:
    """One line of the table: `contestant` is a name in benchmarks/train.py's CONTESTANTS, or one of ours below."""

    contestant: str
    shape: str = "124m"
    limit: int = 60  # seconds
    launch: dict[str, str] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)
    precision: str = "bf16"
    cuda: bool = False  # runs on CUDA only


VARLEN = {"model.attention": "varlen"}
PARTS = {
    "124m-packed-eager": Part("documents"),
    "124m-packed-regional": Part("documents", launch=REGIONAL, limit=90),
    "124m-packed-varlen": Part("documents", launch=REGIONAL, options=VARLEN, limit=90),
    "124m-one-eager": Part("plainloop"),
    "124m-one-regional": Part("plainloop", launch=REGIONAL, limit=90),
    "124m-one-whole": Part("plainloop", launch=WHOLE, limit=120),
    "124m-no_trainer": Part("no_trainer-bf16"),
    "124m-trainer": Part("trainer-bf16"),
    "124m-nanogpt": Part("nanogpt-bf16", limit=90),
    "1b-packed-eager": Part("documents", "1b", 75),
    "1b-packed-regional": Part("documents", "1b", 90, REGIONAL),
    "1b-packed-varlen": Part("documents", "1b", 90, REGIONAL, VARLEN),
    "1b-trainer": Part("trainer-bf16", "1b", 75),
    "124m-one-fp16": Part("plainloop", precision="fp16", cuda=True),
    "124m-one-fp8": Part("plainloop", precision="fp8", launch=REGIONAL),
    "124m-one-muon": Part("plainloop", options={"optimizer.name": "muon"}),
    "124m-head": Part("head"),
    "kill-and-resume": Part("resume", limit=120),
    "fsdp2-save-and-resume": Part("fsdp2", limit=150, cuda=True),
}  # 25 minutes if each part reached its limit; fp8 is skipped


def why_not(part: Part) -> str | None:
    """Why this version or this machine cannot run `part`; None if it can."""
    import torch

    if part.options.get("model.attention") not in (None, *get_args(get_type_hints(ModelConfig)["attention"])):
        return "train.py has no model.attention varlen"
    if part.precision == "fp8":
        return "GPT-2's Conv1D is not converted to fp8"
    if part.cuda and not torch.cuda.is_available():
        return "needs CUDA"
    if part.options.get("model.attention") == "varlen" and not torch.cuda.is_available():
        return "varlen needs CUDA"
    return None


# ---- In a contestant's process


class Meter:
    """Takes the place of `race.Pace`: times the steps after a warm-up, on CUDA profiles two more, reports and ends."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.reports = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)  # redirect what a contestant prints
        self.arguments, self.count, self.syncs = arguments, 0, 0
        self.warm_up, self.steps = TINY_STEPS if arguments.tiny else (WARM_UP, STEPS)
        self.started = time.perf_counter()
        self.figures: dict[str, float] = {}

    def step_done(self) -> None:
        import torch

        self.count += 1
        has_cuda, now = torch.cuda.is_available(), self.count - self.warm_up - self.steps
        if self.count == 1:
            self.synchronize()
            self.figures["first_step_seconds"] = time.perf_counter() - self.started
        if self.count == self.warm_up:
            self.synchronize()
            self.started = time.perf_counter()
        if now == 0:
            self.synchronize()
            self.figures |= self.speed((time.perf_counter() - self.started) / self.steps)
            if has_cuda:
                warnings.simplefilter("always")
                warnings.showwarning = self.count_sync  # type: ignore[assignment]
                torch.cuda.set_sync_debug_mode("warn")
        if now == 1 and has_cuda:
            torch.cuda.set_sync_debug_mode("default")
            self.figures["syncs"] = self.syncs
            activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
            self.profiler = torch.profiler.profile(activities=activities)
            self.synchronize()
            self.profiler.start()
            self.started = time.perf_counter()
        if not has_cuda and now == 0:
            self.report()
        if has_cuda and now == 1 + PROFILED:
            self.synchronize()
            seconds = time.perf_counter() - self.started
            self.profiler.stop()
            events = [event for event in self.profiler.events() if event.device_type == torch.autograd.DeviceType.CUDA]
            self.figures["idle"] = 1 - busy_seconds([(e.time_range.start, e.time_range.end) for e in events]) / seconds
            self.report()

    def speed(self, seconds: float) -> dict[str, float]:
        import torch

        from training.dry_run import count_flops
        from training.hardware import peak_flops_per_second, peak_memory_bytes
        from utils.objectives import Objective

        shape, device = (
            race.SHAPES[self.arguments.shape],
            torch.accelerator.current_accelerator() or torch.device("cpu"),
        )
        with torch.device("meta"):
            model = race.peer_model(self.arguments)
        sizes = dict.fromkeys(("input_ids", "targets"), (shape.rows, shape.length))
        peak = peak_flops_per_second(device, self.arguments.precision)
        return {
            "step_seconds": seconds, "tokens_per_second": shape.rows * shape.length / seconds,
            "mfu": count_flops(Objective(model), sizes) / seconds / peak, "peak_memory_bytes": peak_memory_bytes(device),
        }  # fmt: skip

    def count_sync(self, message: Any, *_: Any, **__: Any) -> None:
        self.syncs += "synchronizing CUDA operation" in str(message)

    def synchronize(self) -> None:
        import torch

        if torch.accelerator.is_available():
            torch.accelerator.synchronize()

    def report(self) -> None:
        print(json.dumps(self.figures), file=self.reports, flush=True)
        os._exit(0)


def busy_seconds(spans: list[tuple[float, float]]) -> float:
    """How long at least one of `spans` (begin, end in microseconds) lasts."""
    busy, reached = 0.0, 0.0
    for start, end in sorted(spans):
        busy += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return busy / 1e6


def nanogpt(name: str, meter: Meter, arguments: argparse.Namespace) -> None:
    """A step like nanoGPT's: the whole model compiled, all logits, fused AdamW, gradients clipped."""
    import torch

    device = torch.accelerator.current_accelerator() or torch.device("cpu")
    torch.set_float32_matmul_precision("high")
    model = race.peer_model(arguments).to(device).train()
    compiled = torch.compile(model, backend="eager" if arguments.tiny else "inductor")
    optimizer = torch.optim.AdamW(model.parameters(), lr=6e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    for batch in race.batches_of(arguments):
        with torch.autocast(device.type, torch.bfloat16):
            loss = compiled(**{key: value.to(device, non_blocking=True) for key, value in batch.items()}).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        meter.step_done()


def head(name: str, meter: Meter, arguments: argparse.Namespace) -> None:
    """Seconds of the head's loss with gradients, by the number of logits at once."""
    import torch

    from utils.kernels import head_loss

    shape, device = race.SHAPES[arguments.shape], torch.accelerator.current_accelerator() or torch.device("cpu")
    layer = torch.nn.Linear(shape.width, shape.vocabulary, bias=False, device=device)
    hidden = torch.randn(shape.rows * shape.length, shape.width, device=device, requires_grad=True)
    targets = torch.randint(shape.vocabulary, (len(hidden),), device=device)
    for logits in LOGITS:
        # The limits of all devices.
        head_loss.LOGITS_AT_ONCE = head_loss.ROWS_AT_ONCE = head_loss.LOGITS_ON_CUDA = logits
        seconds = []
        for _ in range(sum(TINY_STEPS) if arguments.tiny else WARM_UP):
            meter.synchronize()
            started = time.perf_counter()
            with torch.autocast(device.type, torch.bfloat16):
                loss = head_loss.head_loss(hidden, layer, targets)
            loss.backward()
            meter.synchronize()
            seconds.append(time.perf_counter() - started)
        meter.figures[f"seconds_{logits}_logits"] = min(seconds)
    meter.report()


def resume(name: str, meter: Meter, arguments: argparse.Namespace) -> None:
    """Train, kill by SIGKILL once there is a checkpoint, continue to the end."""
    output = arguments.folder / name
    options = STEPS_ONLY | {
        "data.dataset": arguments.dataset, "output": output, "schedule.max_steps": 40, "checkpoint.every_steps": 5,
        "model.size": "tiny", "data.sequence_length": 64, "schedule.warmup_steps": 1,
    }  # fmt: skip
    command = [*ONE_PROCESS, TRAIN]
    if name == "fsdp2":
        file = str(ROOT / "accelerate_configs" / "fsdp2.yaml")
        launcher = ["-m", "accelerate.commands.launch", "--config_file", file, "--num_processes", "1"]
        command = [*ONE_PROCESS, *launcher, "--main_process_port", "0", TRAIN]
    started = time.perf_counter()
    killed = subprocess.Popen([*command, *flags(options)], env=environment(), start_new_session=True)
    while killed.poll() is None and not (output / "checkpoints" / "last").exists():
        time.sleep(0.02)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(killed.pid, signal.SIGKILL)
    killed.wait()
    subprocess.run([*command, *flags(options), "--checkpoint.resume", "auto"], env=environment(), check=True)
    summary = json.loads((output / "summary.json").read_text(encoding="utf-8"))
    meter.figures = {"step": summary["optimizer_step"], "seconds": time.perf_counter() - started}
    meter.report()


OURS = {"nanogpt": nanogpt, "head": head, "resume": resume, "fsdp2": resume}


# ---- The plan


def measure(name: str, part: Part, arguments: argparse.Namespace) -> dict[str, Any]:
    """The figures of `part`, or why there are none."""
    if reason := why_not(part):
        return {"skipped": reason}
    launch = {"ACCELERATE_MIXED_PRECISION": part.precision} | part.launch
    if arguments.tiny and "ACCELERATE_DYNAMO_BACKEND" in launch:
        launch["ACCELERATE_DYNAMO_BACKEND"] = "EAGER"  # inductor compiles for half a minute
    own = ["--child", name, "--folder", str(arguments.folder)]
    log = (arguments.folder / "log").open("w+")
    process = subprocess.Popen(
        [*ONE_PROCESS, __file__, *own, *sys.argv[1:]], stdout=subprocess.PIPE, stderr=log, text=True,
        env=environment(**launch), start_new_session=True,
    )  # fmt: skip
    try:
        output, _ = process.communicate(timeout=None if arguments.tiny else part.limit)
    except subprocess.TimeoutExpired:
        return {"failed": f"not done in {part.limit} s"}
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # with its compile workers
    if process.returncode or not output:
        log.seek(0)
        return {"failed": (log.read().strip().splitlines() or [f"exit code {process.returncode}"])[-1][:300]}
    return json.loads(output)


def run_child(arguments: argparse.Namespace) -> None:
    part = PARTS[arguments.child]
    arguments.shape, arguments.precision = part.shape, part.precision
    arguments.options = {"output": arguments.folder / arguments.child.replace(" ", "_")} | part.options
    contestant = part.contestant.partition("-")[0]
    (OURS | race.CONTESTANTS)[contestant](part.contestant, Meter(arguments), arguments)


def main() -> None:
    parser = build_parser(__doc__)
    parser.add_argument(
        "--output", type=Path, help="file for the figures, one JSON object a line; default: none is kept"
    )
    parser.add_argument("--tiny", action="store_true", help="tiny sizes and few steps: try the parts, measure nothing")
    parser.add_argument("--parts", nargs="+", choices=PARTS, metavar="NAME", default=list(PARTS), help="default: all")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.set_defaults(dropout=0.0, activation_checkpointing=False, compile=False)
    add_dataset(parser)
    arguments = parser.parse_args()
    if arguments.tiny:
        race.SHAPES |= TINY
    if arguments.child:
        return run_child(arguments)
    results: dict[str, dict[str, Any]] = {}
    if arguments.output and arguments.output.exists():
        whole = arguments.output.read_text(encoding="utf-8").rpartition("\n")[0]  # an interrupted line has no end
        arguments.output.write_text(f"{whole}\n" if whole else "", encoding="utf-8")
        results = {line.pop("part"): line for line in map(json.loads, whole.splitlines())}
        results = {name: figures for name, figures in results.items() if "failed" not in figures}
    print(f"{'':<24}{'tokens/s':>11}{'MFU':>8}{'peak GB':>9}{'first s':>9}{'syncs':>7}{'idle':>7}")
    with tempfile.TemporaryDirectory() as folder:
        arguments.folder = Path(folder)
        race.write_datasets(arguments.dataset, arguments.folder)
        for name in arguments.parts:
            if name not in results:
                results[name] = measure(name, PARTS[name], arguments)
                if arguments.output:
                    with arguments.output.open("a", encoding="utf-8") as file:
                        file.write(json.dumps({"part": name} | results[name]) + "\n")
            print(f"{name:<24}{spell(results[name])}", flush=True)
    trainer, best = (results.get(name, {}).get("tokens_per_second") for name in ("124m-trainer", "124m-one-regional"))
    ratio = best / trainer if trainer and best else None
    print(json.dumps({"tiny": arguments.tiny, "ratio_trainer": ratio, "parts": results}))


def spell(figures: dict[str, Any]) -> str:
    """The columns of the table; for other figures their names and values."""
    if "tokens_per_second" not in figures:
        parts = (
            f"{name} {value:.4g}" if isinstance(value, int | float) else f"{name}: {value}"
            for name, value in figures.items()
        )
        return "  " + ", ".join(parts)
    syncs, idle = figures.get("syncs", "-"), figures.get("idle")
    return (
        f"{figures['tokens_per_second']:>11,.0f}{figures['mfu']:>8.1%}{figures['peak_memory_bytes'] / 1e9:>9.1f}"
        f"{figures['first_step_seconds']:>9.1f}{syncs:>7}{'-' if idle is None else f'{idle:.0%}':>7}"
    )


if __name__ == "__main__":
    main()
