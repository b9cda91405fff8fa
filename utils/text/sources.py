"""Files and folders → one `datasets` table of documents, columns `text` and `source`."""

import json
from collections.abc import Iterable
from pathlib import Path

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
    twice = {path for path in files if files.count(path) > 1}
    if twice:
        raise UserError(f"{min(twice)}: named twice in sources")
    return files


def load_documents(files: Iterable[Path], text_column: str, cache_dir: Path) -> datasets.Dataset:
    """Read `files` into one table that lies on disk under `cache_dir`; raises `UserError` naming file and record."""
    return datasets.concatenate_datasets([_load_file(path, text_column, cache_dir) for path in files])


def _load_file(path: Path, text_column: str, cache_dir: Path) -> datasets.Dataset:
    builder = BUILDERS[path.suffix.lower()]
    if path.stat().st_size == 0:
        raise UserError(f"{path}: the file is empty")
    if builder != "parquet":
        with path.open("rb") as file:
            if b"\0" in file.read(SNIFFED_BYTES):
                raise UserError(f"{path}: a binary file, not text (it holds zero bytes)")
    options = {"sample_by": "document"} if builder == "text" else {}
    try:
        table = datasets.load_dataset(
            builder, data_files=str(path), split="train", cache_dir=str(cache_dir), **options
        )  # fmt: skip
    except Exception as error:  # `datasets` wraps whatever its reader met; the cause is looked up in the file itself
        raise UserError(f"{path}: {_explain(path, builder, error)}") from error
    column = "text" if builder == "text" else text_column
    if column not in table.column_names:
        raise UserError(f"{path}: no column {column!r}; it has {', '.join(table.column_names)} (see --text_column)")
    if table.features[column].dtype not in ("string", "large_string"):
        raise UserError(f"{path}: column {column!r} holds {table.features[column]}, not text")
    table = table.select_columns([column]).cast_column(column, datasets.Value("large_string"))
    if column != "text":
        table = table.rename_column(column, "text")
    return table.add_column("source", [path.name] * len(table))


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
