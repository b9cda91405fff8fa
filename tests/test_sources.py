"""Each kind of source yields its documents and names the records that cannot be read."""

import csv
import gzip
import io
import json
import re
import tarfile
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet
import pytest
from conftest import ROOT

from preparation.recipe import SourceConfig, parse_source
from preparation.sources.documents import (
    TEXT_PART_BYTES,
    Broken,
    Document,
    Skipped,
    check_broken,
    iter_records,
    read_sources,
)
from preparation.sources.files import OTHER_KIND, reading_units
from utils.cli import UserError

TEXTS = [json.loads(line)["text"] for line in (ROOT / "sample_data" / "dictionaries.jsonl").open()][40:80]


def records(path: Path | str, **options) -> list:
    source = SourceConfig(path=str(path), name="test", **options)
    source.text_column = source.text_column or "text"
    found = iter_records(source, reading_units(source))
    return [item for item in found if not (isinstance(item, Skipped) and item.why == OTHER_KIND)]


def texts(path: Path | str, **options) -> list[str]:
    found = records(path, **options)
    assert all(isinstance(item, Document) for item in found), found
    return [item.text for item in found]


def json_lines(items: list[str], column: str = "text") -> bytes:
    return "".join(json.dumps({column: text, "number": 1}) + "\n" for text in items).encode()


def csv_bytes(items: list[str], delimiter: str = ",") -> bytes:
    buffer = io.StringIO()
    csv.writer(buffer, delimiter=delimiter).writerows([["number", "text"], *([1, text] for text in items)])
    return buffer.getvalue().encode()


def parquet_bytes(items: list[str]) -> bytes:
    buffer = io.BytesIO()
    pyarrow.parquet.write_table(pa.table({"text": items, "number": list(range(len(items)))}), buffer)
    return buffer.getvalue()


FORMATS = {
    "a.jsonl": json_lines(TEXTS), "a.json": json.dumps([{"text": text} for text in TEXTS]).encode(),
    "a.csv": csv_bytes(TEXTS), "a.tsv": csv_bytes(TEXTS, "\t"), "a.parquet": parquet_bytes(TEXTS),
}  # fmt: skip


def zstd(data: bytes) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(data)
    return sink.getvalue().to_pybytes()


COMPRESSORS = {"": bytes, ".gz": gzip.compress, ".zst": zstd}


@pytest.mark.parametrize("suffix", COMPRESSORS)
@pytest.mark.parametrize("name", FORMATS)
def test_records_of_every_format_plain_and_compressed(name, suffix, tmp_path):
    path = tmp_path / (name + suffix)
    path.write_bytes(COMPRESSORS[suffix](FORMATS[name]))
    assert texts(path) == TEXTS


def test_a_folder_of_text_files_and_an_archive_of_it_give_the_same(tmp_path):
    folder = tmp_path / "texts"
    (folder / "deep").mkdir(parents=True)
    for index, text in enumerate(TEXTS):
        suffix = (".txt", ".md.gz", ".txt.zst")[index % 3]
        data = COMPRESSORS["." + suffix.rpartition(".")[2] if suffix.count(".") > 1 else ""](text.encode())
        (folder / ("deep" if index % 2 else ".") / f"{index:02}{suffix}").write_bytes(data)
    (folder / "picture.png").write_bytes(b"\0")
    assert sorted(texts(folder)) == sorted(TEXTS)
    for end, mode in ((".tar", "w"), (".tar.gz", "w:gz"), (".tar.xz", "w:xz")):
        with tarfile.open(tmp_path / f"texts{end}", mode) as archive:
            archive.add(folder, "texts")
        assert sorted(texts(tmp_path / f"texts{end}")) == sorted(TEXTS)
    (tmp_path / "texts.tar.zst").write_bytes(zstd((tmp_path / "texts.tar").read_bytes()))
    assert sorted(texts(tmp_path / "texts.tar.zst")) == sorted(TEXTS)
    wanted = [text for index, text in enumerate(TEXTS) if index % 3 == 1]
    assert sorted(texts(folder, include="*.md.gz")) == sorted(wanted)


def test_a_line_can_begin_a_new_document(tmp_path):
    text = "head\nALPHA one\n  more\nBETA two\n\nlast\n"
    (tmp_path / "a.txt").write_text(text)
    found = records(tmp_path / "a.txt", new_document="^[A-Z]{2}")
    assert [item.text for item in found] == ["head\n", "ALPHA one\n  more\n", "BETA two\n\nlast\n"]
    assert [item.id.rpartition(":")[2] for item in found] == ["1", "2", "4"]


@pytest.mark.parametrize("character", ["ж", "中", "😀", "aж", "ab中", "abc😀"])
def test_a_long_text_without_line_ends_is_never_cut_through_a_character(character, tmp_path):
    text = character * (2 * TEXT_PART_BYTES // len(character.encode()) + 1)
    (tmp_path / "a.txt").write_text(text)
    assert "".join(texts(tmp_path / "a.txt")) == text


@pytest.mark.parametrize("suffix", [".tar", ".tar.gz"])
def test_an_archive_with_a_damaged_header_or_a_cut_is_named(suffix, tmp_path):
    """`tarfile` itself treats both as the end of the archive."""
    for index, text in enumerate(TEXTS):
        (tmp_path / f"{index:02}.txt").write_text(text)
    with tarfile.open(tmp_path / "plain.tar", "w") as archive:
        for index in range(len(TEXTS)):
            archive.add(tmp_path / f"{index:02}.txt", f"{index:02}.txt")
    data = (tmp_path / "plain.tar").read_bytes()
    header = data.index(b"10.txt\0")
    cases = [data[:header] + b"\xff" + data[header + 1 :], data[:header], data[: header + 100]]
    for case in cases:
        (tmp_path / f"bad{suffix}").write_bytes(gzip.compress(case) if suffix.endswith("gz") else case)
        *found, last = records(tmp_path / f"bad{suffix}")
        assert [item.text for item in found] == TEXTS[:10]
        assert isinstance(last, Broken) and "damaged or cut off after 10 records" in last.why


def test_one_bad_member_does_not_end_an_archive(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        for index, text in enumerate(TEXTS):
            (tmp_path / "a").write_bytes(b"no gzip" if index == 5 else gzip.compress(text.encode()))
            archive.add(tmp_path / "a", f"{index:02}.txt.gz")
    found = records(tmp_path / "a.tar")
    assert [item.text for item in found if isinstance(item, Document)] == TEXTS[:5] + TEXTS[6:]
    assert [item.file for item in found if isinstance(item, Broken)] == ["a.tar/05.txt.gz"]


@pytest.mark.parametrize("separator", ["\n\n", "\n", " "])
def test_a_very_long_text_file_is_read_in_parts_and_loses_nothing(separator, tmp_path):
    text = separator.join("ключ " + word for word in "".join(TEXTS).split()) * 500
    assert len(text.encode()) > 2 * TEXT_PART_BYTES
    (tmp_path / "a.txt").write_text(text)
    parts = texts(tmp_path / "a.txt")
    assert "".join(parts) == text
    assert len(parts) > 2 and max(len(part.encode()) for part in parts) <= TEXT_PART_BYTES
    assert all(part.endswith(separator) for part in parts[:-1]) or separator == " "


def test_html_gives_the_main_text(tmp_path):
    page = (
        "<html><head><title>t</title><script>var x = 1;</script></head><body><nav><a href='/'>Home</a> | "
        "<a href='/b'>About</a></nav><main><h1>Über Käse</h1><p>Der Käse ist gut, und das Brot ist frisch. Viele "
        "Menschen essen beides gern.</p></main><footer>Copyright</footer></body></html>"
    )
    (tmp_path / "utf8.html").write_text(page)
    (tmp_path / "latin1.htm").write_bytes(page.replace("<head>", "<head><meta charset='iso-8859-1'>").encode("latin-1"))
    for text in texts(tmp_path):
        assert "Der Käse ist gut" in text and "Über Käse" in text
        assert "var x" not in text and "About" not in text


def test_code_is_kept_with_its_path_and_filtered_by_size_and_name(tmp_path):
    repository = tmp_path / "repo"
    (repository / "src").mkdir(parents=True)
    (repository / "src" / "a.py").write_text("def f():\n\treturn 1  \n")
    (repository / "src" / "long.py").write_text("x = 1\n" * 200_000)
    (repository / "src" / "lib.min.js").write_text("var a;")
    (repository / "src" / "data.c").write_bytes(b"\0\1")
    (repository / "notes.txt").write_text("not code")
    with tarfile.open(tmp_path / "repo.tar.gz", "w:gz") as archive:
        archive.add(repository, "repo")
    for path in (repository, tmp_path / "repo.tar.gz"):
        found = records(path, kind="code")
        assert [item.text for item in found if isinstance(item, Document)] == ["def f():\n\treturn 1  \n"]
        assert next(item.id for item in found if isinstance(item, Document)).endswith("repo/src/a.py")
        assert sorted(item.why for item in found if isinstance(item, Skipped)) == [
            "code: binary file", "code: file too long",
        ]  # fmt: skip
    assert len(texts(repository, kind="code", extensions=[".py"], max_file_bytes=2_000_000)) == 2


def test_saved_datasets_and_hub_folders(tmp_path):
    table = datasets.Dataset.from_dict({"title": ["A", "B"], "body": TEXTS[:2]})
    table.save_to_disk(tmp_path / "saved")
    datasets.DatasetDict({"train": table, "test": table.select([0])}).save_to_disk(tmp_path / "splits")
    assert texts(tmp_path / "saved", text_column="body") == TEXTS[:2]
    assert texts(tmp_path / "splits", text_column="body", split="test") == TEXTS[:1]
    with pytest.raises(UserError, match="no split 'dev'; it has train, test"):
        records(tmp_path / "splits", split="dev")

    hub = tmp_path / "hub"  # the layout that `load_dataset` expects: data files named after their split
    (hub / "data").mkdir(parents=True)
    (hub / "data" / "train-00000.jsonl").write_bytes(json_lines(TEXTS[:30], "body"))
    (hub / "data" / "test-00000.jsonl").write_bytes(json_lines(TEXTS[30:], "body"))
    for streaming in (False, True):
        for split, expected in (("train", TEXTS[:30]), ("test", TEXTS[30:])):
            source = SourceConfig(hub=str(hub), name="hub", text_column="body", split=split, streaming=streaming)
            assert [item.text for item in iter_records(source, reading_units(source))] == expected
    source = SourceConfig(hub=str(tmp_path / "nothing"), name="hub")
    with pytest.raises(UserError, match=r"hub .*nothing: cannot be read as a dataset"):
        list(iter_records(source, reading_units(source)))


def test_a_template_makes_text_of_several_columns(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"q": "Why?", "a": "Because."}\n{"q": "And?", "a": null}\n{"q": "Lost"}\n')
    found = records(path, template="{q}\n{a}")
    assert [item.text for item in found[:2]] == ["Why?\nBecause.", "And?\n"]
    assert found[2] == Broken(str(path), "line 3: no column 'a'; it has q (see template)", 14, 1)


def test_a_template_never_writes_a_value_of_python(tmp_path):
    record = {
        "q": "{x} {0}",
        "answers": {"text": ["A man"], "n": [5]},
        "score": float("nan"),
        "n": 3,
        "ok": True,
        "0": 1,
    }
    (tmp_path / "a.jsonl").write_text(json.dumps(record) + "\n")
    assert texts(tmp_path / "a.jsonl", template="{q} {answers[text][0]} {answers.n[0]} {n} {ok} {0}") == [
        "{x} {0} A man 5 3 true 1"
    ]
    for field, why in {
        "answers": "holds dict, not text; name what is in it, as in {answers[text]}", "score": "holds nan",
        "answers[text]": "holds list", "answers.none": "finds no 'none' in dict", "answers[text][7]": "finds no '7'",
        "q.__class__": "finds no '__class__' in str",
    }.items():  # fmt: skip
        (broken,) = records(tmp_path / "a.jsonl", template=f"{{{field}}}")
        assert isinstance(broken, Broken) and f"line 1: template field {{{field}}} {why}" in broken.why
    pyarrow.parquet.write_table(pa.table({"raw": [b"bytes"], "at": [1.5]}), tmp_path / "a.parquet")
    assert texts(tmp_path / "a.parquet", template="{at}") == ["1.5"]
    assert "{raw} holds bytes" in records(tmp_path / "a.parquet", template="{raw}")[0].why


SEPARATED = {  # text, pattern, documents, whether their lines that only separate are kept
    "crlf": ("one\r\n%\r\ntwo\r\n%\r\n", "^%$", ["one\r\n", "two\r\n"], False),
    "kept": ("one\n%\ntwo\n", "^%$", ["one\n", "%\ntwo\n"], True),
    "mark": ("\ufeffALPHA 1\na\nALPHA 2\nb\n", "^ALPHA", ["ALPHA 1\na\n", "ALPHA 2\nb\n"], False),
    "only": ("\ufeff%\n%\na\n%", "^%$", ["a\n"], False),
    "token": ("one\n<|endoftext|>\ntwo", r"^<\|endoftext\|>$", ["one\n", "two"], False),
    "blank": ("one\n\ntwo\n", r"^\s*$", ["one\n", "two\n"], False),
    "cr": ("one\r%\rtwo\r%\r", "^%$", ["one\r", "two\r"], False),
    "all": ("one\r%\ra\n%\r\nb\r\n\r%\rc", "^%$", ["one\r", "a\n", "b\r\n\r", "c"], False),
}  # fmt: skip


@pytest.mark.parametrize("name", SEPARATED)
def test_a_line_that_only_separates_goes_unless_asked_for(name, tmp_path):
    text, pattern, expected, keep = SEPARATED[name]
    (tmp_path / "a.txt").write_bytes(text.encode())
    found = records(tmp_path / "a.txt", new_document=pattern, keep_separator=keep)
    documents = [item for item in found if isinstance(item, Document)]
    assert [item.text for item in documents] == expected
    assert [
        re.split("\r\n|\r|\n", text)[int(item.id.rpartition(":")[2]) - 1].strip("\r\ufeff") for item in documents
    ] == [item.text.splitlines()[0] for item in documents]
    left = sum(item.bytes for item in found if isinstance(item, Skipped))  # what goes is counted
    assert left + sum(len(item.text.encode()) for item in documents) + 3 * text.count("\ufeff") in (
        len(text.encode()), len(text.encode()) + 3 * (name == "only")
    )  # fmt: skip


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 5000\n"
IN_PLACE = {  # content, the reported reason
    "a.jsonl.gz": (POINTER, "a Git LFS pointer to 5,000 bytes"), "a.txt": (POINTER, "a Git LFS pointer"),
    "a.py": (POINTER, "a Git LFS pointer"), "a.tar.gz": (POINTER, "a Git LFS pointer"),
    "b.txt": (b"../.git/annex/objects/0w/8X/SHA256E-s5--0.txt", "a git-annex link"),
    "b.csv": (b"/annex/objects/SHA256E-s5--0.csv\n", "a git-annex link"),
    "c.parquet": (b"<!DOCTYPE html><title>404</title>", "a web page in place of the file"),
    "c.txt": (b"\n<html><body>Sign in</body></html>", "a web page in place of the file"),
    "c.jsonl.zst": (b"<?xml version='1.0'?><Error><Code>AccessDenied</Code></Error>", "a web page in place"),
    "d.txt": (b"", "the file is empty"), "d.html": (b"", "the file is empty"), "d.md.gz": (gzip.compress(b""), "is empty"),
}  # fmt: skip


@pytest.mark.parametrize("name", IN_PLACE)
def test_what_stands_in_place_of_a_file_is_named_and_counted_as_a_lost_file(name, tmp_path):
    content, reason = IN_PLACE[name]
    (tmp_path / name).write_bytes(content)
    kind = "code" if name.endswith(".py") else None
    source = SourceConfig(path=str(tmp_path / name), name="a", kind=kind, text_column="text")
    read_sources([source], tmp_path)
    counts = json.loads((tmp_path / "read.json").read_text())
    (broken,) = counts["broken_records"]
    assert reason in broken["why"] and counts["lost_files"] == 1
    assert counts["broken_bytes"] == (5000 if content == POINTER else 0 if "empty" in reason else len(content))
    with pytest.raises(UserError, match=r"1 of 1 files are lost"):
        check_broken(counts | {"broken": 0}, 0.01)
    if name == "c.txt":
        assert texts(tmp_path / name, kind="text") == [content.decode()]


def test_half_of_the_files_missing_is_no_small_share(tmp_path):
    folder = tmp_path / "shards"
    folder.mkdir()
    for number in range(10):
        data = POINTER if number % 2 else gzip.compress(json_lines(TEXTS * 50))
        (folder / f"{number}.jsonl.gz").write_bytes(data)
    read_sources([SourceConfig(path=str(folder), name="a", text_column="text")], tmp_path)
    counts = json.loads((tmp_path / "read.json").read_text())
    assert counts["broken"] / counts["sources"]["a"]["documents"] < 0.01
    assert counts["broken_reasons"] == {
        "a Git LFS pointer to N bytes, not the file": {"records": 5, "bytes": 25000, "lines": 0, "files": 5}
    }
    with pytest.raises(UserError, match=r"1.jsonl.gz: a Git LFS pointer .* 5 of 10 files are lost, 25,000 of"):
        check_broken(counts, 0.01)


ROWS = [f"{number},row {number}; text of its own" for number in range(1000)]
QUOTES = {  # lines, lost lines
    "unclosed": ["id,text", *ROWS[:500], '500,"row', *ROWS[501:]],
    "closed": ["id,text", *ROWS[:500], '500,"row', *ROWS[501:800], '800,"row, 800"', *ROWS[801:]],
    "inside": ["id,text", *ROWS[:500], '500,"a "stray" quote', *ROWS[501:]],
    "single": ["text", *(row.replace(",", " ") for row in ROWS[:300]), '"row', *(row.replace(",", " ") for row in ROWS),
               'a row with a quote at its end"'],
}  # fmt: skip


@pytest.mark.parametrize("name", QUOTES)
def test_a_stray_quote_loses_its_row_only(name, tmp_path):
    (tmp_path / "a.csv").write_text("\n".join(QUOTES[name]) + "\n")
    found = records(tmp_path / "a.csv")
    documents = [item.text for item in found if isinstance(item, Document)]
    (broken,) = [item for item in found if isinstance(item, Broken)]
    assert len(documents) == len(QUOTES[name]) - 2 and not any("\n" in text for text in documents)
    assert broken.lines == 1 and broken.bytes == len(QUOTES[name][int(broken.why[5:].partition(":")[0]) - 1]) + 1
    assert [int(item.id.rpartition(":")[2]) for item in found if isinstance(item, Document)][-1] == len(QUOTES[name])


def test_the_inside_of_a_lost_cell_makes_no_documents(tmp_path, monkeypatch):
    poem = '"A line, and\nanother, too\n\nthe last, one"'
    rows = ["id,text", f"1,{poem}", '2,"He "x said\nyou, and\nme, too"', f"3,{poem}", "4,end"]
    (tmp_path / "a.csv").write_text("\n".join(rows) + "\n")
    found = records(tmp_path / "a.csv")
    assert [item.text for item in found if isinstance(item, Document)] == [poem.strip('"'), poem.strip('"'), "end"]
    assert [(item.why.partition(":")[0], item.lines) for item in found if isinstance(item, Broken)] == [
        ("lines 6–8", 3)
    ]
    monkeypatch.setattr("preparation.sources.csv_lines.CELL_CHARACTERS", 100)
    rows = ["id,text", "1,one", '2,"' + "a line of prose.\n" * 50 + 'the end"', "3,three", "4," + "x" * 101, "5,five"]
    (tmp_path / "a.csv").write_text("\n".join(rows) + "\n")
    found = records(tmp_path / "a.csv")
    assert [item.text for item in found if isinstance(item, Document)] == ["one", "three", "five"]
    assert [item.lines for item in found if isinstance(item, Broken)] == [51, 1]


DIALECTS = {
    "a.csv": "id;text\n1;a, b\n2;c\n", "b.csv": "sep=;\nid;text\n1;a, b\n2;c\n", "c.csv": "id\ttext\n1\ta, b\n2\tc\n",
    "d.csv": 'id,text\n1,"a, b"\n2,c\n', "e.tsv": "id,text\n1,\"a, b\"\n2,c\n", "f.csv": "id|text\n1|a, b\n2|c",
}  # fmt: skip


@pytest.mark.parametrize("name", DIALECTS)
def test_the_dialect_of_a_csv_file_is_found_by_the_columns_that_are_read(name, tmp_path):
    (tmp_path / name).write_text(DIALECTS[name])
    assert texts(tmp_path / name) == ["a, b", "c"]


def test_backslashes_before_quotes_are_taken_for_escapes_only_where_they_are(tmp_path):
    (tmp_path / "a.csv").write_text('id,text\n1,"say \\"hi\\", ok"\n2,"C:\\new \\\\"\n3,end\n')
    assert texts(tmp_path / "a.csv") == ['say "hi", ok', "C:\\new \\", "end"]
    (tmp_path / "b.csv").write_text('id,text\n1,"C:\\"\n2,"say ""hi"""\n')
    assert texts(tmp_path / "b.csv") == ["C:\\", 'say "hi"']


def test_columns_and_keys_that_stand_twice_are_named(tmp_path):
    (tmp_path / "a.csv").write_text("text,other,other,text\n1,2,3,4\n")
    (tmp_path / "b.csv").write_text("text,other,other\n1,2,3\n")
    (tmp_path / "c.jsonl").write_text('{"text": "a", "text": "b"}\n{"text": "\\"text\\" \\"text\\""}\n')
    (broken,) = records(tmp_path / "a.csv")
    assert broken.why == "line 1: column 'text' stands twice" and broken.is_file
    assert texts(tmp_path / "b.csv") == ["1"]
    first, second = records(tmp_path / "c.jsonl")
    assert first.why == "line 1: the key 'text' stands twice" and second.text == '"text" "text"'


JAPANESE, GERMAN = (
    "日本語のテキスト、吾輩は猫である。名前はまだ無い。",
    "Grüße aus Köln – schöne Stadt, „wirklich“ schön",
)
ENCODINGS = {"utf-16": JAPANESE, "utf-16-le": GERMAN, "windows-1252": GERMAN, "euc_jp": JAPANESE, "shift_jis": JAPANESE}


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_a_stated_encoding_holds_for_every_kind_of_text(encoding, tmp_path):
    text = ENCODINGS[encoding]
    files = {
        "a.txt": text, "a.csv": f"id,text\n1,{text.replace(',', '')}\n", "a.html": f"<p>{text}</p>",
        "a.jsonl": json.dumps({"text": text}, ensure_ascii=False) + "\n", "a.c": text,
    }  # fmt: skip
    for name, content in files.items():
        (tmp_path / name).write_bytes(content.encode(encoding))
        kind = "code" if name == "a.c" else None
        expected = [text.replace(",", "")] if name == "a.csv" else [text]
        assert texts(tmp_path / name, encoding=encoding, kind=kind) == expected
    (broken,) = records(tmp_path / "a.txt")  # without it, the message says what it looks like
    looks = {"utf-16-le": "utf-16-le", "windows-1252": "cp1252"}.get(encoding, encoding)
    assert "not UTF-8 text" in broken.why and f"give `encoding: {looks}` in its entry" in broken.why


def test_links_in_an_archive_are_named(tmp_path):
    (tmp_path / "a.txt").write_text("one")
    (tmp_path / "b.txt").hardlink_to(tmp_path / "a.txt")
    (tmp_path / "c.txt").symlink_to("a.txt")
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        for name in ("a.txt", "b.txt", "c.txt"):
            archive.add(tmp_path / name, name)
    document, *links = records(tmp_path / "a.tar")
    assert document.text == "one"
    assert [(item.file, item.why) for item in links] == [
        ("a.tar/b.txt", "a link or device in an archive"), ("a.tar/c.txt", "a link or device in an archive"),
    ]  # fmt: skip


def test_compressed_files_put_one_after_the_other_are_read_to_the_end(tmp_path):
    for suffix in (".gz", ".zst"):
        parts = [COMPRESSORS[suffix](json_lines(part)) for part in (TEXTS[:20], TEXTS[20:])]
        (tmp_path / f"a.jsonl{suffix}").write_bytes(b"".join(parts))
        assert texts(tmp_path / f"a.jsonl{suffix}") == TEXTS


def test_what_a_stated_encoding_cannot_decode_loses_its_record_only(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "\xff\xff"}\n' + '{"text": "日本"}\n'.encode("euc_jp"))
    broken, good = records(tmp_path / "a.jsonl", encoding="euc_jp")
    assert "line 1: not euc_jp text" in broken.why and good.text == "日本"


def test_a_zstd_window_too_long_for_the_reader_is_named(tmp_path):
    path = tmp_path / "a.jsonl.zst"
    path.write_bytes(bytes.fromhex("28b52ffd00a8") + b"\x01\x00\x00")  # a frame with a window of 2 GiB
    (broken,) = records(path)
    assert "zstd window" in broken.why and broken.is_file


GOOD = json_lines(TEXTS[:3])
BAD = {  # content, number of documents that are still read, the reported reason
    "cut.jsonl.gz": (gzip.compress(json_lines(TEXTS))[:-200], None, "damaged or cut off after"),
    "cut.jsonl.zst": (zstd(json_lines(TEXTS))[:-200], None, "damaged or cut off after"),
    "not.jsonl.gz": (b"plain text", 0, "damaged or cut off after 0 records"),
    "cut.tar.gz": (None, None, "damaged or cut off after"),
    "latin1.jsonl": (GOOD + b'{"text": "sch\xf6n"}\n' + GOOD, 6, "line 4: not UTF-8 text (invalid start byte at byte 13"),
    "half.jsonl": (GOOD + GOOD[:20], 3, "line 4: not JSON (Unterminated string"),
    "list.jsonl": (GOOD + b"[1]\n" + GOOD, 6, "line 4: expected named fields, found list"),
    "number.jsonl": (GOOD + b'{"text": 5}\n' + GOOD, 6, "line 4: column 'text' holds int, not text"),
    "deep.jsonl": (GOOD + b"[" * 100_000 + b"\n" + GOOD, 6, "line 4: not JSON (nested too deeply)"),
    "bad.json": (b'[{"text": "a"},', 0, "not JSON (Expecting value, column 16)"),
    "empty.jsonl": (b"", 0, "the file is empty"),
    "empty.csv": (b"", 0, "the file is empty"),
    "fields.csv": (b"number,text\n1,one\n2,two,three\n3\n4,four\n", 2, "line 3: 3 fields, but the first line names 2"),
    "latin1.csv": (b"number,text\n1,one\n2,sch\xf6n\n3,three\n", 2, "line 3: not UTF-8 text"),
    "quote.csv": (b'number,text\n1,one\n2,"t"wo\n3,three\n', 2, "line 3: not a CSV record"),
    "fake.parquet": (b"no parquet", 0, "cannot be read as parquet"),
    "cut.parquet": (parquet_bytes(TEXTS)[:-100], 0, "cannot be read as parquet"),
    "binary.txt": (b"\x7fELF\0\0" * 100, 0, "a binary file, not text"),
    "latin1.txt": (b"one\nsch\xf6n\n", 0, "line 2: not UTF-8 text (invalid start byte at byte 3 of the line)"),
    "binary.html": (b"<p>a\0b", 0, "a binary file"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_broken_records_are_named_and_the_rest_is_read(name, tmp_path):
    content, documents, reason = BAD[name]
    path = tmp_path / name
    if name == "cut.tar.gz":
        (tmp_path / "a.jsonl").write_bytes(json_lines(TEXTS))
        with tarfile.open(path, "w:gz") as archive:
            archive.add(tmp_path / "a.jsonl", "a.jsonl")
        content = path.read_bytes()[:-200]
    path.write_bytes(content)
    found = records(path)
    broken = [item for item in found if isinstance(item, Broken)]
    read = [item.text for item in found if isinstance(item, Document)]
    assert broken and broken[0].file.endswith(name) and reason in broken[0].why
    if documents is None:  # cut off somewhere: everything before the cut is read
        assert read == TEXTS[: len(read)]
    else:
        assert len(read) == documents


def test_a_line_end_of_two_bytes_is_one_although_it_lies_on_the_border_of_two_pieces(tmp_path):
    """A blank line would be found between the two."""
    text = "a" * (TEXT_PART_BYTES - 1) + "\r\nb\r\n"
    (tmp_path / "a.txt").write_bytes(text.encode())
    assert "".join(texts(tmp_path / "a.txt", new_document="^$")) == text


@pytest.mark.parametrize("name", ["a.parquet", "a.parquet.gz"])
def test_what_a_damaged_parquet_file_loses_is_counted_by_its_rows(name, tmp_path):
    """Four groups of as many rows as are read at once, the third of which is damaged: half of the file is lost."""
    table = pa.table({"text": TEXTS[:32] * 32})
    pyarrow.parquet.write_table(table, tmp_path / "whole", row_group_size=256, compression="gzip", use_dictionary=False)
    column = pyarrow.parquet.ParquetFile(tmp_path / "whole").metadata.row_group(2).column(0)
    data = bytearray((tmp_path / "whole").read_bytes())
    data[column.data_page_offset : column.data_page_offset + column.total_compressed_size] = bytes(
        column.total_compressed_size
    )
    (tmp_path / name).write_bytes(gzip.compress(data) if name.endswith("gz") else data)
    read_sources([SourceConfig(path=str(tmp_path / name), name="a", text_column="text")], tmp_path)
    counts = json.loads((tmp_path / "read.json").read_text())
    assert counts["sources"]["a"]["documents"] == 512 and counts["lost_files"] == counts["files"] == 1
    assert counts["broken_bytes"] == len(data) // 2 and counts["file_bytes"] == len(data)
    for content in (data[:-100], b"no parquet"):
        (tmp_path / "b.parquet").write_bytes(content)
        (broken,) = records(tmp_path / "b.parquet")
        assert broken.is_file and broken.bytes == len(content)


def test_files_that_are_lost_whole_are_lost_with_their_bytes(tmp_path):
    (tmp_path / "a.xyz").write_bytes(b"four")
    pyarrow.parquet.write_table(pa.table([["a"], ["b"]], names=["text", "text"]), tmp_path / "b.parquet")
    (tmp_path / "c.txt").write_bytes(b"a text")
    for name, options in {"a.xyz": {"include": "*.xyz"}, "b.parquet": {}, "c.txt": {"messages_column": "m"}}.items():
        folder = tmp_path / name.partition(".")[0]
        folder.mkdir()
        size = (tmp_path / name).rename(folder / name).stat().st_size
        source = SourceConfig(path=str(folder), name="a", **({"text_column": "text"} | options))
        (broken,) = iter_records(source, reading_units(source))
        assert isinstance(broken, Broken) and broken.is_file and broken.bytes == size


def test_half_characters_that_json_can_spell_do_not_pass(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "a \\ud83d b \\ud83d\\ude00"}\n')
    assert texts(tmp_path / "a.jsonl") == ["a \ufffd b 😀"]


def test_the_stated_share_decides(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(GOOD * 33 + b"{\n")
    source = SourceConfig(path=str(tmp_path / "a.jsonl"), name="a", text_column="text")
    read_sources([source], tmp_path)
    counts = json.loads((tmp_path / "read.json").read_text())
    assert counts["broken"] == 1 and counts["sources"]["a"]["documents"] == 99
    check_broken(counts, 0.01)
    with pytest.raises(UserError, match=r"a.jsonl: line 100: not JSON .* 1 of 100 records are broken"):
        check_broken(counts, 0.009)


@pytest.mark.parametrize(
    ("entry", "expected"),
    [
        ({"path": "a", "wieght": 2}, "did you mean weight?"),
        ({"path": "a", "weight": "x"}, "weight cannot be 'x'"),
        ({"path": "a", "weight": -1}, "must be between 0 and 100"),
        ({"path": "a", "hub": "b"}, "either path or hub"),
        ({}, "either path or hub"),
        ({"path": "a", "kind": "pdf"}, "kind cannot be 'pdf'"),
        ({"path": "a", "template": "no column"}, "should name columns"),
        ({"path": "a", "template": "{open"}, "expected '}'"),
        ({"path": "a", "template": "{a}", "text_column": "b"}, "either text_column or template"),
        ({"path": "a", "new_document": "("}, "new_document '('"),
        ({"path": "a", "encoding": "utf-99"}, "encoding 'utf-99' is unknown"),
        (5, "expected a path or a mapping"),
        ({"path": "a", "streaming": "yes"}, "streaming cannot be 'yes'"),
    ],
)
def test_mistakes_in_an_entry_are_named(entry, expected):
    _, problems = parse_source(entry, "sources entry 1")
    assert len(problems) == 1 and problems[0].startswith("sources entry 1: ") and expected in problems[0]


def test_files_of_another_kind_are_counted(tmp_path):
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.txt").write_text("one")
    (tmp_path / "texts" / "b.docx").write_bytes(b"\0")
    with tarfile.open(tmp_path / "texts.tar", "w") as archive:
        archive.add(tmp_path / "texts", "texts")
    for name in ("texts", "texts.tar"):
        read_sources([SourceConfig(path=str(tmp_path / name), name=name)], tmp_path)
        counts = json.loads((tmp_path / "read.json").read_text())
        assert counts["skipped"] == {"file of another kind": 1} and counts["sources"][name]["documents"] == 1
    with tarfile.open(tmp_path / "other.tar", "w") as archive:
        archive.add(tmp_path / "texts" / "b.docx", "b.docx")
    read_sources([SourceConfig(path=str(tmp_path / "other.tar"), name="other")], tmp_path)
    with pytest.raises(UserError, match=r"no documents in other \(1 file of another kind\); known kinds are \.txt"):
        check_broken(json.loads((tmp_path / "read.json").read_text()), 0.01)
