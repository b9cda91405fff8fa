"""Low-rank adapters by peft: a checkpoint holds only them, and names the weights that they belong to."""

import hashlib
import json
from functools import cache
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from utils.cli import UserError
from utils.config import LoraConfig
from utils.files import hash_file, read_json, short
from utils.pretrained import check_peft

BASE_FILE = "base.json"


def import_peft() -> Any:
    check_peft()
    import peft

    return peft


def add_adapters(model: PreTrainedModel, config: LoraConfig) -> Any:
    """`model` with frozen weights and trainable adapters beside them; `UserError` if no adapter fits."""
    peft = import_peft()
    if type(model).__name__ not in (model.config.architectures or []):
        saved = (model.config.architectures or ["a model without a head"])[0]
        untrained = f"the head of {type(model).__name__} would be new and remain untrained"
        remedy = "train all weights (model.lora.rank 0)"
        raise UserError(f"model.lora: {model.name_or_path} was saved as {saved}; {untrained}: {remedy}")
    targets = "all-linear" if config.target_modules == ["all-linear"] else config.target_modules
    lora = peft.LoraConfig(r=config.rank, lora_alpha=config.alpha, lora_dropout=config.dropout, target_modules=targets)
    try:
        return peft.get_peft_model(model, lora)
    except ValueError as error:
        raise UserError(f"model.lora: {short(error)}") from None


def has_adapters(folder: str | Path) -> bool:
    return (Path(folder) / "adapter_config.json").is_file()


def base_of(folder: str | Path) -> str:
    """Name of the model that saved adapters belong to; `UserError` if its weights have changed since."""
    path = Path(folder) / BASE_FILE
    saved = read_json(path)
    name, digest = saved.get("name"), saved.get("sha256")
    if not isinstance(name, str) or not isinstance(digest, str | None):
        raise UserError(f"{path}: does not name the weights that the adapters belong to")
    if digest and not Path(name).is_dir():
        raise UserError(f"{folder} holds adapters for {name}, which does not exist here; run from the same folder")
    if digest != hash_weights(name):
        raise UserError(f"{folder} holds adapters for {name}, whose weights have changed since; restore them")
    if has_adapters(name):
        raise UserError(f"{path}: names {name}, which holds adapters itself; merge them with export.py first")
    return name


def save_base(model: Any, folder: Path) -> None:
    """Write the name and hash of the weights that saved adapters belong to beside them."""
    name = model.get_base_model().name_or_path
    (folder / BASE_FILE).write_text(json.dumps({"name": name, "sha256": hash_weights(name)}), encoding="utf-8")


@cache  # a second per GB, once per process
def hash_weights(name: str) -> str | None:
    """SHA-256 over the weights of a local folder; None for a name on the Hub."""
    digest = hashlib.sha256()
    for path in sorted(Path(name).glob("*.safetensors")):
        digest.update(bytes.fromhex(hash_file(path)))
    return digest.hexdigest() if Path(name).is_dir() else None


def without_adapters(model: Any) -> Any:
    """The model of transformers inside peft's wrapper, or `model` itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model
