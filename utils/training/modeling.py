"""The model: from its configuration, a pretrained folder or a checkpoint; its initial weights; its size."""

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, GPT2Config, LlamaConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D
from transformers.utils import logging as transformers_logging

from utils.cli import UserError
from utils.config import ModelConfig

INITIAL_STD = 0.02


def build_model(config: ModelConfig, tokenizer: Any) -> PreTrainedModel:
    """A model on the CPU in fp32, its special tokens set from the tokenizer; the caller seeds torch first.

    Raises `UserError` if `config.pretrained` cannot be loaded or belongs to another tokenizer.
    """
    special = {
        "bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": pad_token_id(tokenizer),
    }  # fmt: skip
    if config.pretrained is not None:
        model = load_model(config.pretrained, config.attention)
        if len(tokenizer) > model.config.vocab_size or not same_vocabulary(tokenizer, config.pretrained):
            raise UserError(
                f"model.pretrained {config.pretrained} was trained with another tokenizer than the dataset's; prepare the "
                f"data with --tokenizer.pretrained {config.pretrained}"
            )
    else:
        architecture = architecture_config(config, len(tokenizer), special)
        model = AutoModelForCausalLM.from_config(
            architecture, attn_implementation=config.attention, dtype=torch.float32
        )
        if config.initialization == "normal":
            initialize_normal(model)
    model.config.update(special)
    model.generation_config = GenerationConfig(**special)
    return model


def architecture_config(config: ModelConfig, vocab_size: int, special: dict[str, Any]) -> LlamaConfig | GPT2Config:
    """transformers' own configuration; `config.dropout` goes to every dropout that the architecture has."""
    if config.architecture == "gpt2":
        return GPT2Config(
            vocab_size=vocab_size, n_embd=config.hidden_size, n_layer=config.num_hidden_layers,
            n_head=config.num_attention_heads, n_inner=config.intermediate_size,
            n_positions=config.max_position_embeddings, resid_pdrop=config.dropout, embd_pdrop=config.dropout,
            attn_pdrop=config.dropout, tie_word_embeddings=config.tie_word_embeddings,
            **special,
        )  # fmt: skip
    return LlamaConfig(
        vocab_size=vocab_size, hidden_size=config.hidden_size, num_hidden_layers=config.num_hidden_layers,
        num_attention_heads=config.num_attention_heads, intermediate_size=config.intermediate_size,
        max_position_embeddings=config.max_position_embeddings, attention_dropout=config.dropout,
        tie_word_embeddings=config.tie_word_embeddings, **special,
    )  # fmt: skip


def load_model(name: str | Path, attention: str = "sdpa") -> PreTrainedModel:
    """A causal language model in fp32 from a folder (or, for `--model.pretrained`, the Hub)."""
    transformers_logging.disable_progress_bar()
    try:
        model = AutoModelForCausalLM.from_pretrained(name, attn_implementation=attention, dtype=torch.float32)
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{name}: no causal language model can be loaded from here: {reason}") from None
    # Out of the mapped file into torch's own memory: a math library's last bits can depend on the alignment of its
    # inputs, and a resumed run is to equal the uninterrupted one.
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()
    return model


def same_vocabulary(tokenizer: Any, name: str | Path) -> bool:
    """Whether the tokenizer at `name` has the same entries; True where there is none to compare with."""
    try:
        vocabulary = AutoTokenizer.from_pretrained(name).get_vocab()
    except (OSError, ValueError, KeyError):
        return True
    # For a GPT-2 folder without tokenizer files transformers makes one of a single entry.
    return len(vocabulary) <= 1 or vocabulary == tokenizer.get_vocab()


def pad_token_id(tokenizer: Any) -> int:
    """The tokenizer's padding token, or its end-of-text where it has none: what pads is masked in any case."""
    return tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id


@torch.no_grad()
def initialize_normal(model: nn.Module) -> None:
    """Weights and embeddings N(0, 0.02) (GPT-2 and BERT's standard deviation), biases 0, norm weights 1."""
    for module in model.modules():
        if isinstance(module, nn.Linear | Conv1D | nn.Embedding):
            module.weight.normal_(0.0, INITIAL_STD)
        elif is_norm(module):
            module.weight.fill_(1.0)  # type: ignore[operator, union-attr]
        bias = getattr(module, "bias", None)
        if isinstance(bias, nn.Parameter):
            bias.zero_()


def is_norm(module: nn.Module) -> bool:
    """LayerNorm or one of the RMSNorms, of which each architecture in transformers has its own class."""
    return isinstance(module, nn.LayerNorm | nn.RMSNorm) or type(module).__name__.endswith("RMSNorm")


def count_parameters(model: nn.Module) -> int:
    """Parameters, a shared one once."""
    return sum(parameter.numel() for parameter in model.parameters())


def longest_sequence(model: PreTrainedModel) -> int:
    """Positions that the model can read."""
    return int(model.config.max_position_embeddings)
