"""Compare a run's loss with simple models of the same targets, on the same held-out rows.

    python examples/baselines.py --run runs/small_bert_mlm

The training rows, as the run's objective makes them, are counted once. unigram: the frequency of the targets. bigram:
the token at the position that predicts the target. both sides (masked): the tokens to the left and right, as if they
were independent given the target. The smoothing of pairs is chosen on the held-out rows, which favours the baselines.
"""

import json
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from utils.cli import UserError, parse_config, parse_sections, run_script


@dataclass
class BaselinesConfig:
    """Options of baselines.py."""

    run: str = "runs/demo"
    """Run folder, written by train.py."""

    def problems(self) -> list[str]:
        if not (Path(self.run) / "config.yaml").is_file():
            return [f"{self.run} is not a run folder (it has no config.yaml); name one with --run"]
        return []


config = parse_config(BaselinesConfig, __doc__) if __name__ == "__main__" else None

from collections.abc import Iterator

import numpy as np

from utils.config import ScoringConfig
from utils.data.loaders import EVALUATION_SEED, CollatedRows, build_layout
from utils.data.packing import IGNORED, Batch
from utils.data.token_dataset import load_manifest, open_split
from utils.files import read_yaml
from utils.model.build import pad_token_id
from utils.objectives import objective_module
from utils.pretrained import read_tokenizer

ROWS = 64
SMOOTHINGS = (0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0)
LARGEST_VOCABULARY = 8192  # the table of pairs is dense


def main(config: BaselinesConfig) -> None:
    path = Path(config.run) / "config.yaml"
    run = parse_sections(ScoringConfig, read_yaml(path), path)
    options = run.objective
    if "media" in load_manifest(run.data.dataset):
        raise UserError(f"{config.run} is a run with pictures or sounds; baselines are counts of tokens alone")
    tokenizer = read_tokenizer(Path(run.data.dataset) / "tokenizer")
    collate = objective_module(options.name).build_collator(options, tokenizer)
    if options.name != "span_corruption" and len(tokenizer) > LARGEST_VOCABULARY:
        raise UserError(
            f"{run.data.dataset}: a vocabulary of {len(tokenizer):,} is too large for a dense table of pairs; "
            f"use a run with at most {LARGEST_VOCABULARY:,} entries"
        )
    rows = {
        split: CollatedRows(
            build_layout(
                open_split(run.data.dataset, split), run.data.layout, run.data.sequence_length,
                pad_token_id=pad_token_id(tokenizer), vocab_size=len(tokenizer),
            ),
            collate, EVALUATION_SEED,
        )
        for split in ("train", "validation")
    }  # fmt: skip

    size = len(tokenizer)
    frequencies = np.ones(size)
    pairs = np.zeros(
        (size, size) if options.name != "span_corruption" else (0, 0), np.float32
    )  # [input, target]; for masked, [left, right] neighbour
    for batch in iter_batches(rows["train"]):
        targets = batch["targets"][batch["targets"] != IGNORED]
        frequencies += np.bincount(targets, minlength=size)
        left, right = neighbours(batch) if options.name == "masked" else inputs_and_targets(batch)
        np.add.at(pairs, (left, right), 1)
    unigram = frequencies / frequencies.sum()

    held_out = list(iter_batches(rows["validation"]))
    targets = np.concatenate([batch["targets"][batch["targets"] != IGNORED] for batch in held_out])
    figures = {"unigram": float(-np.log(unigram[targets]).mean())}
    print(f"{len(targets):,} held-out targets; {np.mean(targets == unigram.argmax()):.1%} are the most frequent token")
    if options.name == "masked":
        mask = tokenizer.mask_token_id
        figures["both sides"] = min(both_sides_loss(held_out, pairs, unigram, mask, k) for k in SMOOTHINGS)
    elif options.name != "span_corruption":
        left, right = (np.concatenate(part) for part in zip(*map(inputs_and_targets, held_out), strict=True))
        figures["bigram"] = min(float(-np.log(smooth(pairs, unigram, k)[left, right]).mean()) for k in SMOOTHINGS)
    for name, loss in figures.items():
        print(f"{name:<12} {loss:.4f} nats per target")
    summary = Path(config.run) / "summary.json"
    if summary.is_file():
        print(f"{'this run':<12} {json.loads(summary.read_text(encoding='utf-8'))['best_loss']:.4f}")


def iter_batches(rows: CollatedRows) -> Iterator[Batch]:
    for start in range(0, len(rows), ROWS):
        yield rows.__getitems__(list(range(start, min(start + ROWS, len(rows)))))


def inputs_and_targets(batch: Batch) -> tuple[np.ndarray, np.ndarray]:
    """(n,) and (n,): the input token at each position that has a target, and the target."""
    if batch["input_ids"].shape != batch["targets"].shape:
        return np.empty(0, np.int64), np.empty(0, np.int64)
    chosen = batch["targets"] != IGNORED
    return batch["input_ids"][chosen], batch["targets"][chosen]


def neighbours(batch: Batch) -> tuple[np.ndarray, np.ndarray]:
    """(n,) and (n,): pairs of consecutive tokens of the uncorrupted text."""
    text = np.where(batch["targets"] != IGNORED, batch["targets"], batch["input_ids"])
    chosen = connected(batch)
    return text[:, :-1][chosen], text[:, 1:][chosen]


def connected(batch: Batch) -> np.ndarray:
    """(B, T - 1) bool: whether a position and the next one belong to the same document."""
    if "position_ids" in batch:  # the unused end of a row counts as one document; its zeros predict only zeros
        return batch["position_ids"][:, 1:] != 0
    return batch["attention_mask"][:, 1:] == 1


def smooth(pairs: np.ndarray, unigram: np.ndarray, strength: float) -> np.ndarray:
    """(V, V): the probability of each next token, with `strength` pseudo-counts spread like the unigram (Dirichlet)."""
    return (pairs + strength * unigram) / (pairs.sum(1, keepdims=True) + strength)


def both_sides_loss(held_out: list[Batch], pairs: np.ndarray, unigram: np.ndarray, mask: int, strength: float) -> float:
    """P(x | left, right) ∝ P(x | left) P(right | x); a neighbour that is masked too is not used."""
    following = smooth(pairs, unigram, strength).astype(np.float32)
    total, count = 0.0, 0
    for batch in held_out:
        ids, same = batch["input_ids"], connected(batch)
        for row, column in np.argwhere(batch["targets"] != IGNORED):
            scores = unigram.copy()
            if column > 0 and same[row, column - 1] and ids[row, column - 1] != mask:
                scores = following[ids[row, column - 1]].astype(np.float64)
            if column < same.shape[1] and same[row, column] and ids[row, column + 1] != mask:
                scores = scores * following[:, ids[row, column + 1]]
            total -= float(np.log(scores[batch["targets"][row, column]] / scores.sum()))
            count += 1
    return total / count


if __name__ == "__main__":
    run_script(main, config)
