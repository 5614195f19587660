"""Rollouts as the source of a run: prompts, who samples, what scores, and how groups become micro-batches."""

import contextlib
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch

from treetune.cli import row_settings, samplers
from treetune.cli.methods import policy_gradient
from treetune.cli.methods.parts import Parts, Rewards, RolloutParts
from treetune.cli.run import Run, Supply
from treetune.core.data import chat_templates, fingerprint, loader, loading
from treetune.core.data.dataset import Dataset
from treetune.core.rollout import documents, feed
from treetune.core.rollout.group import Group
from treetune.core.rollout.sampler import Sampler, fatal_errors
from treetune.core.run.ranks import ALONE, Ranks
from treetune.core.run.rollouts import Layout, Rollouts, Sizes, gather_groups, largest
from treetune.core.state import TrainState
from treetune.losses import policy_gradient as losses
from treetune.models.batches import Batcher, batcher
from treetune.ops import attention, noise

COMPLETIONS, EVALUATION, DROPOUT = 11, 12, 13  # purposes of randomness
READERS = ("prompts", "truths")  # kinds of data that are prompts


def read(run: Run, tokenizer: Any) -> Dataset:
    """The prompts of the config's data, with true replies where the method reads `truths`. Errors: ValueError naming file, row and fix."""
    options, kind = run.config.data, run.method.data
    if kind == "truths" and options.chat_template is not None:  # sample answers and a saved adapter use it too
        tokenizer.chat_template = chat_templates.resolve(tokenizer, options.chat_template) or tokenizer.chat_template
    settings = row_settings.truths(options) if kind == "truths" else row_settings.prompts(options)
    return loading.load(kind, settings, tokenizer, seed=run.config.optim.seed)


class Players(NamedTuple):
    """Who writes the completions of a run, and what scores them."""

    sampler: Sampler
    rewards: Rewards


def supply(run: Run, parts: Parts, data: Dataset, stack: contextlib.ExitStack) -> tuple[Supply, Dataset]:
    """Micro-batches and evaluation of what the policy samples, and what of the data is shown; workers and servers stop with the stack."""
    rollouts, config = parts.rollouts, run.config
    assert rollouts is not None
    players = _start(run, parts, data, stack)
    collate = batcher(parts.policy.cfg, run.device, parts.collates)
    sizes = _sizes(run, len(data.train))
    source = Rollouts(
        _feed(run, parts, data, players, collate, sizes.total_steps),
        _layout(run, rollouts, collate),
        sizes,
        rewards=players.rewards.names,
        metrics=players.sampler.engine.metrics,
        observers=run.observers,
        ranks=run.ranks,
    )
    evaluate = _evaluation(run, data, players, rollouts.extra_eval(parts.policy)) if data.val else None
    order = fingerprint.values("prompts", sizes.step_prompts, getattr(config.data, "shuffle", True))
    read = {"train": fingerprint.documents(data.train), "held out": fingerprint.documents(data.val), "order": order}
    digest = loader.plan_fingerprint([len(prompt.tokens) for prompt in data.train], step=sizes.step_prompts, seed=config.optim.seed)
    engine, rewards = players.sampler.engine, players.rewards
    functions = (*rewards.files, config.rollout.rollout_func)
    described = _describe(run, data, players)
    return Supply(source, evaluate, read, digest, engine.after_step, engine.start, described, functions, rewards.models), _shown(data)


def _start(run: Run, parts: Parts, data: Dataset, stack: contextlib.ExitStack) -> Players:
    """Start what scores and who samples; they stop with the stack, also where the second fails."""
    config, rollouts = run.config, parts.rollouts
    assert rollouts is not None
    rewards = rollouts.rewards(parts.policy)
    stack.callback(rewards.close)
    rewards.check(data.train + data.val)
    seeds = [int(noise.keys(config.optim.seed, purpose)) for purpose in (COMPLETIONS, EVALUATION)]
    engine = samplers.engine_of(config, parts.policy, device=run.device, root=run.folder.root, seeds=seeds, say=run.say)
    stack.callback(engine.close)
    rollout = rollouts.wrap(samplers.rollout_of(config.rollout, parts.policy.tokenizer, parts.policy.cfg))
    return Players(samplers.sampler_of(config, engine, rollout, evaluation_n=rollouts.eval_completions), rewards)


def _sizes(run: Run, prompts: int) -> Sizes:
    """Steps of the run (max_steps, or num_epochs times through the prompts) and prompts of each."""
    optim, pipeline = run.config.optim, run.config.pipeline
    step = optim.micro_batch_size * optim.gradient_accumulation_steps * run.ranks.world
    total = optim.max_steps
    if total is None:
        generations = max(1, round(optim.num_epochs * prompts / (step * pipeline.steps_per_generation)))
        total = generations * pipeline.steps_per_generation * pipeline.num_iterations
    return Sizes(total, optim.micro_batch_size, step, pipeline.num_iterations * prompts)


def _feed(run: Run, parts: Parts, data: Dataset, players: Players, collate: Batcher, total_steps: int) -> feed.Feed:
    config, rollouts = run.config, parts.rollouts
    assert rollouts is not None
    old_logprobs = None
    if policy_gradient.scored_apart(config):
        old_logprobs = documents.old_logprobs(rollouts.logprob, collate, groups_per_batch=config.optim.micro_batch_size)
    calls = feed.FeedCalls(
        players.sampler.train,
        players.rewards.score,
        policy_gradient.advantages(config.loss, players.rewards.weights, run.ranks),
        old_logprobs,
        lambda groups: players.rewards.measure(gather_groups(run.ranks, groups)),
        players.sampler.engine.snapshot,
        partial(largest, run.ranks, run.device),
        run.observers.warn,
    )
    return feed.Feed(data.train, calls, _feed_settings(run, total_steps))


def _feed_settings(run: Run, total_steps: int) -> feed.FeedSettings:
    config, pipeline = run.config, run.config.pipeline
    fraction, steps = pipeline.reroll_start_fraction, pipeline.steps_per_generation
    return feed.FeedSettings(
        prompts=config.optim.micro_batch_size * config.optim.gradient_accumulation_steps * steps,
        steps=steps,
        iterations=pipeline.num_iterations,
        seed=config.optim.seed,
        epochs_shuffle=getattr(config.data, "shuffle", True),
        rank=run.ranks.rank,
        world=run.ranks.world,
        replay_size=pipeline.replay_buffer_size,
        reroll_from=None if fraction >= 1 else max(1, int(total_steps * fraction)),
        reroll_groups=pipeline.reroll_max_groups,
        dynamic=pipeline.dynamic_sampling,
        prefetch_depth=pipeline.prefetch_depth if pipeline.async_prefetch else 0,
        chunk=pipeline.streaming_min_groups if pipeline.streaming_partial_batch else 0,
    )


def _layout(run: Run, rollouts: RolloutParts, collate: Batcher) -> Layout:
    config, truth = run.config, rollouts.truth
    skip = policy_gradient.skippable(config.loss) and truth is None and config.pipeline.skip_zero_advantage_batches

    def document(group: Group) -> Any:
        true_reply = None if truth is None else truth(group.prompt)
        return documents.document(group, mask_truncated=config.loss.mask_truncated_completions, truth=true_reply)

    def batch(groups: list[Any], step: int) -> tuple[dict[str, torch.Tensor], Any]:
        return collate(groups, seed=noise.keys(config.optim.seed, DROPOUT, step))

    return Layout(document, batch, _silence if skip else None)


def _silence(batch: dict[str, torch.Tensor], plan: Any) -> tuple[dict[str, torch.Tensor], Any]:
    """A batch of the same denominators without a token to train on."""
    silent = losses.zero_signal_batch(batch)
    return silent, attention.plan(silent, window=plan.window, device=batch["tokens"].device)


def _evaluation(
    run: Run, data: Dataset, players: Players, extra: Callable[[TrainState], dict[str, torch.Tensor]]
) -> Callable[[TrainState], dict[str, torch.Tensor]]:
    """state -> rewards of completions of each held-out prompt, always with the same randomness; ranks share the prompts."""
    ranks: Ranks = run.ranks if len(data.val) >= run.ranks.world else ALONE
    indices = range(ranks.rank, len(data.val), ranks.world)

    def evaluate(state: TrainState) -> dict[str, torch.Tensor]:
        with fatal_errors():
            sampled = players.sampler.evaluation(state, [data.val[i] for i in indices], list(indices))
            rows = zip(indices, sampled.completions, strict=True)
            groups = [Group(data.val[i], i, tuple(completions), sampled.version) for i, completions in rows]
            scores = players.rewards.score(groups)
        groups = [group._replace(rewards=values) for group, values in zip(groups, scores, strict=True)]
        metrics = players.rewards.measure(gather_groups(ranks, groups))
        shown = {name: value for name, value in metrics.items() if not name.startswith("frac") and value == value}
        return {name: torch.tensor(value) for name, value in shown.items()} | extra(state)

    return evaluate


def _shown(data: Dataset) -> Dataset:
    """What the sample answer and the report show of prompts."""
    prompt = data.train[0]
    row = {"messages": prompt.messages} if prompt.messages is not None else None
    return Dataset([], [], row, "chat", data.lines)


def _describe(run: Run, data: Dataset, players: Players) -> dict[str, str]:
    """What is sampled for a step, by whom, and what it is worth."""
    config, ranks = run.config, run.ranks
    optim, pipeline, rollout = config.optim, config.pipeline, config.rollout
    prompts = optim.micro_batch_size * optim.gradient_accumulation_steps
    served = pipeline.steps_per_generation * pipeline.num_iterations
    completions = f"{rollout.num_generations} completions of up to {rollout.max_completion_length} tokens"
    reuse = f"; a generation serves {served} steps" if served > 1 else ""
    return {
        "data": "; ".join(data.lines),
        "step": f"{prompts} prompts x {completions} on {ranks.world} rank{'s' * (ranks.world > 1)}{reuse}",
        "loss": policy_gradient.describe(config.loss),
        "rewards": ", ".join(players.rewards.described),
        "sampler": samplers.describe(config),
    }
