"""Rollouts as the source of a run: prompts, who samples, what scores, and how groups become micro-batches."""

import contextlib
from collections.abc import Callable
from functools import partial
from typing import Any

from treetune.cli import row_settings, samplers
from treetune.cli.methods import policy_gradient
from treetune.cli.methods.method import Parts, RolloutParts
from treetune.cli.options import pipeline, policy_loss
from treetune.cli.run import Run
from treetune.core.config import table
from treetune.core.data import chat_templates, loading, prompt_rows
from treetune.core.data.dataset import Dataset
from treetune.core.rollout import documents
from treetune.core.rollout import sampler as core_sampler
from treetune.core.rollout.sampler import Engine
from treetune.core.run import generations
from treetune.core.run.rollouts import Layout
from treetune.core.run.source import Supply
from treetune.losses import policy_gradient as losses
from treetune.models import batches, sampling
from treetune.models import tokenizer as tokenizers
from treetune.models.batches import Batcher
from treetune.models.policy import Policy
from treetune.ops import noise

COMPLETIONS, EVALUATION, DROPOUT = 11, 12, 13  # purposes of randomness
READERS = ("prompts", "truths")  # kinds of data that are prompts
Extras = Callable[[], dict[str, Any]]  # what is saved beside weights, as arguments of `policy.save`


def read(run: Run, tokenizer: Any) -> Dataset:
    """The prompts of the config's data, with true replies where the method reads `truths`. Errors: ValueError naming file, row and fix."""
    options, kind = run.config.data, run.method.data
    if kind == "truths" and options.chat_template is not None:  # sample answers and a saved adapter use it too
        tokenizer.chat_template = chat_templates.resolve(tokenizer, options.chat_template) or tokenizer.chat_template
    settings = row_settings.truths(options) if kind == "truths" else row_settings.prompts(options)
    return loading.load(kind, settings, tokenizer, seed=run.config.optim.seed)


def supply(run: Run, parts: Parts, data: Dataset, stack: contextlib.ExitStack, extras: Extras) -> tuple[Supply, Dataset]:
    """Micro-batches and evaluation of what the policy samples, and what of the data is shown; workers and servers stop with the stack."""
    rollouts, config = parts.rollouts, run.config
    assert rollouts is not None
    settings, collate = table.record(generations.Settings, config), batches.batcher(parts.policy.cfg, run.device, parts.collates)
    players = _start(run, parts.policy, rollouts, data, stack, extras)
    calls = generations.Calls(
        _layout(run, parts.policy, rollouts, collate), policy_gradient.advantages(config.loss, players.rewards.weights)
    )
    if pipeline.moved(table.flatten(config)):
        old = documents.old_logprobs(rollouts.logprob, collate, groups_per_batch=settings.micro_batch_size)
        calls = calls._replace(old_logprobs=old)
    if data.val:
        calls = calls._replace(evaluated=rollouts.extra_eval(parts.policy))
    supplied = generations.supply(data, settings, players, calls, ranks=run.ranks, observers=run.observers)
    described = {"loss": policy_gradient.describe(config.loss), "rewards": ", ".join(players.rewards.described)}
    described = {**supplied.described, **described, "sampler": samplers.describe(config)}
    functions = (*supplied.functions, config.rollout.rollout_func)
    return supplied._replace(described=described, functions=functions), prompt_rows.example(data)


def _start(
    run: Run, policy: Policy, rollouts: RolloutParts, data: Dataset, stack: contextlib.ExitStack, extras: Extras
) -> generations.Players:
    """Start what scores and who samples; they stop with the stack, also where the second fails."""
    rewards = rollouts.rewards(policy)
    stack.callback(rewards.close)
    rewards.check(data.train + data.val)
    engine, options = _engine(run, policy, extras), run.config.rollout
    stack.callback(engine.close)
    play = rollouts.wrap(samplers.rollout_of(options, policy.tokenizer, policy.cfg))
    sizes = {"n": options.num_generations, "evaluation_n": rollouts.eval_completions, "max_tokens": options.max_completion_length}
    return generations.Players(core_sampler.build(engine, play, **sizes), rewards)


def _engine(run: Run, policy: Policy, extras: Extras) -> Engine:
    """The engine that the options name; weights for a server go into the run folder."""
    config = run.config
    stop = tokenizers.stop_ids(config.model.model, policy.tokenizer, revision=config.model.revision)
    seeds = int(noise.keys(config.optim.seed, COMPLETIONS)), int(noise.keys(config.optim.seed, EVALUATION))
    params = samplers.sampling_params(config.rollout, stop)
    if not config.engine.use_vllm:
        own = (samplers.local(policy, params, seed=seed) for seed in seeds)
        return core_sampler.LocalEngine(*own, join=sampling.joiner(policy))
    return samplers.served(run, policy, params, seeds=seeds, extras=extras())


def _layout(run: Run, policy: Policy, rollouts: RolloutParts, collate: Batcher) -> Layout:
    loss = run.config.loss
    skip = policy_loss.skippable(loss) and rollouts.truth is None and run.config.pipeline.skip_zero_advantage_batches
    document = partial(documents.document, mask_truncated=loss.mask_truncated_completions, truth=rollouts.truth)
    silence = batches.replanned(losses.zero_signal_batch, policy.cfg) if skip else None
    return Layout(document, batches.seeded(collate, run.config.optim.seed, DROPOUT), silence)
