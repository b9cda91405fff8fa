"""Whether the fast way trains as the plain one does: the loss of each step, on real text.

    python benchmarks/loss_curves.py       # needs data/demo: python prepare_data.py; some 15 minutes

The same GPT-2, order of data and seed, on the plain path (full logits, eager attention, transformers' own activation) and on
the default one, in fp32 and in bf16. How far bf16 itself leads away is seen on the plain path. Writes
runs/loss_curves.png and ends with one JSON object.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from matplotlib.figure import Figure

ROOT = Path(__file__).resolve().parent.parent
OPTIONS = {
    "model.architecture": "gpt2", "tracking.log_every_steps": 1, "tracking.trackers": "[]", "tracking.sample_every_steps": 0,
    "evaluation.every_steps": 100_000, "checkpoint.every_steps": 100_000,
}  # fmt: skip
PLAIN = {
    "model.attention": "eager", "matmul_precision": "highest", "kernels.chunked_head": "false",
    "kernels.fused_activation": "false", "kernels.fast_dropout": "false",
}  # fmt: skip
KINDS = {
    "plain, fp32": (PLAIN, "no"),
    "fast, fp32": ({}, "no"),
    "plain, bf16": (PLAIN, "bf16"),
    "fast, bf16": ({}, "bf16"),
}


def losses(kind: str, steps: int, folder: Path) -> list[float]:
    """The loss of each step, in nats per token."""
    own, precision = KINDS[kind]
    output = folder / kind.replace(", ", "_")
    options = OPTIONS | own | {
        "data.dataset": ROOT / "data" / "demo", "output": output, "schedule.max_steps": steps
    }  # fmt: skip
    arguments = [str(part) for name, value in options.items() for part in (f"--{name}", value)]
    kept = {name: value for name, value in os.environ.items() if not name.startswith("ACCELERATE_")}
    child = subprocess.run(
        [sys.executable, "train.py", *arguments], cwd=ROOT, capture_output=True, text=True,
        env=kept | {"ACCELERATE_MIXED_PRECISION": precision, "ACCELERATE_USE_CPU": "true"},
    )  # fmt: skip
    if child.returncode:
        raise SystemExit(f"{kind} failed:\n{child.stderr[-3000:]}")
    records = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return [record["train/loss"] for record in records if "train/loss" in record]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument(
        "--fp32", action="store_true", help="only: a CPU without such instructions emulates bf16, slowly"
    )
    arguments = parser.parse_args()
    if not (ROOT / "data" / "demo" / "manifest.json").is_file():
        raise SystemExit("benchmarks/loss_curves.py needs data/demo; make it with: python prepare_data.py")
    with tempfile.TemporaryDirectory() as folder:
        curves = {
            kind: losses(kind, arguments.steps, Path(folder)) for kind in KINDS if "fp32" in kind or not arguments.fp32
        }
    figure = Figure(figsize=(8, 6), layout="constrained")
    upper, lower = figure.subplots(2, sharex=True)
    table = {}
    print(f"{'against plain, fp32':<22}{'last loss':>10}{'mean |d|':>11}{'largest':>11}{'largest of 50':>15}")
    for kind, curve in curves.items():
        upper.plot(range(1, len(curve) + 1), curve, label=kind, linewidth=1)
        apart = [abs(one - other) for one, other in zip(curve, curves["plain, fp32"], strict=True)]
        table[kind] = {
            "last_loss": curve[-1], "mean": sum(apart) / len(apart), "largest": max(apart), "largest_of_50": max(apart[:50])
        }  # fmt: skip
        print(f"{kind:<22}{curve[-1]:>10.4f}" + "".join(f"{table[kind][name]:>{width}.1e}" for name, width in
              (("mean", 11), ("largest", 11), ("largest_of_50", 15))))  # fmt: skip
        if kind != "plain, fp32":
            lower.semilogy(range(1, len(apart) + 1), [max(each, 1e-7) for each in apart], label=kind, linewidth=1)
    upper.set(ylabel="loss, nats per token")
    lower.set(ylabel="difference from plain, fp32", xlabel="step")
    for axes in (upper, lower):
        axes.grid(alpha=0.3)
        axes.legend()
    path = ROOT / "runs" / "loss_curves.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100)
    print(json.dumps({"steps": arguments.steps, "against_plain_fp32": table}))


if __name__ == "__main__":
    main()
