"""The answer to one prompt, before and after training: what a person looks at first."""

from collections.abc import Callable
from typing import Any

import numpy as np

from treetune.cli.run import Run
from treetune.core.data import chat, instruction, prompt_ids, strides
from treetune.core.state import TrainState
from treetune.models import decode, policy
from treetune.models.policy import Policy

OPENING = 16  # words or tokens of a text without a prompt, to go on from


def prepare(run: Run, start: Policy, data: Any, stop_ids: list[int]) -> Callable[[TrainState], None]:
    """A function that answers the sample prompt with the weights of a state and tells the observers; nothing for reward models.

    Errors: ValueError for a prompt that the model cannot read.
    """
    head = "head" in start.params
    text, ids = ("", []) if head else _prompt(run.config, data, start.tokenizer)
    prompt_ids.check_ids(ids, start.cfg.vocab_size, "the sample prompt")
    tokens = min(run.config.run.sample_tokens, start.cfg.max_positions - len(ids))
    sizes = policy.bare(start)

    def answer(state: TrainState) -> None:
        if not ids or tokens < 1:
            return
        model, lora = policy.current(sizes, state.params, state.frozen)  # on every rank: sharded leaves are gathered
        with run.observers.busy("answering the sample prompt"):
            samples = decode.sample(model, [ids], lora=lora, max_new_tokens=tokens, temperature=0.0, stop=stop_ids, seed=0)
        completion = prompt_ids.decode_samples(start.tokenizer, samples)[0]
        run.observers.samples([{"step": int(state.step), "prompt": text, "answer": completion}])

    return answer


def _prompt(config: Any, data: Any, tokenizer: Any) -> tuple[str, list[int]]:
    """The prompt to sample and its ids, in the form of the rows: the option, else the question of the first held-out row."""
    asked = config.run.sample_prompt
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
    return asked, prompt_ids.encode_text(tokenizer, instruction.alpaca_prompt({"instruction": asked}) if data.format == "alpaca" else asked)


def _of_row(data: Any, tokenizer: Any, column: str) -> tuple[str, list[int]]:
    """What the first held-out row asks; of other rows, what their document has before its first trained token."""
    row = data.first_row
    if data.format == "alpaca":
        return row["instruction"], prompt_ids.encode_text(tokenizer, instruction.alpaca_prompt(row))
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
