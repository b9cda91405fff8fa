"""A graph's own reader: onnxruntime, with the tokenizer of the folder by `tokenizers`. Runs as a process of its own:

python -P exporting/read_onnxruntime.py FOLDER/onnx/model.onnx questions.json answers.json
"""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from tokenizers import Tokenizer


def main(path: str, questions_path: str, answers_path: str) -> None:
    folder = Path(path).parent.parent
    questions = json.loads(Path(questions_path).read_text(encoding="utf-8"))
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = questions["threads"]
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    answers: dict[str, Any] = {"reader": f"onnxruntime {onnxruntime.__version__}"}
    answers["ids"] = [tokenizer.encode(text).ids for text in questions["texts"]]
    if questions["messages"] is not None:
        # Whoever calls onnxruntime renders the template of the folder; here it is read, not rendered again.
        answers["templates"] = read_templates(folder)
        answers["chat_ids"] = tokenizer.encode(questions["chat"], add_special_tokens=False).ids
    answers["log_probabilities"] = [
        target_log_probabilities(Model(session).read(row), row, questions["shift"]) for row in questions["rows"]
    ]
    if questions["shift"]:
        stops = json.loads((folder / "generation_config.json").read_text(encoding="utf-8"))["eos_token_id"]
        stops = stops if isinstance(stops, list) else [stops]
        answers["greedy"] = write(Model(session), questions["prompt"], questions["new_tokens"], stops)
        answers["stops"] = [id in stops for id in questions["stop_ids"]]
    Path(answers_path).write_text(json.dumps(answers), encoding="utf-8")


class Model:
    """One text, read in parts: each call continues with the cache of the calls before it."""

    def __init__(self, session: Any) -> None:
        self.session, self.length = session, 0
        self.outputs = [output.name for output in session.get_outputs()]
        shapes = {value.name: value.shape for value in session.get_inputs()}
        self.cache = {
            name: np.zeros((1, shape[1], 0, shape[3]), np.float32)
            for name, shape in shapes.items()
            if name.startswith("past_key_values.")
        }

    def read(self, ids: list[int]) -> np.ndarray:
        """ids (T,) → logits (T, V) in double precision."""
        self.length += len(ids)
        inputs = {"input_ids": np.array([ids], np.int64), "attention_mask": np.ones((1, self.length), np.int64)}
        found = dict(zip(self.outputs, self.session.run(None, inputs | self.cache), strict=True))
        self.cache = {name: found[name.replace("past_key_values", "present")] for name in self.cache}
        return found["logits"][0].astype(np.float64)


def write(model: Model, prompt: list[int], count: int, stops: list[int]) -> list[int]:
    """The likeliest tokens, one at a time, until a stop token."""
    written = [int(model.read(prompt)[-1].argmax())]
    while len(written) < count and written[-1] not in stops:
        written.append(int(model.read(written[-1:])[-1].argmax()))
    return written


def target_log_probabilities(logits: np.ndarray, row: list[int], shift: int) -> list[float]:
    """logits (T, V) → (T - shift,), as in read_transformers.py."""
    targets = np.array(row[shift:])
    logits = logits[: len(targets)] - logits[: len(targets)].max(-1, keepdims=True)
    return (logits[np.arange(len(targets)), targets] - np.log(np.exp(logits).sum(-1))).tolist()


def read_templates(folder: Path) -> list[str | None]:
    """The template for transformers and the one for transformers.js, which are in two files."""
    path = folder / "chat_template.jinja"
    config = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    return [path.read_text(encoding="utf-8") if path.is_file() else None, config.get("chat_template")]


if __name__ == "__main__":
    main(*sys.argv[1:])
