"""The options of train.py, checked as far as possible before torch's slow import."""

import sys
from importlib.util import find_spec
from pathlib import Path

from training.optimization.optimizers import check_optimizer
from training.recipe import commands_for
from utils.cli import UserError, exit_with, parse_config, read_precision
from utils.config import TrainConfig
from utils.data.token_dataset import load_manifest
from utils.pretrained import check_name, check_peft

STOP_FILE = "stop"  # in the run folder: its user asks the run to save and end
NEEDED_MEDIA = {"captioning": "image", "transcription": "audio"}  # objective → kind in a dataset's manifest
# What makes a conversation of messages, if no tokenizer that has a template is given.
TEMPLATE = (
    "--tokenizer.chat_template configs/chat_template.jinja --tokenizer.special_tokens '[<|im_start|>, <|im_end|>]'"
)


def read_options(description: str | None, argv: list[str] | None = None, *, runs: bool = True) -> TrainConfig:
    """The command line as a TrainConfig. Exits with one line for a mistake, a missing dataset or a missing library.

    `runs`: whether a run folder will be written, and trackers used.
    """
    config = parse_config(TrainConfig, description, argv)
    try:
        check_data(config, sys.argv[1:] if argv is None else argv)
        check_libraries(config, trackers=runs)
        if config.model.pretrained is not None:
            check_name("model.pretrained", config.model.pretrained, ("config.json",))
        if runs and not config.dry_run:
            check_output(config)
    except (UserError, OSError) as error:
        exit_with(error)
    return config


def check_data(config: TrainConfig, argv: list[str]) -> None:
    """`UserError` if the dataset is missing, naming the recipe's own commands, or does not suit the objective."""
    dataset = config.data.dataset
    if not Path(dataset).exists() and (commands := commands_for(dataset, argv)):
        raise UserError(f"dataset {dataset} does not exist; make it with: {commands}")
    name, wanted = config.objective.name, NEEDED_MEDIA.get(config.objective.name)
    is_chat, sources = name == "instruction", "'[my_texts/]'"
    if is_chat:
        sources = f"'[my_chats.jsonl]' --messages_column messages {TEMPLATE}"
    elif wanted:
        sources = f"'[{{path: my_{wanted}s/, {wanted}_column: file_name}}]'"
    if config.model.pretrained is not None:
        sources = f"{sources.removesuffix(TEMPLATE).rstrip()} --tokenizer.pretrained {config.model.pretrained}"
    manifest = load_manifest(dataset, sources)
    splits, media = manifest["splits"], manifest.get("media", {}).get("kind")
    if wanted and media != wanted:
        why = f"objective.name {name} needs texts with {wanted}s, but {dataset} has none"
        raise UserError(f"{why}; prepare some with: python prepare_data.py --sources {sources} --output data/{wanted}s")
    if media and not wanted:
        fitting = next(each for each, kind in NEEDED_MEDIA.items() if kind == media)
        raise UserError(f"objective.name {name} reads text alone, and {dataset} has {media}s; choose {fitting}")
    if media and config.data.layout != "padded":
        raise UserError(f"data.layout {config.data.layout}: rows with {media}s need data.layout padded")
    if is_chat and "assistant_tokens" not in splits["validation"]:
        why = f"objective.name instruction needs conversations, but {dataset} has none"
        raise UserError(f"{why}; prepare some with: python prepare_data.py --sources {sources} --output data/chats")


def check_libraries(config: TrainConfig, trackers: bool) -> None:
    """`UserError` naming a library that the options need and that is not installed."""
    check_optimizer(config.optimizer, installed=not config.dry_run)
    if config.model.lora.rank:
        check_peft()
    for name in config.tracking.trackers if trackers and not config.dry_run else ():
        if find_spec(name) is None:
            raise UserError(f"tracking.trackers names {name}, which is not installed: pip install {name}")
    if read_precision() == "fp8" and find_spec("torchao") is None:
        raise UserError("the launch asks for fp8, which needs torchao: pip install -e '.[fp8]', or choose bf16")


def check_output(config: TrainConfig) -> None:
    """`UserError` if the run folder cannot be one, or holds a run that this launch must not continue."""
    run = Path(config.output)
    if run.exists() and not run.is_dir():
        raise UserError(f"run folder {run} cannot be made: it is a file; choose another --output")
    if (run / "config.yaml").is_file():
        if config.checkpoint.resume == "never":
            remedy = "continue it with --checkpoint.resume auto, or choose another --output"
            raise UserError(f"{config.output} already holds a run; {remedy}")
    # The user may ask for a stop while the first launch is still importing.
    elif run.is_dir() and any(path.name[0] != "." and path.name != STOP_FILE for path in run.iterdir()):
        raise UserError(f"{run} is not empty and not a run folder (no config.yaml); choose another --output")
