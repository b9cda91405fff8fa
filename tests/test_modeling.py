"""Models, layouts and optimization against independent references."""

import itertools
import math

import pytest
import torch
from transformers import AutoModelForMaskedLM, AutoTokenizer, BertConfig

from utils.config import DataConfig, KernelConfig, ModelConfig
from utils.data.loaders import build_layout, to_tensors
from utils.data.order import PADDING_SAMPLE, sample_ids
from utils.data.packing import IGNORED
from utils.data.token_dataset import open_split
from utils.kernels import use_kernels
from utils.model.build import DEFERRED_ATTENTION, build_model, pad_token_id
from utils.objectives import Objective, count_targets, document_mask
from utils.objectives.causal import collate

ATTENTIONS = ModelConfig.__dataclass_fields__["attention"].type.__args__  # every one that can be chosen
LAYOUTS = DataConfig.__dataclass_fields__["layout"].type.__args__
LENGTH = 128  # positions per row
SMALL = {"hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 128}


@pytest.fixture(scope="module")
def tokenizer(dataset):
    return AutoTokenizer.from_pretrained(dataset / "tokenizer")


def small_model(architecture: str, tokenizer, **options):
    torch.manual_seed(0)
    return build_model(ModelConfig(architecture=architecture, **SMALL, **options), tokenizer).eval()


def bert(attention: str, tokenizer):
    torch.manual_seed(0)
    config = BertConfig(vocab_size=len(tokenizer), **SMALL, max_position_embeddings=LENGTH)
    implementation = DEFERRED_ATTENTION.get(attention, attention)
    model = AutoModelForMaskedLM.from_config(config, attn_implementation=implementation).eval()
    use_kernels(model, attention, KernelConfig(), torch.device("cpu"))
    return model


def scale_up(model):
    """Away from the initialisation, where any attention gives near the same."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4.0 if parameter.ndim == 2 else 1.0)
    return model


def sample_batch(layout: str, dataset, tokenizer) -> dict[str, torch.Tensor]:
    """12 rows of the shuffled order, the first, the last and one of padding."""
    rows = build_layout(
        open_split(dataset, "train"), layout, LENGTH, pad_token_id=pad_token_id(tokenizer), vocab_size=len(tokenizer)
    )
    indices = [*sample_ids(0, 12, len(rows), seed=3).tolist(), 0, len(rows) - 1, PADDING_SAMPLE]
    return to_tensors(collate(rows.__getitems__(indices), []))


def pieces(batch) -> list[tuple[int, int, int]]:
    """(row, start, stop) of each document's piece that has a target."""
    found = []
    for row in range(len(batch["input_ids"])):
        if "attention_mask" in batch:
            edges = [0, int(batch["attention_mask"][row].sum())]
        else:
            edges = [*(batch["position_ids"][row] == 0).nonzero()[:, 0].tolist(), LENGTH]
        found += [(row, *edge) for edge in itertools.pairwise(edges)]
    return [(row, start, stop) for row, start, stop in found if (batch["targets"][row, start:stop] != IGNORED).any()]


def piecewise(batch, logits, piece_loss) -> tuple[float, float]:
    """(largest logit error, sum of losses) of a batch's pieces, each by itself, without padding, positions or mask.

    `piece_loss` is transformers' own mean over the targets of one piece, from its ids and targets (1, n).
    """
    error = loss = 0.0
    for row, start, stop in pieces(batch):
        ids, labels = batch["input_ids"][row : row + 1, start:stop], batch["targets"][row : row + 1, start:stop]
        alone, mean = piece_loss(ids, labels)
        error = max(error, float((alone[0] - logits[row, start:stop]).abs().max()))
        loss += float(mean) * int((labels != IGNORED).sum())
    return error, loss


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
@torch.no_grad()
def test_losses_in_rows_equal_those_of_single_pieces(architecture, attention, layout, dataset, tokenizer):
    """Reference: transformers' own loss on each piece of a document by itself, without padding."""
    model = scale_up(small_model(architecture, tokenizer, attention=attention, initialization="normal"))
    use_kernels(model, attention, KernelConfig(), torch.device("cpu"))
    batch = sample_batch(layout, dataset, tokenizer)

    def piece_loss(ids, labels):
        logits = model(input_ids=ids, use_cache=False).logits
        return logits, model.loss_function(logits, None, len(tokenizer), shift_labels=labels)

    logits = model(**{k: v for k, v in batch.items() if k != "targets"}, use_cache=False).logits
    error, loss = piecewise(batch, logits, piece_loss)
    assert len(pieces(batch)) > len(batch["input_ids"]) or layout == "padded"
    assert abs(float(Objective(model)(**batch)) - loss) / int(count_targets(batch)) < 1e-5
    assert error < 1e-5 * max(1.0, float(logits.abs().max()))


def test_packing_without_restarts_would_be_noticed(dataset, tokenizer):
    """The test above can fail: with plain positions the documents of a row see each other."""
    model = small_model("llama", tokenizer, initialization="normal")
    batch = sample_batch("packed", dataset, tokenizer)
    wrong = batch | {"position_ids": torch.arange(LENGTH).expand(len(batch["input_ids"]), -1)}
    with torch.no_grad():
        right_loss, wrong_loss = (float(Objective(model)(**item)) for item in (batch, wrong))
    assert abs(right_loss - wrong_loss) / int(count_targets(batch)) > 1e-4


@pytest.mark.parametrize("layout", ["packed", "best_fit"])
@pytest.mark.parametrize("attention", ATTENTIONS)
@torch.no_grad()
def test_an_encoder_keeps_documents_apart_by_the_document_mask(attention, layout, dataset, tokenizer):
    """Reference: BERT's own loss on each piece by itself. Without the mask its documents do see each other."""
    model = scale_up(bert(attention, tokenizer))
    batch = sample_batch(layout, dataset, tokenizer)
    labels, positions = batch["targets"], batch["position_ids"]  # any target will do

    def piece_loss(ids, labels):
        out = model(input_ids=ids, labels=labels)
        return out.logits, out.loss

    def errors(mask):
        out = model(input_ids=batch["input_ids"], position_ids=positions, attention_mask=mask, labels=labels)
        error, loss = piecewise(batch, out.logits, piece_loss)
        return error / float(out.logits.abs().max()), abs(float(out.loss) - loss / int(count_targets(batch)))

    logit_error, loss_error = errors(document_mask(positions))
    assert logit_error < 1e-5 and loss_error < 1e-5
    logit_error, loss_error = errors(None)
    assert logit_error > 0.1 and loss_error > 5e-5


def test_document_mask_is_what_a_plain_loop_says():
    positions = torch.tensor([[0, 1, 0, 1, 2, 0], [0, 1, 2, 3, 4, 5], [0, 0, 0, 1, 0, 1]])
    mask = document_mask(positions)
    assert mask.shape == (3, 1, 6, 6) and mask.dtype == torch.float32
    for row, of_row in enumerate(positions.tolist()):
        for i, j in itertools.product(range(6), repeat=2):
            apart = any(of_row[between] == 0 for between in range(min(i, j) + 1, max(i, j) + 1))
            assert mask[row, 0, i, j] == (torch.finfo(torch.float32).min if apart else 0)


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_normal_initialization(architecture, tokenizer):
    model = small_model(architecture, tokenizer, initialization="normal", tie_word_embeddings=False)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            assert (parameter == 0).all(), name
        elif "norm" in name or ".ln_" in name:
            assert (parameter == 1).all(), name
        else:  # the standard error of a standard deviation is std / sqrt(2 n)
            assert abs(float(parameter.detach().std()) / 0.02 - 1) < 5 / math.sqrt(2 * parameter.numel()), name
            assert abs(float(parameter.detach().mean())) < 5 * 0.02 / math.sqrt(parameter.numel()), name


def test_dropout_reaches_every_knob_of_gpt2(tokenizer):
    model = small_model("gpt2", tokenizer, dropout=0.25)
    rates = {module.p for module in model.modules() if isinstance(module, torch.nn.Dropout)}
    assert rates == {0.25}
    assert small_model("llama", tokenizer, dropout=0.25).config.attention_dropout == 0.25
