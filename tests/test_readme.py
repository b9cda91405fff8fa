"""Run the README's commands unchanged, in a copy of the repository whose demo is cut to a few steps."""

import json
import os
import re
import shlex
import shutil
import sys
from pathlib import Path

import pytest
from conftest import ROOT, run, script

README = (ROOT / "README.md").read_text(encoding="utf-8")
COMMANDS = [line for block in re.findall(r"```bash\n(.*?)```", README, re.S) for line in block.strip().splitlines()]


TESTED_ELSEWHERE = (
    "make test",  # it includes this test; what it would run is tested below
    "python benchmarks/train.py --quick",  # test_benchmarks.py runs it, on less text
    "make recipe RECIPE=configs/small/code_fim.yaml",  # test_recipes.py runs other recipes
)


def make_copy(folder: Path, max_steps: int | None) -> Path:
    """Copy the tracked files, and add a folder of texts. With `max_steps`, the demo and train.py's defaults make that many
    steps, on an eighteenth of the sample."""
    for name in run("git", "ls-files", cwd=ROOT).stdout.splitlines():
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)
    for name in ("utils/config.py", "configs/demo.yaml") if max_steps is not None else ():
        text, changes = re.subn(
            r"(max_steps: (PositiveInt \| None = )?)\d+", rf"\g<1>{max_steps}", (folder / name).read_text()
        )
        assert changes == 1
        (folder / name).write_text(text)
    (folder / "my_texts").mkdir()
    sample = folder / "sample_data" / "dictionaries.jsonl"
    lines = sample.read_text(encoding="utf-8").splitlines()
    if max_steps is not None:
        sample.write_text("\n".join(lines[::18]), encoding="utf-8")
    for number, line in enumerate(lines[::10]):
        (folder / "my_texts" / f"{number}.txt").write_text(json.loads(line)["text"], encoding="utf-8")
    return folder


def run_in(copy: Path, commands: list[str]) -> dict[str, str]:
    """command → its stdout. A shell runs the first launch with a file, the first without, and `make`, whose own processes
    are forked as all others are."""
    outputs: dict[str, str] = {}
    environment = copy / "environment"  # an active one for `make`
    python = environment / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(f'#!/bin/sh\nexec "{sys.executable}" -I -S "{ROOT / "tests" / "forked_python.py"}" "$@"\n')
    python.chmod(0o755)
    for stamp in (".plainloop-installed", ".plainloop-installed-test"):
        (environment / stamp).touch()  # skip `make`'s first step: everything is installed, or this test could not run
    path = f"{Path(sys.prefix) / 'bin'}{os.pathsep}{os.environ['PATH']}"
    extra = {"VIRTUAL_ENV": str(environment), "PLAINLOOP_PYTHON": str(python), "PATH": path}
    by_shell = {
        (words[0], "--config_file" in words): command
        for command in reversed(commands) if (words := command.split())[0] != "python"
    }  # fmt: skip
    for command in commands:
        words = shlex.split(command)
        launch = words[: words.index("train.py")] if words[0] == "accelerate" else words[:1]
        if command in by_shell.values():
            done = run("bash", "-c", command, cwd=copy, **extra)
        else:
            precision = "bf16" if "bf16" in launch else "no"
            processes = 2 if "accelerate_configs/cpu_2_processes.yaml" in launch else 1
            options = words[len(launch) :]
            done = script(*options, cwd=copy, processes=processes, ACCELERATE_MIXED_PRECISION=precision)
        outputs[command] = done.stdout
    return outputs


@pytest.mark.timeout(2400)
def test_every_command_runs(tmp_path):
    copy = make_copy(tmp_path, max_steps=2)
    short = {command: re.sub(r"--schedule.max_steps \d+", "--schedule.max_steps 2", command) for command in COMMANDS}
    ran = run_in(copy, [short[command] for command in COMMANDS if command not in TESTED_ELSEWHERE])
    outputs = {command: ran[short[command]] for command in COMMANDS if command not in TESTED_ELSEWHERE}
    assert "make demo" in outputs and "make test" in COMMANDS
    last_lines = outputs["make demo"].partition("What came out")[2]
    for words in (
        "loss on held-out text",
        "perplexity",
        "bits per byte",
        "xz -9",
        "tokens per second",
        "largest logit difference",
    ):
        assert words in last_lines
    written = json.loads((copy / "runs/demo/evaluation.json").read_text())["text"]
    assert " ".join(written.split()) in " ".join(last_lines.split())
    resumed = next(text for command, text in outputs.items() if "--checkpoint.resume auto" in command)
    assert "nothing to do" in resumed
    two = json.loads((copy / "runs/two/environment.json").read_text())[0]
    assert two["num_processes"] == 2
    assert "A hacker is" in outputs[next(command for command in COMMANDS if "--prompt" in command)]
    python = re.search(r"```python\n(.*?)```", README, re.S)[1]
    assert "A hacker is" in run(sys.executable, "-I", "-c", python, cwd=copy).stdout


@pytest.mark.slow
@pytest.mark.timeout(2400)
def test_the_demo_beats_xz_by_a_quarter(tmp_path):
    """`make demo` at its full length."""
    run_in(make_copy(tmp_path, max_steps=None), ["make demo"])
    report = json.loads((tmp_path / "runs/demo/evaluation.json").read_text())
    assert report["bits_per_byte"] <= 0.75 * report["xz_bits_per_byte"]
    assert json.loads((tmp_path / "exports/demo/export_report.json").read_text())["max_logit_difference"] <= 1e-5


def test_make_quick_runs_most_tests_without_the_longest():
    planned = run("make", "--dry-run", "quick", VIRTUAL_ENV=str(Path(sys.prefix)), cwd=ROOT).stdout
    marks = re.search(r"pytest -m '(.*)'", planned)[1]
    files = {path.name: path for path in ROOT.glob("tests/**/test_*.py")}
    one_of_each = [files["test_processes.py"], files["test_batches.py"]]
    listed = run(
        sys.executable, "-m", "pytest", "--collect-only", "-q", "-n0", "-m", marks, *one_of_each, cwd=ROOT
    ).stdout
    assert "test_batches.py::" in listed and "test_processes.py::" not in listed


def test_make_test_runs_every_check():
    assert "-m slow" in run("make", "--dry-run", "test-slow", VIRTUAL_ENV=str(Path(sys.prefix))).stdout
    planned = run("make", "--dry-run", "test", VIRTUAL_ENV=str(Path(sys.prefix))).stdout
    for tool in ("ruff check", "ruff format --check", "mypy", "lint_imports", "pytest"):
        assert tool in planned


def test_a_bare_launch_without_data_says_what_to_run_first(tmp_path):
    copy = make_copy(tmp_path, max_steps=6)
    result = script("train.py", cwd=copy, check=False)
    assert result.returncode != 0
    errors = [line for line in result.stderr.splitlines() if line.startswith("train.py: error")]
    assert errors == [
        "train.py: error: dataset data/demo does not exist; make it with: python prepare_data.py --output data/demo"
    ]


def test_links_lead_somewhere():
    for page in [ROOT / "README.md", *ROOT.glob("docs/*.md"), *ROOT.glob("*.md")]:
        for target in re.findall(r"\]\(([^)#]+)\)", page.read_text(encoding="utf-8")):
            assert target.startswith("https://") or (page.parent / target).exists(), (page.name, target)


def test_readme_states_the_length_of_the_loop():
    lines = len((ROOT / "train.py").read_text().splitlines())
    stated = int(re.search(r"It is (\d+) lines", README)[1])
    assert abs(lines - stated) <= 10
