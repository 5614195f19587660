"""Rows for energy-based fine-tuning: a prompt with the true reply (structured), or a whole document (strided).

A transform turns a row into dicts with the documents' keys: prompt, ground_truth and perhaps remaining_turns, or input_ids, labels and
prompt_length. A user's own transform gives the same (see `custom`); `read_structured` and `read_strided` check either kind.
n tokens of one document.
"""

import re
from collections.abc import Callable, Sequence
from typing import NamedTuple, Unpack

import numpy as np

from treetune.core.data import chat, conversations, preference, pretokenised, sources, spans, trees, turns
from treetune.core.data.chat_templates import TemplateOptions
from treetune.core.data.rows import Message, Row
from treetune.core.protocols import Tokenizer

ANSWERED = (("input", "prompt", "question"), ("output", "completion", "answer"))  # names of a prompt and its reply
THOUGHT = re.compile(r"<think>.*?</think>\s*", re.DOTALL)
THOUGHTS = (("<think>", "</think>"), ("<reasoning>", "</reasoning>"), ("<|begin_of_thought|>", "<|end_of_thought|>"))
RowTransform = Callable[[dict, str], list[dict]]  # (row, how errors name it) -> rows with the documents' keys; mostly one


class StructuredRow(NamedTuple):
    """A row of the structured mode."""

    prompt: str | list[Message]
    ground_truth: str
    remaining_turns: tuple[dict, ...]  # what followed the ground truth in the conversation
    row: int


class StridedDoc(NamedTuple):
    """A document of the strided mode. weight > 0 marks the tokens of the completion; raw text has prompt_length 0."""

    tokens: np.ndarray  # int32 [n]
    weight: np.ndarray  # float32 [n]
    prompt_length: int
    row: int


def opencode(row: Row, location: str) -> list[Message]:
    """ebft_opencode.transform: input and output."""
    question, answer = preference.column_text(row, ("input",), location), preference.column_text(row, ("output",), location)
    return [{"prompt": turns.with_system([{"role": "user", "content": question}], row, location), "ground_truth": answer}]


def first_turn(row: Row, location: str) -> list[Message]:
    """ebft_chat_multiturn.transform: the first reply, and everything after it as remaining_turns."""
    messages, replies = _talk(row, location)
    i = replies[0]
    return [{"prompt": messages[:i], "ground_truth": _truth(messages[i], location), "remaining_turns": messages[i + 1 :]}]


def last_turn(row: Row, location: str) -> list[Message]:
    """ebft_chat_multiturn.transform_last_turn and ebft_reasoning.transform: the last reply, with its thoughts."""
    messages, replies = _talk(row, location)
    return [{"prompt": messages[: replies[-1]], "ground_truth": _truth(messages[replies[-1]], location)}]


def all_turns(row: Row, location: str) -> list[Message]:
    """ebft_chat_multiturn.transform_all_turns: one row for each reply."""
    messages, replies = _talk(row, location)
    return [{"prompt": messages[:i], "ground_truth": _truth(messages[i], location)} for i in replies]


def answer_only(row: Row, location: str) -> list[Message]:
    """ebft_reasoning.transform_answer_only: the last reply without its thoughts; earlier turns keep theirs."""
    return [turn_row | {"ground_truth": THOUGHT.sub("", turn_row["ground_truth"]).strip()} for turn_row in last_turn(row, location)]


def split_thinking(row: Row, location: str) -> list[Message]:
    """ebft_reasoning.transform_split_thinking: thoughts of every reply in reasoning_content; the true reply wrapped in think tags."""
    messages, replies = _talk(row, location)
    _truth(messages[replies[-1]] | {"reasoning_content": None}, location)
    messages = [_split(message) for message in messages]
    thought, answer = messages[replies[-1]]["reasoning_content"], messages[replies[-1]]["content"]
    wrapped = f"<think>\n{thought}\n</think>\n\n{answer}" if thought else answer
    return [{"prompt": messages[: replies[-1]], "ground_truth": wrapped}]


def _truth(message: Message, location: str) -> str:
    """Text of the true reply. Errors: ValueError for tool calls, and for reasoning beside it, which would be dropped."""
    if any(message.get(name) for name in conversations.MAPPINGS["reasoning_content"]):
        fix = "use ebft_reasoning.transform_split_thinking, or put it into the content"
        raise ValueError(f"{location}: the reply has its reasoning in a field of its own, which this transform does not read: {fix}")
    return turns.turn_text(message, f"{location}: the reply")


def as_target(row: Row, location: str) -> list[Message]:
    """A row that has the keys already."""
    return [row]


def question_answer(row: Row, location: str) -> list[Message]:
    """question and answer, as a conversation."""
    asked = turns.with_system([{"role": "user", "content": preference.column_text(row, ("question",), location)}], row, location)
    return [{"prompt": asked, "ground_truth": preference.column_text(row, ("answer",), location)}]


def prompt_completion(row: Row, location: str) -> list[Message]:
    """prompt, as text or messages, and completion."""
    return [{"prompt": row.get("prompt"), "ground_truth": preference.column_text(row, ("completion",), location)}]


def read_structured(rows: sources.Rows, transform: RowTransform) -> tuple[list[StructuredRow], dict[str, int]]:
    """(targets in the order of the rows, rows dropped by reason). Errors: ValueError naming row and field, or when none is left."""
    targets, dropped = [], {}
    for i, row in enumerate(rows.rows):
        location = sources.locate_row(rows, i)
        for output in transform(row, location):
            target = check_structured(output, rows.numbers[i], location)
            reason = trees.EMPTY if not target.ground_truth.strip() else "" if target.prompt else trees.NO_PROMPT
            if reason:
                dropped[reason] = dropped.get(reason, 0) + 1
            else:
                targets.append(target)
    if not targets:
        reasons = trees.join_counts(dropped)
        raise ValueError(f"{rows.name}: not one row with a prompt and a ground truth in {len(rows.rows)} ({reasons}): fill the columns")
    return targets, dropped


def check_structured(output: dict, row: int, location: str) -> StructuredRow:
    """A transform's output for the structured mode, checked."""
    prompt: str | list[Message] = output.get("prompt") or []
    remaining = output.get("remaining_turns") or []
    if isinstance(prompt, list) and prompt:
        prompt = turns.with_system(turns.read_turns(prompt, f"{location}: field prompt"), output, location)
    elif output.get("prompt") != []:  # an empty list of messages is dropped and counted, as an empty text is
        prompt = preference.column_text(output, ("prompt",), location)
    remaining = turns.read_turns(remaining, f"{location}: field remaining_turns") if remaining else []
    return StructuredRow(prompt, preference.column_text(output, ("ground_truth",), location), tuple(remaining), row)


def pretrain(rows: sources.Rows, tokenizer: Tokenizer) -> list[StridedDoc]:
    """ebft_pretrain.transform: raw text (text or question) with the default prefix and an EOS, all of it trained."""
    spans.require_eos(tokenizer)
    texts = []
    for i, row in enumerate(rows.rows):
        body = preference.column_text(row, ("text", "question"), sources.locate_row(rows, i))
        texts.append(spans.Text(body, (), whole=True, eos=1.0) if body.strip() else spans.Text("", ()))
    return _strided(rows, texts, tokenizer, raw=True)


def strided_structured(rows: sources.Rows, tokenizer: Tokenizer) -> list[StridedDoc]:
    """ebft_strided_structured.transform: input (prompt, question), output (completion, answer); no EOS is added."""
    texts, special = [], spans.read_special_tokens(tokenizer)
    for i, row in enumerate(rows.rows):
        location = sources.locate_row(rows, i)
        question = preference.column_text(row, ("input", "prompt", "question"), location)
        texts.append(trees.plain_pair(question, preference.column_text(row, ("output", "completion", "answer"), location)))
    return _strided(rows, texts, tokenizer, prefix=special.prefix)


def strided_chat(
    rows: sources.Rows, tokenizer: Tokenizer, *, last_only: bool = False, **template: Unpack[TemplateOptions]
) -> list[StridedDoc]:
    """ebft_strided_chat.transform: a conversation through the chat template, every reply trained.

    last_only: only the last reply. template: chat_template, chat_template_jinja and chat_template_kwargs of `chat.reader`.
    """
    read = chat.reader(tokenizer, **template)
    talks = []
    for i, row in enumerate(rows.rows):
        messages, replies = _talk(row, sources.locate_row(rows, i))
        trained = replies[-1:] if last_only else replies
        talks.append({"messages": [message | {"train": i in trained} for i, message in enumerate(messages)]})
    return _strided(rows, read(rows._replace(rows=talks)), tokenizer)


def reasoning_strided(rows: sources.Rows, tokenizer: Tokenizer, **template: Unpack[TemplateOptions]) -> list[StridedDoc]:
    """ebft_reasoning.transform_strided: a conversation through the chat template, the last reply trained with its thoughts."""
    return strided_chat(rows, tokenizer, last_only=True, **template)


def read_strided(rows: sources.Rows, tokenizer: Tokenizer) -> list[StridedDoc]:
    """Output of a user's transform for the strided mode: input_ids, labels, prompt_length, checked; padding is taken off."""
    docs = []
    for i, row in enumerate(rows.rows):
        location = sources.locate_row(rows, i)
        labels = row.get("input_ids") if row.get("labels") is None else row["labels"]
        tokens = {"input_ids": row.get("input_ids"), "labels": labels, "attention_mask": row.get("attention_mask")}
        encoded = pretokenised.encode_row(tokens, len(tokenizer), location)
        length = row.get("prompt_length")
        if length is None:
            length = _first(encoded.weight) if row.get("labels") is not None and (encoded.weight[1:] == 0).any() else 0
        if isinstance(length, bool) or not isinstance(length, int) or not 0 <= length <= len(encoded.tokens):
            raise ValueError(
                f"{location}: field prompt_length is {sources.quote(length)}, expected a whole number from 0 to {len(encoded.tokens)}"
            )
        docs.append(StridedDoc(encoded.tokens, encoded.weight, length, rows.numbers[i]))
    return _some(docs, rows)


def truncate_docs(docs: list[StridedDoc], sequence_len: int) -> list[StridedDoc]:
    """Documents cut to sequence_len tokens; those without any of their completion left are dropped."""
    short = [doc._replace(tokens=doc.tokens[:sequence_len], weight=doc.weight[:sequence_len]) for doc in docs]
    return [doc for doc in short if doc.weight.any() and doc.prompt_length < len(doc.tokens)]


def _strided(
    rows: sources.Rows, texts: list[spans.Text], tokenizer: Tokenizer, *, raw: bool = False, prefix: Sequence[int] = ()
) -> list[StridedDoc]:
    special = spans.read_special_tokens(tokenizer)
    for i, text in enumerate(texts):
        trees.check_unicode(text.text, sources.locate_row(rows, i))
    docs = []
    for i, encoded in enumerate(spans.encode(texts, tokenizer, special)):
        missing = [] if encoded.tokens[: len(prefix)].tolist() == list(prefix) else list(prefix)
        tokens = np.concatenate([np.array(missing, np.int32), encoded.tokens]).astype(np.int32)
        weight = np.concatenate([np.zeros(len(missing)), encoded.weight]).astype(np.float32)
        trees.check_bos([encoded._replace(tokens=tokens)], special, sources.locate_row(rows, i))
        docs.append(StridedDoc(tokens, weight, 0 if raw else _first(weight), rows.numbers[i]))
    return _some(docs, rows)


def _first(weight: np.ndarray) -> int:
    return int(np.flatnonzero(weight)[0]) if weight.any() else len(weight)


def _some(docs: list[StridedDoc], rows: sources.Rows) -> list[StridedDoc]:
    trainable = [doc for doc in docs if doc.weight.any()]
    if not trainable:
        raise ValueError(f"{rows.name}: not one token to train on in {len(rows.rows)} rows: fill the columns")
    return trainable


def _talk(row: Row, location: str) -> tuple[list[Message], list[int]]:
    """(messages, which of them are replies)."""
    name = "messages" if row.get("messages") is not None or row.get("conversations") is None else "conversations"
    role, content = ("from", "value") if _is_sharegpt(row[name] if name in row else None) else ("role", "content")
    messages = turns.read_turns(row.get(name), f"{location}: field {name}", role=role, content=content)
    messages = turns.with_system(messages, row, location)
    replies = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    if not replies:
        raise ValueError(f"{location}: field {name} has no message of the assistant, expected at least one to learn from")
    return messages, replies


def _is_sharegpt(value: object) -> bool:
    return isinstance(value, list) and bool(value) and isinstance(value[0], dict) and "from" in value[0] and "role" not in value[0]


def _split(message: Message) -> dict:
    """The message with its thoughts moved to reasoning_content; that field is set, perhaps empty, in every message."""
    if message["role"] != "assistant" or message.get("reasoning_content"):
        return {"reasoning_content": ""} | message
    for opening, closing in THOUGHTS:
        before, tag, remainder = (message.get("content") or "").partition(opening)
        thought, closing_tag, answer = remainder.partition(closing)
        if tag and closing_tag:
            return message | {"reasoning_content": thought.strip(), "content": answer.strip()}
    return message | {"reasoning_content": ""}
