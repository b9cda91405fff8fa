"""speech.parquet: spoken commands with their transcripts. espeak-ng speaks sentences that this script makes up.

apt-get install espeak-ng    # Debian 12: 1.51
python sample_data/make_speech.py
"""

import io
import random
import subprocess
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import soundfile
import soxr

SENTENCES = 400
RATE = 16_000  # of the files; espeak-ng's is 22,050
SILENCE = RATE // 20  # samples kept before and after the speech
VOICES = (
    "en-us", "en-gb", "en-gb-scotland", "en-gb-x-rp", "en-029", "en-us+f2", "en-us+f4", "en-us+m3", "en-us+m7",
    "en-gb+f3", "en-gb+m2", "en-gb-x-gbclan+f1",
)  # fmt: skip
ONES = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
TENS = ["twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety"]
COLOURS = ["red", "green", "blue", "white", "black", "yellow"]
THINGS = ["lamp", "door", "window", "radio", "heater", "fan"]
ROOMS = ["kitchen", "bedroom", "garage", "office", "garden", "hall"]


def main() -> None:
    rng = random.Random(7)
    sentences: dict[str, None] = {}  # each once
    while len(sentences) < SENTENCES:
        sentences[make_sentence(rng)] = None
    rows, seconds = [], 0.0
    for sentence in sentences:
        voice, speed, pitch = rng.choice(VOICES), rng.randint(150, 190), rng.randint(35, 65)
        sound = speak(sentence, voice, speed, pitch)
        seconds += len(sound) / RATE
        file = io.BytesIO()
        soundfile.write(file, sound, RATE, format="OGG", subtype="OPUS", compression_level=0.976)  # 12 kbit/s
        rows.append({"audio": file.getvalue(), "text": sentence, "voice": voice})
    path = Path(__file__).with_name("speech.parquet")
    pa.parquet.write_table(pa.Table.from_pylist(rows), path)
    print(f"{path}: {len(rows)} sentences, {seconds / 60:.1f} minutes, {path.stat().st_size:,} bytes")


def make_sentence(rng: random.Random) -> str:
    thing, room = rng.choice(THINGS), rng.choice(ROOMS)
    number = rng.choice([rng.choice(ONES), rng.choice(TENS), f"{rng.choice(TENS)} {rng.choice(ONES)}"])
    return rng.choice([
        f"turn {rng.choice(['on', 'off'])} the {rng.choice(COLOURS)} {thing} in the {room}",
        f"set the {thing} in the {room} to {number}",
        f"call {' '.join(rng.choice(ONES) for _ in range(rng.randint(3, 5)))}",
        f"open the {room} {thing} in {number} minutes",
    ])  # fmt: skip


def speak(sentence: str, voice: str, speed: int, pitch: int) -> np.ndarray:
    """(n,) float32 at RATE, without the silence around the speech."""
    command = ["espeak-ng", "-v", voice, "-s", str(speed), "-p", str(pitch), "--stdout", sentence]
    wav = subprocess.run(command, capture_output=True, check=True).stdout
    # The header of a stream has no length, so the samples behind it are read as they are.
    samples = np.frombuffer(wav[44 : len(wav) - len(wav) % 2], np.int16).astype(np.float32) / 2**15
    sound = soxr.resample(samples, int.from_bytes(wav[24:28], "little"), RATE)
    loud = np.flatnonzero(np.abs(sound) > 0.01)
    return sound[max(0, loud[0] - SILENCE) : loud[-1] + SILENCE]


if __name__ == "__main__":
    main()
