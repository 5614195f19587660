"""`treetune rollout`: completions and their rewards without training, to try prompts and rewards before paying for a run."""

import json
from dataclasses import asdict
from pathlib import Path

from treetune.cli import row_settings, samplers
from treetune.cli.methods import rewarding
from treetune.cli.options.commands import Rollout
from treetune.cli.options.rollout import VLLM_ONLY
from treetune.cli.screen import Screen
from treetune.core.config import checks
from treetune.core.data import prompt_rows
from treetune.core.rollout import trial
from treetune.core.rollout.rewards import Rewards
from treetune.core.rollout.trial import Trial
from treetune.core.run import folder
from treetune.core.run.errors import checking_input
from treetune.models import loading, policy, target


def run(config: Rollout, given: frozenset[str]) -> int:
    """Sample, score, print, and write; the exit code."""
    screen, options = Screen(), config.rollout
    with checking_input():
        checks.refuse_unused(given, dict.fromkeys(VLLM_ONLY, "treetune rollout samples without vLLM"))
        chosen = target.choose(config.adapter.adapter, named="model" in given, **asdict(config.model))
        tokenizer = target.load_tokenizer(chosen, say=screen.line)
        data = prompt_rows.load(row_settings.prompts(config.data), tokenizer, seed=config.seed)
        device = loading.select_device(config.model.device)
        rewards = rewarding.start(config.rewards, config.model, rewarding.Place(device), say=screen.line, warn=screen.warn)
    try:
        with checking_input():
            prompts = data.train[: config.num_prompts]
            rewards.check(prompts)
            model, lora = target.load_model(chosen, say=screen.line)
            prompt_rows.check_fits(
                data.train,
                max_completion_length=options.max_completion_length,
                stop_ids=options.stop_token_ids,
                vocab_size=model.cfg.vocab_size,
                max_positions=model.cfg.shared_positions,
            )
        for line in data.lines:
            screen.line(line)
        with checking_input():
            sizes, state = policy.inference(model, lora)
            params = samplers.sampling_params(options, target.stop_ids(chosen, tokenizer))
            draw = samplers.local(sizes._replace(tokenizer=tokenizer), params, seed=config.seed)
            play = samplers.rollout_of(options, tokenizer, model.cfg)
            sample = play(draw, n=options.num_generations, max_tokens=options.max_completion_length)
            done = trial.run(sample, state, prompts, rewards.score)
        screen.line(done.speed())
        _report(config, done, rewards, screen)
    finally:
        rewards.close()
    return 0


def _report(config: Rollout, done: Trial, rewards: Rewards, screen: Screen) -> None:
    for group in done.groups:
        screen.line(f"# {trial.question(group)}", "bold")
        for line in trial.best(group, rewards.names, rewards.weights, config.show):
            screen.line(f"  {line}")
    metrics = rewards.measure(done.groups)
    rows = {name: f"{value:.4f}" for name, value in metrics.items() if value == value}
    if config.output is not None:
        records = [record for group in done.groups for record in trial.records(group, rewards.names)]
        with checking_input():
            text = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
            rows["saved"] = str(folder.write_new(Path(config.output), text))
    screen.table("", rows)
    for line in trial.advice(metrics):
        screen.warn(line)
