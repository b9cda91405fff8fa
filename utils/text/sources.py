"""Files and folders → one `datasets` table of documents, column `text`."""

import json
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import datasets

from utils.cli import UserError

BUILDERS = {
    ".txt": "text", ".md": "text", ".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet",
}  # fmt: skip
SNIFFED_BYTES = 1 << 16


def find_files(sources: list[str]) -> list[Path]:
    """The files behind `sources`, sorted within each folder; other kinds of file in a folder are passed over.

    Raises `UserError` for a path that does not exist, a file of an unknown kind, a folder with nothing to read.
    """
    files: list[Path] = []
    for source in sources:
        path = Path(source)
        if path.is_dir():
            inside = sorted(item for item in path.rglob("*") if item.is_file() and item.suffix.lower() in BUILDERS)
            if not inside:
                raise UserError(f"{source}: no {', '.join(BUILDERS)} file in this folder")
            files += inside
        elif not path.exists():
            raise UserError(f"{source}: no such file or folder")
        elif path.suffix.lower() not in BUILDERS:
            raise UserError(f"{source}: unknown kind of file; expected {', '.join(BUILDERS)}")
        else:
            files.append(path)
    twice = [path for path, count in Counter(files).items() if count > 1]
    if twice:
        raise UserError(f"{twice[0]}: named twice in sources")
    return files


def load_documents(files: Iterable[Path], text_column: str, cache_dir: Path) -> datasets.Dataset:
    """Read `files` into one table that lies on disk under `cache_dir`; raises `UserError` naming file and record."""
    return datasets.concatenate_datasets([_load_file(path, text_column, cache_dir) for path in files])


def _load_file(path: Path, text_column: str, cache_dir: Path) -> datasets.Dataset:
    builder = BUILDERS[path.suffix.lower()]
    if path.stat().st_size == 0:
        if builder == "text":  # an empty document, dropped and counted like any other
            return datasets.Dataset.from_dict(
                {"text": [""]}, datasets.Features({"text": datasets.Value("large_string")})
            )
        raise UserError(f"{path}: the file is empty")
    if builder != "parquet":
        with path.open("rb") as file:
            if b"\0" in file.read(SNIFFED_BYTES):
                raise UserError(f"{path}: a binary file, not text (it holds zero bytes)")
    # In a CSV, "None" or "NA" is a text like any other and not a missing value.
    by_kind: dict[str, dict[str, Any]] = {"text": {"sample_by": "document"}, "csv": {"keep_default_na": False}}
    options = by_kind.get(builder, {})
    try:
        table = datasets.load_dataset(
            builder, data_files=str(path), split="train", cache_dir=str(cache_dir), **options
        )  # fmt: skip
    except Exception as error:  # `datasets` wraps whatever its reader met; the cause is looked up in the file itself
        raise UserError(f"{path}: {_explain(path, builder, error)}") from error
    column = "text" if builder == "text" else text_column
    if column not in table.column_names:
        raise UserError(f"{path}: no column {column!r}; it has {', '.join(table.column_names)} (see --text_column)")
    if getattr(table.features[column], "dtype", None) not in ("string", "large_string"):
        raise UserError(f"{path}: column {column!r} holds {table.features[column]}, not text")
    table = table.select_columns([column]).cast_column(column, datasets.Value("large_string"))
    return table if column == "text" else table.rename_column(column, "text")


def _explain(path: Path, builder: str, error: Exception) -> str:
    """Why `path` cannot be read, with the line where there is one."""
    cause = error.__cause__ or error
    if builder != "parquet":
        with path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                try:
                    decoded = line.decode("utf-8")
                    if path.suffix.lower() == ".jsonl" and decoded.strip():
                        record = json.loads(decoded)
                        if not isinstance(record, dict):
                            return f"line {number}: expected a JSON object, found {type(record).__name__}"
                except UnicodeDecodeError as problem:
                    return f"line {number}: not UTF-8 text ({problem.reason} at byte {problem.start} of the line)"
                except json.JSONDecodeError as problem:
                    return f"line {number}: not a JSON record ({problem.msg}, column {problem.colno})"
    return f"cannot be read as {builder}: {' '.join(str(cause).split())[:300]}"
