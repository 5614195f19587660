"""Rewards of structured energy-based fine-tuning: features of a frozen network that sampled replies share with true ones.

P prompts, n completions of each, B sequences in a stream, D features. Columns of a prompt are those of `core.data.ebft_rows`.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from treetune.core.data import trees
from treetune.core.data.prompts import Prompt
from treetune.core.rollout import stats
from treetune.core.rollout.documents import Collate
from treetune.core.rollout.group import Completion, Group
from treetune.core.rollout.rewards import Rewards
from treetune.core.state import Batch, Plan

NAMES = ("alignment", "diversity", "cfm")  # the third weighs nothing: it is the same for all completions of a prompt
KEPT = 4096  # prompts whose true features are remembered


Truth = tuple[bytes, bytes]  # ids of a prompt and of its true reply


class Features(Protocol):
    """Features of the sequences of a stream."""

    def __call__(self, batch: Batch, plan: Plan, lens: Tensor, at: Tensor, prompt_lens: Tensor, /) -> Tensor:
        """[B, D] of sequences of lens [B] rows, at [N] in turn, of which the first prompt_lens [B] are a prompt."""
        ...


class FeatureScorer(NamedTuple):
    """How completions are scored.

    features: the network. compare(phi [P, n, D], y [P, D]): the rewards NAMES [P, n, 3]. ends: ids that end a text. micro_batch_size:
    prompts that are read at a time. most: passes of the rank that makes most of them, of those that compute the network together (a
    collective); idle makes one that nothing is used of.
    """

    features: Features
    collate: Collate
    compare: Callable[[Tensor, Tensor], Tensor]
    ends: set[int]
    micro_batch_size: int
    device: torch.device
    most: Callable[[int], int] = int
    idle: Callable[[], None] = lambda: None


class _Sequences(NamedTuple):
    """Sequences of a stream in turn: their rows, how many each has, and how many of these are its prompt."""

    at: list[int]
    lens: list[int]
    prompt_lens: list[int]


def build(settings: FeatureScorer, alignment_coef: float, diversity_coef: float, *, described: str) -> Rewards:
    """What scores completions by a frozen network; described: what is compared."""
    weights = [alignment_coef, -diversity_coef, 0.0]
    text = f"{alignment_coef:g} x alignment - {diversity_coef:g} x diversity ({described})"
    return Rewards(NAMES, weights, [text], scorer(settings), partial(measure, weights=weights))


def measure(groups: Sequence[Group], weights: list[float]) -> dict[str, float]:
    """Metrics of scored groups, also under the names of the documents; alignment and diversity hold their factor 2."""
    metrics = stats.metrics(groups, NAMES, weights)
    named = {f"ebft/{name}": metrics[f"rewards/{name}/mean"] for name in ("alignment", "diversity")}
    named |= {"ebft/cfm_loss": metrics["rewards/cfm/mean"], "ebft/reward": metrics["reward"]}
    return {name: value for name, value in metrics.items() if not name.startswith("rewards/cfm/")} | named


def scorer(settings: FeatureScorer) -> Callable[[Sequence[Group]], np.ndarray]:
    """score(groups) -> alignment, diversity and cfm [P, n, 3].

    Features of the truth are made one prompt at a time, so that what is remembered of them changes no bit of a result.
    """
    known: dict[Truth, Tensor] = {}
    micro, ends = settings.micro_batch_size, settings.ends

    @torch.no_grad()
    def score(groups: Sequence[Group]) -> np.ndarray:
        pooled = partial(_pooled, settings)
        first = _first_equal(groups, ends)
        parts = [slice(i, i + micro) for i in range(0, len(groups), micro)]
        truths = {_truth(group.prompt): group.prompt for group in groups}
        fresh = {key: prompt for key, prompt in truths.items() if key not in known}
        own = len(parts) + len(fresh)
        most = settings.most(own)  # before the first pass, in which all ranks take part
        phi = torch.cat([_completions(pooled, groups[part], first[part], ends) for part in parts])
        read = {key: _of_truth(pooled, prompt) for key, prompt in fresh.items()}
        for _ in range(most - own):
            settings.idle()
        y = torch.stack([(known | read)[_truth(group.prompt)] for group in groups]).to(settings.device)
        _remember(known, read)
        columns = settings.compare(with_truth(phi, y, groups, ends), y)
        return columns.cpu().numpy()[np.arange(len(groups))[:, None], first]

    return score


def written(completion: Completion, ends: set[int]) -> np.ndarray:
    """The ids that are compared: all but the token that ended the text."""
    ids = completion.tokens
    return ids[:-1] if len(ids) and int(ids[-1]) in ends else ids


def with_truth(phi: Tensor, y: Tensor, groups: Sequence[Group], ends: set[int]) -> Tensor:
    """The features [P, n, D] with the truth's [P, D] for completions of its very ids: two passes round differently."""
    rows = [[np.array_equal(written(one, ends), group.prompt.columns["truth"]) for one in group.completions] for group in groups]
    return torch.where(torch.tensor(rows, device=phi.device)[:, :, None], y[:, None], phi)


def _first_equal(groups: Sequence[Group], ends: set[int]) -> np.ndarray:
    """The first completion of the same ids, for each [P, n]: rounding must not tell apart what is the same."""
    texts = [[written(one, ends).tobytes() for one in group.completions] for group in groups]
    return np.array([[row.index(text) for text in row] for row in texts])


def _completions(pooled: Callable, groups: Sequence[Group], first: np.ndarray, ends: set[int]) -> Tensor:
    """Features of the completions [P, n, D]: each prompt runs once, and completions that are alike (`first` [P, n]) as one."""
    docs, index, sequences, start = [], [], _Sequences([], [], []), 0
    for group, alike in zip(groups, first.tolist(), strict=True):
        chosen = sorted(set(alike))
        texts = [written(group.completions[j], ends) for j in chosen]
        index += [len(sequences.lens) + chosen.index(j) for j in alike]
        docs.append(trees.grow(group.prompt.tokens, [(ids, np.zeros(len(ids))) for ids in texts if len(ids)], row=group.prompt.row))
        start = _lay(sequences, start, len(group.prompt.tokens), [len(ids) for ids in texts])
    features = pooled(docs, sequences)
    return features[torch.tensor(index, device=features.device)].view(len(groups), -1, features.shape[1])


def _lay(sequences: _Sequences, start: int, prompt: int, sizes: list[int]) -> int:
    """Adds the sequences of a document at `start`, its prompt with each of its branches; returns where it ends."""
    place = start + prompt
    for size in sizes:
        sequences.at.extend([*range(start, start + prompt), *range(place, place + size)])
        sequences.lens.append(prompt + size)
        sequences.prompt_lens.append(prompt)
        place += size
    return place


def _truth(prompt: Prompt) -> Truth:
    return prompt.tokens.tobytes(), prompt.columns["truth"].tobytes()


def _of_truth(pooled: Callable, prompt: Prompt) -> Tensor:
    """Features of the prompt's truth [D], in main memory."""
    doc = trees.grow(np.concatenate([prompt.tokens, prompt.columns["truth"]]), [], row=prompt.row)
    size = len(doc.tokens)
    return pooled([doc], _Sequences(list(range(size)), [size], [len(prompt.tokens)]))[0].cpu()


def _remember(known: dict[Truth, Tensor], read: dict[Truth, Tensor]) -> None:
    """Add what was read, in place of the oldest where there is too much."""
    known |= read
    for key in list(known)[: max(len(known) - KEPT, 0)]:
        del known[key]


def _pooled(settings: FeatureScorer, docs: list[trees.TreeDoc], sequences: _Sequences) -> Tensor:
    """Features [B, D] of sequences in the stream of the documents."""
    batch, plan = settings.collate(docs)
    at, lens, prompt_lens = (torch.tensor(values, device=settings.device) for values in sequences)
    return settings.features(batch, plan, lens, at, prompt_lens)
