"""The commands in the comments that begin a recipe: they prepare its data and train. `make recipe` runs them.

    python -m training.recipe configs/small/code_fim.yaml     # further options go to its training

A command is a line that begins with `# python` or `# accelerate`. The one with `--config` and the recipe's own name
trains; the others come before it, in their order. Then evaluate.py scores the run.
"""

import os
import re
import shlex
import sys
from itertools import compress, pairwise
from pathlib import Path

from utils.cli import UserError, parse_config, run_script
from utils.config import TrainConfig
from utils.files import flatten, read_yaml


def list_commands(recipe: Path) -> tuple[list[str], list[str]]:
    """The commands in a recipe's first comments: all, and those that train it."""
    header = re.match(r"(?:#.*\n)*", recipe.read_text(encoding="utf-8"))
    commands = re.findall(r"^# ((?:python|accelerate) .*)$", header[0] if header else "", re.M)
    named = (f"/{command.partition('--config ')[2]}".endswith(f"/{recipe.name}") for command in commands)
    return commands, list(compress(commands, named))


def read_commands(recipe: Path) -> tuple[list[str], str]:
    """The commands that prepare the data, and the one that trains; `UserError` if the file names none."""
    commands, training = list_commands(recipe)
    if len(training) != 1:
        raise UserError(f"{recipe}: its first comments hold no command that trains it, as those in configs/ do")
    return [command for command in commands if command != training[0]], training[0]


def commands_for(dataset: str, argv: list[str]) -> str | None:
    """The commands that make `dataset`, if a recipe among the options `argv` names it and says how; else None."""
    words = [part for word in argv for part in word.split("=", 1)]
    for word, name in pairwise(words):
        if word == "--config" and flatten(read_yaml(Path(name))).get("data.dataset") == dataset:
            commands, training = list_commands(Path(name))
            # Of a copy under another name, the first that trains: it trains the original.
            training = training or [command for command in commands if " train.py " in command][:1]
            return " && ".join(command for command in commands if command not in training) or None
    return None


def main(arguments: list[str]) -> None:
    """Become a shell that runs the commands."""
    usage = "usage: make recipe RECIPE=configs/small/code_fim.yaml"
    if not arguments:
        raise UserError(usage)
    recipe, options = Path(arguments[0]), shlex.join(arguments[1:])
    if not recipe.is_file():
        raise UserError(f"the recipe {recipe} {'is no file' if recipe.exists() else 'does not exist'}; {usage}")
    before, training = read_commands(recipe)
    # Now, not after the data is prepared; it exits with one line.
    output = parse_config(TrainConfig, None, ["--config", str(recipe), *arguments[1:]]).output
    lines = [_again(command) for command in before]
    lines += [f"{_again(training)} {options}".rstrip(), f"python evaluate.py --model {shlex.quote(output)}"]
    shown = "\n".join(f"printf '== %s\\n' {shlex.quote(line)}\n{line}" for line in lines)
    os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    sys.stdout.flush()
    os.execvp("sh", ["sh", "-e", "-c", shown])


def _again(command: str) -> str:
    """`command` so that it can be repeated: a run is continued, and an export that is there stays."""
    words = shlex.split(command)
    if "train.py" in words:  # quiet: a mistake that train.py names needs no traceback of accelerate's
        return f"{command.replace('accelerate launch ', 'accelerate launch --quiet ')} --checkpoint.resume auto"
    if "export.py" in words:
        return f"test -d {shlex.quote(words[words.index('--output') + 1])} || {command}"
    return command


if __name__ == "__main__":
    run_script(main, sys.argv[1:])
