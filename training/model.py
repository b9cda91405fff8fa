"""The objective of a run, ready for `accelerator.prepare`, with the checks that every training needs."""

from typing import Any

from accelerate import Accelerator

from training.checks import check_documents_stay_apart, check_length
from training.data import TrainingData
from training.dry_run import describe_model, describe_work
from training.hardware import describe_kernels
from training.parallel.context_parallel import use_context_parallel
from training.parallel.sharding import keep_sums_in_fp32
from training.parameters import describe_initialization
from utils.config import TrainConfig
from utils.objectives import Objective, build_objective


def build_training_objective(
    model: Any, config: TrainConfig, accelerator: Accelerator, data: TrainingData
) -> Objective:
    """`model` with its loss, and the kernels that compute it on this device.

    `UserError` if the model cannot read rows of this length, or would mix the documents of a row.
    """
    check_length(model, config.data.sequence_length)
    objective = build_objective(model, config.objective, config.model.attention, config.kernels, accelerator.device)
    if "position_ids" in data.example and not config.dry_run:  # packed rows; a dry run's model has no numbers
        check_documents_stay_apart(objective)
    if data.context_group is not None and not config.dry_run:
        use_context_parallel(objective, data.context_group)
    keep_sums_in_fp32(accelerator)
    return objective


def describe_objective(objective: Objective, config: TrainConfig, data: TrainingData, *, new: bool) -> list[str]:
    """Lines on the model and its kernels. Call it before FSDP shards the parameters, on the main process only."""
    lines = [*describe_model(objective.model), describe_work(objective, data.example, config, data.plan)]
    if new:
        lines.append(describe_initialization(objective.model))
    return [*lines, describe_kernels(objective)]
