"""Rollouts of several turns: how long a reply may be, and what stands between replies."""

import numpy as np

from treetune.core.data.prompts import Prompt
from treetune.core.rollout import sampler, turns
from treetune.core.rollout.group import Completion, Sampled


def test_lengths_go_by_the_truth_and_never_above_the_cap():
    worked = {((10, 20), 256): 64, ((100, 90), 256): 150, ((300,), 256): 256, ((10,), 32): 32}
    assert {key: turns.reply_limit(key[0], multiplier=1.5, cap=key[1]) for key in worked} == worked


def test_turns_are_those_of_the_row_whoever_samples():
    """Three rows of none, one and two further replies, two samples of each; an end of turn that was sampled is not repeated."""
    asked, end = [], 7
    betweens = ([], [[end, 1]], [[end, 2], [end, 3]])
    rows = [Prompt(np.array([50 + i]), "", [], {"between": between}, i) for i, between in enumerate(betweens)]

    def draw(policy, ids, numbers, *, n, max_tokens):
        asked.append(([list(one) for one in ids], list(numbers), n, max_tokens))
        made = [[np.array([100 + len(asked), *([end] if j else [])], np.int32) for j in range(n)] for _ in ids]
        done = [[Completion(one, np.zeros(len(one), np.float32), np.ones(len(one), bool), True, "a") for one in row] for row in made]
        return Sampled(done, 9 - len(asked))

    rollout = turns.multi_turn(sampler.single_turn, 30)
    made = rollout(draw, n=2, max_tokens=5)("policy", rows, [11, 12, 13])
    assert [(n, most) for _, _, n, most in asked] == [(2, 5), (1, 30), (1, 30)] and made.version == 6
    assert asked[1][0] == [[51, 101, end, 1], [51, 101, end, 1], [52, 101, end, 2], [52, 101, end, 2]]
    assert asked[2][0] == [[52, 101, end, 2, 102, end, 3], [52, 101, end, 2, 102, end, 3]]
    assert len({*asked[1][1], *asked[2][1]}) == 6, "randomness of its own for each"
    told = [[one.tokens.tolist() for one in group] for group in made.completions]
    assert told[0] == [[101], [101, end]] and told[1] == [[101, end, 1, 102]] * 2 and told[2] == [[101, end, 2, 102, end, 3, 103]] * 2
    assert [one.trained.sum() for group in made.completions for one in group] == [1, 2] * 3
