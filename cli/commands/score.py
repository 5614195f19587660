"""`treetune score`: scores of answers by a reward model, pairs included, or of steps by a process reward model."""

import json
import math
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from treetune.cli import checks, corpus, rundir, setup
from treetune.cli.errors import RunFailed, checking_input
from treetune.cli.options.commands import Score
from treetune.cli.options.model import ModelOptions
from treetune.cli.screen import Screen, peak_memory_gib
from treetune.core import fields
from treetune.core.data import pack, scored_rows, sources, trees
from treetune.core.data.scored_rows import Encoding, ScoredRows, Values
from treetune.models import adapter, reward_model
from treetune.models.reward_model import RewardModel


def run(config: Score, given: frozenset[str]) -> int:
    """Score, print, and write; the exit code."""
    screen = Screen()
    with checking_input():
        options, path = _named(config)
        device = setup.device(config.device)
        tokenizer = setup.load_tokenizer(options, path, say=screen.line)
        judge = load(options, path, on=device, say=screen.line)
        data = _read(config, tokenizer, judge, given)
    start, values = time.perf_counter(), []
    for scored in data:
        screen.line(scored.line)
        values.append(_score(scored, judge, config, device, screen))
    seconds = time.perf_counter() - start
    for scored, part in zip(data, values, strict=True):
        _show(scored, part, config.show, screen)
    tokens = sum(sum(corpus.lengths(scored.docs)) for scored in data)
    rows = {"model": setup.pair_name(options, path)}
    rows["speed"] = f"{tokens / seconds:.0f} tokens/s, peak memory {peak_memory_gib(device):.1f} GiB"
    if config.output is not None:
        records = [record for scored, part in zip(data, values, strict=True) for record in scored_rows.records(scored, part)]
        with checking_input():
            lines = [json.dumps(record, ensure_ascii=False, default=str) + "\n" for record in records]
            rows["saved"] = str(rundir.write_new(Path(config.output), "".join(lines)))
    screen.table("", rows)
    return 0


def _read(config: Score, tokenizer: Any, judge: RewardModel, given: frozenset[str]) -> list[ScoredRows]:
    """The data sets as documents. Errors: ValueError naming file, row and fix; BadInput for options that would be ignored."""
    data, encoding = [], Encoding(config.sequence_len, config.overlong, config.chat_template, config.step_separator)
    for path in config.data:
        with fields.reading(path):
            rows = sources.read(path, split=config.split, limit=config.max_rows)
        data.append(scored_rows.encode(rows, scored_rows.detect(rows, config.format, steps=judge.kind == "token"), tokenizer, encoding))
    used = {option for scored in data for option in scored_rows.options(scored.format, scored.rows)}
    reason = f"rows of format {', '.join(sorted({scored.format for scored in data}))} do not take it"
    checks.refuse_unused(given, {name: reason for name in ("chat_template", "step_separator") if name not in used})
    for scored in data:
        corpus.check_fits(scored.docs, config.sequence_len, judge.model.cfg)
        if config.output is not None and (taken := [name for name in scored_rows.COLUMNS if name in sources.columns(scored.rows)]):
            raise ValueError(f"{scored.rows.name} has a column {taken[0]} already, which --output would write over: rename it")
    return data


def _score(scored: ScoredRows, judge: RewardModel, config: Score, device: torch.device, screen: Screen) -> Values:
    budget = max(config.micro_batch_size * config.sequence_len, *corpus.lengths(scored.docs))
    forward = partial(scores, judge, on=device, pad_to=budget if device.type == "cuda" else None)
    with screen.counting("rows") as progress:
        values = scored_rows.score(scored.docs, forward, budget=budget, progress=progress)
    if not all(math.isfinite(value) for row in values for value in row):
        raise RunFailed("the model gives scores that are not finite: try --dtype float32")
    return values


def _show(scored: ScoredRows, values: Values, count: int, screen: Screen) -> None:
    for doc, value in list(zip(scored.docs, values, strict=True))[:count]:
        place = sources.locate_row(scored.rows, scored.rows.numbers.index(doc.row))
        screen.line(f"  {place}: {' '.join(f'{score:.4f}' for score in value)}")
    screen.table("", {"rows": scored.rows.name} | scored_rows.describe(scored, values))


def _named(config: Score) -> tuple[ModelOptions, str | None]:
    """The (base) model, and the adapter that goes on it, of what the user named; a MODEL may be an adapter or a run too."""
    name, path = config.model, config.adapter
    if name is None and path is None:
        raise ValueError("nothing to score with: name a reward model, or a run folder that holds one")
    if not config.data:
        raise ValueError("nothing to score: give --data at least one file or data set")
    if path is None and (setup.adapter_folder(name) / adapter.CONFIG).is_file():
        name, path = None, name
    elif name is not None and not (Path(name) / "config.json").exists() and (Path(name) / "model").is_dir():
        name = str(Path(name) / "model")
    base = name or adapter.base_of(setup.adapter_folder(path))
    if not base:
        raise ValueError(f"{path} names no base model: give one before --adapter")
    return ModelOptions(model=base, revision=config.revision, dtype=config.dtype, device=config.device), path


def load(options: ModelOptions, path: str | None, *, on: torch.device, say: Callable = lambda line: None) -> RewardModel:
    """The reward model that the options name: a model with its own head, or with the adapter and the head in a folder."""
    return reward_model.load(options.model, adapter_path=path, revision=options.revision, dtype=options.dtype, device=on, say=say)


def scores(judge: RewardModel, docs: Sequence[trees.TreeDoc], *, on: torch.device, pad_to: int | None = None) -> list[list[float]]:
    """For each document the score of each sequence (its branches, or itself), or the probability that each step is good."""
    batch = pack.collate_trees(docs, read=reward_model.READ[judge.kind], budget=pad_to, pad=pad_to is not None)
    return reward_model.scores(judge, batch, documents=len(docs), device=on)
