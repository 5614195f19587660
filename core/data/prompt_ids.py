"""From the text of a prompt to token ids, and from sampled ids to the text of an answer."""

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

from treetune.core.data import chat_templates
from treetune.core.data.rows import Message
from treetune.core.protocols import Tokenizer


class Samples(Protocol):
    """What a sampler returns: ids, and how many of each row count."""

    @property
    def tokens(self) -> Tensor:
        """int64 [B, T]."""
        ...

    @property
    def lens(self) -> Tensor:
        """int64 [B]."""
        ...


def encode_chat(tokenizer: Tokenizer, text: str, *, system: str | None = None) -> list[int]:
    """Token ids of a chat of one question, up to where the answer begins."""
    return encode_turns(tokenizer, ([{"role": "system", "content": system}] if system else []) + [{"role": "user", "content": text}])


def encode_turns(tokenizer: Tokenizer, messages: Sequence[Message]) -> list[int]:
    """Token ids of a conversation, up to where the next answer begins. Errors: ValueError without a chat template."""
    if not tokenizer.chat_template:
        raise ValueError("the tokenizer has no chat template; continue plain text with --raw, or use a chat model")
    try:
        text = chat_templates.renderer(tokenizer, None, None, {})(messages, add_generation_prompt=True)
    except ValueError as error:
        roles = ", ".join(message["role"] for message in messages)
        raise ValueError(f"{error}; its roles are {roles}") from error
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def encode_text(tokenizer: Tokenizer, text: str) -> list[int]:
    """Token ids of plain text, with the special tokens that the tokenizer adds by default."""
    return tokenizer(text)["input_ids"]


def check_ids(ids: Sequence[int], vocab_size: int, name: str = "the prompt") -> None:
    """Errors: ValueError for a token id outside the model's vocabulary, which comes from the tokenizer of another model."""
    if ids and max(ids) >= vocab_size:
        raise ValueError(f"{name} has the token id {max(ids)}, the model ids up to {vocab_size - 1}: the tokenizer is of another model")


def decode_samples(tokenizer: Tokenizer, samples: Samples) -> list[str]:
    """The text of each sampled row, without special tokens."""
    rows = zip(samples.tokens.tolist(), samples.lens.tolist(), strict=True)
    return [tokenizer.decode(tokens[:length], skip_special_tokens=True) for tokens, length in rows]
