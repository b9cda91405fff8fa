"""From the command line to a checked configuration: defaults, then YAML files, then flags. Imports no torch, so that
`--help` and a typing mistake answer in a fraction of a second."""

import contextlib
import dataclasses
import difflib
import functools
import io
import logging
import math
import operator
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
from typing import Annotated, Any, NoReturn, TypeVar

import yaml
from jsonargparse import ArgumentParser, DefaultHelpFormatter, get_loader, set_loader, set_parsing_settings

from utils.files import UserError, parse_yaml, read_yaml, replace_text

Config = TypeVar("Config")
# Types of options with bounds, which `find_problems` checks.
PositiveInt = Annotated[int, ">= 1"]
NonNegativeInt = Annotated[int, ">= 0"]
PositiveFloat = Annotated[float, "> 0"]
NonNegativeFloat = Annotated[float, ">= 0"]
Fraction = Annotated[float, ">= 0 and <= 1"]
BelowOne = Annotated[float, ">= 0 and < 1"]
Seed = Annotated[int, ">= 0 and < 4294967296"]  # 32 bits, which numpy takes at most
COMPARISONS = {">": operator.gt, ">=": operator.ge, "<": operator.lt, "<=": operator.le}

PRECISIONS = ("no", "bf16", "fp16", "fp8")  # accelerate's names
LAUNCHER_PID = os.getppid()  # read before the slow imports, during which the launcher may die
LONGEST_ERROR = 2000  # characters of a message, which may quote a file
# What gloo, NCCL and torch's store say when a peer's process has ended.
PEER_GONE = re.compile(
    "(closed|reset) by peer|broken pipe|remote process exited|communicator was aborted|got 0 bytes", re.I
)

# A console that is not UTF-8 shows `\xd7` for `×`; otherwise printing it would end a run. The same for what is typed.
for stream in (sys.stdin, sys.stdout, sys.stderr):
    if isinstance(stream, io.TextIOWrapper):
        with contextlib.suppress(OSError):  # a pipe that took the place of a file
            stream.reconfigure(errors="backslashreplace")

# transformers imports torchao where it is installed; it logs kernels for other GPUs, and torch a deprecation in it.
for name in ("torchao", "torch.utils._pytree"):
    logging.getLogger(name).setLevel(logging.ERROR)

# Cleanup that must always run, in reverse order: `main` enters its locks, threads and files here.
at_exit = contextlib.ExitStack()


def run_script(main: Callable[[Any], None], config: object) -> None:
    """Call `main(config)`. A `UserError` or `OSError` becomes one line on stderr and exit code 2."""
    try:
        with at_exit:
            main(config)
    except BrokenPipeError:  # the reader of our output has stopped, as `| head` does
        os._exit(141)
    except (UserError, OSError) as error:  # an OSError here is a disk or a permission, and names its file
        exit_with(error)
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as error:
        if "RANK" not in os.environ:
            raise
        # Other ranks may wait for this one in a collective, so it must not wait for them in a destructor.
        if PEER_GONE.search(str(error)):
            exit_with(f"another rank has ended, so this one ends too; its own message says why ({error})", code=1)
        traceback.print_exc()
        os._exit(1)


def exit_with(error: Exception | str, code: int = 2) -> NoReturn:
    """Print `error` as one line and end this process."""
    rank, prefix = os.environ.get("RANK", "0"), ""
    if rank != "0":  # most mistakes occur on all ranks: the launcher ends this one before it repeats the message
        time.sleep(3)
        prefix = f"[rank {rank}] "
    message = "".join(char if char.isprintable() else "\ufffd" for char in " ".join(str(error).split()))
    message = message if len(message) <= LONGEST_ERROR else f"{message[:LONGEST_ERROR]}…"
    print(f"{prefix}{Path(sys.argv[0]).name}: error: {message}", file=sys.stderr, flush=True)
    # Not sys.exit: with collectives under way, interpreter shutdown may wait for peers that never come.
    if "RANK" in os.environ:
        os._exit(code)
    sys.exit(code)


def read_precision() -> str:
    """The precision that the launch asks for; `UserError` for a name with which accelerate would go on all the same."""
    precision = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if precision not in PRECISIONS:
        raise UserError(f"ACCELERATE_MIXED_PRECISION is {precision}; it is one of {', '.join(PRECISIONS)}")
    return precision


def nearest(name: object, known: Iterable[str]) -> str:
    """` (did you mean X?)` with the known name that has `name` as its last part, or the most similar one, or ""."""
    known = list(known)
    found = [option for option in known if option.endswith("." + str(name).lstrip("-"))]
    found = found or difflib.get_close_matches(str(name), known, n=1, cutoff=0.5)
    return f" (did you mean {found[0]}?)" if found else ""


# ---- jsonargparse, with plain YAML, bounds in the help and errors of one line


class HelpFormatter(DefaultHelpFormatter):
    """Shows `Annotated[int, ">= 1"]` as `int >= 1`."""

    def _expand_help(self, action: Any) -> str:
        text = re.sub(r"Annotated\[(\w+), '(.*?)'\]", r"\1 \2", super()._expand_help(action))
        return re.sub(r"Optional\[(.*?)\]", r"\1 | null", text)


def load_plain(text: str) -> Any:
    """jsonargparse's own reading of a file or value, after ours has refused what is not plain."""
    parse_yaml(text)
    return load_text(text)


load_text = get_loader("yaml")
set_loader("yaml", load_plain, exceptions=(yaml.YAMLError,))


def parse_config(cls: type[Config], description: str | None, argv: list[str] | None = None) -> Config:
    """Read `--config FILE` and flags into `cls`; exit with one line if a name, a type or a value is wrong."""
    argv = sys.argv[1:] if argv is None else argv
    parser = _build_parser(cls, has_help=any(flag in ("-h", "--help") for flag in argv))  # type: ignore[arg-type]
    parser.description = (description or "").strip().split("\n\n")[0]
    names = sorted(action.dest for action in parser._actions if action.dest not in ("help", "config", "print_config"))
    # `--dry_run` is short for `--dry_run true`, for options of type bool outside of sections.
    switches = {f"--{item.name}" for item in dataclasses.fields(cls) if item.type is bool}  # type: ignore[arg-type]
    completed: list[str] = []
    for flag, value in pairwise([*argv, "--"]):
        completed += [flag, "true"] if flag in switches and value.startswith("--") else [flag]
    try:
        # Each file is first parsed by itself, so that its mistakes are reported under its name.
        paths = [value for flag, value in pairwise(argv) if flag == "--config"]
        for path in paths + [flag.partition("=")[2] for flag in argv if flag.startswith("--config=")]:
            if not Path(path).is_file():
                raise UserError(f"--config {path}: {'not a file' if Path(path).exists() else 'no such file'}")
            try:
                read_yaml(Path(path))
                parser.parse_path(path)
            except (yaml.YAMLError, TypeError, ArgumentError) as error:
                raise UserError(f"{path}: {_one_line(error, names)}") from None
        namespace = parser.parse_args(completed)
        namespace.pop("config", None)
        for name in names:
            inner = [option for option in names if option.startswith(f"{name}.")]
            if namespace.get(name) is None and inner:
                raise UserError(f"{name} is null; leave it out, or give its options, such as {inner[0]}")
        config = cls(**vars(parser.instantiate(namespace)))
        if problems := find_problems(config):
            raise UserError("; ".join(problems))
    except (UserError, OSError, ArgumentError) as error:
        exit_with(_one_line(error, names) if isinstance(error, ArgumentError) else error)
    return config


@functools.cache
def _build_parser(cls: type, has_help: bool = False) -> ArgumentParser:
    """A parser; `has_help` reads the help of each option from the source of `cls`, which takes half of the time."""
    set_parsing_settings(docstring_parse_attribute_docstrings=has_help)
    parser = ArgumentParser(exit_on_error=False, allow_abbrev=False, formatter_class=HelpFormatter)
    parser.add_class_arguments(cls)
    parser.add_argument("--config", action="config", help="YAML file with any of the options below; flags win.")
    return parser


def _one_line(error: Exception, names: list[str]) -> str:
    """jsonargparse's message on one line, with the nearest option name where a name is unknown."""
    message = " ".join(str(error).split())
    for pattern, replacement in (
        (r"<class '([\w.]+)'>", r"\1"),
        (r"typing\.", ""),
        (r"Annotated\[(\w+), '.*?'\]", r"\1"),
        (r"Expected a list\. Got value: (\[.*)", r"Expected a list. Got \1: put '…' around it"),
        (r"Expected a list\. Got value: (.*)", r"Expected a list. Write '[\1]'"),
        (r"Does not validate .*? Subtypes: \[(\w+), None.*Given value: (.*)", r"Expected \1 or null. Got value: \2"),
    ):
        message = re.sub(pattern, replacement, message)
    if match := re.match(r'Parser key "(.+?)": Unable to load config \'(.*?)\' - ', message):
        inner = next((name for name in names if name.startswith(f"{match[1]}.")), "")
        return f"{match[1]} cannot be {match[2]}: it is a section; give its options, such as --{inner}"
    if match := re.match(r'Parser key "(.+?)": (.*)', message):
        return f"{match[1]}: {match[2]}"
    if match := re.match(r"unrecognized arguments: (\S+)", message):
        name, names = match[1].partition("=")[0], [f"--{name}" for name in names]
        if not name.startswith("--"):
            return f"unexpected argument {name!r}; options are written --name value"
    elif match := re.match(r"Group '(.+)' does not accept option '(.+)'", message):
        name = f"{match[1]}.{match[2]}"
    elif match := re.match(r"Option '(.+?)' is not accepted", message):
        name = match[1]
    else:
        return message
    return f"unknown option {name}{nearest(name, names)}; --help lists all"


# ---- Values


def find_problems(config: object, section: str = "") -> list[str]:
    """One line for every value that is null, not finite or outside its type's bounds. If there is none, what `problems()`
    returns: the values that do not go together."""
    nested, found = [], []
    for item in dataclasses.fields(config):  # type: ignore[arg-type]
        name, value, bound = section + item.name, getattr(config, item.name), _bound_of(item.type)
        if dataclasses.is_dataclass(value):
            nested += find_problems(value, f"{name}.")
        elif value is None:
            if type(None) not in typing.get_args(item.type):
                found.append(f"{name} is null; it needs a value")
        elif isinstance(value, float) and not math.isfinite(value):
            found.append(f"{name} is {value}; it must be a finite number")
        elif not all(COMPARISONS[sign](value, float(limit)) for sign, limit in re.findall(r"([<>]=?) (\S+)", bound)):
            found.append(f"{name} is {value}; it must be {bound}")
    if not nested and not found and hasattr(config, "problems"):
        return config.problems()
    return nested + found


def _bound_of(kind: Any) -> str:
    """The bound of an `Annotated` number, or of such a number or null; nothing for other types."""
    kinds = [part for part in (kind, *typing.get_args(kind)) if hasattr(part, "__metadata__")]
    return str(kinds[0].__metadata__[0]) if kinds else ""


def parse_sections(cls: type[Config], values: Any, where: Path) -> Config:
    """The sections of a run's configuration, from the file `where`, that `cls` has; options it lacks get defaults."""
    if not isinstance(values, dict) or not isinstance(values.get("data"), dict):
        raise UserError(f"{where}: is not a run's configuration (it has no section `data`)")
    names = [item.name for item in dataclasses.fields(cls)]  # type: ignore[arg-type]
    parser = _build_parser(cls)  # type: ignore[arg-type]
    try:
        namespace = parser.parse_object({name: values[name] for name in names if name in values})
        namespace.pop("config", None)
        config = cls(**vars(parser.instantiate(namespace)))
    except (ArgumentError, TypeError, ValueError, RecursionError) as error:
        raise UserError(f"{where}: {_one_line(error, [])}") from None
    if problems := find_problems(config):
        raise UserError(f"{where}: {'; '.join(problems)}")
    return config


def save_config(config: object, path: Path) -> None:
    """Write the resolved configuration; the file runs again as `--config`."""
    values = dataclasses.asdict(config)  # type: ignore[call-overload]
    replace_text(path, yaml.safe_dump(values, sort_keys=False, allow_unicode=True))
