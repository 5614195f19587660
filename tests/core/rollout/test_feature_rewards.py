"""Completions that are the truth have its features."""

import numpy as np
import torch

from treetune.core.data.prompts import Prompt
from treetune.core.rollout import feature_rewards
from treetune.core.rollout.group import Completion, Group


def test_a_completion_that_is_the_truth_has_its_features():
    def completion(*ids):
        return Completion(np.array(ids, np.int32), np.zeros(len(ids)), np.ones(len(ids), bool), ids[-1] == 9, "")

    prompt = Prompt(np.arange(3, dtype=np.int32), "", None, {"truth": np.array([4, 5], np.int32)}, 0)
    group = Group(prompt, 0, (completion(4, 5, 9), completion(4, 6, 9), completion(4, 5)), 0)
    phi, y = torch.randn(1, 3, 8), torch.randn(1, 8)
    found = feature_rewards.with_truth(phi, y, [group], {9})
    assert torch.equal(found[0, 0], y[0]) and torch.equal(found[0, 2], y[0]) and torch.equal(found[0, 1], phi[0, 1])
