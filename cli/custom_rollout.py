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

from treetune.cli.rl_options import RolloutOptions
from treetune.cli.rollouts import Draw
from treetune.core.data import custom
from treetune.core.data.prompts import Prompt
from treetune.core.rollout.group import Completion, Sampled, Sampler


def wrapper(path: str, tokenizer: Any) -> Callable[..., Sampler]:
    """What makes a sampler of who draws, with the function at module.function or file.py:function. Errors: ValueError without one."""
    return partial(sampler, fn=custom.function(path, "rollout_func"), tokenizer=tokenizer)


def sampler(draw: Draw, options: RolloutOptions, *, n: int, fn: Callable, tokenizer: Any) -> Sampler:
    """The user's function as a sampler. Errors: ValueError, naming the prompt, for anything but what it should give."""

    def sample(policy: Any, asked: Sequence[Prompt], numbers: Sequence[int]) -> Sampled:
        versions: list[int] = []

        def generate(ids: Sequence[Sequence[int]], *, max_tokens: int | None = None) -> list[dict]:
            names = [_name(numbers[0], len(versions), k) for k in range(len(ids))]
            room = options.max_completion_length if max_tokens is None else max_tokens
            found = draw(policy, [list(map(int, one)) for one in ids], names, n=1, max_tokens=room)
            versions.append(found.version)
            return [_plain(one) for (one,) in found.completions]

        rows = [{"tokens": one.tokens.tolist(), "text": one.text, "messages": one.messages, "columns": one.columns} for one in asked]
        given = fn(rows, generate, num_generations=n, tokenizer=tokenizer)
        if not versions:
            raise ValueError("the rollout function never called generate: its completions are not the policy's")
        return Sampled(_checked(given, asked, n, tokenizer), min(versions))

    return sample


def _name(number: int, call: int, k: int) -> int:
    """What names the randomness of a sequence: 62 bits."""
    return int.from_bytes(hashlib.blake2b(f"{number}/{call}/{k}".encode(), digest_size=8).digest(), "big") >> 2


def _plain(one: Completion) -> dict:
    return {"tokens": one.tokens.tolist(), "logp": one.logp.tolist(), "stopped": one.stopped, "text": one.text}


def _checked(given: Any, asked: Sequence[Prompt], n: int, tokenizer: Any) -> list[list[Completion]]:
    if not isinstance(given, list) or len(given) != len(asked) or any(not isinstance(one, list) or len(one) != n for one in given):
        raise ValueError(f"the rollout function must give a list of {len(asked)} lists (prompts) of {n} dicts (completions)")
    return [[_completion(one, tokenizer, f"row {prompt.row}") for one in group] for prompt, group in zip(asked, given, strict=True)]


def _completion(one: Any, tokenizer: Any, where: str) -> Completion:
    if not isinstance(one, dict) or not one.get("tokens"):
        raise ValueError(f"the rollout function gave no tokens for {where}: expected a dict with tokens, trained and logp")
    tokens = np.array(one["tokens"], np.int32)
    trained = np.array(one.get("trained", [True] * len(tokens)), bool)
    logp = np.array(one.get("logp", [np.nan] * len(tokens)), np.float32)
    if len(trained) != len(tokens) or len(logp) != len(tokens):
        raise ValueError(f"the rollout function gave {len(tokens)} tokens, {len(trained)} trained and {len(logp)} logp for {where}")
    text = one.get("text")
    text = tokenizer.decode(tokens[trained].tolist(), skip_special_tokens=True) if text is None else text
    return Completion(tokens, logp, trained, bool(one.get("stopped", True)), text)
