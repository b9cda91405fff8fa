"""Tasks of EleutherAI's lm-eval: a YAML file says what to ask and how to score it."""

import contextlib
import logging
import os
import sys
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from evaluating.intervals import Difference, intervals_of_ratios
from evaluating.table import align, as_entry, as_list, spell
from utils.files import UserError, short

SUFFIXES = (".yaml", ".yml")


def find_mistakes(tasks: Sequence[str]) -> list[str]:
    """Why the tasks cannot be run, as far as their files say; lm-eval reads them after the texts are scored."""
    if tasks and find_spec("lm_eval") is None:
        return ["--tasks needs the library lm_eval: pip install -e '.[tasks]'"]
    return [f"--tasks {task}: {fault}" for task in tasks if (fault := find_fault(Path(task)))]


def find_fault(path: Path) -> str | None:
    """Why a file is no task; runs none of the code that its tags name."""
    if not (path.suffix in SUFFIXES and path.is_file()):
        return "there is no such file; name YAML files of tasks"
    try:
        content = yaml.compose(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        return f"it is no YAML: {short(error)}"
    return None if isinstance(content, yaml.MappingNode) else "it holds no keys such as `task`"


@contextlib.contextmanager
def as_guest() -> Iterator[None]:
    """What lm-eval needs and leaves behind is undone: it takes some metrics from a library named `evaluate`, which must not
    be the script of that name, and it sets variables of the environment."""
    environment = dict(os.environ)
    ours = str(Path(__file__).resolve().parent.parent)
    path, script = sys.path[:], sys.modules.pop("evaluate", None)
    sys.path[:] = [place for place in path if str(Path(place).resolve()) != ours]
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(environment)
        sys.path[:] = path
        sys.modules.pop("evaluate", None)
        if script is not None:
            sys.modules["evaluate"] = script


def run_tasks(
    tasks: Sequence[str], model: Any, tokenizer: Any, batch_size: int, seed: int
) -> dict[str, dict[str, Any]]:
    """Task → metric → the score of each of its documents, in order, and whether higher is better."""
    with as_guest():
        import lm_eval
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager

        logging.getLogger("lm_eval").setLevel(logging.ERROR)
        try:
            found = lm_eval.simple_evaluate(
                HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size), tasks=list(tasks), bootstrap_iters=0,
                task_manager=TaskManager(include_defaults=False),  # reading its thousands of tasks takes half a minute
                random_seed=seed, numpy_random_seed=seed, torch_random_seed=seed, fewshot_random_seed=seed,
            )  # fmt: skip
        except Exception as error:  # a task may fail in any way
            raise UserError(f"--tasks {', '.join(tasks)}: {type(error).__name__}: {short(error)}") from None
    scores: dict[str, dict[str, Any]] = {}
    for task, samples in found["samples"].items():
        scores[task] = {}
        ordered = sorted(samples, key=lambda sample: sample["doc_id"])
        for name, better in found["higher_is_better"][task].items():
            values = [sample.get(name) for sample in ordered]
            key = next((key for key in found["results"][task] if key.split(",")[0] == name), None)
            if key is None:
                continue
            is_plain = all(isinstance(value, bool | int | float | np.number) for value in values)
            scores[task][name] = {
                "value": float(found["results"][task][key]),
                "documents": [float(value) for value in values] if is_plain else None,  # type: ignore[arg-type]
                "higher_is_better": bool(better),
            }
    return scores


def compare_tasks(found: list[dict[str, dict[str, Any]]], seed: int) -> list[dict[str, Any]]:
    """A record per task and metric, with an entry per model; the intervals are over a task's documents."""
    records = []
    for task, metrics in found[0].items():
        for name, first in metrics.items():
            of_models = [scores[task][name] for scores in found]
            entries: list[dict[str, Any]] = [{"value": score["value"]} for score in of_models]
            if all(map(is_mean, of_models)):
                columns = np.array([score["documents"] for score in of_models]).T
                own, paired = intervals_of_ratios(columns, np.ones_like(columns), seed)
            else:
                own = paired = [None] * len(found)
            for entry, interval, difference in zip(entries, own, paired, strict=True):
                entry["interval"] = as_list(interval)
                if entry is not entries[0]:
                    better = first["higher_is_better"]
                    entry |= as_entry(Difference(entry["value"] - entries[0]["value"], difference, better))
            size = None if first["documents"] is None else len(first["documents"])
            records.append({"task": task, "metric": name, "documents": size, "models": entries})
    return records


def is_mean(score: dict[str, Any]) -> bool:
    """Whether a score is the mean of its documents' scores. BLEU and its like are not, and have no interval here."""
    return score["documents"] is not None and bool(np.isclose(np.mean(score["documents"]), score["value"]))


def lines_of_tasks(records: list[dict[str, Any]], names: Sequence[str]) -> list[str]:
    """The records of `compare_tasks` as a table."""
    head = ["task", "metric", "documents", "model", "score", "95% interval"]
    rows = [head + (["difference", "95% interval", ""] if len(names) > 1 else [])]
    for record in records:
        for name, entry in zip(names, record["models"], strict=True):
            size = "-" if record["documents"] is None else str(record["documents"])
            row = [record["task"], record["metric"], size, name, f"{entry['value']:.4f}", spell(entry["interval"])]
            if "difference" in entry:
                row += [f"{entry['difference']:+.4f}", spell(entry["difference_interval"], "+"), entry["verdict"]]
            elif len(names) > 1:
                row += ["", "", ""]
            rows.append(row)
    return align(rows)
