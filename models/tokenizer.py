"""The tokenizer of a model or of an adapter: read with its checks, given more tokens, and the ids that end an answer."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from treetune.core import fields, manifest
from treetune.core.protocols import Tokenizer
from treetune.models import Model, adapter, fetch, gguf, hf, resize, tokenizer_config, vocabulary
from treetune.models.fetch import Say, silent


class TokenizerSetup(NamedTuple):
    """Tokenizer of a run: added tokens, original size, and minimum embedding rows (0: no minimum)."""

    tokenizer: Tokenizer
    added: list[str]
    original_size: int
    min_rows: int


def adapter_folder(path: str | Path) -> Path:
    """The adapter folder that a path means: itself, or the one inside a run folder."""
    inside = Path(path) / "adapter"
    return inside if inside.is_dir() else Path(path)


def has_tokenizer(adapter_path: str | Path) -> bool:
    """Whether an adapter carries a tokenizer of its own. Raises ValueError where its files are not as they were written."""
    root = adapter_folder(adapter_path)
    manifest.check(root, weights=False)
    return (root / adapter.TOKENIZER).is_file()


def has_own_words(adapter_path: str | Path) -> bool:
    """Whether an adapter carries a tokenizer that may have other words than its base model's."""
    return has_tokenizer(adapter_path) and adapter.own_words(adapter_folder(adapter_path))


def has_template(adapter_path: str | Path) -> bool:
    """Whether an adapter carries a chat template of its own."""
    return (adapter_folder(adapter_path) / adapter.TEMPLATE).is_file()


def load_tokenizer(name: str | Path, *, adapter_path: str | None = None, revision: str | None = None, say: Say = silent) -> Any:
    """The tokenizer of a model, or the one, or the chat template, that an adapter was trained with and carries.

    Raises ValueError, one line, for files that cannot be read or hold no model.
    """
    if adapter_path is not None and has_tokenizer(adapter_path):
        path = adapter_folder(adapter_path)
    else:
        path = fetch.resolve(name, say=say, revision=revision)
    tokenizer = _read(path)
    if adapter_path is not None and has_template(adapter_path):
        tokenizer.chat_template = (adapter_folder(adapter_path) / adapter.TEMPLATE).read_text(encoding="utf-8")
    return tokenizer


def _read(path: Path) -> Any:
    try:
        return (gguf.tokenizer if str(path).endswith(".gguf") else hf.tokenizer)(path)
    except Exception as error:  # the tokenizers package raises bare Exceptions
        if path.is_dir() and not any((path / file).is_file() for file in ("config.json", "tokenizer.json")):
            raise ValueError(f"{path} holds no model: there is no config.json in it") from error
        if path.is_dir():
            tokenizer_config.check_files(path)
        raise ValueError(f"the tokenizer of {path} cannot be read: {error}") from error


def set_up_tokenizer(
    name: str | Path,
    *,
    revision: str | None = None,
    start: str | None = None,
    other: str | None = None,
    special_tokens: Mapping[str, str] | None = None,
    tokens: Sequence[str] = (),
    say: Say = silent,
) -> TokenizerSetup:
    """The tokenizer of a run, of the model, the adapter `start`, or an `other` folder, with special and extra tokens as asked."""
    if other is None:
        plain = load_tokenizer(name, adapter_path=start, revision=revision, say=say)
    else:
        plain = _read(fetch.resolve_tokenizer(other, say=say))
    tokenizer, added = vocabulary.add_tokens(plain, special_tokens=special_tokens, tokens=tokens)
    # The rows that a plain tokenizer lacks or has too many are the model's own business: padded vocabularies are common.
    covers_all = special_tokens or tokens or other is not None or (start is not None and has_own_words(start))
    return TokenizerSetup(tokenizer, added, len(plain), len(tokenizer) if covers_all else 0)


def check_rows(adapter_path: str, rows: int, tokens: int) -> None:
    """Raise ValueError where an adapter has fewer rows of vocabulary than its tokenizer has tokens."""
    if rows < tokens:
        raise ValueError(f"{adapter_path} has {rows} rows of vocabulary and its tokenizer {tokens} tokens: the adapter is of another model")


def resize_embeddings(model: Model, setup: TokenizerSetup, *, multiple: int | None = None, start: str | None = None) -> Model:
    """The model with a row for every token that was asked for, and for every row of the adapter `start`; rows rounded up to `multiple`."""
    rows = None if start is None else adapter.rows(adapter_folder(start), model.family)
    if start is not None and rows is not None:
        check_rows(start, rows, setup.original_size)
    return resize.resize(model, max(setup.min_rows, rows or 0), multiple=multiple)


def describe_resize(setup: TokenizerSetup, before: Model, after: Model) -> str:
    """What became of the vocabulary, in a line; empty where it is as it was."""
    added = f"{len(setup.added)} tokens added ({' '.join(setup.added[:8])}{' ...' * (len(setup.added) > 8)})" if setup.added else ""
    old, new = before.cfg.vocab_size, after.cfg.vocab_size
    return ", ".join(part for part in (added, f"{old} rows grown to {new}" if new > old else "") if part)


def stop_ids(name: str | Path, tokenizer: Any, *, revision: str | None = None) -> list[int]:
    """Ids that end an answer of a model."""
    path = fetch.resolve(name, revision=revision)
    with fields.reading(f"generation_config.json of {path}"):
        return hf.stop_ids(path, tokenizer)


def generation_config(name: str | Path, tokenizer: Any, *, revision: str | None = None) -> dict[str, Any]:
    """The generation_config.json of a model, for a model that was made from it with this tokenizer."""
    path = fetch.resolve(name, revision=revision)
    with fields.reading(f"generation_config.json of {path}"):
        config = hf.generation_config(path)
    ids = {key: value for key in ("bos_token_id", "pad_token_id") if key in config and (value := getattr(tokenizer, key)) is not None}
    if config.get("eos_token_id") is not None:
        ends = config["eos_token_id"] if isinstance(config["eos_token_id"], list) else [config["eos_token_id"]]
        ids["eos_token_id"] = config["eos_token_id"] if tokenizer.eos_token_id in (*ends, None) else [tokenizer.eos_token_id, *ends]
    return config | ids
