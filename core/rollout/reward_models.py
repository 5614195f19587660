"""Reward models as rewards: completions become rows, rows documents, and documents scores.

P prompts, G completions of each.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from treetune.core import ckpt
from treetune.core.data import fingerprint, kinds, pack, row_formats, scored_rows, sources, trees
from treetune.core.data.rows import Row
from treetune.core.rollout.group import Group
from treetune.core.state import Params

BUDGET = 4096  # tokens in one forward pass


class RewardModel(NamedTuple):
    """A reward model, its tokenizer, and the fingerprint of its weights.

    scores: of some documents, for each the scores of its sequences, or of its steps where the model scores steps. most: passes of the
    rank that makes most of them, of those that compute the model together (a collective); idle makes one that nothing is used of.
    """

    scores: Callable[[list[trees.TreeDoc]], list[list[float]]]
    tokenizer: Any
    steps: bool
    digest: str
    most: Callable[[int], int] = int
    idle: Callable[[], None] = lambda: None


def of_head(forward: scored_rows.Forward, tokenizer: Any, *, read: str, weights: Params, settings: Sequence[Any]) -> RewardModel:
    """The reward model that `forward` runs. read: what its head scores, as of `pack.collate_trees`; settings: what else decides a score."""
    scores = partial(scored_rows.score_batch, forward=forward, read=read)
    return RewardModel(scores, tokenizer, read == "classes", fingerprint.values(ckpt.leaf_digest(weights), *settings))


def score(model: RewardModel, groups: Sequence[Group]) -> np.ndarray:
    """Scores [P, G] of whole answers, or the smallest probability that a step (a line) of one is good; nan: nothing to score."""
    size = len(groups[0].completions)
    rows = [_row(model, group, one.text) for group in groups for one in group.completions]
    values = np.full(len(rows), np.nan)
    usable, docs, parts = [i for i, row in enumerate(rows) if row is not None], [], []
    if usable:
        numbered = sources.from_list([row or {} for row in rows], "completions")
        docs = _documents(model, sources.take(numbered, usable))
        sizes = [len(doc.tokens) for doc in docs]
        parts = pack.pack(sizes, max(BUDGET, *sizes), seed=None)
    most = model.most(len(parts))  # before the first pass, in which all ranks take part
    for part in parts:
        for i, scores in zip(part, model.scores([docs[i] for i in part]), strict=True):
            values[docs[i].row - 1] = min(scores)
    for _ in range(most - len(parts)):
        model.idle()
    return np.where(np.isfinite(values), values, np.nan).reshape(len(groups), size)


def _row(model: RewardModel, group: Group, text: str) -> dict | None:
    """The row of a completion; None where there is nothing to score."""
    prompt = group.prompt.text if group.prompt.messages is None else group.prompt.messages
    if not text.strip():
        return None
    if model.steps:
        return {"prompt": prompt, "completions": [line for line in text.split("\n") if line.strip()]}
    if not isinstance(prompt, str):
        return {"prompt": prompt, "completion": [{"role": "assistant", "content": text}]}
    return {"prompt": prompt, "completion": text, "end": group.end if _is_token(group.end, model.tokenizer) else ""}


def _is_token(text: str, tokenizer: Any) -> bool:
    return bool(text) and tokenizer.convert_tokens_to_ids(text) not in (None, tokenizer.unk_token_id)


def _documents(model: RewardModel, rows: sources.Rows) -> list[trees.TreeDoc]:
    if model.steps:
        # The reader wants a judgement of each step; what it says is not read here.
        judged = rows._replace(rows=[row | {"labels": [True] * len(row["completions"])} for row in rows.rows])
        options = {"format": "stepwise_supervised", "format_options": {}, "sequence_len": None, "overlong": "drop"}
        return kinds.KINDS["steps"].encode(judged, model.tokenizer, **options)[0]
    answer = row_formats.of_kind("answers")["prompt_completion"].reader()

    def read(row: Row, location: str) -> trees.PromptReplies:
        # A model that was trained on conversations reads its score where a turn ends, which need not be an EOS.
        return answer(row, location)._replace(end=row.get("end") or "")

    return trees.encode_rows(rows, read, model.tokenizer, name="prompt_completion", distinct=False)[0]
