"""A trial of prompts and rewards without training: completions with their rewards, and what to print and write of them.

K reward functions.
"""

import time
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from treetune.core.data.prompts import Prompt
from treetune.core.rollout import stats
from treetune.core.rollout.group import Group, GroupScorer, PromptSampler, rewards_of

QUESTION = 300  # characters of a prompt to show, the last ones
CLIPPED = 0.8  # share of completions cut off at the length limit that calls for a longer one


class Trial(NamedTuple):
    """Scored groups, and the seconds that sampling and rewards took."""

    groups: list[Group]
    sampling_s: float
    rewards_s: float

    def speed(self) -> str:
        """How long it took."""
        tokens = sum(len(completion.tokens) for group in self.groups for completion in group.completions)
        rate = f"{tokens} tokens in {self.sampling_s:.1f} s ({tokens / self.sampling_s:.0f} tokens/s)"
        return f"{rate}, rewards in {self.rewards_s:.1f} s"


def run(sample: PromptSampler, policy: Any, prompts: Sequence[Prompt], score: GroupScorer) -> Trial:
    """Completions of each prompt, with their rewards."""
    start = time.perf_counter()
    completions = sample(policy, prompts, list(range(len(prompts)))).completions
    groups = [Group(prompt, i, tuple(row), 0) for i, (prompt, row) in enumerate(zip(prompts, completions, strict=True))]
    sampled = time.perf_counter()
    rewards = score(groups)
    scored = [group._replace(rewards=values) for group, values in zip(groups, rewards, strict=True)]
    return Trial(scored, sampled - start, time.perf_counter() - sampled)


def question(group: Group) -> str:
    """The end of the prompt, or of its last message."""
    text = group.prompt.messages[-1]["content"] if group.prompt.messages else group.prompt.text
    return text.strip()[-QUESTION:]


def best(group: Group, names: Sequence[str], weights: Sequence[float], count: int) -> list[str]:
    """The completions of the highest rewards as lines, each with what the K functions said."""
    rewards, lines = rewards_of(group), []
    totals = stats.combined(rewards, weights)
    for j in np.argsort(-np.nan_to_num(totals, nan=-np.inf))[:count].tolist():
        values = ", ".join(f"{name} {value:g}" for name, value in zip(names, rewards[j].tolist(), strict=True) if value == value)
        completion = group.completions[j]
        lines.append(f"[{values or 'no reward'}{'' if completion.stopped else ', cut off'}] {completion.text.strip()}")
    return lines


def records(group: Group, names: Sequence[str]) -> list[dict[str, Any]]:
    """What a file says of each completion; null for a reward that abstained."""
    rows = []
    for completion, values in zip(group.completions, rewards_of(group).tolist(), strict=True):
        rewards = {name: None if value != value else value for name, value in zip(names, values, strict=True)}
        record = {"prompt": group.prompt.text, "answer": completion.text, "rewards": rewards, "tokens": len(completion.tokens)}
        rows.append(record | {"stopped": completion.stopped, "row": group.prompt.row})
    return rows


def advice(metrics: Mapping[str, float]) -> list[str]:
    """What to change before a run, by the metrics of the groups."""
    lines = []
    if metrics["completions/clipped_ratio"] > CLIPPED:
        lines.append("most completions were cut off before they ended: raise --max-completion-length")
    if metrics["frac_reward_zero_std"] == 1:
        lines.append("every completion of a prompt has the same reward, so nothing could be learned: try other prompts or rewards")
    return lines
