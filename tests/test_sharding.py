"""One recipe, launched in every way that CPU processes can show: the same losses, and checkpoints that fit each other."""

import json
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from conftest import ROOT, SMALL, environment, flags, metrics, run, script, train_losses
from safetensors.torch import load_file

from training.hardware import fast_bf16

pytestmark = pytest.mark.slow
LAUNCH = [sys.executable, "-m", "accelerate.commands.launch"]
OPTIONS = {
    "schedule.max_steps": 20, "evaluation.every_steps": 10, "checkpoint.every_steps": 10, "checkpoint.keep_last": 5,
    "optimizer.ema_decay": 0.9, "tracking.sample_every_steps": 10, "tracking.sample_max_new_tokens": 8,
}  # fmt: skip
# Way → shipped file, processes, and what is changed in it for this machine.
WAYS = {
    "ddp": ("multi_gpu", 2, {}),
    "fsdp2": ("fsdp2", 2, {}),
    "hsdp": ("hsdp", 4, {"parallelism_config_dp_replicate_size": 2, "parallelism_config_dp_shard_size": 2}),
    "context": ("fsdp2_context_parallel", 2, {"parallelism_config_cp_size": 2}),
    "context_2x2": (
        "fsdp2_context_parallel",
        4,
        {"parallelism_config_dp_shard_size": 2, "parallelism_config_cp_size": 2},
    ),
}


def launch_file(way: str, folder: Path, precision: str = "no") -> Path:
    """The shipped file, for CPU processes on this machine."""
    name, processes, parallelism = WAYS[way]
    values = yaml.safe_load((ROOT / "accelerate_configs" / f"{name}.yaml").read_text())
    values |= {
        "use_cpu": True,
        "mixed_precision": precision,
        "num_processes": processes,
        "num_machines": 1,
        "main_process_port": 0,
    }
    if "dynamo_config" in values:
        values["dynamo_config"]["dynamo_backend"] = "AOT_EAGER"  # the same graphs, but no compiler runs
    if parallelism:
        values["parallelism_config"] = parallelism
    path = folder / f"{way}.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def launch(way: str, output: Path, dataset: Path, precision: str = "no", **options: object) -> list[dict]:
    settings = SMALL | OPTIONS | {"output": output, "data.dataset": dataset} | options
    file = launch_file(way, output.parent, precision)
    name = "train.py" if way == "ddp" else "tests/unlocked_train.py"
    result = run(*LAUNCH, "--config_file", file, name, *flags(settings), GLOO_SOCKET_IFNAME="lo")
    kind = "FSDP" if "fsdp" in (ROOT / "accelerate_configs" / f"{WAYS[way][0]}.yaml").read_text() else "MULTI"
    assert re.search(
        rf"launch +{WAYS[way][1]} process\(es\) on cpu, {kind}", result.stdout
    )  # not silently something else
    assert ("which share each row" in result.stdout) == way.startswith("context")
    return metrics(output)


def evaluations(records: list[dict]) -> list[float]:
    return [record[name] for record in records for name in ("eval/loss", "eval/average_loss") if name in record]


def same_weights(one: Path, other: Path, tolerance: float) -> bool:
    left, right = (load_file(path / "model.safetensors") for path in (one, other))
    return left.keys() == right.keys() and all(torch.allclose(left[name], right[name], atol=tolerance) for name in left)


@pytest.fixture(scope="module")
def whole_runs(dataset, tmp_path_factory) -> dict[str, Path]:
    """By optimizer: on one process, never stopped."""
    folder = tmp_path_factory.mktemp("one")
    for name in ("adamw", "muon"):
        script("train.py", *flags(SMALL | OPTIONS | {
            "output": folder / name, "data.dataset": dataset, "optimizer.name": name
        }))  # fmt: skip
    return {name: folder / name for name in ("adamw", "muon")}


@pytest.mark.parametrize(("way", "optimizer"), [
    ("ddp", "adamw"), ("fsdp2", "adamw"), ("hsdp", "muon"), ("context", "adamw"),
])  # fmt: skip
def test_losses_are_those_of_one_process_and_checkpoints_go_from_one_way_to_another(
    way, optimizer, whole_runs, dataset, tmp_path
):
    one, options = whole_runs[optimizer], {"optimizer.name": optimizer}
    records = launch(way, tmp_path / "run", dataset, **options)
    expected = metrics(one)
    assert len(train_losses(records)) == 20 and train_losses(records) == pytest.approx(train_losses(expected), abs=1e-4)
    assert len(evaluations(records)) == 4 and evaluations(records) == pytest.approx(evaluations(expected), abs=1e-4)
    samples = [(folder / "samples.md").read_text() for folder in (tmp_path / "run", one)]
    assert samples[0] == samples[1]
    # Where bf16 is fast Muon's iterations are in it, and round the last bit of a sum over ranks up to a thousandth.
    rough = optimizer == "muon" and fast_bf16(torch.device("cpu"))
    checkpoints = [folder / "checkpoints/step-00000020" for folder in (tmp_path / "run", one)]
    assert same_weights(*checkpoints, tolerance=1e-3 if rough else 1e-5)
    parts = len(list((tmp_path / "run/checkpoints/step-00000020/optimizer").glob("*.safetensors")))
    assert parts == (0 if way == "ddp" else WAYS[way][1])  # each rank has written its own
    script("-m", "utils.checkpoints", "verify", tmp_path / "run")
    files = [path for path in (tmp_path / "run").rglob("*") if path.is_file()]
    assert len({path.stat().st_mode for path in files}) == 1  # the umask's, whatever safetensors writes

    # Its step 10 goes on on one process, and one process's here.
    for source, goes_on in ((tmp_path / "run", None), (one, way)):
        copy = tmp_path / f"from_{source.name}"
        script_options = (
            SMALL | OPTIONS | options | {"output": copy, "data.dataset": dataset, "checkpoint.resume": "auto"}
        )
        run("cp", "-r", source, copy)
        run(
            "rm",
            "-r",
            copy / "checkpoints/step-00000020",
            copy / "checkpoints/last",
            copy / "checkpoints/best",
            check=False,
        )
        if goes_on is None:
            script("train.py", *flags(script_options))
        else:
            # What stands in the way of one checkpoint is told, by all ranks, and the run goes on to the next.
            (copy / "checkpoints/.tmp-step-00000015").touch()
            launch(goes_on, copy, dataset, **options, **{"checkpoint.resume": "auto", "checkpoint.every_steps": 5})
            assert "WARNING a checkpoint could not be written" in (copy / "training.log").read_text()
            names = [path.name for path in sorted((copy / "checkpoints").glob("step-*"))]
            assert names == ["step-00000010", "step-00000020"]
        assert train_losses(metrics(copy)) == pytest.approx(train_losses(expected), abs=1e-4)
        assert "resumed from" in (copy / "training.log").read_text()

    script("export.py", "--checkpoint", tmp_path / "run", "--output", tmp_path / "export")
    report = json.loads((tmp_path / "export" / "export_report.json").read_text())
    assert report["max_logit_difference"] <= 1e-5


def test_under_bf16_the_loss_and_the_sums_of_gradients_stay_fp32(whole_runs, dataset, tmp_path):
    """And the weights of the checkpoint, which every rank trains in fp32."""
    one = whole_runs["adamw"]
    records = launch("fsdp2", tmp_path / "run", dataset, precision="bf16")
    assert train_losses(records) == pytest.approx(train_losses(metrics(one)), abs=0.02)
    assert any(loss != float(torch.tensor(loss, dtype=torch.bfloat16)) for loss in train_losses(records))
    assert evaluations(records) == pytest.approx(evaluations(metrics(one)), abs=0.005)
    weights = load_file(tmp_path / "run/checkpoints/last/model.safetensors")
    assert all(tensor.dtype == torch.float32 for tensor in weights.values())


def test_ddp_and_fsdp2_agree_in_bf16(dataset, tmp_path):
    """Two processes each. What stays apart is the rounding of norm weights and embeddings, and of each weight's gradient."""
    few = {"schedule.max_steps": 10, "tracking.sample_every_steps": 0, "optimizer.ema_decay": "null"}
    ddp, fsdp2 = (launch(way, tmp_path / way, dataset, precision="bf16", **few) for way in ("ddp", "fsdp2"))
    assert len(train_losses(ddp)) == 10 and train_losses(fsdp2) == pytest.approx(train_losses(ddp), abs=1e-3)
    assert evaluations(fsdp2) == pytest.approx(evaluations(ddp), abs=1e-3)


def test_padded_rows_are_shared_by_two_groups_of_processes_too(dataset, tmp_path):
    options = {"data.layout": "padded", "data.pad_to": "max_length", "model.overrides": "{num_key_value_heads: 1}"}
    script("train.py", *flags(SMALL | OPTIONS | options | {"output": tmp_path / "one", "data.dataset": dataset}))
    options["model.activation_checkpointing"] = True
    records = launch("context_2x2", tmp_path / "run", dataset, **options)
    expected = metrics(tmp_path / "one")
    assert train_losses(records) == pytest.approx(train_losses(expected), abs=1e-4)
    assert evaluations(records) == pytest.approx(evaluations(expected), abs=1e-4)


@pytest.mark.parametrize("processes", [1, 2])
def test_two_machines_are_two_launchers(processes, whole_runs, dataset, tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    settings = SMALL | OPTIONS | {"output": tmp_path / "run", "data.dataset": dataset}
    values = yaml.safe_load((ROOT / "accelerate_configs/multi_node.yaml").read_text())
    values |= {"use_cpu": True, "mixed_precision": "no", "num_processes": 2 * processes, "main_process_port": port}
    values["dynamo_config"] = {}
    (tmp_path / "machines.yaml").write_text(yaml.safe_dump(values))
    launchers = [
        subprocess.Popen(
            [*LAUNCH, "--config_file", tmp_path / "machines.yaml", "--machine_rank", str(rank), "train.py", *flags(settings)],
            env=environment() | {"GLOO_SOCKET_IFNAME": "lo"}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]  # fmt: skip
    outputs = [launcher.communicate(timeout=300)[0] for launcher in launchers]
    assert [launcher.returncode for launcher in launchers] == [0, 0], outputs
    assert f"{2 * processes} process(es) on cpu, MULTI_CPU" in outputs[0]
    assert train_losses(metrics(tmp_path / "run")) == pytest.approx(
        train_losses(metrics(whole_runs["adamw"])), abs=1e-4
    )


@pytest.mark.parametrize(("way", "options", "launch_options", "line"), [
    ("fsdp2", {"optimizer.name": "adafactor"}, [], "optimizer.name adafactor does not shard its state"),
    ("context", {"data.sequence_length": 56}, [], "data.sequence_length must be a multiple of 16"),
    ("context", {}, ["--num_processes", "3"], "the number of processes, 3"),
])  # fmt: skip
def test_what_is_not_shared_out_rightly_is_refused(way, options, launch_options, line, dataset, tmp_path):
    settings = SMALL | {"output": tmp_path / "run", "data.dataset": dataset} | options
    command = [*LAUNCH, "--config_file", launch_file(way, tmp_path), *launch_options, "tests/unlocked_train.py"]
    refused = run(*command, *flags(settings), check=False, GLOO_SOCKET_IFNAME="lo")
    assert refused.returncode and line in refused.stderr, refused.stderr
    assert not (tmp_path / "run").exists()


FAILING = """
import sys

sys.path[:0] = [{root!r}, {tests!r}]
import train

real_sample, real_evaluate = train.write_sample, train.evaluate


def write_sample(accelerator, *arguments):
    text = real_sample(accelerator, *arguments)
    if accelerator.process_index == 1:
        raise MemoryError("no room for a sample")
    return text


def evaluate(*arguments):
    evaluate.calls += 1
    if evaluate.calls == 2 and arguments[0].process_index >= {first_rank}:
        raise MemoryError("no room for an evaluation")
    return real_evaluate(*arguments)


evaluate.calls = 0
train.write_sample, train.evaluate = write_sample, evaluate
import unlocked_train
"""


@pytest.mark.parametrize("everywhere", [True, False])
def test_ranks_agree_when_a_sample_or_an_evaluation_fails(everywhere, dataset, tmp_path):
    """A sample that fails on one rank of FSDP2, and an evaluation on all, where no save is due: they make one. If it fails
    on one rank alone, the run ends without a save, long before a hang would be noticed."""
    output = tmp_path / "run"
    program = tmp_path / "failing.py"
    program.write_text(FAILING.format(root=str(ROOT), tests=str(ROOT / "tests"), first_rank=0 if everywhere else 1))
    settings = SMALL | {
        "output": output, "data.dataset": dataset, "schedule.max_steps": 8, "evaluation.every_steps": 3,
        "tracking.sample_every_steps": 2, "tracking.sample_max_new_tokens": 2,
    }  # fmt: skip
    command = [*LAUNCH, "--config_file", launch_file("fsdp2", tmp_path), program, *flags(settings)]
    result = run(*command, check=False, GLOO_SOCKET_IFNAME="lo")
    assert result.returncode and "no room for an evaluation" in result.stderr
    assert (output / "training.log").read_text().count("no sample at step") == 0  # the main process's own was fine
    assert (output / "samples.md").read_text().count("## Step") == 2
    saved = [path.name for path in sorted((output / "checkpoints").glob("step-*"))]
    assert saved == (["step-00000003", "step-00000006"] if everywhere else ["step-00000003"])
    script("train.py", *flags(settings | {"checkpoint.resume": "auto"}))
    assert [record["step"] for record in metrics(output) if "eval/loss" in record] == [3, 6, 8]
