"""Export runs to every format that fits each, and put the receipts of all files into one table.

    python benchmarks/exports.py runs/demo runs/small_gpt2_124m runs/small_lora runs/small_bert_mlm

Each group of formats is one call of export.py; a group that does not fit a run is a row that says why. The table comes
from the reports alone. Prints it and one JSON object.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from benchmarks.common import ONE_PROCESS, ROOT, build_parser, environment
from utils.files import readable

GROUPS = {
    "safetensors": ("safetensors",), "safetensors-bf16": ("safetensors-bf16",), "safetensors-f16": ("safetensors-f16",),
    "adapter": ("adapter",),
    "gguf": ("gguf-f32", "gguf-f16", "gguf-bf16", "gguf-q8_0", "gguf-q5_0", "gguf-q4_0", "gguf-q4_k_m"),
    "onnx": ("onnx", "onnx-int8"),
}  # fmt: skip
HEAD = ("run", "format", "size", "seconds", "reader's seconds", "largest difference of log-probabilities", "perplexity",
        "greedy tokens", "receipt")  # fmt: skip


def main(options: argparse.Namespace) -> None:
    results: dict[str, list[dict[str, Any]]] = {}
    with tempfile.TemporaryDirectory(prefix="plainloop-exports-") as folder:
        for run in options.runs:
            results[run.name] = rows = []
            for group in options.groups:
                if group == "adapter" and not list(run.glob("checkpoints/*/adapter_config.json")):
                    continue
                rows.extend(export(run, Path(folder) / f"{run.name}-{group}", group))
                print(f"{run.name}: {group}", file=sys.stderr, flush=True)
    lines = [HEAD, ("---",) * len(HEAD), *(line(name, row) for name, rows in results.items() for row in rows)]
    print("\n".join(f"| {' | '.join(cells)} |" for cells in lines))
    print(json.dumps(results))


def export(run: Path, output: Path, group: str) -> list[dict[str, Any]]:
    """The rows of the report, or one row with the line by which export.py refuses."""
    formats = f"[{', '.join(GROUPS[group])}]"
    command = [*ONE_PROCESS, str(ROOT / "export.py"), "--checkpoint", str(run), "--output", str(output), "--formats"]
    ended = subprocess.run([*command, formats], capture_output=True, text=True, env=environment())
    if ended.returncode:
        lines = ended.stderr.strip().splitlines() or [f"export.py ended with {ended.returncode}"]
        return [{"format": group, "receipt": lines[-1].removeprefix("export.py: error: ")}]
    found: list[dict[str, Any]] = json.loads((output / "export_report.json").read_text(encoding="utf-8"))["files"]
    return found


def line(name: str, row: dict[str, Any]) -> tuple[str, ...]:
    if "reader" not in row:
        return (name, row["format"], *[""] * (len(HEAD) - 3), row["receipt"])
    greedy = f"{row['greedy_tokens_equal']} of {row['greedy_tokens']}" if "greedy_tokens" in row else ""
    return (
        name, row["format"], readable(row["bytes"]), f"{row['seconds']:.1f}", f"{row['seconds_of_receipt']:.1f}",
        f"{row['max_log_probability_difference']:.1e}", f"{row['perplexity_before']:.3f} → {row['perplexity']:.3f}",
        greedy, row["receipt"],
    )  # fmt: skip


def run_folder(name: str) -> Path:
    if not (Path(name) / "checkpoints").is_dir():
        raise argparse.ArgumentTypeError(f"{name} is not a run; make the demo's with: make demo")
    return Path(name)


if __name__ == "__main__":
    parser = build_parser(__doc__)
    parser.add_argument("runs", type=run_folder, nargs="+", help="run folders")
    parser.add_argument("--groups", choices=list(GROUPS), nargs="+", default=list(GROUPS))
    main(parser.parse_args())
