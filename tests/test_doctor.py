"""The doctor finds nothing on a sound machine, and each fault that is planted."""

import json
import os
import time
from pathlib import Path

import pytest
import torch
from conftest import as_ranks, script
from torch import nn

from examples import doctor
from utils.kernels import attention, head_loss
from utils.objectives import Objective

CPU = torch.device("cpu")


def state(name: str, folder: Path) -> str:
    if name == "disk":
        return doctor.examine(doctor.check_disk, folder)[0]
    return doctor.examine(doctor.CHECKS[name], CPU)[0]


@pytest.fixture
def small_trial(monkeypatch):
    """A small file tries the disk."""
    monkeypatch.setattr(doctor, "TRIAL_BYTES", 2**16)


def test_the_doctor_finds_a_sound_machine_sound(tmp_path):
    result = script("examples/doctor.py", "--folder", tmp_path / "runs")
    report = json.loads(result.stdout.splitlines()[-1])
    assert {*doctor.CHECKS, "disk", "bandwidth", "fp32 products"} <= report["checks"].keys()
    assert {check["state"] for check in report["checks"].values()} <= {"ok", "slow"}
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def lose_the_mask(monkeypatch):
    whole = attention.additive_mask
    monkeypatch.setitem(
        attention.AttentionMaskInterface._global_mapping, "blocked", lambda **options: whole(**options) and None
    )


def scale_the_loss(monkeypatch):
    monkeypatch.setattr("utils.objectives.head_loss", lambda *a, **k: 1.001 * head_loss.head_loss(*a, **k))


def average_the_loss(monkeypatch):
    forward = Objective.forward
    monkeypatch.setattr(
        Objective, "forward", lambda self, targets, **rest: forward(self, targets, **rest) / len(targets)
    )


def draw_from_an_own_generator(monkeypatch):
    """Which activation checkpointing does not restore."""
    generator = torch.Generator().manual_seed(0)
    monkeypatch.setattr("utils.kernels.random_mask", lambda like, p: torch.rand(like.shape, generator=generator) >= p)


def fail_at_64_modulo_128(monkeypatch):
    backward = attention._BlockedAttention.backward

    def spoiled(ctx, gradient):
        found = backward(ctx, gradient)
        return (found[0] * float("nan"), *found[1:]) if gradient.shape[1] % 128 == 64 else found

    monkeypatch.setattr(attention._BlockedAttention, "backward", staticmethod(spoiled))


def write_less(monkeypatch):
    replace = os.replace

    def cut(source, target, **options):
        if Path(target).name == "file":
            os.truncate(source, 100)
        replace(source, target, **options)

    monkeypatch.setattr(os, "replace", cut)


FAULTS = [
    ("documents apart", lose_the_mask),
    ("kernels", scale_the_loss),
    ("micro-batches", average_the_loss),
    ("checkpointing", draw_from_an_own_generator),
    ("awkward lengths", fail_at_64_modulo_128),
    ("disk", write_less),
]


def test_every_check_has_a_fault():
    assert {name for name, _ in FAULTS} | {"sum over devices"} == {*doctor.CHECKS, "disk"}


@pytest.mark.parametrize(("name", "plant"), FAULTS, ids=[name for name, _ in FAULTS])
def test_the_doctor_finds_a_planted_fault(name, plant, small_trial, tmp_path, monkeypatch):
    with monkeypatch.context() as planted:
        plant(planted)
        assert state(name, tmp_path) == "WRONG"
    assert state(name, tmp_path) == "ok"


def as_a_rank(plant: str) -> None:
    """Forks the ranks; this process has computed nothing yet."""
    if plant == "no sum":
        doctor.DistributedDataParallel = nn.Sequential
    if plant == "no answer":
        doctor.SECONDS_TO_SUM, doctor.average_on_rank = 2, lambda *_: time.sleep(1000)
    print(*doctor.examine(doctor.check_sum_over_devices, CPU))


@pytest.mark.parametrize(("plant", "found"), [("none", "ok"), ("no sum", "not 1.5"), ("no answer", "WRONG the ranks")])
def test_ranks_that_do_not_sum_or_do_not_answer_are_found(plant, found):
    assert found in script(*as_ranks("test_doctor"), plant).stdout


def test_a_wrong_result_ends_with_an_error_and_a_slow_one_does_not(monkeypatch, tmp_path, capsys):
    def slow(device):
        raise doctor.Slow("it could be faster")

    for check in ("check_bandwidth", "check_peak", "chosen_kernels"):
        monkeypatch.setattr(doctor, check, lambda *_: "x")
    monkeypatch.setattr(doctor, "CHECKS", {"first": slow})
    doctor.main(doctor.DoctorConfig(str(tmp_path)))
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["checks"]["first"]["state"] == "slow"
    monkeypatch.setattr(doctor, "CHECKS", {"first": lambda device: str(1 / 0)})
    with pytest.raises(SystemExit) as ended:
        doctor.main(doctor.DoctorConfig(str(tmp_path)))
    assert (
        ended.value.code == 1
        and json.loads(capsys.readouterr().out.splitlines()[-1])["checks"]["first"]["state"] == "WRONG"
    )
