"""Options of the objectives: `objective.name` is a module of utils/objectives/, its section the options of it."""

from dataclasses import dataclass, field
from typing import Literal

from utils.cli import at_least


@dataclass
class MaskedConfig:
    """Masked language modelling; see utils/objectives/masked.py."""

    mask_rate: float = 0.15
    """Share of the tokens to predict."""
    replace_rate: float = 0.8
    """Share of these that become the mask token."""
    random_rate: float = 0.1
    """Share of these that become a random token; the rest stays as it is."""
    whole_words: bool = False
    """Choose all tokens of a word, or none."""

    def problems(self) -> list[str]:
        found = shares("objective.masked", self, "mask_rate", "replace_rate", "random_rate")
        if self.mask_rate == 0:
            found.append("objective.masked.mask_rate is 0; there would be nothing to predict")
        if not found and self.replace_rate + self.random_rate > 1:
            found.append("objective.masked.replace_rate and random_rate add up to more than 1")
        return found


@dataclass
class SpanCorruptionConfig:
    """Span corruption for encoder-decoder models; see utils/objectives/span_corruption.py."""

    noise_density: float = 0.15
    """Share of the tokens that are cut out of the input and become the target."""
    mean_span_length: float = 3.0
    """Mean length of a span that is cut out, in tokens."""

    def problems(self) -> list[str]:
        return shares("objective.span_corruption", self, "noise_density") + at_least(
            "objective.span_corruption", self, mean_span_length=1
        )


@dataclass
class FillInTheMiddleConfig:
    """Fill-in-the-middle; see utils/objectives/fill_in_the_middle.py."""

    rate: float = 0.5
    """Share of the documents that are rearranged; the others stay as they are."""
    suffix_first_rate: float = 0.5
    """Share of these in the order suffix, prefix, middle; the others are prefix, suffix, middle."""

    def problems(self) -> list[str]:
        return shares("objective.fill_in_the_middle", self, "rate", "suffix_first_rate")


@dataclass
class ObjectiveConfig:
    """What the model learns to predict."""

    name: Literal["causal", "masked", "span_corruption", "fill_in_the_middle", "instruction"] = "causal"
    """causal: the next token. masked: tokens hidden from an encoder. span_corruption: spans cut out of an
    encoder-decoder's input. fill_in_the_middle: causal, with the middle of documents moved to their end. instruction:
    the assistant's turns of conversations."""
    label_smoothing: float = 0.0
    """Share of each target's probability that is spread over the vocabulary. In training only."""
    z_loss: float = 0.0
    """Weight of the squared logarithm of the softmax's normaliser, which keeps logits small. In training only."""
    masked: MaskedConfig = field(default_factory=MaskedConfig)
    span_corruption: SpanCorruptionConfig = field(default_factory=SpanCorruptionConfig)
    fill_in_the_middle: FillInTheMiddleConfig = field(default_factory=FillInTheMiddleConfig)

    def problems(self) -> list[str]:
        found = at_least("objective", self, z_loss=0)
        if not 0 <= self.label_smoothing < 1:
            found.append(f"objective.label_smoothing is {self.label_smoothing}; it must be at least 0 and less than 1")
        return found


def shares(section: str, config: object, *names: str) -> list[str]:
    """One line per field of `config` that does not lie in [0, 1]."""
    return [
        f"{section}.{name} is {getattr(config, name)}; it must lie in [0, 1]"
        for name in names
        if not 0 <= getattr(config, name) <= 1
    ]
