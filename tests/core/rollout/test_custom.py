"""A user's rollout function as a sampler of prompts."""

import numpy as np
import pytest

from treetune.core.data.prompts import Prompt
from treetune.core.rollout import custom
from treetune.core.rollout.group import Completion, Sampled


def test_a_random_name_for_each_sequence_of_a_rollout_function():
    """No two sequences of a run draw the same numbers."""
    names = {custom.sequence_number(number, call, k) for number in range(20) for call in range(5) for k in range(8)}
    assert len(names) == 800 and all(0 <= name < 2**62 for name in names)


def prompt(row=3):
    return Prompt(np.array([5, 6], np.int32), "five six", None, {"answer": "7"}, row)


class Words:
    """A tokenizer that writes ids as numbers."""

    def decode(self, ids, skip_special_tokens=True):
        return " ".join(map(str, ids))


def draw(policy, ids, numbers, /, *, n, max_tokens):
    """One completion after each list: its length, then the number of tokens that it may have."""
    tokens = [np.array([len(one), max_tokens], np.int32) for one in ids]
    rows = [[Completion(one, np.zeros(2, np.float32), np.ones(2, bool), True, "")] for one in tokens]
    return Sampled(rows, policy)


def played(function, n=2):
    rollout = custom.CustomRollout(function, Words(), vocab_size=100, max_positions=12)
    return rollout(draw, n=n, max_tokens=9)(4, [prompt()], [0])


def test_turns_of_an_environment_train_nothing_and_the_oldest_version_counts():
    def function(prompts, generate, *, num_generations, tokenizer):
        assert prompts[0]["text"] == "five six" and prompts[0]["columns"] == {"answer": "7"}
        first = generate([prompts[0]["tokens"]] * num_generations)
        second = generate([prompts[0]["tokens"] + [1]], max_tokens=3)[0]
        tokens = first[0]["tokens"] + [8] + second["tokens"]
        return [[{"tokens": tokens, "trained": [True, True, False, True, True]}] * num_generations]

    sampled = played(function)
    assert sampled.version == 4 and len(sampled.completions[0]) == 2
    one = sampled.completions[0][0]
    assert one.tokens.tolist() == [2, 9, 8, 3, 3] and one.text == "2 9 3 3" and np.isnan(one.logp).all() and one.stopped


@pytest.mark.parametrize(
    ("completion", "message"),
    [
        ({"tokens": []}, "gave no tokens"),
        ({"tokens": [100]}, "expected ids from 0 to 99"),
        ({"tokens": [1] * 11}, "11 tokens after a prompt of 2, more than the 12 positions"),
        ({"tokens": [1, 2], "logp": [0.0]}, "2 tokens, 2 trained and 1 logp"),
        ({"tokens": [1], "logp": [float("inf")]}, "infinite"),
        ({"tokens": [1], "text": 3}, "gave the text 3"),
        ("text", "gave no tokens"),
    ],
)
def test_what_a_function_may_not_give_names_the_row(completion, message):
    def function(prompts, generate, *, num_generations, tokenizer):
        generate([[1]])
        return [[completion]]

    with pytest.raises(ValueError, match=f"the rollout function, for row 3, .*{message}"):
        played(function, n=1)


def test_a_function_that_never_samples_or_fails_is_refused():
    with pytest.raises(ValueError, match="never called generate"):
        played(lambda prompts, generate, **named: [[{"tokens": [1]}]])
    with pytest.raises(ValueError, match="raised KeyError"):
        played(lambda prompts, generate, **named: prompts[0]["nothing"])
    with pytest.raises(ValueError, match="a list of 1 lists"):
        played(lambda prompts, generate, **named: generate([[1]]))
