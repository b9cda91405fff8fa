"""The data of a run: stored rows, or rows made of text while it is being read, behind one interface."""

from functools import partial
from pathlib import Path
from typing import Any

import torch.distributed as dist
from accelerate import Accelerator
from torch.utils.data import DataLoader

from training.launch import BatchPlan
from training.optimization.schedule import resolve_max_steps
from training.parallel.context_parallel import collate_columns
from training.stream_loader import StreamLoader, check_stream_options
from utils.checkpoints import TrainState
from utils.config import TrainConfig
from utils.data.loaders import (
    EVALUATION_SEED,
    CollatedRows,
    Collator,
    Layout,
    build_evaluation_loader,
    build_layout,
    build_train_loader,
    to_tensors,
)
from utils.data.token_dataset import load_manifest, open_split
from utils.model.build import pad_token_id


class TrainingData:
    """Loaders over one dataset folder, and what the rest of the run has to know of it.

    Attributes:
        key: identity of the dataset, from its manifest.
        train_rows: the training rows; None for a stream.
        max_steps: optimizer steps of the whole run.
        example: the first validation row, collated; a batch of one row.
        validation_bytes: length of the validation text, if all its tokens are targets; else None.
    """

    def __init__(
        self, config: TrainConfig, accelerator: Accelerator, plan: BatchPlan, tokenizer: Any, collate_rows: Collator
    ) -> None:
        """`collate_rows` is the objective's. `UserError` for a dataset or options that cannot be used."""
        self.config, self.accelerator, self.plan = config, accelerator, plan
        self.folder = Path(config.data.dataset)
        self.manifest = load_manifest(self.folder)
        self.key: str = self.manifest["key"]
        self.context_group = None  # the ranks that share each row
        self._collate = collate_rows
        if plan.context_parallel_size > 1:
            self.context_group = accelerator.torch_device_mesh["cp"].get_group()
            rank = dist.get_rank(self.context_group)
            self._collate = partial(collate_columns, collate_rows, rank, plan.context_parallel_size)
        self._validation_rows = self._lay_out("validation", tokenizer)
        self.train_rows = None if self.manifest.get("stream") else self._lay_out("train", tokenizer)
        if self.train_rows is None:
            check_stream_options(config, plan)
        self._stream: StreamLoader | None = None
        self.max_steps = resolve_max_steps(
            config.schedule, num_rows=self.num_rows, global_batch_size=plan.global_batch_size,
            sequence_length=config.data.sequence_length,
        )  # fmt: skip
        self.example = to_tensors(CollatedRows(self._validation_rows, collate_rows, EVALUATION_SEED).__getitems__([0]))
        splits = self.manifest["splits"]
        self.validation_bytes = splits["validation"]["bytes"] if config.objective.name == "causal" else None

    @property
    def num_rows(self) -> int | None:
        """Training rows; None for a stream."""
        return None if self.train_rows is None else len(self.train_rows)

    def _lay_out(self, split: str, tokenizer: Any) -> Layout:
        return build_layout(
            open_split(self.folder, split), self.config.data.layout, self.config.data.sequence_length,
            pad_token_id=pad_token_id(tokenizer), vocab_size=len(tokenizer),
            fixed_length=self.config.data.pad_to == "max_length",
        )  # fmt: skip

    def train_loader(self, state: TrainState) -> DataLoader | StreamLoader:
        """Endless micro-batches from where `state` stands, `plan.accumulation` of them per step."""
        config, plan = self.config, self.plan
        if self.train_rows is not None:
            return build_train_loader(
                self.train_rows, self._collate, plan.micro_batch * plan.data_parallel_size, samples_seen=state.samples_seen, seed=config.seed,
                num_workers=config.data.num_workers,
            )  # fmt: skip
        from preparation.stream import TextStream  # here: stored tokens need nothing that reads text

        documents = TextStream(self.manifest["options"], self.folder, config.data.stream_lanes, config.seed)
        self._stream = StreamLoader(
            documents, self._collate, plan, rank=self.accelerator.process_index // plan.context_parallel_size,
            sequence_length=config.data.sequence_length, num_workers=config.data.num_workers,
            device=self.accelerator.device, state=state.stream, samples_seen=state.samples_seen, seed=config.seed,
        )  # fmt: skip
        return self._stream

    def validation_loader(self) -> DataLoader:
        batch_size = self.config.evaluation.per_device_batch_size * self.plan.data_parallel_size
        return build_evaluation_loader(self._validation_rows, self._collate, batch_size)

    def stream_state(self) -> dict[str, Any] | None:
        """Where each lane of a stream stands (all ranks call); None for stored data, whose order is computed."""
        return None if self._stream is None else self._stream.state()

    def describe(self) -> str:
        """A line on the rows of the run and how often it reads them."""
        length = self.config.data.sequence_length
        if self.train_rows is None:
            lanes = self.config.data.stream_lanes
            return f"data: a stream of {lanes} lanes, rows of {length}; {self.max_steps} steps"
        epochs = self.max_steps * self.plan.global_batch_size / len(self.train_rows)
        return (
            f"data: {len(self.train_rows):,} rows of {length}, {self.train_rows.utilisation:.2%} used; "
            f"{self.max_steps} steps, {epochs:.2f} epochs"
        )
