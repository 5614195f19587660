"""Rollouts of structured energy-based fine-tuning: replies at most as long as the truth suggests, and conversations that go on.

P prompts, n completions of each. A conversation's first reply is the policy's own and trains; the turns after it are laid behind it as
they are in the row, each later reply sampled anew, so that the features see what the first reply led to.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from treetune.core.data import ebft_rows
from treetune.core.data.prompts import Prompt
from treetune.core.rollout.custom import sequence_number
from treetune.core.rollout.group import Completion, PromptSampler, Sampled
from treetune.core.rollout.sampler import Rollout, TokenSampler

Later = Callable[[list[list[int]], list[int]], Sampled]  # (ids, numbers) -> one reply after each
LEAST = 64  # tokens that a reply may always have, unless the limit of all replies is below


def reply_limit(truths: Sequence[int], *, multiplier: float, cap: int) -> int:
    """min(cap, max(64, floor(multiplier * c) of the longest truth c)): tokens of a reply, of the tokens of the true ones."""
    return min(cap, max([LEAST, *(int(multiplier * count) for count in truths)]))


def with_truth(rollout: Rollout, *, multiplier: float | None, later_tokens: int | None) -> Rollout:
    """The rollout `adaptive` with a multiplier and `multi_turn` with later_tokens, and without where there is none."""
    limited = rollout if multiplier is None else adaptive(rollout, multiplier)
    return limited if later_tokens is None else multi_turn(limited, later_tokens)


def adaptive(rollout: Rollout, multiplier: float) -> Rollout:
    """The rollout with replies limited by the true replies of each call, and never longer than it allows."""

    def limited(draw: TokenSampler, /, *, n: int, max_tokens: int) -> PromptSampler:
        def sample(policy: Any, prompts: Sequence[Prompt], numbers: Sequence[int], /) -> Sampled:
            limit = reply_limit([ebft_rows.first_reply(one) for one in prompts], multiplier=multiplier, cap=max_tokens)
            return rollout(draw, n=n, max_tokens=limit)(policy, prompts, numbers)

        return sample

    return limited


def multi_turn(rollout: Rollout, later_tokens: int) -> Rollout:
    """The rollout going on through the turns of the prompts' rows; later_tokens: longest later reply."""

    def played(draw: TokenSampler, /, *, n: int, max_tokens: int) -> PromptSampler:
        first = rollout(draw, n=n, max_tokens=max_tokens)

        def sample(policy: Any, prompts: Sequence[Prompt], numbers: Sequence[int], /) -> Sampled:
            sampled = first(policy, prompts, numbers)
            talks, versions = [list(group) for group in sampled.completions], [sampled.version]

            def later(ids: list[list[int]], names: list[int]) -> Sampled:
                return draw(policy, ids, names, n=1, max_tokens=later_tokens)

            for turn in range(max(len(one.columns["between"]) for one in prompts)):
                versions.append(_reply(later, prompts, numbers, talks, turn))
            return Sampled(talks, min(versions))

        return sample

    return played


def _reply(later: Later, prompts: Sequence[Prompt], numbers: Sequence[int], talks: list[list[Completion]], turn: int) -> int:
    """Append the turns before reply number `turn`, and that reply, to every completion whose own row has it; returns the version."""
    open_talks = [(p, j) for p, one in enumerate(prompts) for j in range(len(talks[p])) if turn < len(one.columns["between"])]
    for p, j in open_talks:
        talks[p][j] = _extended(talks[p][j], _turns_after(talks[p][j], prompts[p].columns["between"][turn]))
    ids = [[*prompts[p].tokens.tolist(), *talks[p][j].tokens.tolist()] for p, j in open_talks]
    names = [sequence_number(numbers[p], turn, j) for p, j in open_talks]
    sampled = later(ids, names)
    for (p, j), (one,) in zip(open_talks, sampled.completions, strict=True):
        talks[p][j] = _extended(talks[p][j], one.tokens.tolist(), f"\n{one.text}")
    return sampled.version


def _turns_after(completion: Completion, between: Sequence[int]) -> Sequence[int]:
    """What follows a reply: the end of its turn is left out where the policy wrote it."""
    return between[1:] if len(completion.tokens) and int(completion.tokens[-1]) == between[0] else between


def _extended(completion: Completion, ids: Sequence[int], text: str = "") -> Completion:
    """The completion with ids behind it that train nothing."""
    # Ids stay ids: the text of a sampled reply, encoded again, may be other tokens than those that the policy wrote.
    return completion._replace(
        tokens=np.concatenate([completion.tokens, np.array(ids, np.int32)]),
        logp=np.concatenate([completion.logp, np.full(len(ids), np.nan, np.float32)]),
        trained=np.concatenate([completion.trained, np.zeros(len(ids), bool)]),
        text=completion.text + text,
    )
