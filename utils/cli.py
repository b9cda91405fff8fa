"""From the command line to a checked configuration: defaults, then YAML files, then flags.

No torch and no datasets here: --help and a typing mistake answer in a fraction of a second.
"""

import contextlib
import dataclasses
import difflib
import json
import math
import os
import re
import sys
import time
import traceback
import typing
from argparse import ArgumentError
from collections.abc import Callable, Iterable
from itertools import pairwise
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import yaml
from jsonargparse import ArgumentParser, get_loader, set_loader, set_parsing_settings

from utils.files import UserError, parse_yaml, read_yaml, replace_text

Config = TypeVar("Config")
PARENT = os.getppid()  # at the start, before the slow imports: a launcher that dies meanwhile has been there
LONGEST_ERROR = 2000  # characters of a message, which may quote a file
# What gloo, NCCL and torch's store say when a peer's process has ended.
PEER_GONE = re.compile(
    r"closed by peer|reset by peer|broken pipe|remote process exited|communicator was aborted|got 0 bytes", re.I
)

set_parsing_settings(docstring_parse_attribute_docstrings=True)
load_text = get_loader("yaml")


def load_bounded(text: str) -> Any:
    """jsonargparse's own reading of a file or value, once ours has found it to be within bounds."""
    parse_yaml(text)
    return load_text(text)


set_loader("yaml", load_bounded, exceptions=(yaml.YAMLError,))


# What `main` opens and a later line of it may never come to close: locks, threads, files. Undone in reverse order, however
# `main` ends; what is entered here learns of the error, too.
at_exit = contextlib.ExitStack()


def run_script(main: Callable[[Any], None], config: object) -> None:
    """Call `main(config)`; a `UserError` or `OSError` becomes one line on stderr and exit code 2."""
    try:
        with at_exit:
            main(config)
    except BrokenPipeError:  # who read our output has stopped reading, as `| head` does
        os._exit(141)
    except (UserError, OSError) as error:  # an OSError here is a disk or a permission, and names its file
        exit_with(error)
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as error:
        if "RANK" not in os.environ:
            raise
        # One of several ranks. The others wait for it in a collective: it must not wait for them in its destructors.
        if PEER_GONE.search(str(error)):
            exit_with(f"another rank has gone, and this one with it; its own message says why ({error})", code=1)
        traceback.print_exc()
        os._exit(1)


def exit_with(error: Exception | str, code: int = 2) -> NoReturn:
    """Print `error` as one line and end this process."""
    rank = os.environ.get("RANK", "0")
    prefix = ""
    if rank != "0":  # most mistakes meet all ranks: the launcher ends this one before it says the same again
        time.sleep(3)
        prefix = f"[rank {rank}] "
    message = "".join(char if char.isprintable() else "\ufffd" for char in " ".join(str(error).split()))
    message = message if len(message) <= LONGEST_ERROR else f"{message[:LONGEST_ERROR]}…"
    print(f"{prefix}{Path(sys.argv[0]).name}: error: {message}", file=sys.stderr, flush=True)
    # Not sys.exit: with collectives under way, interpreter shutdown may wait for peers that are not coming.
    if "RANK" in os.environ:
        os._exit(code)
    sys.exit(code)


def nearest(name: object, known: Iterable[str]) -> str:
    """` (did you mean X?)` with the known name that has `name` as its last part, or the most similar one, or nothing."""
    known = list(known)
    found = [option for option in known if option.endswith("." + str(name).lstrip("-"))]
    found = found or difflib.get_close_matches(str(name), known, n=1, cutoff=0.5)
    return f" (did you mean {found[0]}?)" if found else ""


def parse_config(cls: type[Config], description: str | None, argv: list[str] | None = None) -> Config:
    """Read `--config FILE` and flags into `cls`; exit with one line if a name, a type or a value is wrong."""
    argv = sys.argv[1:] if argv is None else argv
    try:
        return _parse(cls, description, argv)
    except UserError as error:
        exit_with(error)


def _parse(cls: type[Config], description: str | None, argv: list[str]) -> Config:
    parser = ArgumentParser(
        exit_on_error=False, allow_abbrev=False, default_env=False, add_help=True,
        description=(description or "").strip().split("\n\n")[0],
    )  # fmt: skip
    parser.add_argument("--config", action="config", help="YAML file with any of the options below; flags win.")
    parser.add_class_arguments(cls)
    argv = _complete_switches(argv, cls)
    names = sorted(action.dest for action in parser._actions if action.dest not in ("help", "config", "print_config"))
    for path in _config_paths(argv):
        _check_yaml(parser, path, names)
    try:
        namespace = parser.parse_args(argv)
    except ArgumentError as error:
        raise UserError(_one_line(str(error), names)) from None
    namespace.pop("config", None)
    for item in dataclasses.fields(cls):  # type: ignore[arg-type]
        if dataclasses.is_dataclass(item.type) and namespace[item.name] is None:
            raise UserError(f"{item.name} is null; leave the section out, or give it options")
    config = cls(**vars(parser.instantiate(namespace)))
    problems = find_problems(config)
    if problems:
        raise UserError("; ".join(problems))
    return config


def _complete_switches(argv: list[str], cls: type) -> list[str]:
    """`--dry_run` is short for `--dry_run true`, for the options of type bool outside of sections."""
    switches = {f"--{item.name}" for item in dataclasses.fields(cls) if item.type is bool}
    completed = []
    for flag, value in pairwise([*argv, "--"]):
        completed += [flag, "true"] if flag in switches and value.startswith("--") else [flag]
    return completed


def _config_paths(argv: list[str]) -> list[Path]:
    paths = [Path(value) for flag, value in pairwise(argv) if flag == "--config"]
    return paths + [Path(flag.partition("=")[2]) for flag in argv if flag.startswith("--config=")]


def _check_yaml(parser: ArgumentParser, path: Path, names: list[str]) -> None:
    """Parse one file by itself, so that its mistakes are reported under its name."""
    if not path.is_file():
        raise UserError(f"--config {path}: no such file" if not path.exists() else f"--config {path}: not a file")
    try:
        read_yaml(path)
        parser.parse_path(path)
    except (yaml.YAMLError, TypeError, ArgumentError) as error:
        raise UserError(f"{path}: {_one_line(str(error), names)}") from None


def _one_line(message: str, names: list[str]) -> str:
    """jsonargparse's message on one line, with the nearest option name where a name is unknown."""
    message = " ".join(message.split())
    message = re.sub(r"<class '([\w.]+)'>", r"\1", message).replace("typing.", "")
    message = re.sub(r"Expected a list\. Got value: (\[.*)", r"Expected a list. Got \1: put '…' around it", message)
    message = re.sub(r"Expected a list\. Got value: (.*)", r"Expected a list. Write '[\1]'", message)
    message = re.sub(
        r"Does not validate .*? Subtypes: \[(\w+), NoneType\].*Given value: (.*)",
        r"Expected \1 or null. Got value: \2",
        message,
    )
    if match := re.match(r'Parser key "(.+?)": (.*)', message):
        return f"{match[1]}: {match[2]}"
    if match := re.match(r"unrecognized arguments: (\S+)", message):
        flag = match[1].partition("=")[0]
        if not flag.startswith("--"):
            return f"unexpected argument {flag!r}; options are written --name value"
        return f"unknown option {flag}{_nearest(flag.lstrip('-'), names, '--')}; --help lists all"
    if match := re.match(r"Group '(.+)' does not accept option '(.+)'", message):
        key = f"{match[1]}.{match[2]}"
        return f"unknown option {key}{_nearest(key, names, '')}; --help lists all"
    if match := re.match(r"Option '(.+?)' is not accepted", message):
        return f"unknown option {match[1]}{_nearest(match[1], names, '')}; --help lists all"
    return message


def _nearest(name: str, names: list[str], dashes: str) -> str:
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    close = close or [option for option in names if option.endswith("." + name)][:1]
    return f" (did you mean {dashes}{close[0]}?)" if close else ""


def find_problems(config: object, section: str = "") -> list[str]:
    """What `problems()` of every section says, and every number that is not finite."""
    found: list[str] = []
    nulls: list[str] = []
    for item in dataclasses.fields(config):  # type: ignore[arg-type]
        value = getattr(config, item.name)
        if dataclasses.is_dataclass(value):
            found += find_problems(value, f"{section}{item.name}.")
        elif value is None and type(None) not in typing.get_args(item.type):
            nulls.append(f"{section}{item.name} is null; it needs a value")
        elif isinstance(value, float) and not math.isfinite(value):
            found.append(f"{section}{item.name} is {value}; it must be a finite number")
    if nulls:  # `problems()` compares values
        return found + nulls
    return found + (config.problems() if hasattr(config, "problems") else [])


def at_least(section: str, config: object, **minimum: float) -> list[str]:
    """One line per field of `config` that is set and below its minimum."""
    prefix = section + "." if section else ""
    return [
        f"{prefix}{name} is {getattr(config, name)}; it must be at least {low}"
        for name, low in minimum.items()
        if getattr(config, name) is not None and getattr(config, name) < low
    ]


def parse_values(cls: type[Config], values: dict[str, Any], where: str) -> Config:
    """`values`, such as `save_config` wrote, as a checked `cls`; what they lack has its default. `where` names them."""
    parser = ArgumentParser(exit_on_error=False, allow_abbrev=False, default_env=False)
    parser.add_class_arguments(cls)
    try:
        values = parse_yaml(json.dumps(values, default=str))  # within the same bounds, wherever they come from
        config = cls(**vars(parser.instantiate(parser.parse_object(values))))
    except (ArgumentError, TypeError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise UserError(f"{where}: {_one_line(str(error), [])}") from None
    if problems := find_problems(config):
        raise UserError(f"{where}: {'; '.join(problems)}")
    return config


def parse_sections(cls: type[Config], values: Any, where: Path) -> Config:
    """The sections of a configuration in the file `where` that `cls` has."""
    if not isinstance(values, dict) or not isinstance(values.get("data"), dict):
        raise UserError(f"{where}: is not a run's configuration (it has no section `data`)")
    names = [item.name for item in dataclasses.fields(cls)]  # type: ignore[arg-type]
    return parse_values(cls, {name: values[name] for name in names if name in values}, str(where))


def save_config(config: object, path: Path) -> None:
    """Write the resolved configuration; the file runs again as `--config`."""
    values = dataclasses.asdict(config)  # type: ignore[call-overload]
    replace_text(path, yaml.safe_dump(values, sort_keys=False, allow_unicode=True))
