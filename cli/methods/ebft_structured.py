"""Structured mode of `treetune ebft`: the run of `treetune grpo`, whose rewards are features that sampled replies share with true ones.

P prompts, n completions of each, D features.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from treetune.cli.methods import ebft_features, policy_gradient
from treetune.cli.methods.ebft import Ebft
from treetune.cli.methods.method import Parts, RolloutParts, Setting
from treetune.cli.options import online
from treetune.core import shard, tree
from treetune.core.data import ebft_rows, pack, trees
from treetune.core.data.prompts import Prompt
from treetune.core.rollout import stats, turns
from treetune.core.rollout.group import Completion, Group
from treetune.core.rollout.rewards import Rewards
from treetune.core.rollout.sampler import Rollout
from treetune.core.run import evaluation
from treetune.core.state import Logprob, Params, TrainState
from treetune.losses import sft_objective
from treetune.models import feature_network
from treetune.models import policy as policies
from treetune.models.batches import batcher
from treetune.models.dense import Config
from treetune.models.feature_network import FeatureNetwork
from treetune.models.policy import Policy

NAMES = ("alignment", "diversity", "cfm")  # the third weighs nothing: it is the same for all completions of a prompt
KEPT = 4096  # prompts whose true features are remembered


def parts(config: Ebft, policy: Policy, setting: Setting) -> Parts:
    """A frozen network that scores, lengths after the truth, turns that go on, the truth's likelihood."""
    options, rollout, data = config.ebft, config.rollout, setting.data
    _check_fits(config, data.train + data.val, policy.cfg)
    network = ebft_features.build(options, policy)
    ends = {*setting.stop_ids, *rollout.stop_token_ids}
    talks = any(prompt.columns["between"] for prompt in data.train + data.val)

    def wrap(play: Rollout) -> Rollout:
        play = turns.adaptive(play, options.gt_length_multiplier) if options.adaptive_max_tokens else play
        return turns.multi_turn(play, rollout.max_completion_length) if talks else play

    def rollouts(logprob: Logprob) -> RolloutParts:
        return RolloutParts(
            logprob,
            lambda placed: rewards(config, network, placed, ends, setting),
            wrap,
            true_reply if options.ce_coef else None,
            rollout.num_generations,
            lambda placed: held_out_truth(placed, data.val, config.optim.micro_batch_size, setting),
        )

    return policy_gradient.build(config, network.policy, setting, rollouts, ce_coef=options.ce_coef)


def _check_fits(config: Ebft, prompts: list[Prompt], cfg: Config) -> None:
    """Errors: ValueError when a conversation fits neither the model nor the server that it is sampled on, or ids are not the model's."""
    engine, rollout, limit, limit_of = config.engine, config.rollout, cfg.max_positions, "the model"
    if engine.use_vllm and engine.vllm_mode == "managed" and (served := engine.vllm_max_model_len or online.longest(config)) < limit:
        limit, limit_of = served, "the server (vllm_max_model_len)"
    ebft_rows.check_fits(
        prompts,
        max_completion_length=rollout.max_completion_length,
        limit=limit,
        limit_of=limit_of,
        vocab_size=cfg.vocab_size,
        stop_ids=rollout.stop_token_ids,
        custom_rollout=rollout.rollout_func is not None,
    )


def true_reply(prompt: Prompt) -> tuple[np.ndarray, np.ndarray]:
    """Tokens of the true conversation after the prompt, and the weights of those that are replies."""
    return prompt.columns["truth"], prompt.columns["replies"].astype(np.float32)


def held_out_truth(policy: Policy, val: list[Prompt], micro_batch_size: int, setting: Setting) -> Callable[[TrainState], dict[str, Tensor]]:
    """state -> the cross-entropy of the true replies to held-out prompts, which feature matching must not raise."""
    objective = sft_objective.named(policies.logprob(policy))
    collate = batcher(policy.cfg, setting.device, (pack.collate,))
    documents = [ebft_rows.document(prompt) for prompt in val]
    evaluate = evaluation.of_documents(objective, documents, collate, {"rows": micro_batch_size}, ranks=setting.ranks)
    assert evaluate is not None
    return lambda state: {"ebft/ce_loss": evaluate(state)["loss"]}


def rewards(config: Ebft, network: FeatureNetwork, policy: Policy, ends: set[int], setting: Setting) -> Rewards:
    """What scores completions by the frozen network."""
    options = config.ebft
    weights = [options.alignment_coef, -options.diversity_coef, 0.0]
    collate = batcher(policy.cfg, setting.device, (pack.collate_trees,))
    score = scorer(config, network.phi, policy.frozen, collate, ends, setting.device)
    layers = ", ".join(f"{depth:g}" for depth in options.feature_layers)
    whitened = f", whitened over {options.whitening_space}" if options.use_whitening else ""
    text = f"{options.alignment_coef:g} x alignment - {options.diversity_coef:g} x diversity"
    text += f" ({options.embed_method} of layers {layers}{whitened})"
    return Rewards(NAMES, weights, [text], score, partial(measure, weights=weights))


def measure(groups: Sequence[Group], weights: list[float]) -> dict[str, float]:
    """Metrics of scored groups, also under the names of the documents; alignment and diversity hold their factor 2."""
    found = stats.metrics(groups, NAMES, weights)
    own = {f"ebft/{name}": found[f"rewards/{name}/mean"] for name in ("alignment", "diversity")}
    own |= {"ebft/cfm_loss": found["rewards/cfm/mean"], "ebft/reward": found["reward"]}
    return {name: value for name, value in found.items() if not name.startswith("rewards/cfm/")} | own


def scorer(
    config: Any, network: Callable, frozen: Params, make: Callable, ends: set[int], on: torch.device
) -> Callable[[Sequence[Group]], np.ndarray]:
    """score(groups) -> alignment, diversity and cfm [P, n, 3], with the frozen trees of the run.

    Features of the truth are made one prompt at a time, so that what is remembered of them changes no bit of a result.
    """
    known: dict[tuple[bytes, bytes], Tensor] = {}
    micro = config.optim.micro_batch_size

    @torch.no_grad()
    def score(groups: Sequence[Group]) -> np.ndarray:
        # Shards are gathered here, once: how often the network runs depends on the rank's own prompts.
        whole = {name: tree.map(shard.full, frozen[name]) for name in ("model", feature_network.COPY) if name in frozen}
        phi = partial(network, whole)
        first = _first_alike(groups, ends)
        parts = [slice(i, i + micro) for i in range(0, len(groups), micro)]
        found = [_completions(phi, make, groups[part], first[part], ends, on) for part in parts]
        y = torch.stack([_remembered(known, phi, make, group.prompt, on) for group in groups])
        said = ebft_features.scores(config.ebft, _as_truth(torch.cat(found), y, groups, ends), y)
        columns = torch.stack([said.alignment, said.diversity, said.cfm[:, None].expand_as(said.alignment)], -1)
        return columns.cpu().numpy()[np.arange(len(groups))[:, None], first]

    return score


def written(one: Completion, ends: set[int]) -> np.ndarray:
    """The ids that are compared: all but the token that ended the text."""
    return one.tokens[:-1] if len(one.tokens) and int(one.tokens[-1]) in ends else one.tokens


def _first_alike(groups: Sequence[Group], ends: set[int]) -> np.ndarray:
    """The first completion of the same ids, for each [P, n]: rounding must not tell apart what is the same."""
    texts = [[written(one, ends).tobytes() for one in group.completions] for group in groups]
    return np.array([[row.index(text) for text in row] for row in texts])


def _as_truth(found: Tensor, y: Tensor, groups: Sequence[Group], ends: set[int]) -> Tensor:
    """The features [P, n, D] with the truth's [P, D] for completions of its very ids: two passes round differently."""
    rows = [[np.array_equal(written(one, ends), group.prompt.columns["truth"]) for one in group.completions] for group in groups]
    return torch.where(torch.tensor(rows, device=found.device)[:, :, None], y[:, None], found)


def _completions(phi: Callable, make: Callable, groups: Sequence[Group], first: np.ndarray, ends: set[int], on: torch.device) -> Tensor:
    """Features of the completions [P, n, D]: each prompt runs once, and completions that are alike (`first` [P, n]) as one."""
    docs, index, rows, start = [], [], ([], [], []), 0
    for group, alike in zip(groups, first.tolist(), strict=True):
        chosen = sorted(set(alike))
        texts = [written(group.completions[j], ends) for j in chosen]
        index += [len(rows[1]) + chosen.index(j) for j in alike]
        docs.append(trees.grow(group.prompt.tokens, [(ids, np.zeros(len(ids))) for ids in texts if len(ids)], row=group.prompt.row))
        start = _lay(rows, start, len(group.prompt.tokens), [len(ids) for ids in texts])
    found = _pooled(phi, make, docs, rows, on)
    return found[torch.tensor(index, device=on)].view(len(groups), -1, found.shape[1])


def _lay(rows: tuple[list, list, list], start: int, prompt: int, sizes: list[int]) -> int:
    """Adds to `rows` (of `_pooled`) the sequences of a document at `start`: its prompt with each of its branches; where it ends."""
    at, lens, asked = rows
    place = start + prompt
    for size in sizes:
        at += [*range(start, start + prompt), *range(place, place + size)]
        lens.append(prompt + size)
        asked.append(prompt)
        place += size
    return place


def _remembered(known: dict, phi: Callable, make: Callable, prompt: Prompt, on: torch.device) -> Tensor:
    """Features of the prompt's truth [D], from main memory or made now."""
    key = (prompt.tokens.tobytes(), prompt.columns["truth"].tobytes())
    if key not in known:
        doc = trees.grow(np.concatenate([prompt.tokens, prompt.columns["truth"]]), [], row=prompt.row)
        size = len(doc.tokens)
        made = _pooled(phi, make, [doc], (list(range(size)), [size], [len(prompt.tokens)]), on)[0]
        while len(known) >= KEPT:
            known.pop(next(iter(known)))
        known[key] = made.cpu()
    return known[key].to(on)


def _pooled(phi: Callable, make: Callable, docs: list[trees.TreeDoc], rows: tuple[list, list, list], on: torch.device) -> Tensor:
    """Features [B, D] of sequences: their rows in the stream of the documents, how many each has, and how many of these are its prompt."""
    batch, plan = make(docs)
    at, lens, asked = (torch.tensor(values, device=on) for values in rows)
    return phi(batch, plan, feature_network.sequence_rows(lens, at, asked))
