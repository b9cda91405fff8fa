"""prepare_data.py when things go wrong: killed, out of disk space, called twice, given unusual input."""

import gzip
import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import environment, error_line, script, small_disk
from growth import growth
from test_prepare_data import TEXTS, prepare

from preparation.stream import TextStream
from utils.cli import UserError
from utils.data.token_dataset import load_manifest, open_split

STAGES = ["read", "clean", "sketch", "select", "tokenizer"]


def start(*arguments: str | Path) -> subprocess.Popen[str]:
    command = [sys.executable, "prepare_data.py", *map(str, arguments)]
    return subprocess.Popen(command, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def hashes(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*")) if path.is_file()
    }  # fmt: skip


@pytest.mark.slow
def test_killed_at_five_moments_the_next_call_goes_on_and_gives_the_same_bytes(tmp_path):
    source = tmp_path / "texts.jsonl"
    source.write_text(
        "".join(json.dumps({"text": f"{text} {copy}"}) + "\n" for copy in range(2) for text in TEXTS[:600])
    )
    options = ["--sources", f"[{source}]", "--tokenizer.vocab_size", "600"]
    reference = tmp_path / "reference"
    reference.mkdir()
    script("prepare_data.py", "--output", reference / "out", *options)
    expected = hashes(reference / "out")
    for stage in STAGES:
        folder = tmp_path / stage
        folder.mkdir()
        process = start("--output", folder / "out", *options)
        assert process.stdout
        for line in process.stdout:  # the stage has ended, the next one is running
            if line.startswith(stage):
                break
        time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert not (folder / "out").exists()
        finished = script("prepare_data.py", "--output", folder / "out", *options).stdout
        assert f"{stage:<12} reused" in finished
        assert hashes(folder / "out") == expected
        assert [path.name for path in (folder / ".out.stages").iterdir() if "partial" in path.name] == []


def test_a_second_call_at_the_same_time_refuses_and_the_first_ends_well(tmp_path):
    options = ["--output", tmp_path / "out", "--tokenizer.vocab_size", "400"]
    first = start(*options)
    assert first.stdout
    first.stdout.readline()  # it is running: the first stage has ended
    first.send_signal(signal.SIGSTOP)
    second = script("prepare_data.py", *options, check=False)
    assert second.returncode == 2 and "another prepare_data.py is writing it" in second.stderr
    first.send_signal(signal.SIGCONT)
    _, errors = first.communicate()
    assert first.returncode == 0, errors
    assert load_manifest(tmp_path / "out")["documents_read"] == len(TEXTS)


@pytest.mark.parametrize("size", ["1M", "3M", "6M"])
def test_a_full_disk_gets_one_line_and_keeps_what_was_there(size, tmp_path):
    """A disk of 1 MB fills while reading, 3 MB while cleaning, 6 MB while sketching."""
    disk = tmp_path / "disk"
    with small_disk(disk, size):
        prepare(disk / "old", "--sources", f"[{write_lines(tmp_path / 'few.jsonl', TEXTS[:60])}]")
        before = hashes(disk / "old")
        line = error_line("prepare_data.py", "--output", disk / "new", "--tokenizer.vocab_size", "400")
        assert "cannot write" in line and "No space left" in line
        assert hashes(disk / "old") == before and not (disk / "new").exists()
        assert not list((disk / ".new.stages").glob(".*partial*"))
    prepare(tmp_path / "new")  # the same call with enough space


def write_lines(path: Path, texts: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def test_damaged_files_among_good_ones_are_named_and_left_out(tmp_path):
    folder = tmp_path / "texts"
    folder.mkdir()
    write_lines(folder / "good.jsonl", TEXTS[:400])
    (folder / "cut.jsonl.gz").write_bytes(
        gzip.compress(write_lines(tmp_path / "a", TEXTS[400:600]).read_bytes())[:-100]
    )
    (folder / "empty.jsonl").write_bytes(b"")
    (folder / "empty.txt").write_bytes(b"")
    (folder / "latin1.txt").write_bytes("schön\n".encode("latin-1"))
    out = prepare(tmp_path / "out", "--sources", f"[{folder}]", "--max_broken_share", "0.9")
    manifest = load_manifest(tmp_path / "out")
    named = {Path(item["file"]).name: item["why"] for item in manifest["read"]["broken_records"]}
    assert named.keys() == {"cut.jsonl.gz", "empty.jsonl", "empty.txt", "latin1.txt"}
    assert "damaged or cut off" in named["cut.jsonl.gz"]
    assert all(f"{folder / name}: {why}" in out for name, why in named.items())
    assert manifest["read"]["lost_files"] == 4 and manifest["read"]["files"] == 5
    for report in ("README.md", "report.html"):
        assert all(name in (tmp_path / "out" / report).read_text() for name in named)
    assert 400 < manifest["documents_read"] <= 601
    strict = error_line("prepare_data.py", "--output", tmp_path / "no", "--sources", f"[{folder}]")
    assert "4 of 5 files are lost" in strict and not (tmp_path / "no").exists()


def test_what_a_folder_holds_besides_text_is_read_or_named(tmp_path):
    """Linked folders, links to nothing, names that are not UTF-8, files of macOS, excluded files, a file of no use."""
    folder, elsewhere = tmp_path / "texts", tmp_path / "elsewhere"
    (folder / "deep").mkdir(parents=True)
    elsewhere.mkdir()
    write_lines(folder / "good.jsonl", TEXTS[:300])
    write_lines(elsewhere / "linked.jsonl", TEXTS[300:400])
    (folder / "linked").symlink_to(elsewhere)
    (folder / "deep" / "round").symlink_to(folder)  # a loop
    (folder / "gone.jsonl").symlink_to(tmp_path / "nothing")
    (folder / "annexed.jsonl").symlink_to("../.git/annex/objects/a/b/SHA256E-s5--0.jsonl")
    (folder / "gone.png").symlink_to(tmp_path / "nothing")
    (folder / "._good.jsonl").write_bytes(b"\0\5\x16\7\0\2\0\0Mac OS X")
    (folder / "picture.png").write_bytes(b"\0" * 99)
    (folder / "package.json").write_text('{"name": "x"}')
    name = os.fsdecode(b"sch\xf6n.txt")
    (folder / name).write_text(TEXTS[500])
    entry = json.dumps([{"path": str(folder), "exclude": ["*package.json", "deep/*.md"]}])
    line = error_line("prepare_data.py", "--output", tmp_path / "out", "--sources", entry)
    assert "annexed.jsonl: a git-annex link" in line and "2 of 5 files are lost" in line
    prepare(tmp_path / "out", "--sources", entry, "--max_broken_share", "0.5")
    manifest = load_manifest(tmp_path / "out")
    assert manifest["documents_read"] == 401 and len(manifest["files"]) == 3
    assert {Path(item["file"]).name: item["why"] for item in manifest["read"]["broken_records"]} == {
        "annexed.jsonl": "a git-annex link without its file; `git annex get` brings it",
        "gone.jsonl": "a link to a missing file",
    }
    assert {Path(item["file"]).name: item["why"].partition(" (")[0] for item in manifest["read"]["skipped_files"]} == {
        "._good.jsonl": "AppleDouble file", "gone.png": "file of another kind", "package.json": "excluded",
        "picture.png": "file of another kind", "round": "a link to a folder that is read already",
    }  # fmt: skip
    assert manifest["read"]["skipped_bytes"]["file of another kind"] == 99
    for report in ("README.md", "report.html"):
        page = (tmp_path / "out" / report).read_text(encoding="utf-8")
        assert all(text in page for text in ("sch?n.txt", "picture.png", "gone.jsonl", "AppleDouble file", "git-annex"))
    assert "up to date" in prepare(tmp_path / "out", "--sources", entry, "--max_broken_share", "0.5")
    both = json.dumps([str(folder), str(elsewhere)])
    line = error_line("prepare_data.py", "--output", tmp_path / "two", "--sources", both)
    assert "linked.jsonl: belongs to two sources" in line and "`exclude:`" in line


def test_a_source_with_too_many_broken_records_ends_a_stream(tmp_path):
    path = write_lines(tmp_path / "a.jsonl", TEXTS)
    prepare(tmp_path / "stream", "--sources", f"[{path}]", "--stream", "true", "--stream_head_documents", "200")
    options = load_manifest(tmp_path / "stream")["options"]
    with path.open("a") as file:
        file.write("{not JSON\n" * 100)  # beyond the head
    stream = TextStream(options, tmp_path / "stream", num_lanes=1, seed=0)
    with pytest.raises(UserError, match=r"a.jsonl, line .* records .* more than max_broken_share 0.01"):
        for _, _ in zip(range(2 * len(TEXTS)), stream.documents(0, None), strict=False):
            pass
    shards = tmp_path / "shards"
    shards.mkdir()
    for number in range(4):
        write_lines(shards / f"{number}.jsonl", TEXTS[100 * number : 100 * number + 100])
    prepare(tmp_path / "two", "--sources", f"[{shards}]", "--stream", "true", "--stream_head_documents", "50")
    pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\nsize 5000\n"
    (shards / "3.jsonl").write_text(pointer)
    stream = TextStream(load_manifest(tmp_path / "two")["options"], tmp_path / "two", num_lanes=1, seed=0)
    with pytest.raises(UserError, match=r"3.jsonl, a Git LFS pointer .* 1 of about 4 files are broken"):
        for _, _ in zip(range(1000), stream.documents(0, None), strict=False):
            pass


def test_a_document_of_one_very_long_line_goes_through(tmp_path):
    """Without spaces or line ends: no step may take quadratic time."""

    def prepare_lines(length: int) -> None:
        source = write_lines(tmp_path / f"{length}.jsonl", [*TEXTS[:60], "x" * length, "ab" * (length // 3)])
        prepare(tmp_path / f"out-{length}", "--sources", f"[{source}]")
        assert load_manifest(tmp_path / f"out-{length}")["documents_read"] == 62

    assert growth(prepare_lines, 400_000, tries=1) < 9


@pytest.mark.slow
def test_hundreds_of_thousands_of_documents_of_one_word(tmp_path):
    with (tmp_path / "a.jsonl").open("w") as file:
        for number in range(300_000):
            file.write(f'{{"text": "w{number % 270_000}"}}\n')
    prepare(tmp_path / "out", "--sources", f"[{tmp_path / 'a.jsonl'}]")
    manifest = load_manifest(tmp_path / "out")
    assert manifest["dropped"] == {"exact duplicate": 30_000}
    assert sum(split["documents"] for split in manifest["splits"].values()) == 270_000
    assert len(open_split(tmp_path / "out", "train").offsets) - 1 == manifest["splits"]["train"]["documents"]


def test_a_changed_option_redoes_its_stage_and_those_after_it(tmp_path):
    source = write_lines(tmp_path / "a.jsonl", TEXTS[:300])

    lines: list[str] = []

    def call(*options: str) -> dict[str, bool]:
        lines[:] = prepare(tmp_path / "out", "--sources", f"[{source}]", *options).splitlines()
        return {stage: any(line == f"{stage:<12} reused" for line in lines) for stage in STAGES}

    assert not any(call().values())
    first = hashes(tmp_path / "out")
    assert list(call("--cleaning.steps", "[standard, mask_personal_data]").values()) == [
        True,
        False,
        False,
        False,
        False,
    ]
    call()
    assert list(call("--deduplication.near_threshold", "0.9").values()) == [True, True, True, False, False]
    assert not any("GGUF" in line for line in lines)
    assert list(call("--tokenizer.algorithm", "unigram").values()) == [True, True, True, False, False]
    assert sum("GGUF" in line for line in lines) == 1
    assert list(call("--validation_fraction", "0.2").values()) == [True, True, True, False, False]
    call()
    assert hashes(tmp_path / "out") == first  # back to the first recipe: the same bytes


def test_size_and_time_stand_in_for_the_content_unless_hashes_are_asked_for(tmp_path):
    source = write_lines(tmp_path / "a.jsonl", TEXTS[:100])
    options = ["--sources", f"[{source}]"]
    prepare(tmp_path / "out", *options)
    stat = source.stat()
    source.write_text(source.read_text().replace("the", "teh"))
    os.utime(source, ns=(stat.st_atime_ns, stat.st_mtime_ns))  # a change that size and time do not show
    first = load_manifest(tmp_path / "out")
    assert "nothing to do" in prepare(tmp_path / "out", *options)
    assert "wrote" in prepare(tmp_path / "out", *options, "--check_hashes", "true")
    os.utime(source)  # another time but the same content: hashed again and found unchanged
    assert "nothing to do" in prepare(tmp_path / "out", *options)
    assert load_manifest(tmp_path / "out")["key"] != first["key"]


def test_standard_input_is_a_source(tmp_path):
    arguments = [sys.executable, "prepare_data.py", "--output", str(tmp_path / "out"), "--tokenizer.vocab_size", "400",
                 "--sources", "[{path: '-', kind: json, name: pipe}]"]  # fmt: skip
    data = "".join(json.dumps({"text": text}) + "\n" for text in TEXTS[:100])
    for expected in ("wrote", "nothing to do"):
        done = subprocess.run(arguments, env=environment(), input=data, capture_output=True, text=True)
        assert done.returncode == 0 and expected in done.stdout, done.stderr
    assert load_manifest(tmp_path / "out")["splits"]["train"]["sources"].keys() == {"pipe"}


def test_only_a_dataset_folder_is_replaced(tmp_path):
    source = write_lines(tmp_path / "a.jsonl", TEXTS[:60])
    for content in ('{"model.safetensors": {"bytes": 1}}', "[]", "{"):
        folder = tmp_path / "checkpoint"
        folder.mkdir(exist_ok=True)
        (folder / "manifest.json").write_text(content)
        (folder / "model.safetensors").write_text("precious")
        line = error_line("prepare_data.py", "--output", folder, "--sources", f"[{source}]")
        assert "is not a dataset folder" in line and (folder / "model.safetensors").read_text() == "precious"


def test_the_output_may_not_lie_in_a_source(tmp_path):
    (tmp_path / "texts").mkdir()
    write_lines(tmp_path / "texts" / "a.jsonl", TEXTS[:60])
    for output in (tmp_path / "texts" / "out", tmp_path / "texts", tmp_path):
        line = error_line("prepare_data.py", "--output", output, "--sources", f"[{tmp_path / 'texts'}]")
        assert "overlap" in line


def test_a_call_that_was_killed_between_the_two_renames_leaves_the_old_dataset(tmp_path):
    source = write_lines(tmp_path / "a.jsonl", TEXTS[:60])
    prepare(tmp_path / "out", "--sources", f"[{source}]")
    expected = hashes(tmp_path / "out")
    (tmp_path / "out").rename(tmp_path / ".out.stages" / ".old")
    assert "nothing to do" in prepare(tmp_path / "out", "--sources", f"[{source}]")
    assert hashes(tmp_path / "out") == expected


def test_evaluation_files_are_read_whole_or_not_at_all(tmp_path):
    source = write_lines(tmp_path / "a.jsonl", TEXTS[:200])
    held = [text for text in TEXTS[:200] if len(text.split()) > 30][:20]
    evaluation = tmp_path / "test.jsonl"
    evaluation.write_text("".join(json.dumps({"body": text}) + "\n" for text in held))
    options = ["--sources", json.dumps([{"path": str(source), "text_column": "text"}]),
               "--deduplication.evaluation_files", f"[{evaluation}]"]  # fmt: skip
    line = error_line("prepare_data.py", "--output", tmp_path / "out", *options)
    assert "evaluation file" in line and "no column 'text'" in line
    prepare(tmp_path / "out", *options, "--text_column", "body")
    assert load_manifest(tmp_path / "out")["dropped"]["holds evaluation text"] >= 15


def test_a_folder_read_as_a_hub_dataset_is_another_source(tmp_path):
    hub = tmp_path / "hub" / "data"
    hub.mkdir(parents=True)
    write_lines(hub / "train-00000.jsonl", TEXTS[:100])
    write_lines(hub / "test-00000.jsonl", TEXTS[100:200])
    prepare(tmp_path / "out", "--sources", json.dumps([{"path": str(hub.parent)}]))
    assert load_manifest(tmp_path / "out")["documents_read"] == 200
    prepare(tmp_path / "out", "--sources", json.dumps([{"hub": str(hub.parent)}]))
    assert load_manifest(tmp_path / "out")["documents_read"] == 100


def test_a_stream_notices_a_changed_source(tmp_path):
    source = write_lines(tmp_path / "a.jsonl", TEXTS[:200])
    options = ["--sources", f"[{source}]", "--stream", "true"]
    prepare(tmp_path / "out", *options)
    assert "nothing to do" in prepare(tmp_path / "out", *options)
    source.write_text(source.read_text().replace("the", "teh"))  # of the same size
    assert "wrote" in prepare(tmp_path / "out", *options)
    refused = error_line("prepare_data.py", "--output", tmp_path / "no", "--stream", "true", "--sources", "['-']")
    assert "standard input cannot be read again" in refused


@pytest.mark.slow
def test_workers_end_with_a_killed_parent_and_do_not_touch_the_next_call(tmp_path):
    source = write_lines(tmp_path / "a.jsonl", [f"{text} {copy}" for copy in range(10) for text in TEXTS])
    options = ["--sources", f"[{source}]", "--tokenizer.vocab_size", "1000", "--deduplication.near_threshold", "null"]
    process = start("--output", tmp_path / "out", *options, "--num_proc", "2")
    assert process.stdout
    process.stdout.readline()
    time.sleep(1.5)
    process.send_signal(signal.SIGKILL)
    process.wait()
    masked = [*options, "--cleaning.steps", "[standard, mask_personal_data]"]
    script("prepare_data.py", "--output", tmp_path / "out", *masked)
    script("prepare_data.py", "--output", tmp_path / "reference" / "out", *masked)
    assert hashes(tmp_path / "out") == hashes(tmp_path / "reference" / "out")
