"""ONNX: a causal model as one graph with a cache of keys and values, under the names that transformers.js knows; an
encoder as a graph without one. `onnx/model.onnx` is fp32, `onnx/model_quantized.onnx` has int8 matrices."""

import contextlib
import io
import json
import logging
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import DynamicCache

from exporting import low_space
from utils.files import UserError, short

LARGEST_FILE = 1_900_000_000  # bytes of weights; a file of this format ends at 2 GB, and more goes beside it
BATCH, NEW, PAST, ALL = "batch_size", "sequence_length", "past_sequence_length", "total_sequence_length"


class WithCache(nn.Module):
    """A causal model whose cache is plain tensors.

    input_ids (B, T) and attention_mask (B, P + T) int64, then the key and value of each layer (B, H, P, D) → logits
    (B, T, V), then keys and values (B, H, P + T, D). Positions and the causal mask are computed here, because those of
    transformers depend on P in ways that a graph cannot.
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, *cache: torch.Tensor) -> tuple:
        past, new = cache[0].shape[2], input_ids.shape[1]
        positions = (attention_mask.cumsum(1) - 1).clamp(min=0)[:, past:]
        place = torch.arange(past + new, device=input_ids.device)
        seen = (place[None, :] <= place[past:, None])[None, None] & attention_mask.bool()[:, None, None, :]
        mask = torch.where(seen, 0.0, torch.finfo(torch.float32).min)
        pairs = list(zip(cache[::2], cache[1::2], strict=True))
        output = self.model(
            input_ids=input_ids, attention_mask=mask, position_ids=positions,
            past_key_values=DynamicCache(pairs), use_cache=True,
        )  # fmt: skip
        present = [tensor for layer in output.past_key_values.layers for tensor in (layer.keys, layer.values)]
        return output.logits, *present


class Encoder(nn.Module):
    """input_ids and attention_mask (B, T) int64 → logits (B, T, V)."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        return self.model(input_ids=input_ids, attention_mask=attention_mask).logits


@torch.no_grad()
def write_onnx(model: Any, path: Path, has_cache: bool) -> None:
    """`model` in fp32 on the CPU; `UserError` if torch cannot trace it."""
    ids = torch.zeros(2, 3, dtype=torch.int64)
    dynamic: Any = {"input_ids": {0: BATCH, 1: NEW}, "attention_mask": {0: BATCH, 1: ALL if has_cache else NEW}}
    inputs, outputs = ["input_ids", "attention_mask"], ["logits"]
    wrapper: nn.Module = Encoder(model)
    arguments: tuple = (ids, torch.ones_like(ids))
    if has_cache:
        config = model.config
        heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        names = [f"{layer}.{part}" for layer in range(config.num_hidden_layers) for part in ("key", "value")]
        inputs += [f"past_key_values.{name}" for name in names]
        outputs += [f"present.{name}" for name in names]
        cache = tuple(torch.randn(2, heads, 5, head) for _ in names)
        arguments = (ids, torch.ones(2, 8, dtype=torch.int64), *cache)
        dynamic["cache"] = tuple({0: BATCH, 2: PAST} for _ in names)
        wrapper = WithCache(model)
    attention = model.config._attn_implementation
    path.parent.mkdir(exist_ok=True)
    try:
        model.set_attn_implementation("eager")
        with _quiet():
            torch.onnx.export(
                wrapper.eval(), arguments, str(path), input_names=inputs, output_names=outputs, dynamo=True,
                dynamic_shapes=tuple(dynamic.values()) if not has_cache else dynamic,
                external_data=sum(weight.nbytes for weight in model.parameters()) > LARGEST_FILE,
                optimize=True, verbose=False,
            )  # fmt: skip
    except Exception as error:  # torch's exporter and transformers' models raise many types
        why = short(error) + low_space(path.parent, sum(weight.nbytes for weight in model.parameters()))
        raise UserError(f"onnx: torch cannot export {type(model).__name__}: {why}") from error
    finally:
        model.set_attn_implementation(attention)


def quantize_onnx(path: Path, output: Path) -> None:
    """Matrices as int8; onnxruntime measures the range of their inputs while it computes."""
    from onnxruntime.quantization import QuantType, quantize_dynamic

    try:
        with _quiet():
            quantize_dynamic(path, output, weight_type=QuantType.QInt8)
    except Exception as error:  # of protobuf, onnx and onnxruntime
        # It writes to the folder of temporary files first.
        notes = (low_space(folder, path.stat().st_size) for folder in (path.parent, Path(tempfile.gettempdir())))
        note = next(filter(None, notes), "")
        raise UserError(f"onnx-int8: onnxruntime cannot quantise the graph: {short(error)}{note}") from error


def suit_transformers_js(folder: Path, tokenizer: Any) -> None:
    """transformers.js reads tokenizer_config.json alone. It puts no bos token in front unless that file says so, and finds
    no chat template in another one; `save_pretrained` leaves out both."""
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    config["add_bos_token"] = tokenizer.bos_token_id in tokenizer("a")["input_ids"][:1]
    if tokenizer.chat_template is not None:
        config["chat_template"] = tokenizer.chat_template
    path.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


@contextlib.contextmanager
def _quiet() -> Any:
    """Without the exporter's progress and warnings, which do not concern its user."""
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(logging.NOTSET)
