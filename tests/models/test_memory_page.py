"""The table of docs/memory.md is what `models.memory` counts: where it is not, the failure prints the table as it should be."""

import dataclasses
import re
from pathlib import Path

import torch

from treetune.core import optim
from treetune.core.quant import Scheme
from treetune.models import MODELS, dense, memory
from treetune.models.memory import GIB, Setup

PAGE = Path(__file__).parents[2] / "docs" / "memory.md"
EIGHT = dense.Config(
    vocab_size=128256, hidden_size=4096, mlp_size=14336, num_layers=32, num_heads=32, num_kv_heads=8, head_dim=128, tied=False,
    dtype=torch.bfloat16,
)  # fmt: skip
SEVENTY = dataclasses.replace(EIGHT, hidden_size=8192, mlp_size=28672, num_layers=80, num_heads=64)
KINDS = {"QLoRA (nf4)": (32, Scheme("nf4")), "LoRA": (32, None), "full": (0, None)}
GUIDES = {"8B": ("10-14", "16-24", "60-80"), "70B": ("40-48", "2 x 80", "4-8 x 80")}
COLUMNS = (
    "model", "training", "weights", "adapter", "gradients", "optimiser", "activations: full", "selective", "none", "one layer", "logits",
    "peak", "guides say",
)  # fmt: skip


def expected() -> str:
    """Sizes of Llama 3, 2048 tokens a micro-batch, bfloat16 on CUDA, rank 32, adamw; GiB."""
    lines = [f"| {' | '.join(COLUMNS)} |", "|---" * len(COLUMNS) + "|"]
    states = memory.state_bytes(optim.adamw())
    for name, cfg in (("8B", EIGHT), ("70B", SEVENTY)):
        abstract = MODELS["llama"].abstract(cfg)
        for (kind, (rank, scheme)), guide in zip(KINDS.items(), GUIDES[name], strict=True):
            full, selective, none = (
                memory.table(abstract, cfg, Setup(2048, rank, scheme, states, policy, "cuda")) for policy in ("full", "selective", None)
            )
            terms = [full.weights, full.adapter, full.gradients, full.optimiser, full.activations, selective.activations, none.activations]
            cells = [f"{value / GIB:.1f}" for value in (*terms, full.layer, full.head, full.peak)]
            lines.append(f"| {' | '.join([name, kind, *cells, guide])} |")
    return "\n".join(lines)


def test_the_table_of_the_page_is_what_is_counted():
    table = re.search(r"\| model \| training .*?(?=\n\n|\Z)", PAGE.read_text(), flags=re.S)
    assert table is not None and table.group(0).rstrip() == expected(), f"docs/memory.md should have\n{expected()}"


def test_the_sizes_are_those_of_the_models():
    counts = [sum(memory._numbers(leaf) for leaf in memory.tree.leaves(MODELS["llama"].abstract(cfg))) for cfg in (EIGHT, SEVENTY)]
    assert [round(count / 1e9, 2) for count in counts] == [8.03, 70.55]
