"""Compare the loss of each step on the fast path and on the plain path, on real text.

    python benchmarks/loss_curves.py       # needs data/demo: python prepare_data.py; about 15 minutes
    python benchmarks/loss_curves.py --fp32

It trains the same GPT-2 with the same data order and seed on the plain path (full logits, eager attention,
transformers' own activation) and on the default path, in fp32 and in bf16. The plain path in bf16 shows the effect of
bf16 itself. Other options go to train.py. Writes runs/loss_curves.png and ends with one JSON object.
"""

import json
import sys
import tempfile
from pathlib import Path

from matplotlib.figure import Figure

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from benchmarks.common import (
    ON_CPU,
    ONE_PROCESS,
    ROOT,
    STEPS_ONLY,
    TRAIN,
    build_parser,
    count,
    file_to_write,
    flags,
    read_arguments,
    read_metrics,
    run,
    save_plot,
)

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


def losses(kind: str, steps: int, further: list[str], folder: Path) -> list[float]:
    """The loss of each step, in nats per token."""
    own, precision = KINDS[kind]
    output = folder / kind.replace(", ", "_")
    options = STEPS_ONLY | own | {"model.architecture": "gpt2", "output": output, "schedule.max_steps": steps}
    run(*ONE_PROCESS, TRAIN, *flags(options), *further, ACCELERATE_MIXED_PRECISION=precision, **ON_CPU)
    return [record["train/loss"] for record in read_metrics(output) if "train/loss" in record]


def main() -> None:
    parser = build_parser(__doc__)
    parser.add_argument("--steps", type=count, default=300)
    parser.add_argument(
        "--fp32", action="store_true", help="fp32 only, because a CPU without bf16 instructions emulates them slowly"
    )
    parser.add_argument("--plot", type=file_to_write, default=ROOT / "runs" / "loss_curves.png")
    arguments, further = read_arguments(parser, STEPS_ONLY)
    kinds = [kind for kind in KINDS if "fp32" in kind or not arguments.fp32]
    with tempfile.TemporaryDirectory() as folder:
        curves = {kind: losses(kind, arguments.steps, further, Path(folder)) for kind in kinds}
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
    save_plot(figure, arguments.plot)
    print(json.dumps({"steps": arguments.steps, "against_plain_fp32": table}))


if __name__ == "__main__":
    main()
