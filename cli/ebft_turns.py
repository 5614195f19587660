"""How structured energy-based fine-tuning samples: at most as long as the truth suggests, and on through the turns of a conversation.

P prompts, n completions of each. A conversation's first reply is the policy's own and trains; the turns after it are laid behind it as
they are in the row, each later reply sampled anew, so that the features see what the first reply led to.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from treetune.cli import custom_rollout, ebft_data
from treetune.cli.options.rollout import RolloutOptions
from treetune.cli.rollouts import Draw
from treetune.core.data.prompts import Prompt
from treetune.core.rollout.group import Completion, Sampled, Sampler

LEAST = 64  # tokens that a reply may always have, unless max_completion_length is below


def room(truths: Sequence[int], *, multiplier: float, cap: int) -> int:
    """min(cap, max(64, floor(multiplier * c) of the longest truth c)): tokens of a reply, of the tokens of the true ones."""
    return min(cap, max([LEAST, *(int(multiplier * count) for count in truths)]))


def adaptive(wrap: Callable[..., Sampler], multiplier: float) -> Callable[..., Sampler]:
    """`wrap`, whose samplers take max_completion_length from the true replies of each call."""

    def wrapped(draw: Draw, options: RolloutOptions, *, n: int) -> Sampler:
        def sample(policy: Any, asked: Sequence[Prompt], numbers: Sequence[int]) -> Sampled:
            found = room([ebft_data.first_reply(one) for one in asked], multiplier=multiplier, cap=options.max_completion_length)
            short = dataclasses.replace(options, max_completion_length=found)
            return wrap(draw, short, n=n)(policy, asked, numbers)

        return sample

    return wrapped


def turns(wrap: Callable[..., Sampler], later: int) -> Callable[..., Sampler]:
    """`wrap`, whose completions go on through the turns of their prompts' rows; later: longest later reply, in tokens."""

    def wrapped(draw: Draw, options: RolloutOptions, *, n: int) -> Sampler:
        first = wrap(draw, options, n=n)

        def sample(policy: Any, asked: Sequence[Prompt], numbers: Sequence[int]) -> Sampled:
            made = first(policy, asked, numbers)
            talks, versions = [list(group) for group in made.completions], [made.version]
            for turn in range(max(len(one.columns["between"]) for one in asked)):
                versions.append(_reply(draw, policy, asked, numbers, talks, turn, later))
            return Sampled(talks, min(versions))

        return sample

    return wrapped


def _reply(draw: Draw, policy: Any, asked: Sequence[Prompt], numbers: Sequence[int], talks: list, turn: int, later: int) -> int:
    """Lays the turns before the reply number `turn` and that reply behind every completion whose own row has it; the version."""
    going = [(p, j) for p, one in enumerate(asked) for j in range(len(talks[p])) if turn < len(one.columns["between"])]
    for p, j in going:
        talks[p][j] = _grown(talks[p][j], _after(talks[p][j], asked[p].columns["between"][turn]))
    ids = [[*asked[p].tokens.tolist(), *talks[p][j].tokens.tolist()] for p, j in going]
    names = [custom_rollout.sequence_name(numbers[p], turn, j) for p, j in going]
    drawn = draw(policy, ids, names, n=1, max_tokens=later)
    for (p, j), (one,) in zip(going, drawn.completions, strict=True):
        talks[p][j] = _grown(talks[p][j], one.tokens.tolist(), f"\n{one.text}")
    return drawn.version


def _after(one: Completion, between: Sequence[int]) -> Sequence[int]:
    """What follows a reply: the end of its turn is left out where the policy wrote it."""
    return between[1:] if len(one.tokens) and int(one.tokens[-1]) == between[0] else between


def _grown(one: Completion, ids: Sequence[int], text: str = "") -> Completion:
    """The completion with ids behind it that train nothing."""
    return one._replace(
        tokens=np.concatenate([one.tokens, np.array(ids, np.int32)]),
        logp=np.concatenate([one.logp, np.full(len(ids), np.nan, np.float32)]),
        trained=np.concatenate([one.trained, np.zeros(len(ids), bool)]),
        text=one.text + text,
    )
