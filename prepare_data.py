"""Text in, token dataset out: read, clean, drop duplicates, split, train a tokenizer, encode.

    python prepare_data.py --sources '[my_texts/, notes.jsonl]' --output data/mine

The output folder appears only when it is complete; calling again with the same options does nothing. The result of each
stage is kept beside the output, so a killed call continues where it was, and a changed option reruns only the affected
stages.
"""

from preparation.recipe import PrepareConfig, holds_conversations, media_kind, resolve_sources
from utils.cli import UserError, parse_config, run_script

config = parse_config(PrepareConfig, __doc__) if __name__ == "__main__" else None

import contextlib
import itertools
import json
import re
import shutil
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute
import tokenizers

from preparation.cleaning.steps import EMPTY, clean_documents, expand_steps
from preparation.recipe import BUILT_IN_TOKENS, MARK, SourceConfig
from preparation.report.page import TRAINED_HERE, collect_details, data_card, html_report, table
from preparation.selection.duplicates import SIGNATURE, digest_documents, digest_exact, sketch_documents
from preparation.selection.splits import Selection, repeat_by_weight, select_documents
from preparation.sources.conversations import SEPARATOR, without_system
from preparation.sources.documents import (
    DOCUMENT_FEATURES,
    MEDIA_FEATURES,
    Document,
    check_broken,
    find_media,
    iter_file_texts,
    iter_records,
    read_sources,
    standard_input_in_file,
)
from preparation.sources.files import (
    VERSIONS,
    WITHOUT_EFFECT,
    Found,
    describe_files,
    find_all,
    hash_paths,
    identify,
    reading_options,
    reading_units,
    recipe_key,
    tokenizer_files,
)
from preparation.sources.media import digest_media, media_bytes
from preparation.stages import Stages, iter_slices, load_slices, map_slices, slice_files, text_bytes
from preparation.tokenizer.build import (
    check_chat_template,
    describe_tokenizer,
    iter_sample,
    load_tokenizer,
    train_tokenizer,
)
from preparation.tokenizer.encoding import ConversationEncoder, Encoder, build_encoder
from utils.data.token_dataset import FORMAT_VERSION, open_split
from utils.files import hold_lock, read_json
from utils.pretrained import hide_special_tokens


class Engine(NamedTuple):
    """The functions that process all of the text: on this machine, or on several (examples/prepare_data_cluster.py)."""

    read_sources: Callable[..., None] = read_sources
    map_slices: Callable[..., None] = map_slices


THIS_MACHINE = Engine()
FIRST_RECORDS = 100  # of each source, which are compared with the chat template before all are read
NO_MARK = "cleaning removed the mark of a picture"
MAX_LOST_SHARE = 0.05  # of the characters of a source, which the tokenizer cannot write; emoji in English are fewer


def main(config: PrepareConfig, engine: Engine = THIS_MACHINE) -> None:
    """Sources → dataset folder, in stages.

    `stages.run` reuses the folder of an earlier call with the same key, or has the function write it. The key is a hash
    of everything that decides the result: the given list, and the keys of the stages before.
    """
    output = Path(config.output).resolve()
    sources = resolve_sources(config)
    stages = Stages(output.with_name(f".{output.name}.stages"))
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
    with claim_output(config, sources, stages, output) as claimed:
        if claimed is None:
            return
        files, found, key = claimed
        encoder = check_tokenizer(config, sources, found)  # now, not after hours of reading

        # ---- Read: sources of any format → one table on disk with the columns text, source and id, and with media.
        limit = config.stream_head_documents if config.stream else None
        folder = stages.run(
            "read", [VERSIONS["read"], [reading_options(source) for source in sources], identify(files, config), limit],
            lambda folder: engine.read_sources(sources, folder, limit, found),
        )  # fmt: skip
        counts = json.loads((folder / "read.json").read_text(encoding="utf-8"))
        check_broken(counts, config.max_broken_share)
        documents = load_slices(folder / "documents.arrow")
        if encoder is not None:
            encoder.check_parts(documents.data)

        # ---- Clean: documents → the same with changed text, and with a reason for each that is dropped.
        texts = documents.select_columns(list(DOCUMENT_FEATURES))  # without what belongs to them
        with_pictures = {str(source.name) for source in sources if source.image_column}
        code_sources = {str(source.name) for source in sources if source.kind == "code"}
        conversations = holds_conversations(sources)
        folder = stages.run(
            "clean", [VERSIONS["clean"], asdict(config.cleaning), sorted(code_sources)],
            lambda folder: engine.map_slices(
                texts, text_bytes(texts),
                lambda batch: clean_table(batch, with_pictures, config.cleaning, code_sources, conversations),
                folder / "clean.arrow", features=CLEANED_FEATURES, num_proc=config.num_proc, description="clean",
            ),
        )  # fmt: skip
        cleaned = load_slices(folder / "clean.arrow")
        lengths = text_bytes(cleaned)

        # ---- Sketch: cleaned documents → short digests and signatures, by which duplicates are found.
        near = config.deduplication.near_threshold is not None
        media = media_bytes(documents)  # (N,) of pictures and sounds
        extended = join_columns(cleaned, documents, ("group", "media"))
        folder = stages.run(
            "sketch", [VERSIONS["sketch"], near],
            lambda folder: engine.map_slices(
                extended, lengths + media, lambda batch: sketch_table(batch, near), folder / "sketch.arrow",
                features=sketch_features(near, extended.column_names), num_proc=config.num_proc, description="sketch",
            ),
        )  # fmt: skip
        sketches = load_slices(folder / "sketch.arrow")

        # ---- Select: digests and signatures → for each document: dropped (and why), training or validation.
        evaluation_files = config.deduplication.evaluation_files
        folder = stages.run(
            "select",
            [
                VERSIONS["select"], asdict(config.deduplication), config.validation_fraction,
                hash_paths(evaluation_files), config.text_column, config.messages_column,
            ],
            lambda folder: select_documents(
                cleaned, sketches, lengths, [str(source.name) for source in sources], config.deduplication,
                config.validation_fraction,
                iter_file_texts(evaluation_files, config.text_column, config.messages_column),
                lambda rows, function: map_texts(cleaned, lengths, rows, function, folder, config.num_proc, engine),
            ).save(folder),
        )  # fmt: skip
        selection = Selection.load(folder)
        check_splits(selection, config)

        # ---- Tokenizer: a sample of the training documents → a tokenizer; or the one you supply.
        folder = stages.run(
            "tokenizer", [VERSIONS["tokenizer"], asdict(config.tokenizer), tokenizer_files(config)],
            lambda folder: make_tokenizer(config, cleaned, selection, folder),
        )  # fmt: skip

        # ---- Encode: both splits → the dataset folder, written beside the output and moved there in one step.
        manifest = start_manifest(config, key, files, counts, cleaned, selection)
        partial = stages.partial("output")
        try:
            shutil.copytree(folder, partial / "tokenizer")
            write_dataset(config, sources, manifest, extended, lengths, selection, partial, engine)
            replace_folder(partial, output)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
        stages.remove_unused()
    print(table(manifest))
    options = " --objective.name instruction" if conversations else ""
    if kind := media_kind(sources):  # whose models have no default sizes
        size = "small/" if config.tokenizer.pretrained is None else ""
        options = f" --config configs/{size}{'captioning' if kind == 'image' else 'transcription'}.yaml"
    options += f" --data.dataset {config.output}"
    print(f"wrote {config.output}: train with `accelerate launch train.py{options}`")


@contextlib.contextmanager
def claim_output(
    config: PrepareConfig, sources: list[SourceConfig], stages: Stages, output: Path
) -> Iterator[tuple[list[dict[str, Any]], dict[str, Found], str] | None]:
    """The files of the sources, what `find` gave for each, and the recipe's key, with a lock on the output; None if the
    output is up to date.

    `UserError` if the output is locked, is not a dataset, overlaps a source or cannot be written.
    """
    check_places(sources, output)
    restore_output(output, stages)
    manifest = load_existing(output)
    try:
        with standard_input_in_file(sources, stages.folder):
            found = find_all(sources)
            found |= {str(source.name): find_media(source, found[str(source.name)]) for source in sources}
            files = describe_files(
                sources, found, manifest["files"] if manifest.get("stream") == config.stream else [],
                read_again=config.check_hashes, by_size_only=config.stream and not config.check_hashes,
            )  # fmt: skip
            key = recipe_key(config, sources, files)
            if manifest.get("key") == key:
                print(table(manifest))
                print(f"{config.output} is up to date: nothing to do")
                yield None
                return
            stages.folder.mkdir(parents=True, exist_ok=True)
            with hold_lock(stages.folder / "lock") as locked:
                if not locked:
                    raise UserError(
                        f"{config.output}: another prepare_data.py is writing it; wait for its end, or stop it"
                    )
                try:
                    yield files, found, key
                finally:  # of a call that was refused before it read anything, nothing stays
                    if [path.name for path in stages.folder.iterdir()] == ["lock"]:
                        shutil.rmtree(stages.folder)
    except BrokenPipeError:
        raise
    except OSError as error:
        raise UserError(f"cannot write {config.output}: {error.strerror or error}") from error


def start_manifest(
    config: PrepareConfig, key: str, files: list[dict[str, Any]], counts: dict[str, Any], cleaned: datasets.Dataset,
    selection: Selection,
) -> dict[str, Any]:  # fmt: skip
    """The part of the manifest that does not depend on the tokens."""
    return {
        "format_version": FORMAT_VERSION,
        "key": key,
        "stream": config.stream,
        "options": {name: value for name, value in asdict(config).items() if name not in WITHOUT_EFFECT},
        "files": files,
        "documents_read": sum(item["documents"] for item in counts["sources"].values()),
        "bytes_read": sum(item["bytes"] for item in counts["sources"].values()),
        "read": counts,
        "changed": count_changes(cleaned, expand_steps(config.cleaning.steps)),
        "dropped": selection.count(),
        "versions": {library.__name__: library.__version__ for library in (datasets, tokenizers, pa)},
    }


def write_dataset(
    config: PrepareConfig, sources: list[SourceConfig], manifest: dict[str, Any], cleaned: datasets.Dataset,
    lengths: np.ndarray, selection: Selection, folder: Path, engine: Engine,
) -> None:  # fmt: skip
    """Encode both splits into `folder`, which holds the tokenizer, complete `manifest` and write the reports."""
    tokenizer = load_tokenizer(str(folder / "tokenizer"))
    samples = sample_by_source(cleaned, selection, sources)
    parse = config.tokenizer.parse_special_tokens
    kind = media_kind(sources)
    placeholder = find_placeholder(tokenizer) if kind == "image" else None
    if placeholder is not None:
        pictures = pa.compute.list_value_length(cleaned.data.column("media")).to_numpy()
        cleaned = cleaned.add_column("pictures", pictures)
    encoder: Encoder | ConversationEncoder
    if holds_conversations(sources):
        encoder = ConversationEncoder(tokenizer, parse, placeholder)
    else:
        sample = [text for texts in samples.values() for text in texts]
        encoder = build_encoder(tokenizer, sample, parse_special_tokens=parse, placeholder=placeholder)
    rows = {"train": weighted_rows(selection, sources), "validation": np.flatnonzero(selection.validation)}
    if config.stream:
        del rows["train"]
    backend = None if parse else hide_special_tokens(tokenizer.backend_tokenizer)[0]
    described = {source: describe_tokenizer(tokenizer, texts, backend) for source, texts in samples.items()}
    check_loss(described, str(config.tokenizer.pretrained or config.tokenizer.algorithm))
    spelled: Counter[str] = Counter()
    tokens = {
        split: encode_split(cleaned.select(indices), lengths[indices], encoder, folder / split, engine, spelled)
        for split, indices in rows.items()
    }
    print(f"{'encode':<12} {encoder.note}")
    manifest["splits"] = {
        split: count_split(lengths[indices], tokens[split], selection.source[indices], sources)
        for split, indices in rows.items()
    }
    if kind:
        manifest["media"] = {"kind": kind} | ({"placeholder": placeholder} if placeholder else {})
        for split, indices in rows.items():
            manifest["splits"][split] |= write_media(
                cleaned.select_columns("media"), indices, folder / f"{split}_media"
            )
    for split in rows:
        if loss_mask := open_split(folder, split).loss_mask:
            manifest["splits"][split]["assistant_tokens"] = loss_mask.total
    manifest["tokenizer"] = {
        "from": config.tokenizer.pretrained or TRAINED_HERE, "vocab_size": len(tokenizer),
        "dtype": encoder.dtype.__name__, "spelled_out": dict(spelled.most_common()),
        "sources": described,
    }  # fmt: skip
    if config.keep_dropped:
        write_dropped(cleaned, selection, folder / "dropped.jsonl")
    name = Path(config.output).resolve().name
    details = collect_details(cleaned, lengths, selection, tokens, rows, kind)
    (folder / "report.html").write_text(html_report(name, manifest, details), encoding="utf-8")
    (folder / "README.md").write_text(data_card(name, manifest), encoding="utf-8")
    (folder / "manifest.json").write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")


def write_media(documents: datasets.Dataset, indices: np.ndarray, folder: Path) -> dict[str, int]:
    """Write the column `media` of the documents `indices` (n,) as a folder that `datasets` reads, a few MB at a time.
    Returns how many files it holds, and their bytes."""
    files = pa.compute.list_value_length(documents.data.column("media")).to_numpy()[indices]
    lengths = media_bytes(documents)[indices]
    schema = datasets.Features(MEDIA_FEATURES).arrow_schema
    # `datasets` would hold a thousand documents at a time; it writes the files that describe the table, with one row.
    datasets.Dataset(pa.table({"media": [[]]}, schema), fingerprint=folder.name).save_to_disk(folder)
    tables = documents.with_format("arrow")
    (path,) = folder.glob("data-*.arrow")
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, schema) as writer:
        for start, stop in iter_slices(lengths):
            writer.write_table(tables[indices[start:stop]].cast(schema))
    return {"media_files": int(files.sum()), "media_bytes": int(lengths.sum())}


CLEANED_FEATURES = datasets.Features(
    DOCUMENT_FEATURES | {"reason": datasets.Value("string"), "changed": datasets.Value("uint32")}
)


def join_columns(documents: datasets.Dataset, other: datasets.Dataset, names: Iterable[str]) -> datasets.Dataset:
    """`documents` with those of the columns `names` that `other` has for the same documents."""
    present = [name for name in names if name in other.column_names]
    return datasets.concatenate_datasets([documents, other.select_columns(present)], axis=1) if present else documents


def sketch_features(near: bool, columns: Iterable[str]) -> datasets.Features:
    digest = datasets.List(datasets.Value("uint8"), length=16)
    features = datasets.Features(exact=digest, digest=digest)
    if {"group", "media"} & set(columns):
        features |= {"split": digest, "has_media": datasets.Value("bool")}
    if near:
        features["signature"] = datasets.List(datasets.Value("uint32"), length=SIGNATURE)
    return features


def clean_table(batch: pa.Table, with_pictures: set[str], *options: Any) -> pa.Table:
    """`clean_documents` for a table. A document of the sources `with_pictures` must keep the marks of its pictures, and
    have some text beside them."""
    cleaned = clean_documents(batch.to_pydict(), *options)
    for row, source in enumerate(cleaned["source"] if with_pictures else []):
        if source in with_pictures and not cleaned["reason"][row]:
            text = cleaned["text"][row]
            if text.count(MARK) != batch["text"][row].as_py().count(MARK):
                cleaned["reason"][row] = NO_MARK
            elif not text.replace(MARK, "").strip():
                cleaned["reason"][row] = EMPTY
    return pa.Table.from_pydict(cleaned, schema=CLEANED_FEATURES.arrow_schema)


def sketch_table(batch: pa.Table, near: bool) -> pa.Table:
    """Columns exact (digest of the text), digest (of its words) and, if `near`, signature. Of a document with media,
    the digests include these. With media or groups also split, the digest of what decides the split (the group, else
    the media, else the words), and has_media."""
    texts = [without_system(text) for text in batch["text"].to_pylist()]
    columns = {"exact": digest_documents(texts, digest_exact)}
    if near:
        columns["digest"], columns["signature"] = sketch_documents(texts)
    else:
        columns["digest"] = digest_documents(texts)
    extra: dict[str, pa.Array] = {}
    if {"group", "media"} & set(batch.column_names):
        columns |= {name: columns[name].copy() for name in ("exact", "digest")}  # they may be read-only
        columns["split"] = columns["digest"].copy()
        media = batch["media"].to_pylist() if "media" in batch.column_names else [[]] * len(texts)
        groups = batch["group"].to_pylist() if "group" in batch.column_names else [None] * len(texts)
        for row, (files, group) in enumerate(zip(media, groups, strict=True)):
            if files:
                of_files = digest_media(files)
                columns["split"][row] = np.frombuffer(of_files, np.uint8)
                for name in ("exact", "digest"):
                    both = digest_media([columns[name][row].tobytes(), of_files])
                    columns[name][row] = np.frombuffer(both, np.uint8)
            if group is not None:
                columns["split"][row] = np.frombuffer(digest_media([group.encode()]), np.uint8)
        extra["has_media"] = pa.array(map(bool, media), pa.bool_())
    return pa.table({
        name: pa.FixedSizeListArray.from_arrays(values.ravel(), values.shape[1]) for name, values in columns.items()
    } | extra)  # fmt: skip


def map_texts(
    cleaned: datasets.Dataset, lengths: np.ndarray, rows: np.ndarray, function: Callable[[list[str]], list[int]],
    folder: Path, num_proc: int, engine: Engine,
) -> np.ndarray:  # fmt: skip
    """`function` of the documents `rows` (n,), without system messages; (n,) int64."""
    if not len(rows):  # `datasets` would write no file
        return np.empty(0, np.int64)
    path = folder / "values.arrow"
    engine.map_slices(
        cleaned.select(rows).select_columns(["text"]), lengths[rows],
        lambda batch: pa.table({"value": function([without_system(text) for text in batch["text"].to_pylist()])}), path,
        features=datasets.Features(value=datasets.Value("int64")), num_proc=num_proc, description="select",
    )  # fmt: skip
    values = load_slices(path).data.column("value").to_numpy()
    for file in slice_files(path):
        file.unlink()
    return values


def make_tokenizer(config: PrepareConfig, cleaned: datasets.Dataset, selection: Selection, folder: Path) -> None:
    sources = resolve_sources(config)
    if config.tokenizer.pretrained is not None:
        supplied_tokenizer(config).save_pretrained(folder)
        return
    texts = iter_sample(cleaned.select(np.flatnonzero(selection.train)), config.tokenizer.sample_bytes)
    if media_kind(sources) == "image":  # marks will be a special token
        texts = ([text.replace(MARK, "") for text in batch] for batch in texts)
    if holds_conversations(sources):  # messages will be separated by special tokens
        texts = ([part for text in batch for part in text.split(SEPARATOR)] for batch in texts)
    if config.tokenizer.parse_special_tokens:  # what becomes a token is not for merges to learn
        special = [*BUILT_IN_TOKENS[config.tokenizer.algorithm], *config.tokenizer.special_tokens]
        pattern = re.compile("|".join(map(re.escape, sorted(special, key=len, reverse=True))))
        texts = ([part for text in batch for part in pattern.split(text)] for batch in texts)
    trained_tokenizer(config, texts).save_pretrained(folder)
    if config.tokenizer.algorithm != "bpe":
        print(f"{'tokenizer':<12} {config.tokenizer.algorithm} cannot be exported as GGUF (llama.cpp, Ollama); bpe can")


def supplied_tokenizer(config: PrepareConfig) -> Any:
    """`tokenizer.pretrained`, with your chat template, and with a special token for pictures if there are some."""
    tokenizer = load_tokenizer(str(config.tokenizer.pretrained))
    if media_kind(resolve_sources(config)) == "image":
        tokenizer.add_special_tokens(
            {"extra_special_tokens": [find_placeholder(tokenizer)]}, replace_extra_special_tokens=False
        )
    if config.tokenizer.chat_template:
        tokenizer.chat_template = Path(config.tokenizer.chat_template).read_text(encoding="utf-8")
        check_chat_template(tokenizer)
    return tokenizer


def trained_tokenizer(config: PrepareConfig, texts: Iterable[list[str]]) -> Any:
    """A tokenizer trained on batches of texts, with your chat template."""
    options = config.tokenizer
    template = Path(options.chat_template).read_text(encoding="utf-8") if options.chat_template else None
    special = list(options.special_tokens)
    if media_kind(resolve_sources(config)) == "image" and MARK not in special:
        special.append(MARK)
    return train_tokenizer(
        texts, algorithm=options.algorithm, vocab_size=options.vocab_size, special_tokens=special,
        chat_template=template,
    )  # fmt: skip


def find_placeholder(tokenizer: Any) -> str:
    """The special token that stands for a picture: the tokenizer's own, else <image>."""
    return getattr(tokenizer, "image_token", None) or MARK


def check_tokenizer(
    config: PrepareConfig, sources: list[SourceConfig], found: dict[str, Found]
) -> ConversationEncoder | None:
    """`UserError` if the tokenizer that you supply cannot be used, or your chat template has a mistake or does not write
    all of a source's first conversations. Returns the encoder of conversations, if the sources hold some."""
    tokenizer = None
    if config.tokenizer.pretrained is not None:
        tokenizer = supplied_tokenizer(config)
    elif config.tokenizer.chat_template:
        tokenizer = trained_tokenizer(config, [["a word"]])
    if tokenizer is None or not holds_conversations(sources):
        return None
    encoder = ConversationEncoder(
        tokenizer, placeholder=find_placeholder(tokenizer) if media_kind(sources) == "image" else None
    )
    for source in sources:
        first = itertools.islice(iter_records(source, reading_units(source, found[str(source.name)])), FIRST_RECORDS)
        documents = [record for record in first if isinstance(record, Document)]
        encoder.check_parts(pa.table({name: [getattr(item, name) for item in documents] for name in ("text", "id")}))
    return encoder


def check_loss(described: dict[str, dict[str, Any]], tokenizer: str) -> None:
    """`UserError` if the tokenizer cannot write a large share of a source's text."""
    for source, figures in described.items():
        if figures["lost_share"] > MAX_LOST_SHARE:
            raise UserError(
                f"{source}: the tokenizer ({tokenizer}) cannot write {figures['lost_share']:.1%} of the characters, such "
                f"as {figures['lost_characters']}, so this text would be lost; use a tokenizer that knows the language, "
                "or train one (tokenizer.algorithm bpe writes every text)"
            )


def sample_by_source(
    cleaned: datasets.Dataset, selection: Selection, sources: list[SourceConfig], documents: int = 100
) -> dict[str, list[str]]:
    """Training documents of each source, evenly spaced, to measure the tokenizer on."""
    samples = {}
    for number, source in enumerate(sources):
        rows = np.flatnonzero(selection.train & (selection.source == number))
        chosen = rows[np.linspace(0, len(rows) - 1, min(documents, len(rows))).astype(int)]
        texts = cleaned.select(chosen)["text"][:]
        texts = [text.replace(MARK, "") for text in texts] if source.image_column else texts
        samples[str(source.name)] = [text.replace(SEPARATOR, "") for text in texts] if source.messages_column else texts
    return samples


def weighted_rows(selection: Selection, sources: list[SourceConfig]) -> np.ndarray:
    """(n,) int64: the training documents as they are stored, repeated by the weight of their source."""
    rows = np.flatnonzero(selection.train)
    weights = np.array([source.weight for source in sources])[selection.source[rows]]
    return repeat_by_weight(rows, weights, selection.chance[rows])


def encode_split(
    documents: datasets.Dataset,
    lengths: np.ndarray,
    encoder: Encoder | ConversationEncoder,
    folder: Path,
    engine: Engine,
    spelled: Counter[str],
) -> np.ndarray:
    """Write `documents` as a split of the token dataset; returns their lengths in tokens (n,). Counts in `spelled` how
    often they spell out each special token."""
    path = folder.with_suffix(".arrow")
    engine.map_slices(
        documents.select_columns(list(encoder.columns)), lengths, encoder.encode_table, path, features=encoder.features,
        description=f"encode {folder.name}",
    )  # fmt: skip
    encoded = load_slices(path)
    spelled.update(encoded.data.column("spelled").combine_chunks().flatten().to_pylist())
    # The folder stores this fingerprint. `datasets` would draw a random one, and the bytes would differ every time.
    datasets.Dataset(encoded.remove_columns("spelled").data, fingerprint=folder.name).save_to_disk(folder)
    for file in slice_files(path):
        file.unlink()
    return np.diff(open_split(folder.parent, folder.name).offsets)


def count_split(
    lengths: np.ndarray, tokens: np.ndarray, source: np.ndarray, sources: list[SourceConfig]
) -> dict[str, Any]:
    """Documents, bytes and tokens of a split, in total and by source; all arrays are (n,)."""
    columns = {"documents": np.ones_like(tokens), "bytes": lengths, "tokens": tokens}
    by_source = {
        str(item.name): {name: int(values[source == number].sum()) for name, values in columns.items()}
        for number, item in enumerate(sources)
    }
    return {name: int(values.sum()) for name, values in columns.items()} | {"sources": by_source}


def write_dropped(cleaned: datasets.Dataset, selection: Selection, path: Path) -> None:
    """Write the dropped documents, one JSON record per line, with the reason."""
    dropped = cleaned.select(np.flatnonzero(selection.code != 0)).select_columns(["id", "source", "text"])
    with path.open("w", encoding="utf-8") as file:
        for record, code in zip(dropped, selection.code[selection.code != 0], strict=True):
            file.write(json.dumps({"reason": selection.reasons[code], **record}, ensure_ascii=False) + "\n")


def count_changes(cleaned: datasets.Dataset, steps: list[str]) -> dict[str, int]:
    """The number of documents whose text each step changed."""
    changed = cleaned.data.column("changed").to_numpy()
    return {step: int((changed >> number & 1).sum()) for number, step in enumerate(steps)}


def load_existing(output: Path) -> dict[str, Any]:
    """The manifest of an existing dataset, or {}; `UserError` if the folder is something else."""
    try:
        manifest = read_json(output / "manifest.json")
    except UserError:
        manifest = {}
    if {"format_version", "key", "splits"} <= manifest.keys():
        return manifest
    if output.exists():
        raise UserError(f"{output} exists and is not a dataset folder; remove it, or choose another --output")
    return {}


def check_splits(selection: Selection, config: PrepareConfig) -> None:
    """`UserError` if a split is empty, with the numbers that explain it."""
    stored = {"train": len(weighted_rows(selection, resolve_sources(config))), "validation": selection.validation.sum()}
    empty = next((split for split, documents in stored.items() if not documents), None)
    if empty is None:
        return
    documents, dropped = len(selection.code), selection.count()
    reasons = ", ".join(f"{reason} {count:,}" for reason, count in dropped.items())
    advice = (
        "add documents, or change validation_fraction; one long text file becomes many documents with `new_document`"
    )
    if 2 * sum(dropped.values()) > documents:
        advice = "change the options that drop them"
    raise UserError(
        f"the {empty} split is empty: {documents} documents, {sum(dropped.values())} dropped"
        f"{f' ({reasons})' if reasons else ''}, validation_fraction {config.validation_fraction}; {advice} "
        "(see docs/data.md)"
    )


def check_places(sources: list[SourceConfig], output: Path) -> None:
    """`UserError` if the output lies in a source or a source in it: the next call would read what this one wrote."""
    for source in sources:
        root = Path(source.path or str(source.hub)).resolve()
        if root.is_dir() and (output.is_relative_to(root) or root.is_relative_to(output)):
            raise UserError(f"the output {output} and the source {root} overlap; choose another --output")


def replace_folder(partial: Path, output: Path) -> None:
    """Replace `output` by `partial`. Processes that have the old files open can continue to read them."""
    old = partial.with_name(".old")
    if output.exists():
        shutil.rmtree(old, ignore_errors=True)
        output.rename(old)
    try:
        partial.rename(output)
    except OSError:
        if old.exists():
            old.rename(output)
        raise


def restore_output(output: Path, stages: Stages) -> None:
    """Undo the first half of `replace_folder` if a call was killed in the middle."""
    old = stages.folder / ".old"
    if old.exists() and not output.exists():
        with hold_lock(stages.folder / "lock") as locked:
            if locked:
                old.rename(output)


if __name__ == "__main__":
    run_script(main, config)
