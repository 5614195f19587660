"""`treetune grpo`: reinforcement learning from rewards that functions, or reward models, give to sampled completions.

What it shares with other commands that learn from what they sample is here; a `Task` is what differs.
"""

import contextlib
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch

from treetune.cli import (
    bases,
    cadence,
    corpus,
    finish,
    loop,
    online,
    products,
    provenance,
    rewarding,
    rl_data,
    rollouts,
    rundir,
    samplers,
    setup,
    sharing,
    training,
)
from treetune.cli import method as methods
from treetune.cli.errors import checking_input, running
from treetune.cli.options.pipeline import PipelineOptions
from treetune.cli.screen import Screen
from treetune.core import records, shard, step
from treetune.core.data import fingerprint, loader
from treetune.core.data.prompts import Prompt
from treetune.core.data.trees import TreeDoc
from treetune.core.rollout import feed
from treetune.core.rollout.group import Group
from treetune.core.state import TrainState
from treetune.losses import policy_gradient as objectives
from treetune.models import bare
from treetune.ops import attention, noise

COMPLETIONS, EVALUATION, DROPOUT = 11, 12, 13  # what randomness is for


class Prepared(NamedTuple):
    """What a task brings to a run, once there is a model.

    trees: the run's, with what else is frozen. start(trees as placed) -> what scores. around: of `samplers.build`. truth(prompt) ->
    tokens and weights of the true reply, where it trains beside the completions, with the coefficient ce_coef. held: completions of each
    prompt in an evaluation, which `beside(trees as placed)` makes another function for: state -> further metrics.
    """

    trees: setup.Trees
    start: Callable[[setup.Trees], rewarding.Rewards]
    around: Callable[[Callable], Callable] = lambda wrap: wrap
    truth: Callable[[Prompt], tuple[np.ndarray, np.ndarray]] | None = None
    ce_coef: float = 0.0
    held: int = 1
    beside: Callable[[setup.Trees], Callable[[TrainState], dict]] = lambda trees: lambda state: {}


class Task(NamedTuple):
    """What tells the commands apart that learn from completions they sample.

    read(config, tokenizer) -> prompts. prepare(config, model, trees, tokenizer, data, on=, ranks=, screen=) -> `Prepared`.
    """

    name: str
    method: methods.Method
    read: Callable[[Any, Any], rl_data.Prompts]
    prepare: Callable[..., Prepared]


class Run(NamedTuple):
    """What a run of reinforcement learning has besides what all runs have; to be closed at its end."""

    assembly: training.Assembly
    rewards: rewarding.Rewards
    feed: feed.Feed
    start: Callable[[TrainState], None]  # give an engine the weights
    close: Callable[[], None]


def run(config: Any, given: frozenset[str]) -> int:
    """Train and leave a run folder; the exit code."""
    return train(config, GRPO)


def train(config: Any, task: Task) -> int:
    """Train and leave a run folder; the exit code."""
    with contextlib.ExitStack() as held:
        with checking_input():
            on = setup.device(config.model.device)
            ranks = setup.ranks(on)
            screen = Screen(quiet=ranks.rank > 0, every=config.run.logging_steps, shown=task.method.shown)
            where = held.enter_context(rundir.hold(task.name, config, share=partial(sharing.share, ranks)))
            made = assemble(where, config, task, screen, ranks, on)
            held.callback(made.close)
        return _train(config, made, screen, ranks)


def _train(config: Any, made: Run, screen: Screen, ranks: setup.Ranks) -> int:
    main = made.assembly
    with checking_input():
        sampler = finish.sampler(config, main)
        setup.wait_for_all(ranks)  # every rank has read what it resumes from
        sharing.share(ranks, partial(training.create, config, main))
    about = describe(config, made, ranks)
    screen.table("", about)
    for text in cadence.warnings(config, main.job, main.peak):
        screen.warn(text)
    with running(main.where.root):
        made.start(main.state)
        sampler(main.state, "before", screen)
        outcome = loop.run(main.job, main.state, main.where, config.run, screen, main.meta)
        finish.leave(config, main, outcome, sampler, screen, about)
    return 0 if outcome.signum is None or outcome.stopped != "interrupted" else 128 + outcome.signum


def describe(config: Any, made: Run, ranks: setup.Ranks) -> dict[str, str]:
    """What is about to run."""
    rows = training.describe(config, made.assembly, ranks)
    size, pipe, rollout = prompts_per_step(config), config.pipeline, config.rollout
    served = pipe.steps_per_generation * pipe.num_iterations
    rows["data"] = "; ".join(made.assembly.corpus.lines)
    rows["step"] = (
        f"{size} prompts x {rollout.num_generations} completions of up to {rollout.max_completion_length} tokens on {ranks.world} "
        f"rank{'s' * (ranks.world > 1)}" + (f"; a generation serves {served} steps" if served > 1 else "")
    )
    rows["loss"] = online.describe(config.loss)
    rows["rewards"] = ", ".join(made.rewards.described)
    rows["sampler"] = samplers.describe(config)
    return rows


def prompts_per_step(config: Any) -> int:
    """Prompts of an optimiser step on one rank."""
    return config.optim.micro_batch_size * config.optim.gradient_accumulation_steps


def _read(config: Any, tokenizer: Any) -> rl_data.Prompts:
    return rl_data.load(config.data, tokenizer, seed=config.optim.seed)


def _functions(
    config: Any, model: Any, trees: setup.Trees, tokenizer: Any, data: rl_data.Prompts, *, on, ranks, screen: Screen
) -> Prepared:
    """Rewards that functions and reward models give."""
    rl_data.check_fits(data, config.rollout, model.cfg)
    return Prepared(trees, lambda placed: rewarding.start(config.rewards, config.model, on=on, say=screen.warn))


GRPO = Task("grpo", online.METHOD, _read, _functions)


def assemble(where: rundir.RunDir, config: Any, task: Task, screen: Screen, ranks: setup.Ranks, on: torch.device) -> Run:
    """All of a run's parts from its options and its folder; writes nothing. What it starts (workers, a server) is stopped if it fails."""
    origin = provenance.begin(where, config, task.method.rates, on, processes=ranks.world, say=screen.line)
    products.settle(where.resume, setup.compute_dtype(config.model.dtype, on), on, share=partial(sharing.share, ranks), say=screen.line)
    start = config.adapter.lora_model_dir if config.adapter.adapter == "lora" else None
    words = setup.load_words(config.model, config.vocabulary, start, say=screen.line)
    data = task.read(config, words.tokenizer)
    for text in data.lines:
        screen.line(text)
    base, _ = setup.load_model(config.model, on=on)
    known = bases.started_on(config.model, base, start, say=screen.line)
    model = setup.with_rows(base, words, config.vocabulary, start)
    if changed := setup.describe_rows(words, base, model):
        screen.line(changed)
    if config.adapter.adapter == "lora":
        trees = setup.adapted(model, config.adapter, base=known, seed=config.optim.seed, new_rows=changed != "", say=screen.line)
    else:
        trees = setup.full(model)
    own = task.prepare(config, model, trees, words.tokenizer, data, on=on, ranks=ranks, screen=screen)
    signal = online.build(config, model, own.trees, on=on, mesh=ranks.mesh, say=screen.line, ce_coef=own.ce_coef)
    origin = provenance.loaded(origin, config, model, trees, signal.parts.trees.frozen)
    origin = provenance.with_words(origin, words.tokenizer, setup.stop_ids(config.model, words.tokenizer))
    placed = setup.place(signal.parts.trees, model, ranks, config.run.sharding)
    signal = signal._replace(parts=signal.parts._replace(trees=placed))
    with contextlib.ExitStack() as started:
        rewards = own.start(placed)
        started.callback(rewards.close)
        rewards.check(data.train + data.val)
        origin = provenance.with_functions(origin, [*rewards.files, config.rollout.rollout_func], rewards.models)
        seeds = [noise.keys(config.optim.seed, purpose).item() for purpose in (COMPLETIONS, EVALUATION)]
        parts = {"on": on, "root": where.root, "seeds": seeds, "say": screen.line, "around": own.around, "held": own.held}
        sampler = samplers.build(config, model, placed, words.tokenizer, **parts)
        started.callback(sampler.close)
        made = _assemble(config, task, own, data, words.tokenizer, bare(model), signal, origin, where, on, ranks, rewards, sampler, screen)
        started.callback(made.feed.close)
        return made._replace(close=started.pop_all().close)


def _assemble(config, task, own, data, tokenizer, model, signal, origin, where, on, ranks, rewards, sampler, screen) -> Run:
    optim, parts = config.optim, signal.parts
    trees = parts.trees
    peak = optim.learning_rate or task.method.rates[trees.lora is None]
    optimizer = setup.optimizer(optim, loraplus=config.adapter.loraplus_lr_ratio if trees.lora else None)
    state = TrainState(trees.params, trees.frozen, optimizer.init(trees.params), parts.extra, torch.tensor(0, device=on))
    make = training.maker(model, on, streams=parts.streams)
    total = total_steps(config, len(data.train), ranks.world)
    schedule = cadence.schedule(optim, peak, total)
    clip = optim.max_grad_norm or None
    stepper = step.make_step(parts.objective, optimizer, schedule=schedule, clip=clip, prepare=parts.prepare, mesh=ranks.mesh)
    sizes = [len(one.tokens) for one in data.train]
    size = prompts_per_step(config) * ranks.world
    order = fingerprint.values("prompts", size, getattr(config.data, "shuffle", True))
    read = {"train": fingerprint.documents(data.train), "held out": fingerprint.documents(data.val), "order": order}
    stream = loader.plan_fingerprint(sizes, step=size, seed=optim.seed)
    meta, changed = provenance.check(origin, config, documents=read, stream=stream, sampled=True)
    meta |= products.record()
    state, found = loop.restore(where, state)
    training.tell(changed, screen, where, state, total)
    calls = feed.FeedCalls(
        sampler.sample,
        rewards.score,
        rewarding.advantage(config.loss, rewards.weights, ranks),
        rollouts.scorer(signal.logprob, make, optim.micro_batch_size) if online.scored_apart(config) else None,
        partial(measured, rewards, ranks),
        sampler.snapshot,
        partial(largest, ranks, on),
        screen.warn,
    )
    pool = feed.Feed(data.train, calls, options(config, ranks, total))
    if found is not None:
        pool.load(found["rollout"][ranks.rank])
    between = [fn for fn in (parts.between, sampler.between) if fn is not None]
    job = loop.Job(
        stepper,
        evaluator(data, sampler, rewards, own.beside(trees), ranks) if data.val else None,
        parts.objective,
        partial(tickets, prompts_per_step(config) * ranks.world, config.pipeline.num_iterations * len(data.train)),
        total,
        meta,
        on,
        rank=ranks.rank,
        prepare=parts.prepare,
        between=partial(methods.in_turn, between) if between else None,
        perplexity=False,
        roll=Roll(config, pool, make, sampler, rewards.names, own.truth, where, screen, ranks),
        carry=partial(carried, pool, ranks),
        goal="reward",
    )
    first = data.train[0]
    row = {"messages": first.messages} if first.messages is not None else None
    shown = corpus.Corpus([], [], row, "chat", data.lines)
    assembly = training.Assembly(job, state, model, trees, tokenizer, where, found, shown, peak, task.method)
    return Run(assembly, rewards, pool, sampler.start, pool.close)


def total_steps(config: Any, prompts: int, world: int) -> int:
    """Optimiser steps of a whole run: max_steps, or num_epochs times through the prompts."""
    if config.optim.max_steps is not None:
        return config.optim.max_steps
    per_generation = prompts_per_step(config) * config.pipeline.steps_per_generation * world
    generations = max(1, round(config.optim.num_epochs * prompts / per_generation))
    return generations * config.pipeline.steps_per_generation * config.pipeline.num_iterations


def options(config: Any, ranks: setup.Ranks, total: int) -> feed.FeedSettings:
    """The options of the pipeline."""
    pipe, fraction = config.pipeline, config.pipeline.reroll_start_fraction
    return feed.FeedSettings(
        prompts=prompts_per_step(config) * pipe.steps_per_generation,
        steps=pipe.steps_per_generation,
        iterations=pipe.num_iterations,
        seed=config.optim.seed,
        epochs_shuffle=getattr(config.data, "shuffle", True),
        rank=ranks.rank,
        world=ranks.world,
        replay_size=pipe.replay_buffer_size,
        reroll_from=None if fraction >= 1 else max(1, int(total * fraction)),
        reroll_groups=pipe.reroll_max_groups,
        dynamic=pipe.dynamic_sampling,
        prefetch_depth=pipe.prefetch_depth if pipe.async_prefetch else 0,
        chunk=pipe.streaming_min_groups if pipe.streaming_partial_batch else 0,
    )


def tickets(step: int, epoch: int, cursor: loader.PlanCursor) -> Iterator[tuple[None, loader.PlanCursor]]:
    """One after another, the cursors after each step: how far through the prompts a run is, which `roll` deals.

    step, epoch: how often a prompt is looked at in either.
    """
    index = cursor.index
    while True:
        index += 1
        yield None, loader.PlanCursor(index * step // epoch, index)


def largest(ranks: setup.Ranks, on: torch.device, value: int) -> int:
    """The largest of a number over ranks."""
    return value if ranks.world == 1 else int(shard.all_reduce(torch.tensor(value, device=on), "max", ranks.mesh))


def carried(pool: feed.Feed, ranks: setup.Ranks) -> list[dict]:
    """What every rank's feed needs to go on."""
    parts = [pool.state()]
    if ranks.world > 1:
        parts = [None] * ranks.world
        torch.distributed.all_gather_object(parts, pool.state())
    return parts


class Roll(NamedTuple):
    """The micro-batches of a step, made of what the policy writes and the rewards say."""

    config: Any
    feed: feed.Feed
    make: Callable
    sampler: samplers.Samplers
    names: tuple[str, ...]  # of the rewards
    truth: Callable | None  # of `Prepared`
    where: rundir.RunDir
    screen: Screen
    ranks: setup.Ranks

    def __call__(self, state: TrainState, index: int) -> tuple[list, dict]:
        """(micro-batches of step `index`, metrics of its completions)."""
        start = time.perf_counter()
        with samplers.ending(), self.screen.busy("sampling completions and scoring them"):
            groups, found = self.feed.next(state, index - 1)
        made = {"rollout/seconds": time.perf_counter() - start} | found | self.sampler.metrics()
        if self.ranks.rank == 0:
            show(self.config.pipeline, self.names, groups, index, self.where, self.screen)
        return self.micro_batches(groups, index), made

    def micro_batches(self, groups: list[Group], index: int) -> list:
        """Groups that teach nothing stand together, so that whole micro-batches of them cost nothing."""
        size, skip = self.config.optim.micro_batch_size, online.skippable(self.config.loss) and self.truth is None
        skip = skip and self.config.pipeline.skip_zero_advantage_batches
        ordered = sorted(groups, key=lambda group: not group.advantage.any()) if skip else groups
        seed = noise.keys(self.config.optim.seed, DROPOUT, index)
        out = []
        for i in range(0, len(ordered), size):
            some = ordered[i : i + size]
            docs = [self.document(group) for group in some]
            batch, plan = self.make(range(len(docs)), docs, seed=seed)
            if skip and not any(group.advantage.any() for group in some):
                batch = objectives.zero_signal_batch(batch)
                plan = attention.plan(batch, window=plan.window, device=batch["tokens"].device)
            out.append((batch, plan))
        return out

    def document(self, group: Group) -> TreeDoc:
        """What a group trains on."""
        truth = None if self.truth is None else self.truth(group.prompt)
        return rollouts.document(group, mask_truncated=self.config.loss.mask_truncated_completions, truth=truth)


def show(pipe: PipelineOptions, names: tuple[str, ...], groups: list[Group], index: int, where: rundir.RunDir, screen: Screen) -> None:
    """Completions on the screen and in samples.jsonl, with what each reward said."""
    for number, group in enumerate(groups):
        order = np.argsort(-np.nan_to_num(group.advantage))
        for place, j in enumerate(order.tolist()):
            one = group.completions[j]
            said = {name: None if value != value else value for name, value in zip(names, group.rewards[j].tolist(), strict=True)}
            record = {"step": index, "prompt": group.prompt.text, "answer": one.text, "rewards": said, "advantage": group.advantage[j]}
            if pipe.log_completions:
                records.append(where.samples, record | {"tokens": len(one.tokens), "stopped": one.stopped, "version": group.version})
            if number == 0 and place < pipe.num_completions_to_print and screen.wants(index):
                said = ", ".join(f"{name} {value:g}" for name, value in said.items() if value is not None)
                screen.line(f"  {one.text.strip()!r:.200}  ({said}; advantage {group.advantage[j]:.2f})", "dim")


def measured(rewards: rewarding.Rewards, ranks: setup.Ranks, groups: list[Group]) -> dict[str, float]:
    """Metrics of the scored groups of all ranks."""
    if ranks.world > 1:
        parts = [None] * ranks.world
        torch.distributed.all_gather_object(parts, [group._replace(prompt=None) for group in groups])
        groups = [group for part in parts for group in part]
    return rewards.measure(groups)


def evaluator(
    data: rl_data.Prompts, sampler: samplers.Samplers, rewards: rewarding.Rewards, beside: Callable[[TrainState], dict], ranks: setup.Ranks
) -> Callable:
    """state -> rewards of completions of each held-out prompt, always with the same randomness; ranks share the prompts."""
    shared = ranks if len(data.val) >= ranks.world else setup.Ranks(0, 1, None)
    own = range(shared.rank, len(data.val), shared.world)

    def evaluate(state: TrainState) -> dict[str, torch.Tensor]:
        with samplers.ending():
            sampled = sampler.held(state, [data.val[i] for i in own], list(own))
            rows = zip(own, sampled.completions, strict=True)
            groups = [Group(data.val[i], i, tuple(one), sampled.version) for i, one in rows]
            scored = rewards.score(groups)
        groups = [group._replace(rewards=values) for group, values in zip(groups, scored, strict=True)]
        found = measured(rewards, shared, groups)
        kept = {name: value for name, value in found.items() if not name.startswith("frac") and value == value}
        return {name: torch.tensor(value) for name, value in kept.items()} | beside(state)

    return evaluate
