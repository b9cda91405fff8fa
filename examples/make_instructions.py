"""Make a small instruction set from the sample text: questions about dictionary entries, with the entries as answers.

    python examples/make_instructions.py                # writes data/instructions.jsonl
    python prepare_data.py --sources '[data/instructions.jsonl]' --messages_column messages --output data/instructions \\
        --tokenizer.chat_template configs/chat_template.jinja --tokenizer.special_tokens '[<|im_start|>, <|im_end|>]'

Every entry that has a headword and a definition is used once. A hash of its id chooses the question, so the same
entries give the same file.
"""

import argparse
import json
import re
import sys
from collections.abc import Iterator
from hashlib import blake2b
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from utils.files import find_obstacle

SAMPLE = Path(__file__).resolve().parent.parent / "sample_data" / "dictionaries.jsonl"
BOOKS = {"devil": "The Devil's Dictionary", "jargon": "the Jargon File"}
ANSWER_CHARACTERS = 600  # of a longer entry, only the beginning is the answer

QUESTIONS = [
    "What does {book} say about {word}?", "Define {word}, as {book} does.", "How does {book} define {word}?",
    "What is the meaning of {word} in {book}?", "Look up {word} in {book}, please.", "{word}: what is that, by {book}?",
    "I came across {word}. What has {book} to say of it?", "Give me the entry {word} of {book}.",
]  # fmt: skip
FURTHER_QUESTIONS = ["And {word}?", "What about {word}?", "Thank you. Now {word}, please."]
REVERSE_QUESTIONS = ["Which entry of {book} is this?\n\n{answer}", "{answer}\n\nWhat does {book} define like that?"]

DEVIL = re.compile(r"(?P<word>[^,\n]+), [^\n]{1,20}?\.  ?(?P<body>.+)", re.DOTALL)  # ABATIS, n.  Rubbish in front of...
JARGON = re.compile(r"(?P<word>[^\n]+)\n[^\n]*\n\n(?P<body>.+)", re.DOTALL)  # between them is a line with its class
REFERENCE = re.compile(r"\{\s*([^{}]+?)\s*\}")  # such as {bot}, also across a line end
SENTENCE_END = re.compile(r"(?<=[a-z]{4}[.!?])\s|(?<=[.!?]”)\s")  # not "2. ", not "Esp. "


class Entry(NamedTuple):
    id: str
    book: str
    word: str
    answer: str


def read_entries(path: Path) -> Iterator[Entry]:
    """The entries that have a headword and a definition, in the order of their hashes."""
    records = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    for record in sorted(records, key=lambda record: draw(record["id"], "order")):
        origin = record["id"].partition("/")[0]
        if match := (DEVIL if origin == "devil" else JARGON).match(record["text"]):
            yield Entry(record["id"], BOOKS[origin], match["word"].strip(), trim(match["body"]))


def draw(id: str, purpose: str) -> int:
    """A number from 0 to 2^32 - 1 that depends only on the arguments."""
    return int.from_bytes(blake2b(f"{purpose} {id}".encode(), digest_size=4).digest(), "big")


def trim(body: str) -> str:
    """The prose of an entry, one line per paragraph, cut at the end of a sentence within `ANSWER_CHARACTERS`."""
    parts = [part.strip("\n") for part in body.split("\n\n")]
    indents = [len(part) - len(part.lstrip(" ")) for part in parts]
    prose = [
        part for part, indent in zip(parts, indents, strict=True) if indent <= indents[0] + 1
    ]  # numbered paragraphs are indented by one more
    text = "\n\n".join(" ".join(REFERENCE.sub(r"\1", part).split()) for part in prose)
    if len(text) <= ANSWER_CHARACTERS:
        return text
    ends = [found.start() for found in SENTENCE_END.finditer(text, 0, ANSWER_CHARACTERS)]
    return text[: ends[-1]] if ends else text[:ANSWER_CHARACTERS].rpartition(" ")[0]


def make_conversations(entries: Iterator[Entry]) -> Iterator[list[dict[str, str]]]:
    """One conversation of ten asks for the headword; two of ten ask for a second entry in a second turn."""
    for entry in entries:
        kind = draw(entry.id, "kind") % 10
        forms = REVERSE_QUESTIONS if kind == 0 else QUESTIONS
        question = forms[draw(entry.id, "question") % len(forms)].format(**entry._asdict())
        messages = [say("user", question), say("assistant", entry.word if kind == 0 else entry.answer)]
        if kind in (1, 2) and (other := next(entries, None)):
            form = FURTHER_QUESTIONS[draw(other.id, "question") % len(FURTHER_QUESTIONS)]
            if other.book != entry.book:
                form = QUESTIONS[draw(other.id, "question") % len(QUESTIONS)]
            messages += [say("user", form.format(**other._asdict())), say("assistant", other.answer)]
        yield messages


def say(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content[0].upper() + content[1:]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("output", nargs="?", type=Path, default=Path("data/instructions.jsonl"), help="file to write")
    path = parser.parse_args().output
    if obstacle := find_obstacle(path):
        parser.error(f"{path} {obstacle}")
    path.parent.mkdir(parents=True, exist_ok=True)
    conversations = list(make_conversations(read_entries(SAMPLE)))
    lines = [json.dumps({"messages": messages}, ensure_ascii=False) for messages in conversations]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    turns = sum(len(messages) // 2 for messages in conversations)
    print(f"wrote {path}: {len(conversations):,} conversations, {turns:,} turns of the assistant")


if __name__ == "__main__":
    main()
