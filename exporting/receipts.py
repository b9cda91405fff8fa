"""A receipt for each exported file: the format's own reader, in a fresh process, answers the same questions as the
checkpoint, and the answers are compared. The readers import nothing of ours."""

import json
import math
import subprocess
import sys
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch

from exporting.read_transformers import target_log_probabilities
from utils.data.token_dataset import open_split
from utils.files import read_yaml
from utils.model.build import longest_sequence, stop_token_ids

TEXTS = {
    "English": "The hacker's 1984 terminal won't print 3,141 pages; it's broken.\n\n  (See the manual.)",
    "code": "def f(x):\n\treturn [i**2 for i in range(10) if i != x]  # don't\n",
    "German": "Die Größe des Bären überraschte 12 Förster in Übersee.",
    "emoji": "A 🦙 and a 👩‍🔬 drink ☕️ — 你好!",
}
MESSAGES = [
    {"role": "user", "content": "Define hacker."},
    {"role": "assistant", "content": "A person who enjoys programs."},
    {"role": "user", "content": "And bug?"},
]
ROW_TOKENS, ROWS, NEW_TOKENS, PROMPT_TOKENS = 32, 4, 24, 8  # llama.cpp takes some 40 ms for a position
READERS = {"safetensors": "transformers", "adapter": "transformers", "gguf": "llama_cpp", "onnx": "onnxruntime"}
LIBRARIES = {"llama_cpp": ("xllamacpp", "gguf"), "onnxruntime": ("onnxruntime", "onnx"), "transformers": ("torch", "")}
# The largest difference between log-probabilities; another process may add in another order. llama.cpp computes GELU from
# a table in 16 bits.
DIFFERENCES = {
    "safetensors": 1e-5, "safetensors-bf16": 5e-1, "safetensors-f16": 5e-2, "adapter": 1e-4, "onnx": 1e-4,
    "gguf-f32": 1e-4, "gguf-f32 gpt2": 1e-2, "gguf-f16": 2e-2, "gguf-bf16": 1e-1,
}  # fmt: skip
# The largest relative change of what is rounded to integers, beyond two standard errors: the positions are few.
PERPLEXITIES = {"gguf-q8_0": 0.01, "onnx-int8": 0.02}


@dataclass
class Questions:
    """What each reader is asked, and what the checkpoint answers."""

    asked: dict[str, Any]
    ids: list[list[int]]  # of TEXTS
    chat: str | None  # MESSAGES, rendered for an answer
    chat_ids: list[int] | None
    template: str | None
    log_probabilities: list[list[float]]  # per row, of its targets
    greedy: list[int] = field(default_factory=list)
    margins: list[float] = field(default_factory=list)  # per greedy token, by which its logit exceeds the second


@torch.no_grad()
def ask_checkpoint(model: Any, tokenizer: Any, rows: list[list[int]], opens_with: str, causal: bool) -> Questions:
    """`model` in fp32 on the CPU answers; `rows` are ids of held-out text, each at most as long as the model's positions."""
    template, shift = tokenizer.chat_template, int(causal)
    ids = [tokenizer(text)["input_ids"] for text in TEXTS.values()]
    chat = chat_ids = None
    if template is not None:
        chat = tokenizer.apply_chat_template(MESSAGES, tokenize=False, add_generation_prompt=True)
        chat_ids = tokenizer(chat, add_special_tokens=False)["input_ids"]
    prompt = rows[0][: min(PROMPT_TOKENS, longest_sequence(model) // 2)]
    asked = {
        "opens_with": opens_with, "threads": torch.get_num_threads(), "shift": shift, "texts": list(TEXTS.values()),
        "messages": None if template is None else MESSAGES, "chat": chat, "rows": rows, "prompt": prompt,
        "new_tokens": min(NEW_TOKENS, longest_sequence(model) - len(prompt)), "stop_ids": stop_token_ids(tokenizer),
        "vocabulary": model.config.vocab_size, "positions": min(longest_sequence(model), 512),
    }  # fmt: skip
    found = [target_log_probabilities(model(input_ids=torch.tensor([row])).logits[0], row, shift) for row in rows]
    questions = Questions(asked, ids, chat, chat_ids, template, found)
    while causal and len(questions.greedy) < asked["new_tokens"]:
        logits = model(input_ids=torch.tensor([prompt + questions.greedy])).logits[0, -1]
        best = logits.topk(2)
        questions.greedy.append(int(best.indices[0]))
        questions.margins.append(float(best.values[0] - best.values[1]))
        if questions.greedy[-1] in asked["stop_ids"]:
            break
    return questions


def held_out_rows(checkpoint: Path, model: Any, tokenizer: Any) -> list[list[int]]:
    """The beginnings of validation documents of the run's dataset, or of TEXTS where that is gone: ids, ROWS of them."""
    length = min(ROW_TOKENS, longest_sequence(model))
    path = checkpoint.parent.parent / "config.yaml"
    dataset = read_yaml(path).get("data", {}).get("dataset") if path.is_file() else None
    if dataset is None or not (Path(dataset) / "validation").is_dir():
        return [tokenizer(text)["input_ids"][:length] for text in TEXTS.values()]
    tokens = open_split(dataset, "validation")
    found: list[list[int]] = []
    for start, stop in zip(tokens.offsets[:-1], tokens.offsets[1:], strict=True):
        if stop - start >= min(length, PROMPT_TOKENS) and len(found) < ROWS:
            found.append(tokens.read(int(start), int(min(stop, start + length))).tolist())
    return found or [tokenizer(text)["input_ids"][:length] for text in TEXTS.values()]


def check_file(format: str, path: Path, questions: Questions, architecture: str) -> dict[str, Any]:
    """A row of the report: what the reader of `format` says to the file at `path`, and `faults`, empty if it agrees."""
    reader = READERS[format.partition("-")[0]]
    library, extra = LIBRARIES[reader]
    if find_spec(library) is None:
        return {"receipt": f"not run: install {library} (pip install -e '.[{extra}]')", "faults": []}
    folder = path if path.is_dir() else path.parent  # of this export: another one may be under way beside it
    asked, answered = folder / ".questions.json", folder / ".answers.json"
    asked.write_text(json.dumps(questions.asked), encoding="utf-8")
    script = Path(__file__).resolve().with_name(f"read_{reader}.py")
    try:
        ended = subprocess.run(
            [sys.executable, "-P", script, path, asked, answered], capture_output=True, text=True, errors="replace"
        )
        if ended.returncode or not answered.is_file():
            lines = ended.stderr.strip().splitlines() or [f"it ended with {ended.returncode}"]
            fault = f"{library} cannot read it: {lines[-1][:300]}"
            return {"receipt": f"failed: {fault}", "faults": [fault]}
        answers = json.loads(answered.read_text(encoding="utf-8"))
    finally:
        asked.unlink(missing_ok=True)
        answered.unlink(missing_ok=True)
    return compare(format, answers, questions, architecture)


def compare(format: str, answers: dict[str, Any], questions: Questions, architecture: str) -> dict[str, Any]:
    """The figures and faults of one file."""
    faults = [
        f"the ids of the {name} text are {_first_difference(found, expected)}"
        for name, found, expected in zip(TEXTS, answers["ids"], questions.ids, strict=True)
        if found != expected
    ]
    if questions.chat is not None and questions.chat_ids is not None:
        if answers.get("chat", questions.chat) != questions.chat:
            faults.append(f"the chat template writes {answers['chat'][:80]!r} in place of {questions.chat[:80]!r}")
        if any(template != questions.template for template in answers.get("templates", [])):
            faults.append("the chat template is another one")
        if answers["chat_ids"] != questions.chat_ids:
            faults.append(f"the ids of the chat are {_first_difference(answers['chat_ids'], questions.chat_ids)}")
    difference, before, after, error, count = _differences(answers["log_probabilities"], questions.log_probabilities)
    allowed = DIFFERENCES.get(f"{format} {architecture}", DIFFERENCES.get(format))
    if allowed is not None and not difference <= allowed:
        faults.append(f"log-probabilities differ by {difference:.2e}, more than {allowed:.0e}")
    limit = PERPLEXITIES.get(format, math.inf)
    if not abs(math.log(after / before)) - 2 * error <= math.log1p(limit):
        faults.append(f"the perplexity is {after:.3f} in place of {before:.3f}, more than {limit:.0%} apart")
    row = {
        "reader": answers["reader"], "texts_with_equal_ids": sum(map(list.__eq__, answers["ids"], questions.ids)),
        "chat_template": None if questions.chat is None else "equal",
        "positions": count, "max_log_probability_difference": difference, "allowed": allowed,
        "perplexity_before": before, "perplexity": after, "relative_error_of_perplexity": error,
    }  # fmt: skip
    if questions.greedy:
        equal = _equal_tokens(answers["greedy"], questions.greedy)
        row |= {"greedy_tokens": len(questions.greedy), "greedy_tokens_equal": equal, "stops": all(answers["stops"])}
        # A tie within the allowed difference may fall either way.
        if allowed is not None and equal < len(questions.greedy) and questions.margins[equal] > 2 * allowed:
            faults.append(f"the likeliest text differs at token {equal + 1} of {len(questions.greedy)}")
        for id, stops in zip(questions.asked["stop_ids"], answers["stops"], strict=True):
            if not stops:
                faults.append(f"token {id} does not end the text")
    if questions.chat is not None and any("chat" in fault for fault in faults):
        row["chat_template"] = "differs"
    return row | {"receipt": f"failed: {'; '.join(faults)}" if faults else "passed", "faults": faults}


def _differences(
    found: list[list[float | None]], expected: list[list[float]]
) -> tuple[float, float, float, float, int]:
    """The largest difference, the perplexity before and after, the standard error of the logarithm of their ratio, the
    number of positions that the reader came to."""
    pairs = [
        (a, b)
        for answers, row in zip(found, expected, strict=True)
        for a, b in zip(answers, row, strict=False)
        if a is not None
    ]
    if not pairs:
        return math.nan, math.nan, math.nan, math.nan, 0
    before, after = (math.exp(min(700.0, -sum(pair[i] for pair in pairs) / len(pairs))) for i in (1, 0))
    differences = [a - b for a, b in pairs]
    error = float(np.std(differences) / math.sqrt(len(differences)))
    return max(map(abs, differences), key=lambda x: (math.isnan(x), x)), before, after, error, len(pairs)


def _equal_tokens(found: list[int], expected: list[int]) -> int:
    """The number of equal tokens at the start. A reader that leaves the stop token out has still written it."""
    pairs = enumerate(zip(found, expected, strict=False))
    equal = next((index for index, (a, b) in pairs if a != b), min(len(found), len(expected)))
    return equal + 1 if equal == len(found) == len(expected) - 1 else equal


def _first_difference(found: list[int], expected: list[int]) -> str:
    index = next((i for i, (a, b) in enumerate(zip(found, expected, strict=False)) if a != b), None)
    index = min(len(found), len(expected)) if index is None else index
    return f"{found[index : index + 3]} in place of {expected[index : index + 3]} from number {index} on"
