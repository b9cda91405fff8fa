"""The options of train.py: one dataclass per subject, one docstring with the unit per field.

The defaults are the demo's, so `train.py` runs without any option. `problems()` returns what is wrong with the
*values* of a section, in words that name the option; types and names are checked by `utils.cli.parse_config`.
"Step" means optimizer step everywhere.
"""

from dataclasses import dataclass, field
from typing import Literal

from utils.cli import at_least


@dataclass
class DataConfig:
    """What the model reads."""

    dataset: str = "data/demo"
    """Folder written by prepare_data.py."""
    sequence_length: int = 256
    """Positions per row (T), in tokens."""
    layout: Literal["packed", "best_fit", "padded"] = "packed"
    """packed: documents end to end, cut every T tokens, each attending to itself only. best_fit: likewise, but only
    documents longer than T are cut, and a row may have a few free positions. padded: one document, or one piece of a
    longer one, per row, with an attention_mask. None of them loses a target."""
    num_workers: int = 0
    """Loader processes per rank. 0 is fastest for stored data: a row is a slice of a mapped file. Those of a stream, at
    most one per lane, read and tokenize beside the training."""
    stream_lanes: int = 8
    """Streams only: independent sequences of documents that each global batch is taken from, in equal parts. It must
    divide batch.global_batch_size and be a multiple of the processes; they and their loader workers share the lanes."""

    def problems(self) -> list[str]:
        return at_least("data", self, sequence_length=2, num_workers=0, stream_lanes=1)


@dataclass
class ModelConfig:
    """A model from its configuration, or from a folder of weights."""

    pretrained: str | None = None
    """Folder or Hub name of a causal language model to start from. The sizes below are then its own and ignored."""
    architecture: Literal["llama", "gpt2"] = "llama"
    """llama: RMSNorm, rotary positions, gated MLP, no biases. gpt2: LayerNorm, learned positions, biases."""
    hidden_size: int = 192
    """Width of the residual stream (D)."""
    num_hidden_layers: int = 4
    """Transformer blocks."""
    num_attention_heads: int = 4
    """Attention heads per block (H); must divide hidden_size."""
    intermediate_size: int = 512
    """Width of the MLP."""
    max_position_embeddings: int = 256
    """Longest sequence the model can read, in tokens."""
    dropout: float = 0.0
    """Probability, given to every dropout that the architecture has (llama has only the attention's)."""
    tie_word_embeddings: bool = True
    """Use one matrix for the input embedding and the output head."""
    initialization: Literal["model", "normal"] = "model"
    """model: the architecture's own. normal: weights N(0, 0.02), biases 0, norm weights 1."""
    attention: Literal["sdpa", "eager"] = "sdpa"
    """sdpa: torch's fused attention. eager: plain matrix products."""

    def problems(self) -> list[str]:
        found = at_least(
            "model", self, hidden_size=1, num_hidden_layers=1, num_attention_heads=1, intermediate_size=1,
            max_position_embeddings=2,
        )  # fmt: skip
        if self.num_attention_heads > 0 and self.hidden_size % self.num_attention_heads:
            found.append(
                f"model.num_attention_heads ({self.num_attention_heads}) does not divide "
                f"model.hidden_size ({self.hidden_size})"
            )
        elif self.architecture == "llama" and self.hidden_size // max(1, self.num_attention_heads) % 2:
            found.append("model.hidden_size / model.num_attention_heads must be even: rotary positions turn pairs")
        if not 0 <= self.dropout < 1:
            found.append(f"model.dropout is {self.dropout}; it must be at least 0 and less than 1")
        return found


@dataclass
class BatchConfig:
    """How many sequences make one update, and how many a device computes at once."""

    global_batch_size: int = 8
    """Sequences per optimizer step, over all processes and micro-batches."""
    per_device_batch_size: int | None = None
    """Sequences per micro-batch on one device; trades speed for memory only. null: the device's whole share."""

    def problems(self) -> list[str]:
        return at_least("batch", self, global_batch_size=1, per_device_batch_size=1)


@dataclass
class OptimizerConfig:
    """AdamW."""

    learning_rate: float = 3e-3
    """Peak learning rate."""
    weight_decay: float = 0.1
    """Decoupled weight decay, on matrices only: never on biases and norm weights."""
    beta1: float = 0.9
    """Decay rate of the gradient's running mean."""
    beta2: float = 0.95
    """Decay rate of the squared gradient's running mean."""
    epsilon: float = 1e-8
    """Added to the denominator."""
    max_grad_norm: float = 1.0
    """Clip the gradient's global norm to this. 0: measure but do not clip."""

    def problems(self) -> list[str]:
        found = at_least("optimizer", self, weight_decay=0, max_grad_norm=0)
        if self.learning_rate <= 0:
            found.append(f"optimizer.learning_rate is {self.learning_rate}; it must be positive")
        if self.epsilon <= 0:
            found.append(f"optimizer.epsilon is {self.epsilon}; it must be positive")
        for name in ("beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                found.append(f"optimizer.{name} is {getattr(self, name)}; it must be at least 0 and less than 1")
        return found


@dataclass
class ScheduleConfig:
    """The learning rate as a function of the step, and how long to train."""

    shape: Literal["linear", "cosine", "constant"] = "cosine"
    """Form of the decay after the linear warm-up."""
    warmup_steps: int = 40
    """Steps from 0 to the peak learning rate."""
    min_learning_rate_ratio: float = 0.0
    """Learning rate at the last step of linear and cosine, as a share of the peak."""
    max_steps: int | None = 800
    """Optimizer steps in all. Give this or num_epochs, and null for the other."""
    num_epochs: float | None = None
    """Passes over the training rows; the last global batch is filled up from the next pass."""

    def problems(self) -> list[str]:
        found = at_least("schedule", self, warmup_steps=0, max_steps=1)
        if (self.max_steps is None) == (self.num_epochs is None):
            found.append("give exactly one of schedule.max_steps and schedule.num_epochs (null for the other)")
        if self.num_epochs is not None and self.num_epochs <= 0:
            found.append(f"schedule.num_epochs is {self.num_epochs}; it must be positive")
        if not 0 <= self.min_learning_rate_ratio <= 1:
            found.append(f"schedule.min_learning_rate_ratio is {self.min_learning_rate_ratio}; it must lie in [0, 1]")
        return found


@dataclass
class EvaluationConfig:
    """Loss on the validation documents, all of them, and what follows from it."""

    every_steps: int = 200
    """Optimizer steps between evaluations; the last step is always evaluated."""
    per_device_batch_size: int = 32
    """Sequences per evaluation batch on one device."""
    early_stopping_patience: int | None = None
    """Stop after this many evaluations in a row without improvement. null: never."""
    early_stopping_min_delta: float = 0.0
    """For patience, a loss is an improvement when it is lower than at the last one by more than this, in nats per token.
    The best checkpoint is that of the lowest loss, however little lower."""

    def problems(self) -> list[str]:
        return at_least(
            "evaluation", self, every_steps=1, per_device_batch_size=1, early_stopping_patience=1,
            early_stopping_min_delta=0,
        )  # fmt: skip


@dataclass
class CheckpointConfig:
    """What is written so that a run can go on."""

    every_steps: int = 200
    """Optimizer steps between checkpoints; the best and the last step are always saved."""
    keep_last: int = 2
    """Newest checkpoints kept, beside the best one."""
    resume: Literal["never", "auto"] = "never"
    """auto: go on from the newest valid checkpoint of the run folder; start if it has no checkpoint; refuse if all are
    damaged. never: refuse a run folder that is in use."""

    def problems(self) -> list[str]:
        return at_least("checkpoint", self, every_steps=1, keep_last=1)


@dataclass
class TrackingConfig:
    """What a person sees. metrics.jsonl, training.log, loss.png and summary.json are always written."""

    log_every_steps: int = 20
    """Optimizer steps between log lines."""
    trackers: list[Literal["tensorboard", "wandb"]] = field(default_factory=lambda: ["tensorboard"])  # type: ignore[arg-type]
    """Trackers beside the files. W&B without a key runs offline."""
    project: str = "plainloop"
    """Project name for the trackers."""
    sample_every_steps: int = 200
    """Optimizer steps between texts written by the model into samples.md. 0: never."""
    sample_prompt: str = ""
    """Beginning of the sample text. Empty: the start of a document."""
    sample_max_new_tokens: int = 128
    """Longest sample, in tokens."""

    def problems(self) -> list[str]:
        return at_least("tracking", self, log_every_steps=1, sample_every_steps=0, sample_max_new_tokens=1)


@dataclass
class TrainConfig:
    """Options of train.py. Processes, devices and precision belong to `accelerate launch`."""

    output: str = "runs/demo"
    """Run folder."""
    seed: int = 1234
    """Seed of the initial weights, the data order, dropout and the samples."""
    matmul_precision: Literal["highest", "high", "medium"] = "highest"
    """torch.set_float32_matmul_precision: what fp32 matrix products may round to."""
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    batch: BatchConfig = field(default_factory=BatchConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)

    def problems(self) -> list[str]:
        found = at_least("", self, seed=0)
        if self.seed >= 2**32:
            found.append(f"seed is {self.seed}; it must be less than 2**32")
        if self.model.pretrained is None and self.data.sequence_length > self.model.max_position_embeddings:
            found.append(
                f"data.sequence_length ({self.data.sequence_length}) is longer than "
                f"model.max_position_embeddings ({self.model.max_position_embeddings}); lower one or raise the other"
            )
        return found
