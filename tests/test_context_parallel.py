"""Rows whose positions are shared out over two real ranks, against whole rows on one."""

import copy
from types import SimpleNamespace

import pytest
import torch
from accelerate.utils import DistributedType
from conftest import as_ranks, flags, script
from torch import distributed, nn
from transformers import AutoConfig, AutoModelForCausalLM

from training.launch import PARALLEL, context_parallel_size, context_problems
from training.parallel.context_parallel import collate_columns, columns_of, use_context_parallel
from utils.cli import UserError, parse_config
from utils.config import KernelConfig, ObjectiveConfig, TrainConfig
from utils.objectives import Objective, build_objective

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
    script(*as_ranks("test_context_parallel"), processes=2)


@pytest.mark.parametrize(("architecture", "options", "named"), [
    ("mistral", {"num_key_value_heads": 4}, "sliding_attention"),
    ("qwen2_moe", {"num_key_value_heads": 4, "use_sliding_window": True, "sliding_window": 8}, "sliding_attention"),
    ("llama", {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}}, "dynamic"),
])  # fmt: skip
def test_what_short_rows_would_not_show_is_refused(architecture, options, named):
    with pytest.raises(UserError, match=f"context parallelism: {architecture} has .*{named}"):
        use_context_parallel(objective_of(architecture, **options), None)


@pytest.mark.parametrize(("sizes", "said"), [
    ({"cp": 2}, None), ({}, "all its sizes are 1"), ({"dp_shard": 2, "cp": 2}, "dp_shard_size 2 × cp_size 2 must"),
    ({"tp": 2}, "tp_size 2 is not supported"), ({"dp_replicate": 2}, "dp_shard_size above 1"), ({"cp": 0}, "1 or more"),
])  # fmt: skip
def test_sizes_that_accelerate_would_raise_for_are_refused(sizes, said, monkeypatch):
    launch = SimpleNamespace(num_processes=2, distributed_type=DistributedType.MULTI_GPU)
    for name in ("ACCELERATE_USE_PARALLELISM_CONFIG", "ACCELERATE_USE_FSDP"):
        monkeypatch.setenv(name, "true")
    for name in PARALLEL:
        monkeypatch.setenv(f"PARALLELISM_CONFIG_{name.upper()}_SIZE", str(sizes.get(name, 1)))
    if said is None:
        assert context_parallel_size(launch) == 2
        launch.distributed_type = DistributedType.MULTI_CPU
        said = "shards on GPUs only"
    with pytest.raises(UserError, match=said):
        context_parallel_size(launch)


@pytest.mark.parametrize(("options", "said"), [
    ({}, None), ({"data.sequence_length": 56}, "must be a multiple of 16"), ({"data.layout": "padded"}, "pad_to max_length"),
    ({"objective.name": "masked", "model.architecture": "bert"}, "objective.name masked"), ({"model.attention": "eager"}, "leave model.attention auto"),
])  # fmt: skip
def test_recipes_that_do_not_go_with_it_are_refused(options, said):
    found = context_problems(parse_config(TrainConfig, None, flags({"data.sequence_length": 64} | options)), 2)
    assert found == [] if said is None else len(found) == 1 and said in found[0]


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
