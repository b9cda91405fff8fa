"""The options of train.py: one dataclass per subject, one docstring with the unit per field.

The defaults train the demo's model on the demo's data by AdamW, so `train.py` runs without any option. `problems()`
returns what is wrong with the *values* of a section, in words that name the option; types and names are checked by
`utils.cli.parse_config`.
"Step" means optimizer step everywhere.
"""

from dataclasses import dataclass, field
from typing import Literal

from utils.cli import at_least
from utils.model_config import ModelConfig
from utils.objective_config import ObjectiveConfig
from utils.optimizer_config import OptimizerConfig, ScheduleConfig


@dataclass
class DataConfig:
    """What the model reads."""

    dataset: str = "data/demo"
    """Folder written by prepare_data.py."""
    sequence_length: int = 256
    """Positions per row (T), in tokens. Of an encoder-decoder: tokens of text, before spans are cut out of it."""
    layout: Literal["packed", "best_fit", "padded"] = "packed"
    """packed: documents end to end, cut every T tokens, each attending to itself only. best_fit: likewise, but only
    documents longer than T are cut, and a row may have a few free positions. padded: one document, or one piece of a
    longer one, per row, with an attention_mask. None of them loses a target."""
    pad_to: Literal["longest", "max_length"] = "longest"
    """Layout padded: fill rows up to the longest of the batch, or to sequence_length, for the same shape every time."""
    num_workers: int = 0
    """Loader processes per rank. 0 is fastest for stored data: a row is a slice of a mapped file. Those of a stream, at
    most one per lane, read and tokenize beside the training."""
    stream_lanes: int = 8
    """Streams only: independent sequences of documents that each global batch is taken from, in equal parts. It must
    divide batch.global_batch_size and be a multiple of the processes; they and their loader workers share the lanes."""

    def problems(self) -> list[str]:
        return at_least("data", self, sequence_length=2, num_workers=0, stream_lanes=1)


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
class EvaluationConfig:
    """Loss on the validation documents, all of them, and what follows from it."""

    every_steps: int = 200
    """Optimizer steps between evaluations; the last step is always evaluated."""
    at_start: bool = False
    """Evaluate before the first step too: what a pretrained model brings along."""
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
    archive_every_steps: int | None = None
    """Checkpoints of the steps that this divides are never removed. null: none is archived."""
    asynchronous: bool = True
    """Write to the disk beside the training, from a copy in memory (of the weights and the optimizer's state, on the
    main process's host). The last checkpoint of a launch is written without."""
    resume: Literal["never", "auto"] = "never"
    """auto: go on from the newest valid checkpoint of the run folder; start if it has no checkpoint; refuse if all are
    damaged. never: refuse a run folder that is in use."""

    def problems(self) -> list[str]:
        return at_least("checkpoint", self, every_steps=1, keep_last=1, archive_every_steps=1)


@dataclass
class GuardConfig:
    """When an update is left out, and when the run is given up. All ranks decide alike, before the update."""

    max_nonfinite: int = 0
    """Updates with a loss or gradient that is not finite that the run may leave out; the next one stops it. Their texts
    are written to bad_batches/ in the run folder. fp16's overflows do not count: its scaler leaves them out."""
    spike_deviations: float | None = None
    """Leave out an update whose loss or gradient norm is more than this many standard deviations above the mean of the
    updates before it, such as 6 (the rule and the numbers of OLMo-core's SkipStepOptimizer). null: never."""
    spike_window: int = 128
    """Updates that mean and deviation are taken over; until there is half as many, none is left out."""
    max_spikes: int = 10
    """Spikes that the run may leave out; the next one stops it."""
    hang_minutes: float = 10.0
    """A rank that comes no further for this long, and twice what a save may take, is ended; its stacks are in
    .heartbeats/ of the run folder."""

    def problems(self) -> list[str]:
        found = at_least("guards", self, max_nonfinite=0, spike_window=4, max_spikes=0)
        for name in ("spike_deviations", "hang_minutes"):
            if getattr(self, name) is not None and getattr(self, name) <= 0:
                found.append(f"guards.{name} is {getattr(self, name)}; it must be positive")
        return found


@dataclass
class KernelConfig:
    """Faster ways to the same result, beyond rounding; see utils/kernels/. Attention is model.attention."""

    chunked_head: bool = True
    """Compute the loss for some rows' logits at a time; all of them would be the largest tensor of a small model. For
    models whose logits are one linear map of their last hidden state."""
    fused_activation: bool = True
    """GPT-2's gelu_new in one pass over the memory, not eight."""
    fast_dropout: bool = True
    """On a CPU: dropout from fewer random numbers, its probability rounded to 1/65,536."""


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
class ScoringConfig:
    """What decides how a run scores a text: two sections of its config.yaml, which an export's report keeps."""

    data: DataConfig = field(default_factory=DataConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)


@dataclass
class TrainConfig:
    """Options of train.py. Processes, devices and precision belong to `accelerate launch`."""

    output: str = "runs/demo"
    """Run folder."""
    seed: int = 1234
    """Seed of the initial weights, the data order, dropout and the samples."""
    max_minutes: float | None = None
    """Save and end in time, so that this launch takes no longer than this, from the start of its processes. null: no
    limit."""
    dry_run: bool = False
    """Print parameters, memory, FLOPs and time of the run, on this launch and on named hardware, and stop."""
    matmul_precision: Literal["auto", "highest", "high", "medium"] = "auto"
    """torch.set_float32_matmul_precision: what fp32 matrix products may round to. auto: medium on a CPU with AVX-512 and
    without AMX, where it rounds no more, but takes a faster library; else highest."""
    data: DataConfig = field(default_factory=DataConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    batch: BatchConfig = field(default_factory=BatchConfig)
    kernels: KernelConfig = field(default_factory=KernelConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    guards: GuardConfig = field(default_factory=GuardConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)

    def problems(self) -> list[str]:
        found = at_least("", self, seed=0)
        if self.max_minutes is not None and self.max_minutes <= 0:
            found.append(f"max_minutes is {self.max_minutes}; it must be positive, or null")
        if self.seed >= 2**32:
            found.append(f"seed is {self.seed}; it must be less than 2**32")
        if self.model.pretrained is None and not self.model.problems() and self.model.architecture != "t5":
            positions = self.model.sizes()["max_position_embeddings"]
            positions = self.model.overrides.get("max_position_embeddings", positions)  # type: ignore[assignment]
            if positions is not None and self.data.sequence_length > positions:
                found.append(
                    f"data.sequence_length ({self.data.sequence_length}) is longer than "
                    f"model.max_position_embeddings ({positions}); lower one or raise the other"
                )
        return found
