"""Streams: the same documents, rows and batches as a plain reading of the sources, for any number of parts."""

import gzip
import html
import itertools
import json
import shutil
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from conftest import SMALL, call, error_line, flags, metrics, script, train, train_losses
from processes import kill_at, weights
from transformers import AutoTokenizer

import preparation.stream
from preparation.cleaning.steps import clean_documents
from preparation.recipe import CleaningConfig, PrepareConfig
from preparation.selection.duplicates import digest_documents
from preparation.selection.splits import is_held_out
from preparation.stream import TextStream
from training.launch import BatchPlan, plan_batches
from training.stream_loader import StreamLoader, check_stream_options, describe_stream, iter_rows
from utils.cli import UserError
from utils.config import TrainConfig
from utils.data.packing import IGNORED
from utils.objectives.causal import collate

LANES, ROWS, LENGTH = 4, 8, 128
SAMPLE = Path(__file__).parent.parent / "sample_data" / "dictionaries.jsonl"


@pytest.fixture(scope="session")
def texts() -> list[str]:
    """Entries of the sample, one of which fills several rows and two of which cleaning changes."""
    entries = [json.loads(line)["text"] for line in SAMPLE.read_text(encoding="utf-8").splitlines()]
    longest = max(entries, key=len)
    return [*entries[:60], longest, "  a trailing space   \r\nand a line end", "cafe\u0301", *entries[1000:1037]]


@pytest.fixture(autouse=True)
def small_blocks(request, monkeypatch):
    """Blocks of 7 documents, so that a short corpus has several.

    Not for tests that run scripts: their own processes would read the same lanes in other blocks.
    """
    if "streamed" in request.fixturenames:
        return
    monkeypatch.setattr(preparation.stream, "BLOCK_DOCUMENTS", 7)
    monkeypatch.setattr(preparation.stream, "READ_RECORDS", 5)
    monkeypatch.setattr(preparation.stream, "OPEN_SOURCES", 3)
    monkeypatch.setattr(preparation.stream, "ENCODED_DOCUMENTS", 3)


def write_lines(path: Path, texts: list[str]) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return str(path)


def one_file(folder: Path, texts: list[str]) -> list:
    return [write_lines(folder / "corpus.jsonl", texts)]


def a_file_per_document(folder: Path, texts: list[str]) -> list:
    (folder / "corpus").mkdir(parents=True)
    for number, text in enumerate(texts):
        (folder / "corpus" / f"{number:03}.txt.gz").write_bytes(gzip.compress(text.encode()))
    return [str(folder / "corpus")]


def web_pages(folder: Path, texts: list[str]) -> list:
    (folder / "pages").mkdir(parents=True)
    for number, text in enumerate(texts):
        page = f"<nav><a href=x>Home</a></nav><pre>\n{html.escape(text)}</pre>"
        (folder / "pages" / f"{number:03}.html").write_text(page, encoding="utf-8")
    return [str(folder / "pages")]


def hub_stream(folder: Path, texts: list[str]) -> list:
    """Three shards for four lanes."""
    (folder / "hub" / "data").mkdir(parents=True)
    for number in range(3):
        table = datasets.Dataset.from_dict({"n": range(len(texts[number::3])), "text": texts[number::3]})
        table.to_parquet(folder / "hub" / "data" / f"train-{number:05}-of-00003.parquet", batch_size=10)
    return [{"hub": str(folder / "hub"), "streaming": True}]


def saved_table(folder: Path, texts: list[str]) -> list:
    datasets.Dataset.from_dict({"title": ["A"] * len(texts), "text": texts}).save_to_disk(folder / "saved")
    return [str(folder / "saved")]


def several_sources(folder: Path, texts: list[str]) -> list:
    files = [write_lines(folder / f"{number}.jsonl", texts[start::4]) for number, start in enumerate((0, 1, 2))]
    return [*files, *saved_table(folder, texts[3::4])]


SOURCES = [one_file, several_sources, a_file_per_document, web_pages, hub_stream, saved_table]


def make_stream(dataset: Path, sources: list, lanes: int = LANES, seed: int = 5, **options) -> TextStream:
    return TextStream(asdict(PrepareConfig(sources=sources, **options)), dataset, lanes, seed)


def encode_plainly(dataset: Path, texts: list[str]) -> list[tuple[int, ...]]:
    """The training documents as the tokenizer itself encodes them, each followed by the eos token."""
    tokenizer = AutoTokenizer.from_pretrained(dataset / "tokenizer")
    cleaned = clean_documents({"text": texts, "source": [""] * len(texts), "id": texts}, CleaningConfig())["text"]
    held_out = is_held_out(digest_documents(cleaned), 0.1)
    kept = [text for text, held in zip(cleaned, held_out, strict=True) if not held]
    return [(*tokenizer(text)["input_ids"], tokenizer.eos_token_id) for text in kept]


def read_epochs(
    stream: TextStream, lane: int, epochs: int, position: dict | None = None
) -> list[list[tuple[int, ...]]]:
    """The documents of a lane's first epochs, in order."""
    found: list[list[tuple[int, ...]]] = [[] for _ in range(epochs)]
    for document in stream.documents(lane, position):
        if document.here["epoch"] == epochs:
            return found
        found[document.here["epoch"]].append(tuple(document.input_ids.tolist()))
    raise AssertionError("a stream has ended")


@pytest.mark.parametrize("make_sources", SOURCES)
def test_every_epoch_has_each_training_document_once(make_sources, texts, dataset, tmp_path):
    stream = make_stream(dataset, make_sources(tmp_path, texts))
    expected = Counter(encode_plainly(dataset, texts))
    assert 80 < sum(expected.values()) < len(texts)  # some are held out
    lanes = [read_epochs(stream, lane, 3) for lane in range(LANES)]
    for epoch in range(3):
        assert sum((Counter(lane[epoch]) for lane in lanes), Counter()) == expected
    for first, second, _ in lanes:
        assert first != second
        assert first != [ids for ids in encode_plainly(dataset, texts) if ids in set(first)]  # not the sources' order


def test_lanes_are_of_about_the_same_length(texts, dataset, tmp_path):
    """Otherwise the documents of short lanes would be seen more often than others."""
    unequal = [write_lines(tmp_path / "files" / f"{size}.jsonl", texts[:size]) for size in (1, 3, 8, 9, 30, 31, 60)]
    stream = make_stream(dataset, [str(Path(unequal[0]).parent)])
    documents = [len(read_epochs(stream, lane, 1)[0]) for lane in range(LANES)]
    assert max(documents) < 1.5 * min(documents), documents
    many = a_file_per_document(tmp_path, texts * 5)
    tokens = [sum(map(len, read_epochs(make_stream(dataset, many), lane, 1)[0])) for lane in range(LANES)]
    assert max(tokens) < 1.2 * min(tokens), tokens


def test_a_row_holds_what_a_plain_reading_gives(texts, dataset, tmp_path):
    stream = make_stream(dataset, one_file(tmp_path, texts))
    tokens = []  # (token, next token of the same document or IGNORED, position in the document)
    for ids in itertools.chain(*read_epochs(stream, 1, 3)):
        tokens += zip(ids, [*ids[1:], IGNORED], range(len(ids)), strict=True)
    rows = [row for row, _ in itertools.islice(iter_rows(stream.documents(1, None), LENGTH, 0), len(tokens) // LENGTH)]
    assert any((row["targets"] != IGNORED).all() and row["position_ids"][-1] == LENGTH - 1 for row in rows)
    for number, row in enumerate(rows):
        for place in range(LENGTH):
            token, target, position = tokens[number * LENGTH + place]
            assert (row["input_ids"][place], row["targets"][place]) == (token, target)
            assert row["position_ids"][place] == min(position, place)


def make_loader(
    stream: TextStream, *, rank: int = 0, ranks: int = 1, workers: int = 0, state: dict | None = None, rows: int = ROWS
) -> StreamLoader:
    return StreamLoader(
        stream, collate, plan_batches(rows, 2, ranks), rank=rank, sequence_length=LENGTH, num_workers=workers,
        device=torch.device("cpu"), state=state, samples_seen=0, seed=0,
    )  # fmt: skip


def iter_steps(loader: StreamLoader, ranks: int = 1) -> Iterator[tuple[dict[str, np.ndarray], dict]]:
    """The rows of each step, and the state after it as a checkpoint stores it."""
    batches = iter(loader)
    while True:
        parts = [next(batches) for _ in range(ROWS // ranks // 2)]
        rows = {name: np.concatenate([part[name].numpy() for part in parts]) for name in parts[0]}
        yield rows, {"identity": loader.identity, "lanes": {lane: dict(c) for lane, c in loader.cursors.items()}}


def take(loader: StreamLoader, steps: int, ranks: int = 1) -> list[bytes]:
    return [
        b"".join(rows[name].tobytes() for name in rows)
        for rows, _ in itertools.islice(iter_steps(loader, ranks), steps)
    ]


@pytest.mark.parametrize("make_sources", SOURCES)
def test_a_resumed_stream_goes_on_as_if_it_had_not_stopped(make_sources, texts, dataset, tmp_path):
    sources = make_sources(tmp_path, texts)
    stream, another = make_stream(dataset, sources), make_stream(dataset, sources)
    loader = make_loader(stream)
    whole, states = [], []
    while min(cursor["epoch"] for cursor in loader.cursors.values() or [{"epoch": 0}]) < 2:
        ((rows, _),) = itertools.islice(iter_steps(loader), 1)
        whole.append(b"".join(rows[name].tobytes() for name in rows))
        states.append(json.loads(json.dumps(loader.state())))
    assert len(whole) > 20 and len(set(whole)) == len(whole)
    for step in range(0, len(states) - 2, 1 if make_sources in (one_file, several_sources) else 3):
        resumed = make_loader(another if step % 2 else stream, state=states[step])
        assert take(resumed, 2) == whole[step + 1 : step + 3], step
    assert take(make_loader(stream, state=states[3]), 1) != whole[3:4]


@pytest.mark.filterwarnings("ignore:This DataLoader will create")  # more workers than cores
def test_a_global_batch_is_the_same_rows_for_any_number_of_processes_and_workers(texts, dataset, tmp_path):
    stream = make_stream(dataset, one_file(tmp_path, texts))
    whole = [rows for rows, _ in itertools.islice(iter_steps(make_loader(stream)), 12)]
    for workers in (1, 3):  # to the last bit, order included
        for rows, expected in zip(
            (rows for rows, _ in iter_steps(make_loader(stream, workers=workers))), whole, strict=False
        ):
            assert all(np.array_equal(rows[name], expected[name]) for name in expected)
    for ranks in (2, 4):
        shares = [iter_steps(make_loader(stream, rank=rank, ranks=ranks), ranks) for rank in range(ranks)]
        for expected in whole:
            parts = [next(share)[0] for share in shares]
            assert all(part["input_ids"].shape == (ROWS // ranks, LENGTH) for part in parts)
            for name in expected:
                together = np.concatenate([part[name] for part in parts])
                assert sorted(map(bytes, together)) == sorted(map(bytes, expected[name]))


def test_another_seed_is_another_order(texts, dataset, tmp_path):
    sources = one_file(tmp_path, texts)
    assert take(make_loader(make_stream(dataset, sources)), 3) != take(
        make_loader(make_stream(dataset, sources, seed=6)), 3
    )


def test_sources_are_mixed_and_weighted(texts, dataset, tmp_path):
    entries = [json.loads(line)["text"] for line in SAMPLE.read_text(encoding="utf-8").splitlines()]
    short, long = entries[:100], entries[1000:1300]
    sources = [
        {"path": write_lines(tmp_path / "twice.jsonl", short), "weight": 2},
        {"path": write_lines(tmp_path / "half.jsonl", long), "weight": 0.5},
        {"path": write_lines(tmp_path / "never.jsonl", ["never"]), "weight": 0},
    ]
    stream = make_stream(dataset, sources, lanes=1)
    twice, half = set(encode_plainly(dataset, short)), set(encode_plainly(dataset, long))
    (epoch,) = read_epochs(stream, 0, 1)
    counts = Counter(epoch)
    assert {ids: counts[ids] for ids in twice} == dict.fromkeys(twice, 2)
    assert {counts[ids] for ids in half} == {0, 1} and 0.3 < sum(counts[ids] for ids in half) / len(half) < 0.7
    assert set(counts) <= twice | half
    repeated = [[place for place, other in enumerate(epoch) if other == ids] for ids in twice]
    assert np.mean([second - first for first, second in repeated]) > len(epoch) / 4  # not next to each other
    for third in (epoch[: len(epoch) // 3], epoch[-len(epoch) // 3 :]):
        assert twice & set(third) and half & set(third)


def test_broken_records_are_passed_over_and_counted(texts, dataset, tmp_path):
    path = Path(one_file(tmp_path, texts)[0])
    lines = path.read_text(encoding="utf-8").splitlines()
    path.write_text("\n".join([*lines[:10], "{not JSON", *lines[10:]]), encoding="utf-8")
    stream = make_stream(dataset, [str(path)])
    lanes = [read_epochs(stream, lane, 1)[0] for lane in range(LANES)]
    assert sum(map(Counter, lanes), Counter()) == Counter(encode_plainly(dataset, texts))
    loader = make_loader(stream)
    take(loader, 1)
    resumed = make_loader(stream, state=loader.state())
    take(resumed, 1)
    line = describe_stream(resumed.state())
    assert "broken records skipped: 1, " in line and f"{path.name}, line 11: not JSON" in line


@pytest.fixture(scope="module")
def streamed(tmp_path_factory) -> Path:
    """The sample as a stream."""
    folder = tmp_path_factory.mktemp("streamed") / "demo"
    assert call("prepare_data.py", "--output", folder, "--stream", "true")[0] == 0
    assert not (folder / "train").exists()
    return folder


def with_other_source(streamed: Path, folder: Path, source: str) -> Path:
    """As if the text had changed since preparation."""
    shutil.copytree(streamed, folder)
    manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    manifest["options"]["sources"] = [source]
    (folder / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    return folder


STEPS = 40
OPTIONS = {
    "model.architecture": "gpt2", "model.dropout": 0.1, "batch.per_device_batch_size": 2, "schedule.max_steps": STEPS,
    "checkpoint.every_steps": 4, "data.stream_lanes": 4,
}  # fmt: skip


def command(output: Path, dataset: Path, **more: object) -> list[str]:
    return ["train.py", *flags(SMALL | OPTIONS | {"output": output, "data.dataset": dataset} | more)]


@pytest.fixture(scope="module", params=[1, pytest.param(2, marks=pytest.mark.slow)])
def whole_run(request, streamed, tmp_path_factory) -> tuple[int, Path]:
    """A run that never stops, without loader workers; the resumed run has some."""
    output = tmp_path_factory.mktemp("whole") / "run"
    script(*command(output, streamed), processes=request.param)
    return request.param, output


def test_kill_9_and_resume_is_bit_equal(whole_run, streamed, tmp_path):
    processes, whole = whole_run
    broken = tmp_path / "broken"
    options = {"data.num_workers": 2}
    kill_at(10, command(broken, streamed, **options), broken, processes)
    result = script(*command(broken, streamed, **options, **{"checkpoint.resume": "auto"}), processes=processes)
    assert "resumed from" in result.stdout and "stream: the lanes are in epoch 1" in result.stdout
    assert weights(broken) == weights(whole)
    assert train_losses(metrics(broken)) == train_losses(metrics(whole))
    assert not any("train/epoch" in record for record in metrics(broken))


@pytest.mark.slow
def test_a_stream_goes_on_with_other_processes_and_workers(streamed, tmp_path):
    """The losses equal those of the unchanged run up to rounding."""
    options = {"data__dataset": streamed, "schedule__shape": "constant"}
    whole = train(tmp_path / "whole", schedule__max_steps=18, **options)
    for processes, workers, steps in ((1, 2, 6), (2, 2, 12), (1, 0, 18)):
        changed = train(
            tmp_path / "changed", processes=processes, data__num_workers=workers, schedule__max_steps=steps,
            checkpoint__resume="auto", **options,
        )  # fmt: skip
    assert np.allclose(train_losses(changed), train_losses(whole), rtol=0, atol=1e-5)
    assert len(set(train_losses(whole))) == 18


def refused(dataset: Path, output: Path, **options: object) -> str:
    settings = {name.replace("__", "."): value for name, value in options.items()}
    return error_line("train.py", *flags(SMALL | {"data.dataset": dataset, "output": output} | settings))


def test_options_that_cannot_go_with_a_stream_are_refused(streamed, tmp_path):
    for options, expected in (
        (
            {"data__stream_lanes": 3},
            "divide batch.global_batch_size 8; 1, 2, 4, 8 would fit",
        ),
        ({"data__layout": "padded"}, "data.layout padded needs stored documents; a stream is always packed"),
        ({"schedule__num_epochs": 1, "schedule__max_steps": "null"}, "give schedule.max_steps"),
    ):
        assert expected in refused(streamed, tmp_path / "run", **options)
    with pytest.raises(UserError, match="3, 6, 12 would fit"):
        check_stream_options(set_lanes(4), BatchPlan(12, 4, 3, 1))
    check_stream_options(set_lanes(6), BatchPlan(12, 4, 3, 1))


def set_lanes(lanes: int) -> TrainConfig:
    config = TrainConfig()
    config.data.stream_lanes = lanes
    return config


@pytest.mark.parametrize("workers", [0, 1])
def test_a_source_that_gives_nothing_is_refused(workers, streamed, texts, tmp_path):
    few = with_other_source(streamed, tmp_path / "few", path := write_lines(tmp_path / "few.jsonl", texts[:3]))
    line = refused(few, tmp_path / "run", data__num_workers=workers)
    assert "data.stream_lanes 8: lane" in line and "has nothing to train on (no document is left)" in line
    Path(path).unlink()
    assert (
        refused(few, tmp_path / "run", data__num_workers=workers) == f"train.py: error: {path}: no such file or folder"
    )
    blank = with_other_source(streamed, tmp_path / "blank", write_lines(tmp_path / "blank.jsonl", [" ", "\n"] * 40))
    line = refused(blank, tmp_path / "run", data__stream_lanes=1, data__num_workers=workers)
    assert "lane 0 has nothing to train on (its 80 documents are all dropped" in line
    assert not (tmp_path / "run" / "config.yaml").exists()


def test_changed_sources_are_not_resumed(texts, dataset, tmp_path):
    path = one_file(tmp_path, texts)[0]
    loader = make_loader(make_stream(dataset, [path]))
    take(loader, 1)
    write_lines(Path(path), [*texts, "one more"])
    with pytest.raises(UserError, match="files were added, removed or changed"):
        make_loader(make_stream(dataset, [path]), state=loader.state())


@pytest.mark.parametrize("name", ["READ_RECORDS", "OPEN_SOURCES", "BLOCK_DOCUMENTS", "BLOCK_CHARACTERS", "TABLE_PARTS"])
def test_a_position_in_another_order_is_not_resumed(name, texts, dataset, tmp_path, monkeypatch):
    """Otherwise the lane would continue with another document, or with a token that it does not have."""
    sources = several_sources(tmp_path, texts)
    loader = make_loader(make_stream(dataset, sources))
    take(loader, 5)
    monkeypatch.setattr(preparation.stream, name, getattr(preparation.stream, name) + 1)
    with pytest.raises(UserError, match="or this code reads them in another order"):
        make_loader(make_stream(dataset, sources), state=loader.state())
