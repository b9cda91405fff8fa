"""Conversations: lists of messages, each list stored as one text.

For each message the text holds U+001E (ASCII's record separator), the role, a newline and the content. So every stage
that works on text also works on conversations, and nothing needs escaping.
"""

import itertools
import json
from collections.abc import Callable
from typing import Any

from preparation.recipe import MARK

ROLES = ("system", "user", "assistant", "tool")
SEPARATOR = "\x1e"
REASONING_KEY = "reasoning_content"
TOOLS, REASONING, UNLEARNT = "tools", "reasoning", "assistant unlearnt"  # in the place of a role; see `join_messages`
# What begins the parts of a stored conversation that only some chat templates write, by their key in a record.
OPTIONAL_PARTS = {TOOLS: f"{SEPARATOR}{TOOLS}\n", REASONING_KEY: f"{SEPARATOR}{REASONING}\n"}
SHAREGPT_ROLES = {  # as in FastChat and LLaMA-Factory
    "human": "user", "user": "user", "gpt": "assistant", "chatgpt": "assistant", "model": "assistant",
    "assistant": "assistant", "system": "system", "tool": "tool", "observation": "tool", "function_response": "tool",
}  # fmt: skip
UNSUPPORTED = ("tool_calls", "function_call", "thinking")  # parts of what the assistant says


def find_conversation(record: dict[str, Any], column: str, *, pictures: bool = False) -> str:
    """The conversation of a record as text: a list of messages in `column`, ShareGPT's in `column` or `conversations`,
    or Alpaca's instruction, input and output. `KeyError` if there is none, `ValueError` if it is not one to learn.
    With `pictures`, a content may be a list of parts, of which one of the type image becomes the mark."""
    if column not in record and {"instruction", "output"} <= record.keys():
        column, messages = "output", _from_alpaca(record)
    else:
        column = "conversations" if column not in record and "conversations" in record else column
        messages = record[column]
        if isinstance(messages, list) and messages and isinstance(messages[0], dict) and "from" in messages[0]:
            messages = _from_sharegpt(record, messages)
    tools = record.get("tools")
    if pictures and isinstance(messages, list):
        messages = [_join_parts(number, item) for number, item in enumerate(messages, start=1)]
    if fault := find_fault(messages):
        raise ValueError(f"column {column!r} {fault}")
    if isinstance(tools, str) and tools.strip():
        try:
            tools = json.loads(tools)
        except ValueError:
            raise ValueError("column 'tools' holds text that is not JSON") from None
    return join_messages(messages, tools or None)


def _join_parts(number: int, message: Any) -> Any:
    """A message whose content is text; one that is no list of parts stays as it is."""
    if not isinstance(message, dict) or not isinstance(message.get("content"), list):
        return message
    texts = []
    for part in message["content"]:
        kind = part.get("type") if isinstance(part, dict) else type(part).__name__
        if kind == "text" and isinstance(part.get("text"), str):
            texts.append(part["text"])
        elif kind == "image":
            texts.append(MARK)
        else:
            raise ValueError(f"message {number} has a part of the type {kind!r}; known are text and image")
    return message | {"content": "".join(texts)}


def _from_sharegpt(record: dict[str, Any], messages: list[Any]) -> list[Any]:
    turns = [
        {"role": SHAREGPT_ROLES.get(item["from"], item["from"]), "content": item.get("value")}
        | {key: value for key, value in item.items() if key not in ("from", "value")}
        if isinstance(item, dict) and isinstance(item.get("from"), str) else item
        for item in messages
    ]  # fmt: skip
    return _system(record) + turns


def _from_alpaca(record: dict[str, Any]) -> list[dict[str, Any]]:
    pairs = record.get("history") or []
    if not isinstance(pairs, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in pairs):
        raise ValueError("column 'history' is not a list of pairs, each what the user and the assistant said")
    parts = [text for key in ("instruction", "input") if (text := record.get(key)) not in (None, "")]
    for part in parts:
        if not isinstance(part, str):
            raise ValueError(f"instruction or input holds {type(part).__name__}, not text")
    said = [text for pair in pairs for text in pair] + ["\n\n".join(parts), record["output"]]
    roles = itertools.cycle(("user", "assistant"))
    return _system(record) + [{"role": role, "content": text} for role, text in zip(roles, said, strict=False)]


def _system(record: dict[str, Any]) -> list[dict[str, Any]]:
    text = record.get("system")
    return [{"role": "system", "content": text}] if isinstance(text, str) and text.strip() else []


def find_fault(messages: Any) -> str | None:
    """Why a record's value is not a conversation to train on; None if it is one."""
    if not isinstance(messages, list):
        return f"holds {type(messages).__name__}, not a list of messages"
    for number, message in enumerate(messages, start=1):
        if not isinstance(message, dict):
            return f"message {number} is {type(message).__name__}, not a mapping with role and content"
        role, content = message.get("role"), message.get("content")
        if role not in ROLES:
            return f"message {number} has the role {role!r}; known are {', '.join(ROLES)}"
        if given := next((key for key in UNSUPPORTED if message.get(key)), None):
            return f"message {number} has {given}, which are not supported"
        if not isinstance(content, str):
            return f"message {number} has a content of type {type(content).__name__}, not text"
        if message.get("weight") not in (None, 0, 1):
            return f"message {number} has the weight {message['weight']!r}; known are 0 and 1"
        reasoning = message.get(REASONING_KEY)
        if reasoning and (role != "assistant" or not isinstance(reasoning, str)):
            return f"message {number} has {REASONING_KEY}, which is only for text of the assistant"
    if not messages:
        return "is an empty list"
    spoken = [item.get("weight") for item in messages if item["role"] == "assistant"]
    if not spoken:
        return "has no message of the assistant"
    return "has no message of the assistant to learn: their weights are 0" if all(w == 0 for w in spoken) else None


def join_messages(messages: list[dict[str, Any]], tools: Any = None) -> str:
    """The text of a conversation, from the role and content of each message. A separator in it becomes a space.

    What else belongs to it stands before: the tools (JSON) before the first message, an assistant's reasoning before
    what it says. An assistant's message of weight 0 has a role of its own.
    """
    parts = [(TOOLS, json.dumps(tools, ensure_ascii=False, default=str))] if tools else []
    for item in messages:
        if item.get(REASONING_KEY):
            parts.append((REASONING, item[REASONING_KEY]))
        is_unlearnt = item["role"] == "assistant" and item.get("weight") == 0
        parts.append((UNLEARNT if is_unlearnt else item["role"], item["content"]))
    return "".join(f"{SEPARATOR}{role}\n{content.replace(SEPARATOR, ' ')}" for role, content in parts)


def split_messages(text: str) -> list[dict[str, Any]]:
    """The inverse of `join_messages`, without the tools: role and content of each message; weight and
    reasoning_content where they were given."""
    messages: list[dict[str, Any]] = []
    reasoning: dict[str, Any] = {}
    for part in text.split(SEPARATOR)[1:]:
        role, _, content = part.partition("\n")
        if role == REASONING:
            reasoning = {REASONING_KEY: content}
        elif role == UNLEARNT:
            messages.append({"role": "assistant", "content": content, "weight": 0} | reasoning)
        elif role != TOOLS:
            messages.append({"role": role, "content": content} | reasoning)
        reasoning = reasoning if role == REASONING else {}
    return messages


def split_tools(text: str) -> Any:
    """The tools of a conversation's text, or None."""
    head = f"{SEPARATOR}{TOOLS}\n"
    return json.loads(text[len(head) :].partition(SEPARATOR)[0]) if text.startswith(head) else None


def map_contents(text: str, function: Callable[[str], str]) -> str:
    """The conversation with `function` applied to each content."""
    keys = ("content", REASONING_KEY)
    changed = [item | {key: function(item[key]) for key in keys if key in item} for item in split_messages(text)]
    return join_messages(changed, split_tools(text))


def assistant_text(text: str) -> str:
    """All of the assistant's messages, separated by blank lines."""
    return "\n\n".join(item["content"] for item in split_messages(text) if item["role"] == "assistant")


def lacks_content(text: str) -> bool:
    """Whether a message of the user or the assistant is empty: it would teach the model to answer nothing."""
    spoken = (item["content"] for item in split_messages(text) if item["role"] in ("user", "assistant"))
    return not all(map(str.strip, spoken))


def without_system(text: str) -> str:
    """The conversation without the tools and the system message at its beginning, which a whole corpus may share: they
    would make all short conversations near duplicates or contaminated. Other text is returned unchanged."""
    for role in (TOOLS, "system"):
        if text.startswith(f"{SEPARATOR}{role}\n"):
            text = SEPARATOR + text[1:].partition(SEPARATOR)[2]
    return text
