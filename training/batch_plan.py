"""The split of the global batch, which the recipe fixes, over the ranks of the launch and micro-batches."""

from dataclasses import dataclass

from utils.cli import UserError


@dataclass
class BatchPlan:
    """The split of the global batch: accumulation × data_parallel_size × micro_batch = global_batch_size."""

    global_batch_size: int
    micro_batch: int
    data_parallel_size: int
    accumulation: int
    context_parallel_size: int = 1
    """Ranks that read the same rows, each its part of their positions."""

    @property
    def num_processes(self) -> int:
        return self.data_parallel_size * self.context_parallel_size


def plan_batches(
    global_batch_size: int, per_device_batch_size: int | None, num_processes: int, context_parallel_size: int = 1
) -> BatchPlan:
    """Split the global batch (sequences) over ranks and micro-batches; `UserError` names sizes that would fit."""
    data_parallel_size = num_processes // context_parallel_size
    ranks = "processes" if context_parallel_size == 1 else f"groups of {context_parallel_size} processes"
    share, remainder = divmod(global_batch_size, data_parallel_size)
    if remainder:
        lower, upper = share * data_parallel_size, (share + 1) * data_parallel_size
        fitting = f"{lower} or {upper}" if lower else f"{upper}"
        raise UserError(
            f"batch.global_batch_size {global_batch_size} cannot be split evenly over {data_parallel_size} {ranks}; "
            f"{fitting} would fit"
        )
    micro_batch = per_device_batch_size or share
    if share % micro_batch:
        fitting = ", ".join(str(size) for size in range(1, share + 1) if share % size == 0)
        raise UserError(
            f"batch.per_device_batch_size {micro_batch} does not divide each process's share of {share} sequences "
            f"(batch.global_batch_size {global_batch_size} over {data_parallel_size}); {fitting} would fit"
        )
    return BatchPlan(global_batch_size, micro_batch, data_parallel_size, share // micro_batch, context_parallel_size)
