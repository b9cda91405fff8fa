"""Text that is spoken: an encoder reads the sound, a decoder predicts the next token of what is said."""

import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from transformers import (  # type: ignore[attr-defined]
    AutoModelForSpeechSeq2Seq,
    Wav2Vec2FeatureExtractor,
    Wav2Vec2Processor,
    WhisperFeatureExtractor,
    WhisperProcessor,
)

from utils.cli import UserError
from utils.config import ModelConfig, ObjectiveConfig
from utils.data.packing import IGNORED, Batch
from utils.data.token_dataset import TokenDataset
from utils.model.build import build_architecture, pad_token_id, special_tokens, text_prefix
from utils.pretrained import read_processor

AUTO_MODEL = AutoModelForSpeechSeq2Seq
NO_TIMESTAMPS = "<|notimestamps|>"
FRAMES_PER_SECOND = 50  # of Whisper's encoder


def build_processor(config: ModelConfig, tokenizer: Any) -> Any:
    """The processor of `config.pretrained`, or one for the sizes of a new model, around the dataset's tokenizer.
    `UserError` if this architecture's cannot be built."""
    if config.pretrained is not None:
        processor = read_processor(config.pretrained)
        if not hasattr(processor, "feature_extractor"):
            why = "it has no processor for sounds; choose another model"
            raise UserError(f"model.pretrained {config.pretrained}: {why}")
        processor.tokenizer = tokenizer
        return processor
    if config.architecture not in PROCESSORS:
        raise UserError(
            f"model.architecture {config.architecture}: objective.name transcription builds new models of "
            f"{', '.join(PROCESSORS)}; give one of them, or model.pretrained with the folder of another"
        )
    return PROCESSORS[config.architecture](build_architecture(config, AUTO_MODEL, special_tokens(tokenizer)), tokenizer)


def build_whisper_processor(architecture: Any, tokenizer: Any) -> Any:
    """Adds the token behind which transformers' pipeline takes every token for a point in time."""
    seconds, rest = divmod(architecture.max_source_positions, FRAMES_PER_SECOND)
    if rest or not seconds:
        raise UserError(
            f"model.overrides: max_source_positions {architecture.max_source_positions} must be a multiple of "
            f"{FRAMES_PER_SECOND}, the positions of a second"
        )
    if NO_TIMESTAMPS not in tokenizer.get_vocab():
        tokenizer.add_special_tokens({"extra_special_tokens": [NO_TIMESTAMPS]}, replace_extra_special_tokens=False)
    return WhisperProcessor(WhisperFeatureExtractor(architecture.num_mel_bins, chunk_length=seconds), tokenizer)


def build_moonshine_processor(architecture: Any, tokenizer: Any) -> Any:
    return Wav2Vec2Processor(Wav2Vec2FeatureExtractor(do_normalize=False, return_attention_mask=True), tokenizer)


PROCESSORS = {"whisper": build_whisper_processor, "moonshine": build_moonshine_processor}


def build_collator(config: ObjectiveConfig, processor: Any) -> "Transcription":
    return Transcription(processor, config.blank_media, text_prefix(processor.tokenizer))


@dataclass
class Transcription:
    """Rows with a sound each → the model's inputs and targets.

    The decoder begins with the tokens that the tokenizer puts in front of a text. If it puts none there, the decoder
    begins with the padding token, and the row's first token is a target too.
    """

    processor: Any
    blank: bool
    """Whether all sounds are silent, of the length that they have."""
    prefix: list[int]

    def __call__(self, rows: Batch, generators: Sequence[np.random.Generator]) -> Batch:
        """Rows → decoder_input_ids, targets (B, T), and what the feature extractor makes of the sounds, such as
        input_features (B, mel bins, frames). A padding row has a silent one."""
        if "media" not in rows:
            raise UserError("objective.name transcription needs sounds; prepare some with a source's audio_column")
        sounds = [self.decode(files[0]) if files else None for files in rows["media"]]
        # No longer than the others: Moonshine's norms count what pads a sound.
        silence = np.zeros(min((len(sound) for sound in sounds if sound is not None), default=self.rate), np.float32)
        sounds = [silence if sound is None else sound for sound in sounds]
        options = {} if hasattr(self.extractor, "n_samples") else {"padding": True}  # Whisper's has one length
        found = self.extractor(sounds, sampling_rate=self.rate, return_tensors="np", **options)
        ids, targets = rows["input_ids"], rows["targets"]
        if not self.prefix:
            first = np.where(rows["lengths"][:, None] > 0, ids[:, :1], IGNORED)
            start = np.full((len(ids), 1), pad_token_id(self.processor.tokenizer))
            ids, targets = np.concatenate([start, ids], axis=1), np.concatenate([first, targets], axis=1)
        return {"decoder_input_ids": ids, "targets": targets, **found}

    @property
    def extractor(self) -> Any:
        return self.processor.feature_extractor

    @property
    def rate(self) -> int:
        """Samples per second that the model reads."""
        return int(self.extractor.sampling_rate)

    def decode(self, data: bytes) -> np.ndarray:
        """One channel at `rate`, (samples,) fp32."""
        import soundfile  # here: text needs neither library

        samples, rate = soundfile.read(io.BytesIO(data), dtype="float32", always_2d=True)
        samples = samples.mean(axis=1)
        if rate != self.rate:
            import soxr

            samples = soxr.resample(samples, rate, self.rate)
        samples = np.pad(samples, (0, max(0, self.rate // 10 - len(samples))))  # Moonshine fails below 56 milliseconds
        return np.zeros_like(samples) if self.blank else samples

    def check(self, tokens: TokenDataset, sequence_length: int, split: str) -> None:
        """`UserError` for a document that does not fit into a row, has not one sound, or one that is too long for the
        model. Opens every sound's header."""
        import soundfile

        longest = getattr(self.extractor, "n_samples", None)
        limit = sequence_length + (1 if self.prefix else -1)
        for document, size in enumerate(np.diff(tokens.offsets).tolist()):
            files = [] if tokens.media is None else tokens.media[document]
            where = f"document {document} of the {split} split"
            if len(files) != 1:
                raise UserError(f"{where} has {len(files)} sounds in place of one; prepare the data again")
            if size > limit:
                raise UserError(
                    f"{where} has {size} tokens, more than the {limit} that data.sequence_length {sequence_length} holds; "
                    "raise that, or shorten the text: nothing is cut off"
                )
            seconds = soundfile.info(io.BytesIO(files[0])).duration
            if longest is not None and seconds * self.rate > longest:
                raise UserError(
                    f"{where} has a sound of {seconds:.1f} seconds, and the model reads {longest / self.rate:.1f}; raise "
                    "max_source_positions in model.overrides, or cut the sound: nothing is cut off here"
                )

    def prompt_length(self, ids: np.ndarray, loss_mask: np.ndarray | None) -> int | None:
        """How many of a document's tokens the decoder begins with."""
        return len(self.prefix)
