"""What others may have saved: tokenizers, configurations, weights. All calls of transformers' `from_pretrained` are here.

A folder is data. No code of its own is run (`auto_map`), nothing is unpickled (`.bin`, `.pt`), sizes are bounded, and whatever
is wrong is a `UserError`.
"""

from pathlib import Path
from typing import Any

from utils.files import UserError, read_json

# transformers is imported where it is needed: it brings torch, two seconds that --help and a mistake need not wait.

MAX_VOCABULARY = 1 << 20  # entries of a tokenizer; Gemma's 262,144 are about the most that have been published
MAX_TOKENIZER_BYTES = 256 * MAX_VOCABULARY  # of one of its files; published ones have up to 130 bytes per entry
MAX_LAYERS = 10_000  # blocks of a model: each is built before a weight is read
FLOATS = ("F64", "F32", "F16", "BF16")
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"


def read_tokenizer(name: str | Path) -> Any:
    """The tokenizer of a folder, or of a name on the Hub; `UserError` if there is none, or one out of bounds."""
    from transformers import AutoTokenizer

    _check_tokenizer_files(Path(name))
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
        _check_ids(name, tokenizer.get_vocab().values())
    except UserError:
        raise
    except Exception as error:  # each format is read, and fails, in its own way
        raise UserError(f"{name}: no tokenizer can be loaded from here: {short(error)}") from None
    return tokenizer


def _check_tokenizer_files(folder: Path) -> None:
    """Before a tokenizer is built, which takes some hundred bytes per entry."""
    for path in sorted(folder.glob("*")):
        if path.suffix in (".json", ".txt", ".model", ".jinja") and path.stat().st_size > MAX_TOKENIZER_BYTES:
            raise UserError(
                f"{path}: has {path.stat().st_size:,} bytes; a file of a tokenizer has at most {MAX_TOKENIZER_BYTES:,}"
            )
    path = folder / "tokenizer.json"
    if not path.is_file():
        return
    data = path.read_bytes()
    if (
        number := max(data.count(b'":'), data.count(b"["))
    ) > 2 * MAX_VOCABULARY:  # so many need not be read to be refused
        raise UserError(f"{path}: a tokenizer of some {number:,} entries; at most {MAX_VOCABULARY:,} are taken")
    del data
    saved = read_json(path)
    model, added = saved.get("model"), saved.get("added_tokens") or []
    vocabulary = model.get("vocab") if isinstance(model, dict) else None
    if not isinstance(vocabulary, dict | list) or not isinstance(added, list):
        raise UserError(f"{path}: has no vocabulary")
    ids = list(vocabulary.values()) if isinstance(vocabulary, dict) else list(range(len(vocabulary)))
    _check_ids(path, ids + [token.get("id") for token in added if isinstance(token, dict)])


def _check_ids(where: str | Path, ids: Any) -> None:
    if len(ids) > MAX_VOCABULARY:
        raise UserError(f"{where}: a tokenizer of {len(ids):,} entries; at most {MAX_VOCABULARY:,} are taken")
    for number in ids:
        if type(number) is not int or not 0 <= number < MAX_VOCABULARY:
            shown = f"{number:,}" if type(number) is int and abs(number) < 1 << 64 else repr(number)[:40]
            raise UserError(f"{where}: a tokenizer with the token id {shown}; ids are from 0 to {MAX_VOCABULARY - 1:,}")


def chat_ids(tokenizer: Any, messages: list[dict[str, str]], **options: Any) -> list[int]:
    """A conversation by the tokenizer's chat template, a small program of whoever saved it, which runs in a sandbox."""
    try:
        return tokenizer.apply_chat_template(messages, return_dict=True, **options)["input_ids"]
    except Exception as error:  # whatever a program may raise
        raise UserError(f"the tokenizer's chat template fails: {type(error).__name__}: {short(error)}") from None


def read_config(name: str | Path) -> Any:
    """The configuration of the model in a folder, or of a name on the Hub."""
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(name, trust_remote_code=False)
        layers = [value for key, value in vars(config).items() if key.endswith(("layers", "n_layer", "n_layers"))]
    except Exception as error:  # each class checks in its own way
        raise UserError(f"{name}: no model can be loaded from here: {short(error)}") from None
    for value in layers:
        if isinstance(value, int) and not 0 <= value <= MAX_LAYERS:
            raise UserError(f"{name}: config.json asks for {value:,} layers; at most {MAX_LAYERS:,} are built")
    if not isinstance(config.architectures, list | None):
        raise UserError(f"{name}: config.json names {config.architectures!r} as its architectures, which is no list")
    if getattr(config, "quantization_config", None) is not None:
        raise UserError(f"{name}: its weights are quantized; take those that they were made of")
    return config


def read_weights(auto_model: Any, name: str | Path, config: Any, **options: Any) -> Any:
    """The model of `config` with the weights at `name`. Only a head that they were not saved with may be new."""
    from transformers.utils import logging

    _check_weight_files(Path(name))
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # its report of what does not fit is many lines long
    try:
        model, found = auto_model.from_pretrained(
            name, config=config, use_safetensors=True, trust_remote_code=False, output_loading_info=True,
            **options,
        )  # fmt: skip
    except Exception as error:  # each format is read, and fails, in its own way
        why = short(error)
        if "ignore_mismatched_sizes" in why:  # which points to the report
            why = "its tensors have other shapes than its config.json says"
        raise UserError(f"{name}: no model for this objective can be loaded from here: {why}") from None
    finally:
        logging.set_verbosity(verbosity)
    _check_types(Path(name), {key for key, _ in model.named_parameters()})
    if found["missing_keys"] and type(model).__name__ in (config.architectures or []):
        missing = sorted(found["missing_keys"])
        raise UserError(f"{name}: its weights lack {len(missing)} tensors of the model: {', '.join(missing[:3])}")
    if found["missing_keys"]:
        print(f"{name}: its weights lack {', '.join(sorted(found['missing_keys']))}, which begin as new")
    return model


def read_adapters(peft: Any, model: Any, folder: str | Path) -> Any:
    """`model` with the adapters of a folder beside its weights, trainable."""
    if not (Path(folder) / "adapter_model.safetensors").is_file():
        raise UserError(f"{folder}: adapter_model.safetensors is missing; nothing else is loaded as adapters")
    try:
        options = peft.PeftConfig.from_pretrained(str(folder))
        if not isinstance(options, peft.LoraConfig):
            raise UserError(f"{folder}: holds adapters of the kind {options.peft_type}; LoRA's are supported")
        return peft.PeftModel.from_pretrained(model, str(folder), config=options, is_trainable=True)
    except UserError:
        raise
    except Exception as error:  # as above
        raise UserError(f"{folder}: no adapters can be loaded from here: {short(error)}") from None


def _check_weight_files(folder: Path) -> None:
    """Weights in several files are named by an index, which could name any file."""
    if not folder.is_dir() or (folder / WEIGHTS).is_file() or not (folder / INDEX).is_file():
        return
    files = read_json(folder / INDEX).get("weight_map")
    for file in files.values() if isinstance(files, dict) else [files]:
        if not isinstance(file, str) or Path(file).name != file or Path(file).suffix != ".safetensors":
            raise UserError(f"{folder / INDEX}: names {file!r}, which is no .safetensors file of this folder")


def _check_types(folder: Path, parameters: set[str]) -> None:
    """Numbers of another type would be converted without a word."""
    from safetensors import safe_open

    for path in sorted(folder.glob("model*.safetensors")):
        with safe_open(path, "pt") as file:
            for name in parameters.intersection(file.keys()):
                if (kind := file.get_slice(name).get_dtype()) not in FLOATS:
                    raise UserError(f"{path}: {name} holds {kind}; weights are one of {', '.join(FLOATS)}")


def short(error: Exception) -> str:
    """The beginning of a message, on one line."""
    return " ".join(str(error).split())[:200] or type(error).__name__
