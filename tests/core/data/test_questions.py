"""Questions: where the prompt of a document ends and its answer begins, and what is a reference."""

import numpy as np
import pytest

from treetune.core.data import questions
from treetune.core.data.prompts import Prompt
from treetune.core.data.spans import Doc
from treetune.core.data.trees import TreeDoc

END = 9


class Digits:
    """A tokenizer whose token i is the text of i; 0 is special."""

    def decode(self, ids, skip_special_tokens=False):
        return "".join(str(one) for one in ids if one or not skip_special_tokens)


def doc(tokens, weight, row=0):
    return Doc(np.array(tokens, np.int32), np.array(weight, np.float32), row)


def pair(good, bad, extras=None):
    """A prompt of two tokens with two completions."""
    tokens, branch = [7, 7, *good, *bad], [0, 0, *[1] * len(good), *[2] * len(bad)]
    start = [0, 0, *[2] * (len(good) + len(bad))]
    weight = np.array([0, 0, *[1.0] * (len(good) + len(bad))], np.float32)
    return TreeDoc(np.array(tokens), np.array(branch), np.array(start), weight, 5, extras or {})


def test_a_conversation_asks_for_its_last_trained_turn():
    talk = doc([0, 1, 2, 3, 9, 4, 5, 6, 9, 8], [0, 0, 0, 1, 1, 0, 0, 1, 1, 0])
    assert questions.split(talk) == ([0, 1, 2, 3, 9, 4, 5], [6, 9])
    (one,) = questions.held_out([talk], 3, Digits(), [END], 4)
    assert one[:4] == ("123945", [0, 1, 2, 3, 9, 4, 5], "6", 0), "the reference ends before the token that ends a turn"
    assert one.end == "9" and questions.held_out([talk], 3, Digits(), [8], 4)[0].end == ""


@pytest.mark.parametrize(("extras", "asked"), [({}, True), ({"desirable": (True, True)}, True), ({"desirable": (False, False)}, False)])
def test_of_a_pair_the_better_one_is_the_reference_and_a_bad_answer_is_none(extras, asked):
    found = questions.held_out([pair([1, 2, END], [3, 4, END], extras)], 1, Digits(), [END], 4)
    assert [one[:4] for one in found] == ([("77", [7, 7], "12", 5)] if asked else [])


def test_a_text_without_a_prompt_goes_on_from_its_beginning():
    text = doc(range(1, 31), [0] + [1] * 29)
    assert questions.split(text, 3) == (list(range(1, 17)), [17, 18, 19])
    assert questions.split(doc(range(1, 17), [0] + [1] * 15), 3) == ([], []), "nothing is left to be told"


def test_rows_without_an_answer_are_left_out_and_the_first_others_are_asked():
    rows = [doc([1, 2, 3], [0, 0, 0]), doc([1, 2, END], [0, 0, 1]), *(doc([1, 2, i], [0, 0, 1], i) for i in range(3, 6))]
    assert [one.row for one in questions.held_out(rows, 2, Digits(), [END], 4)] == [3, 4]


def test_the_reference_of_a_prompt_is_in_a_column_if_anywhere():
    rows = ({"answer": 4, "solution": "four"}, {"other": "x"}, {"answer": 4}, {"reference": True})
    prompts = [Prompt(np.array([1]), "1", None, columns, 2) for columns in rows]
    assert [one.reference for one in questions.held_out(prompts, 9, Digits(), [END], 4)] == ["four", None, "4", None]
