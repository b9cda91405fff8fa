"""Pictures and sounds of a record: found, read, checked by decoding them, and stored as the bytes that they came in."""

import base64
import hashlib
import io
import os
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute

from utils.data.token_dataset import PICTURE_FORMATS

# Pillow and soundfile are imported where they are used: text needs neither.

# Above the 50 million of most phones. Decoding takes up to 4 bytes per pixel: 256 MB at this limit.
MAX_PIXELS = 64_000_000
MAX_SECONDS = 30.0  # Whisper hears no more of a sound, so it would learn to write what it cannot hear
MAX_BYTES = 256 << 20  # of a file
MAX_PATH = 4096  # characters, as in Linux; a longer text is a file in base64
THREADS = min(4, os.cpu_count() or 1)  # that decode at a time; each may hold a picture of MAX_PIXELS
THUMBNAIL = 96  # pixels
Record = TypeVar("Record")


class References(NamedTuple):
    """What a record says of its files, before they are read."""

    items: list[bytes | str]  # bytes, or a path
    place: str  # of the record in its file


class Checked(NamedTuple):
    """The files of a record, decoded once to see that they can be."""

    files: list[bytes]
    from_disk: int = 0  # bytes that do not stand in the record itself
    amount: int = 0  # pixels or milliseconds of all


class BrokenMedia(ValueError):
    """Why a record's pictures or sound cannot be used; `lost` are the bytes of the file at fault."""

    def __init__(self, why: str, lost: int = 0, from_disk: int = 0) -> None:
        super().__init__(why)
        self.lost, self.from_disk = lost, from_disk


def find_references(value: Any) -> list[bytes | str]:
    """What a record's column holds: bytes, the path of a file, {bytes, path}, a list of these, or null (in CSV nothing)
    for none. `ValueError` for anything else."""
    found: list[bytes | str] = []
    for item in value if isinstance(value, list) else [] if value in (None, "") else [value]:
        if isinstance(item, dict):
            item = item.get("bytes") or item.get("path")
        if not isinstance(item, bytes | str) or not item:
            what = "nothing" if item in (None, b"", "") else type(item).__name__
            raise ValueError(f"holds {what}, where bytes or the path of a file are expected")
        if isinstance(item, str) and len(item) > MAX_PATH:
            raise ValueError(
                f"holds text of {len(item):,} characters, which is no path; store files or bytes, not base64"
            )
        found.append(item)
    return found


def resolve(reference: str, folder: Path | None) -> Path:
    """The file that a record names. `ValueError` unless it lies in `folder`, where the record's own file is."""
    if folder is None:
        raise ValueError(f"names the file {reference!r}; files in an archive or on the Hub are not found by their path")
    path = folder / reference
    try:
        inside = path.resolve().is_relative_to(folder.resolve())
    except (OSError, ValueError, RuntimeError):  # a loop of links, a zero byte, a name too long
        inside = False
    if not inside:
        raise ValueError(f"names {reference!r}, which is not in the folder {folder}")
    return path


def read_file(reference: str, folder: Path | None) -> bytes:
    """`BrokenMedia` if there is no such file in the folder, or it is too large."""
    try:
        path = resolve(reference, folder)
    except ValueError as error:
        raise BrokenMedia(str(error)) from None
    try:
        size = path.stat().st_size if path.is_file() else None
        if size is not None and size <= MAX_BYTES:
            return path.read_bytes()
    except (OSError, ValueError) as error:
        raise BrokenMedia(f"names {reference!r}, which cannot be read: {error}") from None
    if size is None:
        raise BrokenMedia(f"names {reference!r}: there is no such file in {folder}")
    raise BrokenMedia(f"names {reference!r}, a file of more than {MAX_BYTES >> 20} MB", size, size)


def load(references: list[bytes | str], kind: str, folder: Path | None) -> Checked:
    """Read and decode the files of a record; `BrokenMedia` for the first at fault."""
    files, amount, from_disk = [], 0, 0
    for reference in references:
        named = f"names {reference!r}, " if isinstance(reference, str) else "holds "
        data = read_file(reference, folder) if isinstance(reference, str) else reference
        from_disk += len(data) if isinstance(reference, str) else 0
        try:
            amount += pixels_of(data) if kind == "image" else round(1000 * seconds_of(data))
        except ValueError as error:
            raise BrokenMedia(f"{named}{error}", len(data), from_disk) from None
        files.append(data)
    return Checked(files, from_disk, amount)


def load_all(
    pairs: Iterator[tuple[Record, list[bytes | str]]], kind: str, folder: Path | None
) -> Iterator[tuple[Record, Checked | BrokenMedia]]:
    """(record, what it names) → (record, its files), in order. A few threads decode; a few records are held."""

    def try_to_load(references: list[bytes | str]) -> Checked | BrokenMedia:
        try:
            return load(references, kind, folder)
        except BrokenMedia as error:
            return error

    waiting: deque[tuple[Record, Future[Checked | BrokenMedia]]] = deque()
    with ThreadPoolExecutor(THREADS) as pool:
        for record, references in pairs:
            waiting.append((record, pool.submit(try_to_load, references)))
            if len(waiting) > THREADS:
                first, future = waiting.popleft()
                yield first, future.result()
        for first, future in waiting:
            yield first, future.result()


def open_picture(data: bytes) -> Any:
    """The picture in a file, of which only the head is read; `ValueError` if it is none, or too large."""
    from PIL import Image

    Image.MAX_IMAGE_PIXELS = None  # our limit is lower, and is an error rather than a warning
    try:
        picture = Image.open(io.BytesIO(data), formats=PICTURE_FORMATS)
    except Exception as error:  # each format fails in its own way
        raise ValueError(f"no picture that can be read ({_reason(error)})") from None
    if picture.mode[0] in "IF":
        raise ValueError("a picture of more than 8 bits per pixel of grey, which would become white; convert it to 8")
    if picture.width * picture.height > MAX_PIXELS:
        size = f"{picture.width:,} × {picture.height:,} pixels"
        raise ValueError(f"a picture of {size}; at most {MAX_PIXELS / 1e6:.0f} million are read")
    return picture


def pixels_of(data: bytes) -> int:
    """The pixels of a picture, which is decoded whole (of an animation, the first picture)."""
    picture = open_picture(data)
    try:
        picture.load()
    except Exception as error:
        raise ValueError(f"a damaged picture ({_reason(error)})") from None
    return picture.width * picture.height


def seconds_of(data: bytes) -> float:
    """The length of a sound, which is decoded whole."""
    import soundfile

    try:
        with soundfile.SoundFile(io.BytesIO(data)) as sound:
            rate, frames, said = sound.samplerate, 0, sound.frames
            if said > MAX_SECONDS * rate:
                raise ValueError(f"a sound of {said / rate:,.1f} seconds; at most {MAX_SECONDS:g} are read")
            block_size = max(1, (1 << 20) // sound.channels)
            while len(block := sound.read(block_size, dtype="float32")):
                frames += len(block)
                if not np.isfinite(block).all():
                    raise ValueError("a sound with samples that are not finite")
                if frames > MAX_SECONDS * rate:
                    raise ValueError(f"a sound of more than {MAX_SECONDS:g} seconds")
    except ValueError:
        raise
    except Exception as error:  # RuntimeError, LibsndfileError
        raise ValueError(f"no sound that can be read ({_reason(error)})") from None
    if frames < said:
        raise ValueError(f"a damaged sound ({frames:,} of {said:,} samples can be decoded)")
    # soundfile takes the end of a WAV file for its length. A stream's header, which has no length, says at least 2^31.
    if data[:4] == b"RIFF" and len(data) < (size := int.from_bytes(data[4:8], "little") + 8) < 2**30:
        raise ValueError(f"a damaged sound ({len(data):,} of {size:,} bytes are there)")
    if not frames:
        raise ValueError("a sound of zero seconds")
    return frames / rate


def _reason(error: Exception) -> str:
    text = " ".join(getattr(error, "error_string", str(error)).split())  # soundfile's message has an address in it
    return "its format is unknown" if "cannot identify" in text else text[:100] or type(error).__name__


def digest_media(files: list[bytes]) -> bytes:
    """16 bytes that identify the files of a record and their order."""
    digest = hashlib.blake2b(digest_size=16)
    for data in files:
        digest.update(len(data).to_bytes(8, "little"))
        digest.update(data)
    return digest.digest()


def media_bytes(documents: datasets.Dataset) -> np.ndarray:
    """(N,) int64: bytes of the media of each document, 0 without the column `media`. Reads only the offsets."""
    sizes = [np.empty(0, np.int64)]
    if "media" not in documents.column_names:
        return np.zeros(len(documents), np.int64)
    for chunk in documents.data.column("media").chunks:
        ends = np.cumsum([0, *pa.compute.binary_length(chunk.values).to_numpy()])  # of all files in its buffer
        offsets = chunk.offsets.to_numpy()
        sizes.append(ends[offsets[1:]] - ends[offsets[:-1]])
    return np.concatenate(sizes)


def describe(data: bytes, kind: str) -> dict[str, str]:
    """What the report shows of a file: its sizes in words and, of a picture, a thumbnail as a data URI."""
    if kind == "audio":
        import soundfile

        with soundfile.SoundFile(io.BytesIO(data)) as sound:
            channels = {1: "mono", 2: "stereo"}.get(sound.channels, f"{sound.channels} channels")
            length = f"{sound.frames / sound.samplerate:.1f} s, {sound.samplerate:,} Hz, {channels}, {sound.format}"
        return {"label": f"{length}, {len(data):,} bytes", "thumbnail": ""}
    picture = open_picture(data)
    label = f"{picture.width:,} × {picture.height:,}, {picture.format}, {len(data):,} bytes"
    picture = picture.convert("RGBA")
    picture.thumbnail((THUMBNAIL, THUMBNAIL))
    file = io.BytesIO()
    picture.save(file, "PNG")
    return {"label": label, "thumbnail": "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()}
