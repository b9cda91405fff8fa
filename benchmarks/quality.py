"""Measure time to quality: seconds of training until the sample's held-out text costs 2.4 bits per byte.

    python benchmarks/quality.py           # needs data/demo: python prepare_data.py; about 10 minutes

All contestants use the demo's tokenizer and model size. train.py runs Muon with a short warm-up. transformers'
Trainer runs AdamW with its defaults. A loop like nanoGPT's runs AdamW with betas 0.9 and 0.95 on random rows of one
long stream. The comparison therefore includes the optimizer. Each contestant has the best of the learning rates and
numbers of steps that were tried (TUNED); try others with --contestants NAME --learning_rates ... --steps N. One
function scores all of them on the same rows. Seconds are those of the steps; `with start` adds everything that is
neither a step nor an evaluation: imports, building, saves. Writes runs/quality.png and ends with one JSON object.
"""

import argparse
import contextlib
import json
import math
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # `utils` is not installed
from benchmarks import common
from benchmarks.common import (
    ONE_PROCESS,
    ROOT,
    add_dataset,
    amount,
    build_parser,
    count,
    file_to_write,
    flags,
    read_metrics,
    save_plot,
)

LENGTH = 256
# Learning rate and steps of the schedule; README.md lists what else was tried.
TUNED = {"plainloop": (1e-2, 170), "trainer": (1e-3, 600), "nanogpt": (1e-3, 600)}
PLAINLOOP: dict[str, Any] = {
    "data.sequence_length": LENGTH, "batch.global_batch_size": 8, "optimizer.name": "muon", "schedule.warmup_steps": 10,
    "evaluation.every_steps": 10, "checkpoint.every_steps": 100_000, "tracking.log_every_steps": 10,
    "tracking.sample_every_steps": 0, "tracking.trackers": "[]",
}  # fmt: skip
EVERY = 20  # the peers' steps between evaluations; they also evaluate after the last step
Curve = list[tuple[float, float]]  # (seconds, bits per byte)
evaluating: list[float] = []  # seconds of each evaluation in this process


def plainloop(rate: float, steps: int, dataset: Path, folder: Path) -> Curve:
    options = PLAINLOOP | {
        "data.dataset": dataset, "output": folder / "run", "optimizer.learning_rate": rate, "schedule.max_steps": steps
    }  # fmt: skip
    import train as script
    from utils.cli import parse_config
    from utils.config import TrainConfig

    evaluate = script.evaluate

    def evaluate_and_count(*everything: Any) -> Any:
        started = time.perf_counter()
        found = evaluate(*everything)
        evaluating.append(time.perf_counter() - started)
        return found

    script.evaluate = evaluate_and_count
    sys.argv = ["train.py", *flags(options)]
    with contextlib.redirect_stdout(sys.stderr):
        script.main(parse_config(TrainConfig, ""))
    seconds, curve = 0.0, []
    for record in read_metrics(folder / "run"):
        seconds = record.get("perf/train_seconds", seconds)
        if "eval/bits_per_byte" in record:
            curve.append((seconds, record["eval/bits_per_byte"]))
    return curve


class Scorer:
    """Scores bits per byte of the validation text with train.py's evaluate(), and keeps the seconds outside of it."""

    def __init__(self, dataset: Path, steps: int) -> None:
        from accelerate import Accelerator

        from utils.data.loaders import build_evaluation_loader, build_layout
        from utils.data.token_dataset import load_manifest, open_split
        from utils.objectives.causal import build_collator
        from utils.pretrained import read_tokenizer

        self.tokenizer, self.steps = read_tokenizer(dataset / "tokenizer"), steps
        rows = build_layout(
            open_split(dataset, "validation"), "packed", LENGTH, pad_token_id=0, vocab_size=len(self.tokenizer)
        )
        from utils.config import ObjectiveConfig

        self.accelerator = Accelerator(cpu=True)
        self.loader = build_evaluation_loader(rows, build_collator(ObjectiveConfig(), self.tokenizer), 32)
        self.bytes = load_manifest(dataset)["splits"]["validation"]["bytes"]
        self.curve: Curve = []
        self.started = time.perf_counter()

    def score(self, model: Any, step: int) -> None:
        if step % EVERY and step != self.steps:
            return
        from utils.evaluation import evaluate
        from utils.objectives import Objective

        now = time.perf_counter()
        bits = evaluate(self.accelerator, Objective(model), self.loader).bits_per_byte(self.bytes)
        self.curve.append((now - self.started - sum(evaluating), bits))
        print(f"{self.curve[-1][0]:.1f} s: {bits:.3f}", file=sys.stderr, flush=True)
        evaluating.append(time.perf_counter() - now)


def build(scorer: Scorer) -> Any:
    """transformers' Llama with the demo's sizes and its own initialization."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(1234)
    return LlamaForCausalLM(LlamaConfig(
        vocab_size=len(scorer.tokenizer), hidden_size=192, num_hidden_layers=4, num_attention_heads=4, intermediate_size=512,
        max_position_embeddings=LENGTH, tie_word_embeddings=True, bos_token_id=0, eos_token_id=0, pad_token_id=0,
    ))  # fmt: skip


def stream(dataset: Path) -> Any:
    from utils.data.token_dataset import open_split

    tokens = open_split(dataset, "train")
    return tokens.read(0, tokens.num_tokens)


def trainer(rate: float, steps: int, dataset: Path, folder: Path) -> Curve:
    """Trainer on blocks of the stream, as run_clm makes them, with its defaults: linear decay, no warm-up."""
    import datasets
    from transformers import Trainer, TrainerCallback, TrainingArguments

    scorer = Scorer(dataset, steps)

    class Score(TrainerCallback):
        def on_train_begin(self, *_: Any, **__: Any) -> None:
            scorer.started = time.perf_counter()

        def on_step_end(self, arguments: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
            scorer.score(model, state.global_step)

    tokens = stream(dataset)
    rows = tokens[: len(tokens) // LENGTH * LENGTH].reshape(-1, LENGTH).tolist()
    options = TrainingArguments(
        output_dir=str(folder), per_device_train_batch_size=8, max_steps=steps, learning_rate=rate, logging_steps=20,
        save_strategy="no", report_to=[], use_cpu=True, disable_tqdm=True,
    )  # fmt: skip
    data = datasets.Dataset.from_dict({"input_ids": rows, "labels": rows})
    Trainer(build(scorer), options, train_dataset=data, callbacks=[Score()]).train()
    return scorer.curve


def nanogpt(rate: float, steps: int, dataset: Path, folder: Path) -> Curve:
    """Random rows; warm-up of 100 steps or a tenth, cosine to a tenth; decay 0.1 on matrices, clipping at 1."""
    import torch

    scorer = Scorer(dataset, steps)
    model = build(scorer).train()
    tokens = torch.from_numpy(stream(dataset))
    groups = [
        {"params": [value for value in model.parameters() if value.dim() >= 2], "weight_decay": 0.1},
        {"params": [value for value in model.parameters() if value.dim() < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.95))
    warmup = max(1, min(100, steps // 10))
    scorer.started = time.perf_counter()
    for step in range(steps):
        progress = max(0.0, (step - warmup) / (steps - warmup))
        factor = min(1.0, (step + 1) / warmup) * (0.1 + 0.45 * (1 + math.cos(math.pi * progress)))
        for group in optimizer.param_groups:
            group["lr"] = rate * factor
        starts = torch.randint(len(tokens) - LENGTH, (8,))
        ids = torch.stack([tokens[start : start + LENGTH] for start in starts])
        model(input_ids=ids, labels=ids).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        scorer.score(model, step + 1)
    return scorer.curve


CONTESTANTS: dict[str, Callable[[float, int, Path, Path], Curve]] = {
    "plainloop": plainloop, "trainer": trainer, "nanogpt": nanogpt
}  # fmt: skip


def reached(curve: Curve, bits: float) -> float | None:
    """Seconds until `bits` per byte, interpolated between evaluations; None if never reached."""
    before: tuple[float, float] | None = None
    for seconds, value in curve:
        if value <= bits:
            if before is None:
                return seconds
            return before[0] + (seconds - before[0]) * (before[1] - bits) / (before[1] - value)
        before = (seconds, value)
    return None


def run(name: str, rate: float, steps: int, dataset: Path) -> tuple[Curve, float]:
    """Run a contestant in its own process; returns the curve, and the seconds outside steps and evaluations."""
    options = {"child": name, "learning_rates": rate, "steps": steps, "dataset": dataset}
    started = time.perf_counter()
    printed = common.run(*ONE_PROCESS, __file__, *flags(options))
    result = json.loads(printed.splitlines()[-1])
    curve = [(float(seconds), float(bits)) for seconds, bits in result["curve"]]
    return curve, time.perf_counter() - started - result["evaluating"] - curve[-1][0]


def plot(curves: dict[str, Curve], bits: float, path: Path) -> None:
    axes = (figure := Figure(figsize=(8, 4.5), layout="constrained")).subplots()
    for name, curve in curves.items():
        axes.plot([point[0] for point in curve], [point[1] for point in curve], "o-", markersize=3, label=name)
    axes.axhline(bits, color="grey", linewidth=1)
    axes.set(xlabel="seconds of training", ylabel="held-out text, bits per byte")
    save_plot(figure, path)


def main() -> None:
    parser = build_parser(__doc__)
    parser.add_argument("--contestants", nargs="+", choices=CONTESTANTS, default=list(CONTESTANTS), metavar="NAME")
    parser.add_argument("--learning_rates", type=amount, nargs="+", help="try each of these (default: the best known)")
    parser.add_argument("--steps", type=count, help="steps of each contestant (default: the best known)")
    parser.add_argument("--bits", type=amount, default=2.4)
    add_dataset(parser)
    parser.add_argument("--plot", type=file_to_write, default=ROOT / "runs" / "quality.png")
    parser.add_argument("--child", choices=CONTESTANTS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        with tempfile.TemporaryDirectory() as folder:
            contestant, rate = CONTESTANTS[arguments.child], arguments.learning_rates[0]
            curve = contestant(rate, arguments.steps, arguments.dataset, Path(folder))
        return print(json.dumps({"curve": curve, "evaluating": sum(evaluating)}))
    curves: dict[str, Curve] = {}
    results: dict[str, Any] = {}
    for name in arguments.contestants:
        best_rate, best_steps = TUNED[name]
        steps = arguments.steps or best_steps
        tried = {}
        for rate in arguments.learning_rates or [best_rate]:
            curve, outside = run(name, rate, steps, arguments.dataset)
            tried[rate] = reached(curve, arguments.bits)
            print(
                f"{name:<10} learning rate {rate:g}: {tried[rate]} s, best {min(curve, key=lambda p: p[1])}", flush=True
            )
            if tried[rate] is not None and tried[rate] == min(value for value in tried.values() if value is not None):
                curves[name] = curve
                results[name] = {
                    "learning_rate": rate,
                    "steps": steps,
                    "seconds": tried[rate],
                    "with_start": tried[rate] + outside,
                }
    if curves:
        plot(curves, arguments.bits, arguments.plot)
    for name in results:
        results[name]["ratio"] = results[name]["seconds"] / min(each["seconds"] for each in results.values())
        print(f"{name:<10}{results[name]['seconds']:>10.1f} s, with start {results[name]['with_start']:.1f} s"
              f"{results[name]['ratio']:>8.2f}")  # fmt: skip
    print(json.dumps({"bits_per_byte": arguments.bits, **results}))


if __name__ == "__main__":
    main()
