"""The rewards of a run: names, weights, which are models, and functions beside models in one array."""

import numpy as np
import pytest

from treetune.core.data.prompts import Prompt
from treetune.core.rollout import reward_models, rewards
from treetune.core.rollout.group import Completion, Group
from treetune.core.rollout.reward_models import RewardModel


def group(*texts, messages=None):
    prompt = Prompt(np.array([1], np.int32), "2+2?", messages, {}, 0)
    made = [Completion(np.arange(len(text), dtype=np.int32), np.zeros(len(text)), np.ones(len(text), bool), True, text) for text in texts]
    return Group(prompt, 0, tuple(made), 0)


def model(score, *, steps=False):
    return RewardModel(lambda docs: [score(doc) for doc in docs], None, steps, "digest")


@pytest.fixture
def by_text(monkeypatch):
    """Documents of a reward model are its rows, so that no tokenizer is needed."""

    class Doc:
        def __init__(self, row, number):
            self.content, self.row, self.tokens = row, number, [0] * 3000

    def documents(model, rows):
        return [Doc(row, number) for row, number in zip(rows.rows, rows.numbers, strict=True)]

    monkeypatch.setattr(reward_models, "_documents", documents)


def test_names_are_short_unless_two_would_be_the_same(tmp_path):
    (tmp_path / "judge").mkdir()
    names = ("rewards.size", "lib/rewards.py:size", "length?max=6", "gsm8k", str(tmp_path / "judge"), "owner/judge-7b")
    assert rewards.names(names) == ("rewards.size", "lib/rewards.py:size", "length", "gsm8k", "judge", "judge-7b")
    assert [rewards.is_model(name) for name in names] == [False, False, False, False, True, True]
    assert not rewards.is_model("owner/file.py") and not rewards.is_model("a/b:fn")


def test_a_weight_for_each_reward_or_none():
    assert rewards.weights(("gsm8k", "digits"), ()) == [1.0, 1.0] and rewards.weights(("gsm8k", "digits"), (0.5, -2)) == [0.5, -2]
    assert rewards.describe(("gsm8k", "digits"), (1.0, -2.5)) == ["gsm8k", "digits x -2.5"]
    for given, message in (((1.0,), "has 1 numbers for 2 rewards"), ((1.0, float("nan")), "has nan, expected finite")):
        with pytest.raises(ValueError, match=message):
            rewards.weights(("gsm8k", "digits"), given)
    for wrong in ((), ("gsm8k", "gsm8k")):
        with pytest.raises(ValueError, match="at least one reward, and none twice"):
            rewards.check_names(wrong)


def test_functions_and_models_score_into_one_array(by_text):
    judges = {"owner/judge": model(lambda doc: [float(len(doc.content["completion"]))])}
    options = {"load_model": judges.__getitem__, "pool": rewards.PoolSettings(), "say": print}
    started = rewards.start(("owner/judge", "digits"), (2.0, 1.0), **options)
    try:
        scored = started.score([group("a1", "22"), group("", "x9y")])
    finally:
        started.close()
    np.testing.assert_array_equal(scored, [[[2, 0.5], [2, 1.0]], [[np.nan, 0.0], [3, 1 / 3]]])
    assert started.names == ("judge", "digits") and started.files == ("digits",)
    assert started.models == {"reward model owner/judge": "digest"} and started.described == ["owner/judge x 2", "digits"]
    measured = started.measure([one._replace(rewards=values) for one, values in zip([group("a1", "22")], scored, strict=False)])
    assert measured["reward"] == pytest.approx(np.mean([4.5, 5.0])) and measured["rewards/judge/mean"] == 2


def test_a_reward_model_in_parts_makes_as_many_passes_as_any_rank(by_text):
    said, idle = [], []
    judge = model(lambda doc: [1.0])._replace(most=lambda passes: said.append(passes) or 3, idle=lambda: idle.append(len(said)))
    reward_models.score(judge, [group("a", "b"), group("c", " ")])
    assert (said, idle) == ([3], []), "each text fills a pass"
    scores = reward_models.score(judge, [group(" ", "")])
    assert (said, idle) == ([3, 0], [2, 2, 2]) and np.isnan(scores).all()


def test_a_process_reward_is_that_of_the_worst_line(by_text):
    judge = model(lambda doc: [len(line) / 10 for line in doc.content["completions"]], steps=True)
    scored = reward_models.score(judge, [group("aaa\nb\n\ncc", " \n "), group("dd", "eeee\nfff")])
    np.testing.assert_allclose(scored, [[0.1, np.nan], [0.2, 0.3]])


def test_answers_to_messages_are_messages_and_scores_that_are_no_numbers_unknown(by_text):
    seen = []
    judge = model(lambda doc: seen.append(doc.content) or [float("inf") if len(seen) == 1 else 1.0])
    talk = [{"role": "user", "content": "2+2?"}]
    scored = reward_models.score(judge, [group("4", "5", messages=talk)])
    assert seen[0] == {"prompt": talk, "completion": [{"role": "assistant", "content": "4"}]}
    np.testing.assert_array_equal(scored, [[np.nan, 1.0]])
