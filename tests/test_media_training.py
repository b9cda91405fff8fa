"""Texts with pictures and with sounds: the loss, the batches, a run, its export, and transformers' own pipelines."""

import io
import json
import random
import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import soundfile
import torch
import yaml
from conftest import ROOT, call, error_line, metrics, script, train_losses
from PIL import Image, UnidentifiedImageError
from safetensors.torch import load_file
from transformers import (
    AutoModelForImageTextToText,
    AutoTokenizer,
    Gemma3Config,
    LlamaConfig,
    LlamaForCausalLM,
    pipeline,
)

from training.optimization.optimizers import decay_groups
from utils.answers import Answer, iter_prompts, read_prompt, score_answers, word_errors
from utils.cli import UserError
from utils.config import ModelConfig, ObjectiveConfig, OptimizerConfig
from utils.data.order import PADDING_SAMPLE
from utils.data.packing import IGNORED, PaddedLayout
from utils.data.token_dataset import open_split
from utils.model.build import build_model, pad_token_id
from utils.objectives import Objective, build_processor, objective_module

COLOURS = {"red": (255, 0, 0), "green": (0, 160, 0), "blue": (0, 0, 255), "black": (0, 0, 0)}
SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
TEXT = SIZES | {"model_type": "llama", "num_key_value_heads": 2, "max_position_embeddings": 64}
VISION = SIZES | {"image_size": 32, "patch_size": 8}
WHISPER = {
    "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 2, "decoder_attention_heads": 2,
    "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "max_source_positions": 50, "max_target_positions": 32,
}  # fmt: skip
MODELS = {
    "llava": {
        "vision_config": VISION | {"model_type": "siglip_vision_model", "vision_use_head": False}, "text_config": TEXT,
        "vision_feature_select_strategy": "full", "vision_feature_layer": -1,
    },
    "idefics3": {"vision_config": VISION, "text_config": TEXT, "scale_factor": 2},
    "whisper": WHISPER,
    "moonshine": {
        "hidden_size": 32, "intermediate_size": 64, "encoder_num_hidden_layers": 2, "decoder_num_hidden_layers": 2,
        "encoder_num_attention_heads": 2, "decoder_num_attention_heads": 2, "max_position_embeddings": 64,
    },
}  # fmt: skip
OBJECTIVES = {"llava": "captioning", "idefics3": "captioning", "whisper": "transcription", "moonshine": "transcription"}
SHORT = {
    "data": {"sequence_length": 64, "layout": "padded"},
    "batch": {"global_batch_size": 8}, "schedule": {"warmup_steps": 1, "max_steps": 4}, "checkpoint": {"every_steps": 2},
    "evaluation": {"every_steps": 2},
    "tracking": {"trackers": [], "log_every_steps": 1, "sample_every_steps": 4, "sample_max_new_tokens": 4},
}  # fmt: skip


def picture(colour: str, size: tuple[int, int] = (24, 16), mark: int = 0) -> bytes:
    file, image = io.BytesIO(), Image.new("RGB", size, COLOURS[colour])
    image.putpixel((0, 0), (mark, mark, mark))  # documents with the same picture would be in one split
    image.save(file, "PNG")
    return file.getvalue()


def sound(number: int, rate: int = 8000) -> bytes:
    """Half a second in two channels, at another rate than the models'."""
    wave = 0.3 * np.sin(np.arange(rate // 2) * 0.1 * (1 + number))
    file = io.BytesIO()
    soundfile.write(file, np.stack([wave, wave], axis=1), rate, format="WAV")
    return file.getvalue()


def pictures_and_texts() -> list[tuple[str, list[bytes]]]:
    """Rows with a picture in front, with two among the words, and without any."""
    draw, rows = random.Random(0), []
    for number in range(80):
        one, two = draw.choices(list(COLOURS), k=2)
        if number % 4 == 0:
            rows.append((f"no picture of {one} and {two} {number}", []))
        elif number % 4 == 1:
            rows.append(
                (
                    f"first <image> then <image> so {one} and {two} {number}",
                    [picture(one, mark=number), picture(two, (16, 24))],
                )
            )
        else:
            rows.append((f"a {one} picture {number}", [picture(one, mark=number)]))
    return rows


@pytest.fixture(scope="module")
def datasets(tmp_path_factory):
    """Folder with `image`, `audio` and `chat`, prepared by prepare_data.py."""
    folder = tmp_path_factory.mktemp("media")
    texts, files = zip(*pictures_and_texts(), strict=True)
    pq.write_table(pa.table({"text": texts, "media": list(files)}), folder / "image.parquet")
    words = ["low", "middle", "high", "silent"]
    spoken = [f"{words[number % 4]} sound {number}" for number in range(40)]
    pq.write_table(
        pa.table({"text": spoken, "media": [sound(number % 4) for number in range(40)]}), folder / "audio.parquet"
    )
    common = ["--validation_fraction", "0.2", "--tokenizer.vocab_size", "320"]
    common += ["--deduplication.near_threshold", "null"]
    for kind in ("image", "audio"):
        source = f"[{{path: {folder / kind}.parquet, {kind}_column: media}}]"
        code, _, err = call("prepare_data.py", "--sources", source, "--output", folder / kind, *common)
        assert code == 0, err
    return folder


def build(name: str, datasets, **options):
    """(layout of the validation split, collator, model, processor, objective) of a small random model."""
    folder = datasets / ("image" if OBJECTIVES[name] == "captioning" else "audio")
    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
    config = ModelConfig(architecture=name, size=None, overrides=MODELS[name], **options)
    processor = build_processor(OBJECTIVES[name], config, tokenizer)
    task = objective_module(OBJECTIVES[name])
    torch.manual_seed(0)
    model = build_model(config, tokenizer, task.AUTO_MODEL).eval()
    collate = task.build_collator(ObjectiveConfig(OBJECTIVES[name]), processor)
    layout = PaddedLayout(open_split(folder, "validation"), 64, pad_token_id(tokenizer))
    return layout, collate, model, processor, Objective(model, ObjectiveConfig(OBJECTIVES[name]))


def tensors(batch) -> dict[str, torch.Tensor]:
    return {name: torch.from_numpy(values) for name, values in batch.items()}


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_the_loss_of_a_batch_is_what_the_model_says_of_each_text_by_itself(name, datasets):
    """The other side of the comparison calls the processor as its users do, on a text and its pictures."""
    layout, collate, model, processor, objective = build(name, datasets)
    texts = dict(pictures_and_texts())
    rows = [*range(min(8, len(layout))), PADDING_SAMPLE]
    batch = collate(layout.__getitems__(rows), [])
    total, targets, kinds = 0.0, 0, set()
    for row in rows[:-1]:
        start, stop = layout.tokens.offsets[row : row + 2].tolist()
        ids = layout.tokens.read(start, stop)
        if OBJECTIVES[name] == "captioning":
            text = processor.tokenizer.decode(ids)
            files = texts[text.replace("<|endoftext|>", "").replace("<image>a ", "a ")]
            pictures = [Image.open(io.BytesIO(data)) for data in files]
            inputs = processor(text=text, images=pictures or None, add_special_tokens=False, return_tensors="pt")
            inputs = {name: value for name, value in inputs.items() if name != "token_type_ids"}
            labels, is_own = inputs["input_ids"].clone(), torch.zeros(inputs["input_ids"].shape, dtype=torch.bool)
            ours = collate(layout.__getitems__([row]), [])
            is_own[0, 1:] = torch.from_numpy(ours["targets"][0, :-1] != IGNORED)  # what the processor adds is no target
            labels[~is_own] = IGNORED
            kinds.add(len(files))
        else:
            samples = collate.decode(layout.tokens.media[row][0])
            inputs = dict(processor.feature_extractor(samples, sampling_rate=16000, return_tensors="pt"))
            labels = torch.from_numpy(ids[None, 1:])
        found = model(**inputs, labels=labels)
        number = int((labels[:, (OBJECTIVES[name] == "captioning") :] != IGNORED).sum())
        total, targets = total + float(found.loss) * number, targets + number
    assert int((batch["targets"] != IGNORED).sum()) == targets
    assert float(objective(**tensors(batch))) == pytest.approx(total, rel=1e-6)
    assert kinds == ({0, 1, 2} if OBJECTIVES[name] == "captioning" else set())


@pytest.mark.parametrize("name", ["llava", "idefics3"])
def test_a_target_is_the_next_token_and_never_a_picture(name, datasets):
    layout, collate, _, _, _ = build(name, datasets)
    rows = layout.__getitems__(list(range(len(layout))))
    batch = collate(rows, [])
    marks = (batch["input_ids"] == collate.placeholder_id).sum(axis=1)
    pictures = np.array([len(files) for files in rows["media"]])
    assert (marks == pictures * (16 if name == "llava" else 4)).all() and {0, 1, 2} <= set(pictures.tolist())
    has_target = batch["targets"][:, :-1] != IGNORED
    follows = batch["attention_mask"][:, 1:] == 1
    assert (batch["targets"][:, :-1] == batch["input_ids"][:, 1:])[has_target & follows].all()
    assert not (batch["targets"] == collate.placeholder_id).any()
    stored = (rows["targets"] != IGNORED) & (rows["targets"] != collate.placeholder_id)
    assert has_target.sum() + (batch["targets"][:, -1] != IGNORED).sum() == stored.sum()
    fixed = PaddedLayout(layout.tokens, 64, layout.pad_token_id, fixed_length=True)
    for row in range(4):  # whatever they hold
        assert collate(fixed.__getitems__([row]), [])["input_ids"].shape == (1, 64)
    assert collate(layout.__getitems__([PADDING_SAMPLE]), []).keys() == {"input_ids", "attention_mask", "targets"}


def test_what_the_models_read_is_rgb_the_right_side_up_and_one_channel_at_their_rate(datasets):
    _, collate, _, _, _ = build("llava", datasets)
    file, exif = io.BytesIO(), Image.Exif()
    exif[0x0112] = 6  # a quarter turn
    Image.new("CMYK", (40, 20)).save(file, "JPEG", exif=exif)
    opened = collate.open(file.getvalue())
    assert opened.mode == "RGB" and opened.size == (20, 40)
    for kind in ("PNG", "WEBP"):  # Pillow opens it and fails at its EXIF data
        damaged = io.BytesIO()
        Image.new("RGB", (40, 20)).save(damaged, kind, exif=b"damaged, no TIFF")
        assert collate.open(damaged.getvalue()).size == (40, 20)
        assert objective_module("captioning").size_of(damaged.getvalue()) == (40, 20)
    module = objective_module("captioning")
    assert module.size_of(file.getvalue()) == (20, 40) and module.size_of(picture("red")) == (24, 16)
    blank = module.build_collator(ObjectiveConfig("captioning", blank_media=True), collate.processor)
    assert blank.open(picture("red")).getextrema() == ((128, 128),) * 3

    _, collate, _, processor, _ = build("whisper", datasets)
    samples = collate.decode(sound(1))
    assert samples.shape == (8000,) and samples.dtype == np.float32
    assert np.abs(np.fft.rfft(samples)).argmax() == pytest.approx(0.2 / (2 * np.pi) * 4000, abs=1)
    silent = objective_module("transcription").build_collator(
        ObjectiveConfig("transcription", blank_media=True), processor
    )
    assert not silent.decode(sound(1)).any() and len(silent.decode(sound(1))) == 8000


def test_models_that_read_token_types_are_refused():
    """Gemma 3 would not fail: it would mask its pictures like text."""
    config = Gemma3Config(text_config=SIZES | {"vocab_size": 300, "head_dim": 16}, vision_config=VISION)
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(config)
    with pytest.raises(UserError, match="token types"):
        Objective(model, ObjectiveConfig("captioning"))


def test_a_dataset_cannot_have_another_program_run(datasets):
    """Pillow would run Ghostscript for EPS, and prepare_data.py never stores it."""
    file = io.BytesIO()
    Image.new("RGB", (8, 6)).save(file, "EPS")
    for function in (build("llava", datasets)[1].open, objective_module("captioning").size_of):
        with pytest.raises(UnidentifiedImageError):
            function(file.getvalue())


@pytest.mark.parametrize("name", ["whisper", "moonshine"])
@torch.no_grad()
def test_a_sound_of_a_sample_can_be_read(name, datasets):
    layout, collate, _, _, objective = build(name, datasets)
    file = io.BytesIO()
    soundfile.write(file, np.full(1, 0.1), 16000, format="WAV")
    rows = layout.__getitems__([0])
    rows["media"][0] = [file.getvalue()]
    assert objective(**tensors(collate(rows, []))).isfinite()


def test_few_bytes_of_pictures_are_held_while_answers_are_written(datasets, monkeypatch):
    """Rows in parts give the same prompts; each part but the last is as large as it may be."""
    layout, collate, _, processor, _ = build("llava", datasets)
    whole = list(iter_prompts(layout, collate, processor.tokenizer, None))
    limit = 3 * 32 * 32 * 3 * 4  # three pictures
    monkeypatch.setattr("utils.answers.BYTES_AT_ONCE", limit)
    parts = list(iter_prompts(layout, collate, processor.tokenizer, None))
    assert len(whole) == 1 and len(parts) > 2
    assert {row: text for _, texts in parts for row, text in texts.items()} == whole[0][1]
    assert all(prompts.keys() == texts.keys() and len(prompts) <= 3 for prompts, texts in parts)
    assert sum(len(texts) for _, texts in iter_prompts(layout, collate, processor.tokenizer, 5)) == 5


def test_documents_that_do_not_fit_are_refused_with_their_sizes(datasets):
    layout, collate, _, _, _ = build("llava", datasets)
    collate.check(layout.tokens, 64, "validation")
    with pytest.raises(UserError, match=r"needs \d+ positions, \d+ of text and 32 of its 2 pictures.* 32;"):
        collate.check(layout.tokens, 32, "validation")
    layout, collate, _, _, _ = build("whisper", datasets)
    with pytest.raises(UserError, match=r"tokens, more.*sequence_length 4 "):
        collate.check(layout.tokens, 4, "validation")
    collate.processor.feature_extractor.n_samples = 4000
    with pytest.raises(UserError, match=r"0\.5 seconds"):
        collate.check(layout.tokens, 64, "validation")


def test_scores_of_answers_by_hand():
    assert word_errors(["the", "cat", "sat"], ["the", "hat", "sat", "down"]) == 2
    assert word_errors([], ["a"]) == 1 and word_errors(["a"], []) == 1
    found = score_answers([Answer(0, "the cat sat", "the hat sat down"), Answer(1, "a b", "a b")])
    assert found == {
        "exact_match": 0.5,
        "word_f1": pytest.approx((4 / 7 + 1) / 2),
        "word_error_rate": pytest.approx(0.4),
    }


def run_training(datasets, output, name="llava", processes=1, **options):
    """Train for four steps; returns the losses."""
    kind = "image" if OBJECTIVES[name] == "captioning" else "audio"
    config = yaml.safe_load(yaml.safe_dump(SHORT)) | {"objective": {"name": OBJECTIVES[name]}, "output": str(output)}
    config["model"] = {"architecture": name, "size": None, "overrides": MODELS[name]}
    config["data"] = {**SHORT["data"], "dataset": str(datasets / kind)} | (
        {"sequence_length": 32} if kind == "audio" else {}
    )
    path = output.with_suffix(".yaml")
    path.write_text(yaml.safe_dump(config), encoding="utf-8")
    words = [
        "--config",
        path,
        *(word for key, value in options.items() for word in (f"--{key.replace('__', '.')}", str(value))),
    ]
    if processes == 1:
        code, _, err = call("train.py", *words)
        assert code == 0, err
    else:
        script("train.py", *words, processes=processes)
    return train_losses(metrics(output))


@pytest.mark.parametrize("name", ["llava", "whisper"])
def test_a_run_repeats_itself_exports_and_answers_as_transformers_pipeline(name, datasets, tmp_path):
    whole = run_training(datasets, tmp_path / "whole", name, data__num_workers=2)
    assert len(whole) == 4
    split = run_training(datasets, tmp_path / "split", name, batch__per_device_batch_size=1)
    assert split == pytest.approx(whole, rel=1e-5)
    shutil.rmtree(tmp_path / "whole" / "checkpoints" / "step-00000004")
    assert run_training(datasets, tmp_path / "whole", name, checkpoint__resume="auto") == whole  # without workers
    sample = (tmp_path / "whole" / "samples.md").read_text(encoding="utf-8")
    assert sample.count("reference: ") == 4 and "## Step 4" in sample

    export, kind = tmp_path / "export", "image" if name == "llava" else "audio"
    code, out, err = call("export.py", "--checkpoint", tmp_path / "whole", "--output", export)
    assert code == 0, err
    assert json.loads((export / "export_report.json").read_text())["max_logit_difference"] == 0.0
    report = tmp_path / "report.json"
    options = ["--max_new_tokens", "6", "--report", report]
    code, out, err = call("evaluate.py", "--model", export, "--dataset", datasets / kind, *options)
    assert code == 0 and "word error rate" in out, err
    found = json.loads(report.read_text())
    best = json.loads((tmp_path / "whole" / "summary.json").read_text())["best_loss"]
    assert found["loss"] == pytest.approx(best, rel=1e-5)
    assert call("evaluate.py", "--model", tmp_path / "whole", "--blank_media", "true", *options)[0] == 0
    assert json.loads(report.read_text())["loss"] != pytest.approx(best, rel=1e-6)

    media = open_split(datasets / kind, "validation").media
    task = pipeline("image-text-to-text" if kind == "image" else "automatic-speech-recognition", model=str(export))
    for answer in found["answers"]:
        (data, *others) = media[answer["document"]]
        if kind == "image" and not others:
            image = Image.open(io.BytesIO(data))
            (output,) = task(images=image, text=task.processor.image_token, max_new_tokens=6, return_full_text=False)
            assert output["generated_text"].strip() == answer["text"]
        elif kind == "audio":
            samples = build(name, datasets)[1].decode(data)  # resampled: the pipeline needs torchaudio for that
            output = task({"raw": samples, "sampling_rate": 16000}, generate_kwargs={"max_new_tokens": 6})
            assert output["text"].strip() == answer["text"]


def test_two_processes_train_alike_though_one_may_have_text_alone(datasets, tmp_path):
    # Of this model every parameter has a gradient if there is a picture, so DDP would not look for those without.
    one = run_training(
        datasets, tmp_path / "one", "idefics3", batch__per_device_batch_size=1, batch__global_batch_size=4
    )
    two = run_training(
        datasets, tmp_path / "two", "idefics3", processes=2, batch__per_device_batch_size=1, batch__global_batch_size=4
    )
    assert two == pytest.approx(one, rel=1e-5)


def test_frozen_modules_stay_and_modules_may_have_their_own_learning_rate(datasets, tmp_path):
    run_training(
        datasets, tmp_path / "run", model__frozen="[vision_tower]",
        optimizer__learning_rates="{multi_modal_projector: 1e-9}", optimizer__weight_decay="0",
    )  # fmt: skip
    before = build("llava", datasets)[2]
    torch.manual_seed(0)
    checkpoints = tmp_path / "run" / "checkpoints"
    first, last = (load_file(checkpoints / f"step-0000000{step}" / "model.safetensors") for step in (2, 4))
    moved = {name: float((last[name] - value).abs().max()) for name, value in first.items()}
    towers = {name for name in moved if "vision_tower" in name}
    assert towers and not any(moved[name] for name in towers)
    projector = [size for name, size in moved.items() if "projector" in name]
    others = [size for name, size in moved.items() if ".layers." in name and name not in towers]
    assert 0 < max(projector) < 1e-7 and min(others) > 1e-5
    assert len([name for name, _ in before.named_modules() if name.endswith("vision_tower")]) == 1
    for option in ("--model.frozen", "--optimizer.learning_rates"):
        value = "[vision_towr]" if option == "--model.frozen" else "{vision_towr: 1e-3}"
        line = error_line("train.py", "--config", tmp_path / "run.yaml", "--output", tmp_path / "other", option, value)
        assert "vision_tower" in line


def test_of_modules_inside_each_other_the_inner_has_its_own_learning_rate(datasets):
    model = build("llava", datasets)[2]
    rates = {"model": 1e-3, "vision_tower": 1e-5}
    groups = decay_groups(model, OptimizerConfig(learning_rates=rates))
    rate = {id(parameter): group.get("lr") for group in groups for parameter in group["params"]}
    towers = {id(parameter) for parameter in model.model.vision_tower.parameters()}
    assert {rate[key] for key in towers} == {1e-5}
    assert {rate[id(parameter)] for parameter in model.model.parameters() if id(parameter) not in towers} == {1e-3}


@pytest.mark.parametrize("objective", ["captioning", "transcription"])
def test_a_folder_of_text_alone_is_refused_in_one_line(objective, datasets, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(datasets / "image" / "tokenizer")
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(UserError, match="no processor"):
        build_processor(objective, ModelConfig(pretrained=str(tmp_path)), tokenizer)


def test_a_model_of_text_alone_is_scored_by_the_transcripts(datasets, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(datasets / "audio" / "tokenizer")
    LlamaForCausalLM(LlamaConfig(**TEXT, vocab_size=len(tokenizer))).save_pretrained(tmp_path / "text")
    tokenizer.save_pretrained(tmp_path / "text")
    report = tmp_path / "report.json"
    code, _, err = call(
        "evaluate.py", "--model", tmp_path / "text", "--dataset", datasets / "audio", "--report", report
    )
    assert code == 0, err
    found = json.loads(report.read_text())
    assert found["target_tokens"] > 0 and "bits_per_byte" in found and "answers" not in found


def test_parts_of_a_new_model_are_those_of_their_folders(datasets, tmp_path):
    _, _, model, processor, _ = build("llava", datasets)
    torch.manual_seed(7)
    tower = type(model.model.vision_tower)(model.config.vision_config)
    tower.save_pretrained(tmp_path / "tower")
    # Published models have more rows than their tokenizers have tokens.
    text = LlamaForCausalLM(LlamaConfig(**TEXT, vocab_size=len(processor.tokenizer) + 7, tie_word_embeddings=False))
    text.save_pretrained(tmp_path / "text")
    config = ModelConfig(
        architecture="llava", size=None,
        parts={"vision_tower": str(tmp_path / "tower"), "language_model": str(tmp_path / "text")},
        overrides={name: value for name, value in MODELS["llava"].items() if not name.endswith("_config")},
    )  # fmt: skip
    built = build_model(config, processor.tokenizer, AutoModelForImageTextToText)
    for name, weight in tower.named_parameters():
        assert built.model.vision_tower.get_parameter(name).equal(weight), name
    ids = torch.arange(5, 15)[None]
    assert built.eval()(input_ids=ids).logits.equal(text.eval()(input_ids=ids).logits)


def test_a_dataset_and_an_objective_that_do_not_fit_are_refused(datasets, dataset, tmp_path):
    run_training(datasets, tmp_path / "run", schedule__max_steps=1)
    words = ["--config", tmp_path / "run.yaml", "--output", tmp_path / "other"]
    assert "image_column" in error_line("train.py", *words, "--data.dataset", dataset)
    assert "captioning" in error_line("train.py", *words, "--objective.name", "causal")
    assert "padded" in error_line("train.py", *words, "--data.layout", "packed")
    assert "llava, idefics3" in error_line(
        "train.py", *words, "--model.architecture", "llama", "--model.overrides", "{}"
    )
    assert not (tmp_path / "other").exists()
    code, out, err = call("train.py", *words, "--dry_run")
    assert code == 0 and "FLOPs a step" in out, err


def test_in_a_conversation_the_assistants_turns_are_learnt_and_the_first_is_asked_for(datasets, tmp_path):
    rows = []
    for number in range(20):
        parts = [{"type": "text", "text": "which colour"}, {"type": "image"}, {"type": "text", "text": str(number)}]
        turns = [("user", parts), ("assistant", f"red {number}"), ("user", "sure?"), ("assistant", f"yes {number}")]
        rows.append(
            {"messages": [{"role": role, "content": content} for role, content in turns], "image": f"{number}.png"}
        )
        (tmp_path / f"{number}.png").write_bytes(picture("red", mark=number))
    (tmp_path / "chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    code, _, err = call(
        "prepare_data.py", "--sources", f"[{{path: {tmp_path}/chats.jsonl, image_column: image}}]", "--output",
        tmp_path / "image", "--messages_column", "messages", "--validation_fraction", "0.3", "--tokenizer.vocab_size", "320",
        "--tokenizer.chat_template", ROOT / "configs" / "chat_template_plain.jinja",
    )  # fmt: skip
    assert code == 0, err
    layout, collate, _, processor, _ = build("llava", tmp_path)
    rows = layout.__getitems__([0])
    batch = collate(rows, [])
    learnt = processor.tokenizer.decode(batch["targets"][0][batch["targets"][0] != IGNORED])
    assert "red" in learnt and "yes" in learnt and "colour" not in learnt and "sure" not in learnt
    prompt, answer = read_prompt(rows, collate)
    asked = processor.tokenizer.decode(prompt["input_ids"][0])
    assert "colour" in asked and "red" not in asked and "sure" not in asked
    assert processor.tokenizer.decode(answer).strip().startswith("red") and len(prompt["media"][0]) == 1
    assert (collate(prompt, [])["input_ids"] == collate.placeholder_id).sum() == 16
