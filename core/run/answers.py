"""Answers of a policy while it trains: to the sample prompt before and after, and to held-out prompts at each evaluation.

`Answer` is what is known of one; `answerer` makes the function that has a policy answer, `shared` one whose questions ranks share.
"""

from collections.abc import Callable, Mapping, Sequence
from itertools import groupby
from typing import Any, NamedTuple, Protocol

import torch

from treetune.core.data import questions
from treetune.core.data.prompt_ids import Samples
from treetune.core.data.questions import Question
from treetune.core.protocols import Tokenizer
from treetune.core.run.observers import Observers
from treetune.core.run.ranks import ALONE, Ranks, every
from treetune.core.state import TrainState

TOGETHER = 64  # answers that are sampled together: their keys and values are in memory at a time


class Answer(NamedTuple):
    """An answer. reference: a good one, where the row has one. row: its number in the data; None for a prompt of one's own.

    tokens: how many it has, with the one that ends it. stopped: whether it was ended, and not cut off. ids: the tokens themselves.
    end: the text that ends a whole one, if it is known.
    """

    step: int
    row: int | None
    prompt: str
    completion: str
    reference: str | None
    tokens: int
    stopped: bool
    ids: tuple[int, ...] = ()
    end: str = ""

    def record(self) -> dict[str, Any]:
        """As in samples.jsonl, where a completion is an answer; without ids, end and what is None, as the row of a prompt of one's own."""
        names, left_out = {"completion": "answer"}, ("ids", "end")
        return {names.get(name, name): value for name, value in self._asdict().items() if value is not None and name not in left_out}


Answerer = Callable[[TrainState], list[Answer]]  # the answers to questions that do not change, by the weights of a state
Measure = Callable[[list[Answer]], Mapping[str, float]]  # metrics of the answers of an evaluation; called on every rank


class Sample(Protocol):
    """Continues token ids by the weights of a state; `numbers` name the randomness of each prompt."""

    def __call__(self, state: TrainState, ids: Sequence[Sequence[int]], numbers: Sequence[int], /, *, n: int, max_tokens: int) -> Samples:
        """n completions of at most max_tokens tokens after each prompt."""
        ...


class Limits(NamedTuple):
    """Where an answer ends: after so many tokens, at the positions that the model has, and at one of these tokens."""

    max_tokens: int
    positions: int
    stop_ids: Sequence[int]


def answerer(asked: Sequence[Question], sample: Sample, tokenizer: Tokenizer, limits: Limits) -> Answerer:
    """The function that has the weights of a state answer what is asked, in as few calls as memory and positions allow."""

    def answer(state: TrainState) -> list[Answer]:
        found: dict[int, Answer] = {}
        for tokens, part in _calls(asked, limits):
            samples = sample(state, [asked[i].ids for i in part], part, n=1, max_tokens=tokens)
            ids = zip(part, samples.tokens.tolist(), samples.lens.tolist(), strict=True)
            found |= {i: _answer(int(state.step), asked[i], row[:count], tokenizer, limits) for i, row, count in ids}
        return [found[i] for i in range(len(asked))]

    return answer


def _calls(asked: Sequence[Question], limits: Limits) -> list[tuple[int, list[int]]]:
    """(tokens of an answer, numbers of questions) of each call: those that have room for as many tokens are asked together."""
    room = {i: min(limits.max_tokens, limits.positions - len(question.ids)) for i, question in enumerate(asked)}
    calls = []
    for tokens, numbers in groupby(sorted(room, key=lambda i: -room[i]), key=room.__getitem__):
        same = list(numbers)
        calls += [(tokens, same[i : i + TOGETHER]) for i in range(0, len(same), TOGETHER)]
    return calls


def _answer(step: int, question: Question, ids: list[int], tokenizer: Tokenizer, limits: Limits) -> Answer:
    text, stopped = questions.decode(ids, tokenizer, limits.stop_ids), bool(ids) and ids[-1] in limits.stop_ids
    return Answer(step, question.row, question.prompt, text, question.reference, len(ids), stopped, tuple(ids), question.end)


def shared(
    asked: Sequence[Question], make: Callable[[Sequence[Question]], Answerer], join: Callable[[TrainState], None], ranks: Ranks = ALONE
) -> Answerer:
    """As make(asked), whose questions ranks share; all have all answers, in the order of the questions.

    join(state): takes part in what other ranks still sample, where they sample together.
    """
    own = asked[ranks.row_rank :: ranks.row_ranks]
    answer = make(own)

    def together(state: TrainState) -> list[Answer]:
        part = answer(state)
        join(state)
        dealt = every(ranks, part)
        return [dealt[i % ranks.row_ranks][i // ranks.row_ranks] for i in range(len(asked))]

    return together


def told(answer: Answerer, observers: Observers, activity: str, most: int | None = None) -> Answerer:
    """An answerer whose answers, or the first `most` of them, the observers are told, as records of samples.jsonl."""

    def tell(state: TrainState) -> list[Answer]:
        with observers.busy(activity):
            found = answer(state)
        if shown := found[:most]:
            observers.samples([one.record() for one in shown])
        return found

    return tell


def evaluating(
    evaluate: Callable[[TrainState], dict[str, torch.Tensor]], answer: Answerer, measure: Measure = lambda answers: {}
) -> Callable[[TrainState], dict[str, torch.Tensor]]:
    """An evaluation in which the policy also answers; measure(answers) -> metrics beside those of `evaluate`."""

    def both(state: TrainState) -> dict[str, torch.Tensor]:
        metrics, measured = evaluate(state), measure(answer(state))
        if clash := metrics.keys() & measured.keys():
            raise ValueError(f"an evaluation has {min(clash)} already: give the metric of answers another name")
        return metrics | {name: torch.tensor(value, dtype=torch.float64) for name, value in measured.items()}

    return both
