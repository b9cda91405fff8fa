"""prepare_data.py on real text: what goes in, what comes out, and what is refused."""

import json
import shutil
from pathlib import Path

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet
import pytest
from conftest import ROOT, call, error_line
from transformers import AutoTokenizer

from utils.batches.token_dataset import load_manifest, open_split
from utils.text.cleaning import clean_basic, clean_standard
from utils.text.deduplication import digest, is_validation

SAMPLE = ROOT / "sample_data" / "dictionaries.jsonl"
TEXTS = [json.loads(line)["text"] for line in SAMPLE.read_text(encoding="utf-8").splitlines()]


def prepare(folder: Path, *arguments: str | Path) -> str:
    code, out, err = call("prepare_data.py", "--output", folder, "--tokenizer.vocab_size", "400", *arguments)
    assert code == 0, err
    return out


def documents(folder: Path, split: str) -> list[str]:
    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
    tokens = open_split(folder, split)
    spans = zip(tokens.offsets[:-1], tokens.offsets[1:], strict=True)
    return [tokenizer.decode(tokens.read(a, b), skip_special_tokens=True) for a, b in spans]


def test_ids_are_the_tokenizers_own_and_text_comes_back(dataset):
    tokenizer = AutoTokenizer.from_pretrained(dataset / "tokenizer")
    cleaned = {digest(text): text for text in map(clean_standard, TEXTS)}
    expected = {split: [text for key, text in cleaned.items() if is_validation(key, 0.1) == (split == "validation")]
                for split in ("train", "validation")}  # fmt: skip
    for split, texts in expected.items():
        tokens = open_split(dataset, split)
        assert len(tokens.offsets) - 1 == len(texts) == load_manifest(dataset)["splits"][split]["documents"]
        for index, text in enumerate(texts):
            ids = tokens.read(int(tokens.offsets[index]), int(tokens.offsets[index + 1]))
            assert ids.tolist() == [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]
        assert documents(dataset, split) == texts
        assert load_manifest(dataset)["splits"][split]["bytes"] == sum(len(text.encode()) for text in texts)


def test_table_counts_and_a_second_call_does_nothing(tmp_path):
    source = tmp_path / "texts.jsonl"
    records = [
        *TEXTS[:50],
        TEXTS[0],
        TEXTS[1] + "  \n\n",
        "",
        " \u200b\n",
    ]  # two duplicates (one after cleaning), two empty
    source.write_text("".join(json.dumps({"text": text}) + "\n" for text in records))
    first = prepare(tmp_path / "out", "--sources", f"[{source}]")
    manifest = load_manifest(tmp_path / "out")
    assert manifest["documents_read"] == 54
    assert manifest["dropped"] == {"exact duplicate": 2, "empty after cleaning": 2}
    assert sum(figures["documents"] for figures in manifest["splits"].values()) == 50
    assert (
        "exact duplicate" in first
        and "bytes/token" in first
        and "seconds:" in first
        and "400 entries, from the training documents" in first
    )
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")}
    assert "nothing to do" in prepare(tmp_path / "out", "--sources", f"[{source}]")
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")}
    refused = error_line(
        "prepare_data.py", "--output", tmp_path / "out", "--sources", f"[{source}]", "--cleaning", "basic"
    )
    assert "other sources or options" in refused
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")}


def test_every_format_and_a_folder_give_the_same_documents(tmp_path):
    texts = [clean_standard(text) for text in TEXTS[100:140]]
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
    """A property of the text alone: adding documents, or reordering them, moves none across."""
    sides = {}
    for name, texts in {"few": TEXTS[200:300], "more": [*TEXTS[400:500], *reversed(TEXTS[200:300])]}.items():
        source = tmp_path / f"{name}.jsonl"
        source.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        prepare(tmp_path / name, "--sources", f"[{source}]")
        sides[name] = set(documents(tmp_path / name, "validation"))
    assert sides["few"] == sides["more"] & {clean_standard(text) for text in TEXTS[200:300]}
    assert 1 <= len(sides["few"]) <= 25


def test_a_given_tokenizers_truncation_and_padding_are_not_applied(tmp_path, dataset):
    """Its saved limits are those of another use: here they would cut documents without a word."""
    limited = AutoTokenizer.from_pretrained(dataset / "tokenizer")
    limited.backend_tokenizer.enable_truncation(16)
    limited.backend_tokenizer.enable_padding(length=16)
    limited.backend_tokenizer.save(str(tmp_path / "tokenizer.json"))
    limited.save_pretrained(tmp_path / "limited")
    shutil.copy(tmp_path / "tokenizer.json", tmp_path / "limited" / "tokenizer.json")
    prepare(tmp_path / "out", "--tokenizer.pretrained", tmp_path / "limited")
    assert load_manifest(tmp_path / "out")["splits"] == load_manifest(dataset)["splits"]


def test_a_given_tokenizer_is_taken(tmp_path, dataset):
    source = tmp_path / "a.jsonl"
    shutil.copy(SAMPLE, source)
    prepare(tmp_path / "out", "--sources", f"[{source}]", "--tokenizer.pretrained", dataset / "tokenizer")
    for split in ("train", "validation"):
        ours, theirs = open_split(tmp_path / "out", split), open_split(dataset, split)
        assert (ours.read(0, ours.num_tokens) == theirs.read(0, theirs.num_tokens)).all()


@pytest.mark.parametrize(
    ("raw", "standard", "basic"),
    [
        ("e\u0301te\u0301  two\r\nlines", "été  two\nlines", "été two lines"),
        ("a\x00b\x07c\ufeff\td", "abc\td", "abc d"),
        ("e\u200b\u0301", "é", "e"),
        ("  indented\nline   \n\n\n\nnext\n", "  indented\nline\n\nnext", "indented line next"),
        ("price: 5 € (*cheap*)", "price: 5 € (*cheap*)", "price: 5 (cheap)"),
        ("می\u200cخواهم", "می\u200cخواهم", "میخواهم"),
        ("\u200b \n\t", "", ""),
    ],
)
def test_cleaning_rules(raw, standard, basic):
    assert clean_standard(raw).strip() == standard.strip()
    assert clean_basic(raw) == basic
    assert clean_standard(clean_standard(raw)) == clean_standard(raw)


BAD_SOURCES = {  # source, what the error line must say
    "missing": ("no/such/file.txt", "no such file"),
    "empty_folder": ("empty_folder", "no .txt"),
    "empty": ("empty.jsonl", "the file is empty"),
    "empty_text": ("empty.txt", "split is empty: 1 documents, 1 dropped"),
    "mixed": ("mixed.jsonl", "not text"),
    "binary": ("binary.txt", "binary file"),
    "latin1": ("latin1.txt", "line 2: not UTF-8"),
    "broken": ("broken.jsonl", "line 3: not a JSON record"),
    "numbers": ("numbers.jsonl", "holds Value('int64'), not text"),
    "other": ("other.csv", "no column 'text'; it has title, body"),
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
    assert [path.name for path in tmp_path.iterdir() if "out" in path.name] == []


def test_an_existing_folder_is_not_overwritten(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious").write_text("mine")
    assert "not a dataset folder" in error_line("prepare_data.py", "--output", tmp_path / "out")
    assert (tmp_path / "out" / "precious").read_text() == "mine"
