"""Conversations: which tokens the assistant says, compared with transformers and by hand, and through prepare_data.py."""

import json
import math
import random
import re
from collections import Counter

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
import torch
from conftest import ROOT, call, error_line, script
from tokenizers import Tokenizer, processors
from transformers import AutoTokenizer

import prepare_data
from preparation.cleaning.steps import EMPTY, clean_documents
from preparation.recipe import CleaningConfig, SourceConfig
from preparation.sources.conversations import (
    ROLES,
    SEPARATOR,
    find_conversation,
    join_messages,
    map_contents,
    split_messages,
    split_tools,
    without_system,
)
from preparation.sources.documents import Broken, Document, make_document, read_sources
from preparation.tokenizer.build import train_tokenizer
from preparation.tokenizer.encoding import ConversationEncoder
from utils.cli import UserError
from utils.config import ModelConfig
from utils.data.loaders import CollatedRows, build_layout, to_tensors
from utils.data.token_dataset import TokenDataset, load_manifest, open_split
from utils.model.build import build_model
from utils.objectives import Objective, instruction

MARKED = (ROOT / "configs" / "chat_template.jinja").read_text(encoding="utf-8")
SPECIAL = ["<|im_start|>", "<|im_end|>"]
DEFAULT_SYSTEM = "You answer from old dictionaries."
# ChatML without marks, which adds a system message if the conversation has none.
UNMARKED = (
    "{% if messages[0].role != 'system' %}<|im_start|>system\n" + DEFAULT_SYSTEM + "<|im_end|>\n{% endif %}"
    "{% for item in messages %}<|im_start|>{{ item.role }}\n{{ item.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)  # fmt: skip
TEMPLATE_OPTIONS = [
    "--tokenizer.chat_template", "configs/chat_template.jinja", "--tokenizer.special_tokens", json.dumps(SPECIAL),
    "--tokenizer.vocab_size", "500",
]  # fmt: skip


def talk(*turns: str) -> list[dict[str, str]]:
    """Messages from strings such as "user: ..."."""
    return [{"role": role, "content": content} for role, _, content in (turn.partition(": ") for turn in turns)]


ODD = [
    talk("system: Be brief.", "user: Why?", "assistant: Because.", "user: Why?", "assistant: Schön 👩‍👧‍👦 né"),
    talk("user: 2 + 2", "assistant: I look it up.", "tool: 4", "assistant: 4"),
    talk("user: Go on.", "assistant: One.", "assistant: Two.", "user: Thanks."),
    talk("user:   x\n", "assistant: def f():\n\treturn 1\n\n", "user: <|im_end|>", "assistant: 吾輩は猫である。👩‍👧"),
]


@pytest.fixture(scope="module")
def instructions(tmp_path_factory):
    """The conversations that the example makes from the sample text."""
    path = tmp_path_factory.mktemp("instructions") / "instructions.jsonl"
    script("examples/make_instructions.py", path)
    return path


@pytest.fixture(scope="module")
def conversations(instructions) -> list[list[dict[str, str]]]:
    return [json.loads(line)["messages"] for line in instructions.read_text(encoding="utf-8").splitlines()]


def train(conversations, algorithm="bpe", template=MARKED):
    texts = [join_messages(messages) for messages in conversations[:500]]
    return train_tokenizer(
        [texts], algorithm=algorithm, vocab_size=500, special_tokens=SPECIAL, chat_template=template
    )  # fmt: skip


@pytest.fixture(scope="module")
def tokenizer(conversations):
    return train(conversations)


def encode(tokenizer, conversations, parse: bool = False) -> list[tuple[list[int], list[int]]]:
    """(input_ids, loss_mask) of each."""
    texts = [join_messages(messages) for messages in conversations]
    ids = [f"file:{number}" for number in range(1, len(texts) + 1)]
    table = ConversationEncoder(tokenizer, parse).encode_table(pa.table({"text": texts, "id": ids}))
    return list(zip(table["input_ids"].to_pylist(), table["loss_mask"].to_pylist(), strict=True))


def with_template(tokenizer, template):
    changed = train_copy(tokenizer)
    changed.chat_template = template
    return changed


def train_copy(tokenizer):
    return type(tokenizer)(tokenizer_object=Tokenizer.from_str(tokenizer.backend_tokenizer.to_str()),
                           bos_token=tokenizer.bos_token, eos_token=tokenizer.eos_token)  # fmt: skip


def said(tokenizer, ids: list[int], mask: list[int]) -> str:
    return tokenizer.decode([token for token, is_said in zip(ids, mask, strict=True) if is_said])


@pytest.mark.parametrize("algorithm", ["bpe", "unigram"])
def test_ids_and_mask_of_a_marked_template_are_transformers_own(algorithm, conversations):
    tokenizer = train(conversations, algorithm)
    chosen = [*ODD, *conversations[:300]]
    assert sum(len(messages) > 2 for messages in chosen) > 50
    theirs = tokenizer.apply_chat_template(chosen, return_dict=True, return_assistant_tokens_mask=True)
    assert encode(tokenizer, chosen)[:3] == encode(tokenizer, chosen, parse=True)[:3]
    for number, (ids, mask) in enumerate(encode(tokenizer, chosen, parse=True)):  # as transformers does
        assert ids == theirs["input_ids"][number]
        assert mask == theirs["assistant_masks"][number]
        answers = [item["content"] for item in chosen[number] if item["role"] == "assistant"]
        assert said(tokenizer, ids, mask) == "".join(f"{answer}<|im_end|>" for answer in answers)


def test_ids_and_mask_of_an_unmarked_template_are_those_put_together_by_hand(tokenizer, conversations):
    """Reference: each message encoded separately, which gives the same ids if special tokens separate them."""
    unmarked = with_template(tokenizer, UNMARKED)
    start, end = unmarked.convert_tokens_to_ids(SPECIAL)

    backend = Tokenizer.from_str(unmarked.backend_tokenizer.to_str())
    backend.encode_special_tokens = True

    def plain(text):
        return backend.encode(text, add_special_tokens=False).ids

    spelled = talk(
        "user: <|im_end|>\n<|im_start|>assistant\nHello<|im_end|>",
        "assistant: use <|im_start|>, <|im_end|><|im_end|> or <|endoftext|>", "user: <|im_", "assistant: end|>",
    )  # fmt: skip
    chosen = [*ODD, spelled, *conversations[:400]]
    for messages, (ids, mask) in zip(chosen, encode(unmarked, chosen), strict=True):
        expected_ids, expected_mask = [], []
        first = [] if messages[0]["role"] == "system" else talk(f"system: {DEFAULT_SYSTEM}")
        for item in [*first, *messages]:
            header, content = [start, *plain(f"{item['role']}\n")], [*plain(item["content"]), end]
            expected_ids += [*header, *content, *plain("\n")]
            expected_mask += [0] * len(header) + [int(item["role"] == "assistant")] * len(content) + [0]
        assert ids == expected_ids
        assert mask == expected_mask


def test_special_tokens_in_messages_are_text_and_those_of_the_template_are_not(tokenizer, conversations):
    """In a template that uses contents in many ways, and with special tokens that take white space, as Phi-3's do."""
    template = (
        "{{ bos_token }}{% for item in messages %}{{ '<|im_start|>' }} {{ item.role }}: {{ item.content | trim }}"
        "{% if item.role == 'assistant' %}{{ '<|im_end|>' }} {% endif %}\n{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>' }} assistant: {% endif %}"
    )
    taking = train_copy(tokenizer)
    state = json.loads(taking.backend_tokenizer.to_str())
    for token in state["added_tokens"]:
        token["rstrip"] = token["content"] in SPECIAL
    taking = type(tokenizer)(
        tokenizer_object=Tokenizer.from_str(json.dumps(state)), bos_token=tokenizer.bos_token,
        eos_token=tokenizer.eos_token, extra_special_tokens=SPECIAL,
    )  # fmt: skip
    taking.chat_template = template
    special = set(taking.convert_tokens_to_ids(SPECIAL))
    for messages in conversations[:50]:
        first = messages[0]["content"]
        marked = [messages[0] | {"content": f"{first} <|im_end|> {first}"}, *messages[1:]]
        stars = [messages[0] | {"content": f"{first} *** {first}"}, *messages[1:]]
        (ids, mask), (others, _) = encode(taking, [marked, stars])
        assert [token for token in ids if token in special] == [token for token in others if token in special]
        assert said(taking, ids, mask) == said(taking, *encode(taking, [messages])[0])
        assert f"{first.strip()} <|im_end|> {first.strip()}" in taking.decode(ids)
        assert encode(taking, [messages])[0][0] == taking.apply_chat_template(messages, return_dict=True)["input_ids"]
        theirs = taking.apply_chat_template(marked, return_dict=True)["input_ids"]
        assert encode(taking, [marked], parse=True)[0][0] == theirs != ids


def test_a_token_on_both_sides_of_a_border_counts_as_the_assistants(tokenizer):
    """As in transformers: " the" is one token, although its space belongs to the header."""
    marked = (
        "{% for item in messages %}{{ item.role + ': ' }}{% if item.role == 'assistant' %}{% generation %}"
        "{{ item.content }}<|im_end|>{% endgeneration %}{% else %}{{ item.content }}{% endif %}{% endfor %}"
    )
    unmarked = (
        "{% for item in messages %}{{ item.role + ': ' + item.content }}{% if item.role == 'assistant' %}<|im_end|>"
        "{% endif %}{% endfor %}{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
    )
    messages = talk("user: Who?", "assistant: the cat")
    marked_tokenizer = with_template(tokenizer, marked)
    ids, mask = encode(marked_tokenizer, [messages])[0]
    assert said(tokenizer, ids, mask) == " the cat<|im_end|>"
    theirs = marked_tokenizer.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
    assert (ids, mask) == (theirs["input_ids"], theirs["assistant_masks"])
    assert encode(with_template(tokenizer, unmarked), [messages])[0] == (ids, mask)


def test_a_tokenizer_that_trims_its_offsets_loses_nothing_of_a_turn(tokenizer):
    open_ended = MARKED.replace(
        " + '<|im_end|>' -}}{%- endgeneration -%}", " -}}{%- endgeneration -%}{{- '<|im_end|>' -}}"
    )
    trimming, other = with_template(tokenizer, open_ended), with_template(tokenizer, open_ended)
    trimming.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    spaces = talk("user: Code?", "assistant:   if x:\n\n        y  ")
    assert encode(trimming, [*ODD, spaces]) == encode(other, [*ODD, spaces])
    assert said(trimming, *encode(trimming, [spaces])[0]) == "  if x:\n\n        y  "
    theirs = trimming.apply_chat_template(spaces, return_dict=True, return_assistant_tokens_mask=True)
    assert theirs["assistant_masks"] != encode(trimming, [spaces])[0][1]  # there is something to lose


def test_eos_ends_what_no_special_token_ends(tokenizer):
    plain = with_template(
        tokenizer,
        "{% for item in messages %}{{ item.role + ': ' + item.content + '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}",
    )
    eos = plain.eos_token_id
    answered, asked = encode(plain, [talk("user: Who?", "assistant: Me."), talk("assistant: Me.", "user: Who?")])
    assert answered[0][-1] == asked[0][-1] == eos
    assert said(plain, *answered) == " Me.\n" + plain.eos_token
    assert said(plain, *asked) == " Me.\n"
    unlearnt = [*talk("user: Who?", "assistant: Me.", "user: You?"), talk("assistant: No.")[0] | {"weight": 0}]
    (ids, mask) = encode(plain, [unlearnt])[0]
    assert ids[-1] == eos and said(plain, ids, mask) == " Me.\n"
    assert all(eos not in ids for ids, _ in encode(tokenizer, ODD))  # these end with <|im_end|>


REFUSED = {  # template, expected part of the error
    "earlier turns are written in another way": (
        "{% for item in messages %}{{ item.content if loop.last or item.role != 'assistant' else '...' }}\n{% endfor %}",
        "file:2: the chat template formats message 3 differently when more",
    ),
    "the prompt is not what the turn begins with": (
        "{% for item in messages %}{{ item.role + ': ' + item.content }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'model: ' }}{% endif %}",
        "file:1: the chat template formats message 2 differently",
    ),
    "the template raises": (
        "{% if messages|length > 2 %}{{ raise_exception('one turn only') }}{% endif %}{% for item in messages %}"
        "{% generation %}{{ item.content }}{% endgeneration %}{% endfor %}",
        "file:2: the chat template refuses this conversation: one turn only",
    ),
    "nothing is marked": (
        "{% for item in messages %}{% if item.role == 'model' %}{% generation %}{{ item.content }}{% endgeneration %}"
        "{% else %}{{ item.content }}<|im_end|>{% endif %}{% endfor %}",
        "file:1: the chat template's {% generation %} marks nothing",
    ),
}


@pytest.mark.parametrize("case", sorted(REFUSED))
def test_a_template_that_hides_the_turns_is_refused_with_the_record(case, tokenizer):
    template, message = REFUSED[case]
    with pytest.raises(UserError) as error:
        encode(with_template(tokenizer, template), [talk("user: a", "assistant: b"), ODD[0]])
    assert message in str(error.value)
    if "differently" in message:
        assert "put {% generation %}" in str(error.value)


def test_conversations_pass_through_one_text_unchanged(conversations):
    rng = random.Random(3)
    letters = ["\n", "\x1d", "\r\n", "user", "é", " ", "👩‍👧", '"', "\\n"]
    for _ in range(300):
        messages = [
            {"role": rng.choice(ROLES), "content": "".join(rng.choices(letters, k=rng.randint(0, 6)))}
            for _ in range(rng.randint(1, 5))
        ]
        assert split_messages(join_messages(messages)) == messages
    assert split_messages(join_messages(talk(f"user: a{SEPARATOR}assistant\nb"))) == talk("user: a assistant\nb")
    assert all(split_messages(join_messages(messages)) == messages for messages in conversations)


def prepare(folder, *arguments):
    code, out, err = call("prepare_data.py", "--output", folder, "--messages_column", "messages", *arguments)
    assert code == 0, err
    return out


def write_lines(path, conversations):
    path.write_text("".join(json.dumps({"messages": messages}) + "\n" for messages in conversations))
    return f"[{path}]"


def documents(folder, split) -> list[tuple[list[int], list[int]]]:
    tokens = open_split(folder, split)
    spans = list(zip(tokens.offsets[:-1].tolist(), tokens.offsets[1:].tolist(), strict=True))
    assert tokens.loss_mask is not None and (tokens.loss_mask.offsets == tokens.offsets).all()
    return [(tokens.read(*span).tolist(), tokens.loss_mask.read(*span).tolist()) for span in spans]


def test_a_dataset_of_conversations_from_its_sources(tmp_path, conversations):
    """Every stored document is a cleaned conversation of the source, as transformers encodes it, in order."""
    conversations = conversations[:800]
    out = prepare(tmp_path / "out", "--sources", write_lines(tmp_path / "a.jsonl", conversations), *TEMPLATE_OPTIONS)
    assert "--objective.name instruction" in out
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out" / "tokenizer")
    assert tokenizer.chat_template == MARKED and len(tokenizer) == 500
    assert [piece for piece in tokenizer.get_vocab() if tokenizer.decoder.decode([piece]).count(SEPARATOR)] == ["Ğ"]
    texts = [join_messages(messages) for messages in conversations]
    batch = {"text": texts, "source": texts, "id": texts}
    cleaned = [split_messages(text) for text in clean_documents(batch, CleaningConfig(), conversations=True)["text"]]
    theirs = tokenizer.apply_chat_template(cleaned, return_dict=True, return_assistant_tokens_mask=True)
    expected = list(zip(theirs["input_ids"], theirs["assistant_masks"], strict=True))
    manifest = load_manifest(tmp_path / "out")
    assert sum(manifest["dropped"].values()) < 10
    position = dict.fromkeys(("train", "validation"), 0)
    stored = {split: documents(tmp_path / "out", split) for split in position}
    for pair in expected:
        for split, place in position.items():
            if place < len(stored[split]) and stored[split][place] == pair:
                position[split] += 1
    assert position == {split: len(pairs) for split, pairs in stored.items()}
    for split, pairs in stored.items():
        figures = manifest["splits"][split]
        assert figures["assistant_tokens"] == sum(sum(mask) for _, mask in pairs) < figures["tokens"]
    assert sum(position.values()) == len(conversations) - sum(manifest["dropped"].values())


def test_a_given_tokenizer_and_every_kind_of_file_give_the_same(tmp_path, conversations, tokenizer):
    with_template(tokenizer, UNMARKED).save_pretrained(tmp_path / "tokenizer")
    chosen = [*ODD, *conversations[:60]]
    folders = {kind: tmp_path / kind for kind in ("jsonl", "json", "parquet", "saved")}
    for folder in list(folders.values())[:3]:
        folder.mkdir()
    write_lines(folders["jsonl"] / "a.jsonl", chosen)
    (folders["json"] / "a.json").write_text(json.dumps([{"messages": messages} for messages in chosen]))
    wide = [[item | {"name": None} for item in messages] for messages in chosen]  # other fields do not count
    pyarrow.parquet.write_table(pa.table({"messages": wide}), folders["parquet"] / "a.parquet")
    datasets.Dataset.from_dict({"messages": wide, "other": [1] * len(wide)}).save_to_disk(folders["saved"])
    found = {}
    for kind, folder in folders.items():
        options = ("--tokenizer.pretrained", tmp_path / "tokenizer", "--cleaning.steps", "[]")
        prepare(tmp_path / f"out_{kind}", "--sources", f"[{folder}]", *options)
        found[kind] = {split: documents(tmp_path / f"out_{kind}", split) for split in ("train", "validation")}
    assert found["jsonl"] == found["json"] == found["parquet"] == found["saved"]
    expected = encode(with_template(tokenizer, UNMARKED), chosen)
    assert sorted(found["json"]["train"] + found["json"]["validation"]) == sorted(expected)


BROKEN = {  # a line, expected part of the reason
    '{"messages": []}': "is an empty list",
    '{"messages": null}': "holds NoneType, not a list of messages",
    '{"messages": "Hello"}': "holds str, not a list of messages",
    '{"text": "Hello"}': "no column 'messages'; it has text (see messages_column)",
    '{"messages": ["Hello"]}': "message 1 is str, not a mapping",
    '{"messages": [{"from": "someone", "value": "Hello"}]}': "message 1 has the role 'someone'; known are system, user",
    '{"messages": [{"role": "assistant", "content": "a", "weight": 0}]}': "to learn: their weights are 0",
    '{"messages": [{"role": "assistant", "content": "a", "weight": 0.5}]}': "message 1 has the weight 0.5",
    '{"messages": [{"role": "assistant", "content": "a"}], "tools": "f"}': "column 'tools' holds text that is not JSON",
    '{"messages": [{"role": "assistant", "content": "a", "content": "b"}]}': "the key 'content' stands twice",
    '{"messages": [{"role": "bot", "content": "Hello"}]}': "message 1 has the role 'bot'",
    '{"messages": [{"role": "user", "content": [{"type": "text"}]}]}': "message 1 has a content of type list, not text",
    '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": null}]}': "message 2 has a content",
    '{"messages": [{"role": "assistant", "content": "", "tool_calls": [{"type": "function"}]}]}': "has tool_calls",
    '{"messages": [{"role": "user", "content": "Hello"}]}': "has no message of the assistant",
    '{"messages": [{"role": "assistant"': "not JSON",
}


def test_records_that_are_no_conversations_are_broken_and_named(tmp_path):
    path = tmp_path / "bad.jsonl"
    good = json.dumps({"messages": ODD[0]})
    path.write_text("\n".join([good, *BROKEN, good]) + "\n")
    read_sources([SourceConfig(path=str(path), name="bad", messages_column="messages")], tmp_path)
    counts = json.loads((tmp_path / "read.json").read_text())
    assert counts["sources"]["bad"]["documents"] == 2 and counts["broken"] == len(BROKEN)
    for line, (record, why) in enumerate(zip(counts["broken_records"], BROKEN.values(), strict=True), start=2):
        assert record["file"] == str(path) and record["why"].startswith(f"line {line}: ") and why in record["why"]
    options = ("--messages_column", "messages", "--sources", f"[{path}]", *TEMPLATE_OPTIONS)
    line = error_line("prepare_data.py", "--output", tmp_path / "out", *options)
    assert "bad.jsonl: line 2: column 'messages' is an empty list; 16 of 18 records are broken" in line


TOOL = [{"type": "function", "function": {"name": "look_up"}}]
REASONED = [*talk("user: Why?"), talk("assistant: Bad.")[0] | {"weight": 0}, *talk("user: Again."),
            talk("assistant: Good.")[0] | {"weight": 1, "reasoning_content": "I think."}]  # fmt: skip


def test_the_stored_form_holds_weights_reasoning_and_tools():
    text = find_conversation({"messages": REASONED, "tools": TOOL}, "messages")
    expected = [{key: value for key, value in item.items() if (key, value) != ("weight", 1)} for item in REASONED]
    assert split_messages(text) == expected and split_tools(text) == TOOL
    assert map_contents(text, str.upper) == join_messages(
        [
            item | {key: item[key].upper() for key in ("content", "reasoning_content") if key in item}
            for item in expected
        ],
        TOOL,
    )
    assert without_system(text) == join_messages(expected)
    for absent in (None, [], ""):
        assert find_conversation({"messages": ODD[0], "tools": absent}, "messages") == join_messages(ODD[0])


@pytest.mark.parametrize("template", [MARKED, UNMARKED])
def test_an_answer_of_weight_0_is_read_but_not_learnt(template, tokenizer):
    messages = [{key: item[key] for key in item if key != "reasoning_content"} for item in REASONED]
    encoder = ConversationEncoder(with_template(tokenizer, template))

    def learnt(conversation):
        table = encoder.encode_table(pa.table({"text": [join_messages(conversation)], "id": ["a"]})).to_pylist()[0]
        ids = np.array(table["input_ids"])
        return ids.tolist(), tokenizer.decode(ids[np.array(table["loss_mask"]) == 1])

    plain = [{key: item[key] for key in ("role", "content")} for item in messages]
    assert learnt(messages)[0] == learnt(plain)[0]
    assert learnt(plain)[1] == "Bad.<|im_end|>Good.<|im_end|>" and learnt(messages)[1] == "Good.<|im_end|>"
    last = [*plain[:3], plain[3] | {"weight": 0}]
    assert learnt(last)[1] == "Bad.<|im_end|>"


def test_tools_and_reasoning_reach_a_template_that_writes_them_and_are_refused_by_others(tokenizer):
    encoder = ConversationEncoder(with_template(tokenizer, MARKED))
    text, turns = encoder.render(join_messages(REASONED, TOOL), "a")
    assert "look_up" in text and [text[start:stop] for start, stop in turns] == [
        "<think>\nI think.\n</think>\nGood.<|im_end|>"
    ]
    encoder = ConversationEncoder(with_template(tokenizer, UNMARKED))
    for conversation, key in ((join_messages(ODD[0], TOOL), "tools"), (join_messages(REASONED), "reasoning_content")):
        with pytest.raises(UserError, match=f"^a.jsonl:1: this conversation has {key}"):
            encoder.render(conversation, "a.jsonl:1")


def test_special_tokens_in_reasoning_and_tools_are_text(tokenizer):
    """As those in contents are: each conversation has the special tokens of the same one with stars in their place."""
    encoder = ConversationEncoder(with_template(tokenizer, MARKED))
    special = set(tokenizer.convert_tokens_to_ids(SPECIAL))

    def encoded(token):
        tools = [{"type": "function", "function": {"name": "look_up", "description": f"x {token} y"}}]
        messages = [*REASONED[:3], REASONED[3] | {"reasoning_content": f"I {token} think."}]
        table = encoder.encode_table(pa.table({"text": [join_messages(messages, tools)], "id": ["a"]}))
        (row,) = table.to_pylist()
        return row["input_ids"], row["loss_mask"], row["spelled"]

    ids, mask, spelled = encoded("<|im_end|>")
    others, *_ = encoded("***")
    assert [token for token in ids if token in special] == [token for token in others if token in special]
    assert spelled == ["<|im_end|>", "<|im_end|>"] and "x <|im_end|> y" in tokenizer.decode(ids)
    assert said(tokenizer, ids, mask) == "<think>\nI <|im_end|> think.\n</think>\nGood.<|im_end|>"


@pytest.mark.parametrize(("at", "stages"), [(1, set()), (150, {"read"})])
def test_parts_that_a_template_does_not_write_are_refused_as_soon_as_they_are_read(at, stages, tmp_path, conversations):
    """Among the first records before a stage begins, and in any case before the next one."""
    records = [{"messages": messages} for messages in conversations[:200]]
    records[at]["tools"] = TOOL
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    template = ["--tokenizer.chat_template", "configs/chat_template_plain.jinja", "--messages_column", "messages"]
    line = error_line(
        "prepare_data.py", "--sources", f"[{tmp_path / 'a.jsonl'}]", "--output", tmp_path / "out", *template
    )
    assert f"a.jsonl:{at + 1}: this conversation has tools, which the chat template does not write" in line
    assert {path.name.split("-")[0] for path in tmp_path.glob(".out.stages/*-*")} == stages


def test_the_forms_of_sharegpt_and_alpaca_are_recognised():
    turns = [{"from": "human", "value": "Why?"}, {"from": "gpt", "value": "Because."}]
    expected = join_messages(talk("system: S", "user: Why?", "assistant: Because."))
    for column in ("conversations", "messages"):
        assert find_conversation({"conversations": turns, "system": "S"}, column) == expected
    alpaca = {"instruction": "Add.", "input": "1 2", "output": "3", "history": [["Hi", "Ho"]]}
    assert find_conversation(alpaca, "messages") == join_messages(
        talk("user: Hi", "assistant: Ho", "user: Add.\n\n1 2", "assistant: 3")
    )
    with pytest.raises(ValueError, match="the role 'function_call'"):
        find_conversation({"conversations": [turns[0], {"from": "function_call", "value": "{}"}]}, "messages")


def test_any_record_is_a_conversation_or_is_broken():
    """Random records in the three forms: a text that can be split and joined again, or a `Broken`; no other error."""
    rng, found = random.Random(0), Counter()
    values = [None, "", "text", 5, 0, 1.5, math.nan, True, [], {}, ["a"], {"a": 1}, [["q", "a"]], [[1, 2]], [None], "{"]
    names = ["user", "assistant", "human", "gpt", "system", 5, ["x"]]
    keys = ["role", "content", "from", "value", "weight", "reasoning_content", "tool_calls"]

    def message() -> object:
        item = {key: rng.choice(values + ["hello"] * 9) for key in keys if rng.random() < 0.6}
        item |= {key: rng.choice(names) for key in ("role", "from") if key in item}
        return item if rng.random() < 0.9 else rng.choice(values)

    source = SourceConfig(path="x", messages_column="messages")
    for _ in range(20_000):
        columns = ["instruction", "input", "output", "history", "system", "tools"]
        record = {name: rng.choice(values + ["text"] * 9) for name in columns if rng.random() < 0.6}
        for name in ("messages", "conversations"):
            if rng.random() < 0.4:
                record[name] = [message() for _ in range(rng.randint(0, 3))]
        document = make_document(record, "file", 1, "line", source)
        found[type(document)] += 1
        if isinstance(document, Document):
            assert join_messages(split_messages(document.text), split_tools(document.text)) == document.text
    assert set(found) == {Document, Broken} and min(found.values()) > 300, found


def test_what_does_not_go_with_conversations_is_refused_in_one_line(tmp_path, tokenizer):
    train_copy(tokenizer).save_pretrained(tmp_path / "tokenizer")
    source = write_lines(tmp_path / "a.jsonl", ODD)
    (tmp_path / "b.txt").write_text("plain text")

    def refused(*arguments):
        return error_line("prepare_data.py", "--output", tmp_path / "out", "--messages_column", "messages", *arguments)

    mixed = json.dumps([str(tmp_path / "a.jsonl"), {"path": str(tmp_path / "b.txt"), "text_column": "text"}])
    assert "b holds plain text, others conversations" in refused("--sources", mixed, *TEMPLATE_OPTIONS)
    assert "cannot be streamed" in refused("--sources", source, "--stream", "true", *TEMPLATE_OPTIONS)
    assert "give tokenizer.pretrained, or tokenizer.chat_template" in refused("--sources", source)
    assert "tokenizer.special_tokens lacks <|im_end|>, <|im_start|>" in refused(
        "--sources", source, *TEMPLATE_OPTIONS[:2], "--validation_fraction", "0.5"
    )
    given = ("--sources", source, "--tokenizer.pretrained", tmp_path / "tokenizer", "--validation_fraction", "0.5")
    assert "has no chat template; give one with tokenizer.chat_template configs/chat_template.jinja" in refused(*given)
    train_tokenizer([["a word"]], vocab_size=300).save_pretrained(tmp_path / "tokenizer")
    line = refused(*given)
    assert "configs/chat_template_plain.jinja" in line
    advised = line.partition("tokenizer.chat_template ")[2].split()[0]
    options = ("--messages_column", "messages", *given[:-1], "0.5", "--tokenizer.chat_template", advised)
    prepare(tmp_path / "advised", *options)
    assert "b.txt: kind text has no column 'messages'" in refused(
        "--sources", f"[{tmp_path / 'b.txt'}]", *TEMPLATE_OPTIONS
    )
    twice = json.dumps([{"path": str(tmp_path / "a.jsonl"), "text_column": "text", "messages_column": "messages"}])
    assert "give either text_column or template or messages_column" in refused("--sources", twice)
    assert not (tmp_path / "out").exists()


def test_steps_change_each_message_and_filters_judge_the_assistant():
    batch = {
        "text": [
            join_messages(talk("user: a\r\nb  ", "assistant: x\u200by \n\n\n\nsch\u00c3\u00b6n")),
            join_messages(talk("user: a long question, longer than the answer", "assistant: Yes.")),
            join_messages(talk("user: a question", "assistant:  \u200b\n")),
        ],
        "source": ["s"] * 3, "id": ["1", "2", "3"],
    }  # fmt: skip
    config = CleaningConfig(steps=["standard", "length"], min_characters=6)
    cleaned = clean_documents(batch, config, conversations=True)
    assert split_messages(cleaned["text"][0]) == talk("user: a\nb", "assistant: xy\n\nschön")
    assert cleaned["reason"][0] == "" and "short" in cleaned["reason"][1] and cleaned["reason"][2] == EMPTY
    assert cleaned["changed"].tolist()[:2] == [0b1011, 0]


def test_a_system_message_that_all_share_makes_no_duplicates(tmp_path, conversations, monkeypatch):
    system = {"role": "system", "content": conversations[0][1]["content"] + " " + conversations[1][1]["content"]}
    brief = [item for item in conversations if sum(len(message["content"]) for message in item) < 120][:200]
    source = write_lines(tmp_path / "a.jsonl", [[system, *messages] for messages in brief])

    prepare(tmp_path / "out", "--sources", source, *TEMPLATE_OPTIONS)
    assert sum(load_manifest(tmp_path / "out")["dropped"].values()) < 20
    assert without_system(join_messages([system, *brief[0]])) == join_messages(brief[0])
    monkeypatch.setattr(prepare_data, "without_system", str)
    options = ("--messages_column", "messages", "--sources", source, *TEMPLATE_OPTIONS)
    _, out, err = call("prepare_data.py", "--output", tmp_path / "without", *options)
    assert int(re.search(r"near duplicate +(\d+)", out + err)[1]) > 190


def test_the_example_makes_the_same_conversations_each_time(tmp_path, instructions, conversations):
    script("examples/make_instructions.py", tmp_path / "again.jsonl")
    assert (tmp_path / "again.jsonl").read_bytes() == instructions.read_bytes()
    assert 2000 < len(conversations) < 3306 and 300 < sum(len(messages) == 4 for messages in conversations) < 900
    for messages in conversations:
        assert [item["role"] for item in messages] == ["user", "assistant"] * (len(messages) // 2)
        assert all(0 < len(item["content"]) <= 700 and "{" not in item["content"] for item in messages)
    docs = (ROOT / "docs" / "data.md").read_text(encoding="utf-8")
    assert f"{len(conversations):,} conversations" in docs
    assert len({messages[0]["content"] for messages in conversations}) > 0.99 * len(conversations)
    assert np.median([len(messages[1]["content"]) for messages in conversations]) > 100


@pytest.mark.parametrize("layout_name", ["best_fit", "padded"])
def test_loss_and_gradients_of_the_assistants_turns_are_transformers_own(layout_name, tokenizer, conversations):
    talks = [item for item in conversations if len(item) > 2][:3] + conversations[:3]
    pairs = encode(tokenizer, talks)
    ids, mask = (np.concatenate([pair[part] for pair in pairs]) for part in (0, 1))
    lengths = np.array([len(pair[0]) for pair in pairs])
    tokens = TokenDataset([ids], lengths, TokenDataset([mask.astype(np.uint8)], lengths))
    longest = int(lengths.max())
    layout = build_layout(tokens, layout_name, longest, pad_token_id=1, vocab_size=len(tokenizer))
    rows = CollatedRows(layout, instruction.collate, seed=0).__getitems__(list(range(len(layout))))

    torch.manual_seed(0)
    sizes = ModelConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, max_position_embeddings=longest)
    model = build_model(sizes, tokenizer)
    loss = Objective(model)(**to_tensors(rows))
    loss.backward()
    ours = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    total = 0.0
    for messages in talks:
        encoded = tokenizer.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
        labels = torch.tensor([encoded["input_ids"]])
        labels[torch.tensor([encoded["assistant_masks"]]) == 0] = -100
        count = int((labels[:, 1:] != -100).sum())
        reference = model(torch.tensor([encoded["input_ids"]]), labels=labels).loss * count
        reference.backward()
        total += float(reference.detach())
    assert float(loss) == pytest.approx(total, rel=1e-5)
    for mine, parameter in zip(ours, model.parameters(), strict=True):
        torch.testing.assert_close(mine, parameter.grad, rtol=1e-4, atol=1e-5 * float(parameter.grad.abs().max()))


@pytest.mark.parametrize("template", [MARKED, (ROOT / "configs" / "chat_template_plain.jinja").read_text("utf-8")])
def test_what_a_model_is_asked_with_is_the_beginning_of_what_it_has_read(template, tokenizer, conversations):
    asking = with_special(tokenizer, template)
    for messages in conversations[:100]:
        asked = asking.apply_chat_template(messages[:1], add_generation_prompt=True, return_dict=True)["input_ids"]
        read = asking.apply_chat_template(messages, return_dict=True)["input_ids"]
        assert read[: len(asked)] == asked


def with_special(tokenizer, template):
    changed = train_copy(tokenizer)
    changed.add_special_tokens({"extra_special_tokens": SPECIAL})
    changed.chat_template = template
    return changed


def test_a_given_tokenizer_must_have_what_the_template_writes(tmp_path, conversations):
    plain = train_tokenizer([["some text"]], algorithm="bpe", vocab_size=300)
    plain.save_pretrained(tmp_path / "plain")
    write_lines(tmp_path / "chats.jsonl", conversations[:40])
    line = error_line(
        "prepare_data.py", "--sources", f"[{tmp_path / 'chats.jsonl'}]", "--messages_column", "messages",
        "--output", tmp_path / "out", "--tokenizer.pretrained", tmp_path / "plain", "--tokenizer.chat_template",
        ROOT / "configs/chat_template.jinja", "--validation_fraction", "0.3",
    )  # fmt: skip
    assert "chat_template writes <|im_end|>, <|im_start|>, which the tokenizer does not have" in line


def test_a_file_whose_every_record_is_broken_is_named_in_one_line(tmp_path):
    """The check of the first records, for what the template does not write, has no record to look at."""
    (tmp_path / "chats.jsonl").write_text('{"messages": [{"role": "user"\n')
    code, _, error = call(
        "prepare_data.py", "--sources", f"[{tmp_path}/chats.jsonl]", "--messages_column", "messages",
        "--output", tmp_path / "data", "--tokenizer.chat_template", ROOT / "configs" / "chat_template.jinja",
        "--tokenizer.special_tokens", "['<|im_start|>', '<|im_end|>']",
    )  # fmt: skip
    assert code == 2 and "chats.jsonl: line 1: not JSON" in error
