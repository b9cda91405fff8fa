"""Compare encoding text and loading tokens with the two maps of transformers' run_clm example.

    python benchmarks/prepare_data.py --input corpus/ notes.jsonl     # any source of prepare_data.py
    python benchmarks/prepare_data.py --quick                         # the sample, in under a minute

Like run_clm, the peer tokenizes with one `datasets.map`. A second one joins the tokens of each batch, cuts them into
blocks of 1,024 and drops the rest. Both sides start from the same table of cleaned documents on disk, use the same
tokenizer, one process and all cores, and end with tokens on disk. Text under 20 MB is repeated. Each measurement is
its own process; the sides take turns, and the medians count. Time and memory of a whole run of prepare_data.py are
measured separately, because the peer has no cleaning and no deduplication. Prints a table and one JSON object.
"""

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # `utils` is not installed
from benchmarks import common
from benchmarks.common import ONE_PROCESS, ROOT, amount, build_parser, count

BLOCK = 1024
BATCH = 64
SAMPLE = ROOT / "sample_data" / "dictionaries.jsonl"


def main() -> None:
    parser = build_parser(__doc__)
    parser.add_argument("--input", nargs="+", default=[str(SAMPLE)], help="files or folders (default: the sample)")
    parser.add_argument("--vocab_size", type=count, default=32_768)
    parser.add_argument("--rounds", type=count, default=3)
    # With little text, the fixed cost of a run would hide the cost per token.
    parser.add_argument("--megabytes", type=amount, default=20, help="repeat smaller texts up to this size")
    parser.add_argument("--loader_seconds", type=amount, default=5, help="seconds to read from each loader")
    parser.add_argument("--quick", action="store_true", help="one round and a small vocabulary")
    parser.add_argument("--side", choices=MEASUREMENTS, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.side:
        print(json.dumps(MEASUREMENTS[arguments.side](arguments)))
        return
    if arguments.quick:
        arguments.rounds, arguments.vocab_size = 1, 8192
    with tempfile.TemporaryDirectory() as folder:
        report(run(arguments, Path(folder)))


def run(arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    command = [
        *ONE_PROCESS, str(ROOT / "prepare_data.py"), "--sources", json.dumps([str(Path(p).resolve()) for p in arguments.input]),
        "--output", str(folder / "dataset"), "--tokenizer.vocab_size", str(arguments.vocab_size),
    ]  # fmt: skip
    started = time.perf_counter()
    peak = run_watched(command)
    whole_seconds = time.perf_counter() - started

    results: dict[str, list[dict[str, Any]]] = {side: [] for side in MEASUREMENTS}
    for _ in range(arguments.rounds):
        for side in MEASUREMENTS:
            parallel = os.environ.get("TOKENIZERS_PARALLELISM", "true")
            printed = common.run(
                *ONE_PROCESS, __file__, "--side", side, "--folder", folder, "--megabytes", str(arguments.megabytes),
                "--loader_seconds", str(arguments.loader_seconds), TOKENIZERS_PARALLELISM=parallel, HF_HUB_OFFLINE="1",
            )  # fmt: skip
            results[side].append(json.loads(printed.splitlines()[-1]))
    manifest = json.loads((folder / "dataset" / "manifest.json").read_text(encoding="utf-8"))
    tokens = sum(split["tokens"] for split in manifest["splits"].values())
    stored = sum(path.stat().st_size for split in manifest["splits"] for path in (folder / "dataset" / split).iterdir())
    return {
        "bytes_per_token": stored / tokens,
        "sides": results,
        "manifest": manifest,
        "seconds": whole_seconds,
        "peak_memory_bytes": peak,
    }


def run_watched(command: list[str]) -> int:
    """Run a command; returns its peak anonymous memory in bytes (the system can drop mapped files)."""
    peak = 0
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)

    def watch() -> None:
        nonlocal peak
        while process.poll() is None:
            peak = max(peak, anonymous_bytes(process.pid))
            time.sleep(0.02)

    watcher = threading.Thread(target=watch)
    watcher.start()
    _, errors = process.communicate()
    watcher.join()
    if process.returncode:
        sys.exit(f"{' '.join(command)} failed:\n{errors[-3000:]}")
    return peak


def anonymous_bytes(pid: int) -> int:
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("RssAnon")), 0)


def cleaned_documents(arguments: argparse.Namespace) -> Any:
    """The documents of both splits as prepare_data.py cleaned them, in one table on disk; a small set is repeated."""
    import datasets
    import numpy as np

    from preparation.selection.splits import Selection
    from preparation.stages import load_slices

    stages = arguments.folder / ".dataset.stages"
    (cleaned,), (selected,) = stages.glob("clean-*"), stages.glob("select-*")
    kept = np.flatnonzero(Selection.load(selected).code == 0)
    documents = load_slices(cleaned / "clean.arrow").select(kept).select_columns(["text"])
    total = sum(len(text.encode()) for batch in documents.iter(1000) for text in batch["text"])
    times = math.ceil(1e6 * arguments.megabytes / total)
    return datasets.concatenate_datasets([documents] * times).flatten_indices()


def measure_peer(arguments: argparse.Namespace) -> dict[str, Any]:
    """Encode with two maps, as in run_clm; the result stays on disk for `measure_peer_loader`."""
    import datasets
    from transformers import AutoTokenizer

    documents = cleaned_documents(arguments)
    tokenizer = AutoTokenizer.from_pretrained(arguments.folder / "dataset" / "tokenizer")
    datasets.disable_progress_bars()
    out = arguments.folder / "peer"
    out.mkdir(exist_ok=True)

    def tokenize(batch: dict[str, list]) -> Any:
        return tokenizer(batch["text"])

    def group(batch: dict[str, list]) -> dict[str, list]:
        joined = {name: [value for values in column for value in values] for name, column in batch.items()}
        total = len(joined["input_ids"]) // BLOCK * BLOCK
        blocks = {name: [values[i : i + BLOCK] for i in range(0, total, BLOCK)] for name, values in joined.items()}
        blocks["labels"] = [list(block) for block in blocks["input_ids"]]
        return blocks

    started = time.perf_counter()
    options: dict[str, Any] = {"batched": True, "new_fingerprint": "peer", "load_from_cache_file": False}
    tokenized = documents.map(
        tokenize, remove_columns=["text"], cache_file_name=str(out / "tokenized.arrow"), **options
    )
    grouped = tokenized.map(group, cache_file_name=str(out / "grouped.arrow"), **options)
    seconds = time.perf_counter() - started
    tokens = sum(len(chunk.values) for chunk in tokenized.data.column("input_ids").chunks)
    return {
        "seconds": seconds, "tokens": tokens, "tokens_lost": tokens - len(grouped) * BLOCK,
        "documents": len(documents),
        "disk_bytes": (out / "grouped.arrow").stat().st_size,
    }  # fmt: skip


def measure_encoding(arguments: argparse.Namespace, *, fast: bool) -> dict[str, Any]:
    """Encode the same documents with Plainloop."""
    import datasets

    from preparation.stages import text_bytes
    from preparation.tokenizer.build import load_tokenizer
    from preparation.tokenizer.encoding import build_encoder
    from prepare_data import THIS_MACHINE, encode_split

    datasets.disable_progress_bars()
    documents = cleaned_documents(arguments)
    tokenizer = load_tokenizer(str(arguments.folder / "dataset" / "tokenizer"))
    lengths = text_bytes(documents)
    out = arguments.folder / ("ours_fast" if fast else "ours")
    started = time.perf_counter()
    encoder = build_encoder(tokenizer, documents[:100]["text"], use_gigatoken=fast)
    tokens = encode_split(documents, lengths, encoder, out / f"run-{time.time_ns()}" / "train", THIS_MACHINE, Counter())
    seconds = time.perf_counter() - started
    return {"seconds": seconds, "tokens": int(tokens.sum()), "note": encoder.note}


def measure_peer_loader(arguments: argparse.Namespace) -> dict[str, Any]:
    import datasets
    import torch
    from transformers import default_data_collator

    grouped = datasets.Dataset.from_file(str(arguments.folder / "peer" / "grouped.arrow"))
    loader = torch.utils.data.DataLoader(grouped, batch_size=BATCH, shuffle=True, collate_fn=default_data_collator)  # type: ignore[arg-type]
    return time_blocks(loader, arguments.loader_seconds)


def measure_loader(arguments: argparse.Namespace) -> dict[str, Any]:
    from utils.data.loaders import build_layout, build_train_loader
    from utils.data.token_dataset import open_split
    from utils.objectives.causal import collate

    layout = build_layout(
        open_split(sorted((arguments.folder / "ours").iterdir())[-1], "train"),
        "packed",
        BLOCK,
        pad_token_id=0,
        vocab_size=1 << 16,
    )
    loader = build_train_loader(layout, collate, BATCH, samples_seen=0, seed=0, num_workers=0)
    return time_blocks(loader, arguments.loader_seconds)


def time_blocks(loader: Any, seconds: float) -> dict[str, Any]:
    """Blocks per second of a loader; touches each batch, and starts again at the end."""
    for batch in loader:
        batch["input_ids"].sum()
        break
    blocks, started = 0, time.perf_counter()
    while True:
        for batch in loader:
            blocks += len(batch["input_ids"])
            elapsed = time.perf_counter() - started
            if elapsed > seconds:
                return {"blocks_per_second": blocks / elapsed}


MEASUREMENTS: dict[str, Callable[[argparse.Namespace], dict[str, Any]]] = {
    "peer": measure_peer,
    "tokenizers": partial(measure_encoding, fast=False),
    "fast": partial(measure_encoding, fast=True),
    "peer loader": measure_peer_loader,
    "loader": measure_loader,
}


def report(results: dict[str, Any]) -> None:
    sides, manifest = results["sides"], results["manifest"]

    def median(side: str, name: str) -> float:
        return statistics.median(item[name] for item in sides[side])

    speeds = {side: median(side, "tokens") / median(side, "seconds") for side in ("peer", "tokenizers", "fast")}
    print(f"{'':<26}{'seconds':>10}{'tokens/s':>14}{'ratio':>8}")
    for side, speed in speeds.items():
        note = sides[side][0].get("note", "")
        print(f"{side:<26}{median(side, 'seconds'):>10.2f}{speed:>14,.0f}{speed / speeds['peer']:>8.2f}  {note}")
    loaders = {side: median(side, "blocks_per_second") for side in ("peer loader", "loader")}
    for side, speed in loaders.items():
        print(f"{side:<26}{'':>10}{speed:>14,.0f}{speed / loaders['peer loader']:>8.1f}  blocks of {BLOCK} per second")
    splits = manifest["splits"].values()
    tokens, documents = (sum(split[name] for split in splits) for name in ("tokens", "documents"))
    # The peer counts the tokenizer's output; ours has one more end-of-text token per document.
    repeated = int(median("peer", "documents")) // documents
    lost = int(median("peer", "tokens")) + repeated * (documents - tokens)
    print(f"{'whole run':<26}{results['seconds']:>10.2f}{tokens / results['seconds']:>14,.0f}")
    print(f"peak anonymous memory of the whole run: {results['peak_memory_bytes']:,} bytes")
    print(
        f"on disk: {results['bytes_per_token']:.3f} bytes a token; the peer {median('peer', 'disk_bytes') / median('peer', 'tokens'):.2f}"
    )
    print(
        f"tokens lost: {lost}; by the peer {int(median('peer', 'tokens_lost')):,} of {int(median('peer', 'tokens')):,}"
    )
    print(json.dumps({
        "ratio_tokenizers": round(speeds["tokenizers"] / speeds["peer"], 3),
        "ratio_fast": round(speeds["fast"] / speeds["peer"], 3),
        "bytes_per_token": round(results["bytes_per_token"], 4),
        "loader_ratio": round(loaders["loader"] / loaders["peer loader"], 1),
        "tokens_lost": lost,
        "peak_memory_bytes": results["peak_memory_bytes"],
        "tokens": tokens,
        "whole_run_tokens_per_second": round(tokens / results["seconds"]),
        "whole_run_seconds": round(results["seconds"], 2),
        "fast_note": sides["fast"][0]["note"],
        "rounds": len(sides["peer"]),
    }))  # fmt: skip


if __name__ == "__main__":
    main()
