"""Prompt rows for reinforcement learning: a prompt, as text or messages, and every other column for the rewards."""

from collections.abc import Callable, Sequence
from typing import NamedTuple, Unpack

import numpy as np

from treetune.core.data import chat_templates, conversations, preference, sources, spans, templates, tool_calls, trees, turns
from treetune.core.data.rows import Message, Row
from treetune.core.protocols import Tokenizer


class Prompt(NamedTuple):
    """One prompt: what is sampled from, and what rewards may look at."""

    tokens: np.ndarray  # int32 [n], with the default prefix, and the assistant's header for messages
    text: str
    messages: list[Message] | None  # None for a prompt of plain text
    columns: dict  # every column of the row but the prompt
    row: int


class PromptReport(NamedTuple):
    """What became of the rows."""

    rows: int
    prompts: int
    dropped: dict[str, int]  # rows by reason
    longest: int  # tokens of the longest prompt, dropped ones included


def read_prompts(
    rows: sources.Rows,
    tokenizer: Tokenizer,
    *,
    field_prompt: str = "prompt",
    system: str = "",
    max_prompt_len: int | None = None,
    **template: Unpack[chat_templates.TemplateOptions],
) -> tuple[list[Prompt], PromptReport]:
    """Prompts of the rows, in their order, and what became of the rows.

    system: a system message for conversations that have none. max_prompt_len: longer prompts are dropped (in tokens).
    Errors: ValueError for bad rows (named), a chat template that refuses a conversation, and when no row is left.
    """
    if max_prompt_len is not None and max_prompt_len < 1:
        raise ValueError(f"max_prompt_len is {max_prompt_len}: expected at least 1 token")
    special, render = spans.read_special_tokens(tokenizer), _opener(tokenizer, template)
    prompts = [_prompt(row, field_prompt, system, sources.locate_row(rows, i)) for i, row in enumerate(rows.rows)]
    if system and all(isinstance(prompt, str) for prompt in prompts):
        raise ValueError(f"{rows.name}: a default system message needs prompts of messages, these are plain texts: put it into them")
    texts = [
        prompt
        if isinstance(prompt, str)
        else render(prompt, _tools(rows.rows[i], sources.locate_row(rows, i)), sources.locate_row(rows, i))
        for i, prompt in enumerate(prompts)
    ]
    for i, text in enumerate(texts):
        trees.check_unicode(text, sources.locate_row(rows, i))
    usable, dropped, longest = [], {}, 0
    for i, part in enumerate(spans.encode([spans.Text(text, ()) for text in texts], tokenizer, special)):
        prompt = prompts[i]
        tokens = _opened(part.tokens, special) if isinstance(prompt, str) else part.tokens
        trees.check_bos([part._replace(tokens=tokens)], special, sources.locate_row(rows, i))
        longest, reason = max(longest, len(tokens)), _unusable(tokens, texts[i], max_prompt_len)
        if reason:
            dropped[reason] = dropped.get(reason, 0) + 1
            continue
        rest = {name: value for name, value in rows.rows[i].items() if name != field_prompt}
        usable.append(Prompt(tokens, texts[i], prompt if isinstance(prompt, list) else None, rest, rows.numbers[i]))
    if not usable:
        reasons = trees.join_counts(dropped)
        raise ValueError(
            f"{rows.name}: not one prompt in {len(rows.rows)} rows ({reasons}): fill the field {field_prompt}, or raise max_prompt_len"
        )
    return usable, PromptReport(len(rows.rows), len(usable), dropped, longest)


def from_column(row: Row, name: str, location: str) -> dict:
    """The row with the text or messages of a column as `prompt`; an answer at the end of messages becomes a column, for rewards."""
    value, rest = row.get(name), {key: other for key, other in row.items() if key != name}
    if not isinstance(value, list):
        return rest | {"prompt": value}
    messages = turns.read_turns(value, f"{location}: field {name}")
    if messages[-1]["role"] != "assistant":
        return rest | {"prompt": messages}
    if len(messages) == 1:
        raise ValueError(f"{location}: field {name} holds an answer and no prompt")
    answer = messages[-1].get("content") or messages[-1].get("tool_calls")
    return {"answer": answer} | rest | {"prompt": messages[:-1]}


def from_question(row: Row, name: str, location: str) -> dict:
    """The row with the text of a column as a chat of one question."""
    if not isinstance(row.get(name), str):
        return from_column(row, name, location)
    return {key: other for key, other in row.items() if key != name} | {"prompt": [{"role": "user", "content": row[name]}]}


def completion_tree(
    prompt: Prompt, completions: Sequence[tuple[np.ndarray, np.ndarray]], extras: dict[str, tuple] | None = None
) -> trees.TreeDoc:
    """The document of a prompt with its sampled completions (tokens, weight), one branch each."""
    return trees.grow(prompt.tokens, completions, row=prompt.row, extras=extras)


def _prompt(row: Row, name: str, system: str, location: str) -> str | list[Message]:
    if not isinstance(row.get(name), list):
        if row.get("system") not in (None, "") and name != "system":
            raise ValueError(
                f"{location}: a prompt of plain text has no place for the field system: put it into the prompt, or make it messages"
            )
        return preference.column_text(row, (name,), location)
    messages = turns.with_system(turns.read_turns(row[name], f"{location}: field {name}"), row, location)
    return messages if messages[0]["role"] == "system" or not system else [{"role": "system", "content": system}, *messages]


def _tools(row: Row, location: str) -> list[Message] | None:
    return tool_calls.read_tools(row.get("tools"), f"{location}: field tools")


def _unusable(tokens: np.ndarray, text: str, limit: int | None) -> str:
    if not text.strip() or len(tokens) == 0:
        return trees.NO_PROMPT
    return "longer than max_prompt_len" if limit is not None and len(tokens) > limit else ""


def _opened(tokens: np.ndarray, special: spans.SpecialTokens) -> np.ndarray:
    prefix = special.prefix if tokens[: len(special.prefix)].tolist() != special.prefix else []
    return np.concatenate([np.array(prefix, np.int32), tokens]).astype(np.int32)


def _opener(tokenizer: Tokenizer, template: chat_templates.TemplateOptions) -> Callable[[list[Message], templates.Tools, str], str]:
    """Function that renders a conversation up to and with the header of the assistant's turn."""
    made: list[tuple[templates.Render, Callable]] = []  # when the first prompt of messages comes: plain prompts need no chat template

    def render(messages: list[Message], tools: templates.Tools, location: str) -> str:
        if not made:
            name, jinja = template.get("chat_template"), template.get("chat_template_jinja")
            opener = chat_templates.renderer(tokenizer, name, jinja, template.get("chat_template_kwargs") or {})
            made.append((opener, chat_templates.tool_call_style(opener)))
        opener, style_calls = made[0]
        try:
            talk = conversations.Conversation(_with_calls(messages), [], tools)
            return opener(style_calls(talk).messages, tools=tools, add_generation_prompt=True)
        except ValueError as error:
            raise ValueError(f"{location}: {error}; its roles are {sources.join_names(message['role'] for message in messages)}") from error

    return render


def _with_calls(messages: list[Message]) -> list[Message]:
    """The messages with their tool calls read, as those of conversations to learn from are."""
    calls = [tool_calls.read_calls(message["tool_calls"], "tool_calls") if message.get("tool_calls") else None for message in messages]
    return [message if call is None else message | {"tool_calls": call} for message, call in zip(messages, calls, strict=True)]
