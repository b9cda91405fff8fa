"""Rules of the house that a program can check."""

import ast
import importlib
import json
import re
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path

import pytest
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from conftest import ROOT, run, script
from lowest_versions import lower_bounds
from packaging.requirements import Requirement
from packaging.version import Version

TRACKED = [ROOT / name for name in run("git", "ls-files", cwd=ROOT).stdout.splitlines() if (ROOT / name).is_file()]
PYTHON = [path for path in TRACKED if path.suffix == ".py"]
ROOMS = ("utils", "training", "preparation", "exporting", "evaluating")
LAUNCHES = sorted((ROOT / "accelerate_configs").glob("*.yaml"))


def test_functions_stay_short():
    for path in PYTHON:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                length = node.end_lineno - node.lineno + 1
                assert length <= (120 if path.parent == ROOT else 80), (path, node.name, length)


def test_the_training_script_fits_on_a_few_screens():
    source = (ROOT / "train.py").read_text(encoding="utf-8")
    (loop,) = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.While)]
    assert len(source.splitlines()) <= 240 and loop.end_lineno - loop.lineno + 1 <= 70


def imports_of(path: Path) -> Iterator[tuple[str, str]]:
    """(module, name) for each name that a file imports from our rooms, wherever in the file."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] in ROOMS:
            yield from ((str(node.module), alias.name) for alias in node.names)
        if isinstance(node, ast.Import):
            dotted = [alias.name.rpartition(".") for alias in node.names if alias.name.partition(".")[0] in ROOMS]
            yield from ((module, name) for module, _, name in dotted if module)


def file_of(module: str) -> Path:
    path = ROOT / module.replace(".", "/")
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


def test_every_import_of_our_own_finds_its_name():
    """mypy does not say so: it takes a module that is missing for an untyped library."""
    for path in PYTHON:
        if not path.is_relative_to(ROOT / "tests" / "fixtures"):
            for module, name in imports_of(path):
                found = importlib.import_module(module)
                assert hasattr(found, name) or file_of(f"{module}.{name}").exists(), (path, module, name)


def test_utils_holds_only_what_two_scripts_reach():
    scripts = ("prepare_data", "train", "export", "evaluate", "chat")
    reached: dict[str, set[str]] = {}
    for start in scripts:
        todo = [start]
        while todo:
            module = todo.pop()
            for base, name in imports_of(file_of(module)):
                member = f"{base}.{name}"
                imported = member if file_of(member).exists() else base
                if start not in reached.setdefault(imported, set()):
                    reached[imported].add(start)
                    todo.append(imported)
    modules = {".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in (ROOT / "utils").rglob("*.py")}
    for module, path in modules.items():
        module = module.removesuffix(".__init__")
        if module.startswith("utils.objectives."):  # imported by name, with `utils.objectives`
            module = "utils.objectives"
        if module != "utils.training" and path.read_text(encoding="utf-8"):
            assert len(reached.get(module, ())) >= 2, (module, reached.get(module))


def test_prose_lines_of_markdown_stay_within_120_characters():
    """Code blocks, tables and the targets of links may be longer. Pages written by older versions do not count."""
    older = list((ROOT / "tests" / "fixtures").glob("*/"))
    pages = [path for path in TRACKED if path.suffix == ".md" and not any(map(path.is_relative_to, older))]
    assert len(pages) > 10
    for page in pages:
        in_code = False
        for number, line in enumerate(page.read_text(encoding="utf-8").splitlines(), start=1):
            if line.lstrip().startswith("```"):
                in_code = not in_code
            prose = "" if in_code or line.lstrip().startswith("|") else re.sub(r"\]\([^)]*\)", "]", line)
            assert len(prose) <= 120, (page.relative_to(ROOT), number)


@pytest.mark.parametrize("old", ["utils.training.checkpoints", "utils.training.launch_check"])
def test_the_old_commands_answer_with_the_new_ones(old):
    result = script("-m", old, "list", "runs/demo", check=False)
    assert result.returncode != 0 and result.stderr.count("\n") == 1
    assert "python -m utils.checkpoints" in result.stderr and "python -m training.launch" in result.stderr


def test_the_sample_text_is_what_its_readme_says():
    readme = (ROOT / "sample_data" / "README.md").read_text(encoding="utf-8")
    records = [json.loads(line) for line in (ROOT / "sample_data/dictionaries.jsonl").read_text("utf-8").splitlines()]
    assert f"{len(records):,} documents" in readme
    assert f"{sum(len(record['text'].encode()) for record in records) / 1e6:.2f} MB" in readme
    for origin in ("devil", "jargon"):
        count = sum(record["id"].startswith(f"{origin}/") for record in records)
        assert re.search(rf"`{origin}/` \| {count:,} \|", readme)
    assert len({record["id"] for record in records}) == len(records)


@pytest.mark.parametrize("path", LAUNCHES, ids=lambda path: path.stem)
def test_launch_files_are_accepted_by_accelerate_and_explained(path):
    config = load_config_from_file(str(path))
    values = yaml.safe_load(path.read_text())
    assert config.num_processes == values["num_processes"] and isinstance(values["mixed_precision"], str)
    assert all("#" in line for line in path.read_text().splitlines()), "a comment per key"
    assert f"accelerate launch --config_file accelerate_configs/{path.name}" in "".join(
        path.read_text().splitlines()[:3]
    )


def test_constraints_are_what_the_tests_run_with():
    """In an environment made by `make test`, every version is the one in constraints.txt (torch may be another build)."""
    lines = [line.partition("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line]
    pins = {name: pinned for name, _, pinned in lines}
    assert {"torch", "transformers", "accelerate", "datasets", "tokenizers"} <= pins.keys()
    differing = {name: installed for name, pinned in pins.items() if (installed := installed_version(name)) != pinned}
    assert {name for name, installed in differing.items() if installed is not None} <= {"torch"}


def installed_version(name: str) -> str | None:
    """None for what this platform does not need."""
    try:
        return version(name).split("+")[0]
    except PackageNotFoundError:
        return None


def test_our_lower_bounds_are_not_below_those_of_our_dependencies():
    """As far as the installed versions say: of a dependency at its own lower bound, by what it asks of the others.
    tests/lowest_versions.py installs the lowest versions and shows that the code works with them."""
    bounds = lower_bounds()
    assert {"torch", "transformers", "accelerate", "datasets", "tokenizers", "peft"} <= bounds.keys()
    for name, lowest in bounds.items():
        if (installed := installed_version(name)) is None:
            continue
        assert Version(lowest) <= Version(installed), name
        for line in requires(name) or []:
            needed = Requirement(line)
            if needed.name.lower() in bounds and (needed.marker is None or needed.marker.evaluate({"extra": ""})):
                floor = [Version(part.version) for part in needed.specifier if part.operator == ">="]
                # Only the release that is itself the lowest one speaks for its bound.
                if Version(lowest).release[:2] == Version(installed).release[:2]:
                    ours = bounds[needed.name.lower()]
                    assert all(Version(ours) >= least for least in floor), (name, str(needed), ours)
