"""`treetune score`: scores of answers by a reward model, pairs included, or of steps by a process reward model."""

import json
import math
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

from treetune.cli import bases, checks, corpus, rundir, setup
from treetune.cli.errors import RunFailed, checking_input
from treetune.cli.options.commands import Score
from treetune.cli.options.model import ModelOptions
from treetune.cli.screen import Screen, peak_memory_gib
from treetune.core import check, fields, tree
from treetune.core.data import pack, scored_rows, sources, trees
from treetune.core.data.scored_rows import Encoding, ScoredRows, Values
from treetune.core.lora import Lora
from treetune.core.state import Params
from treetune.models import Model, adapter, fetch, heads, resize
from treetune.ops import attention

READ = {"sequence": "last", "token": "classes"}
CLASSES = {"sequence": 1, "token": 2}


class Judge(NamedTuple):
    """A model with a head that scores sequences, or that tells good tokens from bad ones."""

    model: Model
    lora: Lora | None
    head: Params
    kind: str


def run(config: Score, given: frozenset[str]) -> int:
    """Score, print, and write; the exit code."""
    screen = Screen()
    with checking_input():
        options, path = _named(config)
        device = setup.device(config.device)
        tokenizer = setup.load_tokenizer(options, path, say=screen.line)
        judge = load(options, path, tokenizer, on=device, say=screen.line)
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


def _read(config: Score, tokenizer: Any, judge: Judge, given: frozenset[str]) -> list[ScoredRows]:
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


def _score(scored: ScoredRows, judge: Judge, config: Score, device: torch.device, screen: Screen) -> Values:
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


def load(options: ModelOptions, path: str | None, tokenizer: Any, *, on: torch.device, say: Callable = lambda line: None) -> Judge:
    """The model that an option names with its own head, or with the adapter and the head in a folder.

    Raises ValueError where there is no head, one of other classes than it should have, or weights that are not finite.
    """
    found = fetch.resolve(options.model, say=say, revision=options.revision)
    used, head = None, None
    if heads.kind(found) is not None:
        with fields.reading(f"the model {found}"):
            model, head = heads.load(found, dtype=setup.compute_dtype(options.dtype, on), device=on)
    elif path is None:
        raise ValueError(f"{options.model} has no head that scores: expected a reward model, or --adapter with the folder of one")
    else:
        model, _ = setup.load_model(options, on=on, say=say)
    if path is not None:
        bases.check(path, bases.base_of(options, model), say=say)
        model = _sized(model, path, tokenizer)
        with fields.reading(f"the adapter {path}"):
            used, whole, head, _ = heads.load_adapter(setup.adapter_folder(path), model)
        model = model._replace(params=tree.merge(model.params, whole))
    judge = Judge(model, used, head, heads.kind_of(head))
    _check(judge, setup.pair_name(options, path))
    return judge


def _sized(model: Model, path: str, tokenizer: Any) -> Model:
    """The model with the vocabulary rows that an adapter was trained with."""
    rows = adapter.rows(setup.adapter_folder(path), model.family)
    if rows is None:
        return resize.resize(model, len(tokenizer)) if setup.has_tokenizer(path) else model
    return resize.resize(resize.cut(model, rows), rows)


def _check(judge: Judge, name: str) -> None:
    classes = judge.head["score"]["weight"].shape[0]
    if classes != CLASSES[judge.kind]:
        what = "one score" if judge.kind == "sequence" else "two classes, bad and good"
        raise ValueError(f"the head of {name} has {classes} classes; expected {what}")
    adapted = {} if judge.lora is None else judge.lora.tree
    if bad := check.not_finite({"model": judge.model.params, "lora": adapted, "head": judge.head}):
        raise ValueError(f"{name} holds weights that are not finite: {', '.join(bad[:3])}; train or download the model again")


@torch.no_grad()
def scores(judge: Judge, docs: Sequence[trees.TreeDoc], *, on: torch.device, pad_to: int | None = None) -> list[list[float]]:
    """For each document the score of each sequence (its branches, or itself), or the probability that each step is good."""
    batch = pack.collate_trees(docs, read=READ[judge.kind], budget=pad_to, pad=pad_to is not None)
    counts = torch.zeros(len(docs), dtype=torch.int64).index_add(0, batch["doc_of_seq"], batch["seq_lens"]).tolist()
    model = judge.model
    plan = attention.plan(batch, window=model.cfg.window, device=on, dtype=model.cfg.dtype)
    batch = {key: value.to(on) for key, value in batch.items()}
    found = heads.scores(model.family, model.cfg, model.params, judge.head, batch, plan, lora=judge.lora)  # [N, C]
    flat = found[:, 0] if judge.kind == "sequence" else found.softmax(-1)[:, 1]
    return [part.tolist() for part in flat.cpu().split(counts)]
