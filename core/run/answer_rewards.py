"""Rewards of answers to held-out prompts: those of reward functions, models and judges, by the same calls as in online training.

N answers, K rewards.
"""

import math
from collections.abc import Callable, Sequence

import numpy as np

from treetune.core.data import questions
from treetune.core.data.prompts import Prompt
from treetune.core.data.questions import Question
from treetune.core.protocols import Tokenizer
from treetune.core.rollout import stats
from treetune.core.rollout.group import Completion, Group
from treetune.core.rollout.rewards import Rewards
from treetune.core.run.answers import Answer
from treetune.core.run.ranks import ALONE, Ranks, every

TOGETHER = 64  # answers of one call, which a reward's timeout is for


def prompts(asked: Sequence[Question], tokenizer: Tokenizer) -> list[Prompt]:
    """What rewards may look at: prompts as they were read, and of documents their texts, with the answer in the columns for it."""
    return [question.prompt_row or _of_document(question, tokenizer) for question in asked]


def _of_document(question: Question, tokenizer: Tokenizer) -> Prompt:
    columns = dict.fromkeys(questions.REFERENCES, question.reference) | {"readable_prompt": question.prompt}
    return Prompt(np.array(question.ids, np.int32), tokenizer.decode(question.ids), None, columns, question.row or 0)


class Scorer:
    """Mean rewards of the answers of an evaluation, on every rank; a class because it has a past.

    asked: the prompts of the answers. A reward that cannot score ends the run in its first evaluation; later it is not a number and told
    of, since a judge that is gone for a while is no reason to end a run of days.
    """

    def __init__(self, rewards: Rewards, asked: Sequence[Prompt], warn: Callable[[str], None], ranks: Ranks = ALONE):
        self.rewards, self.asked, self.warn, self.ranks, self.worked = rewards, asked, warn, ranks, False

    def __call__(self, answers: Sequence[Answer]) -> dict[str, float]:
        """{reward_NAME: mean over the answers that NAME has an opinion on}. Errors: ValueError where the first evaluation cannot score."""
        groups = [_group(prompt, answer) for prompt, answer in zip(self.asked, answers, strict=True)]
        parts = every(self.ranks, self._score(groups))
        failures = [text for _, text in parts if text]
        if failures and not self.worked:
            raise ValueError(failures[0])
        if failures and self.ranks.rank == 0:
            self.warn(f"answers have no rewards in this evaluation: {failures[0]}")
        self.worked = self.worked or not failures
        rows = np.concatenate([part for part, _ in parts])
        values = [math.nan if failures else stats.mean(column) for column in rows.T]
        return {f"reward_{name}": value for name, value in zip(self.rewards.names, values, strict=True)}

    def _score(self, groups: list[Group]) -> tuple[np.ndarray, str]:
        """Rewards [n, K] of this rank's share, and what went wrong. All ranks make as many calls, as they may have parts of a model."""
        size, own = self.ranks.row_ranks, groups[self.ranks.row_rank :: self.ranks.row_ranks]
        found, failure = [np.empty((0, len(self.rewards.names)))], ""
        for begin in range(0, -(-len(groups) // size), TOGETHER):
            part = own[begin : begin + TOGETHER]
            try:
                found.append(self.rewards.score(part or groups[:1])[: len(part), 0])
            except ValueError as error:
                failure = failure or str(error)
        return np.concatenate(found), failure


def _group(prompt: Prompt, answer: Answer) -> Group:
    ids = np.array(answer.ids, np.int32)
    completion = Completion(ids, np.full(len(ids), np.nan, np.float32), np.ones(len(ids), bool), answer.stopped, answer.completion)
    return Group(prompt, 0, (completion,), answer.step, end=answer.end)
