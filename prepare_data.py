"""Text in, token dataset out: read, clean, drop duplicates, split, train a tokenizer, encode.

    python prepare_data.py --sources '[my_texts/, notes.jsonl]' --output data/mine

The output folder appears only when it is complete; the same call again finds it up to date and does nothing.
"""

import hashlib
import json
import shutil
import sys
import time
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from utils.cli import UserError, parse_config, run_script


@dataclass
class TokenizerConfig:
    """The tokenizer: trained on the training documents, or taken as given."""

    pretrained: str | None = None
    """Folder or Hub name of a tokenizer to take as it is. null: train a byte-level BPE on the training documents."""
    vocab_size: int = 2048
    """Entries of a tokenizer trained here, special tokens included."""

    def problems(self) -> list[str]:
        if self.pretrained is None and self.vocab_size < 258:
            return [f"tokenizer.vocab_size is {self.vocab_size}; 256 bytes and 2 special tokens need at least 258"]
        return []


@dataclass
class PrepareConfig:
    """Options of prepare_data.py; the defaults are the demo's."""

    sources: list[str] = field(default_factory=lambda: ["sample_data/dictionaries.jsonl"])
    """Files or folders of .txt, .md, .jsonl, .json, .csv or .parquet. A text file is one document."""
    text_column: str = "text"
    """Column that holds the text in JSON lines, CSV and parquet."""
    output: str = "data/demo"
    """Folder to write."""
    cleaning: Literal["standard", "basic"] = "standard"
    """standard: NFC, no control characters, tidy white space, newlines kept. basic: the stricter classroom rule: one
    line, and only word characters, white space and .,!?;:()-' survive."""
    validation_fraction: float = 0.1
    """Share of the documents held out, chosen by a hash of each document's text."""
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)

    def problems(self) -> list[str]:
        found = []
        if not self.sources:
            found.append("sources is empty; name at least one file or folder")
        if not 0 < self.validation_fraction < 1:
            found.append(f"validation_fraction is {self.validation_fraction}; it must lie between 0 and 1")
        return found


config = parse_config(PrepareConfig, __doc__) if __name__ == "__main__" else None

import datasets
import pyarrow as pa
import tokenizers

from utils.batches.token_dataset import FORMAT_VERSION
from utils.text.cleaning import RULES
from utils.text.deduplication import digest, is_validation, iter_first_seen
from utils.text.report import TRAINED_HERE, data_card, table
from utils.text.sources import find_files, load_documents
from utils.text.tokenization import encode_documents, load_tokenizer, token_dtype, train_byte_level_bpe

STAGES_VERSION = 1  # raise when a stage's result changes, so that older outputs no longer count as up to date
BATCH_DOCUMENTS = 1000


def main(config: PrepareConfig) -> None:
    output = Path(config.output)
    files = find_files(config.sources)
    key = cache_key(config, files)
    if output.exists():
        report_existing(output, key)
        return
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # what it would print, our error lines say
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()

    # Everything is written beside the output and moved there at the end: a killed call leaves nothing half done, and
    # the next one starts afresh.
    work = output.with_name(f".{output.name}.preparing")
    shutil.rmtree(work, ignore_errors=True)
    try:
        work.mkdir(parents=True)
        manifest = prepare(config, files, work, work / "cache")
        manifest["key"] = key
        (work / "README.md").write_text(data_card(output.name, manifest), encoding="utf-8")
        (work / "manifest.json").write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
        shutil.rmtree(work / "cache")
        work.rename(output)
    except OSError as error:
        raise UserError(f"cannot write {output}: {error.strerror or error}") from error
    finally:
        shutil.rmtree(work, ignore_errors=True)
    print(table(manifest))
    print(f"wrote {output}: train with `accelerate launch train.py --data.dataset {output}`")


def prepare(config: PrepareConfig, files: list[Path], work: Path, cache_dir: Path) -> dict[str, Any]:
    """Run the stages, write both splits and the tokenizer into `work`, and return the manifest's figures."""
    seconds: dict[str, float] = {}
    clock = time.perf_counter()

    def stage_done(name: str) -> None:
        nonlocal clock
        seconds[name] = round(time.perf_counter() - clock, 3)
        clock = time.perf_counter()

    documents = load_documents(files, config.text_column, cache_dir)
    if len(documents) == 0:
        raise UserError(f"{', '.join(config.sources)}: no documents")
    stage_done("read")

    cleaned = documents.map(
        clean_batch, batched=True, batch_size=BATCH_DOCUMENTS, fn_kwargs={"rule": config.cleaning}, desc="clean"
    )
    stage_done("clean")

    dropped: Counter[str] = Counter()
    rows: dict[str, list[int]] = {"train": [], "validation": []}
    digests = [value for batch in cleaned.select_columns("digest").iter(10_000) for value in batch["digest"]]
    for index, (value, first) in enumerate(zip(digests, iter_first_seen(digests), strict=True)):
        if value == EMPTY:
            dropped["empty after cleaning"] += 1
        elif not first:
            dropped["exact duplicate"] += 1
        else:
            rows["validation" if is_validation(value, config.validation_fraction) else "train"].append(index)
    for split, indices in rows.items():
        if not indices:
            raise UserError(
                f"the {split} split is empty: {len(documents)} documents, {sum(dropped.values())} dropped, "
                f"validation_fraction {config.validation_fraction}; give more documents or another fraction"
            )
    stage_done("deduplicate and split")

    splits = {split: cleaned.select(indices).select_columns("text") for split, indices in rows.items()}
    if config.tokenizer.pretrained is None:
        texts = (batch["text"] for batch in splits["train"].iter(BATCH_DOCUMENTS))
        tokenizer = train_byte_level_bpe(texts, config.tokenizer.vocab_size)
    else:
        tokenizer = load_tokenizer(config.tokenizer.pretrained)
    tokenizer.save_pretrained(work / "tokenizer")
    stage_done("tokenizer")

    dtype = token_dtype(len(tokenizer)).__name__
    features = datasets.Features({"input_ids": datasets.List(datasets.Value(dtype))})
    figures = {}
    for split, texts_of_split in splits.items():
        encoded = texts_of_split.with_format("arrow").map(
            encode_documents, batched=True, batch_size=BATCH_DOCUMENTS, fn_kwargs={"tokenizer": tokenizer},
            remove_columns=["text"], features=features, desc=f"encode {split}",
        )  # fmt: skip
        encoded.with_format(None).save_to_disk(work / split)
        figures[split] = {
            "documents": len(encoded),
            "bytes": count_bytes(texts_of_split),
            "tokens": sum(len(chunk.values) for chunk in encoded.data.column("input_ids").chunks),
        }
    stage_done("encode")

    origin = config.tokenizer.pretrained or TRAINED_HERE
    return {
        "format_version": FORMAT_VERSION,
        "options": asdict(config),
        "sources": [{"name": path.name, "bytes": path.stat().st_size, "sha256": file_hash(path)} for path in files],
        "documents_read": len(documents),
        "bytes_read": count_bytes(documents),
        "dropped": dict(dropped),
        "splits": figures,
        "tokenizer": {"from": origin, "vocab_size": len(tokenizer), "dtype": dtype},
        "seconds": seconds,
        "versions": versions(),
    }  # fmt: skip


EMPTY = b""  # in place of a digest: nothing was left of the document


def clean_batch(batch: dict[str, list], rule: str) -> dict[str, list]:
    """Columns `text` → cleaned `text` and its `digest`."""
    texts = [RULES[rule](text or "") for text in batch["text"]]
    return {"text": texts, "digest": [digest(text) if text.strip() else EMPTY for text in texts]}


def count_bytes(documents: datasets.Dataset) -> int:
    """UTF-8 bytes of column `text`."""
    return sum(len((text or "").encode()) for batch in documents.iter(BATCH_DOCUMENTS) for text in batch["text"])


def cache_key(config: PrepareConfig, files: list[Path]) -> str:
    """Hash of all that decides the result: the sources' content, the options, this code's version."""
    options: dict[str, Any] = asdict(config)
    for name in ("sources", "output"):  # where the bytes come from and go to does not change them
        options.pop(name)
    content: dict[str, Any] = {"stages": STAGES_VERSION, "format": FORMAT_VERSION, "options": options}
    content["files"] = [(path.name, file_hash(path)) for path in files]
    if config.tokenizer.pretrained and Path(config.tokenizer.pretrained, "tokenizer.json").is_file():
        content["tokenizer"] = file_hash(Path(config.tokenizer.pretrained, "tokenizer.json"))
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def report_existing(output: Path, key: str) -> None:
    """Say that `output` is up to date, or refuse to touch what is something else."""
    manifest_path = output / "manifest.json"
    manifest = json.loads(manifest_path.read_text(encoding="utf-8")) if manifest_path.is_file() else {}
    if manifest.get("key") != key:
        what = "was made from other sources or options" if manifest else "exists and is not a dataset folder"
        raise UserError(f"{output} {what}; remove it, or choose another --output")
    print(table(manifest))
    print(f"{output} is up to date: nothing to do")


def file_hash(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None


def versions() -> dict[str, str]:
    return {"datasets": datasets.__version__, "tokenizers": tokenizers.__version__, "pyarrow": pa.__version__}


if __name__ == "__main__":
    run_script(main, config)
