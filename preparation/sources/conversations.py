"""Conversations: lists of messages, each list stored as one text.

For each message the text holds U+001E (ASCII's record separator), the role, a newline and the content. So every stage
that works on text also works on conversations, and nothing needs escaping.
"""

from collections.abc import Callable
from typing import Any

ROLES = ("system", "user", "assistant", "tool")
SEPARATOR = "\x1e"


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
        if message.get("tool_calls"):  # these are part of what the assistant says
            return f"message {number} has tool_calls, which are not supported"
        if not isinstance(content, str):
            return f"message {number} has a content of type {type(content).__name__}, not text"
    if not messages:
        return "is an empty list"
    return None if any(item["role"] == "assistant" for item in messages) else "has no message of the assistant"


def join_messages(messages: list[dict[str, str]]) -> str:
    """The text of a conversation, from the role and content of each message. A separator in it becomes a space."""
    return "".join(f"{SEPARATOR}{item['role']}\n{item['content'].replace(SEPARATOR, ' ')}" for item in messages)


def split_messages(text: str) -> list[dict[str, str]]:
    """The inverse of `join_messages`: role and content of each message."""
    parts = (part.partition("\n") for part in text.split(SEPARATOR)[1:])
    return [{"role": role, "content": content} for role, _, content in parts]


def map_contents(text: str, function: Callable[[str], str]) -> str:
    """The conversation with `function` applied to each content."""
    return join_messages([item | {"content": function(item["content"])} for item in split_messages(text)])


def assistant_text(text: str) -> str:
    """All of the assistant's messages, separated by blank lines."""
    return "\n\n".join(item["content"] for item in split_messages(text) if item["role"] == "assistant")


def lacks_content(text: str) -> bool:
    """Whether a message of the user or the assistant is empty: it would teach the model to answer nothing."""
    spoken = (item["content"] for item in split_messages(text) if item["role"] in ("user", "assistant"))
    return not all(map(str.strip, spoken))


def without_system(text: str) -> str:
    """The conversation without the system message at its beginning, which a whole corpus may share: it would make all
    short conversations near duplicates or contaminated. Other text is returned unchanged."""
    if not text.startswith(f"{SEPARATOR}system\n"):
        return text
    return SEPARATOR + text[1:].partition(SEPARATOR)[2]
