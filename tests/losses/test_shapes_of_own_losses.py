"""Losses of the user's own that give another shape than they should: refused, since they would be broadcast into another loss."""

import pytest
import torch

from treetune.losses import presets, reduce, sft_objective

LIKE = torch.zeros(3)


CASES = [
    (torch.zeros(()), r"shape \[\]"),
    (torch.zeros(2), r"shape \[2\]"),
    (torch.zeros(3, 1), r"shape \[3, 1\]"),
    (None, "NoneType None"),
]


@pytest.mark.parametrize(("value", "given"), [*CASES, (1.5, "float 1.5"), ((LIKE, LIKE), "tuple")])
def test_only_one_number_for_each_is_taken(value, given):
    with pytest.raises(ValueError, match=rf"the loss of pairs gave (a tensor of )?{given}.*expected a tensor of shape \[3\]"):
        reduce.elementwise(value, LIKE, "loss of pairs")


def test_one_number_for_each_is_itself():
    assert reduce.elementwise(LIKE, LIKE, "x") is LIKE


@pytest.mark.parametrize("loss", [lambda *stats: stats[0], lambda logits: logits])
def test_a_token_loss_names_what_it_takes(loss):
    with pytest.raises(ValueError, match="the token loss takes (stats|logits); it is called with those that it names of logp, entropy"):
        sft_objective.token_loss(presets.Entry(loss))
