"""What launch/ says to Docker and Kubernetes, which a test machine does not have: held against their linter and models, and the
commands in it run."""

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import yaml
from conftest import ROOT, SMALL, environment, flags, metrics, run
from kubeflow_trainer_api.models.trainer_v1alpha1_train_job import TrainerV1alpha1TrainJob
from kubeflow_trainer_api.models.trainer_v1alpha1_training_runtime import TrainerV1alpha1TrainingRuntime
from processes import summary, training

from utils.cli import parse_config
from utils.config import TrainConfig

DOCKERFILE = (ROOT / "launch" / "Dockerfile").read_text()
MANIFEST = (ROOT / "launch" / "kubernetes.yaml").read_text()
RUNTIME, JOB = yaml.safe_load_all(MANIFEST)
BIN = Path(sys.executable).parent  # where the environment of the tests has its commands, also when it is not active
LONG = {"schedule.max_steps": 100_000, "checkpoint.every_steps": 5}


@pytest.mark.parametrize("path", [*ROOT.glob("launch/*.sh"), ROOT / ".ci" / "run"], ids=lambda path: path.name)
def test_shell_scripts_are_well_formed(path):
    run(BIN / "shellcheck", "--exclude", "SC1091", path)  # SC1091: it has no virtual environment to look into
    assert "set -euo pipefail" in path.read_text().splitlines() and os.access(path, os.X_OK)


def test_the_dockerfile_is_well_formed_and_what_it_copies_exists():
    run(BIN / "hadolint", ROOT / "launch" / "Dockerfile")
    sources = [name for line in re.findall(r"^COPY (.*) \S+$", DOCKERFILE, re.M) for name in line.split()]
    constraints = re.findall(r"--constraint (\S+)", DOCKERFILE)
    (entrypoint,) = json.loads(re.search(r"^ENTRYPOINT (.*)$", DOCKERFILE, re.M)[1])
    assert {"pyproject.toml", "."} <= set(sources) and "constraints.txt" in constraints
    assert all((ROOT / name).exists() for name in [*sources, *constraints, entrypoint])
    python = re.search(r"^FROM python:(\d+\.\d+)\.\d+-", DOCKERFILE, re.M)[1]
    assert f"Python {python}" in (ROOT / "constraints.txt").read_text()
    # pyproject.toml is copied with the files that it names, and offers the extras.
    project = (ROOT / "pyproject.toml").read_text()
    assert all(f'"{name}"' in project for name in {"README.md", "LICENSE"} & set(sources))
    extras = re.search(r"'\.\[(.*)\]'", DOCKERFILE)[1].split(",")
    assert all(f"\n{extra} = [" in project for extra in extras)


def test_no_data_and_no_runs_go_into_the_image():
    ignored = {line.strip("/") for line in (ROOT / ".gitignore").read_text().splitlines()}
    left_out = {line.removeprefix("**/") for line in (ROOT / ".dockerignore").read_text().splitlines()}
    assert left_out == ignored | {".git"}


@pytest.mark.slow
def test_the_images_process_1_hears_a_signal_and_waits_until_train_py_has_saved(small_dataset, tmp_path):
    """Which no process 1 does that has no handler: the kernel withholds the signal from it."""
    inside = ["unshare", "--pid", "--fork", "--mount-proc"]
    if subprocess.run([*inside, "true"], capture_output=True).returncode:
        pytest.skip("this user may not make a PID namespace")
    output, recipe = tmp_path / "run", tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump({**SMALL, **LONG, "data.dataset": str(small_dataset), "tracking.trackers": []}))
    (entrypoint,) = json.loads(re.search(r"^ENTRYPOINT (.*)$", DOCKERFILE, re.M)[1])
    settings = {"PROCESSES": "1", "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}"}
    with training([*inside, entrypoint, str(recipe), str(output)], output, **settings) as started:
        started.wait_for_step(3)
        (process_1,) = psutil.Process(started.process.pid).children()
        assert "torchrun" in " ".join(process_1.cmdline())
        process_1.send_signal(signal.SIGTERM)
        started.end()
    end = summary(output)
    assert (end["reason"], end["finished"]) == ("SIGTERM", False)
    assert (output / "checkpoints" / "last").resolve().name == f"step-{end['optimizer_step']:08}"


def test_the_manifest_is_what_kubeflow_trainer_takes():
    """Its models leave out what they do not know: what comes back must be all that was said."""
    assert TrainerV1alpha1TrainingRuntime.from_dict(RUNTIME).to_dict() == RUNTIME
    assert TrainerV1alpha1TrainJob.from_dict(JOB).to_dict() == JOB
    reference, trainer = JOB["spec"]["runtimeRef"], JOB["spec"]["trainer"]
    assert (reference["kind"], reference["name"]) == (RUNTIME["kind"], RUNTIME["metadata"]["name"])
    pod = pod_of(RUNTIME)
    (container,) = pod["containers"]
    workdir = re.search(r"^WORKDIR (.*)$", DOCKERFILE, re.M)[1]
    mounts = {mount["mountPath"]: mount["name"] for mount in container["volumeMounts"]}
    assert mounts.keys() == {f"{workdir}/data", f"{workdir}/runs", "/dev/shm"}
    assert set(mounts.values()) == {volume["name"] for volume in pod["volumes"]}
    assert str(pod["securityContext"]["fsGroup"]) == re.search(r"^USER (.*)$", DOCKERFILE, re.M)[1]
    wait = {variable["name"]: variable["value"] for variable in trainer["env"]}["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"]
    assert int(wait) < pod["terminationGracePeriodSeconds"]


def test_the_manifests_command_is_one_that_train_py_takes():
    trainer = JOB["spec"]["trainer"]
    config = parse_config(TrainConfig, None, trainer["args"])
    assert trainer["command"] == ["torchrun", "train.py"] and config.checkpoint.resume == "auto"
    assert config.output.startswith("runs/") and config.data.dataset.startswith("data/")
    assert f"touch {config.output}/stop" in MANIFEST


@pytest.mark.slow
def test_two_pods_train_one_run_and_go_on_after_one_was_killed(small_dataset, tmp_path):
    """The manifest's command, with the variables by which Kubeflow's torch plugin tells torchrun of the pods."""
    output = tmp_path / "run"
    settings = SMALL | LONG | {"data.dataset": small_dataset, "output": output}
    with two_pods(settings, tmp_path / "first") as pods:
        while not (output / "checkpoints" / "last").exists():
            assert all(pod.poll() is None for pod in pods), (tmp_path / "first-0").read_text()
            time.sleep(0.01)
        (rank,) = psutil.Process(pods[1].pid).children()
        rank.kill()
        assert pods[1].wait(timeout=60) != 0  # a failed pod: Kubernetes ends the others, and starts all again
    assert pods[0].returncode != 0

    with two_pods(settings | {"schedule.max_steps": 100}, tmp_path / "second") as pods:
        assert [pod.wait(timeout=300) for pod in pods] == [0, 0], (tmp_path / "second-0").read_text()
    assert summary(output)["finished"] is True and "at step" in (tmp_path / "second-0").read_text()
    assert [line["step"] for line in metrics(output) if "train/loss" in line] == list(range(1, 101))
    launches = json.loads((output / "environment.json").read_text())
    assert [launch["num_processes"] for launch in launches] == [2, 2]


def pod_of(runtime: dict) -> dict:
    (job,) = runtime["spec"]["template"]["spec"]["replicatedJobs"]
    return job["template"]["spec"]["template"]["spec"]


@contextlib.contextmanager
def two_pods(settings: dict[str, object], log: Path) -> Iterator[list[subprocess.Popen]]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    told = {"PET_NNODES": "2", "PET_NPROC_PER_NODE": "1", "PET_MASTER_ADDR": "127.0.0.1", "PET_MASTER_PORT": str(port)}
    name, *words = JOB["spec"]["trainer"]["command"]
    command = [str(BIN / name), *words, "--checkpoint.resume", "auto", *flags(settings)]
    pods = []
    for rank in range(2):
        extra = told | {"PET_NODE_RANK": str(rank), "GLOO_SOCKET_IFNAME": "lo"}
        with log.with_name(f"{log.name}-{rank}").open("w") as file:
            pods.append(subprocess.Popen(command, env=environment() | extra, stdout=file, stderr=subprocess.STDOUT))
    try:
        yield pods
    finally:
        for pod in pods:
            pod.terminate()
        for pod in pods:
            pod.wait(timeout=60)


@pytest.mark.parametrize("arguments", [[], ["run"]])
def test_a_launch_without_a_run_or_a_command_is_told_how(arguments):
    done = run(ROOT / "launch" / "interruptible.sh", *arguments, check=False)
    assert done.returncode == 2 and done.stderr.startswith("usage: launch/interruptible.sh RUN COMMAND")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("processes", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_ctrl_c_waits_for_the_save(processes, small_dataset, tmp_path):
    """As a terminal does it: SIGINT to the whole process group. The script, and with it the terminal's user, gets exit code 0
    when all processes are gone, and no traceback stands between the lines; twice is as good as once."""
    run_folder, file = tmp_path / "run", "cpu" if processes == 1 else "cpu_2_processes"
    launch = [
        BIN / "accelerate",
        "launch",
        "--config_file",
        f"accelerate_configs/{file}.yaml",
        "--main_process_port",
        "0",
    ]
    options = flags(SMALL | LONG | {"data.dataset": small_dataset})
    command = [ROOT / "launch" / "interruptible.sh", run_folder, *launch, "train.py", *options]
    with training([str(word) for word in command], run_folder, GLOO_SOCKET_IFNAME="lo") as started:
        started.wait_for_step(2)
        os.killpg(started.process.pid, signal.SIGINT)
        os.killpg(started.process.pid, signal.SIGINT)
        code = started.process.wait(timeout=120)
        assert not [
            process for process in started.seen if process.is_running() and "train" in "".join(process.cmdline())
        ]
        text = started.text()
    assert code == 0 and "Traceback" not in text, text[-3000:]
    assert summary(run_folder)["reason"] == "stop_file" and not (run_folder / "stop").exists()
    assert text.rstrip().splitlines()[-1].startswith("stopped (stop_file) at step")
