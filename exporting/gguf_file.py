"""GGUF, the format of llama.cpp and Ollama, by the writer of the `gguf` package: Llama, Qwen3 and GPT-2 models with a
byte-level BPE tokenizer. llama.cpp computes what its own code says; a model whose options it does not know is refused.
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from exporting import low_space
from utils.files import UserError
from utils.model.build import longest_sequence, stop_token_ids

ARCHITECTURES = {"llama": "LLAMA", "qwen3": "QWEN3", "gpt2": "GPT2"}
# Options of a model that llama.cpp takes for granted.
REQUIRED = {
    "llama": {"hidden_act": "silu", "mlp_bias": False},
    "qwen3": {"hidden_act": "silu", "use_sliding_window": False},
    "gpt2": {"activation_function": "gelu_new", "scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False,
             "add_cross_attention": False},
}  # fmt: skip
QUANTISER_TYPES = ("q4_k_m",)  # the `gguf` package reads these, but cannot write them
CONV1D = ("c_attn.weight", "c_proj.weight", "c_fc.weight")  # GPT-2 stores these as (in, out)

LETTERS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
SUFFIXES = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
# How a pre-tokenizer splits a text → llama.cpp's name for it, which sets `ignore_merges` too.
PRE_TOKENIZERS: dict[tuple[str, ...], tuple[str, bool]] = {
    ("bytes with regex",): ("gpt-2", False),
    ("single digits", "bytes with regex"): ("smollm", False),
    (rf"split {SUFFIXES}|{LETTERS}|\p{{N}}{{1,3}}|{REST}", "bytes"): ("llama-bpe", True),
    (rf"split {SUFFIXES}|{LETTERS}|\p{{N}}|{REST}", "bytes"): ("qwen2", False),
}
CHATML = "<|im_start|>user\nA<|im_end|>\n<|im_start|>assistant\n"
OLLAMA_CHATML = (
    "{{ range .Messages }}<|im_start|>{{ .Role }}\n{{ .Content }}<|im_end|>\n{{ end }}<|im_start|>assistant\n"
)


def check_gguf(model: Any, tokenizer: Any) -> None:
    """`UserError` if llama.cpp would compute something else than this model, or split text in another way."""
    config = model.config
    if config.model_type not in ARCHITECTURES:
        raise UserError(f"gguf: only {', '.join(ARCHITECTURES)} can be written, not {config.model_type}")
    for name, value in REQUIRED[config.model_type].items():
        if getattr(config, name, value) != value:
            raise UserError(f"gguf: llama.cpp reads {config.model_type} with {name} {value} only")
    kind = (getattr(config, "rope_parameters", None) or {}).get("rope_type", "default")
    if kind != "default":
        raise UserError(f"gguf: a model with rope_type {kind} cannot be written; only default")
    name_pre_tokenizer(tokenizer)


def name_pre_tokenizer(tokenizer: Any) -> str:
    """llama.cpp's name for how the tokenizer splits a text before it merges bytes; `UserError` if it has none."""
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    if state["model"]["type"] != "BPE":
        raise UserError(f"gguf: the tokenizer is {state['model']['type']}; llama.cpp gets byte-level BPE only")
    pre = state["pre_tokenizer"] or {"type": "none"}
    steps = tuple(map(_describe, pre["pretokenizers"] if pre["type"] == "Sequence" else [pre]))
    name, ignore_merges = PRE_TOKENIZERS.get(steps, ("", False))
    normal_form = (state["normalizer"] or {"type": None})["type"]
    if not name or normal_form not in (("NFC", None) if name == "qwen2" else (None,)):
        raise UserError(
            f"gguf: llama.cpp has no pre-tokenizer like this tokenizer's ({', '.join(steps)}, {normal_form})"
        )
    if state["model"].get("ignore_merges", False) != ignore_merges:
        raise UserError(f"gguf: llama.cpp's {name} has ignore_merges {ignore_merges}, unlike the tokenizer")
    return name


def _describe(step: dict[str, Any]) -> str:
    if step["type"] == "ByteLevel" and not step["add_prefix_space"]:
        return "bytes with regex" if step.get("use_regex", True) else "bytes"
    if step["type"] == "Digits" and step["individual_digits"]:
        return "single digits"
    if step["type"] == "Split" and step["behavior"] == "Isolated" and not step["invert"]:
        return f"split {step['pattern'].get('Regex')}"
    return step["type"]


def write_gguf(model: Any, tokenizer: Any, path: Path, precision: str, name: str) -> None:
    """One file with the weights, the tokenizer and the chat template. precision: a type of the `gguf` package in small
    letters, such as f32, f16, q8_0. Norms and biases stay in f32; so does a matrix whose rows the type does not fit."""
    import gguf

    writer = gguf.GGUFWriter(path, model.config.model_type)
    writer.add_name(name)
    kind = gguf.GGMLQuantizationType[precision.upper()]
    _add_options(writer, model)
    _add_tokenizer(gguf, writer, model, tokenizer)
    writer.add_file_type(gguf.LlamaFileType[_file_type(precision)])
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[ARCHITECTURES[model.config.model_type]], _blocks(model.config))
    tied = model.config.tie_word_embeddings
    for parameter, tensor in model.state_dict().items():
        if tied and parameter == "lm_head.weight":
            continue
        target = names.get_name(parameter, try_suffixes=(".weight", ".bias"))
        if target is None:
            raise UserError(f"gguf: llama.cpp has no place for the tensor {parameter}")
        array = arrange(parameter, tensor.detach().float(), model.config).contiguous().numpy()
        fits = array.ndim > 1 and array.shape[-1] % gguf.GGML_QUANT_SIZES[kind][0] == 0
        # llama.cpp adds positions in f32 only.
        use = kind if fits and not target.startswith("position_embd") else gguf.GGMLQuantizationType.F32
        writer.add_tensor(target, gguf.quantize(array, use), raw_dtype=use)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def write_quantised_gguf(model: Any, tokenizer: Any, path: Path, precision: str, name: str) -> None:
    """As `write_gguf`, by llama.cpp's quantiser from a file in f32, which is removed."""
    whole = path.with_name(f".{path.name}.f32")
    write_gguf(model, tokenizer, whole, "f32", name)
    script = Path(__file__).with_name("quantize_gguf.py").resolve()
    command = [sys.executable, "-P", str(script), str(whole), str(path), precision]
    ended = subprocess.run(command, capture_output=True, text=True, errors="replace")
    note = low_space(path.parent, whole.stat().st_size)
    whole.unlink()
    if ended.returncode or not path.is_file():
        lines = ended.stderr.strip().splitlines() or [f"it ended with {ended.returncode}"]
        raise UserError(f"gguf-{precision}: llama.cpp's quantiser failed: {lines[-1][:300]}{note}")


def arrange(name: str, tensor: torch.Tensor, config: Any) -> torch.Tensor:
    """A parameter in llama.cpp's order: (out, in), and for Llama the rows of queries and keys so that the two numbers
    that a rotation turns are neighbours."""
    if config.model_type == "gpt2" and name.endswith(CONV1D):
        return tensor.T
    if config.model_type == "llama" and ".self_attn.q_proj." in name:
        return _interleave(tensor, config.num_attention_heads)
    if config.model_type == "llama" and ".self_attn.k_proj." in name:
        return _interleave(tensor, config.num_key_value_heads)
    return tensor


def _interleave(tensor: torch.Tensor, heads: int) -> torch.Tensor:
    halves = tensor.view(heads, 2, tensor.shape[0] // heads // 2, *tensor.shape[1:])
    return halves.transpose(1, 2).reshape(tensor.shape)


def _blocks(config: Any) -> int:
    return config.num_hidden_layers  # GPT-2's configuration maps it to n_layer


def _file_type(precision: str) -> str:
    return "ALL_F32" if precision == "f32" else f"MOSTLY_{precision.upper()}"


def _add_options(writer: Any, model: Any) -> None:
    config = model.config
    writer.add_context_length(longest_sequence(model))
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(_blocks(config))
    writer.add_head_count(config.num_attention_heads)
    writer.add_vocab_size(config.vocab_size)
    if config.model_type == "gpt2":
        writer.add_feed_forward_length(config.n_inner or 4 * config.hidden_size)
        writer.add_layer_norm_eps(config.layer_norm_epsilon)
        return
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(head)
    writer.add_key_length(head)
    writer.add_value_length(head)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])


def _add_tokenizer(gguf: Any, writer: Any, model: Any, tokenizer: Any) -> None:
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    pieces = {id: piece for piece, id in tokenizer.get_vocab().items()}
    added = {token["id"]: token for token in state["added_tokens"]}
    tokens, types = [], []
    for id in range(model.config.vocab_size):  # the embedding may have more rows than the tokenizer has tokens
        tokens.append(pieces.get(id, f"[UNUSED{id}]"))
        special = gguf.TokenType.CONTROL if added.get(id, {}).get("special") else gguf.TokenType.USER_DEFINED
        types.append(special if id in added else gguf.TokenType.NORMAL if id in pieces else gguf.TokenType.UNUSED)
    writer.add_tokenizer_model("gpt2")  # llama.cpp's name for byte-level BPE
    writer.add_tokenizer_pre(name_pre_tokenizer(tokenizer))
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_merges([pair if isinstance(pair, str) else " ".join(pair) for pair in state["model"]["merges"]])
    around = tokenizer("a")["input_ids"]
    writer.add_add_bos_token(tokenizer.bos_token_id is not None and around[0] == tokenizer.bos_token_id)
    writer.add_add_eos_token(len(around) > 1 and around[-1] == tokenizer.eos_token_id)
    writer.add_add_space_prefix(False)
    for name in ("bos", "eos", "pad"):
        if (id := getattr(tokenizer, f"{name}_token_id")) is not None:
            getattr(writer, f"add_{name}_token_id")(id)
    others = [id for id in stop_token_ids(tokenizer) if id != tokenizer.eos_token_id]
    for add, id in zip((writer.add_eot_token_id, writer.add_eom_token_id), others, strict=False):  # the end of a turn
        add(id)
    if tokenizer.chat_template is not None:
        writer.add_chat_template(tokenizer.chat_template)


def write_modelfile(tokenizer: Any, path: Path, file: str) -> None:
    """The recipe of `ollama create` for the GGUF file beside it. Ollama has its own language of templates: ChatML is
    written in it, and a plain continuation; of other chat templates Ollama knows many by their text in the file."""
    lines = [f"FROM ./{file}"]
    if tokenizer.chat_template is None:
        lines.append('TEMPLATE """{{ .Prompt }}"""')
    else:
        messages = [{"role": "user", "content": "A"}]
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        if text == CHATML:
            lines.append(f'TEMPLATE """{OLLAMA_CHATML}"""')
    for id in stop_token_ids(tokenizer):
        lines.append(f'PARAMETER stop "{tokenizer.convert_ids_to_tokens(id)}"')
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
