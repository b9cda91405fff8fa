"""Measure time and memory to lay out many documents, each layout in its own process (Linux).

    python benchmarks/layout.py            # 100 million documents, about 3 GB of memory

The lengths are log-normal with a mean of 250 tokens. The time is that from the lengths to a layout that can return
rows. The peak is the process's largest resident size (VmHWM), including the lengths and about 150 MB for the
libraries.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

MEAN, SIGMA = 250, 1.0  # tokens; of the logarithm
CHUNK = 2**20


def generate_lengths(count: int) -> np.ndarray:
    """Lengths of `count` documents in tokens, (count,) uint16, at least 1; made in chunks to save memory."""
    random = np.random.default_rng(0)
    lengths = np.empty(count, np.uint16)
    for start in range(0, count, CHUNK):
        size = min(CHUNK, count - start)
        lengths[start : start + size] = random.lognormal(np.log(MEAN) - SIGMA**2 / 2, SIGMA, size).clip(1, 65535)
    return lengths


def measure(layout: str, documents: int, sequence_length: int) -> dict[str, Any]:
    """Lay out once, in this process."""
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # `utils` is not installed
    from utils.data.packing import BestFitLayout, PackedLayout
    from utils.data.token_dataset import TokenDataset

    lengths = generate_lengths(documents)
    started = time.perf_counter()
    rows = {"packed": PackedLayout, "best_fit": BestFitLayout}[layout](TokenDataset([], lengths), sequence_length)
    seconds = time.perf_counter() - started
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return {
        "layout": layout, "rows": len(rows), "seconds": seconds, "utilisation": rows.utilisation,
        "peak_bytes": int(status["VmHWM"].split()[0]) * 1024,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--documents", type=float, default=1e8, help="number of documents")
    parser.add_argument("--sequence_length", type=int, default=512, help="positions per row (T)")
    parser.add_argument("--layout", choices=["packed", "best_fit"], help="only this one, in this process")
    options = parser.parse_args()
    documents = int(options.documents)
    if documents < 1 or options.sequence_length < 1:
        parser.error("--documents and --sequence_length must be 1 or more")
    if options.layout:
        print(json.dumps(measure(options.layout, documents, options.sequence_length)))
        return

    print(f"{documents:,} documents in rows of {options.sequence_length}")
    print(f"{'layout':10}{'rows':>14}{'seconds':>10}{'peak GB':>10}{'utilisation':>13}")
    results = {}
    for layout in ("packed", "best_fit"):
        child = subprocess.run(
            [sys.executable, __file__, *sys.argv[1:], "--layout", layout], check=True, capture_output=True, text=True
        )
        result = results[layout] = json.loads(child.stdout)
        print(f"{layout:10}{result['rows']:14,}{result['seconds']:10.2f}{result['peak_bytes'] / 1e9:10.2f}"
              f"{result['utilisation']:13.4f}")  # fmt: skip
    print(json.dumps({
        "documents": documents,
        **{f"{layout}_seconds": result["seconds"] for layout, result in results.items()},
        **{f"{layout}_peak_bytes": result["peak_bytes"] for layout, result in results.items()},
        "utilisation": results["best_fit"]["utilisation"],
    }))  # fmt: skip


if __name__ == "__main__":
    main()
