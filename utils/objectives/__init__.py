"""Objectives: what a model learns to predict. Each is a module of this folder, named as in `objective.name`, with

    AUTO_MODEL                            transformers' class that loads a model with the right head
    build_collator(config, tokenizer)     rows of the dataset → what the model reads and its targets

and for pictures or sounds, whose collator gets the processor in place of the tokenizer,

    build_processor(config, tokenizer)    transformers' processor, which holds the tokenizer
    check_model(model)                    optional; refuses a model that needs other inputs

All have the same loss: cross-entropy between the logits and the targets at the same positions. `accelerator.prepare`
wraps the module `Objective`, so autocast, DDP and sharding see every use of the parameters.
"""

import contextlib
import importlib
from dataclasses import replace
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoModelForMaskedLM

from utils.cli import UserError
from utils.config import KernelConfig, ModelConfig, ObjectiveConfig
from utils.data.packing import IGNORED, document_places
from utils.files import short
from utils.kernels import use_kernels
from utils.kernels.attention import as_numbers
from utils.kernels.head_loss import head_loss
from utils.kernels.varlen import kernel_fault, masked_attention, use_on_cpu, varlen
from utils.model.adapters import without_adapters
from utils.model.build import evaluating, fake_copy, first_position, longest_sequence, text_config
from utils.pretrained import resolve_name


def objective_module(name: str) -> ModuleType:
    """The module of an objective."""
    return importlib.import_module(f"utils.objectives.{name}")


def build_processor(name: str, config: ModelConfig, tokenizer: Any) -> Any:
    """What makes the inputs of an objective's model: a processor, or for text `tokenizer` itself. It may add special
    tokens to `tokenizer`."""
    build = getattr(objective_module(name), "build_processor", None)
    if config.pretrained is not None:
        config = replace(config, pretrained=resolve_name(config.pretrained))
    return tokenizer if build is None else build(config, tokenizer)


# Devices for which varlen attention is the default: torch has its kernel only for these.
HAVE_VARLEN = ("cuda",)


def build_objective(
    model: nn.Module, objective: ObjectiveConfig, attention: str, kernels: KernelConfig, device: torch.device,
    mixed_precision: str = "no",
) -> "Objective":  # fmt: skip
    """`model` with its loss, computed by the kernels that suit it on `device`; for `attention` see `use_kernels`.

    `mixed_precision`: accelerate's. Varlen attention needs bf16 or fp16 on a GPU, and batches with `cu_seqlens`."""
    use_kernels(without_adapters(model), attention, kernels, device)
    built = Objective(model, objective, chunked_head=kernels.chunked_head and has_linear_head(model))
    wanted = attention == "varlen" or (attention == "auto" and varlen_is_default(device, mixed_precision))
    planned = next(model.parameters()).is_meta  # a dry run has no numbers to compare, and plans with sdpa
    fault = use_varlen(built, device, mixed_precision) if wanted and not planned else None
    if fault and attention == "varlen":
        raise UserError(f"model.attention varlen: {fault}; use auto")
    return built


def varlen_is_default(device: torch.device, mixed_precision: str) -> bool:
    """Whether `auto` is varlen attention, for a model that it serves."""
    return device.type in HAVE_VARLEN and mixed_precision != "no"


def use_varlen(objective: "Objective", device: torch.device, mixed_precision: str) -> str | None:
    """Switch the model of `objective` to varlen attention, if its logits stay the same; else return why it cannot.

    The logits are those of four packed rows, in fp32 on the device where the model is now. The kernel of `device`
    itself is compared with plain products on heads of this model's size.
    """
    model: Any = without_adapters(objective.model)
    if varlen is None:
        return "this torch has no torch.nn.attention.varlen"
    if text_config(model.config) is not model.config:
        return f"{type(model).__name__} reads more than text"
    if (
        model.config._attn_implementation not in ("sdpa", "sdpa_shared_mask", "blocked")
        or model.config.is_encoder_decoder
    ):
        return f"{type(model).__name__} has its own attention"
    dtypes = {"bf16": torch.bfloat16, "fp8": torch.bfloat16, "fp16": torch.float16}  # of what is not a linear layer
    dtype = dtypes.get(mixed_precision, torch.float32)
    if device.type != "cpu" and dtype == torch.float32:
        return "its kernel computes in bf16 and fp16 only; give accelerate launch --mixed_precision bf16"
    before = model.config._attn_implementation
    if fault := kernel_fault(model.config, device, dtype):
        return fault
    length = min(12, longest_sequence(model))
    lengths = [length] if length < 4 else [1, length - 1]
    orders = (lengths, lengths[::-1], [length], lengths)
    positions = torch.stack([torch.cat([torch.arange(size) for size in order]) for order in orders])
    entries = model.config.get_text_config().vocab_size
    ids = (5 + torch.arange(positions.numel()).view(positions.shape)) % entries
    batch = {"input_ids": ids, "position_ids": positions}
    batch["cu_seqlens"] = torch.from_numpy(document_places({name: part.numpy() for name, part in batch.items()}))
    batch = {name: part.to(model.device) for name, part in batch.items()}
    use_on_cpu()
    try:
        with torch.no_grad(), torch.random.fork_rng(), evaluating(objective):
            wanted = objective.model(**objective.model_inputs(dict(batch))).logits.float()
            model.set_attn_implementation("varlen")
            found = objective.model(**objective.model_inputs(dict(batch))).logits.float()
            objective.train()  # dropout in the attention raises
            objective.model(**objective.model_inputs(dict(batch)))
        if not float((found - wanted).abs().max()) <= 1e-3 * float(wanted.std()):
            raise ValueError(f"{type(model).__name__} computes other logits with it")
    except (ValueError, RuntimeError, TypeError) as error:
        model.set_attn_implementation(before)
        return short(error)
    return None


class Objective(nn.Module):
    """The model with its loss."""

    def __init__(self, model: nn.Module, config: ObjectiveConfig | None = None, *, chunked_head: bool = False) -> None:
        """`chunked_head`: only for a model with `has_linear_head`."""
        super().__init__()
        self.model, self.config, self.chunked_head = model, config or ObjectiveConfig(), chunked_head
        self.head_backend: str | None = None  # torch.compile's for the head's loss
        self.context: Any = None  # set where ranks share the positions of a row; its `masks` go to the attention
        self._no_split_modules = getattr(model, "_no_split_modules", None)  # what accelerate shards one by one
        # Encoders keep packed documents apart by a mask, decoders by their positions.
        module = objective_module(self.config.name)
        self.is_encoder = module.AUTO_MODEL is AutoModelForMaskedLM
        if hasattr(module, "check_model"):
            module.check_model(without_adapters(model))
        self.first_position = first_position(model)

    def forward(self, targets: torch.Tensor, **inputs: torch.Tensor) -> torch.Tensor:
        """Summed cross-entropy in nats, an fp32 scalar; in training with the configured label smoothing and z-loss.

        Args:
            targets: (B, T); what the logits at the same position should predict, -100 where there is no target.
            inputs: what the model's own forward takes, such as input_ids (B, T). By `position_ids` (B, T), which
                restart at 0 with each document, a decoder without mask and cache keeps packed documents apart.

        Label smoothing spreads its share over the whole vocabulary (Szegedy et al., 2016, arXiv 1512.00567). The z-loss
        adds weight × log²Z per target, Z being the softmax's normaliser (Chowdhery et al., 2022, arXiv 2204.02311).
        """
        inputs, targets = self.model_inputs(inputs), targets.flatten()
        smoothing = self.config.label_smoothing if self.training else 0.0
        z_loss = self.config.z_loss if self.training else 0.0
        if self.chunked_head:
            backbone = without_adapters(self.model).base_model
            hidden = backbone(**inputs).last_hidden_state.flatten(0, 1)  # (B × T, D)
            head = self.model.get_output_embeddings()  # type: ignore[operator]
            return head_loss(hidden, head, targets, label_smoothing=smoothing, z_loss=z_loss, backend=self.head_backend)
        logits = self.model(**inputs).logits.float().flatten(0, 1)
        loss = F.cross_entropy(logits, targets, ignore_index=IGNORED, reduction="sum", label_smoothing=smoothing)
        if z_loss:
            loss = loss + z_loss * logits[targets != IGNORED].logsumexp(-1).square().sum()
        return loss

    def model_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """What the model's own forward takes for `inputs` of `forward`. Loss, evaluation and predictions all pass here,
        because what keeps the documents of a row apart depends on the model and on the ranks that share the row."""
        inputs = {**inputs, "use_cache": False}
        places = inputs.pop("cu_seqlens", None)
        uses_places = without_adapters(self.model).config._attn_implementation == "varlen"
        if uses_places:  # in place of every mask; without places the attention raises
            inputs |= {"attention_mask": None, "cu_seqlens": places}
        if self.is_encoder and "position_ids" in inputs:
            if not uses_places:
                inputs["attention_mask"] = encoder_masks(inputs["position_ids"], self.model.config)
            inputs["position_ids"] = inputs["position_ids"] + self.first_position
        if self.context is not None:
            inputs["context_masks"] = self.context.masks(inputs.pop("row_position_ids", None))
        return inputs

    def logits(self, **inputs: torch.Tensor) -> torch.Tensor:
        """(B, T, V) fp32."""
        with masked_attention(without_adapters(self.model)):
            return self.model(**self.model_inputs(inputs)).logits.float()

    def predict(self, **inputs: torch.Tensor) -> torch.Tensor:
        """The likeliest token at each position, (B, T)."""
        return self.logits(**inputs).argmax(-1)

    def generate(self, *inputs: torch.Tensor, **options: Any) -> torch.Tensor:
        """transformers' `generate`, as a method that FSDP gathers the parameters for. A compiled model runs as it is: a
        text has a new length with every token, and torch would compile again and again."""
        with masked_attention(without_adapters(self.model)), torch.compiler.set_stance("force_eager"):
            return self.model.generate(*inputs, **options)  # type: ignore[operator]

    def tie_weights(self) -> None:
        """For accelerate, which calls this after it has replaced the parameters by shards."""
        self.model.tie_weights()  # type: ignore[operator]


def has_linear_head(model: Any) -> bool:
    """Whether the logits are one linear map of the last hidden state, and nothing else; a short pass finds out.

    Some architectures scale or cap their logits (Gemma 2, Cohere, Granite), or have layers in between (BERT as a
    decoder). On the meta device the answer for a model that computes by values (a router) is False.
    """
    bare, head = without_adapters(model), model.get_output_embeddings()
    if type(head) is not nn.Linear or bare.base_model is bare or bare.config.is_encoder_decoder:
        return False
    if head.weight.is_meta:
        with contextlib.suppress(RuntimeError), FakeTensorMode(allow_non_fake_inputs=True):
            return _logits_are_the_heads(fake_copy(bare, "cpu"))
        return False
    return _logits_are_the_heads(bare)


@torch.no_grad()
def _logits_are_the_heads(model: Any) -> bool:
    """Whether the head reads the base model's last hidden state, and its output is what the model returns: the tensors
    themselves, because small logits would differ little, and a model on the meta device has no numbers."""
    seen: dict[str, torch.Tensor] = {}
    base, head = model.base_model, model.get_output_embeddings()
    hooks = [
        base.register_forward_hook(lambda _, __, output: seen.update(hidden=output[0])),
        head.register_forward_hook(lambda _, inputs, output: seen.update(input=inputs[0], output=output)),
    ]
    ids = torch.arange(8, device=next(model.parameters()).device)[None] % text_config(model.config).vocab_size
    with evaluating(model):
        logits = model(input_ids=ids, use_cache=False).logits
    for hook in hooks:
        hook.remove()
    if seen.keys() != {"hidden", "input", "output"}:  # the head reads another module, as OPT's reads its decoder
        return False
    same = seen["input"].untyped_storage()._cdata == seen["hidden"].untyped_storage()._cdata
    same = same and seen["input"].shape == seen["hidden"].shape
    return same and logits is seen["output"] and not logits._version  # in-place operations count it up


def document_mask(position_ids: torch.Tensor) -> torch.Tensor:
    """The attention mask of packed rows for an encoder, (B, T) → (B, 1, T, T); a document begins at each 0. Numbers to
    add to the scores: of a boolean mask eager attention would add 0 and 1, and documents would silently see each other."""
    documents = (position_ids == 0).cumsum(-1)
    return as_numbers(documents[:, None, :, None] == documents[:, None, None, :])


def encoder_masks(position_ids: torch.Tensor, config: Any) -> torch.Tensor | dict[str, torch.Tensor]:
    """`document_mask`; for a model with layers that see only a window (ModernBERT), one mask per kind of layer."""
    mask = document_mask(position_ids)
    if "sliding_attention" not in (getattr(config, "layer_types", None) or ()):
        return mask
    columns = torch.arange(position_ids.shape[1], device=position_ids.device)
    far = (columns[:, None] - columns).abs() > config.sliding_window
    return {"full_attention": mask, "sliding_attention": mask.masked_fill(far, torch.finfo(mask.dtype).min)}


def count_targets(batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Positions of the batch that have a target; a scalar on the batch's device."""
    return (batch["targets"] != IGNORED).sum()
