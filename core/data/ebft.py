"""Rows for energy-based fine-tuning: a prompt with the true reply (structured), or a whole document (strided).

A transform turns a row into dicts with the documents' keys: prompt, ground_truth and perhaps remaining_turns, or input_ids, labels and
prompt_length. A user's own transform gives the same (see `custom`); `structured` and `strided` check either kind.
n tokens of one document.
"""

import re
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from treetune.core.data import chat, conversations, preference, pretokenised, sources, spans, trees, turns

THOUGHT = re.compile(r"<think>.*?</think>\s*", re.DOTALL)
THOUGHTS = (("<think>", "</think>"), ("<reasoning>", "</reasoning>"), ("<|begin_of_thought|>", "<|end_of_thought|>"))
Transform = Callable[[dict, str], list[dict]]  # (row, how errors name it) -> rows with the documents' keys; mostly one


class Target(NamedTuple):
    """A row of the structured mode."""

    prompt: str | list[dict]
    ground_truth: str
    remaining_turns: tuple[dict, ...]  # what followed the ground truth in the conversation
    row: int


class Strided(NamedTuple):
    """A document of the strided mode. weight > 0 marks the tokens of the completion; raw text has prompt_length 0."""

    tokens: np.ndarray  # int32 [n]
    weight: np.ndarray  # float32 [n]
    prompt_length: int
    row: int


def opencode(row: dict, where: str) -> list[dict]:
    """ebft_opencode.transform: input and output."""
    asked, answer = preference.text(row, ("input",), where), preference.text(row, ("output",), where)
    return [{"prompt": turns.with_system([{"role": "user", "content": asked}], row, where), "ground_truth": answer}]


def first_turn(row: dict, where: str) -> list[dict]:
    """ebft_chat_multiturn.transform: the first reply, and everything after it as remaining_turns."""
    said, replies = _talk(row, where)
    i = replies[0]
    return [{"prompt": said[:i], "ground_truth": _truth(said[i], where), "remaining_turns": said[i + 1 :]}]


def last_turn(row: dict, where: str) -> list[dict]:
    """ebft_chat_multiturn.transform_last_turn and ebft_reasoning.transform: the last reply, with its thoughts."""
    said, replies = _talk(row, where)
    return [{"prompt": said[: replies[-1]], "ground_truth": _truth(said[replies[-1]], where)}]


def all_turns(row: dict, where: str) -> list[dict]:
    """ebft_chat_multiturn.transform_all_turns: one row for each reply."""
    said, replies = _talk(row, where)
    return [{"prompt": said[:i], "ground_truth": _truth(said[i], where)} for i in replies]


def answer_only(row: dict, where: str) -> list[dict]:
    """ebft_reasoning.transform_answer_only: the last reply without its thoughts; earlier turns keep theirs."""
    return [one | {"ground_truth": THOUGHT.sub("", one["ground_truth"]).strip()} for one in last_turn(row, where)]


def split_thinking(row: dict, where: str) -> list[dict]:
    """ebft_reasoning.transform_split_thinking: thoughts of every reply in reasoning_content; the true reply wrapped in think tags."""
    said, replies = _talk(row, where)
    _truth(said[replies[-1]] | {"reasoning_content": None}, where)
    said = [_split(one) for one in said]
    thought, answer = said[replies[-1]]["reasoning_content"], said[replies[-1]]["content"]
    wrapped = f"<think>\n{thought}\n</think>\n\n{answer}" if thought else answer
    return [{"prompt": said[: replies[-1]], "ground_truth": wrapped}]


def _truth(message: dict, where: str) -> str:
    """A reply as the text to compare with. Errors: ValueError for tool calls, and for reasoning beside it, which would be dropped."""
    if any(message.get(name) for name in conversations.MAPPINGS["reasoning_content"]):
        fix = "use ebft_reasoning.transform_split_thinking, or put it into the content"
        raise ValueError(f"{where}: the reply has its reasoning in a field of its own, which this transform does not read: {fix}")
    return turns.turn_text(message, f"{where}: the reply")


def structured(rows: sources.Rows, transform: Transform) -> tuple[list[Target], dict[str, int]]:
    """(targets in the order of the rows, rows dropped by reason). Errors: ValueError naming row and field, or when none is left."""
    found, dropped = [], {}
    for i, row in enumerate(rows.rows):
        where = sources.locate_row(rows, i)
        for one in transform(row, where):
            target = target_of(one, rows.numbers[i], where)
            reason = trees.EMPTY if not target.ground_truth.strip() else "" if target.prompt else trees.NO_PROMPT
            if reason:
                dropped[reason] = dropped.get(reason, 0) + 1
            else:
                found.append(target)
    if not found:
        reasons = trees.counted(dropped)
        raise ValueError(f"{rows.name}: not one row with a prompt and a ground truth in {len(rows.rows)} ({reasons}): fill the columns")
    return found, dropped


def target_of(one: dict, row: int, where: str) -> Target:
    """A transform's output for the structured mode, checked."""
    prompt, rest = one.get("prompt"), one.get("remaining_turns") or []
    if isinstance(prompt, list) and prompt:
        prompt = turns.with_system(turns.read_turns(prompt, f"{where}: field prompt"), one, where)
    elif prompt != []:
        prompt = preference.text(one, ("prompt",), where)
    rest = turns.read_turns(rest, f"{where}: field remaining_turns") if rest else []
    return Target(prompt, preference.text(one, ("ground_truth",), where), tuple(rest), row)


def pretrain(rows: sources.Rows, tokenizer) -> list[Strided]:
    """ebft_pretrain.transform: raw text (text or question) with the default prefix and an EOS, all of it trained."""
    spans.require_eos(tokenizer)
    texts = []
    for i, row in enumerate(rows.rows):
        body = preference.text(row, ("text", "question"), sources.locate_row(rows, i))
        texts.append(spans.Text(body, (), whole=True, eos=1.0) if body.strip() else spans.Text("", ()))
    return _strided(rows, texts, tokenizer, raw=True)


def strided_structured(rows: sources.Rows, tokenizer) -> list[Strided]:
    """ebft_strided_structured.transform: input (prompt, question), output (completion, answer); no EOS is added."""
    texts, known = [], spans.read_special_tokens(tokenizer)
    for i, row in enumerate(rows.rows):
        where = sources.locate_row(rows, i)
        asked = preference.text(row, ("input", "prompt", "question"), where)
        texts.append(trees.plain(asked, preference.text(row, ("output", "completion", "answer"), where)))
    return _strided(rows, texts, tokenizer, prefix=known.prefix)


def strided_chat(rows: sources.Rows, tokenizer, *, last_only: bool = False, **template) -> list[Strided]:
    """ebft_strided_chat.transform: a conversation through the chat template, every reply trained.

    last_only: only the last reply. template: chat_template, chat_template_jinja and chat_template_kwargs of `chat.reader`.
    """
    read = chat.reader(tokenizer, **template)
    talks = []
    for i, row in enumerate(rows.rows):
        said, replies = _talk(row, sources.locate_row(rows, i))
        trained = replies[-1:] if last_only else replies
        talks.append({"messages": [one | {"train": at in trained} for at, one in enumerate(said)]})
    return _strided(rows, read(rows._replace(rows=talks)), tokenizer)


def reasoning_strided(rows: sources.Rows, tokenizer, **template) -> list[Strided]:
    """ebft_reasoning.transform_strided: a conversation through the chat template, the last reply trained with its thoughts."""
    return strided_chat(rows, tokenizer, last_only=True, **template)


def strided(rows: sources.Rows, tokenizer) -> list[Strided]:
    """Output of a user's transform for the strided mode: input_ids, labels, prompt_length, checked; padding is taken off."""
    found = []
    for i, row in enumerate(rows.rows):
        where = sources.locate_row(rows, i)
        labels = row.get("input_ids") if row.get("labels") is None else row["labels"]
        tokens = {"input_ids": row.get("input_ids"), "labels": labels, "attention_mask": row.get("attention_mask")}
        part = pretokenised.encode_row(tokens, len(tokenizer), where)
        length = row.get("prompt_length")
        if length is None:
            length = _first(part.weight) if row.get("labels") is not None and (part.weight[1:] == 0).any() else 0
        if isinstance(length, bool) or not isinstance(length, int) or not 0 <= length <= len(part.tokens):
            raise ValueError(
                f"{where}: field prompt_length is {sources.quote(length)}, expected a whole number from 0 to {len(part.tokens)}"
            )
        found.append(Strided(part.tokens, part.weight, length, rows.numbers[i]))
    return _some(found, rows)


def cut(docs: list[Strided], sequence_len: int) -> list[Strided]:
    """The documents at sequence_len tokens at most; those left without a completion are dropped."""
    short = [doc._replace(tokens=doc.tokens[:sequence_len], weight=doc.weight[:sequence_len]) for doc in docs]
    return [doc for doc in short if doc.weight.any() and doc.prompt_length < len(doc.tokens)]


def _strided(rows: sources.Rows, texts: list[spans.Text], tokenizer, *, raw: bool = False, prefix: list[int] = ()) -> list[Strided]:
    known = spans.read_special_tokens(tokenizer)
    for i, text in enumerate(texts):
        trees.check_unicode(text.text, sources.locate_row(rows, i))
    found = []
    for i, part in enumerate(spans.encode(texts, tokenizer, known)):
        missing = [] if part.tokens[: len(prefix)].tolist() == list(prefix) else list(prefix)
        tokens = np.concatenate([np.array(missing, np.int32), part.tokens]).astype(np.int32)
        weight = np.concatenate([np.zeros(len(missing)), part.weight]).astype(np.float32)
        trees.check_bos([part._replace(tokens=tokens)], known, sources.locate_row(rows, i))
        found.append(Strided(tokens, weight, 0 if raw else _first(weight), rows.numbers[i]))
    return _some(found, rows)


def _first(weight: np.ndarray) -> int:
    return int(np.flatnonzero(weight)[0]) if weight.any() else len(weight)


def _some(found: list[Strided], rows: sources.Rows) -> list[Strided]:
    kept = [doc for doc in found if doc.weight.any()]
    if not kept:
        raise ValueError(f"{rows.name}: not one token to train on in {len(rows.rows)} rows: fill the columns")
    return kept


def _talk(row: dict, where: str) -> tuple[list[dict], list[int]]:
    """(messages, which of them are replies)."""
    name = "messages" if row.get("messages") is not None or row.get("conversations") is None else "conversations"
    names = {"role": "from", "content": "value"} if _is_sharegpt(row[name] if name in row else None) else {}
    said = turns.with_system(turns.read_turns(row.get(name), f"{where}: field {name}", **names), row, where)
    replies = [i for i, one in enumerate(said) if one["role"] == "assistant"]
    if not replies:
        raise ValueError(f"{where}: field {name} has no message of the assistant, expected at least one to learn from")
    return said, replies


def _is_sharegpt(value: object) -> bool:
    return isinstance(value, list) and bool(value) and isinstance(value[0], dict) and "from" in value[0] and "role" not in value[0]


def _split(message: dict) -> dict:
    """The message with its thoughts in reasoning_content, which is there in every message."""
    if message["role"] != "assistant" or message.get("reasoning_content"):
        return {"reasoning_content": ""} | message
    for opening, closing in THOUGHTS:
        before, found, rest = (message.get("content") or "").partition(opening)
        thought, closed, answer = rest.partition(closing)
        if found and closed:
            return message | {"reasoning_content": thought.strip(), "content": answer.strip()}
    return message | {"reasoning_content": ""}


STRUCTURED: dict[str, Transform] = {
    "ebft_opencode.transform": opencode,
    "ebft_chat_multiturn.transform": first_turn,
    "ebft_chat_multiturn.transform_last_turn": last_turn,
    "ebft_chat_multiturn.transform_all_turns": all_turns,
    "ebft_reasoning.transform": last_turn,
    "ebft_reasoning.transform_answer_only": answer_only,
    "ebft_reasoning.transform_split_thinking": split_thinking,
}
STRIDED: dict[str, Callable] = {
    "ebft_pretrain.transform": pretrain,
    "ebft_strided_structured.transform": strided_structured,
    "ebft_strided_chat.transform": strided_chat,
    "ebft_reasoning.transform_strided": reasoning_strided,
}
