"""The oracle of the supervised losses, and fixture L of the loss contract: four positions of three logits, two of them scored."""

import importlib.util
from pathlib import Path

import pytest
import torch

LOGITS = [[2.0, 0.0, -1.0], [0.5, 0.5, 0.0], [0.0, 1.0, 3.0], [1.0, 1.0, 1.0]]
LABELS = [0, -100, 1, 2]  # position i scores label i + 1: position 1 label 1, position 2 label 2


@pytest.fixture(scope="session")
def oracle():
    spec = importlib.util.spec_from_file_location("oracle_sft", Path(__file__).parents[1] / "oracle" / "sft.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def stats_of():
    """stats_of(z [N, V], y [N]) -> TokenStats through the real head: its weight is the identity, -inf columns are its bias."""
    from treetune.ops.linear_logprob import linear_logprob

    def get(z, y):
        banned = (z == -torch.inf).all(0) if len(z) else torch.zeros(z.shape[1], dtype=torch.bool)
        bias = torch.where(banned, -torch.inf, torch.zeros(z.shape[1], dtype=z.dtype)) if banned.any() else None
        want = ("mean_logit", "topk_entropy", "top1", "entropy")
        return linear_logprob(torch.where(banned, 0, z), torch.eye(z.shape[1], dtype=z.dtype), y, bias=bias, want=want)

    return get


@pytest.fixture(scope="session")
def fixture_l():
    """(logits [2, 3] of the scored positions of fixture L, their labels)."""
    scored = [(i, label) for i, label in enumerate(LABELS[1:]) if label != -100]
    return torch.tensor([LOGITS[i] for i, _ in scored], dtype=torch.float64), torch.tensor([label for _, label in scored])
