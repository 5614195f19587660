"""`treetune score`: scores of answers by a reward model, pairs included, or of steps by a process reward model."""

import json
import math
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch

from treetune.cli.options.commands import Score
from treetune.cli.screen import Screen
from treetune.core.config import checks, table
from treetune.core.data import dataset, scored_rows
from treetune.core.data.scored_rows import ScoredRows, Values
from treetune.core.run import folder, memory
from treetune.core.run.errors import RunFailed, checking_input
from treetune.models import loading, reward_model, target
from treetune.models.reward_model import RewardModel


def run(config: Score, given: frozenset[str]) -> int:
    """Score, print, and write; the exit code."""
    screen = Screen()
    with checking_input():
        if config.model is None and config.adapter is None:
            raise ValueError("nothing to score with: name a reward model, or a run folder that holds one")
        if not config.data:
            raise ValueError("nothing to score: give --data at least one file or data set")
        name, path = reward_model.locate(config.model, config.adapter)
        device = loading.select_device(config.device)
        chosen = target.Target(name, config.revision, config.dtype, config.device, path)
        tokenizer = target.load_tokenizer(chosen, say=screen.line)
        model = reward_model.load(chosen, say=screen.line)
        data = _read(config, tokenizer, model, given)
    start, values = time.perf_counter(), []
    for scored in data:
        screen.line(scored.line)
        values.append(_score(scored, model, config, device, screen))
    seconds = time.perf_counter() - start
    for scored, part in zip(data, values, strict=True):
        for line in scored_rows.lines(scored, part, config.show):
            screen.line(line)
        screen.table("", {"rows": scored.rows.name} | scored_rows.describe(scored, part))
    tokens = sum(sum(dataset.lengths(scored.docs)) for scored in data)
    speed = f"{tokens / seconds:.0f} tokens/s, peak memory {memory.peak_gib(device):.1f} GiB"
    rows = {"model": chosen.name, "speed": speed}
    if config.output is not None:
        records = [record for scored, part in zip(data, values, strict=True) for record in scored_rows.records(scored, part)]
        with checking_input():
            lines = [json.dumps(record, ensure_ascii=False, default=str) + "\n" for record in records]
            rows["saved"] = str(folder.write_new(Path(config.output), "".join(lines)))
    screen.table("", rows)
    return 0


def _read(config: Score, tokenizer: Any, model: RewardModel, given: frozenset[str]) -> list[ScoredRows]:
    """The data sets as documents. Errors: ValueError naming file, row and fix; BadInput for options that would be ignored."""
    settings, refuse = table.record(scored_rows.Settings, config), partial(checks.refuse_unused, given)
    data = scored_rows.read(settings, tokenizer, steps=model.kind == "token", refuse=refuse)
    sizes = {"vocab_size": model.model.cfg.vocab_size, "max_positions": model.model.cfg.max_positions}
    for scored in data:
        dataset.check_fits(scored.docs, config.sequence_len, **sizes)
        if config.output is not None:
            scored_rows.check_columns(scored.rows)
    return data


def _score(scored: ScoredRows, model: RewardModel, config: Score, device: torch.device, screen: Screen) -> Values:
    budget = max(config.micro_batch_size * config.sequence_len, *dataset.lengths(scored.docs))
    forward, read = partial(reward_model.scores, model, device=device), reward_model.READ[model.kind]
    with screen.counting("rows") as progress:
        values = scored_rows.score(scored.docs, forward, read=read, budget=budget, pad=device.type == "cuda", progress=progress)
    if not all(math.isfinite(value) for row in values for value in row):
        raise RunFailed("the model gives scores that are not finite: try --dtype float32")
    return values
