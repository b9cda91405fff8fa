"""The order of the samples: a pure function of (seed, samples seen), on any number of processes. The order of an epoch
is a keyed permutation, computed without a table: a Feistel network over the next power of four, repeated until it lands
inside the range (Black and Rogaway, "Ciphers with Arbitrary Finite Domains", 2002)."""

import itertools
from collections.abc import Iterator, Sequence

import numpy as np

PADDING_SAMPLE = -1
ROUNDS = 6
SAMPLES_AHEAD = 4096  # computed at a time: for fewer, the calls would cost more than the arithmetic


def permute(index: np.ndarray, size: int, seed: int, epoch: int) -> np.ndarray:
    """Where the permutation of (seed, epoch) sends each of `index` (n,) in [0, size); (n,) int64."""
    half_bits = max(1, (max(size - 1, 1).bit_length() + 1) // 2)
    mask = np.uint64((1 << half_bits) - 1)
    keys = np.random.SeedSequence([seed, epoch]).generate_state(ROUNDS, np.uint64)
    values = index.astype(np.uint64)
    outside = np.ones(len(values), bool)
    while outside.any():  # four steps on average at most: the domain is less than four times the range
        left, right = values[outside] >> np.uint64(half_bits), values[outside] & mask
        for key in keys:
            left, right = right, left ^ (_mix(right ^ key) & mask)
        values[outside] = (left << np.uint64(half_bits)) | right
        outside = values >= np.uint64(size)
    return values.astype(np.int64)


def _mix(value: np.ndarray) -> np.ndarray:
    """The finaliser of SplitMix64 (Steele, Lea and Flood, 2014): every output bit depends on every input bit."""
    value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return value ^ (value >> np.uint64(31))


def sample_ids(samples_seen: int, count: int, num_samples: int, seed: int) -> np.ndarray:
    """The `count` sample ids that follow the first `samples_seen`; every epoch is its own shuffle. (count,) int64."""
    positions = np.arange(samples_seen, samples_seen + count)
    epochs = positions // num_samples
    result = np.empty(count, np.int64)
    for epoch in np.unique(epochs):
        inside = epochs == epoch
        result[inside] = permute(positions[inside] % num_samples, num_samples, seed, int(epoch))
    return result


class TrainBatchSampler:
    """Endless batches of `batch_size` draws (epoch × num_samples + sample id) from a position of the sample order. A
    batch is one micro-batch of *all* ranks; accelerate's `split_batches` gives each rank its slice."""

    drop_last = False

    def __init__(self, num_samples: int, batch_size: int, seed: int, samples_seen: int) -> None:
        self.num_samples, self.batch_size, self.seed, self.samples_seen = num_samples, batch_size, seed, samples_seen

    def __iter__(self) -> Iterator[list[int]]:
        ahead = -(-SAMPLES_AHEAD // self.batch_size) * self.batch_size
        for start in itertools.count(self.samples_seen, ahead):
            epochs = np.arange(start, start + ahead) // self.num_samples
            draws = epochs * self.num_samples + sample_ids(start, ahead, self.num_samples, self.seed)
            yield from draws.reshape(-1, self.batch_size).tolist()


class EvaluationBatchSampler:
    """Every one of `samples` once, in order; `PADDING_SAMPLE` fills the last batch, so that all ranks have as many rows."""

    drop_last = False

    def __init__(self, samples: Sequence[int], batch_size: int) -> None:
        self.samples, self.batch_size = samples, batch_size

    def __len__(self) -> int:
        return -(-len(self.samples) // self.batch_size)

    def __iter__(self) -> Iterator[list[int]]:
        for start in range(0, len(self.samples), self.batch_size):
            batch = list(self.samples[start : start + self.batch_size])
            yield batch + [PADDING_SAMPLE] * (self.batch_size - len(batch))
