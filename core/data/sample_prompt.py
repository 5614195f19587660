"""The prompt that a run answers before and after training: what was asked, or what the first held-out row asks."""

from typing import Any

from treetune.core.data import chat, instruction, prompt_ids, questions, strides
from treetune.core.data.dataset import Dataset
from treetune.core.data.questions import OPENING


def choose(data: Dataset, tokenizer: Any, *, asked: str | None, text_column: str = "text") -> tuple[str, list[int]]:
    """The sample prompt of a run and its ids, in the form of the rows: `asked`, else the question of the first held-out row.

    text_column: of rows of raw text. No ids: there is nothing to ask.
    """
    if asked is None and data.val and hasattr(data.val[0], "branch"):
        ids = data.val[0].tokens[data.val[0].branch == 0].tolist()
        return tokenizer.decode(ids, skip_special_tokens=True), ids
    if hasattr(next(iter(data.val + data.train), None), "prompt_length"):
        return _beginning(asked, data, tokenizer)
    if asked == "" or (asked is None and data.first_row is None):
        return "", []
    return _of_row(data, tokenizer, text_column) if asked is None else _of_option(asked, data, tokenizer)


def _of_option(asked: str, data: Any, tokenizer: Any) -> tuple[str, list[int]]:
    """The prompt that was given, in the form of the rows."""
    if data.format == "chat":
        return asked, prompt_ids.encode_chat(tokenizer, asked)
    return asked, prompt_ids.encode_text(tokenizer, instruction.alpaca_prompt({"instruction": asked}) if data.format == "alpaca" else asked)


def _of_row(data: Any, tokenizer: Any, column: str) -> tuple[str, list[int]]:
    """What the first held-out row asks; of other rows, what their document asks, or its beginning."""
    row = data.first_row
    if data.format == "alpaca":
        return row["instruction"], prompt_ids.encode_text(tokenizer, instruction.alpaca_prompt(row))
    if data.format == "completion" and isinstance(row.get(column), str):
        text = " ".join(row[column].split(" ")[:OPENING])
        return text, prompt_ids.encode_text(tokenizer, text)
    if data.format == "chat" and tokenizer.chat_template and (text := _question(row)):
        return text, prompt_ids.encode_chat(tokenizer, text)
    document = next((one for one in data.val or data.train if hasattr(one, "weight")), None)
    ids = [] if document is None else questions.split(document)[0] or document.tokens[:OPENING].tolist()
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
