"""The formats of export.py, and a receipt for each file: its own reader says what the checkpoint says."""

import copy
import shutil
import time
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from utils.files import UserError, readable

if TYPE_CHECKING:
    from exporting.receipts import Questions

Format = Literal[
    "safetensors", "safetensors-bf16", "safetensors-f16", "adapter", "gguf", "gguf-f32", "gguf-f16", "gguf-bf16",
    "gguf-q8_0", "gguf-q5_0", "gguf-q4_0", "gguf-q4_k_m", "onnx", "onnx-int8",
]  # fmt: skip
NEEDED = {
    "gguf": ("gguf",), "gguf-q4_k_m": ("gguf", "cyllama"), "onnx": ("onnx", "onnxscript"),
    "onnx-int8": ("onnx", "onnxscript", "onnxruntime"),
}  # fmt: skip
EXTRAS = {"cyllama": "quantize", "gguf": "gguf", "onnx": "onnx", "onnxscript": "onnx", "onnxruntime": "onnx"}


def find_faults(formats: Sequence[str], checkpoint: Path) -> list[str]:
    """One line for each format whose library is not installed, or that does not fit the others or the checkpoint."""
    found = []
    for format in formats:
        for library in NEEDED.get(format, NEEDED.get(format.partition("-")[0], ())):
            if find_spec(library) is None:
                found.append(f"formats: {format} needs the library {library}: pip install -e '.[{EXTRAS[library]}]'")
    weights = [format for format in dict.fromkeys(formats) if format.startswith("safetensors")]
    if len(weights) > 1:
        found.append(f"formats: {' and '.join(weights)} have the same file names; export each into its own --output")
    if "adapter" in formats and not (checkpoint / "adapter_config.json").is_file():
        found.append(f"formats: {checkpoint} holds no adapters; leave adapter out")
    return found


def check_formats(formats: Sequence[str], model: Any, tokenizer: Any, opens_with: str) -> None:
    """`UserError` if a format cannot hold the model or its tokenizer."""
    from exporting.gguf_file import check_gguf

    if any(format.startswith("gguf") for format in formats):
        check_gguf(model, tokenizer)
    others = [format for format in formats if format != "safetensors"]
    if others and opens_with not in SUPPORTED_HEADS:
        raise UserError(f"{others[0]}: {opens_with} is not supported; only {' and '.join(SUPPORTED_HEADS)}")


SUPPORTED_HEADS = ("AutoModelForCausalLM", "AutoModelForMaskedLM")
HALVES = {"bf16": "bfloat16", "f16": "float16"}


def write_formats(
    formats: Sequence[str], model: Any, tokenizer: Any, checkpoint: Path, folder: Path, opens_with: str, name: str,
    *, adapters: Any = None, max_shard_size: str = "5GB",
) -> list[dict[str, Any]]:  # fmt: skip
    """Write the formats into `folder`, which holds what `save_pretrained` wrote, and ask the readers; a row per file.

    `model` is the checkpoint's, in fp32 on the CPU, adapters merged; `adapters` is the model before that. The weights of
    safetensors are removed if they are not among the formats.
    """
    from exporting.onnx_graph import suit_transformers_js
    from exporting.receipts import READERS, ask_checkpoint, check_file, held_out_rows

    if opens_with not in SUPPORTED_HEADS:  # the comparison of logits in export.py is all there is
        return []
    causal = opens_with == "AutoModelForCausalLM"
    rows = held_out_rows(checkpoint, model, tokenizer)
    questions: Questions = ask_checkpoint(model, tokenizer, rows, opens_with, causal)
    if any(format.startswith("onnx") for format in formats):
        suit_transformers_js(folder, tokenizer)
    found = []
    for format in dict.fromkeys("gguf-f32" if format == "gguf" else format for format in formats):
        started = time.perf_counter()
        if format == "adapter":
            files = _write_adapter(adapters, tokenizer, folder / "adapter")
        elif format.startswith("safetensors"):
            files = _write_weights(format, model, folder, max_shard_size)
        else:
            files = _write(format, model, tokenizer, folder, causal, name)
        row = {"format": format, "file": str(files[0].relative_to(folder)), "files": len(files)}
        row |= {"bytes": sum(f.stat().st_size for f in files), "seconds": round(time.perf_counter() - started, 1)}
        target = files[0].parent if READERS[format.partition("-")[0]] == "transformers" else files[0]
        started = time.perf_counter()
        row |= check_file(format, target, questions, model.config.model_type)
        found.append(row | {"seconds_of_receipt": round(time.perf_counter() - started, 1)})
    if not any(format.startswith("safetensors") for format in formats):
        _remove_weights(folder)
    if "onnx" not in formats:
        for path in folder.glob("onnx/model.onnx*"):  # onnx-int8 is made from it
            path.unlink()
    return found


def _write_weights(format: str, model: Any, folder: Path, max_shard_size: str) -> list[Path]:
    """The weights are there in fp32, and are written again for another precision."""
    if (precision := format.partition("-")[2]) in HALVES:
        import torch

        _remove_weights(folder)
        rounded = copy.deepcopy(model).to(getattr(torch, HALVES[precision]))
        rounded.save_pretrained(folder, max_shard_size=max_shard_size)
    return sorted(folder.glob("model*.safetensors"))


def _remove_weights(folder: Path) -> None:
    for path in folder.glob("model*.safetensors*"):
        path.unlink()


def _write_adapter(model: Any, tokenizer: Any, folder: Path) -> list[Path]:
    """What belongs beside a base model: the adapters, the tokenizer, and the tokens that end a text."""
    model.save_pretrained(folder)
    (folder / "README.md").unlink(missing_ok=True)  # peft's, with nothing filled in
    tokenizer.save_pretrained(folder)
    model.get_base_model().generation_config.save_pretrained(folder)
    return sorted(folder.glob("*.safetensors"))


def _write(format: str, model: Any, tokenizer: Any, folder: Path, causal: bool, name: str) -> list[Path]:
    from exporting.gguf_file import QUANTISER_TYPES, write_gguf, write_modelfile, write_quantised_gguf
    from exporting.onnx_graph import quantize_onnx, write_onnx

    family, _, precision = format.partition("-")
    if family == "gguf":
        path = folder / f"model-{precision}.gguf"
        if precision in QUANTISER_TYPES:
            write_quantised_gguf(model, tokenizer, path, precision, name)
        else:
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
    raise ValueError(format)


def low_space(folder: Path, needed: int) -> str:
    """What to add to the message of a program that failed to write: libraries often do not say that a disk is full."""
    folder = next(path for path in (folder, *folder.parents) if path.exists())
    free = shutil.disk_usage(folder).free
    return (
        f"; the disk of {folder} has {readable(free)} free, and {readable(needed)} are needed" if free < needed else ""
    )


def failed(rows: list[dict[str, Any]]) -> list[str]:
    """What differed, one line per file."""
    return [f"{row['file']}: {'; '.join(row['faults'])}" for row in rows if row["faults"]]


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as lines of a table for the console."""
    head = ("file", "size", "seconds", "reader", "ids", "positions", "log-prob. diff.", "perplexity", "greedy", "stop",
            "receipt")  # fmt: skip
    lines: list[tuple[str, ...]] = [head, *map(line_cells, rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines
    )


def line_cells(row: dict[str, Any]) -> tuple[str, ...]:
    """A row of the report under the head of `table`."""
    more = f" and {row['files'] - 1} more" if row["files"] > 1 else ""
    size = (row["file"] + more, readable(row["bytes"]), f"{row['seconds']:.1f}")
    if "reader" not in row:
        return (*size, *"-------", row["receipt"])
    greedy = f"{row['greedy_tokens_equal']}/{row['greedy_tokens']}" if "greedy_tokens" in row else "-"
    stop = {True: "yes", False: "no", None: "-"}[row.get("stops")]
    perplexity = f"{row['perplexity_before']:.2f} → {row['perplexity']:.2f}"
    difference = f"{row['max_log_probability_difference']:.1e}"
    figures = (f"{row['texts_with_equal_ids']}/4", str(row["positions"]), difference, perplexity)
    return (*size, row["reader"], *figures, greedy, stop, row["receipt"].partition(":")[0])
