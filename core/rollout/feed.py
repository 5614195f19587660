"""From prompts to scored groups, one optimiser step at a time: draw, sample, score, replace what has no signal, deal to steps.

P prompts of a generation on this rank, G completions of each, K reward functions.

A generation is drawn (`prompt_order`), sampled, scored; groups without signal are dropped and refilled (dynamic sampling) or replaced by
stored ones (`replay`); old log-probs are computed with the policy of the moment; then it is dealt to `steps` optimiser steps,
`iterations` times over. All that decides what comes next is one immutable `State`, exchanged for the next one only when a generation
is complete: an error on the way leaves the feed as it was, and `state` and `load` continue it exactly.
"""

import hashlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from treetune.core.data import order
from treetune.core.data.prompts import Prompt
from treetune.core.rollout import group, prefetch, prompt_order, replay, stats
from treetune.core.rollout.group import Group, GroupScorer, PromptSampler

PARTS = 12  # purpose of the shuffle that deals a generation to its steps, beside those of `core.data.order`
FAILED = 1e-6  # a prompt failed if every reward function gave this or less, in size, to every completion


class Options(NamedTuple):
    """What is sampled and how it is used. Numbers of prompts are those of one rank."""

    prompts: int  # of one generation
    steps: int = 1  # optimiser steps made of one generation, each of its own prompts
    iterations: int = 1  # passes over a generation
    seed: int = 0
    epochs_shuffle: bool = True
    rank: int = 0
    world: int = 1
    replay_size: int = 0  # groups that the replay buffer holds; 0: none
    reroll_from: int | None = None  # optimiser step from which failed prompts are sampled anew
    reroll_groups: int = 1  # of those in one generation, at most
    dynamic: bool = False  # drop groups without signal and sample others
    max_refills: int = 3  # rounds of that in one generation, at most
    chunk: int = 0  # prompts sampled at a time, scored in a thread while the next are sampled; 0: all at once
    prefetch_depth: int = 0  # generations sampled ahead in a thread; 0: sample when needed, with the live policy


class Ready(NamedTuple):
    """A scored group, and the index of its prompt."""

    index: int
    group: Group


Request = tuple[prompt_order.PromptDraw, ...]  # prompts that go to the sampler together


class State(NamedTuple):
    """All that decides what comes next."""

    stream: prompt_order.PromptCursor = prompt_order.PromptCursor()
    flight: tuple[Request, ...] = ()  # prompts drawn and handed to the thread, in order
    overflow: tuple[Ready, ...] = ()  # groups with signal that no generation had room for yet
    stored: tuple[replay.Stored, ...] = ()
    generation: int = 0  # generations made
    part: int = 0  # of the generation: steps given
    batch: tuple[Ready, ...] = ()  # the generation, as long as steps of it are to come
    metrics: tuple[tuple[str, float], ...] = ()


class Feed:
    """Groups for optimiser steps. It has a lifetime: threads where something is sampled or scored ahead, ended by `close`.

    sample: in a thread with prefetch_depth, where it is given snapshot(policy) (None without a snapshot) instead of the policy.
    advantage: rewards [P, G, K] -> [P, G], finite, 0 for what has no signal. Called on whole generations, however they are sampled, so
    that the statistics of a batch are never those of a part; and, with dynamic, on what each round sampled.
    relogp: groups with `old_logp` of the policy given; called on each generation, so stored groups are recomputed with the rest.
    measure: metrics of the groups as they were sampled, before any is dropped or replaced (`stats.metrics`).
    together: the maximum of a number over ranks. Needed with several ranks where sampling, scoring or advantage is a collective and
    dynamic is on, since ranks must then sample equally often.
    Errors: ValueError for no prompts and for options that do not fit together.
    """

    def __init__(
        self,
        prompts: Sequence[Prompt],
        sample: PromptSampler,
        score: GroupScorer,
        advantage: Callable[[np.ndarray], np.ndarray],
        options: Options,
        *,
        relogp: Callable[[Any, list[Group]], list[Group]] | None = None,
        measure: Callable[[Sequence[Group]], dict[str, float]] | None = None,
        snapshot: Callable[[Any], Any] | None = None,
        together: Callable[[int], int] = int,
        say: Callable[[str], None] = print,
    ):
        _check(prompts, options)
        self._prompts, self._options, self._sample, self._score, self._advantage = prompts, options, sample, score, advantage
        self._relogp, self._measure, self._snapshot, self._together, self._say = relogp, measure, snapshot, together, say
        self._order = prompt_order.PromptOrder(len(prompts), options.seed, options.epochs_shuffle, options.rank, options.world)
        self._ahead = prefetch.Prefetch(sample) if options.prefetch_depth else None
        self._scores = prefetch.Prefetch(score) if options.chunk else None
        self._at, self._warned = State(), False
        if len(prompts) < options.prompts:
            say(f"{len(prompts)} prompts for generations of {options.prompts}: prompts come more than once in a generation")

    @property
    def epoch(self) -> int:
        """Whole passes over the prompts so far, prompts in flight included."""
        return int(self.progress)

    @property
    def progress(self) -> float:
        """Passes over the prompts so far, as a fraction."""
        return prompt_order.progress(self._at.stream, self._order)

    def next(self, policy: Any, step: int) -> tuple[list[Group], dict[str, float]]:
        """(groups of this optimiser step, metrics of their generation); samples a generation when none is left.

        step: optimiser steps behind `policy`. After an error, whatever raised it, the feed is as before, and `next` tries again.
        """
        at = self._at if self._at.batch else self._generation(policy, step)
        chosen = [at.batch[i].group for i in _dealt(at, self._options)]
        done = at.part + 1 == self._options.steps * self._options.iterations
        self._at = at._replace(part=0, batch=(), metrics=()) if done else at._replace(part=at.part + 1)
        if self._ahead:
            self._ahead.keep(self._at.flight)
        stale = [step - one.version for one in chosen]
        return chosen, dict(at.metrics) | {"rollout/staleness_mean": float(np.mean(stale)), "rollout/staleness_max": float(max(stale))}

    def state(self) -> dict:
        """What `load` continues from, as JSON values. Prompts are named by their index; nothing waits for a thread."""
        at = self._at
        ready = {name: [[one.index, _pack(one.group)] for one in getattr(at, name)] for name in ("overflow", "batch")}
        stored = [[one.score, one.number, one.index, _pack(one.group)] for one in at.stored]
        plain = {
            "generation": at.generation,
            "part": at.part,
            "metrics": dict(at.metrics),
            "flight": [list(map(list, r)) for r in at.flight],
        }
        return {"of": self._identity(), "stream": at.stream._asdict(), "stored": stored} | ready | plain

    def load(self, state: dict) -> None:
        """Continues from what `state` gave: prompts that were in flight are sampled again, first and under the same numbers.

        Errors: ValueError for the state of other prompts or options.
        """
        if state["of"] != (mine := self._identity()):
            differ = sorted(name for name in mine if state["of"].get(name) != mine[name])
            raise ValueError(f"the rollout state was written with other values of {differ}: resume with those it had, or start anew")
        ready = {name: tuple(Ready(i, self._unpack(i, one)) for i, one in state[name]) for name in ("overflow", "batch")}
        every = [replay.Stored(score, number, i, self._unpack(i, one)) for score, number, i, one in state["stored"]]
        stored = replay.best(every, self._options.replay_size)
        flight = tuple(tuple(prompt_order.PromptDraw(*one) for one in request) for request in state["flight"])
        stream = state["stream"] | {name: tuple(state["stream"][name]) for name in ("deferred", "failed")}
        numbers = {"generation": state["generation"], "part": state["part"], "metrics": tuple(state["metrics"].items())}
        self._at = State(prompt_order.PromptCursor(**stream), flight, stored=stored, **ready, **numbers)
        if self._ahead:
            self._ahead.keep(())

    def close(self) -> None:
        """Ends the threads, without waiting for a call that one is in."""
        for one in (self._ahead, self._scores):
            if one:
                one.close()

    def _generation(self, policy: Any, step: int) -> State:
        """The state with a new generation in it."""
        o = self._options
        sampled, kept, flat, counts, at = self._gathered(policy, step)
        batch, overflow = _chosen(kept, flat, o.prompts)
        batch = self._advantaged(batch)
        final, replayed = self._replayed(batch, at)
        failed = [one.index for one in sampled if _failed(one.group.rewards)] if o.reroll_from is not None else []
        at = at._replace(
            stream=prompt_order.with_failed(at.stream, failed),
            overflow=tuple(overflow),
            stored=replay.add(at.stored, [one for one in batch if _signal(one)], o.replay_size),
            generation=at.generation + 1,
            batch=tuple(self._relogged(policy, final)),
        )
        counts |= {"dropped": len(kept) + len(flat) - len(batch) - len(overflow), "overflow": len(overflow), "replayed": replayed}
        counts |= {
            "stored": len(at.stored),
            "failed_queue": len(at.stream.failed),
            "zero_advantage": sum(not _signal(one) for one in final),
        }
        shown = self._measure([one.group for one in sampled or batch]) if self._measure else {}
        return at._replace(metrics=(*shown.items(), *((f"rollout/{name}", float(value)) for name, value in counts.items())))

    def _gathered(self, policy: Any, step: int) -> tuple[list[Ready], list[Ready], list[Ready], dict[str, int], State]:
        """(groups sampled now, groups for this generation, groups without signal, counts, the state after): a round, and refills."""
        o, at, rounds = self._options, self._at, 0
        sampled, kept, flat = [], list(at.overflow), []
        while (lack := self._together(self._lack(kept))) > 0 and rounds <= (o.max_refills if o.dynamic else 0):
            ready, at = self._round(policy, step, at, lack, first=rounds == 0, used=[one.index for one in kept + flat])
            for one, live in zip(ready, self._live(ready), strict=True):
                (kept if live else flat).append(one)
            sampled, rounds = sampled + ready, rounds + 1
        if lack and not self._warned:
            self._say(f"step {step}: {lack} of {o.prompts} groups have no signal after {rounds} rounds of sampling (said once)")
            self._warned = True
        return sampled, kept, flat, {"sampled": len(sampled), "refills": max(rounds - 1, 0)}, at

    def _round(self, policy: Any, step: int, at: State, n: int, *, first: bool, used: list[int]) -> tuple[list[Ready], State]:
        """At least n more groups with rewards, in the order in which their prompts were drawn."""
        o = self._options
        due = o.reroll_from is not None and step >= o.reroll_from and (first or self._ahead is not None)
        at = self._launched(policy, at, n, o.reroll_groups if due else 0, used)
        ends = np.cumsum([len(request) for request in at.flight])
        taken = int(np.searchsorted(ends, n)) + 1
        requests, at = at.flight[:taken], at._replace(flight=at.flight[taken:])
        try:
            waiting = [(request, self._scored(request, self._sampled(policy, request))) for request in requests]
            done = [(request, groups()) for request, groups in waiting]
        finally:  # what was scored of an attempt that failed is not for the groups of the next one
            if self._scores:
                self._scores.keep(())
        return [Ready(draw.index, one) for request, groups in done for draw, one in zip(request, groups, strict=True)], at

    def _launched(self, policy: Any, at: State, n: int, again: int, used: list[int]) -> State:
        """The state with n prompts in flight, or with a generation and those ahead of it, handed to the thread."""
        o = self._options
        enough = o.prompts * (o.prefetch_depth + 1) if self._ahead else n
        while (flying := sum(map(len, at.flight))) < enough:
            avoid = used + [draw.index for request in at.flight for draw in request]
            size = o.prompts if self._ahead else n - flying
            draws, stream = prompt_order.draw(at.stream, self._order, size, again=again, avoid=avoid if o.dynamic else ())
            at = at._replace(stream=stream, flight=at.flight + self._split(draws))
        new = [request for request in at.flight if request not in self._ahead] if self._ahead else []
        seen = self._snapshot(policy) if new and self._snapshot else None
        for request in new:
            self._ahead.put(request, seen, *self._asked(request))
        return at

    def _split(self, draws: Request) -> tuple[Request, ...]:
        size = self._options.chunk or len(draws)
        return tuple(draws[i : i + size] for i in range(0, len(draws), size))

    def _asked(self, request: Request) -> tuple[list[Prompt], list[int]]:
        return [self._prompts[draw.index] for draw in request], [draw.number for draw in request]

    def _sampled(self, policy: Any, request: Request) -> list[Group]:
        prompts, numbers = self._asked(request)
        found = self._ahead.get(request) if self._ahead else self._sample(policy, prompts, numbers)
        sizes = {len(completions) for completions in found.completions}
        if len(found.completions) != len(request) or len(sizes) != 1 or 0 in sizes:
            raise ValueError(
                f"the sampler gave {[len(one) for one in found.completions]} completions for {len(request)} prompts: "
                "expected a list for each prompt, all of one length"
            )
        rows = zip(prompts, numbers, found.completions, strict=True)
        groups = [Group(prompt, number, tuple(completions), found.version) for prompt, number, completions in rows]
        for one in groups:
            _check_completions(one)
        return groups

    def _scored(self, request: Request, groups: list[Group]) -> Callable[[], list[Group]]:
        """The groups with rewards, when called; with chunks they are being scored meanwhile."""
        if self._scores:
            self._scores.put(request, groups)
            return lambda: _rewarded(groups, self._scores.get(request))
        done = _rewarded(groups, self._score(groups))
        return lambda: done

    def _lack(self, kept: list[Ready]) -> int:
        """Prompts that a generation lacks; one that comes twice counts once, unless there are too few prompts for that."""
        o = self._options
        have = len({one.index for one in kept}) if o.dynamic and len(self._prompts) >= o.prompts else len(kept)
        return max(o.prompts - have, 0)

    def _live(self, ready: list[Ready]) -> list[bool]:
        return [_signal(one) for one in self._advantaged(ready)] if self._options.dynamic else [True] * len(ready)

    def _advantaged(self, ready: list[Ready]) -> list[Ready]:
        rewards = np.stack([one.group.rewards for one in ready])  # [P, G, K]
        values = np.asarray(self._advantage(rewards), np.float64)
        if values.shape != rewards.shape[:2] or not np.isfinite(values).all():
            raise ValueError(f"advantages {values.shape} of rewards {rewards.shape}: expected a finite number for each completion")
        return [Ready(one.index, one.group._replace(advantage=value)) for one, value in zip(ready, values, strict=True)]

    def _replayed(self, batch: list[Ready], at: State) -> tuple[list[Ready], int]:
        """The batch with stored groups in place of those without signal, and their number."""
        empty = [i for i, one in enumerate(batch) if not _signal(one)]
        found, out = replay.draw(at.stored, len(empty), self._options.seed, self._options.rank, at.generation), list(batch)
        for i, one in zip(empty, found, strict=False):
            out[i] = Ready(one.index, one.group)
        return out, len(found)

    def _relogged(self, policy: Any, batch: list[Ready]) -> list[Ready]:
        if self._relogp is None:
            return batch
        groups = self._relogp(policy, [one.group for one in batch])
        return [Ready(one.index, new) for one, new in zip(batch, groups, strict=True)]

    def _identity(self) -> dict:
        o, text = self._options, hashlib.sha256()
        for prompt in self._prompts:
            text.update(np.int64(len(prompt.tokens)).tobytes() + prompt.tokens.astype(np.int32).tobytes())
        names = ("prompts", "steps", "iterations", "seed", "epochs_shuffle", "rank", "world")
        return {name: getattr(o, name) for name in names} | {"data": text.hexdigest()[:16]}

    def _unpack(self, index: int, data: dict) -> Group:
        prompt = self._prompts[index]
        return group.from_json(data | {"prompt": prompt._asdict()})._replace(prompt=prompt)


def _dealt(at: State, options: Options) -> list[int]:
    """Which groups of the generation this step trains on: each pass deals all of them, in an order of its own."""
    passed, piece = divmod(at.part, options.steps)
    mixed = order.permutation(len(at.batch), options.seed, options.rank, at.generation, passed, PARTS)
    size = options.prompts // options.steps
    return mixed[piece * size : (piece + 1) * size]


def _chosen(kept: list[Ready], flat: list[Ready], n: int) -> tuple[list[Ready], list[Ready]]:
    """(n groups, groups with signal left over): those with signal first, and no prompt twice as long as there are others."""
    seen, once, more = set(), [], []
    for one in kept + flat:
        (more if one.index in seen else once).append(one)
        seen.add(one.index)
    batch = (once + more)[:n]
    taken = {one.group.number for one in batch}
    return batch, [one for one in kept if one.group.number not in taken]


def _signal(one: Ready) -> bool:
    return bool(np.any(one.group.advantage))


def _failed(rewards: np.ndarray) -> bool:
    """Whether every function gave every completion 0, opinions withheld left out; not where no function has an opinion."""
    said = [column[~np.isnan(column)] for column in rewards.T]
    return any(one.size for one in said) and all(stats.flat(one) and np.all(np.abs(one) < FAILED) for one in said)


def _rewarded(groups: list[Group], rewards: np.ndarray) -> list[Group]:
    rewards, expected = np.asarray(rewards, np.float64), (len(groups), len(groups[0].completions))
    if rewards.ndim != 3 or rewards.shape[:2] != expected or rewards.shape[2] < 1:
        raise ValueError(f"the score gave rewards {rewards.shape}: expected {expected} and the number of reward functions")
    return [one._replace(rewards=row) for one, row in zip(groups, rewards, strict=True)]


def _check_completions(one: Group) -> None:
    for completion in one.completions:
        sizes = {len(completion.tokens), len(completion.logp), len(completion.trained)}
        if len(sizes) != 1:
            raise ValueError(
                f"the sampler gave a completion of {len(completion.tokens)} tokens with {len(completion.logp)} log-probs and "
                f"{len(completion.trained)} marks of what is trained, for the prompt of row {one.prompt.row}: expected as many"
            )


def _pack(one: Group) -> dict:
    """JSON values of a group without its prompt, which may have columns that are none."""
    packed = group.to_json(one)
    del packed["prompt"]
    return packed


def _check(prompts: Sequence[Prompt], o: Options) -> None:
    if not len(prompts):
        raise ValueError("there are 0 prompts: expected at least one to sample from")
    least = {"prompts": 1, "steps": 1, "iterations": 1, "world": 1, "rank": 0, "replay_size": 0, "reroll_groups": 0, "max_refills": 0}
    for name, low in (least | {"chunk": 0, "prefetch_depth": 0}).items():
        if getattr(o, name) < low:
            raise ValueError(f"{name} is {getattr(o, name)}: expected at least {low}")
    if o.prompts % o.steps:
        raise ValueError(f"a generation of {o.prompts} prompts in {o.steps} steps: expected a multiple of the steps")
    if o.rank >= o.world:
        raise ValueError(f"rank is {o.rank} of {o.world}: expected less than the number of ranks")
