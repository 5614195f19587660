"""Answers: few calls, in the order of the questions however ranks share them, and what an evaluation makes of them."""

from typing import NamedTuple

import pytest
import torch

from treetune.core.data.questions import Question
from treetune.core.run import answers
from treetune.core.run.ranks import Ranks

END = 9


class State(NamedTuple):
    step: int = 3


class Sampled(NamedTuple):
    tokens: torch.Tensor
    lens: torch.Tensor


class Digits:
    def decode(self, ids, skip_special_tokens=False):
        return "".join(map(str, ids))


def sampler(calls):
    """One that repeats the last token of the prompt until it may no more; after an even one it ends with END."""

    def sample(state, ids, numbers, /, *, n, max_tokens):
        calls.append((max_tokens, list(numbers)))
        rows = [[prompt[-1]] * (max_tokens - 1) + [prompt[-1] if prompt[-1] % 2 else END] for prompt in ids]
        return Sampled(torch.tensor(rows), torch.tensor([max_tokens] * len(rows)))

    return sample


def asked(*lengths):
    return [Question(f"p{i}", [i % 9] * length, f"r{i}", i) for i, length in enumerate(lengths)]


def test_prompts_that_have_room_for_as_much_are_asked_in_one_call():
    calls = []
    answer = answers.answerer(asked(2, 4, 9, 2), sampler(calls), Digits(), answers.Limits(3, 10, [END]))
    found = answer(State())
    assert calls == [(3, [0, 1, 3]), (1, [2])], "the long one is cut where the model has no more positions"
    assert [(one.row, one.completion, one.stopped, one.tokens) for one in found] == [
        (0, "00", True, 3), (1, "111", False, 3), (2, "", True, 1), (3, "333", False, 3)
    ]  # fmt: skip
    assert found[1].record() == {
        "step": 3, "row": 1, "prompt": "p1", "answer": "111", "reference": "r1", "tokens": 3, "stopped": False
    }  # fmt: skip


def test_many_are_asked_in_several_calls():
    calls = []
    answers.answerer(asked(*[1] * 130), sampler(calls), Digits(), answers.Limits(2, 10, [END]))(State())
    assert [len(numbers) for _, numbers in calls] == [64, 64, 2]


@pytest.mark.parametrize("world", [1, 2, 3, 5])
def test_ranks_share_the_questions_and_all_have_all_answers(world, monkeypatch):
    joined, parts = [], {}

    def make(own):
        return answers.answerer(own, sampler([]), Digits(), answers.Limits(2, 10, [END]))

    questions = asked(1, 1, 1, 1)
    for rank in range(world):
        parts[rank] = make(questions[rank::world])(State())
    monkeypatch.setattr(answers, "every", lambda ranks, own: [parts[rank] for rank in range(world)])
    for rank in range(world):
        found = answers.shared(questions, make, joined.append, Ranks(rank, world, None))(State())
        assert [one.row for one in found] == [0, 1, 2, 3]
    assert len(joined) == world, "a rank that has nothing to ask takes part, too"


def test_an_evaluation_has_the_metrics_of_its_answers():
    seen = []
    answer = answers.answerer(asked(1, 1), sampler([]), Digits(), answers.Limits(2, 10, [END]))
    measured = answers.evaluating(lambda state: {"loss": torch.tensor(2.0)}, answer, lambda found: seen.append(found) or {"chars": 1.5})
    metrics = measured(State())
    assert {name: float(value) for name, value in metrics.items()} == {"loss": 2.0, "chars": 1.5}
    assert [one.reference for one in seen[0]] == ["r0", "r1"]
