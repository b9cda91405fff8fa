"""emoji.parquet: small pictures of emoji with their Unicode names, from two Debian packages.

    apt-get source --download-only fonts-noto-color-emoji    # the drawings
    apt-get download unicode-data && dpkg -x unicode-data_*.deb .    # the names
    python sample_data/make_emoji.py fonts-noto-color-emoji_*.orig.tar.xz usr/share/unicode/emoji/emoji-test.txt

The same packages give the same pixels; the bytes also depend on the version of Pillow.
"""

import io
import re
import sys
import tarfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet
from PIL import Image

SIDE = 32  # pixels
COLOURS = 64  # in the palette of a picture
DRAWING = re.compile(r"[^/]+/(?:png/128/emoji_u([0-9a-f_]+)|third_party/region-flags/png/([A-Z-]+))\.png")
LINE = re.compile(r"(?P<codes>[0-9A-F ]+?)\s*; fully-qualified\s*# \S+ E[\d.]+ (?P<name>.*)")
# Emoji that differ only in the people they show are siblings: they have one concept, and so stand in one split.
PEOPLE = re.compile(r"\b(?:man|woman|men|women|person|people|boy|girl|child|baby|older|old|and)\b|[^\w\s-]")
SAME = {
    "prince": "royal", "princess": "royal", "person with crown": "royal", "mermaid": "mer", "merman": "mer",
    "merperson": "mer", "Santa Claus": "claus", "Mrs. Claus": "claus", "mx claus": "claus",
}  # fmt: skip


def main(drawings: str, names: str) -> None:
    wanted = {file_name(codes): (name, group, subgroup) for codes, name, group, subgroup in read_names(Path(names))}
    rows, concepts = [], {}
    with tarfile.open(drawings) as archive:
        for member in archive:
            found = DRAWING.fullmatch(member.name)
            if found and (described := wanted.pop(found[1] or found[2], None)):
                name, group, subgroup = described
                data = shrink(archive.extractfile(member).read())
                concept = concepts.setdefault(data, find_concept(name, group))  # some regions share a flag
                rows.append({"image": data, "name": name, "group": group, "subgroup": subgroup, "concept": concept})
    rows.sort(key=lambda row: (row["group"], row["subgroup"], row["name"]))
    path = Path(__file__).with_name("emoji.parquet")
    pa.parquet.write_table(pa.Table.from_pylist(rows), path, compression="zstd", compression_level=19)
    print(
        f"{path}: {len(rows)} pictures, {path.stat().st_size:,} bytes, {len({row['concept'] for row in rows})} concepts"
    )
    print(f"without a drawing: {len(wanted)}: {', '.join(name for name, _, _ in wanted.values())}")


def read_names(path: Path) -> list[tuple[str, str, str, str]]:
    """(code points, name, group, subgroup) of each emoji without a skin tone."""
    found, group, subgroup = [], "", ""
    for line in path.read_text(encoding="utf-8").splitlines():
        if heading := re.match(r"# (group|subgroup): (.*)", line):
            group, subgroup = (heading[2], "") if heading[1] == "group" else (group, heading[2])
        elif (match := LINE.match(line)) and group != "Component" and "skin tone" not in match["name"]:
            found.append((match["codes"], match["name"], group, subgroup))
    return found


def file_name(codes: str) -> str:
    """How the drawings are named: by code points, without the variation selector; flags of regions by their letters,
    which the last digits of the code points stand for."""
    points = [int(code, 16) for code in codes.split() if code != "FE0F"]
    if 0x1F1E6 <= points[0] <= 0x1F1FF:
        return "".join(chr(point - 0x1F1E6 + ord("A")) for point in points)
    if len(points) > 3 and points[-1] == 0xE007F:  # as in "gbsct" and the tag that ends it
        letters = "".join(chr(point - 0xE0000) for point in points[1:-1]).upper()
        return f"{letters[:2]}-{letters[2:]}"
    return "_".join(f"{point:04x}" for point in points)


def find_concept(name: str, group: str) -> str:
    """What siblings have in common: "man running" and "woman running" are both "running"."""
    if group != "People & Body":
        return name
    return SAME.get(name) or " ".join(PEOPLE.sub(" ", name).split()) or "person"


def shrink(data: bytes) -> bytes:
    """A drawing as a palette PNG of SIDE × SIDE pixels on white."""
    drawing = Image.open(io.BytesIO(data)).convert("RGBA")
    side = max(drawing.size)
    square = Image.new("RGBA", (side, side), "white")
    square.alpha_composite(drawing, ((side - drawing.width) // 2, (side - drawing.height) // 2))
    small = square.convert("RGB").resize((SIDE, SIDE), Image.Resampling.LANCZOS)
    file = io.BytesIO()
    small.quantize(COLOURS, dither=Image.Dither.NONE).save(file, "PNG", optimize=True)
    return file.getvalue()


if __name__ == "__main__":
    main(*sys.argv[1:])
