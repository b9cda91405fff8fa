"""Parts of tensors on the disk, by two real ranks: what is not whole is not taken for whole."""

from pathlib import Path

import pytest
import torch
from conftest import as_ranks, script
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from training.saving.folders import check_complete, check_shards, save_shards
from utils.checkpoint_tensors import read_tensors
from utils.cli import UserError


def test_a_missing_part_and_a_disk_of_one_machine_are_noticed(tmp_path):
    script(*as_ranks("test_shards"), tmp_path, processes=2)
    whole = {"matrix": torch.arange(15.0).view(5, 3), "step": torch.tensor(7.0)}
    read = read_tensors(tmp_path, "optimizer", lambda name: None)
    assert read.keys() == whole.keys() and all(torch.equal(read[name], whole[name]) for name in whole)
    check_complete(tmp_path / "optimizer", whole)
    files = sorted((tmp_path / "optimizer").glob("*.safetensors"))
    assert len(files) == 2
    for file in files:
        content = file.read_bytes()
        file.unlink()
        with pytest.raises(OSError, match="of matrix is missing"):
            check_complete(tmp_path / "optimizer", whole)
        if file == files[0]:
            with pytest.raises(OSError, match="of matrix is missing"):
                read_tensors(tmp_path, "optimizer", lambda name: None)
        else:  # of the last part nobody knows; what is left has another shape than the model's
            assert read_tensors(tmp_path, "optimizer", lambda name: None)["matrix"].shape == (3, 3)
        file.write_bytes(content)


def as_a_rank(argument: str) -> None:
    folder = Path(argument)
    from accelerate import PartialState

    state = PartialState(cpu=True)
    group = torch.distributed.new_group(backend="gloo")
    model = nn.Linear(2, 2)
    private = folder / f"of_{state.process_index}"
    private.mkdir()
    check_shards(folder, model)
    with pytest.raises(UserError, match="not on a disk that all machines share"):
        check_shards(private, model)
    model.register_buffer("count", torch.tensor(3))
    with pytest.raises(UserError, match="a model with count cannot be saved"):
        check_shards(folder, model)
    mesh = init_device_mesh("cpu", (2,))
    matrix = distribute_tensor(torch.arange(15.0).view(5, 3), mesh, [Shard(0)])
    save_shards({"matrix": matrix, "step": torch.tensor(7.0)}, folder / "optimizer", group)
    back = read_tensors(folder, "optimizer", {"matrix": matrix}.get)
    assert torch.equal(back["matrix"].to_local(), matrix.to_local())
    assert not list(folder.glob(".seen-*"))
    state.destroy_process_group()
