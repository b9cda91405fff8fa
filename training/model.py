"""The model of a run: its objective, the checks that every training needs, and its parameters in words."""

import math
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DynamoBackend
from torch import nn

from training.data import TrainingData
from training.fp8 import check_fp8
from training.parallel.context_parallel import use_context_parallel
from training.parallel.sharding import keep_sums_in_fp32
from utils.cli import UserError
from utils.config import TrainConfig
from utils.data.packing import IGNORED, document_places
from utils.files import short
from utils.model.adapters import without_adapters
from utils.model.build import DECODERS, evaluating, longest_sequence, text_config
from utils.model.initialization import is_norm, residual_projections
from utils.objectives import Objective, build_objective, objective_module
from utils.pretrained import read_tokenizer


def build_training_objective(
    model: Any, config: TrainConfig, accelerator: Accelerator, data: TrainingData
) -> Objective:
    """`model` with its loss, and the kernels that compute it on this device.

    `UserError` if the model cannot read such rows, or would mix the documents of a row.
    """
    check_length(model, config.data.sequence_length)
    if accelerator.mixed_precision == "fp8":
        check_fp8(model)
    packed, has_media = "position_ids" in data.example, "media" in data.manifest
    try:
        precision = accelerator.mixed_precision if data.context_group is None else "no"  # it has its own attention
        objective = build_objective(
            model, config.objective, config.model.attention, config.kernels, accelerator.device, precision
        )
        if without_adapters(model).config._attn_implementation == "varlen":
            data.add_places()
        if objective_module(config.objective.name).AUTO_MODEL in DECODERS:
            check_future_is_hidden(objective)
        if packed:
            check_documents_stay_apart(objective)
        with evaluating(objective):
            width = None if has_media else 16
            example = {name: values[:, :width] for name, values in data.example.items()}
            example = example if has_media else add_places(example)
            loss = objective(**{name: values.to(model.device) for name, values in example.items()})
    except UserError:
        raise
    except Exception as error:  # each class has its own limits
        rows = f"rows of data.layout {config.data.layout} with objective.name {config.objective.name}"
        remedy = "data.layout padded, other sizes" if packed else "other sizes"
        name = type(without_adapters(model)).__name__
        raise UserError(f"{name} does not train on {rows}: {short(error)}; try {remedy} or another model") from error
    # The rows of a rank may hold no picture, and then its loss does not reach what reads pictures.
    if accelerator.ddp_handler is not None and (has_media or not reaches_every_parameter(loss, model)):
        accelerator.ddp_handler.find_unused_parameters = True  # else DDP raises in the second step
    if data.context_group is not None:
        use_context_parallel(objective, data.context_group)
    if (dynamo := accelerator.state.dynamo_plugin).backend != DynamoBackend.NO:
        objective.head_backend = dynamo.backend.value.lower()
    keep_sums_in_fp32(accelerator, objective)
    return objective


def check_tokenizer(checkpoint: Path, tokenizer: Any) -> None:
    """`UserError` if the dataset's tokenizer is no longer the one that the checkpoint was trained with."""
    trained, present = read_tokenizer(checkpoint).get_vocab(), tokenizer.get_vocab()
    if differing := sorted(trained.items() ^ present.items(), key=lambda entry: entry[1]):
        token, number = differing[0]
        raise UserError(
            f"the dataset's tokenizer is not the one that {checkpoint} was trained with; the first difference is at "
            f"{number}, {token!r}; restore it, or choose another --output"
        )


def check_length(model: Any, sequence_length: int) -> None:
    """`UserError` if the model has too few positions for a row."""
    if sequence_length > (limit := longest_sequence(model)):
        raise UserError(f"data.sequence_length {sequence_length} exceeds the {limit} positions of the model; lower it")


def check_documents_stay_apart(objective: Objective) -> None:
    """`UserError` if what the model learns from a document depends on its neighbours in a packed row; three short passes.

    A model fails silently if it carries a state along the row, makes its own mask, or does not count positions from 0.
    The passes are those of training: `Objective.forward` with its kernels, and backward. What they compare is the
    gradient of a document's loss with respect to the embedded tokens of its row: at its own tokens that of the document
    alone, elsewhere 0. The loss itself would not do: with new weights it is near log V, whatever the model reads.
    """
    ids, positions, targets, places = neighbours(objective)
    with evaluating(objective):
        together = embedding_gradient(objective, targets, input_ids=ids, position_ids=positions)
        alone = torch.zeros_like(together)
        for pair in (places[:2], places[2:]):
            documents, wanted = (torch.stack([values[place] for place in pair]) for values in (ids, targets))
            for place, gradient in zip(pair, embedding_gradient(objective, wanted, input_ids=documents), strict=True):
                alone[place] = gradient
    difference, scale = (values.abs().amax((1, 2)) for values in (together - alone, alone))
    refuse_mixing(objective, difference, scale)


def check_nothing_leaks(accelerator: Accelerator, prepared: nn.Module) -> None:
    """`UserError` if the loss of a document depends on its neighbours in a packed row, by the path that trains: on the
    device, in its precision, by its kernels. One short pass; all ranks make it alone, without FSDP.

    That the loss reads its own tokens as it should is compared in fp32 (`check_documents_stay_apart`). Here they may
    round, but the gradient of all other tokens is 0. Nothing is compiled here: a compiled model would be compiled for this
    length, and again for the rows of the run.
    """
    objective = accelerator.unwrap_model(prepared, keep_torch_compile=False)
    ids, positions, targets, _ = neighbours(objective)
    uncompiled = torch.compiler.set_stance("force_eager")
    with evaluating(prepared), accelerator.no_sync(prepared), uncompiled:
        gradient = embedding_gradient(objective, targets, prepared, input_ids=ids, position_ids=positions)
    size = gradient.float().abs().amax(2).cpu()
    refuse_mixing(objective, size.where(targets == IGNORED, 0).amax(1), size.amax(1))


def refuse_mixing(objective: Objective, difference: torch.Tensor, scale: torch.Tensor) -> None:
    if not bool((difference <= 1e-3 * scale).all()):
        name = type(without_adapters(objective.model)).__name__
        raise UserError(f"{name} does not keep the documents of a packed row apart; choose data.layout padded")


def neighbours(objective: Objective) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, list[tuple[int, slice]]]:
    """Four packed rows: ids, positions and targets, and the place of one document in each, which alone has targets. It has
    the same length in rows 0 and 1, and in rows 2 and 3."""
    model: Any = objective.model
    window = getattr(model.config, "sliding_window", None) if objective.is_encoder else None
    width = min(10 + (window or 0), longest_sequence(model))
    few = max(1, min(3, width // 3))
    two, rest = max(1, few // 2), width - few  # the rest is longer than what an encoder's layer with a window sees
    # The lengths of each row's documents, and the one with targets.
    rows = [((few, rest), 1), ((rest, few), 0), ((two, few, rest - two), 1), ((rest - two, few, two), 1)]
    ids = random_ids(model, len(rows), width)
    positions = torch.stack([torch.cat([torch.arange(length) for length in lengths]) for lengths, _ in rows])
    places = [
        (row, slice(sum(lengths[:number]), sum(lengths[: number + 1]))) for row, (lengths, number) in enumerate(rows)
    ]
    targets = torch.full_like(ids, IGNORED)
    for place in places:
        targets[place] = ids[place].roll(-1)
    return ids, positions, targets, places


def check_future_is_hidden(objective: Objective) -> None:
    """`UserError` if a model for the next token reads that token, as XLNet does by default; a short pass.

    Compared is the gradient with respect to the last token's embedding: no loss of the others may depend on it.
    """
    model: Any = objective.model
    ids = random_ids(model, 1, min(8, longest_sequence(model)))
    targets = ids.roll(-1, dims=1)
    targets[:, -1] = IGNORED
    with evaluating(objective):
        gradient = embedding_gradient(objective, targets, input_ids=ids)[0].abs().amax(1)
    if not float(gradient[-1]) <= 1e-3 * float(gradient.max()):
        name = type(without_adapters(model)).__name__
        remedy = "set the option of its configuration that hides them in model.overrides, or choose another model"
        raise UserError(f"{name} reads the tokens that it must predict; {remedy}")


def reaches_every_parameter(loss: torch.Tensor, model: nn.Module) -> bool:
    """Whether every trainable parameter of `model` is in the graph of `loss`. A pooler is not, nor an expert without a
    token."""
    seen, todo = set(), [loss.grad_fn]
    while todo:
        node = todo.pop()
        if node is not None and node not in seen:
            seen.add(node)
            todo += [before for before, _ in node.next_functions]
    reached = {id(node.variable) for node in seen if hasattr(node, "variable")}
    return all(id(parameter) in reached for parameter in model.parameters() if parameter.requires_grad)


def random_ids(model: Any, rows: int, columns: int) -> torch.Tensor:
    """(rows, columns) token ids, always the same. Without padding, which RoBERTa does not count as a position."""
    config = text_config(model.config)
    vocabulary = config.vocab_size
    ids = torch.randint(vocabulary, (rows, columns), generator=torch.Generator().manual_seed(0))
    return (ids + (ids == config.pad_token_id)) % vocabulary


def add_places(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """`batch`, in the host's memory, with `cu_seqlens`, which only varlen attention reads."""
    return batch | {"cu_seqlens": torch.from_numpy(document_places({k: v.numpy() for k, v in batch.items()}))}


def embedding_gradient(
    objective: Objective, targets: torch.Tensor, prepared: nn.Module | None = None, **inputs: torch.Tensor
) -> torch.Tensor:
    """The gradient of the loss with respect to the embedded tokens, (B, T, D). `prepared` is called for `objective`."""
    model: Any = objective.model
    weight, embedded = model.get_input_embeddings().weight, []

    def keep(_: nn.Module, __: Any, output: torch.Tensor) -> torch.Tensor:
        embedded.append(output.detach().requires_grad_())
        return embedded[-1].clone()  # some models scale it in place

    # All modules that share the matrix: BART's encoder and decoder have one each.
    modules = [module for module in model.modules() if isinstance(module, nn.Embedding) and module.weight is weight]
    hooks = [module.register_forward_hook(keep) for module in modules]
    try:
        inputs = add_places(inputs)
        loss = (objective if prepared is None else prepared)(
            targets.to(model.device), **{name: values.to(model.device) for name, values in inputs.items()}
        )
    finally:
        for hook in hooks:
            hook.remove()
    if not embedded:
        raise RuntimeError(
            f"it embeds tokens by a {type(model.get_input_embeddings()).__name__}, which cannot be checked"
        )
    return torch.autograd.grad(loss, embedded)[0]


def count_parameters_by_part(model: nn.Module) -> dict[str, list[int]]:
    """Part → trainable and frozen parameters; a shared one counts once, in its first place.

    attention: modules of that name within a block. MLP: the rest of the blocks, with routers and experts. norms: all
    norms, wherever they are. head: everything outside the base model. A block is an entry of a module list.
    """
    bare = without_adapters(model)
    backbone = getattr(bare, bare.base_model_prefix, None)
    head = [bare.get_output_embeddings()] if backbone is None else set(bare.modules()) - set(backbone.modules())
    counts = {part: [0, 0] for part in ("embeddings", "attention", "MLP", "norms", "head", "other")}
    for name, parameter in bare.named_parameters():
        part, module = "other", bare
        for child in name.split(".")[:-1]:
            module = getattr(module, child)
            if isinstance(module, nn.ModuleList) and part == "other":
                part = "MLP"
            elif part == "MLP" and "Attention" in type(module).__name__:
                part = "attention"
            elif module in head:
                part = "head"
        if is_norm(module):
            part = "norms"
        elif part == "other" and isinstance(module, nn.Embedding):
            part = "embeddings"
        counts[part][0 if parameter.requires_grad else 1] += parameter.numel()
    return counts


def describe_model(model: nn.Module) -> list[str]:
    """Lines: the class with its parameters, then the parameters of each part."""
    counts = count_parameters_by_part(model)
    trainable, frozen = (sum(column) for column in zip(*counts.values(), strict=True))
    trained = "all trainable" if not frozen else f"{trainable:,} trainable ({trainable / (trainable + frozen):.2%})"
    lines = [f"model: {type(without_adapters(model)).__name__}, {trainable + frozen:,} parameters, {trained}"]
    for part, numbers in counts.items():
        if number := sum(numbers):
            of_them = f", {numbers[0]:,} trainable" if frozen else ""
            lines.append(f"  {part:<10} {number:>15,} {number / (trainable + frozen):6.1%}{of_them}")
    return lines


@torch.no_grad()
def describe_initialization(model: nn.Module) -> str:
    """Mean and standard deviation of each kind of parameter, on one line; a shared one counts once."""
    residual = {id(module) for module in residual_projections(model)}
    kinds: defaultdict[str, list[nn.Parameter]] = defaultdict(list)
    for name, parameter in model.named_parameters():
        module = model.get_submodule(name.rpartition(".")[0])
        if name.endswith("bias"):
            kind = "bias"
        elif is_norm(module):
            kind = "norm"
        elif isinstance(module, nn.Embedding):
            kind = "embedding"
        elif id(module) in residual:
            kind = "residual projection"
        else:
            kind = "linear" if parameter.ndim >= 2 else "other"
        kinds[kind].append(parameter)
    parts = []
    for kind, parameters in kinds.items():
        count = sum(parameter.numel() for parameter in parameters)
        mean = sum(float(parameter.sum(dtype=torch.float64)) for parameter in parameters) / count
        norms = (float(torch.linalg.vector_norm(parameter, dtype=torch.float64)) for parameter in parameters)
        parts.append(f"{kind} {mean:.3f} ± {math.sqrt(max(0.0, sum(norm**2 for norm in norms) / count - mean**2)):.4f}")
    return "weights: at the start, mean ± standard deviation: " + ", ".join(parts)
