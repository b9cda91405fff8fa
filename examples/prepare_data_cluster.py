"""prepare_data.py on several machines: the same options, the same stages, the same bytes in the output folder.

    ray start --head                           # on the first machine
    ray start --address FIRST_MACHINE:6379     # on each of the others, at any time
    python examples/prepare_data_cluster.py --config my_recipe.yaml     # on the first; without a cluster, on its cores

It runs on Ray (Apache-2.0; a wheel of 79 MB and six small packages, no spacy, no other torch or pyarrow). Ray repeats a
plain task up to three times if its worker or machine is lost, and gives tasks to machines that join later. datatrove
has its own readers, order and token format; blocks of Ray Data would have to be sorted again.

All machines need the same Python packages, and must see these scripts, the sources and the output under the same paths
on a shared disk. Reading, cleaning, sketching, encoding and the search for evaluation text are split into parts: one
Ray task and one Arrow file each, numbered in the order of the documents. Everything that needs a view of the whole
stays in this process, which maps those files: it hashes the sources, finds duplicates (about 100 bytes of memory per
document, and 528 of page cache for its sketch), trains the tokenizer on its sample, and joins the tokens.
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import os
import socket

from preparation.recipe import PrepareConfig, resolve_sources
from utils.cli import UserError, exit_with, parse_config, run_script


def check_supported(config: PrepareConfig) -> None:
    if config.stream:
        raise UserError("stream: a stream needs little preparation; use prepare_data.py")
    if config.num_proc != 1:
        raise UserError("num_proc is for one machine; here every CPU of the cluster runs one task at a time")
    for source in resolve_sources(config):
        if source.hub is not None:
            raise UserError(f"sources: a cluster cannot read hub {source.hub}; download its files, and give their path")


def check_cluster(address: str) -> None:
    """Without this check, Ray would retry for eight minutes if nothing answers, and print many lines."""
    host, _, port = address.rpartition(":")
    if "://" in address:
        raise UserError(
            f"RAY_ADDRESS {address}: start this script on a machine of the cluster, with HOST:PORT or without"
        )
    if host:
        try:
            socket.create_connection((host, int(port)), timeout=10).close()
        except (OSError, ValueError) as error:
            raise UserError(
                f"RAY_ADDRESS {address}: no Ray there ({error}); `ray start --head` prints its address"
            ) from None


def read_options() -> PrepareConfig:
    """Exit with one line if an option is not supported or no cluster answers."""
    config = parse_config(PrepareConfig, __doc__)
    try:
        check_supported(config)
        check_cluster(os.environ.get("RAY_ADDRESS", "local"))
    except UserError as error:
        exit_with(error)
    return config


config = read_options() if __name__ == "__main__" else None  # before the slow imports: Ray's take seconds

import itertools
import json
import logging
import shutil
import uuid
from collections.abc import Callable, Iterator
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
from tqdm import tqdm

import prepare_data
from preparation.recipe import SourceConfig
from preparation.sources.documents import count_left, document_features, merge_counts, read_sources, start_counts
from preparation.sources.files import Found, reading_units
from preparation.stages import iter_slices, load_slices, map_slices

try:
    import ray
    from ray.exceptions import RayError, RayTaskError
except ImportError:
    exit_with("Ray is not installed; pip install -e '.[cluster]'")

PART_BYTES = 256 << 20  # of source files per reading task; small files are grouped
PART_SLICES = 32  # slices of 8 MB of text, at most, per task that cleans, sketches or encodes
PARTS_PER_CPU = 4  # at least, if there is enough text, so that all CPUs finish at about the same time


def main(config: PrepareConfig) -> None:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # A task has one CPU. Document ids contain relative paths, so `run_part` works in the directory of this process.
    environment = {"PYTHONPATH": str(ROOT), "RAYON_NUM_THREADS": "1"}
    ray.init(log_to_driver=False, logging_level=logging.ERROR, runtime_env={"env_vars": environment})
    machines = sum(node["Alive"] for node in ray.nodes())
    print(f"{machines} machine(s), {ray.cluster_resources().get('CPU', 0):.0f} CPUs")
    prepare_data.main(config, prepare_data.Engine(read_on_cluster, map_on_cluster))


def read_on_cluster(sources: list[SourceConfig], folder: Path, limit: None, found: dict[str, Found]) -> None:
    """`read_sources` on the cluster. A part is one file, or consecutive small ones."""
    parts = [
        (source, units) for source in sources for units in group_units(reading_units(source, found[str(source.name)]))
    ]
    counts = start_counts(sources)
    features = document_features(sources)  # each part has the columns of all
    for source in sources:
        count_left(found[str(source.name)], counts, str(source.name))

    def work(source: SourceConfig, units: list[Path | None], folder: Path) -> dict[str, Any]:
        read_sources([source], folder, units=units, features=features)
        return json.loads((folder / "read.json").read_text(encoding="utf-8"))

    for part in run_parts(work, parts, folder / "documents.arrow", "read"):
        merge_counts(counts, part)
    (folder / "read.json").write_text(json.dumps(counts), encoding="utf-8")


def group_units(units: list[Path | None]) -> Iterator[list[Path | None]]:
    """Consecutive reading units, in groups of PART_BYTES or one larger unit."""
    sizes = [unit.stat().st_size if unit else 0 for unit in units]
    starts = np.cumsum(sizes) - sizes
    for _, group in itertools.groupby(zip(units, starts // PART_BYTES, strict=True), key=lambda pair: pair[1]):
        yield [unit for unit, _ in group]


def map_on_cluster(
    documents: datasets.Dataset, lengths: np.ndarray, function: Callable[[pa.Table], pa.Table], path: Path, *,
    features: datasets.Features, description: str, num_proc: int = 1,
) -> None:  # fmt: skip
    """`map_slices` on the cluster. A part is some consecutive slices."""
    slices = list(iter_slices(lengths))
    share = int(len(slices) / (PARTS_PER_CPU * max(1, ray.cluster_resources().get("CPU", 1))))
    size = min(max(1, share), PART_SLICES)
    groups = [slices[first : first + size] for first in range(0, len(slices), size)]
    parts = [(group[0][0], group[-1][1], lengths[group[0][0] : group[-1][1]]) for group in groups]

    def work(start: int, stop: int, lengths: np.ndarray, folder: Path) -> None:
        datasets.disable_progress_bars()
        map_slices(
            documents.select(range(start, stop)), lengths, function, folder / path.name, features=features,
            description=description,
        )  # fmt: skip

    for _ in run_parts(work, parts, path, description):
        pass
    written = len(load_slices(path))
    if written != len(documents):
        raise UserError(f"{description}: only {written} of {len(documents)} documents are visible in {path.parent}; "
                        "call again; if that does not help, the machines do not share this disk properly")  # fmt: skip


def run_parts(work: Callable[..., Any], parts: list[tuple], path: Path, description: str) -> Iterator[Any]:
    """The results, in order, of `work(*part, folder)` for each part. Its output `folder`/NAME becomes `path` with the
    part's number."""
    shared = ray.put(work)  # once for all tasks
    tasks = [
        ray.remote(run_part).remote(shared, part, path.with_stem(f"{path.stem}-{number:06}"), path.name, os.getcwd())
        for number, part in enumerate(parts)
    ]
    try:
        for task in tqdm(tasks, desc=description, unit=" parts", disable=None):
            yield ray.get(task)
    except RayTaskError as error:
        if isinstance(error.cause, UserError):
            raise error.cause from None
        if isinstance(error.cause, OSError | ImportError):
            raise UserError(f"{description}, on machine {error.ip}: {error.cause} (all machines need the same packages "
                            "and the same paths for these scripts, the sources and the output)") from None  # fmt: skip
        raise
    except RayError as error:
        raise UserError(f"{description}: the cluster lost a part too often: {error}") from None
    for left in path.parent.glob(".part-*"):  # by workers that were killed
        shutil.rmtree(left, ignore_errors=True)


def run_part(work: Callable[..., Any], part: tuple, path: Path, name: str, cwd: str) -> Any:
    """Run one part, in a worker. Its file gets its number only when complete, so a part repeated after a lost worker
    appears once; every attempt writes the same bytes."""
    os.chdir(cwd)
    folder = path.with_name(f".part-{uuid.uuid4().hex}")
    folder.mkdir()
    try:
        result = work(*part, folder)
        (folder / name).replace(path)
        return result
    finally:
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    run_script(main, config)
