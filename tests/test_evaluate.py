"""evaluate.py: figures against computations with transformers alone, intervals against the truth, models side by side."""

import itertools
import json
import math
import shutil
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, call, error_line, flags, script, train
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from evaluating.intervals import CONFIDENCE, intervals_of_ratios
from evaluating.scoring import NumberedLayout, numbered
from evaluating.texts import Text, block_edges, encode, read_file
from utils.data.loaders import build_layout
from utils.data.order import PADDING_SAMPLE
from utils.data.packing import IGNORED, PaddedLayout
from utils.data.token_dataset import TokenDataset, load_manifest, open_split
from utils.objectives import causal

LENGTH = 64  # of the rows of a small run


@pytest.fixture(scope="module")
def runs(small_dataset, tmp_path_factory) -> dict[str, Path]:
    """A small run for each layout, with documents that are longer than a row."""
    folder = tmp_path_factory.mktemp("layouts")
    for layout in ("packed", "padded"):
        train(folder / layout, data__dataset=small_dataset, data__layout=layout, schedule__max_steps=3)
    return {layout: folder / layout for layout in ("packed", "padded")}


@pytest.fixture(scope="module")
def foreign(tmp_path_factory) -> Path:
    """A GPT-2 with a tokenizer of its own that puts no token in front of a text."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    settings = {"vocab_size": 300, "special_tokens": ["<eot>"], "show_progress": False}
    trainer = trainers.BpeTrainer(initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), **settings)
    backend.train_from_iterator([(ROOT / "README.md").read_text(encoding="utf-8")], trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<eot>", eos_token="<eot>")
    torch.manual_seed(0)
    sizes = {"n_embd": 32, "n_layer": 1, "n_head": 2, "n_positions": 64, "vocab_size": len(tokenizer)}
    model = GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=0, eos_token_id=0))
    folder = tmp_path_factory.mktemp("foreign")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def evaluated(*arguments: object, folder: Path, processes: int = 1) -> dict:
    """The report of evaluate.py."""
    report = folder / "report.json"
    if processes == 1:
        code, _, err = call("evaluate.py", *arguments, "--report", report)
        assert code == 0, err
    else:
        script("evaluate.py", *arguments, "--report", report, processes=processes)
    return json.loads(report.read_text())


@torch.no_grad()
def losses_alone(model, ids) -> torch.Tensor:
    """transformers alone: the loss of each token of `ids` (n,) but the first, (n - 1,) fp64."""
    ids = torch.as_tensor(np.asarray(ids, np.int64))
    return F.cross_entropy(model(input_ids=ids[None, :-1]).logits[0].double(), ids[1:], reduction="none")


def documents_of(dataset: Path) -> list[np.ndarray]:
    tokens = open_split(dataset, "validation")
    return [tokens.read(start, stop) for start, stop in itertools.pairwise(tokens.offsets.tolist())]


@pytest.mark.parametrize("layout", ["packed", "padded"])
@pytest.mark.parametrize("processes", [1, 2])
def test_perplexity_is_that_of_transformers_alone(layout, processes, runs, small_dataset, tmp_path):
    """Each piece of a document that is in one row, read by itself, with the token behind it as the last target."""
    report = evaluated("--model", runs[layout], "--batch_size", 8, folder=tmp_path, processes=processes)
    model = AutoModelForCausalLM.from_pretrained(runs[layout] / "checkpoints" / "best").eval()
    parts, place = [], 0
    for document in documents_of(small_dataset):
        first = LENGTH - place % LENGTH if layout == "packed" else LENGTH
        cuts = [0, *range(first, len(document), LENGTH), len(document)]
        for start, stop in itertools.pairwise(cuts):
            piece = document[start : stop + 1]
            if len(piece) > 1:
                parts.append(losses_alone(model, piece))
        place += len(document)
    losses = torch.cat(parts)
    assert max(map(len, documents_of(small_dataset))) > LENGTH
    assert report["target_tokens"] == len(losses)
    assert report["perplexity"] == pytest.approx(math.exp(losses.mean()), rel=1e-6)
    num_bytes = load_manifest(small_dataset)["splits"]["validation"]["bytes"]
    assert report["bits_per_byte"] == pytest.approx(float(losses.sum()) / math.log(2) / num_bytes, rel=1e-6)


def test_results_do_not_depend_on_the_number_of_processes(runs, foreign, tmp_path):
    found = []
    for processes in (1, 2):
        arguments = [runs["packed"], foreign, "--text_file", "docs/data.md", "--sequence_length", 48, "--batch_size", 8]
        report = evaluated(*arguments, folder=tmp_path, processes=processes)
        found.append([entry for text in report["texts"] for record in text["results"] for entry in record["models"]])
    for one, two in zip(*found, strict=True):
        assert one.keys() == two.keys() and one["target_tokens"] == two["target_tokens"]
        for name in ("loss", "bits_per_byte", "interval", "difference", "difference_interval"):
            if name in one:
                assert np.allclose(two[name], one[name], rtol=1e-6, atol=1e-7), name
    assert found[0][1]["difference_interval"] is not None


@pytest.mark.parametrize("stride", [1, 7, 16])
def test_windows_score_each_token_once_with_context(stride):
    """Against a plain loop over the tokens of each document."""
    length, sizes = 16, [1, 2, 16, 17, 18, 33, 40, 0, 70]
    offset = itertools.count()
    documents = [np.array([next(offset) for _ in range(size)], np.uint32) for size in sizes]
    layout = PaddedLayout(TokenDataset(documents, np.array(sizes)), length, pad_token_id=0, stride=stride)
    batch = layout.__getitems__(list(range(len(layout))))
    found = {}
    for inputs, targets in zip(batch["input_ids"], batch["targets"], strict=True):
        for column in np.flatnonzero(targets != IGNORED):
            assert int(targets[column]) not in found
            found[int(targets[column])] = inputs[: column + 1].tolist()
    for document in documents:
        for place in range(1, len(document)):
            context = found.pop(int(document[place]))
            assert context == document[place - len(context) : place].tolist()
            assert len(context) >= min(place, length - stride + 1)
    assert not found


@pytest.mark.parametrize("by_row", [False, True])
@pytest.mark.parametrize("name", ["packed", "best_fit", "padded", "windows"])
def test_each_target_belongs_to_its_document(name, by_row):
    """Every token of a document is the document's number, so a target names the unit that it must be counted for."""
    sizes = np.array([5, 1, 40, 16, 0, 17, 3, 3, 90])
    documents = [np.full(size, number, np.uint32) for number, size in enumerate(sizes)]
    stride = 5 if name == "windows" else None
    tokens = TokenDataset(documents, sizes)
    layout = build_layout(tokens, name.replace("windows", "padded"), 16, pad_token_id=0, vocab_size=9, stride=stride)
    text = Text("", 0, None, np.zeros(0), "documents", tokens, {})
    rows = NumberedLayout(layout, text, encode(text, None, in_front=False), by_row=by_row)
    batch = numbered(causal.collate)(rows.__getitems__([*range(len(rows)), PADDING_SAMPLE]), [])
    scored = batch["targets"] != IGNORED
    assert scored.sum() == (sizes - 1).clip(min=0).sum()
    if by_row and name in ("packed", "best_fit"):
        assert rows.unit == "rows" and rows.num_units == len(layout)
        assert np.array_equal(batch["units"][:-1], np.arange(len(layout))[:, None].repeat(16, 1))
    else:
        assert rows.unit == "documents" and rows.num_units == len(sizes)
        assert np.array_equal(batch["units"][scored], batch["targets"][scored])


def test_a_long_document_is_scored_in_windows(runs, tmp_path):
    """The loss is that of a plain loop, and lower than that of rows, which begin without context."""
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")[:3000]
    (tmp_path / "long.txt").write_text(text, encoding="utf-8")
    arguments = ["--model", runs["packed"], "--text_file", tmp_path / "long.txt", "--sequence_length", 32]
    report = evaluated(*arguments, "--stride", 8, folder=tmp_path)
    checkpoint = runs["packed"] / "checkpoints" / "best"
    model = AutoModelForCausalLM.from_pretrained(checkpoint).eval()
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    ids = [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]
    losses = [losses_alone(model, ids[:33])]
    for start in range(8, len(ids) - 1 - (32 - 8), 8):
        losses.append(losses_alone(model, ids[start : start + 33])[24:])
    losses = torch.cat(losses)
    assert report["target_tokens"] == len(ids) - 1 == len(losses)
    assert report["loss"] == pytest.approx(float(losses.mean()), rel=1e-6)
    assert report["loss"] != pytest.approx(evaluated(*arguments, folder=tmp_path)["loss"], rel=1e-6)


def simulated(generator: np.random.Generator, documents: int, difference: float) -> tuple[np.ndarray, np.ndarray]:
    """Losses of documents of very different length and difficulty, of two models: sums (U, 2) and counts (U, 2)."""
    counts = np.ceil(generator.lognormal(4, 0.7, documents))
    hard = generator.normal(3, 0.5, documents)
    own = generator.normal([0, difference], 0.1, (documents, 2))
    noise = generator.normal(0, 2, (documents, 2)) / np.sqrt(counts)[:, None]
    return (hard[:, None] + own + noise) * counts[:, None], np.repeat(counts[:, None], 2, axis=1)


def test_intervals_cover_the_truth():
    """400 sets of documents from a known distribution: an interval of 95 % holds the true value in about 95 % of them.
    The true mean loss is 3, because length does not depend on difficulty."""
    generator, sets, covered = np.random.default_rng(0), 400, np.zeros(2)
    for seed in range(sets):
        own, paired = intervals_of_ratios(*simulated(generator, 100, -0.05), seed)
        covered += [own[0].low <= 3 <= own[0].high, paired[1].low <= -0.05 <= paired[1].high]
        assert paired[0].low == paired[0].high == 0  # the first differs from itself by nothing
    assert CONFIDENCE == 0.95
    assert all(0.90 <= share <= 0.99 for share in covered / sets), covered / sets


def test_intervals_repeat_and_need_documents():
    sums, counts = simulated(np.random.default_rng(0), 50, 0.0)
    assert intervals_of_ratios(sums, counts, 1) == intervals_of_ratios(sums, counts, 1)
    assert intervals_of_ratios(sums, counts, 1) != intervals_of_ratios(sums, counts, 2)
    assert intervals_of_ratios(sums[:10], counts[:10], 1) == ([None, None], [None, None])


def test_models_with_other_tokenizers_read_the_same_text(runs, foreign, small_dataset, tmp_path):
    """Each document as text in the model's own tokens, from its first byte to its end, by transformers alone."""
    report = evaluated(runs["padded"], foreign, "--sequence_length", LENGTH, folder=tmp_path)
    (text,) = report["texts"]
    (record,) = text["results"]
    own = AutoTokenizer.from_pretrained(small_dataset / "tokenizer")
    documents = [own.decode(ids, skip_special_tokens=True) for ids in documents_of(small_dataset)]
    num_bytes = sum(len(document.encode()) for document in documents)
    assert num_bytes == text["bytes"] == load_manifest(small_dataset)["splits"]["validation"]["bytes"]
    for folder, entry in zip((runs["padded"] / "checkpoints" / "best", foreign), record["models"], strict=True):
        model, tokenizer = AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
        total = 0.0
        for document in documents:
            eos, ids = tokenizer.eos_token_id, tokenizer(document, add_special_tokens=False)["input_ids"]
            ids = [eos, *ids, eos]
            pieces = [ids[start : start + LENGTH + 1] for start in range(0, len(ids) - 1, LENGTH)]
            total += sum(float(losses_alone(model, piece).sum()) for piece in pieces)
        assert entry["bits_per_byte"] == pytest.approx(total / math.log(2) / num_bytes, rel=1e-6)
    first, second = record["models"]
    assert second["metric"] == "bits_per_byte" and first["target_tokens"] != second["target_tokens"]
    assert second["difference"] == pytest.approx(second["bits_per_byte"] - first["bits_per_byte"])


def test_better_worse_and_cannot_tell(runs, tmp_path):
    """A damaged copy is worse, the original is better than it, and a model is no better than itself."""
    good = runs["packed"] / "checkpoints" / "best"
    model = AutoModelForCausalLM.from_pretrained(good)
    with torch.no_grad():
        model.get_input_embeddings().weight.normal_(std=3)
    model.save_pretrained(tmp_path / "damaged")
    AutoTokenizer.from_pretrained(good).save_pretrained(tmp_path / "damaged")
    files = [tmp_path / "old.jsonl", tmp_path / "new.txt"]
    lines = (ROOT / "sample_data" / "dictionaries.jsonl").read_text(encoding="utf-8").splitlines()[:60]
    files[0].write_text("\n".join(lines) + "\n", encoding="utf-8")
    files[1].write_text((ROOT / "README.md").read_text(encoding="utf-8") * 4, encoding="utf-8")
    arguments = ["--text_file", json.dumps(list(map(str, files))), "--sequence_length", LENGTH]

    def verdicts(*names: Path) -> list[list[str]]:
        report = evaluated(*names, *arguments, folder=tmp_path)
        assert [text["unit"] for text in report["texts"]] == ["documents", "blocks"]
        return [[entry["verdict"] for entry in text["results"][0]["models"][1:]] for text in report["texts"]]

    assert verdicts(good, tmp_path / "damaged", good) == [["worse", "cannot tell"]] * 2
    assert verdicts(tmp_path / "damaged", good) == [["better"]] * 2


def test_each_source_has_its_figures(tmp_path):
    """The documents of a source, by transformers alone; the whole is the sum of its sources."""
    lines = (ROOT / "sample_data" / "dictionaries.jsonl").read_text(encoding="utf-8").splitlines()
    for name, part in {"one": lines[:120], "two": lines[-120:]}.items():
        texts = [" ".join(json.loads(line)["text"].split()[:20]) for line in part]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    sources = f"[{tmp_path / 'one.jsonl'}, {tmp_path / 'two.jsonl'}]"
    options = {"output": tmp_path / "data", "sources": sources, "tokenizer.vocab_size": 300, "validation_fraction": 0.2}
    assert call("prepare_data.py", *flags(options))[0] == 0
    train(tmp_path / "run", data__dataset=tmp_path / "data", data__layout="padded", schedule__max_steps=2)
    report = evaluated("--model", tmp_path / "run", folder=tmp_path)
    counts = {name: each["documents"] for name, each in
              load_manifest(tmp_path / "data")["splits"]["validation"]["sources"].items()}  # fmt: skip
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "checkpoints" / "best").eval()
    documents = documents_of(tmp_path / "data")
    total, *parts = report["texts"][0]["results"]
    assert [part["source"] for part in parts] == list(counts) and total["source"] is None
    for name, part in zip(counts, parts, strict=True):
        chosen, documents = documents[: counts[name]], documents[counts[name] :]
        pieces = [ids[start : start + LENGTH + 1] for ids in chosen for start in range(0, len(ids) - 1, LENGTH)]
        expected = torch.cat([losses_alone(model, piece) for piece in pieces])
        (entry,) = part["models"]
        assert part["units"] == counts[name] and entry["target_tokens"] == len(expected)
        assert entry["loss"] == pytest.approx(float(expected.mean()), rel=1e-6)
    assert sum(part["models"][0]["target_tokens"] for part in parts) == total["models"][0]["target_tokens"]


def test_blocks_share_out_a_text(tmp_path, foreign):
    """Every block has its bytes and its tokens, also where a character takes several."""
    path = tmp_path / "text.txt"
    path.write_text("naïve 東京 " * 2500, encoding="utf-8")
    text, tokenizer = read_file(path), AutoTokenizer.from_pretrained(foreign)
    encoded, size = encode(text, tokenizer, in_front=True), len(block_edges(22500)) - 1
    assert text.unit_bytes.sum() == text.num_bytes == path.stat().st_size and encoded.num_units == size == 22
    counts = np.bincount(encoded.units, minlength=size)
    assert counts.sum() == encoded.tokens.num_tokens
    assert np.allclose(counts, counts.mean(), rtol=0.05) and np.allclose(text.unit_bytes, counts.mean(), rtol=0.3)


def test_options_that_differ_are_named(runs, tmp_path):
    report = evaluated(runs["packed"], runs["padded"], folder=tmp_path)
    assert report["differing_options"] == {"data.layout": ["packed", "padded"]}


def test_the_speed_of_a_continuation_is_measured(runs, tmp_path):
    arguments = ["--prompt", "A", "--max_new_tokens", 7, "--temperature", 0]
    report = evaluated(runs["packed"], runs["padded"], *arguments, folder=tmp_path)
    for record in report["models"]:
        assert 1 <= record["new_tokens"] <= 7 and record["tokens_per_second"] > 0 and record["text"].startswith("A")


def test_a_gguf_file_is_scored_as_the_folder_that_it_was_made_from(tmp_path):
    pytest.importorskip("gguf")
    from test_exporting import build, build_tokenizer

    from exporting import gguf_file

    tokenizer = build_tokenizer(chat_template=None)
    model = build("llama", tokenizer)
    model.save_pretrained(tmp_path / "folder")
    tokenizer.save_pretrained(tmp_path / "folder")
    # Beside the folder's own files, as in an export; transformers would mix the two tokenizers.
    gguf_file.write_gguf(model, tokenizer, tmp_path / "folder" / "model.gguf", "f32", "test")
    arguments = [tmp_path / "folder", tmp_path / "folder" / "model.gguf", "--text_file", "README.md"]
    report = evaluated(*arguments, folder=tmp_path)
    one, two = report["texts"][0]["results"][0]["models"]
    assert two["target_tokens"] == one["target_tokens"] and two["loss"] == pytest.approx(one["loss"], rel=1e-5)
    (tmp_path / "no.gguf").write_bytes(b"none")
    assert "is not a GGUF file" in error_line("evaluate.py", tmp_path / "folder", tmp_path / "no.gguf")
    (tmp_path / "cut.gguf").write_bytes(b"GGUF" + bytes(60))
    assert "cut.gguf" in error_line("evaluate.py", tmp_path / "cut.gguf", "--text_file", "README.md")
    (tmp_path / "folder" / "model.safetensors").unlink()  # an export of other formats
    assert "give" in (line := error_line("evaluate.py", tmp_path / "folder", "--text_file", "README.md"))
    assert "--formats" in line and str(tmp_path / "folder" / "model.gguf") in line


@pytest.mark.skipif(find_spec("lm_eval") is None, reason="pip install -e '.[tasks]'")
def test_tasks_are_scored_by_lm_eval(runs, foreign, tmp_path):
    """The task of the examples: an answer is the choice that transformers alone finds likeliest."""
    lines = (ROOT / "examples" / "task.jsonl").read_text(encoding="utf-8").splitlines()
    questions = [json.loads(line) for line in lines]
    report = evaluated(
        runs["packed"], foreign, "--tasks", "[examples/task.yaml]", "--text_file", "README.md", folder=tmp_path
    )
    (record,) = report["tasks"]
    assert record["task"] == "next_word" and record["documents"] == len(questions) == 60
    for folder, entry in zip((runs["packed"] / "checkpoints" / "best", foreign), record["models"], strict=True):
        model, tokenizer = AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
        right = 0
        for each in questions:
            context, scores = len(tokenizer(each["question"], add_special_tokens=False)["input_ids"]), []
            front = tokenizer("")["input_ids"][:1]
            for choice in each["choices"]:
                whole = tokenizer(f"{each['question']} {choice}", add_special_tokens=False)["input_ids"]
                losses = losses_alone(model, [*front, *whole][-LENGTH - 1 :])  # the end of a long question counts
                scores.append(-float(losses[context - len(whole) :].sum()))
            right += int(np.argmax(scores)) == each["answer"]
        assert entry["value"] == pytest.approx(right / len(questions))
    assert record["models"][1]["verdict"] in ("better", "worse", "cannot tell")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["{run}", "none"], "none does not exist"),
        (["{run}", "{run}", "--model", "x"], "not both"),
        (["{run}", "--tasks", "[none.yaml]"], "none.yaml"),
        (["{run}", "--tasks", "[{broken}]"], "broken.yaml: it is no YAML"),
        (["{run}", "--stride", "65", "--sequence_length", "64"], "stride 65"),
        (["{run}", "--text_file", "README.md", "--stride", "65"], "stride 65"),
        (["{run}", "--text_file", "[none.txt, README.md]"], "none.txt does not exist"),
        (["{run}", "--text_file", "{jsonl}"], "line 1"),
        (["{run}", "--text_file", "{half}"], "line 2"),
        (["{run}", "--report", "/dev/full"], "/dev/full"),
    ],
)
def test_mistakes_are_one_line(arguments, words, runs, tmp_path):
    (tmp_path / "bad.jsonl").write_text('{"content": "a"}\n')
    (tmp_path / "half.jsonl").write_text('{"text": "a"}\n{"text": "half a character: \\ud83d"}\n')
    (tmp_path / "broken.yaml").write_text("task: x\n  bad: [\n")
    places = {
        "run": runs["packed"],
        "broken": tmp_path / "broken.yaml",
        "jsonl": tmp_path / "bad.jsonl",
        "half": tmp_path / "half.jsonl",
    }
    assert words in error_line("evaluate.py", *(each.format_map(places) for each in arguments))


def test_json_lines_may_hold_other_ends_of_lines_and_begin_with_a_mark(tmp_path):
    """As prepare_data.py reads them."""
    (tmp_path / "some.jsonl").write_bytes('\ufeff{"text": "a\u2028b\x85c"}\r\n{"text": "d"}'.encode())
    assert read_file(tmp_path / "some.jsonl").documents == ["a\u2028b\x85c", "d"]
    (tmp_path / "some.txt").write_bytes("\ufeffa".encode())
    assert read_file(tmp_path / "some.txt").documents == ["a"]


def test_a_missing_lm_eval_is_named(runs, tmp_path, monkeypatch):
    monkeypatch.setattr("evaluating.tasks.find_spec", lambda name: None)
    (tmp_path / "task.yaml").write_text("task: x\n")
    line = error_line("evaluate.py", runs["packed"], "--tasks", f"[{tmp_path / 'task.yaml'}]")
    assert "pip install -e '.[tasks]'" in line


def test_a_tokenizer_that_changes_the_text_is_refused_for_other_models(runs, foreign, small_dataset, tmp_path):
    """The other model would read another text than the documents."""
    changed = shutil.copytree(small_dataset, tmp_path / "data")
    manifest = json.loads((changed / "manifest.json").read_text())
    manifest["splits"]["validation"]["bytes"] += 1
    (changed / "manifest.json").write_text(json.dumps(manifest))
    arguments = ["--sequence_length", "32", "--dataset", changed]
    assert "does not give its text back" in error_line("evaluate.py", runs["packed"], foreign, *arguments)
    assert evaluated(runs["packed"], *arguments, folder=tmp_path)["bytes"] == manifest["splits"]["validation"]["bytes"]
