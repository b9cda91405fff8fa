"""The options of train.py: one dataclass per subject; each field's docstring is its `--help` text and gives its unit.

The defaults train the demo. The types hold the bounds; `problems()` checks values against each other. "Step" means
optimizer step everywhere.
"""

from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from utils.cli import BelowOne, Fraction, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, Seed, nearest

SIZE_NAMES = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "max_position_embeddings")
# architecture → name → values of SIZE_NAMES. `tiny` trains in minutes on a CPU. The others are those of published
# models: SmolLM2, Llama 3.2 and Llama 2 (with fewer positions and rope_theta 10,000), GPT-2, BERT, ModernBERT, T5.
SIZES: dict[str, dict[str, tuple[int, int, int, int, int]]] = {
    "llama": {
        "tiny": (192, 4, 4, 512, 256), "135m": (576, 30, 9, 1536, 2048), "1b": (2048, 16, 32, 8192, 8192),
        "7b": (4096, 32, 32, 11008, 4096),
    },
    "gpt2": {
        "tiny": (192, 4, 4, 768, 256), "124m": (768, 12, 12, 3072, 1024), "355m": (1024, 24, 16, 4096, 1024),
        "774m": (1280, 36, 20, 5120, 1024), "1.5b": (1600, 48, 25, 6400, 1024),
    },
    "bert": {"tiny": (192, 4, 4, 768, 256), "base": (768, 12, 12, 3072, 512), "large": (1024, 24, 16, 4096, 512)},
    "modernbert": {
        "tiny": (192, 4, 4, 512, 256), "base": (768, 22, 12, 1152, 8192), "large": (1024, 28, 16, 2624, 8192),
    },
    "t5": {
        "tiny": (192, 3, 4, 768, 512), "small": (512, 6, 8, 2048, 512), "base": (768, 12, 12, 3072, 512),
        "large": (1024, 24, 16, 4096, 512),
    },
}  # fmt: skip
# What a published model has beyond its five sizes.
SIZE_OVERRIDES = {("llama", "135m"): {"num_key_value_heads": 3}, ("llama", "1b"): {"num_key_value_heads": 8}}
# The objectives that transformers has a head for, by architecture; of others it is known when the model is built.
DECODER = ("causal", "fill_in_the_middle", "instruction")
OBJECTIVES = {
    "llama": DECODER, "gpt2": DECODER, "bert": (*DECODER, "masked"), "modernbert": ("masked",), "t5": ("span_corruption",)
}  # fmt: skip

# Fields of a configuration that `model.overrides` cannot set, because something else decides them.
DECIDED = {
    "vocab_size": "the dataset's tokenizer decides it, and model.vocabulary_multiple rounds it up",
    "is_decoder": "objective.name decides it",
    "dtype": "weights are fp32, and the launch decides the precision of their products (--mixed_precision)",
}


@dataclass
class DataConfig:
    """What the model reads."""

    dataset: str = "data/demo"
    """Folder written by prepare_data.py."""
    sequence_length: Annotated[int, ">= 2"] = 256
    """Positions per row (T), in tokens. For an encoder-decoder: tokens of text, before spans are cut out."""
    layout: Literal["packed", "best_fit", "padded"] = "packed"
    """packed: documents end to end, cut every T tokens; each attends only to itself. best_fit: the same, but cuts only
    documents longer than T. padded: one document, or one piece of a longer one, per row. No layout loses a target."""
    pad_to: Literal["longest", "max_length"] = "longest"
    """Layout padded: pad rows to the longest row of the batch, or to sequence_length, so that all shapes are equal."""
    num_workers: NonNegativeInt = 0
    """Loader processes per rank. Stored data is fastest with 0. A stream takes at most one per lane."""
    stream_lanes: PositiveInt = 8
    """Streams only: sequences of documents, from each of which a global batch takes an equal part. Must divide
    batch.global_batch_size and be a multiple of the number of processes, which share the lanes."""


@dataclass
class MaskedConfig:
    """Masked language modelling; see utils/objectives/masked.py."""

    mask_rate: Annotated[float, "> 0 and <= 1"] = 0.15
    """Share of the tokens to predict."""
    replace_rate: Fraction = 0.8
    """Share of the tokens to predict that become the mask token."""
    random_rate: Fraction = 0.1
    """Share of the tokens to predict that become a random token. The rest stay as they are."""
    whole_words: bool = False
    """Choose all tokens of a word, or none."""

    def problems(self) -> list[str]:
        too_many = self.replace_rate + self.random_rate > 1
        return ["objective.masked.replace_rate and random_rate add up to more than 1"] if too_many else []


@dataclass
class SpanCorruptionConfig:
    """Span corruption for encoder-decoder models; see utils/objectives/span_corruption.py."""

    noise_density: Fraction = 0.15
    """Share of the tokens that are cut out of the input and become the target."""
    mean_span_length: Annotated[float, ">= 1"] = 3.0
    """Mean length of a span that is cut out, in tokens."""


@dataclass
class FillInTheMiddleConfig:
    """Fill-in-the-middle; see utils/objectives/fill_in_the_middle.py."""

    rate: Fraction = 0.5
    """Share of the documents that are rearranged. The others stay as they are."""
    suffix_first_rate: Fraction = 0.5
    """Share of the rearranged documents in the order suffix, prefix, middle. The others are prefix, suffix, middle."""


@dataclass
class ObjectiveConfig:
    """What the model learns to predict."""

    name: Literal[
        "causal", "masked", "span_corruption", "fill_in_the_middle", "instruction", "captioning", "transcription"
    ] = "causal"
    """causal: the next token. masked: tokens hidden from an encoder. span_corruption: spans cut out of an encoder's
    input. fill_in_the_middle: causal, documents' middle moved to their end. instruction: the assistant's turns.
    captioning: the next token of texts with pictures, in conversations the assistant's. transcription: what is said."""
    label_smoothing: BelowOne = 0.0
    """Share of each target's probability that is spread over the vocabulary, in training only. train/loss includes it."""
    z_loss: NonNegativeFloat = 0.0
    """Weight of the squared logarithm of the softmax's normaliser, which keeps logits small. In training only.
    train/loss includes it."""
    blank_media: bool = False
    """captioning, transcription: all pictures grey, all sounds silent. A control: what the model learns without them."""
    masked: MaskedConfig = field(default_factory=MaskedConfig)
    span_corruption: SpanCorruptionConfig = field(default_factory=SpanCorruptionConfig)
    fill_in_the_middle: FillInTheMiddleConfig = field(default_factory=FillInTheMiddleConfig)


@dataclass
class LoraConfig:
    """Low-rank adapters beside frozen weights (Hu et al., 2021, arXiv 2106.09685), by the library peft."""

    rank: NonNegativeInt = 0
    """Rank of each adapter. 0: no adapters; all weights are trained."""
    alpha: PositiveFloat = 16.0
    """An adapter's output is scaled by alpha / rank."""
    dropout: BelowOne = 0.0
    """Probability of dropout on an adapter's input."""
    target_modules: list[str] = field(default_factory=lambda: ["all-linear"])
    """Name endings of the linear layers that get an adapter. all-linear: every one but the output head."""


@dataclass
class ModelConfig:
    """A model from its configuration, or from a folder of weights."""

    pretrained: str | None = None
    """Folder or Hub name of a model to start from. Its own architecture and sizes are used; those below are ignored."""
    architecture: str = "llama"
    """llama, gpt2, bert, modernbert or t5; with `size` null any `model_type` of transformers that has the objective's
    head (check it with --dry_run)."""
    size: str | None = "tiny"
    """Sizes by name: llama tiny, 135m, 1b, 7b; gpt2 tiny, 124m, 355m, 774m, 1.5b; bert and modernbert tiny, base,
    large; t5 tiny, small, base, large. null: the sizes below, or the architecture's own."""
    hidden_size: PositiveInt | None = None
    """Width of the residual stream (D). null, here and in the next four: as `size` says."""
    num_hidden_layers: PositiveInt | None = None
    """Transformer blocks. For an encoder-decoder: in each of the two."""
    num_attention_heads: PositiveInt | None = None
    """Attention heads per block (H). Must divide hidden_size."""
    intermediate_size: PositiveInt | None = None
    """Width of the MLP."""
    max_position_embeddings: Annotated[int, ">= 2"] | None = None
    """Longest sequence the model can read, in tokens. T5 has no such limit."""
    overrides: dict[str, Any] = field(default_factory=dict)
    """Further fields of the architecture's configuration class, by name, as in '{num_key_value_heads: 2}' or
    '{layer_types: [linear_attention, full_attention]}'."""
    dropout: BelowOne = 0.0
    """Probability of every dropout that the architecture has (llama has only the attention's)."""
    tie_word_embeddings: bool = True
    """Use one matrix for the input embedding and the output head."""
    vocabulary_multiple: PositiveInt = 1
    """Round the number of embedding rows up to a multiple of this. 64 or 128 suit matrix units."""
    initialization: Literal["model", "normal", "gpt2"] = "model"
    """model: the architecture's own. normal: N(0, 0.02), biases 0, norms 1. gpt2: residual projections / √(number)."""
    attention: Literal["auto", "blocked", "varlen", "sdpa", "eager"] = "auto"
    """blocked: in training, on rows below 1,024 positions, skip keys that a block of queries may not see; else sdpa.
    varlen: flash attention within each document, without a mask; for fp16 and bf16 without attention dropout; on a CPU
    a slow loop, to try it. sdpa: torch's fused attention. eager: plain products. auto: blocked on a CPU, varlen on CUDA
    where it serves the model, else sdpa; eager as a last resort."""
    activation_checkpointing: bool = False
    """Keep only each block's input and recompute the rest in the backward pass: less memory, a third more work."""
    activation_checkpointing_every: PositiveInt = 1
    """Checkpoint every n-th block only; the others keep their activations. --dry_run shows what fits."""
    activation_offload: bool = False
    """GPU only: keep the checkpointed inputs in host memory. Pays for long sequences; costs two copies per block."""
    parts: dict[str, str] = field(default_factory=dict)
    """Pretrained folders for parts of a new model, by module name, as in '{vision_tower: FOLDER, language_model: FOLDER}'.
    The sizes of a part are those of its folder."""
    frozen: list[str] = field(default_factory=list)
    """Names of modules that are not trained, as in '[vision_tower]'."""
    lora: LoraConfig = field(default_factory=LoraConfig)

    def sizes(self) -> dict[str, int | None]:
        """The five sizes, `size` filled in; None where neither says anything."""
        named = (None,) * len(SIZE_NAMES) if self.size is None else SIZES[self.architecture][self.size]
        sizes: dict[str, int | None] = dict(zip(SIZE_NAMES, named, strict=True))
        return sizes | {name: getattr(self, name) for name in SIZE_NAMES if getattr(self, name) is not None}

    def problems(self) -> list[str]:
        found = []
        if self.activation_offload and not self.activation_checkpointing:
            found.append("model.activation_offload needs model.activation_checkpointing; set that to true too")
        if self.frozen and self.lora.rank:
            found.append("model.frozen: model.lora.rank freezes all weights; choose model.lora.target_modules instead")
        if self.pretrained is not None:
            return found + (["model.parts is for a new model; leave model.pretrained null"] if self.parts else [])
        found += [f"model.overrides: leave out {name}; {DECIDED[name]}" for name in self.overrides if name in DECIDED]
        if self.lora.rank:
            found.append("model.lora.rank trains adapters beside pretrained weights; give model.pretrained")
        if self.size is not None and self.size not in SIZES.get(self.architecture, {}):
            known = ", ".join(SIZES.get(self.architecture, ()))
            advice = f"it has {known}" if known else "give model.size null and the sizes one by one"
            meant = "" if known else nearest(self.architecture, SIZES)
            return [*found, f"model.architecture {self.architecture} has no size {self.size}{meant}; {advice}"]
        width, heads = self.sizes()["hidden_size"], self.sizes()["num_attention_heads"]
        if width and heads and width % heads:
            found.append(f"model.num_attention_heads ({heads}) does not divide model.hidden_size ({width})")
        elif width and heads and self.architecture in ("llama", "modernbert") and width // heads % 2:
            found.append("model.hidden_size / model.num_attention_heads must be even for rotary positions")
        return found


@dataclass
class BatchConfig:
    """How many sequences make one update, and how many a device computes at once."""

    global_batch_size: PositiveInt = 8
    """Sequences per optimizer step, over all processes and micro-batches."""
    per_device_batch_size: PositiveInt | None = None
    """Sequences per micro-batch on one device. Only trades speed for memory. null: the device's whole share."""


@dataclass
class KernelConfig:
    """Faster implementations with the same results up to rounding; see utils/kernels/. Attention is model.attention."""

    chunked_head: bool = True
    """Hold the logits of a few rows at a time. Used where logits are one linear map of the last hidden state."""
    fused_activation: bool = True
    """Compute GPT-2's gelu_new in one pass over memory, not eight."""
    fast_dropout: bool = True
    """On a CPU: draw fewer random numbers for dropout. Rounds its probability to 1/65,536."""


@dataclass
class OptimizerConfig:
    """The optimizer. Each option names the optimizers that use it."""

    name: str = "adamw"
    """adamw: AdamW. muon: Muon for the matrices of hidden layers, AdamW for embeddings, output head, norms and biases;
    its updates are scaled to suit AdamW's learning_rate. adafactor: a row and a column in place of each matrix of
    squared gradients; learning_rate is relative to a parameter's size, at most 1 / sqrt(step). sgd: Nesterov momentum;
    slow for transformers. adamw_8bit: AdamW with 8-bit state; needs bitsandbytes (`[optim8bit]`)."""
    learning_rate: PositiveFloat = 3e-3
    """Peak learning rate."""
    learning_rates: dict[str, float] = field(default_factory=dict)
    """Other peaks for modules by name, as in '{multi_modal_projector: 1e-3}'. muon trains their matrices by AdamW."""
    weight_decay: NonNegativeFloat = 0.1
    """Decoupled weight decay on matrices, never on biases and norm weights. sgd adds it to the gradient instead."""
    beta1: BelowOne = 0.9
    """Decay rate of the gradient's running mean. For adamw, adamw_8bit, and the AdamW part of muon."""
    beta2: BelowOne = 0.95
    """Decay rate of the squared gradient's running mean. For adamw, adamw_8bit, and the AdamW part of muon."""
    epsilon: PositiveFloat = 1e-8
    """Added to the denominator. For adamw, adamw_8bit, and the AdamW part of muon."""
    momentum: BelowOne = 0.95
    """Decay rate of the gradient's running mean (muon) or sum (sgd)."""
    max_grad_norm: NonNegativeFloat = 1.0
    """Clip the gradient's global norm to this. 0: measure but do not clip."""
    ema_decay: Annotated[float, "> 0 and < 1"] | None = None
    """Also keep a moving average of the weights, with this decay per step, such as 0.999. null: none."""

    def problems(self) -> list[str]:
        wrong = [f"{name} {rate}" for name, rate in self.learning_rates.items() if not rate > 0]
        return [f"optimizer.learning_rates must be above 0, not {', '.join(wrong)}"] if wrong else []


@dataclass
class ScheduleConfig:
    """The learning rate as a function of the step, and how long to train."""

    shape: Literal["linear", "cosine", "warmup_stable_decay", "inverse_sqrt", "constant"] = "cosine"
    """After the linear warm-up. linear, cosine: decay over all steps. warmup_stable_decay: constant, then decay over
    decay_steps as 1 - sqrt. inverse_sqrt: decay as 1 / sqrt(step), whatever the number of steps. constant: the peak."""
    warmup_steps: NonNegativeInt = 40
    """Steps from 0 to the peak learning rate."""
    decay_steps: PositiveInt | None = None
    """warmup_stable_decay only: steps of the final decay. null: a fifth of all steps, or what the warm-up leaves."""
    min_learning_rate_ratio: Fraction = 0.0
    """Learning rate at the last step, as a share of the peak. inverse_sqrt: a lower limit. constant: not used."""
    max_steps: PositiveInt | None = 800
    """Total optimizer steps. Give one of this, num_epochs and max_tokens, and null for the others."""
    num_epochs: PositiveFloat | None = None
    """Passes over the training rows. The next pass completes the last global batch."""
    max_tokens: PositiveInt | None = None
    """Total positions, rows × data.sequence_length, rounded up to a whole global batch."""

    def problems(self) -> list[str]:
        found = []
        if [self.max_steps, self.num_epochs, self.max_tokens].count(None) != 2:
            names = "schedule.max_steps, schedule.num_epochs and schedule.max_tokens"
            found.append(f"give exactly one of {names} (null for the others)")
        if self.decay_steps is not None:
            if self.shape != "warmup_stable_decay":
                found.append(f"schedule.decay_steps is for shape warmup_stable_decay, not {self.shape}; leave it null")
            elif self.max_steps is not None and self.warmup_steps + self.decay_steps > self.max_steps:
                steps = f"schedule.warmup_steps ({self.warmup_steps}) and decay_steps ({self.decay_steps})"
                found.append(f"{steps} are more than schedule.max_steps ({self.max_steps}); lower one of them")
        return found


@dataclass
class EvaluationConfig:
    """Loss on the validation documents, and early stopping."""

    every_steps: PositiveInt = 200
    """Optimizer steps between evaluations. The last step is always evaluated."""
    at_start: bool = False
    """Also evaluate before the first step: what a pretrained model already knows."""
    per_device_batch_size: PositiveInt = 32
    """Sequences per evaluation batch on one device."""
    max_tokens: PositiveInt | None = None
    """Score about this many validation tokens while training, in rows spread evenly over the split, always the same ones.
    The end of the run scores all. null: always all."""
    early_stopping_patience: PositiveInt | None = None
    """Stop after this many evaluations in a row without improvement. null: never."""
    early_stopping_min_delta: NonNegativeFloat = 0.0
    """Patience counts an evaluation as an improvement if its loss falls by more than this, in nats per token."""
    early_stopping_weights: Literal["trained", "average"] = "trained"
    """Whose loss patience follows. average: that of the moving average of the weights (optimizer.ema_decay)."""


@dataclass
class CheckpointConfig:
    """What is saved so that a run can continue."""

    every_steps: PositiveInt = 200
    """Optimizer steps between checkpoints. The best and the last step are always saved."""
    keep_last: PositiveInt = 2
    """Number of newest checkpoints to keep, in addition to the best one and the one with the best average."""
    archive_every_steps: PositiveInt | None = None
    """Never remove the checkpoints of steps that are multiples of this. null: archive none."""
    asynchronous: bool = True
    """Write while training continues, from a copy in the host memory of the main process. The last save of a launch
    is always synchronous, and so is one at a step with an evaluation."""
    resume: Literal["never", "auto"] = "never"
    """auto: continue from the newest valid checkpoint; start if there is none; refuse if all are damaged. never: refuse
    a run folder that is in use."""


@dataclass
class GuardConfig:
    """When to skip an update, and when to give up the run. All ranks decide alike, before the update."""

    max_nonfinite: NonNegativeInt = 0
    """Updates with a loss or gradient that is not finite that the run may skip; one more stops it. Their texts go to
    bad_batches/ in the run folder. fp16 overflows do not count: the gradient scaler skips them."""
    spike_deviations: PositiveFloat | None = None
    """Skip an update whose loss or gradient norm is more than this many standard deviations above the mean of the
    updates before it, such as 6 (the rule and the numbers of OLMo-core's SkipStepOptimizer). null: never."""
    spike_window: Annotated[int, ">= 4"] = 128
    """Number of updates that give mean and deviation. No update is skipped before half as many were made."""
    max_spikes: NonNegativeInt = 10
    """Spikes that the run may skip; one more stops it."""
    hang_minutes: PositiveFloat = 10.0
    """End a rank without progress for this long plus twice the time of a save; stack traces go to .heartbeats/. The first
    step of a launch that compiles may take half an hour more."""


Tracker = Literal["aim", "clearml", "comet_ml", "dvclive", "mlflow", "swanlab", "tensorboard", "trackio", "wandb"]


@dataclass
class TrackingConfig:
    """What a person sees. metrics.jsonl, training.log, report.html, loss.png and summary.json are always written."""

    log_every_steps: PositiveInt = 20
    """Optimizer steps between log lines. train/loss and the speed are means over the steps since the last line, the
    gradient norm is that of the line's step."""
    trackers: list[Tracker] = field(default_factory=lambda: ["tensorboard"])  # type: ignore[arg-type]
    """Trackers in addition to the files, by accelerate's names. W&B without a key runs offline."""
    project: str = "plainloop"
    """Project name for the trackers."""
    sample_every_steps: NonNegativeInt = 200
    """Optimizer steps between sample texts that the model adds to samples.md. 0: never."""
    sample_prompt: list[str] | str = ""
    """Beginning of the sample text, or of several, as in '["LOVE, n.", "hacker:"]'. Empty: the start of a document."""
    sample_max_new_tokens: PositiveInt = 128
    """Longest sample, in tokens."""


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
    seed: Seed = 1234
    """Seed of the initial weights, the data order, dropout and the samples: 32 bits."""
    max_minutes: PositiveFloat | None = None
    """Save and stop so that this launch takes at most this long, from the start of its processes. null: no limit."""
    console: Literal["lines", "quiet", "json"] = "lines"
    """What a launch prints. quiet: warnings and errors. json: the records of metrics.jsonl, warnings and errors."""
    dry_run: bool = False
    """Print parameters, memory, FLOPs and time of the run, on this launch and on named hardware, and stop."""
    matmul_precision: Literal["auto", "highest", "high", "medium"] = "auto"
    """torch.set_float32_matmul_precision: how far fp32 matrix products may round. auto: high on CUDA, which
    is TF32; medium on a CPU with AVX-512 and without AMX, where it selects a faster library that rounds no more; else
    highest."""
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
        if self.evaluation.early_stopping_weights == "average" and self.optimizer.ema_decay is None:
            return ["evaluation.early_stopping_weights average needs an average: give optimizer.ema_decay, as in 0.999"]
        if self.model.pretrained is not None or self.model.problems():
            return []
        name, architecture = self.objective.name, self.model.architecture
        fitting = [known for known, objectives in OBJECTIVES.items() if name in objectives]
        if architecture in OBJECTIVES and fitting and architecture not in fitting:  # none: an objective of your own
            remedy = f"choose from {', '.join(fitting)}"
            return [f"model.architecture {architecture} has no head for objective.name {name}; {remedy}"]
        if architecture == "t5":
            return []
        length, limit = self.data.sequence_length, "max_position_embeddings"
        positions: Any = (self.model.sizes() | self.model.overrides)[limit]
        if not isinstance(positions, int) or length <= positions:
            return []
        return [f"data.sequence_length ({length}) is longer than model.{limit} ({positions}); lower it or raise this"]
