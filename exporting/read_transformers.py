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
        prompt = torch.tensor([questions["prompt"]])
        options = {"attention_mask": torch.ones_like(prompt), "do_sample": False}
        written = model.generate(prompt, max_new_tokens=questions["new_tokens"], **options)
        answers["greedy"] = written[0, prompt.shape[1] :].tolist()
        # A bias of 1000 forces the token, which must end the text: one new token, not two.
        answers["stops"] = [
            model.generate(prompt, max_new_tokens=2, sequence_bias=[[[id], 1000.0]], **options).shape[1]
            == prompt.shape[1] + 1
            for id in questions["stop_ids"]
        ]
    Path(answers_path).write_text(json.dumps(answers), encoding="utf-8")


def target_log_probabilities(logits: torch.Tensor, row: list[int], shift: int) -> list[float]:
    """logits (T, V) → the log-probability of each token of the row, (T - shift,): the next one's, or with shift 0 the
    token's own place."""
    targets = torch.tensor(row[shift:])
    logits = logits[: len(targets)].float().log_softmax(-1)
    return logits.gather(-1, targets[:, None])[:, 0].tolist()


if __name__ == "__main__":
    main(*sys.argv[1:])
