"""The commands in the comments that begin a recipe: they prepare its data and train. `make recipe` runs them.

    python -m training.recipe configs/small/code_fim.yaml     # further options go to its training

A command is a line that begins with `# python` or `# accelerate`. The one with `--config` and the recipe's own name
trains; the others come before it, in their order. Then evaluate.py scores the run.
"""

import os
import re
import shlex
import sys
from itertools import pairwise
from pathlib import Path

from utils.cli import UserError, run_script
from utils.files import flatten, read_yaml


def read_commands(recipe: Path) -> tuple[list[str], str]:
    """The commands that prepare the data, and the one that trains; `UserError` if the file names none."""
    header = re.match(r"(?:#.*\n)*", recipe.read_text(encoding="utf-8"))
    commands = re.findall(r"^# ((?:python|accelerate) .*)$", header[0] if header else "", re.M)
    training = [command for command in commands if f"/{command.partition('--config ')[2]}".endswith(f"/{recipe.name}")]
    if len(training) != 1:
        raise UserError(f"{recipe}: its first comments hold no command that trains it, as those in configs/ do")
    return [command for command in commands if command != training[0]], training[0]


def commands_for(dataset: str, argv: list[str]) -> str | None:
    """The commands that make `dataset`, if a recipe among the options `argv` names it and says how; else None."""
    words = [part for word in argv for part in word.split("=", 1)]
    for word, name in pairwise(words):
        if word == "--config" and flatten(read_yaml(Path(name))).get("data.dataset") == dataset:
            try:
                return " && ".join(read_commands(Path(name))[0]) or None
            except UserError:
                return None
    return None


def main(arguments: list[str]) -> None:
    """Become a shell that runs the commands."""
    if not arguments or not Path(arguments[0]).is_file():
        raise UserError("usage: make recipe RECIPE=configs/small/code_fim.yaml")
    recipe, options = Path(arguments[0]), shlex.join(arguments[1:])
    before, training = read_commands(recipe)
    output = flatten(read_yaml(recipe)).get("output", "runs/demo")
    for name, value in pairwise(part for word in arguments[1:] for part in word.split("=", 1)):
        output = value if name == "--output" else output
    lines = [_again(command) for command in before]
    lines += [f"{_again(training)} {options}".rstrip(), f"python evaluate.py --model {shlex.quote(output)}"]
    shown = "\n".join(f"printf '== %s\\n' {shlex.quote(line)}\n{line}" for line in lines)
    os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    sys.stdout.flush()
    os.execvp("sh", ["sh", "-e", "-c", shown])


def _again(command: str) -> str:
    """`command` so that it can be repeated: a run is continued, and an export that is there stays."""
    words = shlex.split(command)
    if "train.py" in words:
        return f"{command} --checkpoint.resume auto"
    if "export.py" in words:
        return f"test -d {shlex.quote(words[words.index('--output') + 1])} || {command}"
    return command


if __name__ == "__main__":
    run_script(main, sys.argv[1:])
