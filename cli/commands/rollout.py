"""`treetune rollout`: completions and their rewards without training, to try prompts and rewards before paying for a run."""

import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from treetune.cli import bases, checks, rewarding, rl_data, rundir, samplers, setup
from treetune.cli.errors import checking_input
from treetune.cli.options.commands import Rollout
from treetune.cli.options.rollout import VLLM_ONLY
from treetune.cli.screen import Screen
from treetune.core.rollout import stats
from treetune.core.rollout.group import Group
from treetune.core.state import TrainState
from treetune.models import Model


def run(config: Rollout, given: frozenset[str]) -> int:
    """Sample, score, print, and write; the exit code."""
    screen = Screen()
    with checking_input():
        checks.refuse_unused(given, dict.fromkeys(VLLM_ONLY, "treetune rollout samples without vLLM"))
        options = bases.with_base(config.model, config.adapter.adapter, given)
        tokenizer = setup.load_tokenizer(options, config.adapter.adapter, say=screen.line)
        data = rl_data.load(config.data, tokenizer, seed=config.seed)
        on = setup.device(options.device)
        rewards = rewarding.start(config.rewards, options, on=on, say=screen.warn)
    try:
        with checking_input():
            prompts = data.train[: config.num_prompts]
            rewards.check(prompts)
            model, used = bases.load_adapted(options, config.adapter.adapter, on=on, say=screen.line)
            rl_data.check_fits(data, config.rollout, model.cfg)
        for line in data.lines:
            screen.line(line)
        return _report(config, _groups(config, options, model, used, tokenizer, prompts, rewards, screen), screen)
    finally:
        rewards.close()


def _groups(
    config: Rollout, options: Any, model: Model, used: Any, tokenizer: Any, prompts: list, rewards: Any, screen: Screen
) -> list[Group]:
    with checking_input():
        stop, start = setup.stop_ids(options, tokenizer), time.perf_counter()
    draw = samplers.local(model, used, samplers.sampling_params(config.rollout, stop), tokenizer, seed=config.seed)
    with checking_input():
        rollout = samplers.rollout_of(config.rollout, tokenizer, model.cfg)
    sample = rollout(draw, n=config.rollout.num_generations, max_tokens=config.rollout.max_completion_length)
    params = {} if used is None else {"lora": used.tree}
    state = TrainState(params, {"model": model.params}, {}, {}, torch.tensor(0))
    with checking_input():
        sampled = sample(state, prompts, list(range(len(prompts))))
        groups = [Group(one, i, tuple(row), 0) for i, (one, row) in enumerate(zip(prompts, sampled.completions, strict=True))]
        sampled_s, start = time.perf_counter() - start, time.perf_counter()
        scored = rewards.score(groups)
    tokens = sum(len(one.tokens) for group in groups for one in group.completions)
    seconds = time.perf_counter() - start
    screen.line(f"{tokens} tokens in {sampled_s:.1f} s ({tokens / sampled_s:.0f} tokens/s), rewards in {seconds:.1f} s")
    return [group._replace(rewards=values) for group, values in zip(groups, scored, strict=True)]


def _report(config: Rollout, groups: list[Group], screen: Screen) -> int:
    names, weights = rewarding.names(config.rewards), rewarding.weights(config.rewards)
    for group in groups:
        total = stats.combined(group.rewards, weights)
        asked = group.prompt.messages[-1]["content"] if group.prompt.messages else group.prompt.text
        screen.line(f"# {asked.strip()[-300:]}", "bold")
        for j in np.argsort(-np.nan_to_num(total, nan=-np.inf))[: config.show].tolist():
            said = ", ".join(f"{name} {value:g}" for name, value in zip(names, group.rewards[j].tolist(), strict=True) if value == value)
            one = group.completions[j]
            screen.line(f"  [{said or 'no reward'}{'' if one.stopped else ', cut off'}] {one.text.strip()}")
    if config.output is not None:
        with checking_input():
            saved = rundir.write_new(Path(config.output), "".join(_record(group, names) for group in groups))
    found = stats.metrics(groups, names, weights)
    rows = {name: f"{value:.4f}" for name, value in found.items() if value == value}
    screen.table("", rows | ({"saved": str(saved)} if config.output else {}))
    if found["completions/clipped_ratio"] > 0.8:
        screen.warn("most completions were cut off before they ended: raise --max-completion-length")
    if found["frac_reward_zero_std"] == 1:
        screen.warn("every completion of a prompt has the same reward, so nothing could be learned: try other prompts or rewards")
    return 0


def _record(group: Group, names: tuple[str, ...]) -> str:
    lines = []
    for one, values in zip(group.completions, group.rewards.tolist(), strict=True):
        said = {name: None if value != value else value for name, value in zip(names, values, strict=True)}
        row = {"prompt": group.prompt.text, "answer": one.text, "rewards": said, "tokens": len(one.tokens), "stopped": one.stopped}
        lines.append(json.dumps(row | {"row": group.prompt.row}, ensure_ascii=False) + "\n")
    return "".join(lines)
