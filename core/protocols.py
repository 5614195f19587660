"""Types of objects that come from libraries: what this code calls of them, and no more."""

from collections.abc import Mapping
from typing import Any, Protocol


class Tokenizer(Protocol):
    """What is used of a fast tokenizer of transformers."""

    chat_template: Any  # Jinja text, a dict of several templates by name, or None
    bos_token_id: int | None
    eos_token_id: int | None
    pad_token_id: int | None
    unk_token_id: int | None
    eos_token: str | None
    backend_tokenizer: Any  # a tokenizers.Tokenizer

    @property
    def special_tokens_map(self) -> Mapping[str, Any]:
        """Texts of the special tokens by name, such as bos_token."""
        ...

    @property
    def all_special_ids(self) -> list[int]:
        """Ids of the special tokens."""
        ...

    @property
    def added_tokens_decoder(self) -> Mapping[int, Any]:
        """Added tokens, special ones included, by id."""
        ...

    def __len__(self) -> int:
        """Number of tokens, added ones included."""
        ...

    def __call__(self, text: Any, *, add_special_tokens: bool = ...) -> Any:
        """Encode a text; the ids are under "input_ids"."""
        ...

    def encode(self, text: str, *, add_special_tokens: bool = ...) -> list[int]:
        """Ids of a text."""
        ...

    def decode(self, token_ids: Any, skip_special_tokens: bool = ..., *, clean_up_tokenization_spaces: bool = ...) -> str:
        """Text of some ids."""
        ...

    def convert_tokens_to_ids(self, tokens: Any) -> Any:
        """Id of a token, or ids of a list of them."""
        ...

    def convert_ids_to_tokens(self, ids: Any) -> Any:
        """Token of an id, or tokens of a list of them, spelt as in the vocabulary."""
        ...

    def get_chat_template(self, chat_template: str | None = ..., tools: list | None = ...) -> str:
        """Jinja text of the chat template that applies."""
        ...

    def get_vocab(self) -> dict[str, int]:
        """Id of each token."""
        ...

    def save_pretrained(self, save_directory: Any) -> Any:
        """Write the tokenizer's files."""
        ...
