"""chat.py: what a user types, and what is printed and kept."""

import json
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT, call, error_line
from tokenizers.processors import TemplateProcessing
from transformers import AutoModelForCausalLM, AutoTokenizer


def talk(monkeypatch, *lines: str, **options: object) -> str:
    """What chat.py prints to someone who types `lines`."""
    typed = iter(lines)

    def type_line(prompt: str) -> str:
        try:
            return next(typed)
        except StopIteration:
            raise EOFError from None

    monkeypatch.setattr("builtins.input", type_line)
    words = [str(word) for name, value in options.items() for word in (f"--{name}", value)]
    code, out, err = call("chat.py", *words)
    assert code == 0, err
    return out


@pytest.fixture(scope="module")
def chat_folder(finished_run, tmp_path_factory):
    """The weights of a run with a chat template; its answers make no sense."""
    folder = tmp_path_factory.mktemp("chat") / "model"
    checkpoint = finished_run / "checkpoints" / "best"
    AutoModelForCausalLM.from_pretrained(checkpoint).save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    tokenizer.chat_template = (ROOT / "configs" / "chat_template_plain.jinja").read_text()
    tokenizer.save_pretrained(folder)
    return folder


def test_a_run_continues_the_text(finished_run, tmp_path, monkeypatch):
    """At temperature 0 the text is the same after /reset; without it the text goes on."""
    saved = tmp_path / "saved.jsonl"
    lines = [
        "/temperature 0",
        "A hacker",
        f"/save {saved}",
        "/reset",
        "A hacker",
        f"/save {saved}",
        " is",
        f"/save {saved}",
    ]
    out = talk(monkeypatch, *lines, model=finished_run, max_new_tokens=8)
    first, second, third = [json.loads(line)["text"] for line in saved.read_text().splitlines()]
    assert first == second and first.startswith("A hacker") and len(first) > 8 and first[8:].strip() in out
    assert third.startswith(f"{first} is")


def test_a_chat_model_answers(chat_folder, tmp_path, monkeypatch):
    saved = tmp_path / "saved.jsonl"
    out = talk(monkeypatch, "Hello", "", "And now?", f"/save {saved}", "/nothing", model=chat_folder, max_new_tokens=4)
    messages = json.loads(saved.read_text())["messages"]
    assert [message["role"] for message in messages] == ["user", "assistant"] * 2
    assert messages[2]["content"] == "And now?" and out.count("/temperature") == 2


def test_the_end_that_a_tokenizer_puts_behind_a_text_is_no_part_of_it(finished_run, tmp_path, monkeypatch):
    """Some tokenizers end every text; a model that has read the end begins another document."""
    checkpoint, folder, saved = finished_run / "checkpoints" / "best", tmp_path / "model", tmp_path / "saved.jsonl"
    shutil.copytree(checkpoint.resolve(), folder, ignore=shutil.ignore_patterns("state.json"))
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    end = (tokenizer.eos_token, tokenizer.eos_token_id)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{end[0]} $A {end[0]}", special_tokens=[end]
    )
    tokenizer.save_pretrained(folder)
    assert AutoTokenizer.from_pretrained(folder)("A hacker")["input_ids"][-1] == tokenizer.eos_token_id
    for model in (finished_run, folder):
        talk(monkeypatch, "A hacker", f"/save {saved}", model=model, temperature=0, max_new_tokens=8)
    first, second = saved.read_text().splitlines()
    assert first == second


def test_mistakes_are_one_line(tmp_path):
    assert "no/such" in error_line("chat.py", "--model", "no/such")
    (tmp_path / "config.json").write_text("{}")  # an export of other formats
    assert "--formats" in error_line("chat.py", "--model", tmp_path)


def test_bytes_that_are_no_text_are_read_as_escapes():
    code = "import utils.cli; print(input())"
    done = subprocess.run([sys.executable, "-c", code], input=b"a\xff\n", capture_output=True, cwd=ROOT)
    assert done.stdout == b"a\\xff\n", done.stderr


def test_the_script_stays_short():
    assert len((ROOT / "chat.py").read_text(encoding="utf-8").splitlines()) <= 120
