"""Tokenizers, configurations and weights that others saved. All calls of transformers' `from_pretrained` are here.
A folder is data: none of its code runs (`auto_map`), nothing is unpickled (`.bin`, `.pt`); a fault is a `UserError`."""

import hashlib
import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from utils.checkpoints import find_checkpoint, is_pointer, list_checkpoints
from utils.files import UserError, read_json, short

# transformers is imported inside functions: it imports torch, two seconds that --help and a mistake need not wait for.

FLOATS = ("F64", "F32", "F16", "BF16")
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
GENERATION_FILE = "generation_config.json"
OURS = ("data/", "exports/", "models/", "runs/")  # folders of the README's commands, not names on the Hub
DIGITS_AS_LETTERS = str.maketrans("0123456789", "ghijklmnop")
PROCESSOR_FILES = ("processor_config.json", "preprocessor_config.json")
TOKENIZER_FILES = ("tokenizer.json", "vocab.json", "vocab.txt", "tokenizer.model", "spiece.model")


def resolve_name(name: str | Path) -> str:
    """`name`, or the checkpoint folder that it stands for if it is RUN/checkpoints/best or another pointer of a run;
    `UserError` if that is gone."""
    return str(find_checkpoint(name)) if is_pointer(Path(name)) else str(name)


def check_name(option: str, name: str, files: tuple[str, ...]) -> None:
    """`UserError` if `name`, the value of `option`, is a path that holds none of `files`: a run, adapters, a file, a
    folder that is not there. A name on the Hub passes. Imports and reads no model, so that a mistake is refused at once.
    """
    folder, wrong = Path(resolve_name(name)), f"{option} {name}"
    if folder.is_file():
        convert = f"convert it: python examples/import_gguf.py {name} models/{folder.stem}"
        raise UserError(
            f"{wrong} is a file; {convert if folder.suffix == '.gguf' else 'give the folder that holds it'}"
        )
    if not folder.is_dir():
        if name.count("/") > 1 or name.startswith((".", "/", "~", *OURS)):
            raise UserError(f"{wrong}: there is no such folder")
        return
    if any((folder / file).is_file() for file in files):
        return
    run = folder.parent if list_checkpoints(folder) else folder  # it may be RUN/checkpoints
    where = folder.parent.parent if folder.parent.name == "checkpoints" else run
    names = (f"exports/{where.resolve().name}{suffix}" for suffix in ("", *(f"_{number}" for number in range(2, 1000))))
    output = next(path for path in names if not Path(path).exists())
    export = f"export it first, and give {output}: python export.py --checkpoint {name} --output {output}"
    if (run / "config.yaml").is_file() or (run / "checkpoints").is_dir():
        saved = any((run / "checkpoints").glob("step-*"))
        raise UserError(f"{wrong} is a run{f'; {export}' if saved else ' without a checkpoint so far'}")
    if (folder / "state.json").is_file():
        raise UserError(f"{wrong} holds adapters; {export}")
    if (folder / "adapter_config.json").is_file():
        merge = f"AutoPeftModelForCausalLM.from_pretrained('{name}').merge_and_unload().save_pretrained('{output}')"
        merge = f'python -c "from peft import AutoPeftModelForCausalLM; {merge}"'
        raise UserError(f"{wrong} holds adapters; merge them first, and give {output}: {merge}")
    if (folder / "tokenizer").is_dir():
        raise UserError(f"{wrong} is a dataset; its tokenizer is in {folder / 'tokenizer'}")
    raise UserError(f"{wrong} holds no {files[0]}; give the folder of an export, or one that `save_pretrained` wrote")


def check_weights(folder: Path) -> None:
    """`UserError` if a folder holds no weights that transformers opens, as an export to other formats. The files of a
    checkpoint are checked where it is read."""
    if any((folder / file).is_file() for file in (WEIGHTS, INDEX, "state.json")):
        return
    adapters = f"; its adapters are in {folder / 'adapter'}" if (folder / "adapter").is_dir() else ""
    remedy = "export the run with --formats '[safetensors]' into another --output"
    raise UserError(f"{folder} holds no {WEIGHTS}{adapters}; {remedy}")


def check_adapters(folder: Path) -> None:
    """`UserError` if the folder of a model holds adapters, and the library for them is missing."""
    if (folder / "adapter_config.json").is_file():
        check_peft()


def check_peft() -> None:
    """`UserError` if the library for adapters is missing."""
    if find_spec("peft") is None:
        raise UserError("adapters (model.lora) need the library peft: pip install -e '.[lora]'")


def read_tokenizer(name: str | Path) -> Any:
    """The tokenizer of a folder, or of a name on the Hub; `UserError` if there is none."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(resolve_name(name), trust_remote_code=False)
    except UserError:
        raise
    except Exception as error:  # each format fails in its own way
        raise UserError(f"{name}: no tokenizer can be loaded from here: {short(error)}") from None


def read_processor(name: str | Path) -> Any:
    """What makes a model's inputs: the processor of a folder or of a name on the Hub, or its tokenizer if it has none."""
    if Path(name).is_dir() and not any((Path(name) / file).is_file() for file in PROCESSOR_FILES):
        return read_tokenizer(name)
    from transformers import AutoProcessor

    try:
        return AutoProcessor.from_pretrained(name, trust_remote_code=False)
    except ImportError as error:
        missing = next((library for library in ("torchvision", "torchcodec", "num2words") if library in str(error)), "")
        remedy = f"pip install {missing}" if missing else short(error)
        raise UserError(f"{name}: its processor needs a library that is not installed: {remedy}") from None
    except Exception as error:  # each format fails in its own way
        raise UserError(f"{name}: no processor can be loaded from here: {short(error)}") from None


def tokenizer_of(processor: Any) -> Any:
    """The tokenizer in a processor, or `processor` itself."""
    return getattr(processor, "tokenizer", processor)


def hide_special_tokens(backend: Any) -> tuple[Any, dict[str, str]]:
    """A copy of a `tokenizers.Tokenizer` that encodes special tokens spelled out in a text as ordinary text, and the
    name that stands for each special token in its input instead. All ids are as before.

    The attribute `encode_special_tokens` is not enough: it is lost when a tokenizer is pickled, and many models have
    special tokens among their pieces, so that T5's writes </s> in a text as the end of the text. A special token of one
    character remains one.
    """
    from tokenizers import Tokenizer

    state = json.loads(backend.to_str())
    names = {}
    for token in state["added_tokens"]:
        if token["special"] and len(token["content"].strip()) > 1:
            letters = hashlib.blake2b(token["content"].encode(), digest_size=16).hexdigest()
            # Lower-case letters, which no normalizer changes; no text holds these.
            names[token["content"]] = f"<{letters.translate(DIGITS_AS_LETTERS)}>"
            token["content"] = names[token["content"]]
    model = state["model"]
    vocab = model["vocab"]
    if isinstance(vocab, dict):
        model["vocab"] = {names.get(piece, piece): id for piece, id in vocab.items()}
    else:
        model["vocab"] = [[names.get(piece, piece), score] for piece, score in vocab]
    if "merges" in model:
        model["merges"] = [pair for pair in model["merges"] if not {*pair, "".join(pair)} & names.keys()]
    if model.get("unk_token") in names:
        model["unk_token"] = names[model["unk_token"]]
    return Tokenizer.from_str(json.dumps(state)), names


def chat_ids(tokenizer: Any, messages: list[dict[str, str]], **options: Any) -> list[int]:
    """A conversation as ids, by the tokenizer's chat template, a program that runs in Jinja's sandbox."""
    try:
        return tokenizer.apply_chat_template(messages, return_dict=True, **options)["input_ids"]
    except Exception as error:  # a program may raise anything
        raise UserError(f"the tokenizer's chat template fails: {type(error).__name__}: {short(error)}") from None


def prompt_ids(tokenizer: Any, text: str) -> list[int]:
    """The ids of a text that is to be continued: without the end token, which some tokenizers put behind every text."""
    ids = tokenizer(text)["input_ids"]
    return ids[:-1] if len(ids) > 1 and ids[-1] == tokenizer.eos_token_id else ids


def read_config(name: str | Path) -> Any:
    """The configuration of the model in a folder, or of a name on the Hub."""
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(name, trust_remote_code=False)
    except Exception as error:  # each class checks in its own way
        raise UserError(f"{name}: no model can be loaded from here: {short(error)}") from None
    if not isinstance(config.architectures, list | None):
        raise UserError(f"{name}: the architectures in config.json are {config.architectures!r}, which is no list")
    if hasattr(config, "auto_map"):  # names code of the folder: it never runs, and is not saved beside the weights
        del config.auto_map
    if getattr(config, "quantization_config", None) is not None:
        raise UserError(f"{name}: its weights are quantized; use the weights that they were made from")
    return config


def read_weights(auto_model: Any, name: str | Path, config: Any, **options: Any) -> Any:
    """The model of `config` with the weights at `name`. Only a head that was not saved with them may be new."""
    from transformers.utils import logging

    _check_weight_files(Path(name))
    if (generation := Path(name) / GENERATION_FILE).is_file():
        read_json(generation)  # transformers would silently do without a file that it cannot read
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # its report of missing and unexpected tensors has many lines
    try:
        model, found = auto_model.from_pretrained(
            name, config=config, use_safetensors=True, trust_remote_code=False, output_loading_info=True, **options
        )
    except Exception as error:  # each format fails in its own way
        why = short(error)
        if "ignore_mismatched_sizes" in why:  # the message refers to the report
            why = "its tensors have other shapes than its config.json says"
        raise UserError(f"{name}: no model for this objective can be loaded from here: {why}") from None
    finally:
        logging.set_verbosity(verbosity)
    _check_types(Path(name), {key for key, _ in model.named_parameters()})
    missing = sorted(found["missing_keys"])
    if missing and type(model).__name__ in (config.architectures or []):
        raise UserError(f"{name}: its weights lack {len(missing)} tensors of the model: {', '.join(missing[:3])}")
    if missing:
        print(f"{name}: its weights lack {', '.join(missing)}, which are newly initialized")
    return model


def read_adapters(peft: Any, model: Any, folder: str | Path) -> Any:
    """`model` with the adapters of a folder beside its weights, trainable."""
    if not (Path(folder) / "adapter_model.safetensors").is_file():
        raise UserError(f"{folder}: adapter_model.safetensors is missing; no other file is loaded as adapters")
    try:
        options = peft.PeftConfig.from_pretrained(str(folder))
        if not isinstance(options, peft.LoraConfig):
            raise UserError(f"{folder}: holds adapters of the type {options.peft_type}; only LoRA is supported")
        return peft.PeftModel.from_pretrained(model, str(folder), config=options, is_trainable=True)
    except UserError:
        raise
    except Exception as error:  # as above
        raise UserError(f"{folder}: no adapters can be loaded from here: {short(error)}") from None


def _check_weight_files(folder: Path) -> None:
    """`UserError` if an index of weights in several files names a file outside the folder, or of another format."""
    if not folder.is_dir() or (folder / WEIGHTS).is_file() or not (folder / INDEX).is_file():
        return
    files = read_json(folder / INDEX).get("weight_map")
    for file in files.values() if isinstance(files, dict) else [files]:
        if not isinstance(file, str) or Path(file).name != file or Path(file).suffix != ".safetensors":
            raise UserError(f"{folder / INDEX}: names {file!r}, which is no .safetensors file of this folder")


def _check_types(folder: Path, parameters: set[str]) -> None:
    """`UserError` if a weight is no floating-point number: loading would silently convert it."""
    from safetensors import safe_open

    for path in sorted(folder.glob("model*.safetensors")):
        with safe_open(path, "pt") as file:
            for name in parameters.intersection(file.keys()):
                if (kind := file.get_slice(name).get_dtype()) not in FLOATS:
                    raise UserError(f"{path}: {name} holds {kind}; weights are one of {', '.join(FLOATS)}")
