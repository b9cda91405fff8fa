"""The formats of export.py beside safetensors, and a receipt for each file: its own reader says what the checkpoint says."""

import time
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from utils.files import UserError, readable

if TYPE_CHECKING:
    from exporting.receipts import Questions

Format = Literal[
    "safetensors", "gguf", "gguf-f32", "gguf-f16", "gguf-bf16", "gguf-q8_0", "gguf-q5_0", "gguf-q4_0", "onnx",
    "onnx-int8",
]  # fmt: skip
NEEDED = {"gguf": ("gguf",), "onnx": ("onnx", "onnxscript"), "onnx-int8": ("onnx", "onnxscript", "onnxruntime")}
EXTRAS = {"gguf": "gguf", "onnx": "onnx"}


def missing_libraries(formats: Sequence[str]) -> list[str]:
    """One line for each format whose library is not installed."""
    found = []
    for format in formats:
        family = format.partition("-")[0]
        for library in NEEDED.get(format, NEEDED.get(family, ())):
            if find_spec(library) is None:
                found.append(f"formats: {format} needs the library {library}: pip install -e '.[{EXTRAS[family]}]'")
    return found


def check_formats(formats: Sequence[str], model: Any, tokenizer: Any, opens_with: str) -> None:
    """`UserError` if a format cannot hold the model or its tokenizer."""
    from exporting.gguf_file import check_gguf

    if any(format.startswith("gguf") for format in formats):
        check_gguf(model, tokenizer)
    if any(format.startswith("onnx") for format in formats) and opens_with not in SUPPORTED_HEADS:
        raise UserError(f"onnx: {opens_with} is not supported; only {' and '.join(SUPPORTED_HEADS)}")


SUPPORTED_HEADS = ("AutoModelForCausalLM", "AutoModelForMaskedLM")


def write_formats(
    formats: Sequence[str], model: Any, tokenizer: Any, checkpoint: Path, folder: Path, opens_with: str, name: str
) -> list[dict[str, Any]]:
    """Write the formats into `folder`, which holds what `save_pretrained` wrote, and ask the readers; a row per file.

    `model` is the checkpoint's, in fp32 on the CPU, adapters merged. The weights of safetensors are removed if they are
    not among the formats.
    """
    from exporting.onnx_graph import keep_bos
    from exporting.receipts import ask_checkpoint, check_file, held_out_rows

    if opens_with not in SUPPORTED_HEADS:  # the comparison of logits in export.py is all there is
        return []
    causal = opens_with == "AutoModelForCausalLM"
    rows = held_out_rows(checkpoint, model, tokenizer)
    questions: Questions = ask_checkpoint(model, tokenizer, rows, opens_with, causal)
    if any(format.startswith("onnx") for format in formats):
        keep_bos(folder, tokenizer)
    found = []
    for format in dict.fromkeys("gguf-f32" if format == "gguf" else format for format in formats):
        started = time.perf_counter()
        files = _write(format, model, tokenizer, folder, causal, name)
        row = {
            "format": format,
            "file": str(files[0].relative_to(folder)),
            "bytes": sum(f.stat().st_size for f in files),
        }
        row["seconds"] = round(time.perf_counter() - started, 1)
        target = folder if format == "safetensors" else files[0]
        started = time.perf_counter()
        row |= check_file(format, target, questions, model.config.model_type)
        found.append(row | {"seconds_of_receipt": round(time.perf_counter() - started, 1)})
    if "safetensors" not in formats:
        for path in folder.glob("model*.safetensors*"):
            path.unlink()
    if "onnx" not in formats:
        for path in folder.glob("onnx/model.onnx*"):  # onnx-int8 is made from it
            path.unlink()
    return found


def _write(format: str, model: Any, tokenizer: Any, folder: Path, causal: bool, name: str) -> list[Path]:
    from exporting.gguf_file import write_gguf, write_modelfile
    from exporting.onnx_graph import quantize_onnx, write_onnx

    family, _, precision = format.partition("-")
    if family == "gguf":
        path = folder / f"model-{precision}.gguf"
        write_gguf(model, tokenizer, path, precision, name)
        write_modelfile(tokenizer, folder / "Modelfile", path.name)
        return [path]
    if family == "onnx":
        path = folder / "onnx" / "model.onnx"
        if not path.exists():
            write_onnx(model, path, causal)
        if precision == "int8":
            quantize_onnx(path, path := path.with_name("model_quantized.onnx"))
        return [path, *path.parent.glob(f"{path.name}.data")]
    return sorted(folder.glob("model*.safetensors"))


def failed(rows: list[dict[str, Any]]) -> list[str]:
    """What differed, one line per file."""
    return [f"{row['file']}: {'; '.join(row['faults'])}" for row in rows if row["faults"]]


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as lines of a table for the console."""
    head = (
        "file",
        "size",
        "seconds",
        "reader",
        "ids",
        "positions",
        "log-prob. diff.",
        "perplexity",
        "greedy",
        "stop",
        "receipt",
    )
    lines = [head]
    for row in rows:
        size = (row["file"], readable(row["bytes"]), f"{row['seconds']:.1f}")
        if "reader" not in row:
            lines.append((*size, *"-------", row["receipt"]))
            continue
        greedy = f"{row['greedy_tokens_equal']}/{row['greedy_tokens']}" if "greedy_tokens" in row else "-"
        stop = {True: "yes", False: "no", None: "-"}[row.get("stops")]
        perplexity = f"{row['perplexity_before']:.2f} → {row['perplexity']:.2f}"
        difference = f"{row['max_log_probability_difference']:.1e}"
        figures = (f"{row['texts_with_equal_ids']}/4", str(row["positions"]), difference, perplexity)
        lines.append((*size, row["reader"], *figures, greedy, stop, row["receipt"].partition(":")[0]))
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines
    )
