"""The documents of all sources in one table on disk, and what could not be read."""

import itertools
import json
from collections import Counter
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
from tqdm import tqdm

from preparation.sources.readers import Broken, Document
from preparation.sources.source_config import SourceConfig
from preparation.sources.sources import OTHER_KIND, count_other_files, iter_records, known_suffixes, reading_units
from preparation.stages import SLICE_BYTES, SLICE_DOCUMENTS
from utils.cli import UserError

DOCUMENT_FEATURES = {
    "text": datasets.Value("large_string"), "source": datasets.Value("string"), "id": datasets.Value("string"),
}  # fmt: skip
MAX_BROKEN_LISTED = 1000


def read_sources(
    sources: list[SourceConfig], folder: Path, limit: int | None = None, units: list[Path | None] | None = None
) -> None:
    """Write every document to `folder`/documents.arrow and the counts to read.json; at most `limit` per source.

    `units` are some of the reading units of the one source, for who reads them in parts: files of other kinds, which
    belong to no part, are then not counted.
    """
    schema = datasets.Features(DOCUMENT_FEATURES).arrow_schema
    counts: dict[str, Any] = {"sources": {}, "broken": 0, "broken_records": [], "skipped": Counter()}
    with (
        pa.OSFile(str(folder / "documents.arrow"), "wb") as file,
        pa.ipc.new_stream(file, schema) as writer,
        tqdm(desc="read", unit=" documents", disable=None) as bar,
    ):
        for source in sources:
            figures = counts["sources"][source.name] = {"documents": 0, "bytes": 0}
            counts["skipped"][OTHER_KIND] += count_other_files(source) if units is None else 0
            rows: list[Document] = []
            held = 0
            for record in itertools.islice(iter_records(source, units or reading_units(source)), limit):
                if isinstance(record, Document):
                    size = len(record.text.encode())
                    figures["documents"] += 1
                    figures["bytes"] += size
                    rows.append(record)
                    held += size
                    if held >= SLICE_BYTES or len(rows) >= SLICE_DOCUMENTS:
                        _write_rows(writer, schema, rows, source)
                        rows, held = [], 0
                    bar.update()
                elif isinstance(record, Broken):
                    counts["broken"] += 1
                    if len(counts["broken_records"]) < MAX_BROKEN_LISTED:
                        counts["broken_records"].append({"file": record.file, "why": record.why})
                else:
                    counts["skipped"][record.why] += 1
            _write_rows(writer, schema, rows, source)
    counts["skipped"] = {why: count for why, count in counts["skipped"].items() if count}
    (folder / "read.json").write_text(json.dumps(counts), encoding="utf-8")


def _write_rows(writer: Any, schema: pa.Schema, rows: list[Document], source: SourceConfig) -> None:
    if rows:
        texts, ids = zip(*rows, strict=True)
        columns = [pa.array(texts, pa.large_string()), pa.array([source.name] * len(rows)), pa.array(ids)]
        writer.write_table(pa.table(columns, schema=schema))


def check_broken(counts: dict[str, Any], max_share: float) -> None:
    """`UserError` if too many records are broken, or if there is no document at all."""
    documents = sum(figures["documents"] for figures in counts["sources"].values())
    broken = counts["broken"]
    if broken > max_share * (documents + broken):
        first = counts["broken_records"][0]
        raise UserError(
            f"{first['file']}: {first['why']}; {broken:,} of {documents + broken:,} records are broken, more than "
            f"max_broken_share {max_share:g} allows; mend or remove the files, or raise max_broken_share"
        )
    for name, figures in counts["sources"].items():
        if figures["documents"] == 0:
            skipped = ", ".join(f"{count:,} {why}" for why, count in counts["skipped"].items())
            raise UserError(
                f"no documents in {name}{f' ({skipped})' if skipped else ''}; known kinds are {known_suffixes()}; code needs "
                "`kind: code` in its entry"
            )
