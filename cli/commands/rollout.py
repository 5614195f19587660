"""`treetune rollout`: completions and their rewards without training, to try prompts and rewards before paying for a run."""

import json
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

from treetune.cli import rewarding, row_settings, samplers
from treetune.cli.errors import checking_input
from treetune.cli.options.commands import Rollout
from treetune.cli.options.rollout import VLLM_ONLY
from treetune.cli.screen import Screen
from treetune.core.config import checks
from treetune.core.data import prompt_rows
from treetune.core.data.prompts import Prompt
from treetune.core.rollout import stats
from treetune.core.rollout.group import Group, PromptSampler, rewards_of
from treetune.core.run import folder
from treetune.core.state import TrainState
from treetune.models import loading, target
from treetune.models.dense import Config


def run(config: Rollout, given: frozenset[str]) -> int:
    """Sample, score, print, and write; the exit code."""
    screen = Screen()
    with checking_input():
        checks.refuse_unused(given, dict.fromkeys(VLLM_ONLY, "treetune rollout samples without vLLM"))
        chosen = target.choose(config.adapter.adapter, named="model" in given, **asdict(config.model))
        tokenizer = target.load_tokenizer(chosen, say=screen.line)
        data = prompt_rows.load(row_settings.prompts(config.data), tokenizer, seed=config.seed)
        device = loading.select_device(config.model.device)
        rewards = rewarding.start(config.rewards, config.model, on=device, say=screen.warn)
    try:
        with checking_input():
            prompts = data.train[: config.num_prompts]
            rewards.check(prompts)
            model, lora = target.load_model(chosen, say=screen.line)
            _check_fits(config, data.train + data.val, model.cfg)
        for line in data.lines:
            screen.line(line)
        with checking_input():
            params = samplers.sampling_params(config.rollout, target.stop_ids(chosen, tokenizer))
            rollout = samplers.rollout_of(config.rollout, tokenizer, model.cfg)
            sampler = samplers.local(model, lora, params, tokenizer, seed=config.seed)
            sample = rollout(sampler, n=config.rollout.num_generations, max_tokens=config.rollout.max_completion_length)
            state = TrainState({} if lora is None else {"lora": lora.tree}, {"model": model.params}, {}, {}, torch.tensor(0))
            groups = _sample(sample, state, prompts, rewards, screen)
        return _report(config, groups, screen)
    finally:
        rewards.close()


def _check_fits(config: Rollout, prompts: Sequence[Prompt], cfg: Config) -> None:
    length, stop_ids = config.rollout.max_completion_length, config.rollout.stop_token_ids
    sizes = {"vocab_size": cfg.vocab_size, "max_positions": cfg.max_positions}
    prompt_rows.check_fits(prompts, max_completion_length=length, stop_ids=stop_ids, **sizes)


def _sample(sample: PromptSampler, state: TrainState, prompts: Sequence[Prompt], rewards: rewarding.Rewards, screen: Screen) -> list[Group]:
    """Completions of each prompt, with their rewards."""
    start = time.perf_counter()
    completions = sample(state, prompts, list(range(len(prompts)))).completions
    groups = [Group(prompt, i, tuple(row), 0) for i, (prompt, row) in enumerate(zip(prompts, completions, strict=True))]
    sampling_s, start = time.perf_counter() - start, time.perf_counter()
    values = rewards.score(groups)
    tokens = sum(len(completion.tokens) for group in groups for completion in group.completions)
    rate = f"{tokens} tokens in {sampling_s:.1f} s ({tokens / sampling_s:.0f} tokens/s)"
    screen.line(f"{rate}, rewards in {time.perf_counter() - start:.1f} s")
    return [group._replace(rewards=part) for group, part in zip(groups, values, strict=True)]


def _report(config: Rollout, groups: Sequence[Group], screen: Screen) -> int:
    names, weights = rewarding.names(config.rewards), rewarding.weights(config.rewards)
    for group in groups:
        _show(group, names, weights, config.show, screen)
    metrics = stats.metrics(groups, names, weights)
    rows = {name: f"{value:.4f}" for name, value in metrics.items() if value == value}
    if config.output is not None:
        with checking_input():
            text = "".join(json.dumps(record, ensure_ascii=False) + "\n" for group in groups for record in _records(group, names))
            rows["saved"] = str(folder.write_new(Path(config.output), text))
    screen.table("", rows)
    if metrics["completions/clipped_ratio"] > 0.8:
        screen.warn("most completions were cut off before they ended: raise --max-completion-length")
    if metrics["frac_reward_zero_std"] == 1:
        screen.warn("every completion of a prompt has the same reward, so nothing could be learned: try other prompts or rewards")
    return 0


def _show(group: Group, names: Sequence[str], weights: Sequence[float], count: int, screen: Screen) -> None:
    """The prompt and its best completions, each with what the rewards said."""
    rewards = rewards_of(group)
    question = group.prompt.messages[-1]["content"] if group.prompt.messages else group.prompt.text
    screen.line(f"# {question.strip()[-300:]}", "bold")
    totals = stats.combined(rewards, weights)
    for j in np.argsort(-np.nan_to_num(totals, nan=-np.inf))[:count].tolist():
        values = ", ".join(f"{name} {value:g}" for name, value in zip(names, rewards[j].tolist(), strict=True) if value == value)
        completion = group.completions[j]
        screen.line(f"  [{values or 'no reward'}{'' if completion.stopped else ', cut off'}] {completion.text.strip()}")


def _records(group: Group, names: Sequence[str]) -> list[dict[str, Any]]:
    """What the output file says of each completion; null for a reward that abstained."""
    records = []
    for completion, row in zip(group.completions, rewards_of(group).tolist(), strict=True):
        rewards = {name: None if value != value else value for name, value in zip(names, row, strict=True)}
        record = {"prompt": group.prompt.text, "answer": completion.text, "rewards": rewards, "tokens": len(completion.tokens)}
        records.append(record | {"stopped": completion.stopped, "row": group.prompt.row})
    return records
