"""A rollout function of the user's own, by import path: several turns, tools, environments.

    def rollout(prompts, generate, *, num_generations, tokenizer):
        return [[{"tokens": [...], "logp": [...], "trained": [...]}, ...], ...]

`prompts` are dicts with `tokens`, `text`, `messages` and the row's `columns`. `generate(ids)` continues lists of token ids under the
policy, one completion each, as dicts with `tokens`, `logp`, `stopped`, `text`. The function gives, for each prompt, num_generations
dicts: `tokens` after the prompt, `trained` (False for tokens that the policy did not write), and beside it `logp`, `text`, `stopped`,
each of which may be left out. Tokens of an environment are never trained on; ids are never decoded and encoded again.
"""

import hashlib
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np

from treetune.cli.options.rollout import RolloutOptions
from treetune.cli.rollouts import Draw
from treetune.core.data import custom
from treetune.core.data.prompts import Prompt
from treetune.core.rollout.group import Completion, Sampled, Sampler


def wrapper(path: str, tokenizer: Any, cfg: Any) -> Callable[..., Sampler]:
    """What makes a sampler of who draws, with the function at module.function or file.py:function; cfg: the model's sizes.

    Errors: ValueError when there is no such function.
    """
    return partial(sampler, fn=custom.import_function(path, "rollout_func"), tokenizer=tokenizer, cfg=cfg)


def sampler(draw: Draw, options: RolloutOptions, *, n: int, fn: Callable, tokenizer: Any, cfg: Any) -> Sampler:
    """The user's function as a sampler. Errors: ValueError, naming the prompt, for anything but what it should give."""

    def sample(policy: Any, asked: Sequence[Prompt], numbers: Sequence[int]) -> Sampled:
        versions: list[int] = []

        def generate(ids: Sequence[Sequence[int]], *, max_tokens: int | None = None) -> list[dict]:
            names = [sequence_name(numbers[0], len(versions), k) for k in range(len(ids))]
            room = options.max_completion_length if max_tokens is None else max_tokens
            found = draw(policy, [list(map(int, one)) for one in ids], names, n=1, max_tokens=room)
            versions.append(found.version)
            return [_plain(one) for (one,) in found.completions]

        rows = [{"tokens": one.tokens.tolist(), "text": one.text, "messages": one.messages, "columns": one.columns} for one in asked]
        try:
            given = fn(rows, generate, num_generations=n, tokenizer=tokenizer)
        except custom.RAISED as error:
            raise ValueError(f"the rollout function raised {type(error).__name__}: {error}") from error
        if not versions:
            raise ValueError("the rollout function never called generate: its completions are not the policy's")
        return Sampled(_checked(given, asked, n, tokenizer, cfg), min(versions))

    return sample


def sequence_name(number: int, call: int, k: int) -> int:
    """What names the randomness of a sequence: 62 bits."""
    return int.from_bytes(hashlib.blake2b(f"{number}/{call}/{k}".encode(), digest_size=8).digest(), "big") >> 2


def _plain(one: Completion) -> dict:
    return {"tokens": one.tokens.tolist(), "logp": one.logp.tolist(), "stopped": one.stopped, "text": one.text}


def _checked(given: Any, asked: Sequence[Prompt], n: int, tokenizer: Any, cfg: Any) -> list[list[Completion]]:
    if not isinstance(given, list) or len(given) != len(asked) or any(not isinstance(one, list) or len(one) != n for one in given):
        raise ValueError(f"the rollout function must give a list of {len(asked)} lists (prompts) of {n} dicts (completions)")
    return [[_completion(one, prompt, tokenizer, cfg) for one in group] for prompt, group in zip(asked, given, strict=True)]


def _completion(one: Any, prompt: Prompt, tokenizer: Any, cfg: Any) -> Completion:
    where = f"the rollout function, for row {prompt.row},"
    tokens = _tokens(one, prompt, where, cfg)
    trained = _array(one.get("trained", [True] * len(tokens)), bool, f"{where} trained")
    logp = _array(one.get("logp", [np.nan] * len(tokens)), np.float32, f"{where} logp")
    if len(trained) != len(tokens) or len(logp) != len(tokens):
        raise ValueError(f"{where} gave {len(tokens)} tokens, {len(trained)} trained and {len(logp)} logp: expected as many of each")
    if np.isinf(logp).any():
        raise ValueError(f"{where} gave a logp that is infinite: expected numbers, or nan where none is known")
    text = one.get("text")
    text = tokenizer.decode(tokens[trained].tolist(), skip_special_tokens=True) if text is None else text
    if not isinstance(text, str):
        raise ValueError(f"{where} gave the text {text!r:.60}: expected a string, or none for that of the trained tokens")
    return Completion(tokens, logp, trained, bool(one.get("stopped", True)), text)


def _tokens(one: Any, prompt: Prompt, where: str, cfg: Any) -> np.ndarray:
    """The ids of a completion, int32 [n]."""
    tokens = _array(one.get("tokens", ()) if isinstance(one, dict) else (), None, f"{where} tokens")
    if not tokens.size:
        raise ValueError(f"{where} gave no tokens: expected a dict with tokens, trained and logp")
    if tokens.ndim != 1 or tokens.dtype.kind not in "iu" or tokens.min() < 0 or tokens.max() >= cfg.vocab_size:
        raise ValueError(f"{where} gave the tokens {one['tokens']!r:.60}: expected ids from 0 to {cfg.vocab_size - 1}")
    if len(prompt.tokens) + len(tokens) > cfg.max_positions:
        size = f"{len(tokens)} tokens after a prompt of {len(prompt.tokens)}"
        raise ValueError(f"{where} gave {size}, more than the {cfg.max_positions} positions of the model")
    return tokens.astype(np.int32)


def _array(values: Any, dtype: Any, what: str) -> np.ndarray:
    try:
        return np.array(values, dtype)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{what}: {values!r:.60} is no list of such values ({error})") from error
