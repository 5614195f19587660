"""What flows from a prompt to a gradient: completions of a prompt, their rewards and advantages. Plain data on the host.

G completions of a prompt, n tokens of a completion, K reward functions.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np

from treetune.core.data.prompts import Prompt


class Completion(NamedTuple):
    """One continuation of a prompt, as sampled: it is never decoded and encoded again."""

    tokens: np.ndarray  # int32 [n], the stop token included
    logp: np.ndarray  # float32 [n]: log q in nats at the sampling temperature; nan where the sampler could not tell
    trained: np.ndarray  # bool [n]: False for tokens that an environment wrote
    stopped: bool  # by a stop token, not cut at the length limit
    text: str  # what rewards see


class Sampled(NamedTuple):
    """Completions of each prompt, and the version of the policy that wrote them: the optimiser steps behind its weights."""

    completions: list[list[Completion]]
    version: int


class Group(NamedTuple):
    """A prompt with its completions. `number` counts the prompts drawn in a run and names the randomness of this draw.

    end: the text that ends a completion of a prompt that a chat template has made a text; reward models read it, unless it is empty.
    """

    prompt: Prompt
    number: int
    completions: tuple[Completion, ...]
    version: int
    rewards: np.ndarray | None = None  # float64 [G, K], nan: no opinion
    advantage: np.ndarray | None = None  # float64 [G]
    old_logp: tuple[np.ndarray, ...] | None = None  # the trainer's log-probs at sampling time, float32 [n] each
    end: str = ""


class PromptSampler(Protocol):
    """Completions of prompts; `numbers` name the randomness of each."""

    def __call__(self, policy: Any, prompts: Sequence[Prompt], numbers: Sequence[int], /) -> Sampled:
        """As many completions of each prompt, in the order of the prompts."""
        ...


class GroupScorer(Protocol):
    """Rewards of completions."""

    def __call__(self, groups: Sequence[Group], /) -> np.ndarray:
        """Float64 [P, G, K]; nan where a reward abstains."""
        ...


def rewards_of(group: Group) -> np.ndarray:
    """The rewards [G, K] of a group that was scored."""
    assert group.rewards is not None
    return group.rewards


def to_json(group: Group) -> dict:
    """The group as JSON values; float32 and float64 survive exactly, nan as NaN."""
    prompt = group.prompt._asdict() | {"tokens": group.prompt.tokens.tolist()}
    completions = [[one.tokens.tolist(), one.logp.tolist(), one.trained.tolist(), one.stopped, one.text] for one in group.completions]
    arrays = {name: None if (value := getattr(group, name)) is None else value.tolist() for name in ("rewards", "advantage")}
    old = None if group.old_logp is None else [one.tolist() for one in group.old_logp]
    return {"prompt": prompt, "number": group.number, "completions": completions, "version": group.version, "old_logp": old} | arrays


def from_json(data: dict) -> Group:
    """What `to_json` wrote."""
    prompt = Prompt(**data["prompt"] | {"tokens": np.array(data["prompt"]["tokens"], np.int32)})
    completions = tuple(
        Completion(np.array(tokens, np.int32), np.array(logp, np.float32), np.array(trained, bool), stopped, text)
        for tokens, logp, trained, stopped, text in data["completions"]
    )
    arrays = {name: None if data[name] is None else np.array(data[name], np.float64) for name in ("rewards", "advantage")}
    old = None if data["old_logp"] is None else tuple(np.array(one, np.float32) for one in data["old_logp"])
    return Group(prompt, data["number"], completions, data["version"], arrays["rewards"], arrays["advantage"], old)
