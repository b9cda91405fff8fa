"""Distributions of a figure over documents, split by split."""

import math
from dataclasses import dataclass

import numpy as np


@dataclass
class Histogram:
    """A figure of the stored documents, by split."""

    edges: np.ndarray
    """(B + 1,): bin b holds values from edges[b] to below edges[b + 1], the outermost also what lies beyond."""
    counts: dict[str, np.ndarray]
    """(B,) int64: documents in each bin."""
    figures: dict[str, list[float]]
    """Mean, median, 95th percentile, least, greatest."""


def half_octaves(values: dict[str, np.ndarray]) -> np.ndarray:
    """Edges 4, 6, 8, 11, 16, ... around all values, from one power of two to another."""
    low = math.floor(math.log2(min(array.min() for array in values.values())))
    high = math.ceil(math.log2(max(array.max() for array in values.values()) + 1))
    return np.unique(np.round(2 ** (np.arange(2 * low, 2 * high + 1) / 2))).astype(np.int64)


def even_steps(values: dict[str, np.ndarray]) -> np.ndarray:
    """Edges of about 16 bins around all values but one in two hundred on either side."""
    least, greatest = np.quantile(np.concatenate(list(values.values())), [0.005, 0.995])
    step = 2.0 ** math.ceil(math.log2(max(greatest - least, 4) / 16))
    return np.arange(math.floor(least / step), math.floor(greatest / step) + 2) * step


def histogram(values: dict[str, np.ndarray], edges: np.ndarray) -> Histogram:
    counts = {split: np.histogram(np.clip(array, edges[0], edges[-1]), edges)[0] for split, array in values.items()}
    figures = {key: [float(array.mean()), *np.quantile(array, [0.5, 0.95, 0, 1])] for key, array in values.items()}
    return Histogram(edges, counts, figures)
