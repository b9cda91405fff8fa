"""Rows whose positions are shared out over two real ranks, against whole rows on one."""

import copy
import sys

import pytest
import torch
from conftest import ROOT, run
from torch import distributed, nn
from transformers import AutoConfig, AutoModelForCausalLM

from utils.cli import UserError
from utils.config import KernelConfig
from utils.objective_config import ObjectiveConfig
from utils.training.context_parallel import collate_columns, columns_of, use_context_parallel
from utils.training.objectives import Objective, build_objective

TINY = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 96}
# Llama with fewer heads of keys and values than of queries.
MODELS = {"llama": {"num_key_value_heads": 2, "intermediate_size": 64}, "gpt2": {}}
LENGTH = 32


def objective_of(architecture: str, **options: object) -> Objective:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(architecture, **(TINY | options)))
    return build_objective(model, ObjectiveConfig(), "auto", KernelConfig(), torch.device("cpu")).eval()


def test_every_position_is_on_one_rank_and_the_work_is_equal():
    columns = [columns_of(rank, 4, LENGTH) for rank in range(4)]
    assert sorted(number for part in columns for number in part.tolist()) == list(range(LENGTH))
    assert len({part.sum() for part in columns}) == 1  # a query reads as many keys as its position says


def test_loss_and_gradients_are_those_of_whole_rows():
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--local-addr", "127.0.0.1"]
    run(*command, "--nproc_per_node", "2", __file__, PYTHONPATH=f"{ROOT}:{ROOT / 'tests'}", GLOO_SOCKET_IFNAME="lo")


@pytest.mark.parametrize(("architecture", "options", "named"), [
    ("mistral", {"num_key_value_heads": 4}, "sliding_attention"),
    ("qwen2_moe", {"num_key_value_heads": 4, "use_sliding_window": True, "sliding_window": 8}, "sliding_attention"),
    ("llama", {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}}, "dynamic"),
])  # fmt: skip
def test_what_short_rows_would_not_show_is_refused(architecture, options, named):
    with pytest.raises(UserError, match=f"context parallelism: {architecture} has .*{named}"):
        use_context_parallel(objective_of(architecture, **options), None)


def as_a_rank() -> None:
    distributed.init_process_group("cuda:gloo")  # as NCCL's, it is not for the host's memory
    rank, group = distributed.get_rank(), distributed.new_group()
    host_group = distributed.new_group(backend="gloo")
    ids = torch.randint(96, (2, LENGTH), generator=torch.Generator().manual_seed(1))
    targets = ids.roll(-1, 1).masked_fill(torch.arange(LENGTH) % 7 == 3, -100)
    packed = (torch.arange(LENGTH) % 13).expand(2, -1)
    for architecture, options in MODELS.items():
        whole = objective_of(architecture, **options)
        part = copy.deepcopy(whole)
        use_context_parallel(part, group)
        assert part.context.group is group
        part.context.group = host_group
        for positions in (packed, None):
            batch = {"input_ids": ids, "targets": targets} | ({} if positions is None else {"position_ids": positions})
            rows = {name: values.numpy() for name, values in batch.items()}
            mine = collate_columns(lambda rows, _: rows, rank, 2, rows, [])
            tensors = {name: torch.from_numpy(values) for name, values in mine.items()}
            for precision, tolerance in ((None, 1e-5), (torch.bfloat16, 0.03)):
                with torch.autocast("cpu", precision, enabled=precision is not None):
                    loss = part(**tensors)
                loss.backward()
                wanted = whole(**batch)
                wanted.backward()
                distributed.all_reduce(loss.detach(), group=host_group)
                assert loss.item() == pytest.approx(wanted.item(), rel=tolerance)
                for (name, parameter), own in zip(part.named_parameters(), whole.parameters(), strict=True):
                    distributed.all_reduce(parameter.grad, group=host_group)
                    assert (parameter.grad - own.grad).norm() <= tolerance * own.grad.norm(), name
                for module in (part, whole):
                    module.zero_grad()
    sharpened = objective_of("llama")
    sharpened.model.lm_head = nn.Sequential(sharpened.model.lm_head, nn.Softmax(dim=1))  # across positions
    with pytest.raises(UserError, match="computes other logits than on whole rows"):
        use_context_parallel(sharpened, group)
    distributed.destroy_process_group()


if __name__ == "__main__":
    as_a_rank()
