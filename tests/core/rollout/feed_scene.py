"""Stand-ins for what a feed is given. Everything they make is a function of (policy, number), so streams can be compared bit by bit."""

import hashlib
import json
import threading
import time

import numpy as np

from treetune.core.data.prompts import Prompt
from treetune.core.rollout import feed, group

G = 4
ALL = {"replay_size": 3, "reroll_from": 2, "reroll_groups": 2, "dynamic": True, "max_refills": 2}


def prompts(n: int) -> list[Prompt]:
    return [Prompt(np.array([i, i + 1], np.int32), f"p{i}", None, {"answer": str(i)}, i) for i in range(n)]


def completion(rng: np.random.Generator) -> group.Completion:
    n = int(rng.integers(1, 7))
    logp = -rng.random(n).astype(np.float32)
    logp[rng.random(n) < 0.2] = np.nan
    tokens = rng.integers(0, 50, n).astype(np.int32)
    return group.Completion(tokens, logp, rng.random(n) < 0.8, bool(rng.random() < 0.7), " ".join(map(str, tokens)))


def sample(policy, given, numbers) -> group.Sampled:
    """The policy is its version; None (no snapshot) is version 0."""
    rngs = [np.random.default_rng([policy or 0, number]) for number in numbers]
    return group.Sampled([[completion(rng) for _ in range(G)] for rng in rngs], policy or 0)


def score(groups) -> np.ndarray:
    """[P, G, 2]: rows 0 mod 4 fail before version 5, rows 1 mod 4 are solved, the others vary and sometimes are not known."""
    return np.stack([_rewards(one) for one in groups])


def _rewards(one: group.Group) -> np.ndarray:
    kind = one.prompt.row % 4
    if kind == 1 or (kind == 0 and one.version < 5):
        return np.full((G, 2), float(kind))
    rows = [[float(c.tokens.sum() % 2), np.nan if len(c.tokens) == 6 else len(c.tokens) / 3] for c in one.completions]
    return np.array(rows)


def advantage(rewards: np.ndarray) -> np.ndarray:
    """Group mean removed from the sum of the functions; 0 for flat groups."""
    total = np.nansum(rewards, -1)
    flat = total.max(1, keepdims=True) == total.min(1, keepdims=True)
    return np.where(flat, 0.0, total - total.mean(1, keepdims=True))


def batch_scaled(rewards: np.ndarray) -> np.ndarray:
    """Group mean removed, divided by the deviation of the whole batch."""
    total = rewards.sum(-1)
    return (total - total.mean(1, keepdims=True)) / (total.std(ddof=1) + 1e-4)


def relogp(policy, groups) -> list[group.Group]:
    """Tells which policy was asked: policy + 0.5 for every token."""
    return [one._replace(old_logp=tuple(np.full(len(c.tokens), policy + 0.5, np.float32) for c in one.completions)) for one in groups]


def make(n: int, *, sampler=sample, scorer=score, advantages=advantage, relogged=relogp, say=lambda text: None, more=None, **options):
    calls = feed.FeedCalls(sampler, scorer, advantages, relogged, warn=say)._replace(**more or {})
    return feed.Feed(prompts(n), calls, feed.FeedSettings(**options))


def on_ranks(world: int, run) -> list:
    """run(rank, gather) of each rank in a thread of its own; gather(value) -> the values of all."""
    barrier, values, results = threading.Barrier(world, timeout=20), [None] * world, [None] * world

    def work(rank: int) -> None:
        def gather(value):
            values[rank] = value
            barrier.wait()
            found = list(values)
            barrier.wait()
            return found

        try:
            results[rank] = run(rank, gather)
        except BaseException:
            barrier.abort()
            raise

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(world)]
    for one in threads:
        one.start()
    for one in threads:
        one.join()
    return results


def line(result) -> str:
    """Everything about the groups and the metrics of a step, floats to the last bit."""
    groups, metrics = result
    return json.dumps([[group.to_json(one) for one in groups], metrics])


def fingerprint(one: group.Group) -> str:
    """Of the tokens of a group alone."""
    return hashlib.sha256(b"|".join(c.tokens.tobytes() for c in one.completions)).hexdigest()


def wait(condition, seconds: float = 5.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not come to pass"
        time.sleep(0.002)


class Recorder:
    """A sampler that remembers what it was asked and what it wrote."""

    def __init__(self, broken=()):
        self.rows, self.numbers, self.made, self.broken, self.calls = [], [], {}, set(broken), 0

    def __call__(self, policy, prompts, numbers):
        self.calls += 1
        if self.calls in self.broken:
            raise ConnectionError(f"call {self.calls}")
        found = sample(policy, prompts, numbers)
        self.rows.append([one.row for one in prompts])
        self.numbers += numbers
        for prompt, number, completions in zip(prompts, numbers, found.completions, strict=True):
            self.made[number] = fingerprint(group.Group(prompt, number, tuple(completions), 0))
        return found
