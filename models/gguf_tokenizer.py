"""The tokenizer of a GGUF file: its keys from one of transformers, and whether the file gives back the same one.

Byte-level BPE with one of the splits of `gguf.SPLITS`, told by its parts.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from treetune.models import gguf

_KINDS = {"normal": 1, "control": 3, "user": 4, "unused": 5}  # tokenizer.ggml.token_type
TEXTS = (
    "",
    " ",
    "  two  spaces\n\nlines\t tabs   ",
    "\r\nwin\r\n",
    "Hello world, it's a test. I'LL don't we've O'Neil they'd",
    "12345 + 67 = 12412; 2024-06-30, 3.14159, ٣٤ ½; x=1;y=22;z=333;w=4444",
    "naïve café e\u0301 Ünï 東京 안녕하세요 Привет שלום ไทย",
    "def f(a, b):\n    return a[b:-1] # ok\n",
    "emoji 🙂🙃 👩\u200d🚀",
)


def keys(tokenizer: Any, rows: int, name: str, *, end_of_turn: int | None = None) -> dict[str, Any]:
    """The keys of a file whose model has this many rows of vocabulary, chat template and special tokens among them.

    end_of_turn: id of the token that ends an answer, where eos is another.
    Errors: ValueError for a tokenizer that files here do not hold, and for one with more tokens than rows.
    """
    core = json.loads(tokenizer.backend_tokenizer.to_str())
    pre = split_of(core, name)
    ids = tokenizer.get_vocab()
    if (last := max(ids.values())) >= rows:
        raise ValueError(f"{name}: the tokenizer has a token of id {last}, and the model {rows} rows of vocabulary")
    added = {token["id"]: "control" if token["special"] else "user" for token in core["added_tokens"]}
    by_id = {index: token for token, index in ids.items()}
    kinds = [added.get(index, "normal") if index in by_id else "unused" for index in range(rows)]
    held = {
        "model": "gpt2",
        "pre": pre,
        "tokens": [by_id.get(index, f"[PAD{index}]") for index in range(rows)],
        "token_type": [_KINDS[kind] for kind in kinds],
        "merges": [merge if isinstance(merge, str) else " ".join(merge) for merge in core["model"]["merges"]],
        "add_bos_token": adds_bos(tokenizer),
        "add_eos_token": False,
    }
    special = {long: index for short, long in gguf.SPECIAL.items() if (index := getattr(tokenizer, f"{short}_token_id")) is not None}
    if end_of_turn is not None and end_of_turn != tokenizer.eos_token_id:
        special["eot"] = end_of_turn
    held |= {f"{long}_token_id": index for long, index in special.items()}
    return {f"tokenizer.ggml.{key}": value for key, value in held.items()} | _templates(tokenizer.chat_template)


def _templates(template: str | Mapping[str, str] | None) -> dict[str, Any]:
    if template is None:
        return {}
    if isinstance(template, str):
        return {"tokenizer.chat_template": template}
    named = {name: text for name, text in template.items() if name != "default"}
    several: dict[str, Any] = {"tokenizer.chat_templates": list(named)} if named else {}
    return _templates(template.get("default")) | several | {f"tokenizer.chat_template.{name}": text for name, text in named.items()}


def adds_bos(tokenizer: Any) -> bool:
    """Whether a text begins with the bos token of itself."""
    return tokenizer.bos_token_id is not None and tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]


def first_added(tokenizer: Any, text: str) -> int | None:
    """Id of the first token of a text, if it is an added one, such as that of the end of a turn."""
    ids = tokenizer(text.lstrip(), add_special_tokens=False)["input_ids"][:1] if text.strip() else []
    return ids[0] if ids and ids[0] in tokenizer.added_tokens_decoder else None


def unwritten_bos(tokenizer: Any, conversations: Sequence[str]) -> str | None:
    """The bos token, where the tokenizer begins texts with it and rendered conversations do not."""
    bos = tokenizer.bos_token
    return bos if adds_bos(tokenizer) and any(not text.startswith(bos) for text in conversations) else None


def split_of(core: Mapping[str, Any], name: str) -> str:
    """The pre-tokenizer, a key of `gguf.SPLITS`, of the tokenizer.json of a tokenizer.

    Errors: ValueError for another kind of tokenizer.
    """
    model, parts = core["model"], _parts(core.get("pre_tokenizer"))
    kinds, split_name = [part["type"] for part in parts], None
    if model["type"] == "BPE" and not model.get("byte_fallback") and kinds[-1:] == ["ByteLevel"] and not parts[-1].get("add_prefix_space"):
        words = parts[-1].get("use_regex", True)
        if kinds == ["ByteLevel"] and words:
            split_name = "gpt-2"
        elif kinds == ["Digits", "ByteLevel"] and words and parts[0]["individual_digits"]:
            split_name = "smollm"
        elif kinds == ["Split", "ByteLevel"] and not words and parts[0]["behavior"] == "Isolated" and not parts[0]["invert"]:
            pattern = parts[0]["pattern"].get("Regex")
            split_name = next((pre for pre, split in gguf.SPLITS.items() if split is not None and split == pattern), None)
    if split_name is None or bool(model.get("ignore_merges")) != (split_name == "llama-bpe"):
        names = ", ".join(gguf.SPLITS)
        raise ValueError(
            f"{name} has a {model['type']} tokenizer that is not byte-level BPE split as {names}: no GGUF file is written of it"
        )
    return split_name


def _parts(node: Mapping[str, Any] | None) -> list[Mapping[str, Any]]:
    """The pre-tokenizers of a tokenizer.json, one after another."""
    if node is None:
        return []
    return [part for inner in node["pretokenizers"] for part in _parts(inner)] if node["type"] == "Sequence" else [node]


def check_same(tokenizer: Any, read: Any, name: str) -> int:
    """Compare a tokenizer with the one read from a file: probe texts, special tokens, chat template; the number of texts.

    Errors: ValueError with the first difference.
    """
    added = [str(token) for _, token in sorted(tokenizer.added_tokens_decoder.items())]
    texts = [*TEXTS, *(f"a{token} b {token}\n{token}c" for token in added)]
    for text in texts:
        for whole in (True, False):
            ours, theirs = (one(text, add_special_tokens=whole)["input_ids"] for one in (tokenizer, read))
            if list(ours) != list(theirs):
                raise ValueError(f"{name}: the tokenizer of the file reads {text!r} as {theirs}, and the model's as {ours}: not written")
    template = tokenizer.chat_template
    wanted = {"chat template": template.get("default") if isinstance(template, Mapping) else template}
    wanted |= {f"{short} token": getattr(tokenizer, f"{short}_token_id") for short in gguf.SPECIAL}
    given = {"chat template": read.chat_template} | {f"{short} token": getattr(read, f"{short}_token_id") for short in gguf.SPECIAL}
    if odd := [what for what, value in wanted.items() if given[what] != value]:
        raise ValueError(f"{name}: the {odd[0]} of the file is {given[odd[0]]!r}, and the model's {wanted[odd[0]]!r}: not written")
    return len(texts)
