"""Pictures and sounds in prepare_data.py: what is read, where it stands among the tokens, what is refused."""

import csv
import io
import json
import struct
import time
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
import soundfile
import yaml
from conftest import ROOT, call, error_line
from PIL import Image
from transformers import AutoTokenizer

from preparation.recipe import SourceConfig
from preparation.sources import media
from preparation.sources.documents import Broken, document_features, iter_records, read_sources
from preparation.stages import load_slices
from preparation.tokenizer.build import train_tokenizer
from preparation.tokenizer.encoding import ConversationEncoder, build_encoder
from utils.cli import UserError
from utils.data.token_dataset import load_manifest, open_split

MARK = "<image>"
QUIET = ["--tokenizer.vocab_size", "300", "--validation_fraction", "0.5", "--max_broken_share", "1"]


def picture(number: int, mode: str = "RGB", kind: str = "PNG", **options: Any) -> bytes:
    """A picture of 8 × 6 pixels like no other `number`."""
    values = np.random.default_rng(number).integers(0, 256, (6, 8, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(values).convert(mode).save(file, kind, **options)
    return file.getvalue()


def sound(number: int, seconds: float = 0.1, rate: int = 16_000, channels: int = 1, kind: str = "WAV") -> bytes:
    values = np.random.default_rng(number).uniform(-0.5, 0.5, (round(seconds * rate), channels))
    file = io.BytesIO()
    soundfile.write(file, values, rate, format=kind)
    return file.getvalue()


def bomb() -> bytes:
    """A PNG whose head says 30,000 × 30,000 pixels."""
    data = bytearray(picture(0))
    data[16:24] = struct.pack(">II", 30_000, 30_000)
    data[29:33] = struct.pack(">I", zlib.crc32(bytes(data[12:29])))
    return bytes(data)


def write_records(path: Path, records: Iterable[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def prepare(output: Path, *entries: dict[str, Any], **options: Any) -> str:
    given = [text for name, value in options.items() for text in (f"--{name.replace('__', '.')}", str(value))]
    code, out, err = call("prepare_data.py", "--output", output, "--sources", json.dumps(entries), *QUIET, *given)
    assert code == 0, err
    return out


def stored(folder: Path, split: str) -> list[tuple[list[str], list[bytes]]]:
    """The tokens and the media of each document."""
    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
    tokens, files = open_split(folder, split), datasets.load_from_disk(str(folder / f"{split}_media"))
    assert len(files) == len(tokens.offsets) - 1
    spans = zip(tokens.offsets[:-1].tolist(), tokens.offsets[1:].tolist(), strict=True)
    ids = [tokens.read(start, stop).tolist() for start, stop in spans]
    return [(tokenizer.convert_ids_to_tokens(row), item["media"]) for row, item in zip(ids, files, strict=True)]


def both(folder: Path) -> list[tuple[list[str], list[bytes]]]:
    return stored(folder, "train") + stored(folder, "validation")


def text_of(tokens: list[str]) -> str:
    return "".join(tokens).replace("Ġ", " ")


def grey_of_16_bits() -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.arange(48, dtype=np.uint16).reshape(6, 8) * 1000).save(file, "PNG")
    return file.getvalue()


BAD_PICTURES = {
    "cut.png": (picture(1)[:-30], "damaged picture"),
    "bomb.png": (bomb(), "30,000 × 30,000 pixels"),
    "text.png": (b"this is no picture", "format is unknown"),
    "flipped.png": (bytes(byte ^ 255 if place == 60 else byte for place, byte in enumerate(picture(2))), "damaged"),
    "drawing.eps": (picture(3, kind="EPS"), "format is unknown"),  # Pillow would run another program for it
    "x-ray.png": (grey_of_16_bits(), "8 bits"),  # as RGB, all but the lowest 256 levels are white
    "missing.png": (None, "no such file"),
    "folder": (None, "no such file"),
    "../outside.png": (picture(4), "not in the folder"),
    "link.png": (None, "not in the folder"),
}
GOOD_PICTURES = {
    "cmyk.jpg": picture(11, "CMYK", "JPEG"),
    "palette.png": picture(12, "P"),
    "grey.png": picture(13, "L"),
    "transparent.webp": picture(14, "RGBA", "WEBP"),
    "moving.gif": picture(15, kind="GIF", save_all=True, append_images=[Image.new("RGB", (8, 6), "red")]),
}
BAD_SOUNDS = {
    "text.wav": (b"this is no sound", "no sound"),
    "nothing.wav": (sound(1, 0), "zero seconds"),
    "cut.wav": (sound(2)[:1000], "damaged sound"),
    "cut.flac": (sound(3, kind="FLAC")[:1000], "no sound that can be read"),
    "long.flac": (sound(4, 31, 1000, kind="FLAC"), "31.0 seconds"),
    "missing.wav": (None, "no such file"),
    "../outside.wav": (sound(5), "not in the folder"),
}
GOOD_SOUNDS = {
    "mono.wav": sound(11),
    "stereo.flac": sound(12, channels=2, kind="FLAC"),
    "8.ogg": sound(13, rate=8000, kind="OGG"),
    "48.mp3": sound(14, rate=48_000, kind="MP3"),
}


@pytest.mark.parametrize(
    ("column", "bad", "good"),
    [("image_column", BAD_PICTURES, GOOD_PICTURES), ("audio_column", BAD_SOUNDS, GOOD_SOUNDS)],
)
def test_files_that_cannot_be_used_are_named_and_the_others_stay_as_they_are(tmp_path, column, bad, good):
    folder = tmp_path / "media"
    names = [*bad, *good]
    path = write_records(folder / "metadata.jsonl", ({"file_name": name, "text": f"this is {name}"} for name in names))
    for name, data in (good | {name: data for name, (data, _) in bad.items()}).items():
        if data is not None:
            (folder / name).write_bytes(data)
    if "link.png" in bad:
        (folder / "link.png").symlink_to(tmp_path / "outside.png")
        (folder / "folder").mkdir()
    prepare(tmp_path / "out", {"path": str(path), column: "file_name"})
    manifest = load_manifest(tmp_path / "out")
    broken = {record["why"]: record for record in manifest["read"]["broken_records"]}
    assert len(broken) == len(bad) == manifest["read"]["broken"]
    for number, (name, (data, reason)) in enumerate(bad.items(), start=1):
        (why,) = (why for why in broken if why.startswith(f"line {number}:"))
        assert name in why and reason in why and broken[why]["file"] == str(path)
        if data is not None and "not in the folder" not in reason:
            assert broken[why]["bytes"] == len(data)
    assert sorted(files for _, files in both(tmp_path / "out")) == sorted([data] for data in good.values())
    figures = manifest["read"]["sources"]["metadata"]
    assert (figures["media"], figures["media_bytes"]) == (len(good), sum(map(len, good.values())))
    assert figures.get("pixels", 48 * len(good)) == 48 * len(good)
    assert 390 <= figures.get("milliseconds", 400) <= 500  # MP3 pads


def test_a_folder_of_pictures_or_sounds_with_its_metadata(tmp_path):
    """As `imagefolder` and `audiofolder` are laid out: paths relative to the folder of each metadata file."""
    for part in ("one", "two"):
        folder = tmp_path / "pictures" / part
        (folder / "deep").mkdir(parents=True)
        with (folder / "metadata.csv").open("w", newline="") as file:
            rows = csv.writer(file)
            rows.writerow(["file_name", "text"])
            for number in range(5):
                (folder / "deep" / f"{number}.png").write_bytes(picture(len(part + str(number)) + 10 * number))
                rows.writerow([f"deep/{number}.png", f"{part} has the number {number}"])
    (tmp_path / "pictures" / "unused.png").write_bytes(picture(99))
    prepare(tmp_path / "out", {"path": str(tmp_path / "pictures"), "image_column": "file_name"})
    manifest = load_manifest(tmp_path / "out")
    assert manifest["read"]["skipped"] == {"file of another kind": 1}  # the unused one
    found = {text_of(tokens): files for tokens, files in both(tmp_path / "out")}
    assert len(found) == 10
    for part in ("one", "two"):
        for number in range(5):
            expected = [(tmp_path / "pictures" / part / "deep" / f"{number}.png").read_bytes()]
            assert found[f"<|endoftext|>{MARK}{part} has the number {number}<|endoftext|>"] == expected


def test_a_changed_picture_means_a_new_output_and_an_equal_one_none(tmp_path):
    folder, out = tmp_path / "in", tmp_path / "out"
    path = write_records(folder / "a.jsonl", ({"image": f"{n}.png", "text": f"number {n}"} for n in range(9)))
    for number in range(9):
        (folder / f"{number}.png").write_bytes(picture(number))
    entry = {"path": str(path), "image_column": "image"}
    prepare(out, entry)
    key = load_manifest(out)["key"]
    assert "nothing to do" in prepare(out, entry)
    assert "read         reused" in prepare(out, entry, tokenizer__vocab_size=310)
    prepare(out, entry)
    assert load_manifest(out)["key"] == key
    (folder / "3.png").write_bytes(picture(33))
    assert "reused" not in prepare(out, entry)
    assert load_manifest(out)["key"] != key
    assert [picture(33)] in [files for _, files in both(out)]
    (folder / "3.png").unlink()
    assert "line 4" in prepare(out, entry)
    (folder / "3.png").write_bytes(picture(3))
    prepare(out, entry)
    assert load_manifest(out)["key"] == key


def test_placeholders_stand_where_the_pictures_do(tmp_path):
    """Several pictures, marks in the text, none, text alone; in a source without pictures the mark is text."""
    forms = [
        (2, f"first {MARK} then {MARK} end"), (1, f"only {MARK}"), (1, "no mark"), (2, "no mark, two"), (0, "no picture"),
    ]  # fmt: skip
    rows, bad = [], [(1, f"{MARK}{MARK} too many"), (2, f"{MARK} too few"), (0, f"{MARK} of nothing")]
    for number, (count, text) in enumerate([*forms * 6, *bad]):
        pictures = [{"bytes": picture(100 * number + part), "path": None} for part in range(count)]
        rows.append({"images": pictures or None, "text": f"{number}: {text}"})
    kind = pa.list_(pa.struct([("bytes", pa.binary()), ("path", pa.string())]))
    schema = pa.schema([("images", kind), ("text", pa.string())])
    pyarrow.parquet.write_table(pa.Table.from_pylist(rows, schema), tmp_path / "a.parquet")
    texts = write_records(tmp_path / "b.jsonl", ({"text": f"{n} plain {MARK} text"} for n in range(8)))
    out, entry = tmp_path / "out", {"path": str(tmp_path / "a.parquet"), "image_column": "images"}
    prepare(out, entry, {"path": str(texts)})
    manifest = load_manifest(out)
    assert manifest["media"] == {"kind": "image", "placeholder": MARK}
    assert manifest["read"]["broken"] == 3 and manifest["tokenizer"]["spelled_out"] == {MARK: 8}
    found = both(out)
    for tokens, files in found:
        assert tokens.count(MARK) == len(files)
    spelled = {text_of(tokens): files for tokens, files in found}
    for number, (count, text) in enumerate(forms * 6):
        text = f"{number}: {text}" if MARK in text else MARK * count + f"{number}: {text}"
        expected = [picture(100 * number + part) for part in range(count)]
        assert spelled.pop(f"<|endoftext|>{text}<|endoftext|>") == expected
    assert len(spelled) == 8 and all("plain <image> text" in text for text in spelled)
    assert sum(figures["media_files"] for figures in manifest["splits"].values()) == 36
    assert MARK in AutoTokenizer.from_pretrained(out / "tokenizer").all_special_tokens


def test_a_tokenizer_without_a_token_for_pictures_gets_one(tmp_path):
    tokenizer = train_tokenizer([["number one two"]], vocab_size=300)
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    rows = [{"image": picture(number), "text": f"number {number}"} for number in range(8)]
    pyarrow.parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    prepare(tmp_path / "out", {"path": str(tmp_path / "a.parquet"), "image_column": "image"},
            tokenizer__pretrained=tmp_path / "tokenizer")  # fmt: skip
    for tokens, files in both(tmp_path / "out"):
        assert tokens[:2] == ["<|endoftext|>", MARK] and len(files) == 1
    assert len(AutoTokenizer.from_pretrained(tmp_path / "out" / "tokenizer")) == len(tokenizer) + 1


@pytest.mark.parametrize("algorithm", ["bpe", "unigram", "wordpiece"])
def test_every_tokenizer_writes_one_token_for_a_picture(algorithm):
    texts = [f"a picture {MARK} of {number}" for number in range(30)]
    plain = [text.replace(MARK, "") for text in texts]
    tokenizer = train_tokenizer([plain], algorithm=algorithm, vocab_size=300, special_tokens=[MARK])
    placeholder = tokenizer.convert_tokens_to_ids(MARK)
    encoder = build_encoder(tokenizer, plain, placeholder=MARK)
    batch = pa.table({"text": [*texts, "none", texts[0]], "id": ["a"] * 32, "pictures": [1] * 30 + [2, 0]})
    found = encoder.encode_table(batch)
    counts = [ids.count(placeholder) for ids in found["input_ids"].to_pylist()]
    assert counts == [1] * 30 + [2, 0]
    assert found["spelled"].to_pylist() == [[]] * 31 + [[MARK]]


def test_special_tokens_that_are_parsed_must_not_stand_for_pictures(tmp_path):
    path = write_records(tmp_path / "b.jsonl", ({"text": f"{n} plain {MARK} text"} for n in range(8)))
    rows = [{"image": picture(number), "text": f"number {number}"} for number in range(8)]
    pyarrow.parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    entries = json.dumps([{"path": str(tmp_path / "a.parquet"), "image_column": "image"}, {"path": str(path)}])
    line = error_line("prepare_data.py", "--output", tmp_path / "out", "--sources", entries, *QUIET,
                      "--tokenizer.parse_special_tokens", "true")  # fmt: skip
    assert "0 pictures" in line and "b.jsonl" in line
    assert not (tmp_path / "out").exists()


def test_tables_of_datasets(tmp_path):
    """Folders that `datasets` saved, and its own features for pictures and sounds: their bytes come undecoded."""
    pictures = [{"bytes": picture(number), "path": f"{number}.png"} for number in range(9)]
    texts = [f"number {number}" for number in range(9)]
    features = datasets.Features(image=datasets.Image(), other=datasets.Image(), text=datasets.Value("string"))
    other = [{"bytes": b"no picture", "path": None}] * 9
    table = datasets.Dataset.from_dict({"image": pictures, "other": other, "text": texts}, features)
    table.save_to_disk(tmp_path / "saved")
    prepare(tmp_path / "one", {"path": str(tmp_path / "saved"), "image_column": "image"})
    table.to_parquet(tmp_path / "hub" / "train.parquet")
    prepare(tmp_path / "two", {"hub": str(tmp_path / "hub"), "image_column": "image"})
    for out in ("one", "two"):
        expected = {f"<|endoftext|>{MARK}number {number}<|endoftext|>": [picture(number)] for number in range(9)}
        assert {text_of(tokens): files for tokens, files in both(tmp_path / out)} == expected
    lists = datasets.Features(image=datasets.List(datasets.Image()), text=datasets.Value("string"))
    table = datasets.Dataset.from_dict({"image": [[item, item] for item in pictures], "text": texts}, lists)
    table.save_to_disk(tmp_path / "lists")
    prepare(tmp_path / "three", {"path": str(tmp_path / "lists"), "image_column": "image"})
    assert sorted(files for _, files in both(tmp_path / "three")) == sorted([picture(n)] * 2 for n in range(9))
    sounds = datasets.Features(audio=datasets.Audio(), text=datasets.Value("string"))
    values = [{"bytes": sound(number), "path": None} for number in range(9)]
    datasets.Dataset.from_dict({"audio": values, "text": texts}).cast(sounds).save_to_disk(tmp_path / "sounds")
    prepare(tmp_path / "four", {"path": str(tmp_path / "sounds"), "audio_column": "audio"})
    manifest = load_manifest(tmp_path / "four")
    assert manifest["media"] == {"kind": "audio"} and manifest["read"]["sources"]["sounds"]["milliseconds"] == 900
    assert sorted(files for _, files in both(tmp_path / "four")) == sorted([sound(number)] for number in range(9))


def test_duplicates_are_equal_in_text_and_picture_and_a_picture_has_one_split(tmp_path):
    words = "one two three four five six seven eight nine ten eleven twelve thirteen fourteen".split()  # noqa: SIM905
    same = " ".join(words)
    rows = [{"image": picture(number % 40), "text": f"{same} {number // 40}"} for number in range(120)]
    rows += [{"image": picture(0), "text": f"{same} 0"}, {"image": picture(200), "text": f"{same} 0"}]
    pyarrow.parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    prepare(tmp_path / "out", {"path": str(tmp_path / "a.parquet"), "image_column": "image"})
    # Their texts are near duplicates, and hold each other's 13-grams.
    assert load_manifest(tmp_path / "out")["dropped"] == {"exact duplicate": 1}
    splits = {split: [files[0] for _, files in stored(tmp_path / "out", split)] for split in ("train", "validation")}
    assert not set(splits["train"]) & set(splits["validation"])
    assert len(splits["train"]) + len(splits["validation"]) == 121


def test_a_group_is_in_one_split(tmp_path):
    records = [{"text": f"document {number} about {number % 20}", "topic": number % 20} for number in range(200)]
    records += [{"text": f"document {number} about nothing", "topic": None} for number in range(100)]
    path = write_records(tmp_path / "a.jsonl", records)
    with_group = {"path": str(path), "group_column": "topic"}
    prepare(tmp_path / "out", with_group, deduplication__near_threshold="null")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out" / "tokenizer")
    topics: dict[str, set[str]] = {}
    for split in ("train", "validation"):
        tokens = open_split(tmp_path / "out", split)
        for start, stop in zip(tokens.offsets[:-1].tolist(), tokens.offsets[1:].tolist(), strict=True):
            text = tokenizer.decode(tokens.read(start, stop), skip_special_tokens=True)
            topics.setdefault(text.rpartition(" ")[2], set()).add(split)
    assert topics.pop("nothing") == {"train", "validation"}
    assert len(topics) == 20 and {len(splits) for splits in topics.values()} == {1}
    assert {split for splits in topics.values() for split in splits} == {"train", "validation"}


def test_a_group_may_be_missing_or_half_a_character(tmp_path):
    """An empty cell of a CSV file says no group, so such documents need not stay together."""
    path = tmp_path / "a.csv"
    path.write_text("text,topic\n" + "".join(f"document {number} of none,\n" for number in range(40)), encoding="utf-8")
    records = ({"text": f"a second {number}", "topic": "\ud83d"} for number in range(9))
    other = write_records(tmp_path / "b.jsonl", records)
    entries = ({"path": str(file), "group_column": "topic"} for file in (path, other))
    prepare(tmp_path / "out", *entries, deduplication__near_threshold="null")
    splits = load_manifest(tmp_path / "out")["splits"]
    assert splits["train"]["sources"]["a"]["documents"] and splits["validation"]["sources"]["a"]["documents"]
    assert sorted(splits[split]["sources"]["b"]["documents"] for split in splits) == [0, 9]


def test_a_lost_picture_of_a_saved_dataset_is_compared_with_the_pictures(tmp_path):
    """Its record is a small share of the records, and its bytes of the bytes; beside the texts alone they are most."""
    pictures = [{"bytes": picture(number)[: -30 if number == 7 else None], "path": None} for number in range(40)]
    features = datasets.Features(image=datasets.Image(), text=datasets.Value("string"))
    values = {"image": pictures, "text": [f"number {number}" for number in range(40)]}
    datasets.Dataset.from_dict(values, features).save_to_disk(tmp_path / "saved")
    prepare(tmp_path / "out", {"path": str(tmp_path / "saved"), "image_column": "image"}, max_broken_share=0.03)
    assert load_manifest(tmp_path / "out")["read"]["broken"] == 1


def test_pictures_that_records_name_are_not_left_out(tmp_path, monkeypatch):
    path = write_records(
        tmp_path / "in" / "a.jsonl", ({"image": f"./{n}.png", "text": f"number {n}"} for n in range(9))
    )
    for number in range(9):
        path.with_name(f"{number}.png").write_bytes(picture(number))
    monkeypatch.chdir(path.parent)
    prepare(tmp_path / "out", {"path": ".", "image_column": "image"})
    assert load_manifest(tmp_path / "out")["read"]["skipped"] == {}


def test_cleaning_that_removes_a_mark_drops_the_document(tmp_path):
    rows = [{"image": picture(number), "text": f"{MARK} Number {number}." if number % 2 else f"Number {number}."}
            for number in range(20)]  # fmt: skip
    rows += [{"image": picture(50), "text": MARK}]  # nothing to learn
    pyarrow.parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    entry = {"path": str(tmp_path / "a.parquet"), "image_column": "image"}
    prepare(tmp_path / "out", entry, cleaning__steps="[basic]")
    assert load_manifest(tmp_path / "out")["dropped"] == {"cleaning removed the mark of a picture": 11}
    prepare(tmp_path / "out", entry)
    assert load_manifest(tmp_path / "out")["dropped"] == {"empty after cleaning": 1}


PARTS = (
    "{% for item in messages %}<|im_start|>{{ item.role }}\n{% for part in item.content %}"
    "{% if part.type == 'image' %}<|pad_picture|>{% else %}{{ part.text }}{% endif %}{% endfor %}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)  # fmt: skip
MARKED = (ROOT / "configs" / "chat_template.jinja").read_text(encoding="utf-8")


@pytest.mark.parametrize("template", [PARTS, MARKED], ids=["parts", "text"])
def test_conversations_with_pictures(tmp_path, template):
    """Parts of a content and marks in it; the ids are those that the template gives, one placeholder per picture."""
    special = ["<|im_start|>", "<|im_end|>", "<|pad_picture|>"]
    tokenizer = train_tokenizer([["user assistant What is this? A number."]], vocab_size=300, special_tokens=special,
                                chat_template=template)  # fmt: skip
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    path = tmp_path / "tokenizer" / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"image_token": "<|pad_picture|>"}))
    part: list[dict[str, Any]] = [{"type": "image"}, {"type": "text", "text": "What is this?"}]
    forms = [(part, 1), (f"Is {MARK} like {MARK}?", 2), ("What is this?", 1), ("Without <|im_end|> a picture?", 0)]
    rows = []
    for number in range(24):
        content, count = forms[number % 4]
        messages = [{"role": "user", "content": content}, {"role": "assistant", "content": f"Number {number}."}]
        names = [f"{number}-{place}.png" for place in range(count)]
        for name in names:
            (tmp_path / name).write_bytes(picture(zlib.crc32(name.encode())))
        rows.append({"messages": messages, "images": names})
    path = write_records(tmp_path / "talk.jsonl", rows)
    entry = {"path": str(path), "messages_column": "messages", "image_column": "images"}
    prepare(tmp_path / "out", entry, tokenizer__pretrained=tmp_path / "tokenizer", deduplication__near_threshold="null")
    assert load_manifest(tmp_path / "out")["media"]["placeholder"] == "<|pad_picture|>"
    found, seen = both(tmp_path / "out"), 0
    for tokens, files in found:
        text = text_of(tokens)
        number = int(text.partition("Number")[2].strip(" .").partition(".")[0])
        assert tokens.count("<|pad_picture|>") == len(files) == forms[number % 4][1]
        token = "<|pad_picture|>"
        said = ["{0}What is this?", "Is {0} like {0}?", "{0}What is this?", "Without <|im_end|> a picture?"][number % 4]
        assert f"<|im_start|>userĊ{said.format(token)}<|im_end|>" in text
        seen += 1
    assert seen == 24
    masks = [open_split(tmp_path / "out", split).loss_mask for split in ("train", "validation")]
    per_turn = len(tokenizer("Number 10.", add_special_tokens=False)["input_ids"])
    assert all(mask is not None for mask in masks)
    assert abs(sum(mask.total for mask in masks) - 24 * (per_turn + 1)) <= 24


def test_a_part_that_is_no_picture_is_refused(tmp_path):
    part = [{"type": "video"}, {"type": "text", "text": "What?"}]
    row = {"messages": [{"role": "user", "content": part}, {"role": "assistant", "content": "A."}], "images": []}
    path = write_records(tmp_path / "a.jsonl", [row])
    source = SourceConfig(path=str(path), name="a", messages_column="messages", image_column="images")
    (record,) = iter_records(source, [path])
    assert isinstance(record, Broken) and "'video'" in record.why


def test_a_template_that_writes_no_placeholder_is_refused(tmp_path):
    tokenizer = train_tokenizer(
        [["a"]], vocab_size=300, special_tokens=[MARK], chat_template="{{ messages[1].content }}"
    )
    encoder = ConversationEncoder(tokenizer, placeholder=MARK)
    batch = pa.table({"text": [f"\x1euser\n{MARK}\x1eassistant\nYes."], "id": ["a:1"], "pictures": [1]})
    with pytest.raises(UserError, match="a:1"):
        encoder.encode_table(batch)


@pytest.mark.parametrize(
    ("sources", "option", "word"),
    [
        ([{"path": "a.jsonl", "image_column": "i"}, {"path": "b.jsonl", "audio_column": "a"}], [], "not both"),
        ([{"path": "a.jsonl", "image_column": "i", "audio_column": "a"}], [], "either image_column or audio_column"),
        ([{"path": "a.jsonl", "audio_column": "i"}, {"path": "b.jsonl"}], [], "b has no audio_column"),
        ([{"path": "a.jsonl", "image_column": "i"}], ["--stream", "true"], "cannot be streamed"),
        ([{"path": "a.jsonl", "group_column": "i"}], ["--stream", "true"], "group_column"),
        ([{"path": "a.jsonl", "audio_column": "i"}], ["--messages_column", "m"], "not with a conversation"),
        ([{"path": "-", "image_column": "i", "kind": "json"}], [], "standard input"),
    ],
)  # fmt: skip
def test_what_does_not_go_together_is_refused_before_reading(tmp_path, sources, option, word):
    line = error_line("prepare_data.py", "--output", tmp_path / "out", "--sources", json.dumps(sources), *option)
    assert word in line and not list(tmp_path.iterdir())


@pytest.mark.parametrize(("column", "library", "command"), [
    ("image_column", "PIL", "pip install pillow"), ("audio_column", "soundfile", "pip install -e '.[audio]'"),
])  # fmt: skip
def test_a_missing_library_is_named_with_its_command(tmp_path, monkeypatch, column, library, command):
    monkeypatch.setattr("preparation.recipe.find_spec", lambda name: None if name == library else object())
    sources = json.dumps([{"path": "a.jsonl", column: "x"}])
    assert command in error_line("prepare_data.py", "--output", tmp_path / "out", "--sources", sources)


def test_texts_cannot_have_columns_and_archives_no_paths(tmp_path):
    import tarfile

    (tmp_path / "a.txt").write_text("text")
    source = SourceConfig(path=str(tmp_path / "a.txt"), name="a", text_column="text", image_column="image")
    (record,) = iter_records(source, [tmp_path / "a.txt"])
    assert isinstance(record, Broken) and "'image'" in record.why and "text" in record.why
    path = write_records(tmp_path / "b.jsonl", [{"text": "x", "image": "a.png"}])
    (tmp_path / "a.png").write_bytes(picture(1))
    with tarfile.open(tmp_path / "b.tar", "w") as archive:
        archive.add(path, "b.jsonl")
    source.path = str(tmp_path / "b.tar")
    (record,) = iter_records(source, [tmp_path / "b.tar"])
    assert isinstance(record, Broken) and "archive" in record.why


@pytest.mark.parametrize(
    ("value", "word"),
    [
        (3, "int"), ({"path": None}, "nothing"), (["a.png", 3], "int"), ([""], "nothing"),
        ("/9j/" * 1250, "text of 5,000 characters"),  # a picture in base64
    ],
)  # fmt: skip
def test_values_that_name_no_file(tmp_path, value, word):
    (tmp_path / "a.png").write_bytes(picture(1))
    path = write_records(tmp_path / "a.jsonl", [{"text": "x", "image": value}])
    source = SourceConfig(path=str(path), name="a", text_column="text", image_column="image")
    (record,) = iter_records(source, [path])
    assert isinstance(record, Broken) and word in record.why


def test_the_order_is_that_of_the_records_and_few_are_held(tmp_path, monkeypatch):
    """Though the first take the longest; at most a few more are read than are checked."""

    def pixels_of(data):
        time.sleep(len(data) / 5000)
        return len(data)

    monkeypatch.setattr(media, "pixels_of", pixels_of)
    pulled = []

    def pairs():
        for number in range(50):
            pulled.append(number)
            yield number, [bytes(50 - number)]

    for place, (number, loaded) in enumerate(media.load_all(pairs(), "image", None)):
        assert number == place and loaded.amount == 50 - number
        assert len(pulled) <= place + media.THREADS + 2


def test_a_part_of_the_sources_has_the_columns_of_all(tmp_path):
    """As a cluster reads them, each into a table of its own."""
    rows = [{"image": picture(number), "text": f"number {number}"} for number in range(3)]
    pyarrow.parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    path = write_records(tmp_path / "b.jsonl", [{"text": "text", "topic": "x"}])
    sources = [SourceConfig(path=str(tmp_path / "a.parquet"), name="a", text_column="text", image_column="image"),
               SourceConfig(path=str(path), name="b", text_column="text", group_column="topic")]  # fmt: skip
    for source in sources:
        folder = tmp_path / str(source.name)
        folder.mkdir()
        read_sources([source], folder, units=[Path(str(source.path))], features=document_features(sources))
    tables = [load_slices(tmp_path / name / "documents.arrow") for name in ("a", "b")]
    joined = datasets.concatenate_datasets(tables)
    assert joined.column_names == ["text", "source", "id", "group", "media"]
    assert joined["media"][:] == [[picture(0)], [picture(1)], [picture(2)], []]
    assert media.media_bytes(joined.select([3, 1]).flatten_indices()).tolist() == [0, len(picture(1))]
    assert media.media_bytes(joined).tolist() == [*(len(picture(number)) for number in range(3)), 0]


def test_the_sample_pictures_and_sounds_are_what_their_readme_says():
    readme = (ROOT / "sample_data" / "README.md").read_text(encoding="utf-8")
    emoji = pyarrow.parquet.read_table(ROOT / "sample_data" / "emoji.parquet").to_pylist()
    speech = pyarrow.parquet.read_table(ROOT / "sample_data" / "speech.parquet").to_pylist()
    assert f"{len(emoji):,} pictures" in readme and f"{len(speech):,} spoken commands" in readme
    assert {media.describe(row["image"], "image")["label"].partition(",")[0] for row in emoji} == {"32 × 32"}
    seconds = sum(media.seconds_of(row["audio"]) for row in speech)
    assert f"{seconds / 60:.1f} minutes" in readme
    assert all("16,000 Hz, mono, OGG" in media.describe(row["audio"], "audio")["label"] for row in speech)
    assert len({row["text"] for row in speech}) == len(speech)
    concepts = {row["name"]: row["concept"] for row in emoji}
    for names in (["man running", "woman running", "person running"], ["family", "family: man, woman, boy"],
                  ["man: red hair", "person: red hair"], ["flag: Norway", "flag: Bouvet Island"]):  # fmt: skip
        assert len({concepts[name] for name in names}) == 1
    assert len({concepts[name] for name in ("cat", "dog", "man", "man running", "flag: Norway", "flag: Spain")}) == 6
    pictures: dict[bytes, set[str]] = {}
    for row in emoji:
        pictures.setdefault(row["image"], set()).add(row["concept"])
    assert {len(found) for found in pictures.values()} == {1}


def test_the_report_shows_them(tmp_path):
    rows = [{"image": picture(number), "text": f"number {number}"} for number in range(20)]
    pyarrow.parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    out = prepare(tmp_path / "out", {"path": str(tmp_path / "a.parquet"), "image_column": "image"})
    advice = out.partition("--config ")[2].split()[0]
    assert yaml.safe_load((ROOT / advice).read_text(encoding="utf-8"))["objective"]["name"] == "captioning"
    page = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert 'src="data:image/png;base64,' in page and "8 × 6, PNG" in page and "img-src data:" in page
    size = sum(len(picture(number)) for number in range(20))
    assert f"pictures of a: 20, {size:,} bytes" in page and f"pictures of a: 20, {size:,} bytes" in card
    assert "train_media/" in card
    label = media.describe(sound(1, 0.5, 8000, 2), "audio")
    assert label["label"].startswith("0.5 s, 8,000 Hz, stereo, WAV") and not label["thumbnail"]
