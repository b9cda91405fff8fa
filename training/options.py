"""The options of train.py, checked as far as possible before torch's slow import."""

from importlib.util import find_spec
from pathlib import Path

from training.optimization.optimizers import check_optimizer
from utils.cli import UserError, exit_with, parse_config
from utils.config import TrainConfig
from utils.data.token_dataset import load_manifest


def read_options(description: str | None) -> TrainConfig:
    """The command line as a TrainConfig. Exits with one line for a mistake, a missing dataset or a missing library."""
    config = parse_config(TrainConfig, description)
    try:
        load_manifest(config.data.dataset)
        check_optimizer(config.optimizer, installed=not config.dry_run)
        if config.model.lora.rank and find_spec("peft") is None:
            raise UserError("model.lora needs the library peft: pip install -e '.[lora]'")
        if not config.dry_run:
            check_resume(config)
    except (UserError, OSError) as error:
        exit_with(error)
    return config


def check_resume(config: TrainConfig) -> None:
    """`UserError` if the run folder holds a run that this launch must not continue."""
    if (Path(config.output) / "config.yaml").is_file() and config.checkpoint.resume == "never":
        remedy = "continue it with --checkpoint.resume auto, or choose another --output"
        raise UserError(f"{config.output} already holds a run; {remedy}")
