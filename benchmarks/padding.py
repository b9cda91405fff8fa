"""Compare packed with padded rows on short texts, in target tokens per second.

    python benchmarks/padding.py
    python benchmarks/padding.py --entries all      # includes the Jargon File's longer entries

The text is the entries of The Devil's Dictionary in the sample, in rows of up to --length positions. Model and batch
are the same for all layouts: padded to the maximal length, padded to the longest row of the batch, packed, and
best-fit. The processes take turns. Other options go to train.py. Prints a table and one JSON object.
"""

import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from benchmarks.common import (
    ONE_PROCESS,
    ROOT,
    STEPS_ONLY,
    TRAIN,
    build_parser,
    count,
    flags,
    median_speed,
    read_arguments,
    run,
)

OPTIONS = STEPS_ONLY | {"batch.global_batch_size": 8, "evaluation.per_device_batch_size": 8}
KINDS = {
    "max_length": {"data.layout": "padded", "data.pad_to": "max_length"},
    "longest": {"data.layout": "padded", "data.pad_to": "longest"},
    "packed": {"data.layout": "packed"},
    "best_fit": {"data.layout": "best_fit"},
}


def prepare(beginning: str, folder: Path) -> tuple[Path, float]:
    """Make a dataset of the entries whose id has this prefix; returns it and their mean length in tokens."""
    lines = (ROOT / "sample_data" / "dictionaries.jsonl").read_text(encoding="utf-8").splitlines()
    (folder / "entries.jsonl").write_text(
        "\n".join(line for line in lines if json.loads(line)["id"].startswith(beginning))
    )
    run(
        *ONE_PROCESS, ROOT / "prepare_data.py", "--sources", f"[{folder}/entries.jsonl]", "--output", folder / "entries"
    )
    train = json.loads((folder / "entries" / "manifest.json").read_text())["splits"]["train"]
    return folder / "entries", train["tokens"] / train["documents"]


def tokens_per_second(kind: str, steps: int, length: int, dataset: Path, further: list[str], folder: Path) -> float:
    """Target tokens per second of train.py: the median over its steps except the first two."""
    output = folder / f"{kind}-{time.monotonic_ns()}"
    lengths = {"data.sequence_length": length, "model.max_position_embeddings": length}
    options = OPTIONS | KINDS[kind] | lengths | {"data.dataset": dataset, "output": output, "schedule.max_steps": steps}
    run(*ONE_PROCESS, TRAIN, *flags(options), *further)
    return median_speed(output)


def main() -> None:
    parser = build_parser(__doc__)
    parser.add_argument("--entries", choices=["short", "all"], default="short")
    parser.add_argument("--length", type=count, default=512, help="positions per row")
    parser.add_argument("--rounds", type=count, default=3)
    parser.add_argument("--steps", type=count, default=12)
    arguments, further = read_arguments(parser, {})
    speeds: dict[str, list[float]] = {kind: [] for kind in KINDS}
    with tempfile.TemporaryDirectory() as folder:
        dataset, mean = prepare("devil/" if arguments.entries == "short" else "", Path(folder))
        for _ in range(arguments.rounds):
            for kind, found in speeds.items():
                found.append(tokens_per_second(kind, arguments.steps, arguments.length, dataset, further, Path(folder)))
    medians = {kind: statistics.median(found) for kind, found in speeds.items()}
    print(f"entries of {mean:.0f} tokens on average")
    for kind, value in medians.items():
        print(f"{kind:<12}{value:>10,.0f} tokens/s{value / medians['max_length']:>8.2f}")
    ratios = {f"ratio_{kind}": value / medians["max_length"] for kind, value in medians.items()}
    print(json.dumps({"tokens_per_second": medians, "mean_tokens": mean, **ratios}))


if __name__ == "__main__":
    main()
