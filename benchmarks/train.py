"""Compare a training step of train.py with three common loops, and with the machine's matrix products alone.

    python benchmarks/train.py                                      # needs data/demo: python prepare_data.py
    python benchmarks/train.py --shape lesson --precision bf16 --compile
    python benchmarks/train.py --quick                              # a first look, in about a minute

All contestants train a GPT-2 of one shape on the same rows of the sample's tokens. Each is its own process, which
makes steps on its turn and sleeps otherwise; each round has another order. The peers run as their examples do, in
fp32, and also in bf16 with --precision bf16. `plainloop` is train.py as users run it, on rows of one long text, like
the peers. `documents` trains on rows of many documents, which it keeps apart. `step` is the step without train.py
around it. `limit` computes only the matrix products of a step, and of causal attention only the unmasked half. Prints
a table and one JSON object.
"""

import argparse
import contextlib
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # `utils` is not installed
from benchmarks.common import ONE_PROCESS, add_dataset, build_parser, count, environment


@dataclass
class Shape:
    """Sizes of the model and of a batch (B, T)."""

    width: int
    layers: int
    heads: int
    vocabulary: int
    rows: int
    length: int = 512


SHAPES = {"small": Shape(256, 6, 4, 8192, 8), "lesson": Shape(768, 12, 12, 30522, 4)}
WARM_UP = 3
QUICK = ("plainloop", "no_trainer", "limit")
PEERS = ("no_trainer", "trainer", "bare")


class Pace:
    """In a contestant: reports the time of each turn, and waits for the next one."""

    def __init__(self) -> None:
        self.reports = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)  # redirect what a contestant prints
        self.left = 1
        self.begin()

    def begin(self) -> None:
        self.wall, self.cpu = time.perf_counter(), time.process_time()

    def step_done(self) -> None:
        import torch

        self.left -= 1
        if self.left:
            return
        if torch.accelerator.is_available():
            torch.accelerator.synchronize()
        wall, cpu = time.perf_counter() - self.wall, time.process_time() - self.cpu
        device = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0
        peak = device or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        print(json.dumps({"wall": wall, "cpu": cpu, "peak": peak}), file=self.reports, flush=True)
        self.left = int(sys.stdin.readline() or 0)
        if not self.left:
            os._exit(0)
        self.begin()


class Profile:
    """Replaces `Pace`: after three steps, profiles two, prints where the time went, and ends."""

    def __init__(self, vocabulary: int) -> None:
        from torch.profiler import ProfilerActivity, profile

        self.vocabulary, self.steps = vocabulary, 0
        self.profiler = profile(activities=[ProfilerActivity.CPU], record_shapes=True)

    def part_of(self, event: Any) -> str:
        name = event.key.removeprefix("aten::")
        if any(self.vocabulary in shape for shape in event.input_shapes if isinstance(shape, list)):
            return "optimizer" if "adamw" in name else "head"
        if name in ("bmm", "baddbmm", "_softmax", "_softmax_backward_data"):
            return "attention"
        if name in ("mm", "addmm"):
            return "linear maps"
        return "optimizer" if "adamw" in name or "_foreach" in name else "rest"

    def step_done(self) -> None:
        self.steps += 1
        if self.steps == WARM_UP:
            self.profiler.start()
        if self.steps < WARM_UP + 2:
            return
        self.profiler.stop()
        times: dict[str, float] = {}
        for event in self.profiler.key_averages(group_by_input_shape=True):
            part = self.part_of(event)
            times[part] = times.get(part, 0.0) + event.self_cpu_time_total
        shares = {part: seconds / sum(times.values()) for part, seconds in sorted(times.items(), key=lambda x: -x[1])}
        for part, share in shares.items():
            print(f"{part:<14}{share:>8.1%}")
        print(json.dumps({"profile": shares}))
        sys.exit()


# ---- The contestants. Each trains endlessly and calls `step_done` after every optimizer step.


def options_of(name: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """train.py's options."""
    shape = SHAPES[arguments.shape]
    return {
        "data.dataset": arguments.folder / ("documents" if name == "documents" else "one_text"),
        "output": arguments.folder / f"run_{name}", "model.architecture": "gpt2", "model.hidden_size": shape.width,
        "model.num_hidden_layers": shape.layers, "model.num_attention_heads": shape.heads,
        "model.intermediate_size": 4 * shape.width, "model.max_position_embeddings": shape.length,
        "model.vocabulary_multiple": shape.vocabulary, "model.dropout": arguments.dropout,
        "data.sequence_length": shape.length, "batch.global_batch_size": shape.rows, "schedule.max_steps": 1_000_000,
        "evaluation.every_steps": 1_000_000, "checkpoint.every_steps": 1_000_000, "tracking.sample_every_steps": 0,
        "guards.hang_minutes": 10_000.0, "model.activation_checkpointing": arguments.activation_checkpointing,
        **arguments.options,
    }  # fmt: skip


def plainloop(name: str, pace: Pace, arguments: argparse.Namespace) -> None:
    import train as script
    from training.monitoring.tracking import RunTracker
    from utils.cli import parse_config
    from utils.config import TrainConfig

    advance = RunTracker.advance

    def advance_and_wait(tracker: Any) -> None:
        advance(tracker)
        pace.step_done()

    RunTracker.advance = advance_and_wait  # type: ignore[method-assign]
    sys.argv = ["train.py", *(f"--{key}={value}" for key, value in options_of(name, arguments).items())]
    script.main(parse_config(TrainConfig, ""))


def step(name: str, pace: Pace, arguments: argparse.Namespace) -> None:
    """Train Plainloop's model, loss and optimizer in a bare loop."""
    import torch

    from training.hardware import resolve_matmul_precision
    from training.optimization.optimizers import build_optimizer
    from utils.cli import parse_config
    from utils.config import TrainConfig
    from utils.model.build import build_model
    from utils.objectives import build_objective
    from utils.pretrained import read_tokenizer

    sys.argv = ["train.py", *(f"--{key}={value}" for key, value in options_of(name, arguments).items())]
    config = parse_config(TrainConfig, "")
    device = torch.accelerator.current_accelerator() or torch.device("cpu")
    torch.set_float32_matmul_precision(resolve_matmul_precision(config.matmul_precision, device))
    model = build_model(config.model, read_tokenizer(arguments.folder / "one_text" / "tokenizer")).to(device)
    objective = build_objective(model, config.objective, config.model.attention, config.kernels, device)
    if arguments.compile:
        objective = torch.compile(objective)
    optimizer = build_optimizer(model, config.optimizer)
    positions = torch.arange(SHAPES[arguments.shape].length, device=device).expand(SHAPES[arguments.shape].rows, -1)
    for batch in batches_of(arguments, with_targets=True):
        with torch.autocast(device.type, torch.bfloat16, enabled=arguments.precision == "bf16"):
            loss = objective(**{key: value.to(device) for key, value in batch.items()}, position_ids=positions)
        (loss / batch["targets"].numel()).backward()
        torch.nn.utils.clip_grad_norm_(objective.parameters(), config.optimizer.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        pace.step_done()


def peer_model(arguments: argparse.Namespace) -> Any:
    from transformers import GPT2Config, GPT2LMHeadModel

    shape, drop = SHAPES[arguments.shape], arguments.dropout
    return GPT2LMHeadModel(GPT2Config(
        vocab_size=shape.vocabulary, n_embd=shape.width, n_layer=shape.layers, n_head=shape.heads,
        n_positions=shape.length, resid_pdrop=drop, embd_pdrop=drop, attn_pdrop=drop, bos_token_id=0, eos_token_id=0,
    ))  # fmt: skip


def rows_of(arguments: argparse.Namespace) -> Any:
    """All rows of the long text, (N, T) int64."""
    from utils.data.token_dataset import open_split

    length = SHAPES[arguments.shape].length
    tokens = open_split(arguments.folder / "one_text", "train")
    number = tokens.num_tokens // length
    return tokens.read(0, number * length).reshape(number, length)


def batches_of(arguments: argparse.Namespace, with_targets: bool = False) -> Any:
    """Endless batches of consecutive rows, in the form that the model or the objective takes."""
    import numpy as np
    import torch

    rows, size = rows_of(arguments), SHAPES[arguments.shape].rows
    start = 0
    while True:
        ids = torch.from_numpy(rows[np.arange(start, start + size) % len(rows)])
        start += size
        yield {"input_ids": ids, "targets": ids.roll(-1, 1)} if with_targets else {"input_ids": ids, "labels": ids}


def peer_dataset(arguments: argparse.Namespace) -> Any:
    """Rows in the form of run_clm's `group_texts`."""
    import datasets
    import numpy as np

    rows = rows_of(arguments)
    return datasets.Dataset.from_dict({"input_ids": rows, "attention_mask": np.ones_like(rows), "labels": rows})


def no_trainer(name: str, pace: Pace, arguments: argparse.Namespace) -> None:
    """The loop of transformers' run_clm_no_trainer example, with Accelerate."""
    import torch
    from accelerate import Accelerator
    from torch.utils.data import DataLoader
    from transformers import default_data_collator, get_scheduler

    accelerator = Accelerator(cpu=not torch.accelerator.is_available())
    model = peer_model(arguments)
    loader = DataLoader(
        peer_dataset(arguments), shuffle=True, collate_fn=default_data_collator, batch_size=SHAPES[arguments.shape].rows
    )
    no_decay = ("bias", "layer_norm.weight")
    decayed = [value for key, value in model.named_parameters() if not any(part in key for part in no_decay)]
    others = [value for key, value in model.named_parameters() if any(part in key for part in no_decay)]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}], lr=5e-5
    )
    scheduler = get_scheduler("linear", optimizer, num_warmup_steps=0, num_training_steps=1_000_000)
    model, optimizer, loader, scheduler = accelerator.prepare(model, optimizer, loader, scheduler)
    total_loss = torch.zeros((), device=accelerator.device)
    model.train()
    while True:
        for batch in loader:
            with accelerator.accumulate(model):
                loss = model(**batch).loss
                total_loss += loss.detach().float()
                accelerator.backward(loss)
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad()
            pace.step_done()


def trainer(name: str, pace: Pace, arguments: argparse.Namespace) -> None:
    import torch
    from transformers import Trainer, TrainerCallback, TrainingArguments

    class Wait(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            pace.step_done()

    options = TrainingArguments(
        output_dir=str(arguments.folder / name), per_device_train_batch_size=SHAPES[arguments.shape].rows,
        max_steps=1_000_000, logging_steps=20, save_strategy="no", report_to=[], bf16=name.endswith("bf16"),
        use_cpu=not torch.accelerator.is_available(), disable_tqdm=True,
    )  # fmt: skip
    Trainer(peer_model(arguments), options, train_dataset=peer_dataset(arguments), callbacks=[Wait()]).train()


def bare(name: str, pace: Pace, arguments: argparse.Namespace) -> None:
    """Only transformers' model and torch's optimizer."""
    import torch

    device = torch.accelerator.current_accelerator() or torch.device("cpu")
    model = peer_model(arguments).to(device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-5)
    for batch in batches_of(arguments):
        with torch.autocast(device.type, torch.bfloat16, enabled=name.endswith("bf16")):
            loss = model(**{key: value.to(device) for key, value in batch.items()}).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        pace.step_done()


def limit(name: str, pace: Pace, arguments: argparse.Namespace) -> None:
    """Only the matrix products of one step, forward and backward, with the model's shapes."""
    import torch

    from training.hardware import resolve_matmul_precision

    shape = SHAPES[arguments.shape]
    device = torch.accelerator.current_accelerator() or torch.device("cpu")
    torch.set_float32_matmul_precision(resolve_matmul_precision("auto", device))
    dtype = torch.bfloat16 if arguments.precision == "bf16" else torch.float32
    width, tokens, half = shape.width, shape.rows * shape.length, shape.length // 2

    def random(*sizes: int) -> torch.Tensor:
        return torch.randn(*sizes, device=device).to(dtype)

    # Each product with a preallocated result, so that only the products are timed.
    products: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []

    def add(left: torch.Tensor, right: torch.Tensor, times: int) -> None:
        products.extend(
            [(left, right, torch.empty(*left.shape[:-1], right.shape[-1], device=device, dtype=dtype))] * times
        )

    maps = {(width, 3 * width): shape.layers, (width, width): shape.layers, (width, 4 * width): shape.layers,
            (4 * width, width): shape.layers, (width, shape.vocabulary): 1}  # fmt: skip
    for (inner, outer), times in maps.items():
        inputs, weight, gradient = random(tokens, inner), random(inner, outer), random(tokens, outer)
        add(inputs, weight, times)
        add(gradient, weight.T, times)
        add(inputs.T, gradient, times)
    size = width // shape.heads
    query, key = (random(shape.rows * shape.heads, length, size) for length in (shape.length, half))
    scores = random(shape.rows * shape.heads, shape.length, half)
    add(query, key.transpose(1, 2), 2 * shape.layers)  # scores, and the gradient of the probabilities
    add(scores, key, 2 * shape.layers)  # the output, and the gradient of the queries
    add(scores.transpose(1, 2), query, 2 * shape.layers)  # the gradients of keys and values
    while True:
        for left, right, result in products:
            torch.matmul(left, right, out=result)
        pace.step_done()


CONTESTANTS = {
    "plainloop": plainloop, "documents": plainloop, "step": step, "no_trainer": no_trainer, "trainer": trainer,
    "bare": bare, "limit": limit,
}  # fmt: skip


# ---- The race.


class Contestant:
    """A process that makes steps on request."""

    def __init__(self, name: str, arguments: argparse.Namespace) -> None:
        self.name = name
        precision = arguments.precision if name.partition("-")[0] not in PEERS else name.partition("-")[2] or "no"
        launch = {"ACCELERATE_MIXED_PRECISION": precision}
        if arguments.compile and CONTESTANTS.get(name) is plainloop:
            launch["ACCELERATE_DYNAMO_BACKEND"] = "INDUCTOR"
        self.log = (arguments.folder / f"{name}.log").open("w+")
        started = time.perf_counter()
        self.process = subprocess.Popen(
            [*ONE_PROCESS, __file__, "--child", name, "--folder", str(arguments.folder), *sys.argv[1:]],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.log, text=True, env=environment(**launch),
        )  # fmt: skip
        self.peak = self.receive()["peak"]
        self.first_step_seconds = time.perf_counter() - started
        self.turns: list[dict[str, float]] = []

    def receive(self) -> dict[str, float]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            self.log.seek(0)
            code = self.process.wait()
            killed = f" (signal {-code}: too little memory? Name fewer --contestants)" if code < 0 else ""
            raise SystemExit(f"{self.name} failed{killed}:\n{self.log.read()[-3000:]}")
        return json.loads(line)

    def make(self, steps: int) -> dict[str, float]:
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # the missing report raises below
            self.process.stdin.write(f"{steps}\n")
            self.process.stdin.flush()
        report = self.receive()
        self.peak = report["peak"]
        return {"wall": report["wall"] / steps, "cpu": report["cpu"] / steps}


def write_datasets(source: Path, folder: Path) -> None:
    """Write the sample's tokens as they are, and as one long document."""
    import datasets

    shutil.copytree(source, folder / "documents")
    shutil.copytree(source, folder / "one_text")
    from utils.data.token_dataset import open_split

    tokens = open_split(source, "train")
    shutil.rmtree(folder / "one_text" / "train")
    features = datasets.load_from_disk(str(source / "train")).features
    joined = {"input_ids": [tokens.gather([0], [tokens.num_tokens]).tolist()]}
    datasets.Dataset.from_dict(joined, features=features).save_to_disk(str(folder / "one_text" / "train"))


def race(arguments: argparse.Namespace) -> None:
    shape = SHAPES[arguments.shape]
    names = list(arguments.contestants)
    if arguments.precision == "bf16":
        names += [f"{name}-bf16" for name in names if name in PEERS]
    contestants = [Contestant(name, arguments) for name in names]
    for contestant in contestants:
        contestant.make(1 if arguments.quick else WARM_UP - 1)
    for number in range(arguments.rounds):
        for contestant in contestants[number % len(contestants) :] + contestants[: number % len(contestants)]:
            contestant.turns.append(contestant.make(arguments.steps))
    for contestant in contestants:
        contestant.process.stdin.close()  # type: ignore[union-attr]
        contestant.process.wait()

    positions = shape.rows * shape.length
    medians = {
        each.name: {kind: statistics.median(turn[kind] for turn in each.turns) for kind in ("wall", "cpu")}
        for each in contestants
    }
    base = medians.get("no_trainer", medians[names[0]])
    print(f"\n{arguments.shape}: {shape.rows} × {shape.length}, {arguments.precision}, dropout {arguments.dropout}"
          f"{', compiled' if arguments.compile else ''}; {arguments.rounds} rounds of {arguments.steps} steps")  # fmt: skip
    print(f"{'':<18}{'tokens/s':>10}{'ratio':>8}{'by CPU':>8}{'s/step':>9}{'peak MB':>9}{'first step s':>14}")
    for each in contestants:
        wall, cpu = medians[each.name]["wall"], medians[each.name]["cpu"]
        print(f"{each.name:<18}{positions / wall:>10,.0f}{base['wall'] / wall:>8.2f}{base['cpu'] / cpu:>8.2f}{wall:>9.3f}"
              f"{each.peak / 1e6:>9,.0f}{each.first_step_seconds:>14.1f}")  # fmt: skip

    def ratio(over: str, under: str, kind: str = "wall") -> float | None:
        if over not in medians or under not in medians:
            return None
        return medians[over][kind] / medians[under][kind]

    ours = contestants[names.index("plainloop")] if "plainloop" in names else contestants[0]
    peers = {
        f"ratio_{peer.replace('-', '_')}{suffix}": ratio(peer, "plainloop", kind)
        for peer in names if peer.partition("-")[0] in PEERS for kind, suffix in (("wall", ""), ("cpu", "_cpu"))
    }  # fmt: skip
    print(json.dumps({
        "shape": arguments.shape, "precision": arguments.precision, "compile": arguments.compile,
        "dropout": arguments.dropout, "rounds": arguments.rounds,
        "tokens_per_second": positions / medians[ours.name]["wall"], **peers,
        "limit_share": ratio("limit", "plainloop"), "ratio_documents": ratio("documents", "plainloop"),
        "loop_overhead": None if (overhead := ratio("plainloop", "step")) is None else overhead - 1,
        "peak_memory_bytes": ours.peak, "first_step_seconds": ours.first_step_seconds,
        "peak_memory_bytes_no_trainer": next((each.peak for each in contestants if each.name == "no_trainer"), None),
    }))  # fmt: skip


def main() -> None:
    parser = build_parser(__doc__)
    parser.add_argument("--shape", choices=SHAPES, default="small")
    parser.add_argument("--rows", type=count, help="rows of a batch, instead of the shape's 8 or 4")
    parser.add_argument(
        "--precision", choices=["no", "bf16"], default="no", help="Plainloop's precision, as for accelerate"
    )
    parser.add_argument("--compile", action="store_true", help="compile Plainloop's model with inductor")
    parser.add_argument("--dropout", type=float, default=0.0)
    parser.add_argument("--activation_checkpointing", action="store_true", help="use it in Plainloop's model")
    parser.add_argument("--rounds", type=count, default=5)
    parser.add_argument("--steps", type=count, default=2, help="steps of each contestant per round")
    parser.add_argument(
        "--quick", action="store_true", help="a quarter of a batch, two rounds of one step, fewer contestants"
    )
    add_dataset(parser)
    parser.add_argument("--contestants", nargs="+", choices=CONTESTANTS, metavar="NAME", help="default: all")
    parser.add_argument(
        "--profile",
        action="store_true",
        help="instead of a race, print where the time of Plainloop's step goes, on a CPU",
    )
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.set_defaults(options={})  # further ones for train.py
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.rounds, arguments.steps = 2, 1
        arguments.rows = arguments.rows or SHAPES[arguments.shape].rows // 4
    if arguments.rows:
        SHAPES[arguments.shape].rows = arguments.rows
    arguments.contestants = arguments.contestants or (QUICK if arguments.quick else list(CONTESTANTS))
    if arguments.child:
        CONTESTANTS[arguments.child.partition("-")[0]](arguments.child, Pace(), arguments)
    with tempfile.TemporaryDirectory() as folder:
        arguments.folder = Path(folder)
        write_datasets(arguments.dataset, arguments.folder)
        if arguments.profile:
            step("step", Profile(SHAPES[arguments.shape].vocabulary), arguments)
        race(arguments)


if __name__ == "__main__":
    main()
