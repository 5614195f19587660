"""Rewards by features: which sequences are read, what is read once, and what is equal to the bit."""

import numpy as np
import torch

from treetune.core.data import pack
from treetune.core.data.prompts import Prompt
from treetune.core.rollout import feature_rewards
from treetune.core.rollout.group import Completion, Group

END = 9


def completion(*ids):
    return Completion(np.array(ids, np.int32), np.zeros(len(ids)), np.ones(len(ids), bool), ids[-1] == END, "")


def group(row, truth, *completions):
    prompt = Prompt(np.arange(3, dtype=np.int32), "", None, {"truth": np.array(truth, np.int32)}, row)
    return Group(prompt, row, completions, 0)


class Network:
    """Features that are sums: of the tokens after the prompt, and of their number; each pass is told apart by a little noise."""

    def __init__(self):
        self.texts = []

    def features(self, batch, plan, lens, at, prompt_lens):
        texts = [rows[int(skip) :] for rows, skip in zip(batch["tokens"][at].split(lens.tolist()), prompt_lens, strict=True)]
        self.texts += [text.tolist() for text in texts]
        return torch.stack([torch.tensor([float(text.sum()), float(len(text))]) for text in texts]) + 1e-3 * len(self.texts)


def scorer(network, *, micro_batch_size=2, **together):
    def compare(phi, y):
        return torch.stack([phi[:, :, 0] - y[:, None, 0], phi[:, :, 1], (phi == y[:, None]).all(-1).float()], -1)

    def collate(docs):
        return pack.collate_trees(docs), None

    cpu = torch.device("cpu")
    return feature_rewards.scorer(
        feature_rewards.FeatureScorer(network.features, collate, compare, {END}, micro_batch_size, cpu, **together)
    )


def test_completions_are_read_once_and_without_their_end():
    network = Network()
    groups = [group(0, [4, 5], completion(4, 6, END), completion(4, 6), completion(7)), group(1, [8], completion(8), *[completion(2)] * 2)]
    scores = scorer(network)(groups)
    assert sorted(network.texts) == sorted([[4, 6], [7], [8], [2], [4, 5], [8]])
    assert scores.shape == (2, 3, 3) and np.array_equal(scores[0, 0], scores[0, 1]) and np.array_equal(scores[1, 1], scores[1, 2])
    assert scores[1, 0, 2] == 1 and scores[0, :, 2].tolist() == [0, 0, 0]


def test_features_of_a_truth_are_made_once_however_prompts_are_batched():
    results = []
    for size in (1, 2):
        network = Network()
        score = scorer(network, micro_batch_size=size)
        groups = [group(0, [4, 5], completion(1), completion(2)), group(1, [4, 6], completion(3), completion(1))]
        results.append([score(groups) for _ in range(2)])
        assert network.texts.count([4, 5]) == 1 and network.texts.count([1]) == 4
    np.testing.assert_allclose(results[0], results[1], atol=0.05)


def test_a_rank_with_fewer_texts_makes_as_many_passes_as_the_others():
    network, said, idle = Network(), [], []
    score = scorer(network, most=lambda passes: said.append(passes) or 5, idle=lambda: idle.append(len(network.texts)))
    groups = [group(row, [4, 5], completion(1), completion(2)) for row in range(3)]
    score(groups)
    assert said == [3] and idle == [7, 7], "two of prompts, one of a truth that all share; the others behind them"
    score(groups)
    assert said == [3, 2] and len(idle) == 5


def test_the_oldest_truth_is_forgotten(monkeypatch):
    monkeypatch.setattr(feature_rewards, "KEPT", 1)
    network = Network()
    score = scorer(network)
    for truth in ([4], [5], [4]):
        score([group(0, truth, completion(1), completion(2))])
    assert network.texts.count([4]) == 2 and network.texts.count([5]) == 1


def test_a_completion_that_is_the_truth_has_its_features():
    one = group(0, [4, 5], completion(4, 5, 9), completion(4, 6, 9), completion(4, 5))
    phi, y = torch.randn(1, 3, 8), torch.randn(1, 8)
    found = feature_rewards.with_truth(phi, y, [one], {END})
    assert torch.equal(found[0, 0], y[0]) and torch.equal(found[0, 2], y[0]) and torch.equal(found[0, 1], phi[0, 1])
