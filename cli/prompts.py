"""From text to prompt ids and back, as every command that samples needs it."""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from treetune.cli.options.shared import SampleOptions
from treetune.core.data import chat_templates


def chat_ids(tokenizer: Any, text: str, *, system: str | None = None) -> list[int]:
    """Token ids of a one-question chat, up to where the answer begins."""
    return turns_ids(tokenizer, ([{"role": "system", "content": system}] if system else []) + [{"role": "user", "content": text}])


def turns_ids(tokenizer: Any, messages: list[dict]) -> list[int]:
    """Token ids of a conversation, up to where the next answer begins. Errors: ValueError without a chat template."""
    if not tokenizer.chat_template:
        raise ValueError("the tokenizer has no chat template; continue plain text with --raw, or use a chat model")
    try:
        text = chat_templates.renderer(tokenizer, None, None, {})(messages, add_generation_prompt=True)
    except ValueError as error:
        roles = ", ".join(message["role"] for message in messages)
        raise ValueError(f"{error}; its roles are {roles}") from error
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def text_ids(tokenizer: Any, text: str) -> list[int]:
    """Token ids of plain text, with the special tokens that the tokenizer adds by itself."""
    return tokenizer(text)["input_ids"]


def check_ids(ids: Sequence[int], cfg: Any, what: str = "the prompt") -> None:
    """Errors: ValueError for an id past the model's rows, which a tokenizer of another model gives."""
    if ids and max(ids) >= cfg.vocab_size:
        raise ValueError(f"{what} has the token id {max(ids)}, the model ids up to {cfg.vocab_size - 1}: the tokenizer is of another model")


def sampling(options: SampleOptions) -> dict[str, Any]:
    """The options as keywords of `decode.sample`."""
    return asdict(options)


def answers(tokenizer: Any, drawn: Any) -> list[str]:
    """The text of each sampled row, without special tokens."""
    rows = zip(drawn.tokens.tolist(), drawn.lens.tolist(), strict=True)
    return [tokenizer.decode(tokens[:length], skip_special_tokens=True) for tokens, length in rows]
