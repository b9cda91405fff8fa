"""Numbers and text from a run, a checkpoint or an export: loss, perplexity, bits per byte, a continued prompt.

python evaluate.py --model runs/demo --prompt "LOVE, n."
python evaluate.py --model exports/demo --text_file my_notes.txt

A model that reads pictures or sounds also answers each validation document, and is scored by its text.
"""

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any

from utils.checkpoints import find_checkpoint, resolve_checkpoint
from utils.cli import NonNegativeFloat, PositiveInt, Seed, UserError, parse_config, parse_sections, run_script
from utils.data.token_dataset import TokenDataset, load_manifest, open_split
from utils.files import find_obstacle
from utils.pretrained import check_adapters, hide_special_tokens, read_processor, tokenizer_of

NOTHING_TO_SCORE = "{} is not in a run folder; say what to score: --dataset, --text_file or --prompt"


def is_export(path: Path) -> bool:
    return (path / "config.json").is_file() and not (path / "state.json").is_file()


@dataclass
class EvaluateConfig:
    """Options of evaluate.py; the defaults are the demo's."""

    model: str = "runs/demo"
    """Run folder (its best checkpoint), checkpoint folder or export folder."""
    dataset: str | None = None
    """Dataset folder whose validation documents are scored. null: the run's own, if the model is in a run folder."""
    text_file: str | None = None
    """UTF-8 text file to score, as one document, instead of a dataset. Encoding takes some 150 bytes of memory per byte."""
    sequence_length: Annotated[int, ">= 2"] | None = None
    """Positions per row, in tokens. null: the run's own value, which exports keep; without a run, the model's maximum."""
    batch_size: PositiveInt = 32
    """Sequences per batch."""
    prompt: str | None = None
    """Text for the model to continue. Empty: the start of a document. null: generate nothing."""
    max_new_tokens: PositiveInt = 128
    """Longest continuation, in tokens."""
    temperature: NonNegativeFloat = 0.8
    """Sampling temperature. 0 takes the likeliest token."""
    seed: Seed = 1234
    """Seed of the sampled text."""
    blank_media: bool = False
    """Replace all pictures by grey ones and all sounds by silence. A control: what the model says without them."""
    compare_with_xz: bool = False
    """Also compress the scored text with xz -9 and print its bits per byte."""
    report: str | None = None
    """JSON file to write the results to. null: only print them."""

    def problems(self) -> list[str]:
        found, path = [], Path(self.model)
        try:
            check_adapters(path if is_export(path) else find_checkpoint(path))
        except UserError as error:
            found.append(str(error))
        if is_export(path) and (self.dataset, self.text_file, self.prompt) == (None, None, None):
            found.append(NOTHING_TO_SCORE.format(self.model))
        if self.report is not None and not Path(self.report).resolve().parent.is_dir():
            found.append(f"--report {self.report}: there is no folder to write it to")
        elif self.report is not None and (obstacle := find_obstacle(self.report)):
            found.append(f"--report {self.report} {obstacle}")
        if self.dataset is not None and self.text_file is not None:
            found.append("give dataset or text_file, not both")
        elif self.dataset is not None:
            load_manifest(self.dataset)
        elif self.text_file is not None and not Path(self.text_file).is_file():
            why = "is no file" if Path(self.text_file).exists() else "does not exist"
            found.append(f"--text_file {self.text_file} {why}")
        return found


config = parse_config(EvaluateConfig, __doc__) if __name__ == "__main__" else None

import lzma
import sys

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import DataLoaderConfiguration, parse_flag_from_env
from transformers import AutoModelForCausalLM, PreTrainedModel

from utils.answers import score_answers, write_answers
from utils.config import ObjectiveConfig, ScoringConfig
from utils.data.loaders import Layout, build_evaluation_loader, build_layout
from utils.evaluation import evaluate, generate_text
from utils.files import finite, read_json, read_yaml
from utils.model.build import (
    count_parameters,
    covers_vocabulary,
    load_model,
    longest_sequence,
    pad_token_id,
    saved_class,
)
from utils.objectives import Objective, objective_module

NON_GENERATIVE = ("masked", "span_corruption", "captioning", "transcription")
EXAMPLES = 4  # answers to print


def main(config: EvaluateConfig) -> None:
    folder, run, trained_on = locate(Path(config.model))
    dataset = config.dataset or trained_on
    if dataset is None and config.text_file is None and config.prompt is None:
        raise UserError(NOTHING_TO_SCORE.format(config.model))
    if config.prompt is not None and run is not None and run.objective.name in NON_GENERATIVE:
        raise UserError(f"--prompt: a model of objective {run.objective.name} does not continue a text")
    model = load_model(folder)
    processor = read_processor(folder)
    tokenizer = tokenizer_of(processor)
    report: dict[str, Any] = {"options": asdict(config), "parameters": count_parameters(model)}
    print(f"{folder}: {type(model).__name__}, {report['parameters']:,} parameters")

    scored = None
    if config.text_file is not None:
        scored = (config.text_file, *read_text_file(Path(config.text_file), tokenizer))
    elif dataset is not None:
        scored = (f"{dataset}, validation", *read_validation(dataset, tokenizer))
    if scored is not None:
        what, tokens, num_bytes = scored
        report |= {"scored": what, "bytes": num_bytes, **score(config, model, processor, tokens, num_bytes, run)}
        print(
            f"{what}: {report['target_tokens']:,} target tokens, {num_bytes:,} bytes\n"
            f"loss {report['loss']:.4f} nats per target, perplexity {report['perplexity']:.2f}"
            + (f", {report['bits_per_byte']:.3f} bits per byte" if "bits_per_byte" in report else "")
        )
        if "exact_match" in report:
            scores = {name: report[name] for name in ("exact_match", "word_f1", "word_error_rate")}
            print(*(f"{name.replace('_', ' ')} {value:.3f}" for name, value in scores.items()), sep=", ")
            for answer in report["answers"][:EXAMPLES]:
                print(f"  {answer['reference']!r}: {answer['text']!r}")
        if config.compare_with_xz and "bits_per_byte" in report:
            report["xz_bits_per_byte"] = xz_bits_per_byte(tokens, tokenizer)
            saved = 1 - report["bits_per_byte"] / report["xz_bits_per_byte"]
            needs = f"the model needs {abs(saved):.0%} {'less' if saved >= 0 else 'more'}"
            print(f"xz -9, same text: {report['xz_bits_per_byte']:.3f} bits per byte; {needs}")
    if config.prompt is not None:
        if saved_class(model.config) is not AutoModelForCausalLM:
            raise UserError(f"--prompt: {type(model).__name__} does not continue a text")
        report["text"] = generate_text(
            model, tokenizer, config.prompt, max_new_tokens=config.max_new_tokens, temperature=config.temperature,
            seed=config.seed, chat=objective_options(model, run).name == "instruction",
        )  # fmt: skip
        print(f"---\n{report['text']}\n---")
    if config.report is not None:
        Path(config.report).write_text(json.dumps(finite(report), indent=2) + "\n", encoding="utf-8")


def locate(path: Path) -> tuple[Path, ScoringConfig | None, str | None]:
    """The folder to load the model from, the options that its run scored with, and its run's dataset.

    The options are None for a model without a run; an export's report keeps them. The dataset is None outside a run.
    """
    if is_export(path):
        report = path / "export_report.json"
        exported_from = read_json(report).get("run") if report.is_file() else None
        return path, None if exported_from is None else parse_sections(ScoringConfig, exported_from, report), None
    checkpoint = resolve_checkpoint(path)
    run_config = checkpoint.parent.parent / "config.yaml"
    if not run_config.is_file():
        return checkpoint, None, None
    run = parse_sections(ScoringConfig, read_yaml(run_config), run_config)
    return checkpoint, run, run.data.dataset


def read_validation(dataset: str, tokenizer: Any) -> tuple[TokenDataset, int]:
    """The validation documents of a dataset folder, and the length of their text in bytes."""
    manifest = load_manifest(dataset)
    if not covers_vocabulary(tokenizer, Path(dataset) / "tokenizer"):
        raise UserError(f"{dataset} was made with another tokenizer than the model's; score its text with --text_file")
    return open_split(dataset, "validation"), manifest["splits"]["validation"]["bytes"]


def read_text_file(path: Path, tokenizer: Any) -> tuple[TokenDataset, int]:
    """The text as one document of tokens, and its length in bytes."""
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text ({error.reason} at byte {error.start})") from None
    if not text.strip():
        raise UserError(f"{path}: the file holds no text")
    ids = encode_document(text, tokenizer)
    return TokenDataset([ids], np.array([len(ids)])), len(text.encode())


def encode_document(text: str, tokenizer: Any) -> np.ndarray:
    """The ids that prepare_data.py stores for a document, (n,) uint32: the tokenizer's own, then an eos token. Special
    tokens that the text spells out are text."""
    ids = hide_special_tokens(tokenizer.backend_tokenizer)[0].encode(text).ids
    if len(ids) <= 1 or ids[-1] != tokenizer.eos_token_id:
        ids.append(tokenizer.eos_token_id)
    return np.array(ids, np.uint32)


def score(
    config: EvaluateConfig, model: PreTrainedModel, processor: Any, tokens: TokenDataset, num_bytes: int,
    run: ScoringConfig | None,
) -> dict[str, Any]:  # fmt: skip
    """Loss in nats per token, perplexity, number of target tokens; bits per byte if every token is a target; with pictures
    or sounds the answers and their scores."""
    length = config.sequence_length or (run.data.sequence_length if run else longest_sequence(model))
    if length == sys.maxsize:
        raise UserError("the model has no longest sequence and is not in a run folder; give --sequence_length")
    if length > longest_sequence(model):
        raise UserError(f"sequence_length {length} is longer than the model's {longest_sequence(model)} positions")
    accelerator = Accelerator(
        cpu=parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.accelerator.is_available(),
        dataloader_config=DataLoaderConfiguration(split_batches=True),
    )
    objective = objective_options(model, run)
    if config.text_file is not None and objective.name == "instruction":  # every token of a plain text counts
        objective = replace(objective, name="causal")
    objective = replace(objective, blank_media=config.blank_media or objective.blank_media)
    tokenizer, collate = tokenizer_of(processor), objective_module(objective.name).build_collator(objective, processor)
    if not hasattr(collate, "check"):  # a model of text alone reads the texts
        tokens.media = None
    if tokens.media is not None:
        collate.check(tokens, length, "validation")
    by_default = "packed" if tokens.media is None else "padded"
    layout = build_layout(
        tokens, run.data.layout if run else by_default, length, pad_token_id=pad_token_id(tokenizer),
        vocab_size=len(tokenizer),
    )  # fmt: skip
    loader = build_evaluation_loader(layout, collate, config.batch_size)
    prepared, loader = accelerator.prepare(Objective(model, objective), loader)
    result = evaluate(accelerator, prepared, loader)
    scores: dict[str, Any] = {"loss": result.loss, "perplexity": result.perplexity, "target_tokens": result.num_tokens}
    if tokens.media is not None:
        scores |= answer(config, accelerator.unwrap_model(prepared).model, collate, layout, tokenizer)
    return scores | ({"bits_per_byte": result.bits_per_byte(num_bytes)} if objective.name == "causal" else {})


def answer(
    config: EvaluateConfig, model: PreTrainedModel, collate: Any, layout: Layout, tokenizer: Any
) -> dict[str, Any]:
    """What the model writes about each document, greedily, and the scores of that; nothing if none is to be answered."""
    answers = write_answers(model, collate, layout, tokenizer, max_new_tokens=config.max_new_tokens)
    return score_answers(answers) | {"answers": list(map(asdict, answers))} if answers else {}


def objective_options(model: PreTrainedModel, run: ScoringConfig | None) -> ObjectiveConfig:
    """The run's objective; without a run, the objective that suits the model's head."""
    if run is None:
        names = {"AutoModelForMaskedLM": "masked", "AutoModelForSeq2SeqLM": "span_corruption"}
        names |= {"AutoModelForImageTextToText": "captioning", "AutoModelForSpeechSeq2Seq": "transcription"}
        return ObjectiveConfig(name=names.get(saved_class(model.config).__name__, "causal"))  # type: ignore[arg-type]
    return run.objective


def xz_bits_per_byte(tokens: TokenDataset, tokenizer: Any) -> float:
    """Compression of the same documents, end to end, by `xz -9`; exact if the tokenizer decodes exactly."""
    documents = [
        tokenizer.decode(tokens.read(int(start), int(stop)), skip_special_tokens=True)
        for start, stop in zip(tokens.offsets[:-1], tokens.offsets[1:], strict=True)
    ]
    text = "\n".join(documents).encode()
    return 8 * len(lzma.compress(text, preset=9)) / len(text)


if __name__ == "__main__":
    run_script(main, config)
