"""A GGUF file's own reader: llama.cpp, by the server in the wheel `xllamacpp`. Runs as a process of its own:

    python -P exporting/read_llama_cpp.py model.gguf questions.json answers.json

The cache of keys and values is f32 and flash attention off, so that only the file's own precision counts.
"""

import http.client
import json
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import xllamacpp

SECONDS = 120.0  # to read log-probabilities; a position of a large vocabulary takes up to a second


def main(path: str, questions_path: str, answers_path: str) -> None:
    questions = json.loads(Path(questions_path).read_text(encoding="utf-8"))
    server = serve(path, questions["positions"], questions["threads"])
    address = server.listening_address.rpartition("/")[2]

    def post(route: str, **body: Any) -> Any:
        connection = http.client.HTTPConnection(address, timeout=600)
        connection.request("POST", route, json.dumps(body), {"Content-Type": "application/json"})
        answer = json.loads(connection.getresponse().read())
        if "error" in answer:
            raise SystemExit(f"llama.cpp: {route}: {answer['error'].get('message')}")
        return answer

    def tokenize(text: str, special: bool = True) -> list[int]:
        return post("/tokenize", content=text, add_special=special, parse_special=True)["tokens"]

    answers: dict[str, Any] = {"reader": f"llama.cpp (xllamacpp {version('xllamacpp')})"}
    answers["ids"] = [tokenize(text) for text in questions["texts"]]
    if questions["messages"] is not None:
        answers["chat"] = post("/apply-template", messages=questions["messages"])["prompt"]
        answers["chat_ids"] = tokenize(answers["chat"], special=False)
    # llama.cpp gives no probabilities with an end of text or half a character, so a letter is forced. The probabilities
    # are from before that bias.
    letter = tokenize("a", special=False)[0]
    answers["log_probabilities"] = []
    deadline = time.monotonic() + SECONDS
    for row in questions["rows"]:
        answers["log_probabilities"].append([])
        for position in range(1, len(row)):
            if time.monotonic() > deadline:
                break
            found = post("/completion", prompt=row[:position], n_predict=1, n_probs=questions["vocabulary"],
                         temperature=0.0, cache_prompt=True, logit_bias=[[letter, 1000.0]])  # fmt: skip
            top = found["completion_probabilities"][0]["top_logprobs"]
            answers["log_probabilities"][-1].append(
                next((token["logprob"] for token in top if token["id"] == row[position]), None)
            )
    count = questions["new_tokens"]
    answers["greedy"] = post(
        "/completion", prompt=questions["prompt"], n_predict=count, temperature=0.0, return_tokens=True
    )["tokens"]
    answers["stops"] = [
        post("/completion", prompt=questions["prompt"], n_predict=count, temperature=0.0, logit_bias=[[id, 1000.0]])[
            "stop_type"
        ]
        == "eos"
        for id in questions["stop_ids"]
    ]
    Path(answers_path).write_text(json.dumps(answers), encoding="utf-8")


def serve(path: str, positions: int, threads: int) -> Any:
    params = xllamacpp.CommonParams()
    params.model.path = path
    params.n_ctx = positions
    params.n_parallel = 1
    params.n_predict = -1
    params.warmup = False
    # Its threads wait for each other by polling, so one more than there are free cores makes it many times slower.
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
    params.verbosity = -1
    params.port = 0
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    return xllamacpp.Server(params)


if __name__ == "__main__":
    main(*sys.argv[1:])
