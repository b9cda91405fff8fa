"""The model: from its configuration, a pretrained folder or a checkpoint; copies of it without memory."""

import contextlib
import copy
import dataclasses
import logging
import re
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import torch
import transformers
from torch import nn
from transformers import CONFIG_MAPPING, GenerationConfig, PreTrainedConfig, PreTrainedModel
from transformers.activations import ACT2FN
from transformers.utils import logging as transformers_logging

from utils.cli import UserError, nearest
from utils.config import SIZE_NAMES, SIZE_OVERRIDES, ModelConfig
from utils.files import flatten, short
from utils.model.adapters import add_adapters, base_of, has_adapters, import_peft
from utils.model.initialization import INITIALIZATIONS
from utils.pretrained import (
    TOKENIZER_FILES,
    chat_ids,
    read_adapters,
    read_config,
    read_tokenizer,
    read_weights,
    resolve_name,
)

Module = TypeVar("Module", bound=nn.Module)
# Names of transformers' classes that open a saved model, by the objective's head.
AUTO_MODELS = (
    "AutoModelForCausalLM", "AutoModelForMaskedLM", "AutoModelForSeq2SeqLM", "AutoModelForImageTextToText",
    "AutoModelForSpeechSeq2Seq",
)  # fmt: skip
# Those whose model predicts the next token of its own input.
DECODERS = (transformers.AutoModelForCausalLM, transformers.AutoModelForImageTextToText)
# Values of `model.attention` that `use_kernels` applies when the device is known; before, the architecture's default.
DEFERRED_ATTENTION = {"auto": None, "blocked": None, "varlen": None}
# Our name of a size → further names in configuration classes, beyond transformers' own `attribute_map`.
OTHER_NAMES = {"intermediate_size": ("n_inner", "d_ff", "ffn_dim"), "max_position_embeddings": ("n_positions",)}
FURTHER_SIZES = ("num_key_value_heads", "head_dim", "d_kv", "num_decoder_layers")


def build_model(
    config: ModelConfig, tokenizer: Any, auto_model: Any = transformers.AutoModelForCausalLM, *, weights: bool = True
) -> PreTrainedModel:
    """A model in fp32 with an embedding row for each token; the caller seeds torch first. `auto_model` is the
    objective's. Without `weights`, for a model on the meta device, those of `config.pretrained` are not read.
    `UserError` if the options do not fit, or `config.pretrained` cannot be loaded or has another tokenizer."""
    if config.pretrained is not None:
        config = dataclasses.replace(config, pretrained=resolve_name(config.pretrained))
    special = special_tokens(tokenizer)
    # A decoder's embedding does not train the row of its padding token, so that must be none that texts contain.
    if auto_model in DECODERS and pad_token_id(tokenizer) in (*special.values(),)[:2]:
        special["pad_token_id"] = None
    architecture = build_architecture(config, auto_model, special)
    text = text_config(architecture)
    # A folder often has more rows than its tokenizer has tokens; they stay.
    is_text_saved = config.pretrained is not None or any(map(is_of_text, config.parts.values()))
    entries = max(len(tokenizer), text.vocab_size if is_text_saved else 0)
    rows = -(-entries // config.vocabulary_multiple) * config.vocabulary_multiple
    if config.pretrained is None and hasattr(architecture, "image_token_id"):
        architecture.image_token_id = tokenizer.convert_tokens_to_ids(image_token(tokenizer))
    if config.pretrained is not None and weights:
        model = load_pretrained(config, tokenizer, auto_model, architecture, rows)
    else:
        text.vocab_size = rows
        try:
            attention = DEFERRED_ATTENTION.get(config.attention, config.attention)
            model = auto_model.from_config(architecture, attn_implementation=attention, dtype=torch.float32)
        except Exception as error:  # each class checks in its own way
            if blamed := find_unknown_value(config.overrides, error):
                raise UserError(blamed) from None
            why = f"model.architecture {architecture.model_type}: {short(error)}"
            raise UserError(f"{why}; choose another one, other sizes, objective.name or model.attention") from None
        INITIALIZATIONS[config.initialization](model)
    if config.pretrained is None and model.can_generate():
        model.generation_config = GenerationConfig()
    add_special_tokens(model, tokenizer)
    if config.parts and weights:
        load_parts(model, config, tokenizer)
    if config.lora.rank:
        model = add_adapters(model, config.lora)
    set_up_training(model, config)
    return model


def set_up_training(model: Any, config: ModelConfig) -> None:
    """What a checkpoint does not keep: which modules are frozen, and how activations are kept."""
    for module in find_modules(model, config.frozen, "model.frozen").values():
        module.requires_grad_(False)
    enable_activation_checkpointing(model, config)


def find_modules(model: nn.Module, names: Iterable[str], option: str) -> dict[str, nn.Module]:
    """The module of each of `names`, the last part of its path or all of it; `UserError` if there is none, or several."""
    paths = dict(model.named_modules())
    known = sorted({path.rpartition(".")[2] for path in paths if path and not path.rpartition(".")[2].isdigit()})
    found = {}
    for name in names:
        fitting = [path for path in paths if path == name or path.endswith(f".{name}")]
        if not fitting:
            raise UserError(f"{option}: {type(model).__name__} has no module {name}{nearest(name, known)}")
        if len(fitting) > 1:
            raise UserError(f"{option}: {name} is the name of {len(fitting)} modules; give a path, as in {fitting[0]}")
        found[name] = paths[fitting[0]]
    return found


@torch.no_grad()
def load_parts(model: Any, config: ModelConfig, tokenizer: Any) -> None:
    """Weights of `config.parts` in place of new ones. Rows of the embedding for tokens that a folder lacks stay new."""
    for name, module in find_modules(model, config.parts, "model.parts").items():
        folder = config.parts[name]
        is_text = is_of_text(folder)
        if is_text and not covers_vocabulary(tokenizer, folder):
            mismatch = f"model.parts: {name} {folder} was trained with another tokenizer than the dataset's"
            raise UserError(f"{mismatch}; prepare the data with --tokenizer.pretrained {folder}")
        auto_model = transformers.AutoModelForCausalLM if is_text else type(module)
        saved = read_weights(auto_model, folder, read_part(folder), dtype=torch.float32)
        heads = [(model.get_output_embeddings(), saved.get_output_embeddings())] if is_text else []
        for ours, theirs in [(module, saved.base_model if is_text else saved), *heads]:
            for key, value in theirs.state_dict().items():
                weight = ours.get_parameter(key)
                (weight[: len(value)] if value.ndim else weight).copy_(value)


def read_part(folder: str) -> Any:
    """The configuration of a part of a model; of CLIP's and its relatives' that of their vision model."""
    found = read_config(folder)
    return getattr(found, "vision_config", found)


def is_of_text(folder: str) -> bool:
    """Whether a part of a model is the one for text."""
    return hasattr(read_part(folder), "vocab_size")


def add_special_tokens(model: PreTrainedModel, tokenizer: Any) -> None:
    """Complete what `model`'s configurations, for computing and generating, say of special tokens; nothing else changes.

    A tokenizer without a bos token leaves the folder's, a second eos token stays, and so does a padding token or none:
    with another one a resumed run would train other rows of the embedding.
    """
    config, decoder_start = text_config(model.config), decoder_start_id(model, tokenizer)
    if tokenizer.bos_token_id is not None:
        config.bos_token_id = tokenizer.bos_token_id
    if tokenizer.eos_token_id not in as_list(config.eos_token_id):
        config.eos_token_id = tokenizer.eos_token_id
    if config.is_encoder_decoder:
        config.decoder_start_token_id = decoder_start
    if not model.can_generate():
        return
    generation = model.generation_config
    if generation.bos_token_id is None:
        generation.bos_token_id = config.bos_token_id
    if generation.pad_token_id is None:
        generation.pad_token_id = pad_token_id(tokenizer)
    if missing := [token for token in stop_token_ids(tokenizer) if token not in as_list(generation.eos_token_id)]:
        generation.eos_token_id = as_list(generation.eos_token_id) + missing
    if config.is_encoder_decoder:
        generation.decoder_start_token_id = decoder_start
    try:
        if not _is_savable(generation):  # many published folders set a temperature without this
            generation.do_sample = True
            generation.validate(strict=True)
    except ValueError as error:
        why = f"{model.name_or_path}: transformers would not save its generation_config.json again"
        raise UserError(f"{why}: {short(error)}; correct or remove that file") from None


def _is_savable(generation: GenerationConfig) -> bool:
    try:
        generation.validate(strict=True)
    except ValueError:
        return False
    return True


def special_tokens(tokenizer: Any) -> dict[str, Any]:
    """What a configuration says of a tokenizer's special tokens."""
    return {
        "bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": pad_token_id(tokenizer),
    }  # fmt: skip


def text_config(config: Any) -> Any:
    """The part of a configuration that describes the decoder of text, in place: itself for a model of text alone."""
    found = config.get_text_config(decoder=True)  # of an old encoder-decoder's, a changed copy
    return found if any(found is value for value in vars(config).values()) else config


def image_token(tokenizer: Any) -> str:
    """The placeholder of a picture in a text."""
    return getattr(tokenizer, "image_token", None) or "<image>"


def decoder_start_id(model: PreTrainedModel, tokenizer: Any) -> int:
    """The token with which every objective begins a decoder's input: the padding token; for speech, what the tokenizer
    puts in front of a text, if anything."""
    prefix = [] if model.main_input_name == "input_ids" else text_prefix(tokenizer)
    return prefix[0] if prefix else pad_token_id(tokenizer)


def text_prefix(tokenizer: Any) -> list[int]:
    """The special tokens that the tokenizer puts in front of a text."""
    ids, plain = tokenizer("a")["input_ids"], tokenizer("a", add_special_tokens=False)["input_ids"]
    return ids[: ids.index(plain[0])] if plain[0] in ids else []  # type: ignore[no-any-return]


def as_list(value: int | list[int] | None) -> list[int]:
    return value if isinstance(value, list) else [] if value is None else [value]


def build_architecture(config: ModelConfig, auto_model: Any, special: dict[str, Any]) -> Any:
    """transformers' own configuration; `config.dropout` goes to every dropout that the architecture has."""
    if config.pretrained is not None:
        architecture = read_config(config.pretrained)
    else:
        if config.architecture not in CONFIG_MAPPING:
            hint = nearest(config.architecture, CONFIG_MAPPING)
            raise UserError(f"model.architecture: transformers has no {config.architecture}{hint}")
        cls = CONFIG_MAPPING[config.architecture]
        fields = {item.name for item in dataclasses.fields(cls)}
        check_overrides(config.overrides, cls)
        is_nested = "text_config" in fields
        values: dict[str, Any] = {"tie_word_embeddings": config.tie_word_embeddings} | ({} if is_nested else special)
        for name, value in config.sizes().items():
            names = (cls.attribute_map.get(name, name), *OTHER_NAMES.get(name, ()))
            field = next((known for known in names if known in fields), None)
            if field is not None and value is not None:
                values[field] = value
            elif getattr(config, name) is not None:
                raise UserError(f"model.{name}: {cls.__name__} has no such field; set its own in model.overrides")
        if "num_key_value_heads" in fields and values.get("num_attention_heads") is not None:
            values["num_key_value_heads"] = values["num_attention_heads"]
        if config.num_attention_heads is None:
            values |= SIZE_OVERRIDES.get((config.architecture, config.size or ""), {})
        if config.architecture == "t5" and {"d_model", "num_heads"} <= values.keys():
            values["d_kv"] = values["d_model"] // values["num_heads"]
        for name, other in (("cls_token_id", "bos_token_id"), ("sep_token_id", "eos_token_id")):
            if name in fields:
                values[name] = special[other]
        for folder in config.parts.values():
            part = read_part(folder)
            values["text_config" if is_of_text(folder) else "vision_config"] = part
            if is_of_text(folder):
                values["tie_word_embeddings"] = part.tie_word_embeddings
        try:
            with warnings_of_rope_as_errors():
                architecture = cls(**(values | config.overrides))
        except Exception as error:  # each class checks in its own way
            raise UserError(f"model: {cls.__name__} rejects these values: {short(error)}") from None
        if is_nested:
            text_config(architecture).update(special)
        check_nested_overrides(config.overrides, architecture)
        if architecture.is_encoder_decoder:
            architecture.decoder_start_token_id = special["pad_token_id"]
        heads, groups = (getattr(architecture, f"num_{name}_heads", 1) for name in ("attention", "key_value"))
        if isinstance(heads, int) and isinstance(groups, int) and (groups < 1 or heads % groups):
            raise UserError(f"model: {groups} key-value heads do not divide {heads} attention heads")
    # Without this an encoder with a decoder's head would see the tokens that it must predict.
    if auto_model is transformers.AutoModelForCausalLM and hasattr(architecture, "is_decoder"):
        architecture.is_decoder = True
    set_dropout(architecture, config.dropout, config.overrides)
    return architecture


def check_overrides(values: dict[str, Any], cls: Any, where: str = "model.overrides") -> None:
    """`UserError` for a name that the configuration class does not have, a size below 1, a dropout that is no share."""
    fields = {item.name for item in dataclasses.fields(cls)}
    sizes = {*SIZE_NAMES, *FURTHER_SIZES, *(name for names in OTHER_NAMES.values() for name in names)}
    sizes |= {cls.attribute_map.get(name, name) for name in sizes}
    for name, value in values.items():
        if name not in fields:
            raise UserError(f"{where}: {cls.__name__} has no {name}{nearest(name, fields)}")
        if name in sizes and isinstance(value, int) and value < 1:
            raise UserError(f"{where}: {name} is {value}; it must be 1 or more")
        if is_dropout(name) and isinstance(value, int | float) and not 0 <= value < 1:
            raise UserError(f"{where}: {name} is {value}; it must be >= 0 and < 1")


def check_nested_overrides(values: dict[str, Any], architecture: Any, where: str = "model.overrides") -> None:
    """`check_overrides` for the configurations inside of one: it would keep a misspelt name as one more attribute."""
    for name, value in values.items():
        inner = getattr(architecture, name, None)
        if isinstance(value, dict) and isinstance(inner, PreTrainedConfig):
            also_known = {"model_type", *type(inner).attribute_map}
            named = {key: each for key, each in value.items() if key not in also_known}
            check_overrides(named, type(inner), f"{where}.{name}")
            check_nested_overrides(value, inner, f"{where}.{name}")


@contextlib.contextmanager
def warnings_of_rope_as_errors() -> Iterator[None]:
    """`ValueError` for a key or a value of `rope_parameters` that transformers does not know, of which it only warns."""
    said: list[str] = []
    # Its other warnings are advice.
    is_fault = re.compile("Unrecognized keys|Missing|must be|must have").search

    def note(record: logging.LogRecord) -> bool:
        said.append(record.getMessage())
        return not is_fault(said[-1])

    logger = logging.getLogger("transformers.modeling_rope_utils")
    level = logger.level
    logger.setLevel(logging.WARNING)
    logger.addFilter(note)
    try:
        yield
    finally:
        logger.removeFilter(note)
        logger.setLevel(level)
    if faults := [line for line in said if is_fault(line)]:
        raise ValueError(faults[0])


def find_unknown_value(overrides: dict[str, Any], error: Exception) -> str | None:
    """A line on the text among the overrides that a model's class did not find in a table, such as an activation's name;
    None if the error is another."""
    missing = str(error.args[0]) if isinstance(error, KeyError) and error.args else ""
    for name, value in flatten(overrides).items():
        if missing and isinstance(value, str) and (value in missing or missing in value):
            return f"model.overrides: {name} cannot be {value!r}{nearest(value, ACT2FN)}"
    return None


def is_dropout(name: str) -> bool:
    """Whether a field of a configuration is a probability of dropout in training."""
    return ("dropout" in name or name.endswith("pdrop")) and not name.startswith(("classifier", "summary"))


def set_dropout(architecture: Any, dropout: float, but: Iterable[str] = ()) -> None:
    """Set every dropout probability of a configuration and of its parts, except those named in `but`."""
    for name, value in vars(architecture).items():
        if isinstance(value, transformers.PreTrainedConfig):
            set_dropout(value, dropout, but[name] if isinstance(but, dict) and isinstance(but.get(name), dict) else ())
        if is_dropout(name) and name not in but and not isinstance(value, bool):
            setattr(architecture, name, dropout)


def load_pretrained(config: ModelConfig, tokenizer: Any, auto_model: Any, architecture: Any, rows: int) -> Any:
    """The model with the weights of `config.pretrained`, and embedding rows added for new tokens, up to `rows`."""
    name = str(config.pretrained)
    if not covers_vocabulary(tokenizer, name):
        mismatch = f"model.pretrained {name} was trained with another tokenizer than the dataset's"
        raise UserError(f"{mismatch}; prepare the data with --tokenizer.pretrained {name}")
    model = load_model(name, config.attention, auto_model, architecture)
    if rows > text_config(architecture).vocab_size:
        if config.lora.rank:
            why = f"{name} has {text_config(architecture).vocab_size} entries, the tokenizer {len(tokenizer)}"
            remedy = "train all weights (model.lora.rank 0), or use data without new tokens"
            raise UserError(f"model.lora: {why}, and adapters do not train the embedding: {remedy}")
        model.resize_token_embeddings(rows)
    return model


def load_model(
    name: str | Path, attention: str = "auto", auto_model: Any = None, architecture: Any = None, dropout: float = 0.0
) -> PreTrainedModel:
    """A model in fp32 from a folder (or, for `--model.pretrained`, the Hub), with the class it was saved as by default.
    From a folder with adapters: the base model, with `dropout`, and trainable adapters beside its weights."""
    transformers_logging.disable_progress_bar()
    name = resolve_name(name)
    if has_adapters(name):
        base = base_of(name)
        architecture = read_config(base)
        set_dropout(architecture, dropout)
        model = read_adapters(import_peft(), load_model(base, attention, architecture=architecture), name)
    else:
        architecture = architecture or read_config(name)
        auto_model = auto_model or saved_class(architecture)
        chosen = DEFERRED_ATTENTION.get(attention, attention)
        model = read_weights(auto_model, name, architecture, attn_implementation=chosen, dtype=torch.float32)
        # Loading makes all parameters trainable, also those that the class holds fixed, such as Whisper's sinusoids.
        with torch.device("meta"):
            fresh = type(model)._from_config(copy.deepcopy(model.config))
        for parameter, other in zip(model.parameters(), fresh.parameters(), strict=True):
            parameter.requires_grad_(other.requires_grad)
    # From the mapped file into torch's own memory: the last bits of a product can depend on the alignment of its
    # inputs, and a resumed run must equal the uninterrupted one.
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()
    return model


def saved_class(architecture: Any) -> Any:
    """The Auto class whose head a saved model has."""
    saved = (architecture.architectures or [""])[0]
    for auto_model in (getattr(transformers, name) for name in AUTO_MODELS):
        if type(architecture) in auto_model._model_mapping:
            found = auto_model._model_mapping[type(architecture)]
            if saved in [getattr(cls, "__name__", "") for cls in (found if isinstance(found, tuple) else (found,))]:
                return auto_model
    return transformers.AutoModelForCausalLM


def enable_activation_checkpointing(model: Any, config: ModelConfig) -> None:
    """Recompute blocks in the backward pass if `config` says so (Chen et al., 2016, arXiv 1604.06174)."""
    if not config.activation_checkpointing:
        return
    if config.activation_offload and not torch.accelerator.is_available():
        raise UserError("model.activation_offload is for GPUs: on a CPU activations are in host memory already")
    try:
        every, offload = config.activation_checkpointing_every, config.activation_offload
        model.activation_checkpointing_enable({"use_reentrant": False}, every_n_layers=every, offload=offload)
    except ValueError as error:
        raise UserError(f"model.activation_checkpointing: {short(error)}") from None


def covers_vocabulary(tokenizer: Any, name: str | Path) -> bool:
    """Whether `tokenizer` has all entries of the one at `name`; True if there is no tokenizer at `name`."""
    # For a folder without tokenizer files transformers would make up a tokenizer of a few entries.
    if Path(name).is_dir() and not any((Path(name) / file).is_file() for file in TOKENIZER_FILES):
        return True
    try:
        return read_tokenizer(name).get_vocab().items() <= tokenizer.get_vocab().items()  # type: ignore[no-any-return]
    except UserError:
        if Path(name).is_dir():
            raise
        return True


def stop_token_ids(tokenizer: Any) -> list[int]:
    """The tokens that end a text, with a chat template also the one that ends the assistant's turn."""
    found = [tokenizer.eos_token_id]
    if tokenizer.chat_template:
        ids = chat_ids(tokenizer, [{"role": role, "content": "x"} for role in ("user", "assistant")])
        found += [token for token in ids[-2:] if token in tokenizer.all_special_ids]  # white space may follow the token
    return sorted(set(found))


def pad_token_id(tokenizer: Any) -> int:
    """The tokenizer's padding token, or else its end-of-text token: padding is masked in any case."""
    return tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id


def count_parameters(model: nn.Module) -> int:
    """Parameters, a shared one once."""
    return sum(parameter.numel() for parameter in model.parameters())


def longest_sequence(model: PreTrainedModel) -> int:
    """Positions that the model can read; `sys.maxsize` for a model without a limit."""
    config = text_config(model.config)
    names = ("max_position_embeddings", "max_target_positions")  # Whisper's decoder has the second
    positions = int(next((value for name in names if (value := getattr(config, name, None))), 0))
    return positions - first_position(model) if positions > 0 else sys.maxsize  # XLNet's -1 is no limit


def first_position(model: nn.Module) -> int:
    """The position of a document's first token: 0, but for RoBERTa and its relatives, which count from behind the
    padding's row."""
    for name, module in model.named_modules():
        if name.endswith("position_embeddings") and getattr(module, "padding_idx", None) is not None:
            return int(module.padding_idx) + 1  # type: ignore[arg-type]
    return 0


@contextlib.contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Put `module` in evaluation mode for the block, and back in its own mode after it."""
    was_training = module.training
    module.eval()
    try:
        yield
    finally:
        module.train(was_training)


def fake_copy(module: Module, device: str) -> Module:
    """`module` with parameters and buffers that have no memory. Call it, and use the result, in a `FakeTensorMode`."""
    memo: dict[int, Any] = {}  # deepcopy takes these as copied: it reads nothing, and shared parameters stay shared
    for tensor in [*module.parameters(), *module.buffers()]:
        fake = torch.empty(tensor.shape, dtype=tensor.dtype, device=device)
        memo[id(tensor)] = nn.Parameter(fake, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else fake
    return copy.deepcopy(module, memo)
