"""An exported folder's own reader for safetensors: transformers, as anyone opens it. Runs as a process of its own:

python -P exporting/read_transformers.py FOLDER questions.json answers.json
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch
import transformers


def main(folder: str, questions_path: str, answers_path: str) -> None:
    questions = json.loads(Path(questions_path).read_text(encoding="utf-8"))
    torch.set_num_threads(questions["threads"])  # a sum's last bits depend on it
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = getattr(transformers, questions["opens_with"]).from_pretrained(folder).eval()
    answers: dict[str, Any] = {"reader": f"transformers {transformers.__version__}"}
    answers["ids"] = [tokenizer(text)["input_ids"] for text in questions["texts"]]
    if questions["messages"] is not None:
        answers["chat"] = tokenizer.apply_chat_template(
            questions["messages"], tokenize=False, add_generation_prompt=True
        )
        answers["chat_ids"] = tokenizer(answers["chat"], add_special_tokens=False)["input_ids"]
    with torch.no_grad():
        answers["log_probabilities"] = [
            target_log_probabilities(model(input_ids=torch.tensor([row])).logits[0], row, questions["shift"])
            for row in questions["rows"]
        ]
    if questions["shift"]:
        # Not by `generate`: the folder may set a repetition penalty, or beams.
        stops = transformers.GenerationConfig.from_pretrained(folder).eos_token_id
        stops = stops if isinstance(stops, list) else [stops]
        answers["greedy"] = write(model, questions["prompt"], questions["new_tokens"], stops)
        answers["stops"] = [ends(model, questions["prompt"], id, stops) for id in questions["stop_ids"]]
    Path(answers_path).write_text(json.dumps(answers), encoding="utf-8")


@torch.no_grad()
def write(model: Any, prompt: list[int], count: int, stops: list[int]) -> list[int]:
    """The likeliest tokens, one at a time, until a stop token."""
    written: list[int] = []
    while len(written) < count and not (written and written[-1] in stops):
        written.append(int(model(input_ids=torch.tensor([prompt + written])).logits[0, -1].argmax()))
    return written


def ends(model: Any, prompt: list[int], id: int, stops: list[int]) -> bool:
    """Whether `generate` ends a text when the token `id` is forced."""
    model.generation_config = transformers.GenerationConfig(
        eos_token_id=stops, pad_token_id=0, max_new_tokens=3, do_sample=False, sequence_bias=[[[id], 1000.0]]
    )
    ids = torch.tensor([prompt])
    return int(model.generate(ids, attention_mask=torch.ones_like(ids)).shape[1]) == len(prompt) + 1


def target_log_probabilities(logits: torch.Tensor, row: list[int], shift: int) -> list[float]:
    """logits (T, V) → the log-probability of each token of the row, (T - shift,): the next one's, or with shift 0 the
    token's own place."""
    targets = torch.tensor(row[shift:])
    logits = logits[: len(targets)].float().log_softmax(-1)
    return logits.gather(-1, targets[:, None])[:, 0].tolist()


if __name__ == "__main__":
    main(*sys.argv[1:])
