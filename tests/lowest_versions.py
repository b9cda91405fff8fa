"""The lowest versions that pyproject.toml allows, as constraints for pip; what only the tests need comes from constraints.txt.

    python3 -m venv /tmp/lowest
    /tmp/lowest/bin/python tests/lowest_versions.py > /tmp/lowest/constraints.txt
    /tmp/lowest/bin/pip install --constraint /tmp/lowest/constraints.txt --editable '.[test]'
    /tmp/lowest/bin/python -m pytest --deselect tests/test_structure.py::test_constraints_are_what_the_tests_run_with

By hand, after a change of a bound or a use of something new in a library. A torch build without CUDA saves gigabytes.
"""

import re
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def lower_bounds() -> dict[str, str]:
    """Package → lowest version, of the dependencies and of the extras but `test`."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = [line for name, lines in project["optional-dependencies"].items() if name != "test" for line in lines]
    pairs = [re.fullmatch(r"([\w.-]+)>=([\d.]+)(,<[\d.]+)?", line) for line in project["dependencies"] + extras]
    return {found[1].lower(): found[2] for found in pairs if found}


def main() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    bounds = lower_bounds()
    for name, version in bounds.items():
        print(f"{name}=={version}")
    tools = {re.split(r"[>=\[]", line)[0].lower() for line in project["optional-dependencies"]["test"]} - bounds.keys()
    for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines():
        if line.partition("==")[0].lower().replace("_", "-") in tools:
            print(line)


if __name__ == "__main__":
    main()
