"""How the cost of some work grows with its size: in CPU time, which a busy machine does not change much."""

import time
from collections.abc import Callable


def growth(work: Callable[[int], object], size: int, tries: int = 3) -> float:
    """Ratio of CPU seconds, `work(4 * size)` to `work(size)`, each the minimum of `tries` runs: 4 if linear, 16 if quadratic."""
    return min(seconds(work, 4 * size) for _ in range(tries)) / min(seconds(work, size) for _ in range(tries))


def seconds(work: Callable[[int], object], size: int) -> float:
    started = time.process_time()
    work(size)
    return time.process_time() - started
