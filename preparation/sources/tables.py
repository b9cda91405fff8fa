"""Datasets in the formats of the library `datasets`: saved folders and the Hub."""

from pathlib import Path

import datasets

from preparation.sources.source_config import SourceConfig
from utils.cli import UserError


def load_saved(path: Path, split: str) -> datasets.Dataset:
    """A folder written by `save_to_disk`; `UserError` if it cannot be read or has no such split."""
    try:
        table = datasets.load_from_disk(str(path))
    except Exception as error:  # the library raises whatever its parts meet
        raise UserError(f"{path}: cannot be read as a saved dataset: {' '.join(str(error).split())[:200]}") from None
    if isinstance(table, datasets.DatasetDict):
        if split not in table:
            raise UserError(f"{path}: no split {split!r}; it has {', '.join(map(str, table))}")
        return table[split]
    return table


def load_hub(source: SourceConfig) -> datasets.Dataset | datasets.IterableDataset:
    """`load_dataset` of a Hub name, or of a local folder in the Hub's layout."""
    try:
        return datasets.load_dataset(
            str(source.hub), source.config, split=source.split, revision=source.revision, streaming=source.streaming
        )
    except Exception as error:  # network, names, formats: the library has many kinds
        raise UserError(f"hub {source.hub}: cannot be loaded: {' '.join(str(error).split())[:300]}") from None
