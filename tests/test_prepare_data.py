"""prepare_data.py on real text: what goes in, what comes out, and what is refused."""

import gzip
import json
import re
import shutil
import tarfile
from collections import Counter
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet
import pytest
from conftest import ROOT, VALIDATION_FRACTION, call, error_line
from transformers import AutoTokenizer

from preparation.cleaning.steps import clean_documents
from preparation.recipe import CleaningConfig
from preparation.selection.duplicates import digest_documents
from preparation.selection.splits import is_held_out
from utils.cli import UserError
from utils.data.token_dataset import load_manifest, open_split

SAMPLE = ROOT / "sample_data" / "dictionaries.jsonl"
TEXTS = [json.loads(line)["text"] for line in SAMPLE.read_text(encoding="utf-8").splitlines()]


SAME_SPLIT = ["--validation_fraction", str(VALIDATION_FRACTION)]  # as in the fixture `dataset`


def prepare(folder: Path, *arguments: str | Path) -> str:
    code, out, err = call("prepare_data.py", "--output", folder, "--tokenizer.vocab_size", "400", *arguments)
    assert code == 0, err
    return out


def clean(texts: list[str]) -> list[str]:
    return clean_documents({"text": texts, "source": texts, "id": texts}, CleaningConfig())["text"]


def documents(folder: Path, split: str) -> list[str]:
    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
    tokens = open_split(folder, split)
    spans = zip(tokens.offsets[:-1], tokens.offsets[1:], strict=True)
    return [tokenizer.decode(tokens.read(a, b), skip_special_tokens=True) for a, b in spans]


def test_ids_are_the_tokenizers_own_and_text_comes_back(dataset):
    tokenizer = AutoTokenizer.from_pretrained(dataset / "tokenizer")
    manifest = load_manifest(dataset)
    cleaned = clean(TEXTS)
    found = {split: documents(dataset, split) for split in ("train", "validation")}
    assert len(TEXTS) == sum(map(len, found.values())) + sum(manifest["dropped"].values())
    for split, texts in found.items():
        tokens = open_split(dataset, split)
        kept = set(texts)
        assert texts == list(
            dict.fromkeys(text for text in cleaned if text in kept)
        )  # in the order of the source, without repetition
        assert len(texts) == manifest["splits"][split]["documents"]
        assert manifest["splits"][split]["bytes"] == sum(len(text.encode()) for text in texts)
        assert (is_held_out(digest_documents(texts), VALIDATION_FRACTION) == (split == "validation")).all()
        for index, text in enumerate(texts):
            ids = tokens.read(int(tokens.offsets[index]), int(tokens.offsets[index + 1]))
            assert ids.tolist() == [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]


def test_table_counts_and_a_second_call_does_nothing(tmp_path):
    source = tmp_path / "texts.jsonl"
    records = [
        *TEXTS[:50],
        TEXTS[0],
        TEXTS[1].upper() + "  \n\n!",
        "",
        " \u200b\n",
    ]  # a duplicate, a near duplicate (equal but for case and punctuation), two empty documents
    source.write_text("".join(json.dumps({"text": text}) + "\n" for text in records))
    first = prepare(tmp_path / "out", "--sources", f"[{source}]")
    manifest = load_manifest(tmp_path / "out")
    assert manifest["documents_read"] == 54
    assert manifest["dropped"] == {"empty after cleaning": 2, "exact duplicate": 1, "near duplicate": 1}
    assert sum(figures["documents"] for figures in manifest["splits"].values()) == 50
    assert (
        "exact duplicate" in first
        and "bytes/token" in first
        and "tokenizer    0." in first
        and "400 entries, from the training documents" in first
    )
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")}
    assert "nothing to do" in prepare(tmp_path / "out", "--sources", f"[{source}]")
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")}


def test_only_white_space_makes_no_other_text_and_variants_are_on_one_side(tmp_path):
    """The option drops variants under a reason of its own; kept documents are in the same split with and without it."""
    forms = ("{} is -5 C", "{} is 5 c", "{}: is 5, C++", "{} is  5 C&&", "{} IS\n5 C&&", "{} is\t5 c")
    words = sorted({word.casefold() for text in TEXTS for word in text.split()[:1] if word.isalpha()})[:60]
    texts = [form.format(word) for word in words for form in forms]
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    stored = {}
    for ignore in ("false", "true"):
        prepare(
            tmp_path / ignore, "--sources", f"[{path}]", "--deduplication.ignore_case_and_punctuation", ignore,
            "--validation_fraction", "0.3", "--cleaning.steps", "[]",
        )  # fmt: skip
        page = (tmp_path / ignore / "report.html").read_text(encoding="utf-8")
        dropped = load_manifest(tmp_path / ignore)["dropped"]
        assert ("equal but for case and punctuation" in page) == (ignore == "true")
        assert dropped["exact duplicate"] == 60
        assert dropped.get("equal but for case and punctuation", 0) == (240 if ignore == "true" else 0)
        for split in ("train", "validation"):
            stored[ignore, split] = documents(tmp_path / ignore, split)
            held_out = is_held_out(digest_documents(stored[ignore, split]), 0.3)
            assert (held_out == (split == "validation")).all()
    for split in ("train", "validation"):
        assert set(stored["true", split]) < set(stored["false", split])


def test_special_tokens_in_the_text_are_counted_and_are_text_unless_asked_for(tmp_path):
    texts = [f"{text} <|endoftext|> or <|user|>\n" for text in TEXTS[:40]] + TEXTS[40:80]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    counted = {}
    for parse in ("false", "true"):
        out = prepare(
            tmp_path / parse, "--sources", f"[{tmp_path / 'a.jsonl'}]", "--tokenizer.special_tokens", "[<|user|>]",
            "--tokenizer.parse_special_tokens", parse,
        )  # fmt: skip
        manifest = load_manifest(tmp_path / parse)
        tokenizer = AutoTokenizer.from_pretrained(tmp_path / parse / "tokenizer")
        ids = np.concatenate([open_split(tmp_path / parse, split).read(0, manifest["splits"][split]["tokens"])
                              for split in ("train", "validation")])  # fmt: skip
        user, eos = tokenizer.convert_tokens_to_ids(["<|user|>", "<|endoftext|>"])
        counted[parse] = (ids == user).sum(), (ids == eos).sum() - 2 * 80
        assert manifest["tokenizer"]["spelled_out"] == {"<|endoftext|>": 40, "<|user|>": 40}
        for page in (out, *((tmp_path / parse / name).read_text("utf-8") for name in ("README.md", "report.html"))):
            assert "spelled out" in page
        learnt = [piece for piece in tokenizer.get_vocab() if "endof" in piece and piece != "<|endoftext|>"]
        assert bool(learnt) == (parse == "false")
        if parse == "false":
            stored = [text for split in ("train", "validation") for text in documents(tmp_path / parse, split)]
            assert sorted(stored) == sorted(clean(texts))
    assert counted == {"false": (0, 0), "true": (40, 40)}


def test_the_report_can_be_opened_and_says_what_was_dropped(dataset):
    page = (dataset / "report.html").read_text(encoding="utf-8")
    assert "near duplicate" in page.lower() and "src=" not in page and "href=" not in page
    assert "tokens/word" in (dataset / "README.md").read_text(encoding="utf-8")


def test_weights_and_mixtures(tmp_path):
    """Weight 2 stores each training document twice, weight 0.5 half of them; validation documents are not repeated."""
    for name, texts in {"a": TEXTS[:300], "b": TEXTS[300:900], "c": TEXTS[900:1000]}.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    sources = [
        {"path": str(tmp_path / f"{name}.jsonl"), "weight": weight} for name, weight in (("a", 2), ("b", 0.5), ("c", 0))
    ]
    prepare(tmp_path / "out", "--sources", json.dumps(sources))
    prepare(tmp_path / "one", "--sources", json.dumps([source | {"weight": 1} for source in sources]))
    found, once = (Counter(documents(tmp_path / name, "train")) for name in ("out", "one"))
    by_source = [set(clean(TEXTS[start:stop])) & set(once) for start, stop in ((0, 300), (300, 900), (900, 1000))]
    assert all(found[text] == 2 for text in by_source[0])
    halved = [found[text] for text in by_source[1]]
    assert set(halved) == {0, 1} and 0.4 < sum(halved) / len(halved) < 0.6
    assert not any(found[text] for text in by_source[2])
    assert documents(tmp_path / "out", "validation") == documents(tmp_path / "one", "validation")
    figures = load_manifest(tmp_path / "out")["splits"]["train"]
    assert sum(source["tokens"] for source in figures["sources"].values()) == figures["tokens"]
    assert figures["sources"]["a"]["documents"] == 2 * len(by_source[0])


def test_dropped_documents_can_be_kept_for_reading(tmp_path):
    prepare(tmp_path / "out", "--keep_dropped", "true", "--cleaning.steps", "[standard, length]",
            "--cleaning.min_characters", "60")  # fmt: skip
    dropped = [json.loads(line) for line in (tmp_path / "out" / "dropped.jsonl").read_text().splitlines()]
    assert Counter(item["reason"] for item in dropped) == load_manifest(tmp_path / "out")["dropped"]
    assert all(len(item["text"]) < 60 for item in dropped if item["reason"].startswith("length"))
    assert {"reason", "id", "source", "text"} == set(dropped[0])


def test_every_format_and_a_folder_give_the_same_documents(tmp_path):
    texts = clean(TEXTS[100:140])
    folders = {kind: tmp_path / kind for kind in ("txt", "jsonl", "csv", "parquet")}
    for folder in folders.values():
        folder.mkdir()
    table = pa.table({"body": texts, "number": list(range(40))})
    for index, text in enumerate(texts):
        (folders["txt"] / f"{index:02}.txt").write_text(text)
    (folders["txt"] / "picture.png").write_bytes(b"\0not text")  # another kind of file: passed over
    (folders["jsonl"] / "a.jsonl").write_text("".join(json.dumps({"body": text}) + "\n" for text in texts))
    pyarrow.csv.write_csv(table, folders["csv"] / "a.csv")
    pyarrow.parquet.write_table(table, folders["parquet"] / "a.parquet")
    found = {}
    for kind, folder in folders.items():
        prepare(tmp_path / f"out_{kind}", "--sources", f"[{folder}]", "--text_column", "body")
        found[kind] = {split: documents(tmp_path / f"out_{kind}", split) for split in ("train", "validation")}
    assert sorted(found["txt"]["train"] + found["txt"]["validation"]) == sorted(texts)
    assert found["txt"] == found["jsonl"] == found["csv"] == found["parquet"]


def test_the_split_is_stable_when_documents_are_added(tmp_path):
    """The split depends on a document's text alone: adding or reordering documents changes it for none."""
    sides = {}
    for name, texts in {"few": TEXTS[200:300], "more": [*TEXTS[400:500], *reversed(TEXTS[200:300])]}.items():
        source = tmp_path / f"{name}.jsonl"
        source.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        prepare(tmp_path / name, "--sources", f"[{source}]")
        sides[name] = set(documents(tmp_path / name, "validation"))
    assert sides["few"] == sides["more"] & set(clean(TEXTS[200:300]))
    assert 1 <= len(sides["few"]) <= 25


def test_a_given_tokenizers_truncation_and_padding_are_not_applied(tmp_path, dataset):
    """Its saved limits are meant for another use: here they would silently cut documents."""
    limited = AutoTokenizer.from_pretrained(dataset / "tokenizer")
    limited.backend_tokenizer.enable_truncation(16)
    limited.backend_tokenizer.enable_padding(length=16)
    limited.backend_tokenizer.save(str(tmp_path / "tokenizer.json"))
    limited.save_pretrained(tmp_path / "limited")
    shutil.copy(tmp_path / "tokenizer.json", tmp_path / "limited" / "tokenizer.json")
    prepare(tmp_path / "out", "--tokenizer.pretrained", tmp_path / "limited", *SAME_SPLIT)
    assert load_manifest(tmp_path / "out")["splits"] == load_manifest(dataset)["splits"]


def test_a_given_tokenizer_is_taken(tmp_path, dataset):
    source = tmp_path / "a.jsonl"
    shutil.copy(SAMPLE, source)
    prepare(tmp_path / "out", "--sources", f"[{source}]", "--tokenizer.pretrained", dataset / "tokenizer", *SAME_SPLIT)
    for split in ("train", "validation"):
        ours, theirs = open_split(tmp_path / "out", split), open_split(dataset, split)
        assert (ours.read(0, ours.num_tokens) == theirs.read(0, theirs.num_tokens)).all()


BAD_SOURCES = {  # source, expected part of the error line
    "missing": ("no/such/file.txt", "no such file"),
    "empty_folder": ("empty_folder", "no .txt"),
    "empty": ("empty.jsonl", "the file is empty; 1 of 1 records are broken"),
    "empty_text": ("empty.txt", "the file is empty; 1 of 1 records are broken, 1 of 1 files are lost"),
    "mixed": ("mixed.jsonl", "line 2: column 'text' holds int, not text"),
    "binary": ("binary.txt", "binary file"),
    "latin1": ("latin1.txt", "line 2: not UTF-8"),
    "broken": ("broken.jsonl", "line 3: not JSON"),
    "numbers": ("numbers.jsonl", "line 1: column 'text' holds int, not text"),
    "other": ("other.csv", "line 2: no column 'text'; it has title, body"),
    "fake": ("fake.parquet", "cannot be read as parquet"),
    "kind": ("book.pdf", "unknown kind"),
    "one": ("one.jsonl", "split is empty"),
}


def write_bad_sources(folder: Path) -> None:
    (folder / "empty_folder").mkdir()
    (folder / "empty.txt").write_bytes(b"")
    (folder / "empty.jsonl").write_bytes(b"")
    (folder / "mixed.jsonl").write_text('{"text": "a"}\n{"text": 5}\n')
    (folder / "binary.txt").write_bytes(b"\x7fELF\0\0\0\1" * 100)
    (folder / "latin1.txt").write_bytes("ein Satz\nnoch einer, schön\n".encode("latin-1"))
    (folder / "broken.jsonl").write_text('{"text": "one"}\n{"text": "two"}\n{"text": "thr\n')
    (folder / "numbers.jsonl").write_text('{"text": 1}\n{"text": 2}\n')
    (folder / "other.csv").write_text("title,body\na,b\n")
    (folder / "fake.parquet").write_text("no parquet")
    (folder / "book.pdf").write_bytes(b"%PDF")
    (folder / "one.jsonl").write_text('{"text": "the only document"}\n')


@pytest.mark.parametrize(
    "case",
    sorted(BAD_SOURCES),
)
def test_bad_sources_get_one_line_and_leave_nothing(case, tmp_path):
    write_bad_sources(tmp_path)
    name, expected = BAD_SOURCES[case]
    line = error_line("prepare_data.py", "--output", tmp_path / "out", "--sources", f"[{tmp_path / name}]")
    assert expected in line and ("split is empty" in expected or Path(name).name in line)
    left = [path.name for path in tmp_path.iterdir() if "out" in path.name]
    assert left in ([], [".out.stages"])  # the completed stages
    assert not left or not list((tmp_path / ".out.stages").glob(".*partial*"))


def test_an_existing_folder_is_not_overwritten(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious").write_text("mine")
    assert "not a dataset folder" in error_line("prepare_data.py", "--output", tmp_path / "out")
    assert (tmp_path / "out" / "precious").read_text() == "mine"


def test_the_recipe_in_the_docs_runs(tmp_path, monkeypatch):
    """Unchanged, with files of the names that it uses, except for the Hub, which tests cannot reach."""
    recipe = re.search(r"```yaml\n(sources:.*?)```", (ROOT / "docs" / "data.md").read_text(encoding="utf-8"), re.S)[1]
    recipe = "".join(line for line in recipe.splitlines(keepends=True) if "{hub:" not in line)
    long = [text for text in TEXTS if len(text) > 200]
    (tmp_path / "my_texts").mkdir()
    for number, text in enumerate(long[:40]):
        (tmp_path / "my_texts" / f"{number}.txt").write_text(text)
    lines = "".join(json.dumps({"body": text}) + "\n" for text in long[40:60]).encode()
    with pa.CompressedOutputStream(str(tmp_path / "notes.jsonl.zst"), "zstd") as stream:
        stream.write(lines)
    table = pa.table({"question": long[60:70], "answer": long[70:80]})
    pyarrow.csv.write_csv(table, tmp_path / "qa.csv")
    (tmp_path / "main.c").write_text("int main(void)\n{\n\treturn 0; /* nothing to be done here, and done well */\n}\n")
    with tarfile.open(tmp_path / "linux.tar.xz", "w:xz") as archive:
        archive.add(tmp_path / "main.c", "main.c")
    entries = "".join(text.replace("\n", "\n  ").strip() + "\n" for text in long[80:100])
    (tmp_path / "dictionary.txt.gz").write_bytes(gzip.compress(entries.encode()))
    (tmp_path / "recipe.yaml").write_text(recipe)
    monkeypatch.chdir(tmp_path)
    code, _, err = call("prepare_data.py", "--config", "recipe.yaml", "--tokenizer.vocab_size", "400",
                          "--cleaning.min_language_score", "0.3")  # fmt: skip
    assert code == 0, err
    sources = load_manifest(tmp_path / "data" / "mine")["splits"]["train"]["sources"]
    assert sources.keys() == {"my_texts", "notes", "qa", "kernel", "dictionary"}
    assert sources["qa"]["documents"] and sources["dictionary"]["documents"] > 10
    assert any(
        "Question: " in text and "\n\nAnswer: " in text for text in documents(tmp_path / "data" / "mine", "train")
    )


def test_a_split_of_several_files_is_mapped_as_datasets_reads_it(tmp_path):
    lists = [list(range(n % 7)) for n in range(1000)]
    features = datasets.Features(input_ids=datasets.List(datasets.Value("uint16")))
    datasets.Dataset.from_dict({"input_ids": lists}, features=features).save_to_disk(tmp_path / "train", num_shards=3)
    reread = datasets.load_from_disk(str(tmp_path / "train"))
    tokens = open_split(tmp_path, "train")
    assert np.diff(tokens.offsets).tolist() == [len(ids) for ids in reread["input_ids"]]
    assert tokens.read(0, tokens.num_tokens).tolist() == [token for ids in reread["input_ids"] for token in ids]
    (tmp_path / "train" / "data-00001-of-00003.arrow").unlink()
    with pytest.raises(UserError, match="the train split cannot be read"):
        open_split(tmp_path, "train")
