"""What a run leaves behind: sample answers before and after, an adapter or a model folder, a report, a summary."""

from pathlib import Path
from typing import Any

import numpy as np
import torch

from treetune.cli import cadence, configs, invocation, rundir, setup
from treetune.cli.screen import Screen, clock
from treetune.core import drafts, records, shard, tree
from treetune.core.data import chat, instruction, prompt_ids, strides
from treetune.core.lora import Lora
from treetune.core.run import report
from treetune.core.state import Params, TrainState
from treetune.models import Model, decode, policy
from treetune.models.adapter import Carried
from treetune.models.policy import Policy
from treetune.models.tokenizer import has_template, has_tokenizer

PASTED = ("continue with", "try it")  # commands, in one line however long
OPENING = 16  # words or tokens of a text without a prompt, to go on from


def current(state: TrainState, model: Model, used: Lora | None) -> tuple[Model, Lora | None]:
    """The model and adapter as trained so far (whole leaves: a collective when they are sharded)."""
    return policy.current(Policy(model.family, model.cfg, {}, {}, used), state.params, state.frozen)


def _prompt(config: Any, made: Any) -> tuple[str, list[int]]:
    """The prompt to sample and its ids, in the form of the rows: the option, else the question of the first held-out row."""
    data, asked, tokenizer = made.corpus, config.run.sample_prompt, made.tokenizer
    if "head" in made.trees.params:
        return "", []
    if asked is None and data.val and hasattr(data.val[0], "branch"):
        ids = data.val[0].tokens[data.val[0].branch == 0].tolist()
        return tokenizer.decode(ids, skip_special_tokens=True), ids
    if hasattr(next(iter(data.val + data.train), None), "prompt_length"):
        return _beginning(asked, data, tokenizer)
    if asked == "" or (asked is None and data.first_row is None):
        return "", []
    return _of_row(data, tokenizer, getattr(config.data, "text_column", "text")) if asked is None else _of_option(asked, data, tokenizer)


def _of_option(asked: str, data: Any, tokenizer: Any) -> tuple[str, list[int]]:
    """The prompt that was given, in the form of the rows."""
    if data.format == "chat":
        return asked, prompt_ids.encode_chat(tokenizer, asked)
    return asked, prompt_ids.encode_text(tokenizer, instruction.prompt({"instruction": asked}) if data.format == "alpaca" else asked)


def _of_row(data: Any, tokenizer: Any, column: str) -> tuple[str, list[int]]:
    """What the first held-out row asks; of other rows, what their document has before its first trained token."""
    row = data.first_row
    if data.format == "alpaca":
        return row["instruction"], prompt_ids.encode_text(tokenizer, instruction.prompt(row))
    if data.format == "completion" and isinstance(row.get(column), str):
        text = " ".join(row[column].split(" ")[:OPENING])
        return text, prompt_ids.encode_text(tokenizer, text)
    if data.format == "chat" and tokenizer.chat_template and (text := _question(row)):
        return text, prompt_ids.encode_chat(tokenizer, text)
    if not (data.val or data.train):
        return "", []
    doc = (data.val or data.train)[0]
    before = int(np.flatnonzero(doc.weight)[0]) if doc.weight.any() else 0
    ids = doc.tokens[: before if before > 1 else OPENING].tolist()  # where all of it is trained, its beginning
    return tokenizer.decode(ids, skip_special_tokens=True), ids


def _beginning(asked: str | None, data: Any, tokenizer: Any) -> tuple[str, list[int]]:
    """The prompt of the first held-out document, or the beginning of one without; what is asked in the form of the rows."""
    if asked is None and not data.val:
        return "", []
    if asked is None:
        ids = data.val[0].tokens[: data.val[0].prompt_length or OPENING].tolist()
        return tokenizer.decode(ids, skip_special_tokens=True), ids
    encode = prompt_ids.encode_chat if strides.talks(data.format) else prompt_ids.encode_text
    return asked, encode(tokenizer, asked) if asked else []


def _question(row: dict) -> str:
    """The first question of a row of messages; none where the row is read by options of its data set, which are not known here."""
    try:
        turns = chat.read_messages(row, "the first held-out row")
    except ValueError:
        return ""
    return next((turn["content"] for turn in turns if turn["role"] == "user" and "content" in turn), "")


def sampler(config: Any, made: Any):
    """A function `(state, when, screen)` that answers the sample prompt, prints it and appends it to samples.jsonl."""
    prompt, ids = _prompt(config, made)
    tokenizer = made.tokenizer
    prompt_ids.check_ids(ids, made.model.cfg.vocab_size, "the sample prompt")
    stop = setup.stop_ids(config.model, tokenizer) if ids else []
    if made.trees.lora is None and "head" not in made.trees.params:
        setup.generation_config(config.model, tokenizer)  # the saved model gets it: better refused now than at the end

    def show(state: TrainState, when: str, screen: Screen) -> None:
        if not ids or (when == "before" and made.meta is not None):
            return
        model, used = current(state, made.model, made.trees.lora)
        room = min(config.run.sample_tokens, model.cfg.max_positions - len(ids))
        if room < 1:
            return
        with screen.busy("answering the sample prompt"):
            drawn = decode.sample(model, [ids], lora=used, max_new_tokens=room, temperature=0.0, stop=stop, seed=0)
        answer = prompt_ids.decode_samples(tokenizer, drawn)[0]
        screen.line(f"sample answer {when} training", "bold")
        screen.line(f"  prompt: {prompt}\n  answer: {answer.strip() or '(blank)'}\n")
        if made.job.rank == 0:
            records.append(made.where.samples, {"step": int(state.step), "prompt": prompt, "answer": answer})

    return show


def leave(config: Any, made: Any, outcome: Any, sampler: Any, screen: Screen, about: dict[str, str]) -> None:
    """Save the adapter (or the model), sample an answer, write the report, print where everything is. about: what the run is, in rows."""
    model, used = current(outcome.state, made.model, made.trees.lora)
    trained = tree.map(shard.full, outcome.state.params)  # on every rank: gathering sharded leaves is a collective
    saved = _save(config, made, model, used, trained) if made.job.rank == 0 else None
    try:
        sampler(outcome.state, "after", screen)
    except (ValueError, RuntimeError, MemoryError) as error:
        screen.warn(f"the sample answer failed, the trained weights are saved: {' '.join(str(error).split()) or type(error).__name__}")
    if made.job.rank == 0:
        rows, method = _summary(config, made, outcome, saved), made.method
        shown = {"docs": made.corpus.train[:8], "tokenizer": made.tokenizer, "read": method.kind.read, "unit": method.unit}
        report.write(made.where.root, history=outcome.history, rows=about | rows, **shown)
        screen.table("", {name: text for name, text in rows.items() if name not in PASTED})
        for name in [name for name in PASTED if name in rows]:
            screen.line(f"{name}  {rows[name]}")
    if torch.distributed.is_initialized():
        torch.distributed.barrier()


def _save(config: Any, made: Any, model: Model, used: Lora | None, trained: Params):
    path = made.where.root / ("model" if used is None else "adapter")
    part = drafts.name(path)
    try:
        write_trained(config, made.trees, made.tokenizer, model, used, trained, part)
        rundir.replace(part, path)
    finally:
        drafts.delete(part)
    return path


def write_trained(config: Any, trees: Policy, tokenizer: Any, _model: Any, _lora: Any, trained: Params, path: Path) -> None:
    """Write what trained into a folder: the adapter, or the whole model in the dtype that it computes in, with a head if there is one."""
    generation = None if trees.lora is not None or "head" in trained else setup.generation_config(config.model, tokenizer)
    carried = None if trees.lora is None else _carried(config, tokenizer)
    policy.save(trees._replace(tokenizer=tokenizer), path, params=trained, generation=generation, carried=carried)


def _carried(config: Any, tokenizer: Any) -> Carried:
    """What of the tokenizer an adapter folder must hold, because the base model's is another."""
    start, words = config.adapter.lora_model_dir, config.vocabulary
    if words.special_tokens or words.tokens or (start is not None and has_tokenizer(start)):
        return Carried(tokenizer=tokenizer)
    own = config.data.chat_template is not None or (start is not None and has_template(start))
    return Carried(template=tokenizer.chat_template if own else None)


def _summary(config: Any, made: Any, outcome: Any, saved) -> dict[str, str]:
    history = outcome.history
    goal = made.job.goal
    held = [record[f"eval/{goal}"] for record in history if f"eval/{goal}" in record]
    steps = [record for record in history if "train/loss" in record]
    seconds = sum(record["step_seconds"] for record in steps)
    rows = {"done": f"step {int(outcome.state.step)} of {made.job.total_steps} in {clock(seconds)}"}
    if outcome.stopped:
        rows["stopped"] = outcome.stopped + (": continue with --resume auto" if outcome.stopped == "interrupted" else "")
    if len(held) > 1:
        shown = held[0] and goal.endswith("loss")  # a hinge may start at 0, a reward below
        change = f" ({100 * (held[-1] / held[0] - 1):+.1f} %)" if shown else ""
        rows[f"held-out {goal}"] = f"{held[0]:.4f} -> {held[-1]:.4f}{change}, best at step {outcome.progress.best_step}"
    if seconds:
        rate = sum(record["supervised_tokens"] for record in steps) / seconds
        rows["speed"] = f"{rate:.0f} supervised tokens/s, peak memory {steps[-1]['memory_gib']:.1f} GiB"
    rows["saved"] = f"{saved}, {made.where.root}/report.html"
    for key in made.method.shown:
        if key != goal and len(own := [record[f"eval/{key}"] for record in history if f"eval/{key}" in record]) > 1:
            rows[f"held-out {key}"] = f"{own[0]:.4f} -> {own[-1]:.4f}"
    if missed := cadence.warnings(config, made.job, made.peak):
        rows["warning"] = "; ".join(missed)  # again: its line went by at the start
    if outcome.stopped == "interrupted" and (text := invocation.continuation(made.where.root, overwrite=config.run.overwrite)):
        rows["continue with"] = text
    return rows | {"try it": _trial(config, made, saved)}


def _as_read(config: Any) -> list:
    """Options of `treetune score` for rows to be read as the run read them, where its defaults would not do so."""
    default = configs.Score()
    names = ("format", "split", "sequence_len", "chat_template", "step_separator")
    values = {name: getattr(config.data, name, getattr(default, name)) for name in names}
    return [part for name, value in values.items() if value != getattr(default, name) for part in (f"--{name.replace('_', '-')}", value)]


def _trial(config: Any, made: Any, saved: Path) -> str:
    """A command that tries what was trained."""
    if "head" in made.trees.params:
        rows = config.data.data[0] if config.data.data else "ROWS"
        return invocation.command("score", made.where.root, "--data", rows, *_as_read(config))
    place = ("--model" if made.trees.lora is None else "--adapter", saved)
    if not made.tokenizer.chat_template or made.corpus.format == "completion":
        return invocation.command("generate", "Once upon a time", "--raw", *place)
    return invocation.command("chat", *place)
