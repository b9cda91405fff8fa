"""Numbers and text from models: loss, perplexity, bits per byte, a continued prompt; and whether one is better.

python evaluate.py --model runs/demo --prompt "LOVE, n."
python evaluate.py --model exports/demo --text_file my_notes.txt
python evaluate.py runs/demo runs/other models/pretrained --dataset data/demo

Several models are compared with the first. A model is a run, a checkpoint, an export, a folder that transformers opens,
or a GGUF file. One that reads pictures or sounds also answers each validation document, and is scored by its text.
"""

import copy
import itertools
import json
import sys
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

from evaluating import models, tasks
from utils.cli import (
    NonNegativeFloat,
    PositiveInt,
    Seed,
    UserError,
    exit_with,
    parse_config,
    read_precision,
    run_script,
)
from utils.data.token_dataset import load_manifest
from utils.files import find_obstacle, finite, replace_text

NOTHING_TO_SCORE = "{} is not in a run folder; say what to score: --dataset, --text_file, --tasks or --prompt"


@dataclass
class EvaluateConfig:
    """Options of evaluate.py; the defaults are the demo's."""

    model: str = "runs/demo"
    """Run folder (its best checkpoint), checkpoint folder, export folder, folder of a pretrained model, or GGUF file."""
    compare_with: list[str] = field(default_factory=list)
    """Further models, compared with `model`. Short: evaluate.py MODEL OTHER …"""
    dataset: list[str] | str | None = None
    """Dataset folder whose validation documents are scored, or a list of them. null: the run's own, if the model is in a
    run folder and there is no text_file."""
    text_file: list[str] | str | None = None
    """UTF-8 text file to score, as one document, or a list of files; of .jsonl the documents in the field `text`. Encoding
    takes some 150 bytes of memory per byte."""
    sequence_length: Annotated[int, ">= 2"] | None = None
    """Positions per row, in tokens. null: the run's own value, which exports keep; without a run, the model's maximum; of
    several models the least."""
    stride: PositiveInt | None = None
    """Score documents longer than sequence_length in overlapping windows: each token once, with at least sequence_length -
    stride tokens before it. null: cut them into rows."""
    batch_size: PositiveInt = 32
    """Sequences per batch."""
    tasks: list[str] = field(default_factory=list)
    """YAML files of lm-eval's tasks to score as well (pip install -e '.[tasks]')."""
    prompt: str | None = None
    """Text for the model to continue. Empty: the start of a document. null: generate nothing."""
    max_new_tokens: PositiveInt = 128
    """Longest continuation, in tokens."""
    temperature: NonNegativeFloat = 0.8
    """Sampling temperature. 0 takes the likeliest token."""
    seed: Seed = 1234
    """Seed of the sampled text, of the intervals and of tasks."""
    blank_media: bool = False
    """Replace all pictures by grey ones and all sounds by silence. A control: what the model says without them."""
    compare_with_xz: bool = False
    """Also compress the scored text with xz -9 and print its bits per byte."""
    report: str | None = None
    """JSON file to write the results to. null: only print them."""

    @property
    def models(self) -> list[str]:
        return [self.model, *self.compare_with]

    @property
    def datasets(self) -> list[str]:
        return as_list(self.dataset)

    @property
    def text_files(self) -> list[str]:
        return as_list(self.text_file)

    def problems(self) -> list[str]:
        read_precision()
        found = [mistake for name in self.models if (mistake := models.find_mistake(name))]
        found += tasks.find_mistakes(self.tasks)
        is_run = not (models.is_export(Path(self.model)) or models.is_gguf(Path(self.model)))
        if not is_run and not self.tasks and (self.dataset, self.text_file, self.prompt) == (None, None, None):
            found.append(NOTHING_TO_SCORE.format(self.model))
        if self.report is not None and not Path(self.report).resolve().parent.is_dir():
            found.append(f"--report {self.report}: there is no folder to write it to")
        elif self.report is not None and (obstacle := find_obstacle(self.report)):
            found.append(f"--report {self.report} {obstacle}")
        elif self.report is not None and Path(self.report).exists() and not Path(self.report).is_file():
            found.append(f"--report {self.report} is a device or a pipe; name a file")
        for folder in self.datasets:
            load_manifest(folder)
        for file in self.text_files:
            if not Path(file).is_file():
                found.append(f"--text_file {file} {'is no file' if Path(file).exists() else 'does not exist'}")
        if self.stride is not None and self.sequence_length is not None and self.stride > self.sequence_length:
            found.append(f"stride {self.stride} is longer than sequence_length {self.sequence_length}")
        return found


def as_list(value: list[str] | str | None) -> list[str]:
    return value if isinstance(value, list) else [] if value is None else [value]


def read_options(description: str | None) -> EvaluateConfig:
    """The command line, whose words before the first option are models."""
    names = list(itertools.takewhile(lambda word: not word.startswith("-"), sys.argv[1:]))
    argv = sys.argv[1 + len(names) :]
    if names and any(flag.partition("=")[0] in ("--model", "--compare_with") for flag in argv):
        exit_with("give the models as words in front, or by --model and --compare_with, not both")
    if names:
        argv += ["--model", names[0], "--compare_with", json.dumps(names[1:])]
    return parse_config(EvaluateConfig, description, argv)


config = read_options(__doc__) if __name__ == "__main__" else None

import lzma
import time
from functools import partial

import torch
from accelerate import Accelerator
from accelerate.utils import DataLoaderConfiguration, parse_flag_from_env
from transformers import AutoModelForCausalLM, PreTrainedModel

from evaluating.intervals import LEAST_UNITS
from evaluating.models import Candidate
from evaluating.scoring import MOVING, NumberedLayout, Score, TokenLosses, numbered, score_units
from evaluating.table import compare, differing_options, lines_of, lines_of_options
from evaluating.texts import Text, encode, read_dataset, read_file
from utils.answers import score_answers, write_answers
from utils.config import ObjectiveConfig
from utils.data.loaders import Layout, build_evaluation_loader, build_layout, with_places
from utils.evaluation import generate_text
from utils.model.adapters import without_adapters
from utils.model.build import count_parameters, longest_sequence, pad_token_id, saved_class
from utils.objectives import has_linear_head, objective_module, use_varlen, varlen_is_default
from utils.pretrained import tokenizer_of

NON_GENERATIVE = ("masked", "span_corruption", "captioning", "transcription")
NEXT_TOKEN = {"causal", "instruction", "fill_in_the_middle"}  # objectives whose models can be scored on plain text
ANSWER_SCORES = ("exact_match", "word_f1", "word_error_rate")
EXAMPLES = 4  # answers to print


@dataclass
class Result:
    """What a model scored."""

    record: dict[str, Any]  # for the report
    scores: list[Score]  # on each text
    tasks: dict[str, dict[str, Any]]


def main(config: EvaluateConfig) -> None:
    candidates = [models.locate(name) for name in config.models]
    own = [] if config.text_files or candidates[0].dataset is None else [candidates[0].dataset]
    folders = config.datasets or own
    if not folders and not config.text_files and not config.tasks and config.prompt is None:
        raise UserError(NOTHING_TO_SCORE.format(config.model))
    for run in (candidate.run for candidate in candidates):
        if config.prompt is not None and run is not None and run.objective.name in NON_GENERATIVE:
            raise UserError(f"--prompt: a model of objective {run.objective.name} does not continue a text")
    accelerator = Accelerator(
        cpu=parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.accelerator.is_available(),
        dataloader_config=DataLoaderConfiguration(split_batches=True),
    )
    if config.tasks and accelerator.num_processes > 1:
        raise UserError("--tasks runs in one process; start evaluate.py without a launcher")

    own_objectives = [objective_options(candidate) for candidate in candidates]
    processors = [models.load_processor(candidate) for candidate in candidates]
    decode = {objective.name for objective in own_objectives} <= NEXT_TOKEN
    texts = [read_dataset(folder, list(map(tokenizer_of, processors)), decode=decode) for folder in folders]
    texts += [read_file(Path(file)) for file in config.text_files]
    objectives = [share_objective(own_objectives, text) for text in texts]
    length = models.shared_length(candidates, config.sequence_length) if texts else 0
    if texts and config.stride is not None and config.stride > length:
        raise UserError(f"stride {config.stride} is longer than sequence_length {length}")

    results = []
    for number, (candidate, processor) in enumerate(zip(candidates, processors, strict=True)):
        plan = [(text, replace(chosen[number], blank_media=config.blank_media or chosen[number].blank_media))
                for text, chosen in zip(texts, objectives, strict=True)]  # fmt: skip
        layout = layout_of(candidates)
        results.append(evaluate_model(config, accelerator, candidate, processor, plan, length, layout))
        accelerator.free_memory()  # before the next model is loaded
    if accelerator.is_main_process:
        report(config, candidates, texts, objectives, results, length)
    accelerator.end_training()


def objective_options(candidate: Candidate) -> ObjectiveConfig:
    """The run's objective; without a run, the objective that suits the model's head."""
    if candidate.run is not None:
        return candidate.run.objective
    names = {"AutoModelForMaskedLM": "masked", "AutoModelForSeq2SeqLM": "span_corruption"}
    names |= {"AutoModelForImageTextToText": "captioning", "AutoModelForSpeechSeq2Seq": "transcription"}
    auto_model = saved_class(models.read_architecture(candidate)).__name__
    return ObjectiveConfig(name=names.get(auto_model, "causal"))  # type: ignore[arg-type]


def share_objective(objectives: list[ObjectiveConfig], text: Text) -> list[ObjectiveConfig]:
    """What each model predicts of a text. All tokens of a plain text count; and where objectives of next tokens differ,
    all models predict the same: the assistant's tokens if one learned those and the text says which, else every token."""
    names = {objective.name for objective in objectives}
    has_turns = text.stored is not None and text.stored.loss_mask is not None
    if len(names) > 1 and names <= NEXT_TOKEN:
        turns_only = has_turns and "instruction" in names
        return [replace(each, name="instruction" if turns_only else "causal") for each in objectives]
    if text.stored is None and names == {"instruction"}:
        return [replace(each, name="causal") for each in objectives]
    return objectives


def layout_of(candidates: list[Candidate]) -> str:
    """The layout of the models' runs if they agree; else, and without a run, rows that no model can confuse."""
    layouts = {"padded" if candidate.run is None else candidate.run.data.layout for candidate in candidates}
    return layouts.pop() if len(layouts) == 1 else "padded"


def evaluate_model(
    config: EvaluateConfig, accelerator: Accelerator, candidate: Candidate, processor: Any,
    plan: list[tuple[Text, ObjectiveConfig]], length: int, layout: str,
) -> Result:  # fmt: skip
    """Everything that is asked of one model. All ranks call this."""
    model, tokenizer = models.load(candidate), tokenizer_of(processor)
    record: dict[str, Any] = {"model": candidate.name, "path": str(candidate.path), "class": type(model).__name__}
    record["parameters"] = count_parameters(model)
    accelerator.print(f"{candidate.path}: {type(model).__name__}, {record['parameters']:,} parameters")
    if length > longest_sequence(model):
        raise UserError(f"sequence_length {length} is longer than the model's {longest_sequence(model)} positions")
    scores = []
    for text, objective in plan:
        scores.append(score(config, accelerator, model, processor, text, objective, length, layout, record))
    model.to(accelerator.device)
    is_causal = saved_class(model.config) is AutoModelForCausalLM
    scored_tasks = {}
    if config.tasks:
        if not is_causal:
            raise UserError(f"--tasks: {type(model).__name__} does not continue a text")
        scored_tasks = tasks.run_tasks(
            config.tasks, without_adapters(model).eval(), tokenizer, config.batch_size, config.seed
        )
    if config.prompt is not None:
        if not is_causal:
            raise UserError(f"--prompt: {type(model).__name__} does not continue a text")
        chat = candidate.run is not None and candidate.run.objective.name == "instruction"
        record |= continue_prompt(config, model, tokenizer, chat)
        accelerator.print(f"---\n{record['text']}\n---")
        accelerator.print(f"{record['new_tokens']} new tokens, {record['tokens_per_second']:.1f} per second")
    return Result(record, scores, scored_tasks)


def continue_prompt(config: EvaluateConfig, model: PreTrainedModel, tokenizer: Any, chat: bool) -> dict[str, Any]:
    """The prompt's continuation, and the speed of its generation, which includes reading the prompt."""
    speed: dict[str, float] = {}

    def generate(input_ids: torch.Tensor, **options: Any) -> torch.Tensor:
        started = time.perf_counter()
        output: torch.Tensor = model.generate(input_ids, **options)  # type: ignore[operator]
        speed["new_tokens"] = output.shape[1] - input_ids.shape[1]
        speed["tokens_per_second"] = speed["new_tokens"] / (time.perf_counter() - started)
        return output

    text = generate_text(
        model, tokenizer, config.prompt or "", max_new_tokens=config.max_new_tokens, temperature=config.temperature,
        seed=config.seed, chat=chat, generate=generate,
    )  # fmt: skip
    return {"text": text} | speed


def score(
    config: EvaluateConfig, accelerator: Accelerator, model: PreTrainedModel, processor: Any, text: Text,
    objective: ObjectiveConfig, length: int, layout_name: str, record: dict[str, Any],
) -> Score:  # fmt: skip
    """The loss of each unit of a text; with pictures or sounds the answers and their scores go to `record`."""
    if config.stride is not None and objective.name not in ("causal", "instruction"):
        raise UserError(f"--stride: a model of objective {objective.name} does not predict the next token only")
    tokenizer, collate = tokenizer_of(processor), objective_module(objective.name).build_collator(objective, processor)
    encoded = encode(text, tokenizer, in_front=bool(config.compare_with))
    tokens = copy.copy(encoded.tokens)
    if not hasattr(collate, "check"):  # a model of text alone reads the texts
        tokens.media = None
    if tokens.media is not None:
        collate.check(tokens, length, "validation")
    layout = build_layout(
        tokens, layout_name if config.stride is None else "padded", length, pad_token_id=pad_token_id(tokenizer),
        vocab_size=len(tokenizer), stride=config.stride,
    )  # fmt: skip
    rows = NumberedLayout(layout, text, encoded, by_row=objective.name in MOVING)
    attention = model.config._attn_implementation
    losses = TokenLosses(model, objective, chunked_head=has_linear_head(model))
    launch = (accelerator.device, accelerator.mixed_precision)
    if varlen_is_default(*launch) and use_varlen(losses, *launch) is None:
        collate = partial(with_places, collate)
    loader = build_evaluation_loader(rows, numbered(collate), config.batch_size)  # type: ignore[arg-type]
    prepared, loader = accelerator.prepare(losses, loader)
    found = score_units(accelerator, prepared, loader, rows)
    model.set_attn_implementation(attention)  # what follows generates text, for which varlen has no cache
    if tokens.media is not None:
        record |= answer(config, model, collate, layout, tokenizer)
    return found


def answer(
    config: EvaluateConfig, model: PreTrainedModel, collate: Any, layout: Layout, tokenizer: Any
) -> dict[str, Any]:
    """What the model writes about each document, greedily, and the scores of that; nothing if none is to be answered."""
    answers = write_answers(model, collate, layout, tokenizer, max_new_tokens=config.max_new_tokens)
    return score_answers(answers) | {"answers": list(map(asdict, answers))} if answers else {}


def report(
    config: EvaluateConfig, candidates: list[Candidate], texts: list[Text], objectives: list[list[ObjectiveConfig]],
    results: list[Result], length: int,
) -> None:  # fmt: skip
    """Print the tables, and write the report."""
    names = [candidate.name for candidate in candidates]
    first = results[0].record
    found: dict[str, Any] = {"options": asdict(config), "parameters": first["parameters"]}
    compared = []
    for number, (text, chosen) in enumerate(zip(texts, objectives, strict=True)):
        has_bytes = len(text.unit_bytes) > 0 and {objective.name for objective in chosen} == {"causal"}
        scores = [result.scores[number] for result in results]
        records = compare(text, scores, has_bytes, config.seed)
        compared.append({"text": text.name, "bytes": text.num_bytes, "unit": scores[0].unit, "results": records})
        total = records[0]["models"][0]
        print(f"{text.name}: {records[0]['units']:,} {scores[0].unit}, {total['target_tokens']:,} target tokens, "
              f"{text.num_bytes:,} bytes, {length} positions per row")  # fmt: skip
        print(*lines_of(records, names), sep="\n")
        if records[0]["units"] < LEAST_UNITS:
            print(f"no intervals and no verdicts: {scores[0].unit} are fewer than {LEAST_UNITS}; give a longer text")
        if number == 0:
            found |= {"scored": text.name, "bytes": text.num_bytes, **total}
            found |= {key: first[key] for key in (*ANSWER_SCORES, "answers") if key in first}
        if config.compare_with_xz and has_bytes and text.documents is not None:
            compared[-1]["xz_bits_per_byte"] = xz_bits_per_byte(text.documents)
            found.setdefault("xz_bits_per_byte", compared[-1]["xz_bits_per_byte"])
            saved = 1 - total["bits_per_byte"] / compared[-1]["xz_bits_per_byte"]
            needs = f"the model needs {abs(saved):.0%} {'less' if saved >= 0 else 'more'}"
            print(f"xz -9, same text: {compared[-1]['xz_bits_per_byte']:.3f} bits per byte; {needs}")
    for result in results:
        print_answers(result.record, several=len(results) > 1)
    if config.tasks:
        found["tasks"] = tasks.compare_tasks([result.tasks for result in results], config.seed)
        print(*tasks.lines_of_tasks(found["tasks"], names), sep="\n")
    found |= {key: first[key] for key in ("text", "new_tokens", "tokens_per_second") if key in first}
    found |= {"models": [result.record for result in results], "texts": compared}
    if len(candidates) > 1:
        found["differing_options"] = differing_options(candidates)
        print(*lines_of_options(found["differing_options"], candidates), sep="\n")
    if config.report is not None:
        try:
            replace_text(Path(config.report).resolve(), json.dumps(finite(found), indent=2) + "\n")
        except OSError as error:
            raise UserError(f"--report {config.report} cannot be written: {error.strerror}") from None


def print_answers(record: dict[str, Any], *, several: bool) -> None:
    if "exact_match" in record:
        print(f"{record['model']}: " if several else "", end="")
        print(*(f"{name.replace('_', ' ')} {record[name]:.3f}" for name in ANSWER_SCORES), sep=", ")
        for each in record["answers"][:EXAMPLES]:
            print(f"  {each['reference']!r}: {each['text']!r}")


def xz_bits_per_byte(documents: list[str]) -> float:
    """Compression of the documents, end to end, by `xz -9`."""
    text = "\n".join(documents).encode()
    return 8 * len(lzma.compress(text, preset=9)) / len(text)


if __name__ == "__main__":
    run_script(main, config)
