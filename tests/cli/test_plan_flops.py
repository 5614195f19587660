"""The FLOPs of a plan against formulas by hand, of a dense model with grouped heads, one with experts, and a small tied one.

T tokens in documents of S; r rank of the adapter; a linear layer of I inputs and O outputs takes 2 T I O forwards.
"""

import pytest
import torch

from treetune.cli import parse
from treetune.cli.methods import CONFIGS, METHODS, of_config
from treetune.cli.planning import abstract_run
from treetune.models import census, decoder_config, moe

DENSE = decoder_config.Config(
    vocab_size=4096, hidden_size=256, mlp_size=704, num_layers=9, num_heads=8, num_kv_heads=2, head_dim=32, max_positions=2048
)
TIED = decoder_config.Config(
    vocab_size=8192, hidden_size=128, mlp_size=384, num_layers=3, num_heads=4, num_kv_heads=4, head_dim=32, max_positions=2048, tied=True
)
EXPERTS = decoder_config.Config(
    vocab_size=2048, hidden_size=128, mlp_size=64, num_layers=7, num_heads=4, num_kv_heads=2, head_dim=32, max_positions=2048, qk_norm=True,
    experts=moe.Experts(count=8, top_k=2, width=64, layers=tuple(range(7))),
)  # fmt: skip
DOCUMENTS, LENGTH, RANK = 3, 512, 16
T, PAIRS = DOCUMENTS * LENGTH, DOCUMENTS * LENGTH * (LENGTH + 1) // 2
SCORED = T - DOCUMENTS


SLOW = pytest.mark.slow
CASES = [
    pytest.param(DENSE, "llama", id="dense", marks=SLOW),
    pytest.param(EXPERTS, "qwen3_moe", id="experts", marks=SLOW),
    pytest.param(TIED, "llama", id="tied"),
]


def by_hand(cfg, *, adapter: bool, again: bool) -> float:
    """FLOPs of a micro-batch: products forwards, for inputs and for weights, attention, the head, and layers that are computed again."""
    d, q, kv = cfg.hidden_size, cfg.num_heads * cfg.head_dim, cfg.num_kv_heads * cfg.head_dim
    linears, rows = [(d, q), (d, kv), (d, kv), (q, d)], T
    mlp = [(d, cfg.mlp_size), (d, cfg.mlp_size), (cfg.mlp_size, d)]
    attention = 2 * PAIRS * cfg.num_heads * cfg.head_dim * 2
    if cfg.experts is not None:
        width = cfg.experts.width
        mlp, rows = [(d, 2 * width), (width, d)], T * cfg.experts.top_k
        router = 2 * T * d * cfg.experts.count
    else:
        router = 0
    base = 2 * T * sum(i * o for i, o in linears) + 2 * rows * sum(i * o for i, o in mlp)
    # Experts have no adapter among all linear layers.
    low = 2 * T * RANK * sum(i + o for i, o in linears + (mlp if cfg.experts is None else []))
    head = 2 * SCORED * d * cfg.vocab_size
    if adapter:
        forward = base + low + attention + router
        first = 2 * T * d * (q + 2 * kv) + 2 * T * RANK * 3 * d  # no gradient goes on to frozen embeddings
        backward = cfg.num_layers * (base + 2 * low + 2.5 * attention + router) - first
        return cfg.num_layers * forward * (1 + again) + backward + 2 * head
    forward = base + attention + router
    # Torch computes again until all is there that the backward pass reads, which the result of the last plain product is not.
    spared = 0 if cfg.experts is not None or not again else 2 * T * cfg.mlp_size * d
    return cfg.num_layers * (forward * (1 + again) - spared + 2 * (base + router) + 2.5 * attention) + 4 * head


def counted(cfg, family, *args):
    argv = ["--model", "/none", "--micro-batch-size", str(DOCUMENTS), "--sequence-len", str(LENGTH), "--lora-r", str(RANK)]
    argv = argv[:-2] if "none" in args else argv
    parsed, given = parse.parse("sft", METHODS["sft"].config, [*argv, *args])
    config = CONFIGS[type(parsed)].complete(parsed)
    model = abstract_run.shapes(family, cfg, torch.bfloat16)
    return census.total(abstract_run.count(of_config(config), config, model, gpu=True).micro.values()).flops


@pytest.mark.parametrize("again", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize("adapter", [True, pytest.param(False, marks=pytest.mark.slow)])
@pytest.mark.parametrize(("cfg", "family"), CASES)
def test_the_count_is_that_of_a_formula(cfg, family, adapter, again):
    args = ([] if adapter else ["--adapter", "none"]) + (["--gradient-checkpointing", "full"] if again else [])
    said, hand = counted(cfg, family, *args), by_hand(cfg, adapter=adapter, again=again)
    print(f"{family} {adapter=} {again=}: {said / hand:.4f}")
    assert said == pytest.approx(hand, rel=0.01)
