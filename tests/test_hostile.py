"""Files by somebody who means harm: each is refused with one line, nothing of them is run, and nothing is half written."""

import hashlib
import io
import json
import pickle
import shutil
import struct
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import SMALL, call, error_line, flags, train
from safetensors.torch import load_file, save_file

from utils.checkpoints import list_checkpoints

Edit = Callable[[Path], object]
CODE = """open({canary!r}, "w").close()
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
class Config(LlamaConfig): model_type = "hostile"
class Model(LlamaForCausalLM): config_class = Config
class Tokenizer(PreTrainedTokenizerFast): pass
"""
BOMB = 'a: &a [lol, lol, lol]\n' + "".join(f"{b}: &{b} [{', '.join([f'*{a}'] * 9)}]\n" for a, b in zip("abcdefghi", "bcdefghij"))  # fmt: skip  # noqa: B905


class Evil:
    """Unpickling it makes a file."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple[object, tuple[str, str]]:
        return open, (str(self.canary), "w")


@pytest.fixture(autouse=True)
def canary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A file that only foreign code makes; whoever asks on standard input is told yes."""
    path = tmp_path / "canary"
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n" * 100))
    yield path
    assert not path.exists()


@pytest.fixture(scope="module")
def export(finished_run, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("exports") / "export"
    code, _, err = call("export.py", "--checkpoint", finished_run, "--output", folder)
    assert code == 0, err
    return folder


@pytest.fixture(scope="module")
def averaged_run(finished_run, tmp_path_factory) -> Path:
    """The run as one that keeps an average of its weights, which is the weights."""
    folder = tmp_path_factory.mktemp("runs") / "averaged"
    forge(finished_run, folder, lambda at: shutil.copy(at / "model.safetensors", at / "average.safetensors"))
    config = (folder / "config.yaml").read_text()
    (folder / "config.yaml").write_text(config.replace("ema_decay: null", "ema_decay: 0.9"))
    return folder


@pytest.fixture(scope="module")
def adapted_run(dataset, export, tmp_path_factory) -> Path:
    """A run that has trained adapters."""
    folder = tmp_path_factory.mktemp("runs") / "adapted"
    train(folder, data__dataset=dataset, schedule__max_steps=2, model__pretrained=export, model__lora__rank=2)
    return folder


def forge(run: Path, folder: Path, edit: Edit, *, hashes: bool = True) -> Path:
    """A copy of a run whose only checkpoint is changed by `edit`; its hashes agree."""
    shutil.copytree(run, folder, symlinks=True)
    *older, checkpoint = list_checkpoints(folder / "checkpoints")
    for path in older:
        shutil.rmtree(path)
    edit(checkpoint)
    if hashes:
        files = [path for path in checkpoint.iterdir() if path.is_file() and path.name != "manifest.json"]
        manifest = {
            path.name: {"bytes": path.stat().st_size, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
            for path in files
        }
        (checkpoint / "manifest.json").write_text(json.dumps(manifest))
    return folder


def resume(run: Path, dataset: Path, **options: object) -> str:
    settings = SMALL | {"output": run, "data.dataset": dataset, "checkpoint.resume": "auto", "schedule.max_steps": 12}
    settings |= {"evaluation.every_steps": 5, "tracking.sample_every_steps": 5}
    return error_line("train.py", *flags(settings | options))


def contents(run: Path) -> dict[Path, bytes]:
    """All files of a run but its lock and its heartbeats."""
    files = [path for path in run.rglob("*") if path.is_file() and "/." not in str(path.relative_to(run.parent))]
    return {path: path.read_bytes() for path in files}


def refused_by_all(run: Path, dataset: Path, tmp_path: Path) -> list[str]:
    """What train.py, export.py and evaluate.py say of a forged run; none of them writes anything."""
    before = contents(run)
    lines = [
        resume(run, dataset),
        error_line("export.py", "--checkpoint", run, "--output", tmp_path / "exported" / "model"),
        error_line("evaluate.py", "--model", run),
    ]
    assert contents(run) == before
    assert not list(tmp_path.glob("exported/*"))
    return lines


def change(path: Path, **values: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def pickled_weights(folder: Path) -> None:
    """Harmless ones, which transformers would load."""
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def custom_code(folder: Path, canary: Path) -> None:
    (folder / "hostile.py").write_text(CODE.format(canary=str(canary)))
    classes = {"AutoConfig": "hostile.Config", "AutoModelForCausalLM": "hostile.Model"}
    change(folder / "config.json", model_type="hostile", auto_map=classes)


def custom_tokenizer(folder: Path, canary: Path) -> None:
    (folder / "hostile.py").write_text(CODE.format(canary=str(canary)))
    change(
        folder / "tokenizer_config.json",
        tokenizer_class="Tokenizer",
        auto_map={"AutoTokenizer": [None, "hostile.Tokenizer"]},
    )


# ---- Code: pickles, and the Python files that a configuration names.


def test_pickled_weights_are_never_opened(finished_run, export, dataset, tmp_path):
    for line in refused_by_all(forge(finished_run, tmp_path / "run", pickled_weights), dataset, tmp_path):
        assert "no file named model.safetensors" in line
    shutil.copytree(export, tmp_path / "model")
    pickled_weights(tmp_path / "model")
    settings = SMALL | {"output": tmp_path / "new", "data.dataset": dataset, "model.pretrained": tmp_path / "model"}
    assert "no file named model.safetensors" in error_line("train.py", *flags(settings))
    assert not list((tmp_path / "new").glob("*"))


@pytest.mark.parametrize("write", [lambda item: pickle.dumps(item), lambda item: torch_bytes(item)])
def test_a_pickle_under_any_name_is_no_weights(write, averaged_run, dataset, canary, tmp_path):
    evil = write(Evil(canary))
    for name in ("model", "optimizer", "average"):
        run = forge(averaged_run, tmp_path / name, lambda folder, name=name: (folder / f"{name}.safetensors").write_bytes(evil))  # fmt: skip
        assert "header" in resume(run, dataset, **{"optimizer.ema_decay": 0.9})  # fmt: skip


def torch_bytes(item: object) -> bytes:
    file = io.BytesIO()
    torch.save(item, file)
    return file.getvalue()


def test_pickled_adapters_are_never_opened(adapted_run, canary, tmp_path):
    def edit(folder: Path) -> None:
        (folder / "adapter_model.safetensors").unlink()
        torch.save({"weights": Evil(canary)}, folder / "adapter_model.bin")

    run = forge(adapted_run, tmp_path / "run", edit)
    assert "adapter_model.safetensors is missing" in error_line("evaluate.py", "--model", run)


def test_python_files_of_a_model_are_not_run(finished_run, export, dataset, canary, tmp_path):
    """Neither where transformers would run them at a yes on the terminal, nor where it would raise."""
    for name, edit in {"model": custom_code, "tokenizer": custom_tokenizer}.items():
        run = forge(finished_run, tmp_path / name, lambda folder, edit=edit: edit(folder, canary))
        assert "custom code" in error_line("evaluate.py", "--model", run)
        folder = tmp_path / f"exported_{name}"
        shutil.copytree(export, folder)
        edit(folder, canary)
        settings = SMALL | {"output": tmp_path / "new", "data.dataset": dataset, "model.pretrained": folder}
        assert "custom code" in error_line("train.py", *flags(settings))
        assert "custom code" in error_line("evaluate.py", "--model", folder, "--prompt", "a")
    assert "custom code" in error_line(
        "prepare_data.py", "--output", tmp_path / "data", "--tokenizer.pretrained", folder
    )
    assert not (tmp_path / "data").exists()


# ---- Paths that lead elsewhere.


def test_an_index_of_weights_names_files_of_its_folder_only(export, tmp_path):
    shutil.copytree(export, tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").rename(tmp_path / "elsewhere.safetensors")
    index = tmp_path / "model" / "model.safetensors.index.json"
    for name in ("../elsewhere.safetensors", str(tmp_path / "elsewhere.safetensors"), "pytorch_model.bin", 5):
        index.write_text(json.dumps({"metadata": {}, "weight_map": {"model.embed_tokens.weight": name}}))
        assert "which is no .safetensors file of this folder" in error_line(
            "evaluate.py", "--model", tmp_path / "model", "--prompt", "a"
        )


def test_links_out_of_the_run_are_not_followed(finished_run, dataset, tmp_path):
    run, elsewhere = tmp_path / "run", tmp_path / "elsewhere"
    shutil.copytree(finished_run, run, symlinks=True)
    checkpoints = run / "checkpoints"
    for path in list_checkpoints(checkpoints):
        shutil.rmtree(elsewhere, ignore_errors=True)
        path.rename(elsewhere)
    for link in ("best", "last"):
        (checkpoints / link).unlink()
        (checkpoints / link).symlink_to(elsewhere)
    (checkpoints / "step-00000099").symlink_to(elsewhere)
    (checkpoints / "pointers.json").write_text('{"best": "step-00000099"}')
    assert "is gone" in error_line("evaluate.py", "--model", run)
    (checkpoints / "pointers.json").unlink()
    assert "outside of the run" in error_line("export.py", "--checkpoint", run, "--output", tmp_path / "model")
    assert "outside of the run" in error_line("evaluate.py", "--model", run)
    assert list_checkpoints(checkpoints) == []


@pytest.mark.parametrize("name", ["../../../etc/passwd", "/etc/passwd", "a\0b"])
def test_a_manifest_names_files_of_its_checkpoint_only(name, finished_run, dataset, tmp_path):
    files = {name: {"bytes": 1, "sha256": ""}}
    run = forge(finished_run, tmp_path / "run", lambda at: change(at / "manifest.json", **files), hashes=False)
    assert all("outside of the checkpoint" in line for line in refused_by_all(run, dataset, tmp_path))


@pytest.mark.parametrize(
    ("base", "expected"),
    [
        ([], "holds list in place of dict"),
        ({"name": 5, "sha256": None}, "does not name the weights"),
        ({"name": "/etc/passwd", "sha256": "0"}, "which does not exist"),
        ("itself", "which holds adapters itself"),
    ],
)
def test_adapters_name_a_model_to_stand_beside(base, expected, adapted_run, tmp_path):
    def edit(folder: Path) -> None:
        itself = {"name": str(folder), "sha256": hashlib.sha256(weights_digest(folder)).hexdigest()}
        (folder / "base.json").write_text(json.dumps(itself if base == "itself" else base))

    assert expected in error_line("evaluate.py", "--model", forge(adapted_run, tmp_path / "run", edit))


def weights_digest(folder: Path) -> bytes:
    return b"".join(hashlib.sha256(path.read_bytes()).digest() for path in sorted(folder.glob("*.safetensors")))


# ---- Tokenizers.


@pytest.mark.parametrize("values", [{"model": 5}, {"decoder": {"type": "hostile"}}], ids=str)
def test_a_tokenizer_that_is_none_is_refused(values, dataset, tmp_path):
    changed = tmp_path / "changed"
    shutil.copytree(dataset, changed)
    change(changed / "tokenizer" / "tokenizer.json", **values)
    settings = SMALL | {"output": tmp_path / "run", "data.dataset": changed}
    assert "no tokenizer can be loaded from here" in error_line("train.py", *flags(settings))
    (tmp_path / "texts.jsonl").write_text("\n".join(json.dumps({"text": f"This is text {i}."}) for i in range(20)))
    options = ["--output", tmp_path / "data", "--sources", f"[{tmp_path}/texts.jsonl]", "--validation_fraction", "0.3"]
    options += ["--deduplication.near_threshold", "null"]
    line = error_line("prepare_data.py", *options, "--tokenizer.pretrained", changed / "tokenizer")
    assert "no tokenizer can be loaded from here" in line
    assert not (tmp_path / "run").exists() and not (tmp_path / "data").exists()


# ---- Chat templates.

TEMPLATES = {
    "{{ cycler.__init__.__globals__.os.system('touch {canary}') }}": "is unsafe",
    "{{ 1 / 0 }}": "division by zero",
    "{% include '/etc/passwd' %}": "no loader",
    "{% macro a() %}{{ a() }}{% endmacro %}{{ a() }}": "recursion",
    "{% for i in range(10 ** 9) %}{% endfor %}": "Range too big",
}


@pytest.mark.parametrize("template", TEMPLATES)
def test_a_chat_template_stays_in_its_sandbox(template, finished_run, canary, tmp_path):
    text, expected = template.replace("{canary}", str(canary)), TEMPLATES[template]
    run = forge(finished_run, tmp_path / "run", lambda at: change(at / "tokenizer_config.json", chat_template=text))
    assert expected in error_line("export.py", "--checkpoint", run, "--output", tmp_path / "exported" / "model")
    assert not list(tmp_path.glob("exported/*"))
    messages = [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "A hacker."}]
    records = [json.dumps({"messages": [*messages, {"role": "user", "content": str(i)}]}) for i in range(20)]
    (tmp_path / "chats.jsonl").write_text("\n".join(records))
    (tmp_path / "template.jinja").write_text(text)
    assert expected in error_line(
        "prepare_data.py", "--sources", f"[{tmp_path}/chats.jsonl]", "--messages_column", "messages",
        "--validation_fraction", "0.3", "--output", tmp_path / "data", "--tokenizer.vocab_size", "300",
        "--tokenizer.chat_template", tmp_path / "template.jinja", "--deduplication.near_threshold", "null",
    )  # fmt: skip
    assert not (tmp_path / "data").exists()


# ---- YAML and JSON.

YAML = {
    "tag": ("seed: !!python/object/apply:os.system [touch {canary}]", "could not determine a constructor"),
    "bomb": (BOMB, "alias *a: write out what it stands for"),
    "itself": ("a: &a [*a]", "alias *a: write out"),
    "deep": ("a: " + "[" * 1_000, "nested too deeply"),
    "binary": ("\0\x01", "special characters are not allowed"),
    "twice": ("seed: 1\nseed: 2", "line 2: duplicate key 'seed'"),
    "digits": ("seed: " + "9" * 5000, "Exceeds the limit"),
}


@pytest.mark.parametrize("case", YAML)
@pytest.mark.timeout(60)
def test_yaml_is_plain(case, finished_run, dataset, canary, tmp_path):
    text, expected = YAML[case]
    path = tmp_path / "config.yaml"
    path.write_text(text.replace("{canary}", str(canary)))
    assert expected in error_line("train.py", "--config", path)
    run = tmp_path / "run"
    shutil.copytree(finished_run, run, symlinks=True)
    shutil.copy(path, run / "config.yaml")
    for line in refused_by_all(run, dataset, tmp_path):
        assert f"{run}/config.yaml" in line and expected in line


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("[]", "holds list"),
        ("[" * 100_000, "nested too deeply"),
        ('{"run": "x"}', "no section `data`"),
        ('{"run": {"data": {"sequence_length": NaN}}}', "Expected a int"),
        ('{"run": {"data": {}, "objective": {"name": "os"}}}', "objective.name: Expected a Literal"),
    ],
)
def test_an_exports_report_is_checked(text, expected, export, tmp_path):
    shutil.copytree(export, tmp_path / "model")
    (tmp_path / "model" / "export_report.json").write_text(text)
    line = error_line("evaluate.py", "--model", tmp_path / "model", "--text_file", "README.md")
    assert expected in line


STATES = [
    {"optimizer_step": 1e300}, {"optimizer_step": "abc"}, {"optimizer_step": -5}, {"samples_seen": 1 << 80},
    {"tokens_seen": float("nan")}, {"best_loss": "x"}, {"recent": [["x"]]}, {"stream": 5}, {"dataset_key": 7},
]  # fmt: skip


@pytest.mark.parametrize("values", STATES, ids=str)
def test_a_state_has_the_types_that_were_saved(values, finished_run, dataset, tmp_path):
    def edit(folder: Path) -> None:
        record = json.loads((folder / "state.json").read_text())
        change(folder / "state.json", state=record["state"] | values)

    run = forge(finished_run, tmp_path / "run", edit)
    assert f"{next(iter(values))} is" in resume(run, dataset)
    assert f"{next(iter(values))} is" in error_line("export.py", "--checkpoint", run, "--output", tmp_path / "model")
    assert not (tmp_path / "model").exists()


@pytest.mark.parametrize("text", ["[]", "{", '{"state": 5}', "[" * 100_000, "9" * 10_000])
def test_a_state_is_json(text, finished_run, dataset, tmp_path):
    run = forge(finished_run, tmp_path / "run", lambda folder: (folder / "state.json").write_text(text))
    assert "state.json" in resume(run, dataset)


@pytest.mark.parametrize("text", ["[]", "[" * 100_000, '{"state.json": {"bytes": Infinity, "sha256": ""}}'])
def test_a_manifest_is_a_list_of_files(text, finished_run, dataset, tmp_path):
    edit = lambda folder: (folder / "manifest.json").write_text(text)  # noqa: E731
    run = forge(finished_run, tmp_path / "run", edit, hashes=False)
    assert all("missing or unreadable" in line for line in refused_by_all(run, dataset, tmp_path))


@pytest.mark.parametrize(
    "values",
    [{"key": 5}, {"splits": 5}, {"splits": {"validation": {"bytes": -1}}}, {"splits": {"validation": {"bytes": 1e300}}},
     {"stream": True, "options": 5}],
    ids=str,
)  # fmt: skip
def test_a_datasets_manifest_is_checked(values, finished_run, dataset, tmp_path):
    changed = tmp_path / "changed"
    shutil.copytree(dataset, changed)
    change(changed / "manifest.json", **values)
    settings = SMALL | {"output": tmp_path / "run", "data.dataset": changed}
    assert "is damaged" in error_line("train.py", *flags(settings))
    assert "is damaged" in error_line("evaluate.py", "--model", finished_run, "--dataset", changed)
    (changed / "manifest.json").write_text("[" * 100_000)
    assert "nested too deeply" in error_line("train.py", *flags(settings))


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"hidden_size": 10**9}, "other shapes than its config.json says"),
        ({"num_attention_heads": 0}, "no model can be loaded from here"),
        ({"architectures": 5}, "which is no list"),
        ({"quantization_config": {"quant_method": "bitsandbytes", "load_in_8bit": True}}, "are quantized"),
    ],
)
def test_a_models_configuration_is_checked(values, expected, export, tmp_path):
    shutil.copytree(export, tmp_path / "model")
    change(tmp_path / "model" / "config.json", **values)
    assert expected in error_line("evaluate.py", "--model", tmp_path / "model", "--prompt", "a")


# ---- Tensors.


def header(tensors: object, data: bytes = b"") -> bytes:
    text = json.dumps(tensors).encode()
    return struct.pack("<Q", len(text)) + text + data


OVERLAP = {name: {"dtype": "F32", "shape": [2], "data_offsets": [at, at + 8]} for name, at in (("a", 0), ("b", 4))}


@pytest.mark.parametrize(
    "content", [b"", struct.pack("<Q", 1 << 62) + b"{}", header(OVERLAP, bytes(12)), header({})], ids=range(4)
)
def test_files_of_tensors_that_are_none(content, averaged_run, dataset, tmp_path):
    for name, option in {"model": "trained", "average": "average"}.items():
        run = forge(averaged_run, tmp_path / name, lambda at, name=name: (at / f"{name}.safetensors").write_bytes(content))  # fmt: skip
        line = error_line("export.py", "--checkpoint", run, "--output", tmp_path / "export", "--weights", option)
        assert any(word in line for word in ("header", "lack", "none"))
    assert not (tmp_path / "export").exists()


SHAPES: dict[str, Callable[[dict], dict]] = {
    "transposed": lambda tensors: {
        name: tensor.t() if tensor.ndim == 2 else tensor for name, tensor in tensors.items()
    },
    "one number": lambda tensors: {name: tensor.flatten()[:1] for name, tensor in tensors.items()},
    "integers": lambda tensors: {name: tensor.to(torch.int64) for name, tensor in tensors.items()},
    "one less": lambda tensors: dict(list(tensors.items())[1:]),
}


@pytest.mark.parametrize("case", SHAPES)
def test_tensors_of_another_shape_or_type(case, averaged_run, dataset, tmp_path):
    def edit(folder: Path, name: str) -> None:
        tensors = SHAPES[case](load_file(folder / f"{name}.safetensors"))
        tensors = {key: tensor.contiguous() for key, tensor in tensors.items()}
        save_file(tensors, folder / f"{name}.safetensors", metadata={"format": "pt"})

    for name, option in {"model": "trained", "average": "average"}.items():
        run = forge(averaged_run, tmp_path / name, lambda folder, name=name: edit(folder, name))
        error_line("export.py", "--checkpoint", run, "--output", tmp_path / "export", "--weights", option)
    run = forge(averaged_run, tmp_path / "optimizer", lambda folder: edit(folder, "optimizer"))
    options = {"optimizer.ema_decay": 0.9}
    assert "is not a checkpoint of this model and optimizer" in resume(run, dataset, **options)
    assert not (tmp_path / "export").exists() and contents(run)
