"""Talk to a model in the terminal: a run, a checkpoint or an export.

    python chat.py --model exports/demo

With a chat template the model answers, else it continues the text. \\n is a new line; Ctrl-C stops an answer.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from utils.checkpoints import find_checkpoint
from utils.cli import NonNegativeFloat, PositiveInt, UserError, parse_config, run_script
from utils.pretrained import chat_ids, check_adapters, check_weights, prompt_ids, read_tokenizer

COMMANDS = "/reset starts anew, /temperature NUMBER, /save FILE appends a record for prepare_data.py; Ctrl-D ends"


@dataclass
class ChatConfig:
    """Options of chat.py; the defaults are the demo's."""

    model: str = "exports/demo"
    """Run folder (its best checkpoint), checkpoint folder or export folder."""
    temperature: NonNegativeFloat = 0.6
    """Sampling temperature. 0 takes the likeliest token."""
    max_new_tokens: PositiveInt = 128
    """Longest answer, in tokens."""

    @property
    def folder(self) -> Path:
        path = Path(self.model)
        return (
            path if (path / "config.json").is_file() and not (path / "state.json").is_file() else find_checkpoint(path)
        )

    def problems(self) -> list[str]:
        check_weights(self.folder)
        check_adapters(self.folder)
        return []


config = parse_config(ChatConfig, __doc__) if __name__ == "__main__" else None

import torch
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedModel, TextStreamer

from utils.model.build import load_model, longest_sequence, pad_token_id, saved_class, stop_token_ids


def main(config: ChatConfig) -> None:
    model, tokenizer = load_model(config.folder), read_tokenizer(config.folder)
    if saved_class(model.config) is not AutoModelForCausalLM:
        raise UserError(f"{config.model}: {type(model).__name__} does not continue a text")
    model.to(torch.accelerator.current_accelerator() or "cpu").eval()  # type: ignore[arg-type]
    chat, temperature = tokenizer.chat_template is not None, config.temperature
    record: dict[str, Any] = {"messages": []} if chat else {"text": ""}  # as prepare_data.py reads it
    print(f"{config.folder} {'answers' if chat else 'continues your text'}. {COMMANDS}.")
    while (line := read_line()) is not None:
        command, _, value = line.partition(" ")
        if command == "/reset":
            record = {"messages": []} if chat else {"text": ""}
        elif command == "/temperature" and value.replace(".", "", 1).isdecimal():
            temperature = float(value)
        elif command == "/save" and value:
            save(record, value)
        elif command.startswith("/"):
            print(COMMANDS)
        elif chat and line.strip():
            messages = [*record["messages"], {"role": "user", "content": line}]
            ids = chat_ids(tokenizer, messages, add_generation_prompt=True)
            answer = write(model, tokenizer, ids, temperature, config)
            record["messages"] = [*messages, {"role": "assistant", "content": answer}]
        elif not chat:
            text = record["text"] + line
            record["text"] = text + write(model, tokenizer, prompt_ids(tokenizer, text), temperature, config)


def read_line() -> str | None:
    try:
        return input("> ").replace("\\n", "\n")
    except EOFError:
        return print()


def save(record: dict[str, Any], file: str) -> None:
    try:
        with Path(file).open("a", encoding="utf-8") as lines:
            lines.write(json.dumps(record, ensure_ascii=False) + "\n")
    except OSError as error:
        print(f"cannot write {file}: {error.strerror}")


class Printer(TextStreamer):
    text = ""  # the answer, which it prints word by word

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        self.text += text
        print(text, end="\n" if stream_end else "", flush=True)


def write(model: PreTrainedModel, tokenizer: Any, ids: list[int], temperature: float, config: ChatConfig) -> str:
    """Print and return what the model writes after `ids`; their end counts if all of them leave no room for it."""
    room = longest_sequence(model)
    ids = ids[-max(1, room - config.max_new_tokens) :] or [tokenizer.eos_token_id]
    inputs, printer = torch.tensor([ids], device=model.device), Printer(tokenizer, True, skip_special_tokens=True)
    model.generation_config = GenerationConfig(
        eos_token_id=stop_token_ids(tokenizer), pad_token_id=pad_token_id(tokenizer), do_sample=temperature > 0,
        temperature=temperature or None, max_new_tokens=min(config.max_new_tokens, room - len(ids)),
    )  # fmt: skip
    try:
        model.generate(inputs, attention_mask=torch.ones_like(inputs), streamer=printer)  # type: ignore[operator]
    except KeyboardInterrupt:
        print()
    return printer.text


if __name__ == "__main__":
    run_script(main, config)
