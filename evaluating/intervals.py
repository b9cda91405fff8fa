"""Bootstrap intervals over documents (Efron and Tibshirani, "An Introduction to the Bootstrap", 1993, chapter 13).

The documents of a text are drawn again with replacement, whole, because the tokens of one document resemble each other.
All models are scored on the same draws, so what makes a document hard for all of them does not blur their difference.
"""

from dataclasses import dataclass

import numpy as np

RESAMPLES = 2000
CONFIDENCE = 0.95
LEAST_UNITS = 20  # with fewer, such an interval is far too narrow
DRAWN_AT_ONCE = 1 << 21  # numbers in memory


@dataclass(frozen=True)
class Interval:
    low: float
    high: float


@dataclass(frozen=True)
class Difference:
    """What a model scored less what the first one did; `higher_is_better` for scores such as accuracy."""

    value: float
    interval: Interval | None
    higher_is_better: bool = False

    @property
    def verdict(self) -> str:
        if self.interval is None or self.interval.low <= 0 <= self.interval.high:
            return "cannot tell"
        return "better" if (self.interval.low > 0) == self.higher_is_better else "worse"


def resample(columns: np.ndarray, seed: int) -> np.ndarray:
    """Totals of `columns` (U, K) over U units drawn with replacement: (RESAMPLES, K). Equal for equal seeds."""
    generator, units = np.random.default_rng(seed), len(columns)
    at_once = max(1, DRAWN_AT_ONCE // units)
    totals = []
    for start in range(0, RESAMPLES, at_once):
        rows = min(at_once, RESAMPLES - start)
        draws = generator.integers(units, size=(rows, units)) + np.arange(rows)[:, None] * units
        totals.append(np.bincount(draws.ravel(), minlength=rows * units).reshape(rows, units) @ columns)
    return np.concatenate(totals)


def intervals_of_ratios(
    sums: np.ndarray, sizes: np.ndarray, seed: int
) -> tuple[list[Interval | None], list[Interval | None]]:
    """For the M models' ratios of totals, `sums` (U, M) by `sizes` (U, M): the interval of each, and that of its
    difference to the first. None where there are fewer than `LEAST_UNITS` units."""
    models = sums.shape[1]
    if len(sums) < LEAST_UNITS:
        return [None] * models, [None] * models
    totals = resample(np.concatenate([sums, sizes], axis=1).astype(np.float64), seed)
    with np.errstate(invalid="ignore", divide="ignore"):  # a draw of documents without a target
        ratios = totals[:, :models] / totals[:, models:]
    ratios = ratios[np.isfinite(ratios).all(axis=1)]
    if not len(ratios):
        return [None] * models, [None] * models
    return percentiles(ratios), percentiles(ratios - ratios[:, :1])


def percentiles(values: np.ndarray) -> list[Interval | None]:
    """The interval of each column of (R, M)."""
    tail = 100 * (1 - CONFIDENCE) / 2
    return [Interval(float(low), float(high)) for low, high in np.percentile(values, [tail, 100 - tail], axis=0).T]
