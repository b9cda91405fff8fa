"""Options of the model, and the sizes that go by a name; see utils/model/build.py."""

from dataclasses import dataclass, field
from typing import Literal

from utils.cli import at_least

# architecture → name → hidden_size, num_hidden_layers, num_attention_heads, intermediate_size, max_position_embeddings.
# `tiny` trains in minutes on a CPU; the others have width, depth and heads of published models: SmolLM2, Llama 3.2 and
# Llama 2 (with fewer positions and rope_theta 10,000), GPT-2, BERT, ModernBERT, T5.
SIZES: dict[str, dict[str, tuple[int, int, int, int, int]]] = {
    "llama": {
        "tiny": (192, 4, 4, 512, 256), "135m": (576, 30, 9, 1536, 2048), "1b": (2048, 16, 32, 8192, 8192),
        "7b": (4096, 32, 32, 11008, 4096),
    },
    "gpt2": {
        "tiny": (192, 4, 4, 768, 256), "124m": (768, 12, 12, 3072, 1024), "355m": (1024, 24, 16, 4096, 1024),
        "774m": (1280, 36, 20, 5120, 1024), "1.5b": (1600, 48, 25, 6400, 1024),
    },
    "bert": {
        "tiny": (192, 4, 4, 768, 256), "base": (768, 12, 12, 3072, 512), "large": (1024, 24, 16, 4096, 512),
    },
    "modernbert": {
        "tiny": (192, 4, 4, 512, 256), "base": (768, 22, 12, 1152, 8192), "large": (1024, 28, 16, 2624, 8192),
    },
    "t5": {
        "tiny": (192, 3, 4, 768, 512), "small": (512, 6, 8, 2048, 512), "base": (768, 12, 12, 3072, 512),
        "large": (1024, 24, 16, 4096, 512),
    },
}  # fmt: skip
# What a published model has beyond its five sizes.
SIZE_OVERRIDES: dict[tuple[str, str], dict[str, int]] = {
    ("llama", "135m"): {"num_key_value_heads": 3},
    ("llama", "1b"): {"num_key_value_heads": 8},
}
SIZE_NAMES = (
    "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "max_position_embeddings"
)  # fmt: skip


@dataclass
class LoraConfig:
    """Low-rank adapters beside frozen weights (Hu et al., 2021, arXiv 2106.09685), by the library peft."""

    rank: int = 0
    """Rank of each adapter. 0: no adapters, all weights are trained."""
    alpha: float = 16.0
    """An adapter's output is scaled by alpha / rank."""
    dropout: float = 0.0
    """Probability of dropout on an adapter's input."""
    target_modules: list[str] = field(default_factory=lambda: ["all-linear"])
    """Ends of the names of the linear maps that get an adapter; all-linear: every one but the output head."""

    def problems(self) -> list[str]:
        found = at_least("model.lora", self, rank=0)
        if self.alpha <= 0:
            found.append(f"model.lora.alpha is {self.alpha}; it must be positive")
        if not 0 <= self.dropout < 1:
            found.append(f"model.lora.dropout is {self.dropout}; it must be at least 0 and less than 1")
        return found


@dataclass
class ModelConfig:
    """A model from its configuration, or from a folder of weights."""

    pretrained: str | None = None
    """Folder or Hub name of a model to start from. Architecture, sizes and overrides are then its own and not read."""
    architecture: str = "llama"
    """llama, gpt2, bert, modernbert or t5; or any other `model_type` of transformers, with `size` null."""
    size: str | None = "tiny"
    """Sizes by name: llama tiny, 135m, 1b, 7b; gpt2 tiny, 124m, 355m, 774m, 1.5b; bert and modernbert tiny, base, large;
    t5 tiny, small, base, large. null: the sizes below, or the architecture's own."""
    hidden_size: int | None = None
    """Width of the residual stream (D). null, here and below: as `size` says."""
    num_hidden_layers: int | None = None
    """Transformer blocks; of an encoder-decoder, in each of the two."""
    num_attention_heads: int | None = None
    """Attention heads per block (H); must divide hidden_size."""
    intermediate_size: int | None = None
    """Width of the MLP."""
    max_position_embeddings: int | None = None
    """Longest sequence the model can read, in tokens. T5 has no such limit."""
    overrides: dict[str, bool | int | float | str | None] = field(default_factory=dict)
    """Further fields of the architecture's configuration class, by name, as in '{num_key_value_heads: 2}'."""
    dropout: float = 0.0
    """Probability, given to every dropout that the architecture has (llama has only the attention's)."""
    tie_word_embeddings: bool = True
    """Use one matrix for the input embedding and the output head."""
    vocabulary_multiple: int = 1
    """Round the number of rows of the embedding up to a multiple of this; 64 or 128 suit matrix units."""
    initialization: Literal["model", "normal", "gpt2"] = "model"
    """model: the architecture's own. normal: weights N(0, 0.02), biases 0, norm weights 1. gpt2: likewise, but the
    projections that end in the residual stream are divided by the square root of their number."""
    attention: Literal["auto", "blocked", "sdpa", "eager"] = "auto"
    """blocked: training on rows of less than 1,024 by products of blocks of queries and the keys that they may see, all
    else by sdpa. sdpa: torch's fused attention. eager: plain matrix products. auto: blocked on a CPU, else sdpa; eager where
    the architecture has nothing else."""
    activation_checkpointing: bool = False
    """Keep only a block's input for the backward pass and compute the rest again: less memory, a third more work."""
    activation_checkpointing_every: int = 1
    """Do so in every so-manieth block; the others keep what they have computed. --dry_run says what fits."""
    activation_offload: bool = False
    """GPU: hold the kept inputs in the host's memory, which matters with long sequences and costs two copies a block."""
    lora: LoraConfig = field(default_factory=LoraConfig)

    def sizes(self) -> dict[str, int | None]:
        """The five sizes, `size` filled in; None where neither says anything."""
        if self.size is None:
            named: tuple[int | None, ...] = (None,) * len(SIZE_NAMES)
        else:
            named = SIZES[self.architecture][self.size]
        return {
            name: value if getattr(self, name) is None else getattr(self, name)
            for name, value in zip(SIZE_NAMES, named, strict=True)
        }

    def problems(self) -> list[str]:
        found = at_least(
            "model", self, hidden_size=1, num_hidden_layers=1, num_attention_heads=1, intermediate_size=1,
            max_position_embeddings=2, vocabulary_multiple=1, activation_checkpointing_every=1,
        )  # fmt: skip
        if self.activation_offload and not self.activation_checkpointing:
            found.append("model.activation_offload is for model.activation_checkpointing; set that to true too")
        if not 0 <= self.dropout < 1:
            found.append(f"model.dropout is {self.dropout}; it must be at least 0 and less than 1")
        if self.pretrained is not None:
            return found
        if self.lora.rank:
            found.append(
                "model.lora.rank is for pretrained weights, which it leaves as they are; give model.pretrained"
            )
        if self.size is not None and self.size not in SIZES.get(self.architecture, {}):
            known = ", ".join(SIZES.get(self.architecture, ()))
            advice = f"it has {known}" if known else "give model.size null and the sizes one by one"
            return [*found, f"model.architecture {self.architecture} has no size {self.size}; {advice}"]
        sizes = self.sizes()
        width, heads = sizes["hidden_size"], sizes["num_attention_heads"]
        if not found and width is not None and heads is not None:
            if width % heads:
                found.append(f"model.num_attention_heads ({heads}) does not divide model.hidden_size ({width})")
            elif self.architecture in ("llama", "modernbert") and width // heads % 2:
                found.append("model.hidden_size / model.num_attention_heads must be even: rotary positions turn pairs")
        return found
