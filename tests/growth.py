"""How the cost of some work grows with its size: in CPU time, which a busy machine does not change much."""

import time
from collections.abc import Callable


def growth(work: Callable[[int], object], size: int, tries: int = 3) -> float:
    """CPU seconds of `work(4 * size)` by those of `work(size)`, the least of some tries: 4 if it is linear, 16 if it is
    quadratic. `work` makes its input beforehand, or at a cost that is linear."""
    return min(seconds(work, 4 * size) for _ in range(tries)) / min(seconds(work, size) for _ in range(tries))


def seconds(work: Callable[[int], object], size: int) -> float:
    started = time.process_time()
    work(size)
    return time.process_time() - started
