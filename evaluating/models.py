"""The models to evaluate: a run, a checkpoint, an export, a folder that `save_pretrained` wrote, or a GGUF file.

Options are checked without torch: it is imported in the functions that read a model.
"""

import contextlib
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from utils.checkpoints import find_checkpoint, resolve_checkpoint
from utils.cli import UserError, parse_sections
from utils.config import ScoringConfig
from utils.files import flatten, read_json, read_yaml, short
from utils.pretrained import check_adapters, check_weights, read_config, read_processor


def is_export(path: Path) -> bool:
    return (path / "config.json").is_file() and not (path / "state.json").is_file()


def is_gguf(path: Path) -> bool:
    return path.suffix == ".gguf" and path.is_file()


def find_mistake(name: str) -> str | None:
    """Why no model can be read at `name`, as far as the names of its files say; None if one can."""
    path = Path(name)
    try:
        if is_gguf(path):
            with path.open("rb") as file:
                if file.read(4) != b"GGUF":
                    return f"{name} is not a GGUF file"
            return None if find_spec("gguf") else f"{name}: GGUF needs the library gguf: pip install -e '.[gguf]'"
        folder = path if is_export(path) else find_checkpoint(path)
        check_weights(folder)
        check_adapters(folder)
    except UserError as error:
        files = sorted(path.glob("*.gguf"))
        return f"{error}, or give {files[0]}" if files else str(error)
    return None


@dataclass(frozen=True)
class Candidate:
    """A model to evaluate."""

    name: str  # as the user calls it
    path: Path  # the folder or GGUF file to load it from
    run: ScoringConfig | None  # the options that its run scored with; an export's report keeps them
    dataset: str | None  # its run's; None outside a run
    options: dict[str, Any]  # of its run, by their flat names, as far as they are known


def locate(name: str) -> Candidate:
    """Find the model `name`. Checks every byte of a checkpoint, and loads nothing."""
    path = Path(name)
    if is_gguf(path):
        return Candidate(name, path, None, None, {})
    if is_export(path):
        report = path / "export_report.json"
        exported_from = read_json(report).get("run") if report.is_file() else None
        if exported_from is None:
            return Candidate(name, path, None, None, {})
        return Candidate(name, path, parse_sections(ScoringConfig, exported_from, report), None, flatten(exported_from))
    checkpoint = resolve_checkpoint(path)
    run_config = checkpoint.parent.parent / "config.yaml"
    if not run_config.is_file():
        return Candidate(name, checkpoint, None, None, {})
    values = read_yaml(run_config)
    run = parse_sections(ScoringConfig, values, run_config)
    return Candidate(name, checkpoint, run, run.data.dataset, flatten(values))


def load_processor(candidate: Candidate) -> Any:
    """What makes the model's inputs: its tokenizer, or its processor for pictures or sounds."""
    if not is_gguf(candidate.path):
        read_architecture(candidate)  # a tokenizer's class reads config.json too, but names its faults worse
        return read_processor(candidate.path)
    from transformers import AutoTokenizer

    try:
        with alone(candidate.path) as folder:
            return AutoTokenizer.from_pretrained(folder, gguf_file=candidate.path.name)
    except Exception as error:  # each architecture fails in its own way
        raise UserError(f"{candidate.name}: transformers cannot read its tokenizer: {short(error)}") from None


@contextlib.contextmanager
def alone(path: Path) -> Iterator[str]:
    """A folder that holds only a link to the GGUF file at `path`: of an export, transformers would mix the file's
    tokenizer and configuration with those beside it."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / path.name).symlink_to(path.resolve())
        yield folder


def load(candidate: Candidate) -> Any:
    """The model in fp32; the weights of a GGUF file are dequantized by transformers."""
    from utils.model.build import load_model

    if not is_gguf(candidate.path):
        return load_model(candidate.path)
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # its report of tensors that do not fit has many lines
    read: Any = AutoModelForCausalLM.from_pretrained
    file = {"gguf_file": candidate.path.name, "dtype": torch.float32}
    try:
        with alone(candidate.path) as folder:
            model, found = read(folder, **file, output_loading_info=True)
    except Exception as error:  # each architecture fails in its own way
        why = "its tensors have other shapes" if "ignore_mismatched_sizes" in str(error) else short(error)
        why = f"transformers cannot read this GGUF file: {why}"
        raise UserError(f"{candidate.name}: {why}; evaluate the folder that it was made from") from None
    finally:
        logging.set_verbosity(verbosity)
    if missing := sorted(found["missing_keys"]):
        why = f"transformers finds no weights for {', '.join(missing[:3])} in this GGUF file"
        raise UserError(f"{candidate.name}: {why}; evaluate the folder that it was made from")
    return model


def read_architecture(candidate: Candidate) -> Any:
    """The configuration of the model, without adapters."""
    from utils.model.adapters import base_of, has_adapters

    if not is_gguf(candidate.path):
        return read_config(base_of(candidate.path) if has_adapters(candidate.path) else candidate.path)
    from transformers import AutoConfig

    try:
        with alone(candidate.path) as folder:
            return AutoConfig.from_pretrained(folder, gguf_file=candidate.path.name)
    except Exception as error:  # each architecture fails in its own way
        why = f"transformers cannot read this GGUF file: {short(error)}"
        raise UserError(f"{candidate.name}: {why}; evaluate the folder that it was made from") from None


def own_length(candidate: Candidate) -> int:
    """Positions per row that a model is scored with unless told otherwise: its run's, or as many as it can read.
    `sys.maxsize` for a model without a limit."""
    if candidate.run is not None:
        return candidate.run.data.sequence_length
    import torch

    from utils.model.build import longest_sequence, saved_class

    architecture = read_architecture(candidate)
    with torch.device("meta"):
        return longest_sequence(saved_class(architecture).from_config(architecture))


def shared_length(candidates: list[Candidate], given: int | None) -> int:
    """Positions per row for all models: `given`, or the least of their own, so that none has more context."""
    length = given or min(own_length(candidate) for candidate in candidates)
    if length == sys.maxsize:
        raise UserError("the model has no longest sequence and is not in a run folder; give --sequence_length")
    return length
