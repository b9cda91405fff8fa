"""Measure the cost of guards and checkpoints, with a Llama of 10 million parameters that trains on the sample.

    python benchmarks/reliability.py       # needs data/demo: python prepare_data.py

A copy of train.py leaves out the vote, the heartbeats and the check of the update in every other ten steps, so that
both kinds of steps run under the same conditions; their medians are compared. It saves every 50 steps in the
background. The cost of a save is its pause, plus the slowdown of the steps after it. Then train.py itself saves with
and without waiting for the disk. Other options go to train.py. Prints a table and one JSON object.
"""

import json
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from benchmarks.common import (
    ON_CPU,
    ONE_PROCESS,
    ROOT,
    STEPS_ONLY,
    build_parser,
    count,
    flags,
    read_arguments,
    read_metrics,
    run,
)

SAVE_EVERY, AFTER_SAVE, WARM_UP = 50, 4, 10
MODEL: dict[str, Any] = STEPS_ONLY | {
    "model.hidden_size": 256, "model.intermediate_size": 1024, "model.num_hidden_layers": 9, "model.num_attention_heads": 4,
    "batch.global_batch_size": 4, "data.sequence_length": 256, "evaluation.per_device_batch_size": 8,
}  # fmt: skip
GUARDED = "step // 10 % 2 == 0"
VOTE = "loss, grad_norm, targets = run.vote(loss_sum / num_targets, norm, num_targets)\n"
BARE = "loss, grad_norm = float(loss_sum / num_targets), float(norm)\n"
CHANGES = (
    ("from training.options import", f"import sys\n\nsys.path.insert(0, {str(ROOT)!r})\nfrom training.options import"),
    (f"        {VOTE}", f"        if {GUARDED}:\n            {VOTE}        else:\n            {BARE}"),
    ("        fault = check_update(", f"        fault = None if not {GUARDED} else check_update("),
    (
        '        run.beat("fetching")\n',
        f'        if {GUARDED}:\n            run.beat("fetching" )\n',
    ),
    (
        '        run.beat("training")\n',
        f'        if {GUARDED}:\n            run.beat("training" )\n',
    ),
)


def train(script: Path, output: Path, further: list[str], **options: object) -> list[dict[str, float]]:
    """Run to the end; returns the records of metrics.jsonl."""
    settings = MODEL | {"output": output} | {name.replace("__", "."): value for name, value in options.items()}
    run(*ONE_PROCESS, script, *flags(settings), *further, **ON_CPU)
    return read_metrics(output)


def pauses(records: list[dict[str, float]]) -> list[float]:
    """Seconds of each save, except the first, which allocates the copy, and the last, which blocks."""
    return [record["perf/save_pause_seconds"] for record in records if "perf/save_pause_seconds" in record][1:-1]


def main() -> None:
    parser = build_parser(__doc__)
    parser.add_argument(
        "--steps", type=count, default=400, help=f"steps of the measured run; more than {SAVE_EVERY + AFTER_SAVE}"
    )
    arguments, further = read_arguments(parser, STEPS_ONLY)
    steps = arguments.steps
    if steps <= SAVE_EVERY + AFTER_SAVE:
        parser.error(f"--steps must be more than {SAVE_EVERY + AFTER_SAVE}")
    text = (ROOT / "train.py").read_text()
    for old, new in CHANGES:
        assert text.count(old) == 1, f"train.py no longer has {old!r}"
        text = text.replace(old, new)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        copy = folder / "train_every_other_ten.py"
        copy.write_text(text)
        records = train(copy, folder / "run", further, schedule__max_steps=steps, checkpoint__every_steps=SAVE_EVERY)
        saves = {
            kind: statistics.median(pauses(train(
                ROOT / "train.py", folder / kind, further, schedule__max_steps=42, checkpoint__every_steps=5,
                checkpoint__asynchronous=kind == "asynchronous",
            )))
            for kind in ("asynchronous", "synchronous")
        }  # fmt: skip
    speed = {int(record["step"]): record["perf/tokens_per_second"] for record in records if "train/loss" in record}
    positions = MODEL["batch.global_batch_size"] * MODEL["data.sequence_length"]
    seconds = {step: positions / value for step, value in speed.items() if step > WARM_UP}
    after_save = {step for step in seconds if step > SAVE_EVERY and (step - 1) % SAVE_EVERY < AFTER_SAVE}
    kinds = {
        kind: [seconds[step] for step in seconds if step not in after_save and ((step - 1) // 10 % 2 == 0) == guarded]
        for kind, guarded in (("guarded", True), ("bare", False))
    }
    medians = {kind: statistics.median(values) for kind, values in kinds.items()}
    excesses = []
    for save in range(SAVE_EVERY, steps - AFTER_SAVE, SAVE_EVERY):
        around = [seconds[step] for step in range(save - 8, save + 20) if step in seconds and step not in after_save]
        following = [seconds[save + number] for number in range(1, AFTER_SAVE + 1)]
        excesses.append(sum(following) - AFTER_SAVE * statistics.median(around))
    save_cost = saves["asynchronous"] + statistics.median(excesses)
    guards = medians["guarded"] / medians["bare"] - 1
    checkpoints = save_cost / (SAVE_EVERY * medians["bare"])
    for label, value, unit in (
        ("a step without guards", medians["bare"], "s"), ("a step with guards", medians["guarded"], "s"),
        ("a save: pause", saves["asynchronous"], "s"), ("a save: slowdown of later steps", statistics.median(excesses), "s"),
        ("a blocking save", saves["synchronous"], "s"), ("guards", 100 * guards, "%"),
        (f"checkpoints every {SAVE_EVERY} steps", 100 * checkpoints, "%"),
    ):  # fmt: skip
        print(f"{label:34}{value:10.4f} {unit}")
    print(json.dumps({
        "step_seconds_bare": medians["bare"], "step_seconds_guarded": medians["guarded"], "guards": guards,
        "checkpoints": checkpoints, "overhead": guards + checkpoints, "excesses": excesses,
        "asynchronous_pause_seconds": saves["asynchronous"], "synchronous_save_seconds": saves["synchronous"],
        "pause_share": saves["asynchronous"] / saves["synchronous"],
    }))  # fmt: skip


if __name__ == "__main__":
    main()
