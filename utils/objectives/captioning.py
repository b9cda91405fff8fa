"""Text with pictures: the next token, by a decoder that has read the pictures in the row before it.

A document holds a placeholder token where a picture stands. The model's own processor says what stands there in the
model's input: for most models, the placeholder as often as the picture has patches.
"""

import contextlib
import inspect
import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

import numpy as np
from PIL import Image, ImageOps
from transformers import AutoModelForImageTextToText, Idefics3Processor, LlavaProcessor  # type: ignore[attr-defined]

from utils.cli import UserError
from utils.config import ModelConfig, ObjectiveConfig
from utils.data.packing import IGNORED, Batch
from utils.data.token_dataset import PICTURE_FORMATS, TokenDataset
from utils.files import short
from utils.model.build import build_architecture, image_token, pad_token_id, special_tokens
from utils.pretrained import read_processor

AUTO_MODEL = AutoModelForImageTextToText
TOKEN_TYPES = {"token_type_ids", "mm_token_type_ids"}
OF_TEXT = {"input_ids", "attention_mask", *TOKEN_TYPES}  # a processor's outputs for the text
ORIENTATION = 0x0112  # EXIF's tag; from 5 on, the sides are swapped


def build_processor(config: ModelConfig, tokenizer: Any) -> Any:
    """The processor of `config.pretrained`, or one for the sizes of a new model, around the dataset's tokenizer.
    `UserError` if this architecture's cannot be built."""
    if config.pretrained is not None:
        processor = read_processor(config.pretrained)
        mark = getattr(processor, "image_token", None)
        if mark is None or not hasattr(processor, "image_processor"):
            raise UserError(
                f"model.pretrained {config.pretrained}: it has no processor with a token for pictures; choose another "
                "model, or build a new one with this as its language_model (model.parts)"
            )
        if tokenizer.convert_tokens_to_ids(mark) != processor.tokenizer.convert_tokens_to_ids(mark):
            raise UserError(
                f"model.pretrained {config.pretrained}: its processor's {mark} is another token in the "
                f"dataset; prepare the data with --tokenizer.pretrained {config.pretrained}"
            )
        processor.tokenizer = tokenizer
        return processor
    if config.architecture not in PROCESSORS:
        raise UserError(
            f"model.architecture {config.architecture}: objective.name captioning builds new models of "
            f"{', '.join(PROCESSORS)}; give one of them, or model.pretrained with the folder of another"
        )
    architecture = build_architecture(config, AUTO_MODEL, special_tokens(tokenizer))
    try:
        return PROCESSORS[config.architecture](architecture, tokenizer)
    except Exception as error:  # each class checks in its own way
        raise UserError(f"model: no processor fits these sizes: {short(error)}") from None


def build_llava_processor(architecture: Any, tokenizer: Any) -> Any:
    # These need no torchvision.
    from transformers import CLIPImageProcessorPil, SiglipImageProcessorPil  # type: ignore[attr-defined]

    vision = architecture.vision_config
    has_class_token = "clip" in vision.model_type and "siglip" not in vision.model_type
    side = {"height": vision.image_size, "width": vision.image_size}
    pictures = SiglipImageProcessorPil(size=side)
    if has_class_token:
        pictures = CLIPImageProcessorPil(size={"shortest_edge": vision.image_size}, crop_size=side)
    return LlavaProcessor(
        pictures, tokenizer, patch_size=vision.patch_size, chat_template=tokenizer.chat_template,
        vision_feature_select_strategy=architecture.vision_feature_select_strategy, image_token=image_token(tokenizer),
        num_additional_image_tokens=int(has_class_token),
    )  # fmt: skip


def build_idefics3_processor(architecture: Any, tokenizer: Any) -> Any:
    """For a picture as one tile; the processors of published models cut it into several."""
    from transformers import Idefics3ImageProcessorPil  # type: ignore[attr-defined]

    side, patch = architecture.vision_config.image_size, architecture.vision_config.patch_size
    edge = {"longest_edge": side}
    pictures = Idefics3ImageProcessorPil(size=edge, max_image_size=edge, do_image_splitting=False)
    length = (side // patch) ** 2 // architecture.scale_factor**2
    return Idefics3Processor(pictures, tokenizer, image_seq_len=length, chat_template=tokenizer.chat_template)


def check_model(model: Any) -> None:
    """`UserError` for a model that reads token types. Without them some fail, and others (Gemma 3, PaliGemma) silently
    mask a picture like text."""
    if TOKEN_TYPES & inspect.signature(model.forward).parameters.keys():
        raise UserError(
            f"{type(model).__name__} tells pictures from text by token types, which objective.name captioning does not "
            "give it; choose another model, such as Llava, Idefics3 or InternVL"
        )


PROCESSORS = {"llava": build_llava_processor, "idefics3": build_idefics3_processor}


def build_collator(config: ObjectiveConfig, processor: Any) -> "Captioning":
    return Captioning(processor, config.blank_media)


@dataclass
class Captioning:
    """Rows with a placeholder token for each picture → the model's inputs and targets.

    row       <s> a <image> on a table   and a picture of 4 patches
    input     <s> a     <image> <image> <image> <image> on a table
    target    a   -100  -100    -100    -100    on      a  table </s>
    """

    processor: Any
    blank: bool
    """Whether all pictures are grey, of the size that they have."""

    def __call__(self, rows: Batch, generators: Sequence[np.random.Generator]) -> Batch:
        """Rows → input_ids, attention_mask, targets (B, S), and what the processor makes of all pictures in order, such
        as pixel_values; nothing of the kind for rows without pictures."""
        if "media" not in rows:
            raise UserError("objective.name captioning needs pictures; prepare some with a source's image_column")
        used = (rows["input_ids"] == self.placeholder_id).sum(axis=1)
        pictures = [
            self.open(data) for files, number in zip(rows["media"], used, strict=True) for data in files[:number]
        ]
        blocks, inputs = self.process(pictures)
        targets = np.where(rows["targets"] == self.placeholder_id, IGNORED, rows["targets"])
        if "loss_mask" in rows:
            targets = np.where(rows["loss_mask"], targets, IGNORED)
        pieces, left = [], iter(blocks)
        for ids, wanted, size in zip(rows["input_ids"], targets, rows["lengths"].clip(min=1), strict=True):
            pieces.append(self.splice(ids[:size], wanted[:size], left))
        width = rows["input_ids"].shape[1]  # more than any row needs with data.pad_to max_length
        shape = (len(pieces), max(width, *(len(ids) for ids, _ in pieces)))
        batch = {
            "input_ids": np.full(shape, pad_token_id(self.processor.tokenizer)),
            "attention_mask": np.zeros(shape, np.int64), "targets": np.full(shape, IGNORED),
        }  # fmt: skip
        for row, (ids, wanted) in enumerate(pieces):
            batch["input_ids"][row, : len(ids)], batch["targets"][row, : len(ids)] = ids, wanted
            batch["attention_mask"][row, : len(ids)] = 1
        return batch | inputs

    @cached_property
    def placeholder_id(self) -> int:
        return int(self.processor.tokenizer.convert_tokens_to_ids(self.processor.image_token))

    def open(self, data: bytes) -> Image.Image:
        """The picture in RGB, the right side up, as transformers' pipelines open it."""
        picture = open_picture(data)
        with contextlib.suppress(Exception):  # damaged EXIF data, for which Pillow raises many types
            picture = ImageOps.exif_transpose(picture)
        picture = picture.convert("RGB")
        return Image.new("RGB", picture.size, "grey") if self.blank else picture

    def process(self, pictures: list[Image.Image]) -> tuple[list[np.ndarray], Batch]:
        """The ids that stand for each picture, and the model's inputs for all of them."""
        if not pictures:
            return [], {}
        marks = [self.processor.image_token] * len(pictures)
        found = dict(self.processor(text=marks, images=[[each] for each in pictures], add_special_tokens=False))
        blocks = [np.array(ids) for ids in found["input_ids"]]
        names = [name for name in found if name not in OF_TEXT]
        return blocks, {name: np.stack([np.asarray(value) for value in found[name]]) for name in names}

    def splice(
        self, ids: np.ndarray, targets: np.ndarray, blocks: Iterator[np.ndarray]
    ) -> tuple[np.ndarray, np.ndarray]:
        """A row's tokens and targets (S,), with the next of `blocks` in place of each placeholder. What follows a picture
        is predicted at its last position."""
        places = np.flatnonzero(ids == self.placeholder_id)
        sizes, parts = np.ones(len(ids), np.int64), np.split(ids, np.sort(np.concatenate([places, places + 1])))
        for number, place in enumerate(places):
            parts[2 * number + 1] = next(blocks)
            sizes[place] = len(parts[2 * number + 1])
        spread = np.full(sizes.sum(), IGNORED)
        spread[sizes.cumsum() - 1] = targets
        return np.concatenate(parts), spread

    def check(self, tokens: TokenDataset, sequence_length: int, split: str) -> None:
        """`UserError` for a document that does not fit into a row, or has other pictures than placeholders. Opens every
        picture's header: some 50 microseconds each."""
        length_of = lru_cache(maxsize=None)(lambda size: len(self.process([Image.new("RGB", size)])[0][0]))
        for document, (start, stop) in enumerate(zip(tokens.offsets[:-1], tokens.offsets[1:], strict=True)):
            files = [] if tokens.media is None else tokens.media[document]
            marks = int((tokens.read(int(start), int(stop)) == self.placeholder_id).sum())
            where = f"document {document} of the {split} split"
            if marks != len(files):
                raise UserError(f"{where} has {len(files)} pictures and {marks} placeholders; prepare the data again")
            text, of_pictures = int(stop - start) - marks, sum(length_of(size_of(data)) for data in files)
            if text + of_pictures > sequence_length:
                raise UserError(
                    f"{where} needs {text + of_pictures} positions, {text} of text and {of_pictures} of its "
                    f"{len(files)} pictures, more than data.sequence_length {sequence_length}; raise that, shorten the "
                    "text, or use smaller pictures: nothing is cut off"
                )

    def prompt_length(self, ids: np.ndarray, loss_mask: np.ndarray | None) -> int | None:
        """How many of a document's tokens (L,) the model reads before it answers: up to the assistant's first turn, or
        the last picture; None for a text without either."""
        marks = ids == self.placeholder_id if loss_mask is None else loss_mask == 1
        if not marks.any():
            return None
        return int(marks.argmax()) if loss_mask is not None else len(ids) - int(marks[::-1].argmax())


def open_picture(data: bytes) -> Image.Image:
    """A picture of which only the header is read, in one of the formats that prepare_data.py accepts."""
    return Image.open(io.BytesIO(data), formats=PICTURE_FORMATS)


def size_of(data: bytes) -> tuple[int, int]:
    """Width and height of a picture, the right side up; its pixels are not decoded."""
    picture, is_turned = open_picture(data), False
    with contextlib.suppress(Exception):  # as in `Captioning.open`
        is_turned = "exif" in picture.info and picture.getexif().get(ORIENTATION, 1) >= 5
    return (picture.height, picture.width) if is_turned else picture.size
