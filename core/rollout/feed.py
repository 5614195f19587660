"""From prompts to scored groups, one optimiser step at a time: draw, sample, score, replace what has no signal, deal to steps.

P prompts of a generation, G completions of each, K reward functions.

A generation is drawn (`prompt_order`), sampled, scored; groups without signal are dropped and refilled (dynamic sampling) or replaced by
stored ones (`replay`); old log-probs are computed with the policy of the moment; then it is dealt to `steps` optimiser steps,
`iterations` times over. Several ranks hold the same feed: each samples and scores its share of what is drawn for all. All that decides
what comes next is one immutable `FeedState`, exchanged for the next one only when a generation is complete: an error on the way leaves
the feed as it was, and `state` and `load` continue it exactly.
"""

import hashlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from treetune.core.data.prompts import Prompt
from treetune.core.rollout import feed_state, prefetch, prompt_order, rank_feeds, replay, stats
from treetune.core.rollout.feed_state import FeedState, IndexedGroup, Request
from treetune.core.rollout.group import Group, GroupScorer, PromptSampler, rewards_of

FAILED = 1e-6  # a prompt failed if every reward function gave this or less, in size, to every completion


class FeedSettings(NamedTuple):
    """What is sampled and how it is used. Numbers of prompts and groups are those of all ranks together, but for `chunk`."""

    prompts: int  # of one generation
    steps: int = 1  # optimiser steps made of one generation, each of its own prompts
    iterations: int = 1  # passes over a generation
    seed: int = 0
    epochs_shuffle: bool = True
    rank: int = 0  # which of `world` shares of the prompts is sampled here
    world: int = 1
    replay_size: int = 0  # groups that the replay buffer holds; 0: none
    reroll_from: int | None = None  # optimiser step from which failed prompts are sampled anew
    reroll_groups: int = 1  # of those in one generation, at most
    dynamic: bool = False  # drop groups without signal and sample others
    max_refills: int = 3  # rounds of that in one generation, at most
    chunk: int = 0  # prompts sampled at a time here, scored in a thread while the next are sampled; 0: all at once
    prefetch_depth: int = 0  # generations sampled ahead in a thread; 0: sample when needed, with the live policy


class Gathered(NamedTuple):
    """Groups for a generation: those sampled now, and of all at hand those with signal and those without; rounds of refills."""

    sampled: list[IndexedGroup]
    live: list[IndexedGroup]
    flat: list[IndexedGroup]
    refills: int


class FeedCalls(NamedTuple):
    """What a feed calls.

    sample: in a thread with prefetch_depth, where it is given snapshot(policy) (None without a snapshot) instead of the policy.
    advantage: rewards [P, G, K] -> [P, G], finite, 0 for what has no signal. Called on whole generations, however they are sampled, so
    that the statistics of a batch are never those of a part; and, with dynamic, on what each round sampled.
    old_logprobs: groups with `old_logp` of the policy given; called on each generation, so stored groups are recomputed with the rest.
    measure: metrics of the groups as they were sampled, before any is dropped or replaced (`stats.metrics`).
    gather: a value of this rank -> those of all ranks in their order, a collective. All other calls but sample, score and old_logprobs
    are given the groups of all ranks, and must give the same on each.
    """

    sample: PromptSampler
    score: GroupScorer
    advantage: Callable[[np.ndarray], np.ndarray]
    old_logprobs: Callable[[Any, list[Group]], list[Group]] | None = None
    measure: Callable[[Sequence[Group]], dict[str, float]] | None = None
    snapshot: Callable[[Any], Any] | None = None
    gather: Callable[[Any], list[Any]] = lambda value: [value]
    warn: Callable[[str], None] = print


class Feed:
    """Groups for optimiser steps. Owns background threads when prefetch_depth or chunk is set; call `close` when done.

    Errors: ValueError for no prompts and for settings that do not fit together.
    """

    def __init__(self, prompts: Sequence[Prompt], calls: FeedCalls, settings: FeedSettings):
        _check(prompts, settings)
        self._prompts, self._calls, self._settings = prompts, calls, settings
        self._order = prompt_order.PromptOrder(len(prompts), settings.seed, settings.epochs_shuffle)
        self._prefetched = prefetch.Prefetch(calls.sample) if settings.prefetch_depth else None
        self._scores = prefetch.Prefetch(calls.score) if settings.chunk else None
        self._state, self._warned = FeedState(), False
        if len(prompts) < settings.prompts:
            calls.warn(f"{len(prompts)} prompts for generations of {settings.prompts}: prompts come more than once in a generation")

    @property
    def epoch(self) -> int:
        """Whole passes over the prompts so far, prompts in flight included."""
        return int(self.progress)

    @property
    def progress(self) -> float:
        """Passes over the prompts so far, as a fraction."""
        return prompt_order.progress(self._state.stream, self._order)

    def next(self, policy: Any, step: int) -> tuple[list[Group], dict[str, float]]:
        """(groups of this optimiser step, metrics of their generation), of all ranks; samples a generation when none is left.

        step: optimiser steps behind `policy`. After an error, whatever raised it, the feed is as before, and `next` tries again.
        """
        state = self._state if self._state.batch else self._generation(policy, step)
        groups = [state.batch[i].group for i in _dealt(state, self._settings)]
        # Exchanged whole, after all that may fail: an error on the way leaves the feed as it was.
        is_last = state.part + 1 == self._settings.steps * self._settings.iterations
        self._state = state._replace(part=0, batch=(), metrics=()) if is_last else state._replace(part=state.part + 1)
        if self._prefetched:
            # Only now: after an error the next attempt asks the thread for the same results.
            self._prefetched.keep([part for request in self._state.flight for part in self._parts(request)])
        staleness = [step - group.version for group in groups]
        ages = {"rollout/staleness_mean": float(np.mean(staleness)), "rollout/staleness_max": float(max(staleness))}
        return groups, dict(state.metrics) | ages

    def state(self) -> dict:
        """What `load` continues from, as JSON values; nothing waits for a thread."""
        return {"of": self._identity()} | feed_state.to_json(self._state)

    def load(self, state: dict | list[dict]) -> None:
        """Continues from what `state` gave: prompts that were in flight are sampled again, first and under the same numbers.

        A list holds what earlier versions kept for each rank. Errors: ValueError for the state of other prompts or settings.
        """
        if isinstance(state, list):
            state = rank_feeds.merged(state, self._order)
        identity = self._identity()
        if differ := sorted(name for name in identity if state["of"].get(name) != identity[name]):
            raise ValueError(f"the rollout state was written with other values of {differ}: resume with those it had, or start anew")
        self._state = feed_state.from_json(state, self._prompts, replay_size=self._settings.replay_size)
        if self._prefetched:
            # What the thread has made is of another state, and a request of the loaded one may have the same key.
            self._prefetched.keep(())

    def close(self) -> None:
        """Ends the threads, without waiting for a call that one is in."""
        for thread in (self._prefetched, self._scores):
            if thread:
                thread.close()

    def _generation(self, policy: Any, step: int) -> FeedState:
        """The state with a new generation in it."""
        settings = self._settings
        gathered, state = self._gathered(policy, step)
        batch, overflow = _chosen(gathered.live, gathered.flat, settings.prompts)
        batch = self._advantaged(batch)
        final, replayed = self._replayed(batch, state)
        failed = [indexed.index for indexed in gathered.sampled if _failed(indexed.group)] if settings.reroll_from is not None else []
        state = state._replace(
            stream=prompt_order.with_failed(state.stream, failed),
            overflow=tuple(overflow),
            stored=replay.add(state.stored, [indexed for indexed in batch if _signal(indexed)], settings.replay_size),
            generation=state.generation + 1,
            # Of stored groups too: theirs were those of an older policy, and ratios compare with the one of now.
            batch=tuple(self._relogged(policy, final)),
        )
        counts = {
            "sampled": len(gathered.sampled),
            "refills": gathered.refills,
            "dropped": len(gathered.live) + len(gathered.flat) - len(batch) - len(overflow),
            "overflow": len(overflow),
            "replayed": replayed,
            "stored": len(state.stored),
            "failed_queue": len(state.stream.failed),
            "zero_advantage": sum(not _signal(indexed) for indexed in final),
        }
        measured = self._calls.measure([indexed.group for indexed in gathered.sampled or batch]) if self._calls.measure else {}
        return state._replace(metrics=(*measured.items(), *((f"rollout/{name}", float(value)) for name, value in counts.items())))

    def _gathered(self, policy: Any, step: int) -> tuple[Gathered, FeedState]:
        """The groups of a round and its refills, and the state after them."""
        settings, state, rounds = self._settings, self._state, 0
        sampled, live, flat = [], list(state.overflow), []
        most = settings.max_refills if settings.dynamic else 0
        while (lack := self._lack(live)) > 0 and rounds <= most:
            groups, state = self._round(policy, step, state, lack, first=rounds == 0, drawn=[group.index for group in live + flat])
            for group, is_live in zip(groups, self._live(groups), strict=True):
                (live if is_live else flat).append(group)
            sampled, rounds = sampled + groups, rounds + 1
        if lack and not self._warned:
            text = f"{lack} of {settings.prompts} groups have no signal after {rounds} rounds of sampling (said once)"
            self._calls.warn(f"step {step}: {text}")
            self._warned = True
        return Gathered(sampled, live, flat, max(rounds - 1, 0)), state

    def _round(
        self, policy: Any, step: int, state: FeedState, n: int, *, first: bool, drawn: list[int]
    ) -> tuple[list[IndexedGroup], FeedState]:
        """At least n more groups with rewards, in the order in which their prompts were drawn."""
        settings = self._settings
        due = settings.reroll_from is not None and step >= settings.reroll_from and (first or self._prefetched is not None)
        state = self._launched(policy, state, n, settings.reroll_groups if due else 0, drawn)
        ends = np.cumsum([len(request) for request in state.flight])
        taken = int(np.searchsorted(ends, n)) + 1
        requests, state = state.flight[:taken], state._replace(flight=state.flight[taken:])
        try:
            waiting = [self._scored(part, self._sampled(policy, part)) for request in requests for part in self._parts(request)]
            own = [group._replace(prompt=None) for groups in waiting for group in groups()]
        finally:
            # The next attempt samples other groups under the same request, which must not get the rewards of this one.
            if self._scores:
                self._scores.keep(())
        # Of a group that several ranks have sampled, the one of the first counts.
        by_number = {group.number: group for groups in reversed(self._calls.gather(own)) for group in groups}
        draws = [draw for request in requests for draw in request]
        return [IndexedGroup(draw.index, by_number[draw.number]._replace(prompt=self._prompts[draw.index])) for draw in draws], state

    def _launched(self, policy: Any, state: FeedState, n: int, again: int, drawn: list[int]) -> FeedState:
        """The state with n prompts in flight, or with a generation and those ahead of it, handed to the thread."""
        settings = self._settings
        enough = settings.prompts * (settings.prefetch_depth + 1) if self._prefetched else n
        while (flying := sum(map(len, state.flight))) < enough:
            avoid = drawn + [draw.index for request in state.flight for draw in request]
            size = settings.prompts if self._prefetched else n - flying
            draws, stream = prompt_order.draw(state.stream, self._order, size, again=again, avoid=avoid if settings.dynamic else ())
            state = state._replace(stream=stream, flight=(*state.flight, draws))
        parts = [part for request in state.flight for part in self._parts(request)] if self._prefetched else []
        if self._prefetched and (new := [part for part in parts if part not in self._prefetched]):
            # A copy, one for all requests: the optimiser changes the live weights while the thread samples.
            copy = self._calls.snapshot(policy) if self._calls.snapshot else None
            for part in new:
                self._prefetched.put(part, copy, *self._asked(part))
        return state

    def _parts(self, request: Request) -> list[Request]:
        """What this rank samples of a request, a chunk at a time.

        All ranks sample equally often, because that may be a collective: one without a prompt samples the first of the request, too.
        """
        rank, world = self._settings.rank, self._settings.world
        own = request[rank::world]
        own += request[:1] * (-(-len(request) // world) - len(own))
        size = self._settings.chunk or len(own)
        return [own[i : i + size] for i in range(0, len(own), size)]

    def _asked(self, request: Request) -> tuple[list[Prompt], list[int]]:
        return [self._prompts[draw.index] for draw in request], [draw.number for draw in request]

    def _sampled(self, policy: Any, request: Request) -> list[Group]:
        prompts, numbers = self._asked(request)
        sampled = self._prefetched.get(request) if self._prefetched else self._calls.sample(policy, prompts, numbers)
        sizes = {len(completions) for completions in sampled.completions}
        if len(sampled.completions) != len(request) or len(sizes) != 1 or 0 in sizes:
            raise ValueError(
                f"the sampler gave {[len(group) for group in sampled.completions]} completions for {len(request)} prompts: "
                "expected a list for each prompt, all of one length"
            )
        rows = zip(prompts, numbers, sampled.completions, strict=True)
        groups = [Group(prompt, number, tuple(completions), sampled.version) for prompt, number, completions in rows]
        for group in groups:
            _check_completions(group)
        return groups

    def _scored(self, request: Request, groups: list[Group]) -> Callable[[], list[Group]]:
        """The groups with rewards, when called; with chunks they are being scored meanwhile."""
        if (scores := self._scores) is not None:
            scores.put(request, groups)
            return lambda: _rewarded(groups, scores.get(request))
        scored = _rewarded(groups, self._calls.score(groups))
        return lambda: scored

    def _lack(self, live: list[IndexedGroup]) -> int:
        """Prompts that a generation lacks; one that comes twice counts once, unless there are too few prompts for that."""
        settings = self._settings
        have = len({group.index for group in live}) if settings.dynamic and len(self._prompts) >= settings.prompts else len(live)
        return max(settings.prompts - have, 0)

    def _live(self, groups: list[IndexedGroup]) -> list[bool]:
        return [_signal(group) for group in self._advantaged(groups)] if self._settings.dynamic else [True] * len(groups)

    def _advantaged(self, groups: list[IndexedGroup]) -> list[IndexedGroup]:
        rewards = np.stack([rewards_of(indexed.group) for indexed in groups])  # [P, G, K]
        values = np.asarray(self._calls.advantage(rewards), np.float64)
        if values.shape != rewards.shape[:2] or not np.isfinite(values).all():
            raise ValueError(f"advantages {values.shape} of rewards {rewards.shape}: expected a finite number for each completion")
        return [IndexedGroup(indexed.index, indexed.group._replace(advantage=value)) for indexed, value in zip(groups, values, strict=True)]

    def _replayed(self, batch: list[IndexedGroup], state: FeedState) -> tuple[list[IndexedGroup], int]:
        """The batch with stored groups in place of those without signal, and their number."""
        empty = [i for i, indexed in enumerate(batch) if not _signal(indexed)]
        replacements, out = replay.draw(state.stored, len(empty), self._settings.seed, feed_state.KEY, state.generation), list(batch)
        for i, indexed in zip(empty, replacements, strict=False):
            out[i] = IndexedGroup(indexed.index, indexed.group)
        return out, len(replacements)

    def _relogged(self, policy: Any, batch: list[IndexedGroup]) -> list[IndexedGroup]:
        if self._calls.old_logprobs is None:
            return batch
        rank, world = self._settings.rank, self._settings.world
        own = self._calls.old_logprobs(policy, [indexed.group for indexed in batch[rank::world]])
        parts = self._calls.gather([group.old_logp for group in own])
        return [
            IndexedGroup(indexed.index, indexed.group._replace(old_logp=parts[i % world][i // world])) for i, indexed in enumerate(batch)
        ]

    def _identity(self) -> dict:
        settings, text = self._settings, hashlib.sha256()
        for prompt in self._prompts:
            text.update(np.int64(len(prompt.tokens)).tobytes() + prompt.tokens.astype(np.int32).tobytes())
        names = ("prompts", "steps", "iterations", "seed", "epochs_shuffle")
        return {name: getattr(settings, name) for name in names} | {"data": text.hexdigest()[:16]}


def _dealt(state: FeedState, settings: FeedSettings) -> list[int]:
    """Which groups of the generation this step trains on: each pass deals all of them, in an order of its own."""
    passed, piece = divmod(state.part, settings.steps)
    # A function of numbers of the state alone: a run resumed in the middle of a generation deals what is left of it.
    mixed = feed_state.mixed(len(state.batch), settings.seed, state.generation, passed)
    size = settings.prompts // settings.steps
    return mixed[piece * size : (piece + 1) * size]


def _chosen(live: list[IndexedGroup], flat: list[IndexedGroup], n: int) -> tuple[list[IndexedGroup], list[IndexedGroup]]:
    """(n groups, groups with signal left over): those with signal first, and no prompt twice as long as there are others."""
    seen, once, more = set(), [], []
    for indexed in live + flat:
        (more if indexed.index in seen else once).append(indexed)
        seen.add(indexed.index)
    batch = (once + more)[:n]
    taken = {indexed.group.number for indexed in batch}
    return batch, [indexed for indexed in live if indexed.group.number not in taken]


def _signal(indexed: IndexedGroup) -> bool:
    return bool(np.any(indexed.group.advantage))


def _failed(group: Group) -> bool:
    """Whether every function gave every completion 0, abstentions left out; not where all functions abstain."""
    opinions = [column[~np.isnan(column)] for column in rewards_of(group).T]
    return any(values.size for values in opinions) and all(stats.flat(values) and np.all(np.abs(values) < FAILED) for values in opinions)


def _rewarded(groups: list[Group], rewards: np.ndarray) -> list[Group]:
    rewards, expected = np.asarray(rewards, np.float64), (len(groups), len(groups[0].completions))
    if rewards.ndim != 3 or rewards.shape[:2] != expected or rewards.shape[2] < 1:
        raise ValueError(f"the score gave rewards {rewards.shape}: expected {expected} and the number of reward functions")
    return [group._replace(rewards=row) for group, row in zip(groups, rewards, strict=True)]


def _check_completions(group: Group) -> None:
    for completion in group.completions:
        sizes = {len(completion.tokens), len(completion.logp), len(completion.trained)}
        if len(sizes) != 1:
            raise ValueError(
                f"the sampler gave a completion of {len(completion.tokens)} tokens with {len(completion.logp)} log-probs and "
                f"{len(completion.trained)} marks of what is trained, for the prompt of row {group.prompt.row}: expected as many"
            )


def _check(prompts: Sequence[Prompt], settings: FeedSettings) -> None:
    if not len(prompts):
        raise ValueError("there are 0 prompts: expected at least one to sample from")
    least = {"prompts": 1, "steps": 1, "iterations": 1, "world": 1, "rank": 0, "replay_size": 0, "reroll_groups": 0, "max_refills": 0}
    for name, low in (least | {"chunk": 0, "prefetch_depth": 0}).items():
        if getattr(settings, name) < low:
            raise ValueError(f"{name} is {getattr(settings, name)}: expected at least {low}")
    if settings.prompts % settings.steps:
        raise ValueError(f"a generation of {settings.prompts} prompts in {settings.steps} steps: expected a multiple of the steps")
    if settings.rank >= settings.world:
        raise ValueError(f"rank is {settings.rank} of {settings.world}: expected less than the number of ranks")
    if settings.prompts % settings.world:
        raise ValueError(f"a generation of {settings.prompts} prompts on {settings.world} ranks: expected a multiple of the ranks")
