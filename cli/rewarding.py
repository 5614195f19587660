"""Rewards of a run: functions in worker processes and reward models on the device, and how they become advantages.

P prompts, G completions of each, K rewards.
"""

import math
import re
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from treetune.cli import online, setup
from treetune.cli.commands import score
from treetune.cli.options.model import ModelOptions
from treetune.cli.options.policy_loss import PolicyLoss
from treetune.cli.options.rollout import RewardFunctions
from treetune.core import ckpt
from treetune.core.data import fingerprint, kinds, pack, sources, trees
from treetune.core.data.prompts import Prompt
from treetune.core.rollout import builtin, stats
from treetune.core.rollout.group import Group
from treetune.core.rollout.reward_pool import Pool
from treetune.models import adapter, fetch, heads, identity

BUDGET = 4096  # tokens in one forward pass of a reward model


class Scorer(NamedTuple):
    """A reward model with its own tokenizer."""

    judge: score.Judge
    tokenizer: Any


class Rewards(NamedTuple):
    """What scores completions: its K names and weights, and how it is described.

    score(groups) -> float64 [P, G, K]; measure(groups) -> metrics of scored groups; check(prompts) refuses what nothing can score;
    close ends what was started.
    """

    names: tuple[str, ...]
    weights: list[float]
    described: list[str]
    score: Callable[[Sequence[Group]], np.ndarray]
    measure: Callable[[Sequence[Group]], dict[str, float]]
    check: Callable[[Sequence[Prompt]], None] = lambda prompts: None
    close: Callable[[], None] = lambda: None
    models: dict[str, str] = {}  # reward models, with fingerprints of their weights
    files: tuple[str, ...] = ()  # functions, as they were named


def described(options: RewardFunctions) -> list[str]:
    """Each reward with its weight."""
    return [f"{name} x {weight:g}" if weight != 1 else name for name, weight in zip(options.reward_funcs, weights(options), strict=True)]


def names(options: RewardFunctions) -> tuple[str, ...]:
    """How metrics and the screen name the rewards: by the function alone, or the whole name where two would be the same."""
    short = [
        re.split(r"[:./]", name.split("?")[0].rstrip("/"))[-1] if not is_model(name) else Path(name).name for name in options.reward_funcs
    ]
    return tuple(one if short.count(one) == 1 else full for one, full in zip(short, options.reward_funcs, strict=True))


def weights(options: RewardFunctions) -> list[float]:
    """A weight for each reward. Errors: ValueError when there are not as many as rewards, or one is no finite number."""
    if wrong := [weight for weight in options.reward_weights if not math.isfinite(weight)]:
        raise ValueError(f"reward_weights has {wrong[0]}, expected finite numbers")
    if options.reward_weights and len(options.reward_weights) != len(options.reward_funcs):
        raise ValueError(
            f"reward_weights has {len(options.reward_weights)} numbers for {len(options.reward_funcs)} rewards; give one for each"
        )
    return list(options.reward_weights) or [1.0] * len(options.reward_funcs)


def is_model(name: str) -> bool:
    """Whether a reward is a model: a folder that has no built-in's name, or an id owner/name that is no file."""
    if name.split("?")[0] in builtin.BUILTIN:
        return False
    return Path(name).is_dir() or (sources.HUB_ID.fullmatch(name) is not None and ":" not in name and not name.endswith(".py"))


def start(options: RewardFunctions, model: ModelOptions, *, on: torch.device, say: Callable[[str], None]) -> Rewards:
    """Load every reward and start the workers. Errors: ValueError for rewards that cannot be loaded."""
    wanted, factors = options.reward_funcs, weights(options)
    if not wanted or len(set(wanted)) != len(wanted):
        raise ValueError(f"reward_funcs is {sources.join_names(wanted)}: expected at least one reward, and none twice")
    models = {name: _scorer(name, model, on) for name in wanted if is_model(name)}
    functions = [name for name in wanted if name not in models]
    workers = {"workers": options.reward_num_workers, "timeout_s": options.reward_timeout}
    pool = Pool(functions, say=say, **workers) if functions else None

    def all_scores(groups: Sequence[Group]) -> np.ndarray:
        found = {name: model_scores(scorer, groups, on=on) for name, scorer in models.items()}
        if pool is not None:
            values = pool.score(groups)
            found |= {name: values[:, :, k] for k, name in enumerate(functions)}
        return np.stack([found[name] for name in wanted], axis=-1)

    measure = partial(stats.metrics, names=names(options), weights=factors)
    digests = {f"reward model {name}": _digest(scorer.judge) for name, scorer in models.items()}
    made = Rewards(names(options), factors, described(options), all_scores, measure, models=digests, files=tuple(functions))
    return made if pool is None else made._replace(check=pool.check, close=pool.close)


def _scorer(name: str, model: ModelOptions, on: torch.device) -> Scorer:
    path = name if (setup.adapter_folder(name) / adapter.CONFIG).is_file() else None
    inside = Path(name) / "model"
    base = adapter.base_of(setup.adapter_folder(name)) if path else str(inside) if (inside / "config.json").is_file() else name
    options = ModelOptions(model=base, dtype=model.dtype, device=model.device)
    tokenizer = setup.load_tokenizer(options, path)
    if path is None and heads.kind(fetch.resolve(base)) is None:
        raise ValueError(f"reward {name} is a model without a head that scores: expected a reward model, or module.function")
    return Scorer(score.load(options, path, tokenizer, on=on), tokenizer)


def _digest(judge: score.Judge) -> str:
    adapted = {} if judge.lora is None else {"lora": judge.lora.tree}
    return fingerprint.values(
        ckpt.leaf_digest({"model": judge.model.params, "head": judge.head} | adapted),
        judge.lora and judge.lora.scale,
        identity.settings(judge.model.family, judge.model.cfg),
    )


def model_scores(scorer: Scorer, groups: Sequence[Group], *, on: torch.device) -> np.ndarray:
    """A reward model's scores [P, G]: of whole answers, or the smallest probability that a step (a line) is good. nan: nothing to score."""
    size = len(groups[0].completions)
    rows = sources.from_list([_row(scorer, group, one.text) for group in groups for one in group.completions], "completions")
    out = np.full(len(rows.rows), np.nan)
    usable = [i for i, row in enumerate(rows.rows) if row is not None]
    if usable:
        docs = _documents(scorer, sources.take(rows, usable))
        sizes = [len(doc.tokens) for doc in docs]
        for part in pack.pack(sizes, max(BUDGET, *sizes), seed=None):
            found = score.scores(scorer.judge, [docs[i] for i in part], on=on)
            for i, values in zip(part, found, strict=True):
                out[docs[i].row - 1] = min(values)
    return np.where(np.isfinite(out), out, np.nan).reshape(len(groups), size)


def _row(scorer: Scorer, group: Group, text: str) -> dict | None:
    prompt = group.prompt.text if group.prompt.messages is None else group.prompt.messages
    if not text.strip():
        return None
    if scorer.judge.kind == "token":
        return {"prompt": prompt, "completions": [line for line in text.split("\n") if line.strip()]}
    return {"prompt": prompt, "completion": text if isinstance(prompt, str) else [{"role": "assistant", "content": text}]}


def _documents(scorer: Scorer, rows: sources.Rows) -> list[trees.TreeDoc]:
    if scorer.judge.kind == "token":
        judged = rows._replace(rows=[row | {"labels": [True] * len(row["completions"])} for row in rows.rows])
        return kinds.KINDS["steps"].encode(
            judged, scorer.tokenizer, format="stepwise_supervised", own={}, sequence_len=None, overlong="drop"
        )[0]
    form = score.SINGLE["prompt_completion"]
    return trees.encode_rows(rows, form.make(), scorer.tokenizer, name="prompt_completion", distinct=False)[0]


def advantage(options: PolicyLoss, factors: list[float], ranks: setup.Ranks) -> Callable[[np.ndarray], np.ndarray]:
    """Rewards [P, G, K] of this rank -> advantages [P, G]; what depends on other prompts sees those of all ranks."""
    estimate = online.advantages(options, factors)

    def fn(rewards: np.ndarray) -> np.ndarray:
        parts, mine = [rewards], 0
        if ranks.world > 1 and online.batch_wide(options):
            parts, mine = [None] * ranks.world, ranks.rank
            torch.distributed.all_gather_object(parts, rewards)
        found = estimate(torch.from_numpy(np.concatenate(parts))).numpy()
        start = sum(len(part) for part in parts[:mine])
        return found[start : start + len(rewards)]

    return fn
