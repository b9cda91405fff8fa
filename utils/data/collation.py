"""Rows of a layout as an objective's batches: which tokens are hidden or moved is decided anew for each draw of a row.

A draw is one sample of one epoch: epoch × number of rows + row. What chance decides in it is a pure function of (seed,
draw), so it depends neither on the split into micro-batches and processes nor on where a run was resumed.
"""

from collections.abc import Callable, Sequence

import numpy as np

from utils.data.batch_plan import PADDING_SAMPLE
from utils.data.packing import Batch, PackedLayout, PaddedLayout

Layout = PackedLayout | PaddedLayout
# (rows as a layout gives them, a random generator per row) → what the model reads, and `targets`.
Collator = Callable[[Batch, Sequence[np.random.Generator]], Batch]
EVALUATION_SEED = 0  # whatever a run's own seed: the evaluations of all runs hide the same tokens


class RowGenerators(Sequence[np.random.Generator]):
    """One random generator per draw, made when it is first asked for: most objectives leave nothing to chance."""

    def __init__(self, seed: int, draws: Sequence[int]) -> None:
        self.seed, self.draws = seed, draws
        self.made: dict[int, np.random.Generator] = {}

    def __len__(self) -> int:
        return len(self.draws)

    def __getitem__(self, index):  # type: ignore[override] # no slices
        if index >= len(self.draws):
            raise IndexError(index)
        if index not in self.made:
            self.made[index] = np.random.default_rng([self.seed, self.draws[index] + 1])  # a padding row's draw is -1
        return self.made[index]


class CollatedRows:
    """A map-style dataset of draws, whose unit is the batch."""

    def __init__(self, layout: Layout, collate: Collator, seed: int) -> None:
        self.layout, self.collate, self.seed = layout, collate, seed

    def __len__(self) -> int:
        return len(self.layout)

    def __getitems__(self, draws: list[int]) -> Batch:
        """The batch of `draws` (B,); PyTorch's loaders ask for many samples at once by this name."""
        rows = [PADDING_SAMPLE if draw == PADDING_SAMPLE else draw % len(self.layout) for draw in draws]
        return self.collate(self.layout.__getitems__(rows), RowGenerators(self.seed, draws))
