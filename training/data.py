"""The data of a run: stored rows, or rows made of text while it is being read, behind one interface."""

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch.utils.data import DataLoader

from training.launch import BatchPlan
from training.optimization.schedule import resolve_max_steps
from training.parallel.context_parallel import collate_columns
from training.stream_loader import StreamLoader, check_stream_options
from utils.checkpoints import TrainState
from utils.cli import UserError
from utils.config import TrainConfig
from utils.data import loaders
from utils.data.order import PADDING_SAMPLE
from utils.data.packing import IGNORED
from utils.data.token_dataset import load_manifest, open_split
from utils.model.build import pad_token_id


class TrainingData:
    """Loaders over one dataset folder, and what the rest of the run has to know of it.

    Attributes:
        key: identity of the dataset, from its manifest.
        train_rows, num_rows: the training rows and their number; None for a stream.
        validation_rows: the validation rows.
        max_steps: optimizer steps of the whole run.
        example: the first validation row that has a target, and a row that only fills up a batch (with media, the first
            alone); collated.
        validation_bytes: length of the validation text, if all its tokens are targets; else None.
        scored_bytes: the same, but None if only a part of the text is scored while training.
        sampled_rows: the validation rows that are scored while training; None if all are.
    """

    def __init__(
        self, config: TrainConfig, accelerator: Accelerator, plan: BatchPlan, tokenizer: Any, collate: loaders.Collator
    ) -> None:
        """`collate` is the objective's. `UserError` for a dataset or options that cannot be used."""
        self.config, self.accelerator, self.plan = config, accelerator, plan
        self.folder = Path(config.data.dataset)
        self.manifest = load_manifest(self.folder)
        self.key: str = self.manifest["key"]
        self.context_group = None  # the ranks that share each row
        self._collate = collate
        if plan.context_parallel_size > 1:
            self.context_group = accelerator.torch_device_mesh["cp"].get_group()
            rank = dist.get_rank(self.context_group)
            self._collate = partial(collate_columns, collate, rank, plan.context_parallel_size)
        self._check = getattr(collate, "check", None)  # of documents with pictures or sounds
        self.validation_rows = self._lay_out("validation", tokenizer)
        self.train_rows = None if self.manifest.get("stream") else self._lay_out("train", tokenizer)
        self.num_rows = None if self.train_rows is None else len(self.train_rows)
        if self.train_rows is None:
            check_stream_options(config, plan)
        self._stream: StreamLoader | None = None
        self.max_steps = resolve_max_steps(
            config.schedule, num_rows=self.num_rows, global_batch_size=plan.global_batch_size,
            sequence_length=config.data.sequence_length,
        )  # fmt: skip
        rows = loaders.CollatedRows(self.validation_rows, collate, loaders.EVALUATION_SEED)
        self.example = find_example(rows, "validation")
        if self.train_rows is not None:
            find_example(loaders.CollatedRows(self.train_rows, collate, config.seed), "training")
        splits = self.manifest["splits"]
        self.validation_bytes = splits["validation"]["bytes"] if config.objective.name == "causal" else None
        self.sampled_rows = sample_rows(self.validation_rows, config.evaluation.max_tokens)
        self.scored_bytes = self.validation_bytes if self.sampled_rows is None else None

    def _lay_out(self, split: str, tokenizer: Any) -> loaders.Layout:
        tokens = open_split(self.folder, split)
        if self._check is not None:
            self._check(tokens, self.config.data.sequence_length, split)
        return loaders.build_layout(
            tokens, self.config.data.layout, self.config.data.sequence_length,
            pad_token_id=pad_token_id(tokenizer), vocab_size=len(tokenizer),
            fixed_length=self.config.data.pad_to == "max_length",
        )  # fmt: skip

    def add_places(self) -> None:
        """Let the loaders built from here on say where documents are, for varlen attention."""
        self._collate = partial(loaders.with_places, self._collate)

    def train_loader(self, state: TrainState) -> DataLoader | StreamLoader:
        """Endless micro-batches from where `state` stands, `plan.accumulation` of them per step."""
        config, plan = self.config, self.plan
        if self.train_rows is not None:
            return loaders.build_train_loader(
                self.train_rows, self._collate, plan.micro_batch * plan.data_parallel_size,
                samples_seen=state.samples_seen, seed=config.seed, num_workers=config.data.num_workers,
            )  # fmt: skip
        from preparation.stream import TextStream  # here: stored tokens need nothing that reads text

        documents = TextStream(self.manifest["options"], self.folder, config.data.stream_lanes, config.seed)
        self._stream = StreamLoader(
            documents, self._collate, plan, rank=self.accelerator.process_index // plan.context_parallel_size,
            sequence_length=config.data.sequence_length, num_workers=config.data.num_workers,
            device=self.accelerator.device, state=state.stream, samples_seen=state.samples_seen, seed=config.seed,
        )  # fmt: skip
        return self._stream

    def validation_loader(self, *, whole: bool = False) -> DataLoader:
        """The rows that are scored while training; with `whole` all rows."""
        batch_size = self.config.evaluation.per_device_batch_size * self.plan.data_parallel_size
        rows = None if whole else self.sampled_rows
        return loaders.build_evaluation_loader(self.validation_rows, self._collate, batch_size, rows)

    @property
    def rows_scored(self) -> int:
        """The number of rows that an evaluation scores while training."""
        return len(self.validation_rows) if self.sampled_rows is None else len(self.sampled_rows)

    def stream_state(self) -> dict[str, Any] | None:
        """Where each lane of a stream stands (all ranks call); None for stored data, whose order is computed."""
        return None if self._stream is None else self._stream.state()

    @property
    def steps_per_evaluation(self) -> float:
        """How many steps take about as long as an evaluation: a forward pass is a third of a step's work."""
        return self.rows_scored / self.plan.global_batch_size / 3

    def describe(self) -> list[str]:
        """Lines on the rows of the run, how often it reads them, and its evaluations."""
        length, rows = self.config.data.sequence_length, "a stream of {} lanes, rows of {}"
        if self.train_rows is None:
            text = rows.format(self.config.data.stream_lanes, length)
        else:
            text = f"{len(self.train_rows):,} rows of {length}, {self.train_rows.utilisation:.2%} used"
        epochs = f", {self.num_epochs:.2f} epochs" if self.num_rows is not None else ""
        every, total = self.config.evaluation.every_steps, len(self.validation_rows)
        scored = f"{total:,} rows" if self.sampled_rows is None else f"{self.rows_scored:,} of {total:,} rows"
        end = "" if self.sampled_rows is None else "; all rows at the end"
        return [
            f"data: {text}; {self.max_steps} steps{epochs}",
            f"validation: {scored} every {every} steps, each time for about {self.steps_per_evaluation:.2g} steps{end}",
        ]

    @property
    def validation_tokens(self) -> int:
        return self.validation_rows.tokens.num_tokens

    @property
    def num_epochs(self) -> float:
        """How often the run reads each training row; not for a stream."""
        return self.max_steps * self.plan.global_batch_size / self.num_rows  # type: ignore[operator]


def sample_rows(rows: loaders.Layout, max_tokens: int | None) -> list[int] | None:
    """Rows with about `max_tokens` tokens, spread evenly over all; None if these hold no more."""
    if max_tokens is None or max_tokens >= rows.tokens.num_tokens:
        return None
    count = max(1, round(len(rows) * max_tokens / rows.tokens.num_tokens))
    return np.linspace(0, len(rows) - 1, count).round().astype(int).tolist()


def find_example(rows: loaders.CollatedRows, split: str) -> dict[str, torch.Tensor]:
    """The first of `rows` that has a target, and a row of padding, as a batch; with media the first alone, because a
    row need not have one picture. `UserError` if none has a target: training would never make a step, and an evaluation
    would have no loss."""
    for start in range(0, len(rows), 64):
        targets = rows.__getitems__(list(range(start, min(start + 64, len(rows)))))["targets"]
        for row in np.flatnonzero((targets != IGNORED).any(axis=1)):
            filler = [PADDING_SAMPLE] if rows.layout.tokens.media is None else []
            return loaders.to_tensors(rows.__getitems__([start + int(row), *filler]))
    remedy = "prepare other text" if split == "training" else "prepare the data with a larger --validation_fraction"
    raise UserError(f"the objective finds nothing to predict in the {len(rows)} {split} rows; {remedy}")
