"""Stages whose results are kept on disk, each under the hash of everything that decides it.

A stage's folder exists only when it is complete, because it is written under another name and renamed. So a killed call
loses only the stage in progress, and a changed option reruns only its own stage and those after it.
"""

import ctypes
import hashlib
import json
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute

SLICE_BYTES = 8 << 20  # of text, that a function of a stage holds in memory at a time
SLICE_DOCUMENTS = 10_000
PR_SET_PDEATHSIG = 1


def hash_json(*parts: Any) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


class Stages:
    """The stage folders of one output, in order. Each stage's key includes the keys before it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._key = ""
        self._used: list[Path] = []

    def run(self, name: str, decided_by: Any, produce: Callable[[Path], None]) -> Path:
        """The folder with the stage's result, which `produce(folder)` writes unless an earlier call did. `decided_by`
        (JSON) is the stage's version and options."""
        self._key = hash_json(self._key, name, decided_by)
        folder = self.folder / f"{name}-{self._key[:16]}"
        self._used.append(folder)
        if folder.is_dir():
            print(f"{name:<12} reused", flush=True)
            return folder
        partial = self.partial(name)
        started = time.perf_counter()
        try:
            partial.mkdir(parents=True)
            produce(partial)
            partial.rename(folder)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
        print(f"{name:<12} {time.perf_counter() - started:.1f} s", flush=True)
        return folder

    def partial(self, name: str) -> Path:
        """A folder for unfinished results. The process id in its name keeps out workers of a killed call."""
        for old in self.folder.glob(".*.partial-*"):
            shutil.rmtree(old, ignore_errors=True)
        return self.folder / f".{name}.partial-{os.getpid()}"

    def remove_unused(self) -> None:
        """Delete the results of earlier recipes, and the remains of killed calls."""
        for path in self.folder.iterdir():
            if path not in self._used and path.name != "lock":
                shutil.rmtree(path) if path.is_dir() else path.unlink()


def text_bytes(documents: datasets.Dataset) -> np.ndarray:
    """(N,) int64: UTF-8 bytes of each document's `text`. Reads only the offsets."""
    return pa.compute.binary_length(documents.data.column("text")).to_numpy()


def iter_slices(
    lengths: np.ndarray, size: int = SLICE_BYTES, documents: int = SLICE_DOCUMENTS
) -> Iterator[tuple[int, int]]:
    """(start, stop) of up to `documents` consecutive documents with at most `size` in all, or one longer document."""
    ends = np.cumsum(lengths)
    start = 0
    while start < len(ends):
        before = int(ends[start - 1]) if start else 0
        stop = int(np.searchsorted(ends, before + size, side="right"))
        stop = min(max(stop, start + 1), start + documents)
        yield start, stop
        start = stop


def map_slices(
    documents: datasets.Dataset, lengths: np.ndarray, function: Callable[[pa.Table], pa.Table], path: Path, *,
    features: datasets.Features, num_proc: int = 1, description: str,
) -> None:  # fmt: skip
    """Apply `function` to every slice of `documents` and write the results to Arrow files at `path`, for `load_slices`.
    Slices have a bounded size, while the lengths of documents vary a lot."""
    slices = datasets.Dataset.from_dict({"slice": list(iter_slices(lengths))}).with_format("arrow")
    tables = documents.with_format("arrow")
    parent = os.getpid()

    def run(batch: pa.Table) -> pa.Table:
        if os.getpid() != parent and sys.platform == "linux":
            ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)  # otherwise workers outlive a killed parent
        return function(tables[slice(*batch["slice"][0].as_py())])

    slices.map(
        run, batched=True, batch_size=1, remove_columns=["slice"], features=features, desc=description,
        num_proc=num_proc if num_proc > 1 and len(slices) > 1 else None, cache_file_name=str(path),
        new_fingerprint=path.stem,  # otherwise `datasets` hashes the function and everything it refers to
    )  # fmt: skip
    written = len(load_slices(path))
    if written != len(documents):
        raise RuntimeError(f"{path.name}: {written} rows were written for {len(documents)} documents")


def load_slices(path: Path) -> datasets.Dataset:
    """The result of `map_slices`, memory-mapped, however many processes wrote it."""
    return datasets.concatenate_datasets([datasets.Dataset.from_file(str(file)) for file in slice_files(path)])


def slice_files(path: Path) -> list[Path]:
    """The file at `path`, or the numbered files that several processes wrote for it."""
    return sorted(path.parent.glob(f"{path.stem}*{path.suffix}"))
