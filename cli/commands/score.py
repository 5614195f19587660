"""`treetune score`: scores of answers by a reward model, pairs included, or of steps by a process reward model."""

import json
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import fmean, pstdev
from typing import Any, NamedTuple

import torch

from treetune.cli import bases, corpus, parse, rundir, setup
from treetune.cli.configs import Score
from treetune.cli.errors import RunFailed, checking_input
from treetune.cli.options.shared import ModelOptions
from treetune.cli.screen import Screen, peak_memory_gib
from treetune.core import check, fields, tree
from treetune.core.data import kinds, pack, preference, reward, sources, trees, turns, unpaired
from treetune.core.lora import Lora
from treetune.core.state import Params
from treetune.models import Model, adapter, fetch, heads, resize
from treetune.ops import attention

READ = {"sequence": "last", "token": "classes"}
CLASSES = {"sequence": 1, "token": 2}
FIELDS = ("score", "chosen_score", "rejected_score", "step_scores")  # what a row is given in the output


class Judge(NamedTuple):
    """A model with a head that scores sequences, or that tells good tokens from bad ones."""

    model: Model
    lora: Lora | None
    head: Params
    kind: str


class Part(NamedTuple):
    """The rows of one data set and the documents that they became; `labelled` when the classes of steps are known."""

    rows: sources.Rows
    format: str
    docs: list[trees.TreeDoc]
    line: str
    labelled: bool


def run(config: Score, given: frozenset[str]) -> int:
    """Score, print, and write; the exit code."""
    screen = Screen()
    with checking_input():
        options, path = _named(config)
        on = setup.device(config.device)
        tokenizer = setup.load_tokenizer(options, path, say=screen.line)
        judge = load(options, path, tokenizer, on=on, say=screen.line)
        parts = read(config, tokenizer, judge, given)
    start, found = time.perf_counter(), []
    for part in parts:
        screen.line(part.line)
        found.append(_scored(part, judge, config, on, screen))
    seconds = time.perf_counter() - start
    for part, values in zip(parts, found, strict=True):
        for doc, value in list(zip(part.docs, values, strict=True))[: config.show]:
            screen.line(f"  {sources.where(part.rows, part.rows.numbers.index(doc.row))}: {' '.join(f'{one:.4f}' for one in value)}")
        screen.table("", {"rows": part.rows.name} | _summary(part, values))
    tokens = sum(sum(corpus.lengths(part.docs)) for part in parts)
    ending = {"speed": f"{tokens / seconds:.0f} tokens/s, peak memory {peak_memory_gib(on):.1f} GiB"}
    if config.output is not None:
        with checking_input():
            ending["saved"] = str(_write(Path(config.output), parts, found))
    screen.table("", {"model": setup.pair_name(options, path)} | ending)
    return 0


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


def _conversation(row: dict, where: str) -> trees.Sides:
    history, reply = turns.dialogue(row.get("messages"), f"{where}: field messages")
    return trees.Sides(turns.introduced(history, row, where), (reply,), {})


def _answer(row: dict, where: str) -> trees.Sides:
    """Prompt and completion as in unpaired rows, judged or not."""
    return unpaired.answer(row, where)


SINGLE = {
    "prompt_completion": trees.Form(("prompt", "completion"), preference.fixed(_answer)),
    "messages": trees.Form(("messages",), preference.fixed(_conversation)),
}


def read(config: Score, tokenizer: Any, judge: Judge, given: frozenset[str]) -> list[Part]:
    """The data sets as documents. Errors: ValueError naming file, row and fix; BadInput for options that would be ignored."""
    parts = []
    for path in config.data:
        with fields.reading(path):
            rows = sources.read(path, split=config.split, limit=config.max_rows)
        parts.append(_part(rows, _format(rows, config.format, judge.kind), config, tokenizer))
    taken = {option for part in parts for option in _takes(part.format, part.rows)}
    names = ", ".join(sorted({part.format for part in parts}))
    said = f"rows of format {names} do not take it"
    parse.refuse_ignored(given, {name: said for name in ("chat_template", "step_separator") if name not in taken})
    for part in parts:
        corpus.check_fits(part.docs, config.sequence_len, judge.model.cfg)
        if config.output is not None and (there := [name for name in FIELDS if name in sources.columns(part.rows)]):
            raise ValueError(f"{part.rows.name} has a column {there[0]} already, which --output would write over: rename it")
    return parts


def _format(rows: sources.Rows, named: str, kind: str) -> str:
    """The format of some rows for a head of this kind, as named or by their columns. Errors: ValueError when it does not fit."""
    columns = set(sources.columns(rows))
    listed = sources.listed(sources.columns(rows))
    if kind == "token":
        if named not in ("auto", *reward.STEPS) or not {"prompt", "completions"} <= columns:
            said = f"the columns {listed}" if named in ("auto", *reward.STEPS) else f"format {named}"
            raise ValueError(f"{rows.name} has {said}: a process reward model scores rows of prompt + completions, a text for each step")
        return "stepwise_supervised"
    if named != "auto":
        return named if named in SINGLE else kinds.KINDS["ranked"].canonical(named)
    if {"chosen", "rejected"} <= columns:
        return kinds.KINDS["ranked"].detect(sources.columns(rows), rows.rows[0])
    found = next((name for name, form in SINGLE.items() if set(form.columns) <= columns), None)
    if found is None:
        needs = "chosen + rejected, prompt + completion, or messages"
        raise ValueError(f"{rows.name} has the columns {listed}: a reward model scores rows of {needs}; rename columns or name a --format")
    return found


def _takes(name: str, rows: sources.Rows) -> tuple[str, ...]:
    """Options that rows of a format take."""
    if name in SINGLE:
        return kinds.CHAT if name == "messages" or isinstance(rows.rows[0].get("prompt"), list) else ()
    return kinds.KINDS["steps" if name in reward.STEPS else "ranked"].takes(name, rows.rows[0])


def _part(rows: sources.Rows, name: str, config: Score, tokenizer: Any) -> Part:
    lengths = {"sequence_len": config.sequence_len, "overlong": config.overlong}
    chat = {"chat_template": config.chat_template} if "chat_template" in _takes(name, rows) else {}
    labelled = name in reward.STEPS and "labels" in sources.columns(rows)
    if name in SINGLE:
        watched = sources.watched(rows)
        docs, report = trees.encode_rows(watched, SINGLE[name].make(), tokenizer, name=name, distinct=False, **lengths, **chat)
        report = kinds.with_unread(report, watched)
    elif name in reward.STEPS:
        own = {} if config.step_separator is None else {"step_separator": config.step_separator}
        judged = rows if labelled else _unjudged(rows)
        docs, report = kinds.KINDS["steps"].encode(judged, tokenizer, format=name, own=own, **lengths)
    else:
        docs, report = kinds.KINDS["ranked"].encode(rows, tokenizer, format=name, own=chat, **lengths)
    return Part(rows, name, docs, f"rows of {rows.name}: {trees.describe(report)}", labelled)


def _unjudged(rows: sources.Rows) -> sources.Rows:
    """Stepwise rows without labels, with any: what is read is where steps end."""
    counts = [len(steps) if isinstance(steps := row.get("completions"), list) else 0 for row in rows.rows]
    return rows._replace(rows=[row | {"labels": [True] * count} for row, count in zip(rows.rows, counts, strict=True)])


def _scored(part: Part, judge: Judge, config: Score, on: torch.device, screen: Screen) -> list[list[float]]:
    sizes = corpus.lengths(part.docs)
    budget = max(config.micro_batch_size * config.sequence_len, *sizes)
    values: list[list[float]] = [[]] * len(sizes)
    with screen.counting("rows") as counted:
        for group in pack.pack(sizes, budget, seed=None):
            found = scores(judge, [part.docs[i] for i in group], on=on, pad_to=budget if on.type == "cuda" else None)
            for i, value in zip(group, found, strict=True):
                values[i] = value
            counted(len(group))
    if not all(math.isfinite(one) for value in values for one in value):
        raise RunFailed("the model gives scores that are not finite: try --dtype float32")
    return values


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


def _summary(part: Part, values: list[list[float]]) -> dict[str, str]:
    if part.format in reward.STEPS:
        return _of_steps(part, values)
    if part.format in SINGLE:
        flat = [value[0] for value in values]
        spread = f"deviation {pstdev(flat):.4f}, from {min(flat):.4f} to {max(flat):.4f}"
        return {"answers": str(len(flat)), "score": f"{fmean(flat):.4f} on average, {spread}"}
    margins = [chosen - rejected for chosen, rejected in values]
    means = [fmean(side) for side in zip(*values, strict=True)]
    return {
        "pairs": str(len(values)),
        "accuracy": f"{fmean(margin > 0 for margin in margins):.4f} (chosen scores above rejected)",
        "margin": f"{fmean(margins):.4f} on average",
        "score": f"chosen {means[0]:.4f}, rejected {means[1]:.4f} on average",
    }


def _of_steps(part: Part, values: list[list[float]]) -> dict[str, str]:
    flat = [one for value in values for one in value]
    out = {"steps": f"{len(flat)} in {len(values)} rows", "score": f"{fmean(flat):.4f} on average (probability that a step is good)"}
    if not part.labelled:
        return out
    classes = [int(one) for doc in part.docs for one in doc.classes[doc.classes >= 0]]
    right = [(kind, (value > 0.5) == bool(kind)) for kind, value in zip(classes, flat, strict=True)]
    by = {kind: [hit for known, hit in right if known == kind] for kind in (1, 0)}
    parts = [f"{fmean(hits):.4f} of {len(hits)} {name}" for name, hits in (("good", by[1]), ("bad", by[0])) if hits]
    return out | {"accuracy": f"{fmean(hit for _, hit in right):.4f} ({', '.join(parts)})"}


def _write(path: Path, parts: list[Part], found: list[list[list[float]]]) -> Path:
    """A line per scored row: the row as it was, with its scores. The path written."""
    lines = []
    for part, values in zip(parts, found, strict=True):
        rows = dict(zip(part.rows.numbers, part.rows.rows, strict=True))
        lines += [_record(rows[doc.row], part.format, value) for doc, value in zip(part.docs, values, strict=True)]
    return rundir.write_new(path, "".join(json.dumps(line, ensure_ascii=False, default=str) + "\n" for line in lines))


def _record(row: dict, name: str, value: list[float]) -> dict:
    if name in reward.STEPS:
        return row | {"step_scores": value}
    return row | ({"score": value[0]} if name in SINGLE else dict(zip(("chosen_score", "rejected_score"), value, strict=True)))
