"""Does a residual stream in bf16 cost loss? A Llama under bf16 autocast, its stream in fp32 and in bf16, on real text.

    python benchmarks/residual.py          # needs data/demo: python prepare_data.py; some minutes

For each seed both train from the same weights on the same batches. It prints the mean loss of the last 20 steps and of
held-out text, and their differences, and ends with one JSON object.
"""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from benchmarks.common import add_dataset, build_parser, count
from utils.config import KernelConfig, ObjectiveConfig
from utils.data.token_dataset import open_split
from utils.kernels.head_loss import product_dtype
from utils.model.initialization import initialize_gpt2, is_norm
from utils.objectives import build_objective

CPU = torch.device("cpu")
KINDS = ("last_steps", "held_out")
ROWS, LENGTH, SIZES = 4, 128, {"hidden_size": 96, "intermediate_size": 256, "num_attention_heads": 4}


def carry_in_bf16(model: torch.nn.Module) -> None:
    """Let embeddings and norms return autocast's type, and so the blocks add up in it."""
    for module in model.modules():
        if isinstance(module, torch.nn.Embedding) or is_norm(module):
            module.register_forward_hook(lambda _, __, output: output.to(product_dtype(output)))


def losses(arguments: Any, tokens: dict[str, np.ndarray], seed: int, *, in_bf16: bool) -> list[float]:
    """Nats per token: of the last 20 steps, and of the held-out text."""
    torch.manual_seed(seed)
    config = LlamaConfig(**SIZES, num_hidden_layers=arguments.layers, vocab_size=int(tokens["train"].max()) + 1)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    initialize_gpt2(model)
    objective = build_objective(model, ObjectiveConfig(), "auto", KernelConfig(), CPU).train()
    if in_bf16:
        carry_in_bf16(model)
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3, fused=True)

    def loss_of(split: str, rows: int, row: int) -> torch.Tensor:
        part = tokens[split][row * LENGTH : (row + rows) * LENGTH + 1].astype(np.int64)
        ids = torch.from_numpy(part)
        with torch.autocast("cpu", torch.bfloat16):
            inputs, targets = (each.reshape(rows, LENGTH) for each in (ids[:-1], ids[1:]))
            return objective(targets, input_ids=inputs) / targets.numel()

    kept, order = [], np.random.default_rng(seed).permutation(len(tokens["train"]) // LENGTH // ROWS - 1)
    for step in range(arguments.steps):
        optimizer.param_groups[0]["lr"] = 3e-3 * min(1, (step + 1) / 20, (arguments.steps - step) / 50)
        loss = loss_of("train", ROWS, int(order[step]) * ROWS)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        kept.append(loss.item())
    objective.eval()
    with torch.no_grad():
        batches = min(32, (len(tokens["validation"]) - 1) // LENGTH // ROWS)
        held_out = [loss_of("validation", ROWS, ROWS * number).item() for number in range(batches)]
    return [float(np.mean(kept[-20:])), float(np.mean(held_out))]


def main() -> None:
    parser = build_parser(__doc__)
    parser.add_argument("--steps", type=count, default=150)
    parser.add_argument("--layers", type=count, default=6)
    parser.add_argument("--seeds", type=count, default=3)
    add_dataset(parser)
    arguments = parser.parse_args()
    datasets = {split: open_split(arguments.dataset, split) for split in ("train", "validation")}
    tokens = {split: each.read(0, each.num_tokens) for split, each in datasets.items()}
    table: list[list[list[float]]] = []
    print(f"{'seed':<6}{'stream':<8}{'last 20 steps':>15}{'held-out':>10}")
    for seed in range(arguments.seeds):
        table.append([losses(arguments, tokens, seed, in_bf16=in_bf16) for in_bf16 in (False, True)])
        for name, figures in zip(("fp32", "bf16"), table[-1], strict=True):
            print(f"{seed:<6}{name:<8}{figures[0]:>15.4f}{figures[1]:>10.4f}", flush=True)
    apart = np.array([[bf16[kind] - fp32[kind] for kind in (0, 1)] for fp32, bf16 in table])
    print(
        f"bf16 − fp32: {apart.mean(0).round(4).tolist()} on the mean, {np.abs(apart).max(0).round(4).tolist()} at most"
    )
    means = np.mean(table, 0).tolist()
    figures = {
        f"{stream}_{kind}": means[i][j] for i, stream in enumerate(("fp32", "bf16")) for j, kind in enumerate(KINDS)
    }
    print(json.dumps({"steps": arguments.steps, "seeds": arguments.seeds} | figures))


if __name__ == "__main__":
    main()
