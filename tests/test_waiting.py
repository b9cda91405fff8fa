"""How often a step waits for the device: counted on a CPU, where every read of a tensor's numbers would be a wait."""

from collections import Counter

import pytest
import torch
from conftest import train
from torch.utils._python_dispatch import TorchDispatchMode

import training.run
import utils.kernels.varlen

aten = torch.ops.aten
READS = ("tolist", "cpu", "numpy")  # dispatch modes do not see these on a CPU
WAITING = (aten._local_scalar_dense.default, aten.nonzero.default, aten.masked_select.default)


class Waits(TorchDispatchMode):
    """Reads of numbers, by name, while `counting`. A copy made by `to("cpu", non_blocking=True)` may be read after the
    next wait; before, its read counts as "too early"."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        super().__init__()
        self.counting, self.steps = False, [Counter()]
        self.copies: dict[int, torch.Tensor] = {}
        self.ready: set[int] = set()
        for name in READS:
            monkeypatch.setattr(torch.Tensor, name, self.counted(name, getattr(torch.Tensor, name)))
        monkeypatch.setattr(torch.Tensor, "to", self.copied(torch.Tensor.to))

    def wait(self, name: str) -> None:
        if self.counting:
            self.steps[-1][name] += 1
        self.ready |= set(self.copies)

    def counted(self, name, original):
        def method(tensor, *args, **kwargs):
            if name == "tolist":  # it calls itself for rows, and `item`
                self.wait(name)
                counting, self.counting = self.counting, False
                try:
                    return original(tensor, *args, **kwargs)
                finally:
                    self.counting = counting
            self.wait(name)
            return original(tensor, *args, **kwargs)

        return method

    def copied(self, original):
        def method(tensor, *args, **kwargs):
            result = original(tensor, *args, **kwargs)
            if self.counting and args and args[0] == "cpu":
                if not kwargs.get("non_blocking"):
                    self.wait("to")
                    return result
                result = result.clone()
                self.copies[id(result)] = result
            return result

        return method

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        booleans = func is aten.index.Tensor and any(i is not None and i.dtype == torch.bool for i in args[1])
        if func in WAITING or booleans:
            if id(args[0]) not in self.copies:
                self.wait(func.name())
            elif id(args[0]) not in self.ready and self.counting:
                self.steps[-1]["too early"] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("layout", ["packed", "padded"])
def test_a_step_waits_for_the_device_once_however_many_micro_batches(layout, small_dataset, tmp_path, monkeypatch):
    """From the fetched batches to the line of the log. accelerate's fp16 scaler would wait once more."""
    waits, beat, log_step = Waits(monkeypatch), training.run.Run.beat, training.run.Run.log_step

    def begin(run, doing):
        beat(run, doing)
        waits.counting = doing == "training"

    def end(run, *args, **kwargs):
        waits.counting = False
        waits.steps.append(Counter())
        return log_step(run, *args, **kwargs)

    def of_the_stand_in(places, window):
        """The CPU's kernel reads the places of the documents; a GPU's does not."""
        counting, waits.counting = waits.counting, False
        try:
            return list(documents(places, window))
        finally:
            waits.counting = counting

    documents = utils.kernels.varlen._documents
    monkeypatch.setattr(utils.kernels.varlen, "_documents", of_the_stand_in)
    monkeypatch.setattr(training.run.Run, "beat", begin)
    monkeypatch.setattr(training.run.Run, "log_step", end)
    with waits:
        train(
            tmp_path / "run", data__dataset=small_dataset, batch__per_device_batch_size=2, data__layout=layout,
            batch__global_batch_size=8, schedule__max_steps=3, model__attention="varlen",
        )  # fmt: skip
    assert waits.steps[:-1] == [Counter(tolist=1)] * 3
