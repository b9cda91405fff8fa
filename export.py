"""Checkpoint in, transformers model out: saved, loaded again from the disk, and compared with the checkpoint.

    python export.py --checkpoint runs/demo --output exports/demo

`from_pretrained` of the Auto class that is printed opens the output folder, which appears only if its logits agree.
"""

import json
import re
import shutil
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from exporting import Format, check_formats, failed, find_faults, low_space, table, write_formats
from exporting.hub import find_changes, find_hub_faults, push
from utils.checkpoints import find_checkpoint, list_checkpoints, load_state, resolve_checkpoint
from utils.cli import NonNegativeFloat, UserError, parse_config, parse_sections, run_script
from utils.pretrained import check_adapters


@dataclass
class ExportConfig:
    """Options of export.py; the defaults are the demo's."""

    checkpoint: str = "runs/demo"
    """Run folder (its best checkpoint is exported, or that of the best average) or checkpoint folder."""
    output: str = "exports/demo"
    """Folder to write. It must not exist, except to push a finished export."""
    max_logit_difference: NonNegativeFloat = 1e-5
    """Largest difference allowed between the logits of the checkpoint and those of the reloaded export."""
    weights: Literal["trained", "average"] = "trained"
    """average: the moving average of the weights, if the run kept one (optimizer.ema_decay)."""
    formats: list[Format] = field(default_factory=lambda: ["safetensors"])
    """Files to write: safetensors (fp32) or safetensors-bf16, -f16; adapter (alone; otherwise merged); gguf (f32) or
    gguf-f16, -bf16, -q8_0, -q5_0, -q4_0, -q4_k_m; onnx, onnx-int8. A reader of each format opens its file in a fresh
    process and must say what the checkpoint says."""
    license: str | None = None
    """The licence that you give the model, such as apache-2.0, for its card (README.md)."""
    max_shard_size: str = "5GB"
    """Largest file of safetensors, as in 200MB; more weights are written into several files."""
    push_to_hub: str | None = None
    """USER/NAME, or NAME alone, of a model repository on the Hugging Face Hub, to which the export is pushed. It needs
    `hf auth login` or HF_TOKEN. If the push fails, the same command pushes what is missing."""
    private: bool = True
    """Whether a new repository on the Hub is private."""

    @property
    def pointers(self) -> tuple[str, ...]:
        """Which checkpoint of a run is exported: the first of these that it has."""
        return ("best_average", "best", "last") if self.weights == "average" else ("best", "last")

    def problems(self) -> list[str]:
        if not self.output:
            return ["output is empty; name a folder"]
        if not self.formats:
            return ["formats is empty; name one, such as safetensors"]
        if not re.fullmatch(r"[1-9]\d*[KMG]B", self.max_shard_size):
            return [f"max_shard_size is {self.max_shard_size}; write a whole number and KB, MB or GB, as in 5GB"]
        checkpoint = find_checkpoint(self.checkpoint, *self.pointers)
        if faults := find_faults(self.formats, checkpoint):
            return faults
        check_adapters(checkpoint)
        if self.push_to_hub is not None and (faults := find_hub_faults(self.push_to_hub)):
            return faults
        if not Path(self.output).exists():
            return []
        if self.push_to_hub is None:
            return [f"{self.output} exists; remove it, or choose another --output"]
        return find_changes(Path(self.output), self.facts(checkpoint))

    def facts(self, checkpoint: Path) -> dict[str, Any]:
        """What tells one export from another, for its report."""
        names = ("checkpoint", "weights", "formats", "license", "max_shard_size")
        return {name: getattr(self, name) for name in names} | {"optimizer_step": load_state(checkpoint).optimizer_step}


config = parse_config(ExportConfig, __doc__) if __name__ == "__main__" else None

import copy
import io

import numpy as np
import torch
from transformers import AutoModelForImageTextToText, AutoModelForSpeechSeq2Seq, PreTrainedModel

from exporting.model_card import write_card
from utils.checkpoint_tensors import load_average
from utils.config import ObjectiveConfig, ScoringConfig
from utils.files import flatten, follow_umask, read_yaml
from utils.model.build import (
    add_special_tokens,
    count_parameters,
    load_model,
    longest_sequence,
    saved_class,
    text_config,
)
from utils.objectives import objective_module
from utils.pretrained import read_processor, tokenizer_of

PROBE_TOKENS, PROBE_TEXT = 256, 16  # of a text; beside a picture
MEDIA_OBJECTIVES = {AutoModelForImageTextToText: "captioning", AutoModelForSpeechSeq2Seq: "transcription"}
MERGING_TOLERANCE = 1e-4  # of the largest logit: fp32 rounds the sum of weights and adapters, once per layer


def main(config: ExportConfig) -> None:
    output = Path(config.output)
    if output.exists() and config.push_to_hub is not None:  # a finished export, as `problems` has checked
        return push(output, config.push_to_hub, config.private)
    checkpoint = resolve_checkpoint(config.checkpoint, *config.pointers)
    model = load_model(checkpoint)
    if config.weights == "average":
        load_average(checkpoint, model)
    model.eval()
    processor = read_processor(checkpoint)
    tokenizer = tokenizer_of(processor)

    work = output.with_name(f".{output.name}.exporting")
    shutil.rmtree(work, ignore_errors=True)
    try:
        work.mkdir(parents=True)
        # Adapters are merged into the weights; the result is compared with the unmerged model.
        merged: Any = model
        if hasattr(model, "merge_and_unload"):
            merged = copy.deepcopy(merged).merge_and_unload()
        add_special_tokens(merged, tokenizer)
        if merged.config.model_type == "whisper":
            suit_whisper_pipeline(merged, processor)
        auto_model = saved_class(merged.config)
        check_formats(config.formats, merged, tokenizer, auto_model.__name__)
        merged.save_pretrained(work, max_shard_size=config.max_shard_size)
        processor.save_pretrained(work)
        # Loaded as by anyone else, without options for precision or attention.
        inputs = build_probe(merged, processor)
        difference, _ = largest_logit_difference(merged, auto_model.from_pretrained(work).eval(), inputs)
        merging, size = largest_logit_difference(model, merged, inputs)  # rounding only; 0 without adapters
        report = config.facts(checkpoint) | {
            "opens_with": auto_model.__name__,
            "pretrained": keep_terms(checkpoint, work),
            "parameters": count_parameters(merged),
            "max_logit_difference": difference,
            "max_logit_difference_of_merging": merging,
            "allowed_logit_difference": config.max_logit_difference,
            "run": describe_run(checkpoint),
        }
        (work / "export_report.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
        if not difference <= config.max_logit_difference:
            raise UserError(
                f"the export's logits differ from the checkpoint's by {difference:.2e}, more than "
                f"--max_logit_difference {config.max_logit_difference:.0e} allows; nothing was written"
            )
        if not merging <= MERGING_TOLERANCE * size:
            raise UserError(
                f"merging the adapters changes the logits by {merging:.2e} of {size:.1f}; nothing was written"
            )
        rows = write_formats(
            config.formats, merged, tokenizer, checkpoint, work, auto_model.__name__, output.name,
            adapters=model, max_shard_size=config.max_shard_size,
        )  # fmt: skip
        if rows:
            print(table(rows))
        if faults := failed(rows):
            raise UserError(f"{' | '.join(faults)}; nothing was written")
        report["files"] = rows
        (work / "export_report.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
        write_card(work, output.name, checkpoint, report, config.license)
        follow_umask(work)
        if output.exists():
            raise UserError(f"{output} has appeared meanwhile; remove it, or choose another --output")
        work.rename(output)
    except OSError as error:
        note = low_space(work.parent, sum(weight.nbytes for weight in model.parameters()))
        raise UserError(f"cannot write {output}: {error.strerror or error}{note}") from error
    finally:
        shutil.rmtree(work, ignore_errors=True)
    opens = f"; opens with {auto_model.__name__}" if any(output.glob("model*.safetensors")) else ""
    print(f"exported {checkpoint} (step {report['optimizer_step']}) to {output}{opens}")
    found = list_checkpoints(checkpoint.parent)
    if checkpoint in found[:-1]:
        newer = ", ".join(path.name for path in found[found.index(checkpoint) + 1 :])
        print(f"newer checkpoints of this run, which are not exported: {newer}")
    print(
        f"largest logit difference to the checkpoint, in fp32: {difference:.2e} (allowed {config.max_logit_difference:.0e})"
    )
    if config.push_to_hub is not None:
        push(output, config.push_to_hub, config.private)


def describe_run(checkpoint: Path) -> dict[str, Any] | None:
    """What evaluate.py needs to score an export like its run; None for a checkpoint outside a run folder."""
    path = checkpoint.parent.parent / "config.yaml"
    if not path.is_file():
        return None
    run = parse_sections(ScoringConfig, read_yaml(path), path)
    data = {"sequence_length": run.data.sequence_length, "layout": run.data.layout}
    return {"data": data, "objective": asdict(run.objective)}


def keep_terms(checkpoint: Path, work: Path) -> str | None:
    """Copy the licence of the weights that the run started from, because its terms hold for the export too; returns the
    name of their folder. The model card is not copied: it describes another model."""
    path = checkpoint.parent.parent / "config.yaml"
    name = flatten(read_yaml(path)).get("model.pretrained") if path.is_file() else None
    if not isinstance(name, str):
        return None
    for pattern in ("LICEN[CS]E*", "NOTICE*", "USE_POLICY*"):
        for file in Path(name).glob(pattern):
            shutil.copyfile(file, work / file.name)
    return name


def suit_whisper_pipeline(model: PreTrainedModel, processor: Any) -> None:
    """Give a Whisper with a tokenizer of ours, in place, what transformers' pipeline takes for granted: the class of its
    tokenizer, and a longest text."""
    from transformers import WhisperTokenizer  # type: ignore[attr-defined]

    tokenizer = processor.tokenizer
    model.generation_config.max_length = longest_sequence(model)
    if not isinstance(tokenizer, WhisperTokenizer):
        # It begins a text with the token of a name that ours lacks, and hence with its unknown one.
        processor.tokenizer = WhisperTokenizer(
            tokenizer_object=tokenizer.backend_tokenizer, bos_token=tokenizer.bos_token, unk_token=tokenizer.bos_token,
            eos_token=tokenizer.eos_token, pad_token=tokenizer.pad_token, predict_timestamps=True,
        )  # fmt: skip


def build_probe(model: PreTrainedModel, processor: Any) -> dict[str, torch.Tensor]:
    """What a model reads in the comparison: two rows of random tokens (2, T), and a picture or a sound of noise in each."""
    length = min(PROBE_TOKENS, longest_sequence(model))
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(text_config(model.config).vocab_size, (2, length), generator=generator)
    auto_model, noise = saved_class(model.config), np.random.default_rng(0)
    if auto_model not in MEDIA_OBJECTIVES:
        return {"input_ids": ids} | ({"decoder_input_ids": ids.flip(1)} if model.config.is_encoder_decoder else {})
    file = io.BytesIO()
    if auto_model is AutoModelForImageTextToText:
        from PIL import Image

        Image.fromarray(noise.integers(0, 256, (48, 64, 3), np.uint8)).save(file, "PNG")
        mark = tokenizer_of(processor).convert_tokens_to_ids(processor.image_token)
        ids = ids[:, :PROBE_TEXT]
        ids[ids == mark] = 0
        ids[:, 1] = mark
    else:
        import soundfile

        rate = processor.feature_extractor.sampling_rate
        soundfile.write(file, noise.normal(0, 0.1, rate), rate, format="WAV")
    rows = {"input_ids": ids.numpy(), "targets": ids.numpy(), "lengths": np.array([ids.shape[1]] * 2)}
    rows["media"] = np.empty(2, object)
    rows["media"][:] = [[file.getvalue()]] * 2
    collate = objective_module(MEDIA_OBJECTIVES[auto_model]).build_collator(ObjectiveConfig(), processor)
    return {name: torch.from_numpy(values) for name, values in collate(rows, []).items() if name != "targets"}


@torch.no_grad()
def largest_logit_difference(
    model: PreTrainedModel, other: PreTrainedModel, inputs: dict[str, torch.Tensor]
) -> tuple[float, float]:
    """The largest difference over all positions of `inputs` and the vocabulary; the largest logit. NaN stays NaN."""
    logits = model(**inputs).logits
    return float((logits - other(**inputs).logits.float()).abs().max()), float(logits.abs().max())


if __name__ == "__main__":
    run_script(main, config)
