"""Rewards of answers: means over those with an opinion, the same on all ranks, and scorers that fail first or later."""

import math
from typing import Any

import numpy as np
import pytest

from treetune.core.data.prompts import Prompt
from treetune.core.data.questions import Question
from treetune.core.rollout.rewards import Rewards
from treetune.core.run import answer_rewards
from treetune.core.run.answers import Answer
from treetune.core.run.ranks import Ranks


class Words:
    def decode(self, ids, skip_special_tokens=False):
        return " ".join(map(str, ids))


WORDS: Any = Words()


def asked(count):
    rows = [Question(f"p{i}", [i, i + 1], f"r{i}", i) for i in range(count)]
    return answer_rewards.prompts(rows, WORDS)


def answers(count):
    return [Answer(3, i, f"p{i}", "x" * i, f"r{i}", i, True, tuple(range(i))) for i in range(count)]


def rewards(calls, fails=lambda call: False):
    """The length of a text and of its ids, of which odd ones have none."""

    def score(groups):
        calls.append(len(groups))
        if fails(len(calls)):
            raise ValueError("the judge is gone")
        values = [[len(group.completions[0].text), len(group.completions[0].tokens)] for group in groups]
        return np.array([[[text, math.nan if ids % 2 else ids]] for text, ids in values], np.float64)

    nothing: Any = None
    return Rewards(("text", "ids"), [1.0, 1.0], [], score, nothing)


def test_prompts_of_documents_and_rows():
    row = Prompt(np.array([1], np.int32), "t", None, {"answer": "7"}, 4)
    own, read = answer_rewards.prompts([Question("t", [1], "7", 4, row), Question("2 + 2", [5, 6], "4", 9)], WORDS)
    assert own is row
    assert (read.text, read.messages, read.row, read.tokens.tolist()) == ("5 6", None, 9, [5, 6])
    assert read.columns == {"readable_prompt": "2 + 2"} | dict.fromkeys(("ground_truth", "answer", "solution", "reference"), "4")


def test_means_leave_out_those_without_an_opinion():
    calls = []
    score = answer_rewards.Scorer(rewards(calls), asked(130), pytest.fail)
    assert score(answers(130)) == {"reward_text": 129 / 2, "reward_ids": 64.0}
    assert calls == [64, 64, 2]


@pytest.mark.parametrize(("world", "count"), [(2, 5), (3, 2), (4, 130)])
def test_ranks_share_the_answers_and_make_as_many_calls(world, count, monkeypatch):
    made, parts = [[] for _ in range(world)], {}
    alone = answer_rewards.Scorer(rewards([]), asked(count), pytest.fail)(answers(count))

    def gather(ranks, part):
        parts[ranks.rank] = part
        return [parts[rank] for rank in range(len(parts))]

    monkeypatch.setattr(answer_rewards, "every", gather)
    found = [
        answer_rewards.Scorer(rewards(made[rank]), asked(count), pytest.fail, Ranks(rank, world, None))(answers(count))
        for rank in range(world)
    ]
    assert len({len(calls) for calls in made}) == 1, "a rank of a split model must not be alone in it"
    assert found[-1] == alone, "the last has seen all parts"


def test_a_scorer_that_never_worked_ends_the_run_and_a_later_failure_does_not():
    with pytest.raises(ValueError, match="the judge is gone"):
        answer_rewards.Scorer(rewards([], lambda call: True), asked(3), pytest.fail)(answers(3))
    warnings = []
    score = answer_rewards.Scorer(rewards([], lambda call: call == 2), asked(3), warnings.append)
    first, second, third = (score(answers(3)) for _ in range(3))
    assert first == third == {"reward_text": 1.0, "reward_ids": 1.0}
    assert all(math.isnan(value) for value in second.values()) and second.keys() == first.keys()
    assert warnings == ["answers have no rewards in this evaluation: the judge is gone"]
