"""What guards and checkpoints cost: train.py as it is, against a copy of it without them.

    python benchmarks/reliability.py --rounds 5

Both train a Llama of 10 million parameters on the sample, in turns, in processes of their own. A round's time is that
between the log lines of two steps, 100 steps apart. The copy has no vote, no heartbeat, no look at the numbers, and no
checkpoint between; train.py saves every 50 steps. Then the pause of asynchronous saves, against saves that the training
waits for.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from datetime import datetime
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FIRST_STEP, STEPS = 10, 100
MODEL = {
    "model.hidden_size": 256, "model.intermediate_size": 1024, "model.num_hidden_layers": 9, "model.num_attention_heads": 4,
    "batch.global_batch_size": 4, "data.sequence_length": 256, "tracking.trackers": "[]", "tracking.sample_every_steps": 0,
    "tracking.log_every_steps": FIRST_STEP, "evaluation.every_steps": 100000, "evaluation.per_device_batch_size": 8,
}  # fmt: skip
WITHOUT = (
    (
        "        loss, grad_norm = stops.agree(loss_sum / num_targets, norm / plan.data_parallel_size)\n",
        "        loss, grad_norm = float(loss_sum / num_targets), float(norm)\n",
    ),
    ("        fault = find_fault(", "        fault = None and find_fault("),
    ('        watchdog.beat(step + 1, "fetching")\n', ""),
    ('        watchdog.beat(step + 1, "training")\n', ""),
)


def train(script: Path, output: Path, dataset: Path, **options: object) -> list[dict]:
    """Run to the end; metrics.jsonl."""
    settings = MODEL | {"output": output, "data.dataset": dataset} | {
        name.replace("__", "."): value for name, value in options.items()
    }  # fmt: skip
    arguments = [str(part) for name, value in settings.items() for part in (f"--{name}", value)]
    subprocess.run([sys.executable, script, *arguments], cwd=ROOT, check=True, capture_output=True)
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


def step_seconds(output: Path) -> float:
    """Mean wall time of a step between two log lines, with all that comes between."""
    times = {}
    for line in (output / "training.log").read_text().splitlines():
        words = line.split()
        if words[3:4] == ["step"] and "train" in words:
            times[int(words[4].partition("/")[0])] = datetime.strptime(" ".join(words[:2]), "%Y-%m-%d %H:%M:%S,%f")
    return (times[FIRST_STEP + STEPS] - times[FIRST_STEP]).total_seconds() / STEPS


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="trainings of each kind")
    rounds = parser.parse_args().rounds
    os.environ |= {"ACCELERATE_USE_CPU": "true"}
    text = (ROOT / "train.py").read_text()
    for old, new in WITHOUT:
        assert text.count(old) == 1, f"train.py no longer has {old!r}"
        text = text.replace(old, new)
    bare = ROOT / "train_without_guards.py"
    bare.write_text(text)
    seconds: dict[str, list[float]] = {"with": [], "without": []}
    pauses: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        try:
            dataset = folder / "data"
            subprocess.run(
                [sys.executable, "prepare_data.py", "--output", dataset], cwd=ROOT, check=True, capture_output=True
            )
            end = FIRST_STEP + STEPS + 5
            for number in range(rounds):
                for kind, script, every in (("with", ROOT / "train.py", 50), ("without", bare, 100000)):
                    output = folder / f"{kind}{number}"
                    train(script, output, dataset, schedule__max_steps=end, checkpoint__every_steps=every)
                    seconds[kind].append(step_seconds(output))
                    print(
                        f"round {number + 1}, {kind:>7} guards and checkpoints: {seconds[kind][-1]:.4f} s a step",
                        flush=True,
                    )
            for kind, asynchronous in (("asynchronous", "true"), ("synchronous", "false")):
                records = train(
                    ROOT / "train.py", folder / kind, dataset, schedule__max_steps=42, checkpoint__every_steps=5,
                    checkpoint__asynchronous=asynchronous,
                )  # fmt: skip
                saves = [record["perf/save_pause_seconds"] for record in records if "perf/save_pause_seconds" in record]
                pauses[kind] = saves[1:-1]  # the first makes the copy's memory, the last is waited for
        finally:
            bare.unlink()
    medians = {kind: statistics.median(values) for kind, values in seconds.items()}
    ratios = [a / b for a, b in zip(seconds["with"], seconds["without"], strict=True)]
    pause = {kind: statistics.median(values) for kind, values in pauses.items()}
    print(f"{'':32}{'seconds':>10}")
    print(
        f"{'a step, with guards and saves':32}{medians['with']:10.4f}\n{'a step, without':32}{medians['without']:10.4f}"
    )
    print(
        f"{'a save that is waited for':32}{pause['synchronous']:10.4f}\n{'the pause of one beside':32}{pause['asynchronous']:10.4f}"
    )
    print(json.dumps({
        "step_seconds_with": medians["with"], "step_seconds_without": medians["without"],
        "overhead": statistics.median(ratios) - 1, "overheads": [ratio - 1 for ratio in ratios],
        "synchronous_save_seconds": pause["synchronous"], "asynchronous_pause_seconds": pause["asynchronous"],
        "pause_share": pause["asynchronous"] / pause["synchronous"],
    }))  # fmt: skip


if __name__ == "__main__":
    main()
