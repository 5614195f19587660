"""Special and added tokens: a tokenizer that knows more tokens than the one it was made from.

Ids that exist never move: a new token takes the first free id after the vocabulary.
"""

import copy
import json
from collections.abc import Iterable, Mapping
from typing import Any

BEGIN, END = ("bos_token", "cls_token"), ("eos_token", "sep_token")  # what a tokenizer may put around a text


def add_tokens(tokenizer: Any, *, special_tokens: Mapping[str, str] | None = None, tokens: Iterable[str] = ()) -> tuple[Any, list[str]]:
    """A tokenizer with these special tokens and extra tokens, and the tokens that got a new id, in the order of their ids.

    `special_tokens` maps names (bos_token, eos_token, unk_token, pad_token, sep_token, cls_token, mask_token) to texts, which
    decoding may skip; `tokens` are ordinary text that is never split. A text that is a token already keeps its id. A BOS or
    EOS that the tokenizer puts around every text follows the change. The given tokenizer stays as it is.
    Raises ValueError for a name that is no special token, and for a text that is empty or no text.
    """
    special, extra = dict(special_tokens or {}), list(dict.fromkeys(tokens))
    _check(tokenizer, special, extra)
    if not special and not extra:
        return tokenizer, []
    from tokenizers import AddedToken

    before, out = len(tokenizer), copy.deepcopy(tokenizer)
    # normalized=False: a token is searched for as it is written, before a normaliser changes the text.
    out.add_special_tokens({name: AddedToken(text, normalized=False, special=True) for name, text in special.items()})
    out.add_tokens([AddedToken(text, normalized=False) for text in extra if text not in special.values()])
    _follow(out, tokenizer, special)
    return out, out.convert_ids_to_tokens(range(before, len(out)))


def _check(tokenizer: Any, special: dict[str, str], extra: list[str]) -> None:
    special_names = tokenizer.SPECIAL_TOKENS_ATTRIBUTES
    for name, text in special.items():
        if name not in special_names:
            raise ValueError(f"special_tokens has {name!r}; expected one of {', '.join(special_names)}; further tokens go into tokens")
        _check_text(f"special_tokens: {name}", text)
    for text in extra:
        _check_text("tokens", text)


def _check_text(source: str, text: object) -> None:
    if not isinstance(text, str) or not text:
        raise ValueError(f"{source} has {text!r}; expected the text of a token, with at least one character")


def _follow(tokenizer: Any, before: Any, special: dict[str, str]) -> None:
    """Put the new BOS and EOS where the tokenizer's template puts the old ones around a text.

    Raises ValueError when something else than a template puts them there.
    """
    begin, end = ({getattr(before, name): special[name] for name in names if name in special} for names in (BEGIN, END))
    was = _around(before)
    target = [begin.get(token, token) for token in was[0]], [end.get(token, token) for token in was[1]]
    if target == was:
        return
    from tokenizers import Tokenizer

    whole = json.loads(tokenizer.backend_tokenizer.to_str())
    ids = {text: tokenizer.convert_tokens_to_ids(text) for text in (*begin.values(), *end.values())}
    whole["post_processor"] = _renamed(whole["post_processor"], begin, end, ids)
    tokenizer.backend_tokenizer.post_processor = Tokenizer.from_str(json.dumps(whole)).post_processor
    if _around(tokenizer) != target:
        raise ValueError(f"the tokenizer puts {was[0] + was[1]} around every text by a rule of its own, which special_tokens cannot change")


def _around(tokenizer: Any) -> tuple[list[str], list[str]]:
    """The tokens that the tokenizer puts before and after a text."""
    inner, whole = (tokenizer("a", add_special_tokens=add)["input_ids"] for add in (False, True))
    start = next(i for i in range(len(whole)) if whole[i : i + len(inner)] == inner)
    return tokenizer.convert_ids_to_tokens(whole[:start]), tokenizer.convert_ids_to_tokens(whole[start + len(inner) :])


def _renamed(node: Any, begin: dict[str, str], end: dict[str, str], ids: dict[str, int]) -> Any:
    """A post-processor in the JSON of tokenizers, with other special tokens in its templates."""
    if isinstance(node, list):
        return [_renamed(child, begin, end, ids) for child in node]
    if not isinstance(node, dict):
        return node
    if node.get("type") != "TemplateProcessing":
        return {key: _renamed(child, begin, end, ids) for key, child in node.items()}
    table = node["special_tokens"] | {text: {"id": text, "ids": [number], "tokens": [text]} for text, number in ids.items()}
    templates = {"single": _pieces(node["single"], begin, end), "pair": _pieces(node["pair"], begin, begin | end)}
    return node | templates | {"special_tokens": table}


def _pieces(pieces: list[dict], begin: dict[str, str], end: dict[str, str]) -> list[dict]:
    """A template with tokens before its first text renamed by `begin`, those after it by `end`."""
    out, names = [], begin
    for piece in pieces:
        if "SpecialToken" in piece:
            token = piece["SpecialToken"]
            piece = {"SpecialToken": token | {"id": names.get(token["id"], token["id"])}}
        else:
            names = end
        out.append(piece)
    return out
