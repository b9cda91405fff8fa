"""Low-rank adapters by peft: a checkpoint holds them alone, and says which weights they stand beside."""

import hashlib
import json
from functools import cache
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from utils.cli import UserError
from utils.config import LoraConfig
from utils.files import hash_file, read_json

BASE_FILE = "base.json"


def import_peft() -> Any:
    try:
        import peft
    except ImportError:
        raise UserError("model.lora needs the library peft: pip install -e '.[lora]'") from None
    return peft


def add_adapters(model: PreTrainedModel, config: LoraConfig) -> Any:
    """`model` with its weights frozen and trainable adapters beside them; `UserError` if none fits."""
    peft = import_peft()
    if type(model).__name__ not in (model.config.architectures or []):
        saved = (model.config.architectures or ["a model without a head"])[0]
        raise UserError(
            f"model.lora: {model.name_or_path} was saved as {saved}; the head of {type(model).__name__} would be new and "
            "stay untrained. Train all weights (model.lora.rank 0)"
        )
    targets = "all-linear" if config.target_modules == ["all-linear"] else config.target_modules
    options = peft.LoraConfig(
        r=config.rank, lora_alpha=config.alpha, lora_dropout=config.dropout, target_modules=targets
    )
    try:
        return peft.get_peft_model(model, options)
    except ValueError as error:
        raise UserError(f"model.lora: {' '.join(str(error).split())[:200]}") from None


def has_adapters(folder: str | Path) -> bool:
    return (Path(folder) / "adapter_config.json").is_file()


def base_of(folder: str | Path) -> str:
    """Name of the model that saved adapters stand beside; `UserError` if its weights are no longer the same."""
    path = Path(folder) / BASE_FILE
    saved = read_json(path)
    if not isinstance(saved.get("name"), str) or not isinstance(saved.get("sha256"), str | None):
        raise UserError(f"{path}: does not say which weights the adapters belong to")
    if not Path(saved["name"]).is_dir() and saved.get("sha256"):
        raise UserError(f"{folder} holds adapters for {saved['name']}, which is not there; call from the same folder")
    if saved.get("sha256") != hash_weights(saved["name"]):
        raise UserError(f"{folder} holds adapters for {saved['name']}, whose weights have changed since; restore them")
    if has_adapters(saved["name"]):
        raise UserError(f"{path}: names {saved['name']}, which holds adapters itself; merge them by export.py first")
    return str(saved["name"])


def save_base(model: Any, folder: Path) -> None:
    """Write beside saved adapters which weights they belong to."""
    name = model.get_base_model().name_or_path
    text = json.dumps({"name": name, "sha256": hash_weights(name)})
    (folder / BASE_FILE).write_text(text, encoding="utf-8")


@cache  # a second per GB, once per process
def hash_weights(name: str) -> str | None:
    """SHA-256 over the weights of a local folder; None for a name on the Hub."""
    digest = hashlib.sha256()
    for path in sorted(Path(name).glob("*.safetensors")):
        digest.update(bytes.fromhex(hash_file(path)))
    return digest.hexdigest() if Path(name).is_dir() else None


def without_adapters(model: Any) -> Any:
    """The model of transformers in peft's wrapper, or as it is."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model
