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
from typing import Any, NamedTuple

import numpy as np

from treetune.core import import_path
from treetune.core.data import custom
from treetune.core.data.prompts import Prompt
from treetune.core.rollout.group import Completion, PromptSampler, Sampled
from treetune.core.rollout.sampler import TokenSampler


class CustomRollout(NamedTuple):
    """A user's function as a rollout (see `sampler.Rollout`), with the sizes of the model that its ids and lengths must fit."""

    function: Callable
    tokenizer: Any
    vocab_size: int
    max_positions: int

    def __call__(self, draw: TokenSampler, /, *, n: int, max_tokens: int) -> PromptSampler:
        """Raises ValueError, naming the prompt, for anything but what the function should give."""
        longest = max_tokens

        def sample(policy: Any, prompts: Sequence[Prompt], numbers: Sequence[int], /) -> Sampled:
            versions: list[int] = []

            def generate(ids: Sequence[Sequence[int]], *, max_tokens: int | None = None) -> list[dict]:
                names = [sequence_number(numbers[0], len(versions), k) for k in range(len(ids))]
                size = longest if max_tokens is None else max_tokens
                sampled = draw(policy, [list(map(int, one)) for one in ids], names, n=1, max_tokens=size)
                versions.append(sampled.version)
                return [_to_dict(one) for (one,) in sampled.completions]

            returned = self._called(prompts, generate, n)
            if not versions:
                raise ValueError("the rollout function never called generate: its completions are not the policy's")
            return Sampled(self._checked(returned, prompts, n), min(versions))

        return sample

    def _called(self, prompts: Sequence[Prompt], generate: Callable, n: int) -> Any:
        rows = [{"tokens": one.tokens.tolist(), "text": one.text, "messages": one.messages, "columns": one.columns} for one in prompts]
        try:
            return self.function(rows, generate, num_generations=n, tokenizer=self.tokenizer)
        except custom.RAISED as error:
            raise ValueError(f"the rollout function raised {type(error).__name__}: {error}") from error

    def _checked(self, returned: Any, prompts: Sequence[Prompt], n: int) -> list[list[Completion]]:
        lists = isinstance(returned, list) and len(returned) == len(prompts)
        if not lists or any(not isinstance(group, list) or len(group) != n for group in returned):
            raise ValueError(f"the rollout function must give a list of {len(prompts)} lists (prompts) of {n} dicts (completions)")
        return [[self._completion(one, prompt) for one in group] for prompt, group in zip(prompts, returned, strict=True)]

    def _completion(self, one: Any, prompt: Prompt) -> Completion:
        source = f"the rollout function, for row {prompt.row},"
        tokens = self._tokens(one, prompt, source)
        trained = _array(one.get("trained", [True] * len(tokens)), bool, f"{source} trained")
        logp = _array(one.get("logp", [np.nan] * len(tokens)), np.float32, f"{source} logp")
        if len(trained) != len(tokens) or len(logp) != len(tokens):
            raise ValueError(f"{source} gave {len(tokens)} tokens, {len(trained)} trained and {len(logp)} logp: expected as many of each")
        if np.isinf(logp).any():
            raise ValueError(f"{source} gave a logp that is infinite: expected numbers, or nan where none is known")
        text = one.get("text")
        text = self.tokenizer.decode(tokens[trained].tolist(), skip_special_tokens=True) if text is None else text
        if not isinstance(text, str):
            raise ValueError(f"{source} gave the text {text!r:.60}: expected a string, or none for that of the trained tokens")
        return Completion(tokens, logp, trained, bool(one.get("stopped", True)), text)

    def _tokens(self, one: Any, prompt: Prompt, source: str) -> np.ndarray:
        """The ids of a completion, int32 [n]."""
        tokens = _array(one.get("tokens", ()) if isinstance(one, dict) else (), None, f"{source} tokens")
        if not tokens.size:
            raise ValueError(f"{source} gave no tokens: expected a dict with tokens, trained and logp")
        if tokens.ndim != 1 or tokens.dtype.kind not in "iu" or tokens.min() < 0 or tokens.max() >= self.vocab_size:
            raise ValueError(f"{source} gave the tokens {one['tokens']!r:.60}: expected ids from 0 to {self.vocab_size - 1}")
        if len(prompt.tokens) + len(tokens) > self.max_positions:
            size = f"{len(tokens)} tokens after a prompt of {len(prompt.tokens)}"
            raise ValueError(f"{source} gave {size}, more than the {self.max_positions} positions of the model")
        return tokens.astype(np.int32)


def load(path: str, tokenizer: Any, *, vocab_size: int, max_positions: int) -> CustomRollout:
    """The rollout function at module.function or file.py:function. Errors: ValueError when there is no such function."""
    return CustomRollout(import_path.import_function(path, "rollout_func"), tokenizer, vocab_size, max_positions)


def sequence_number(number: int, call: int, k: int) -> int:
    """What names the randomness of sequence k of a call: 62 bits."""
    return int.from_bytes(hashlib.blake2b(f"{number}/{call}/{k}".encode(), digest_size=8).digest(), "big") >> 2


def _to_dict(completion: Completion) -> dict:
    return {"tokens": completion.tokens.tolist(), "logp": completion.logp.tolist(), "stopped": completion.stopped, "text": completion.text}


def _array(values: Any, dtype: Any, what: str) -> np.ndarray:
    try:
        return np.array(values, dtype)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{what}: {values!r:.60} is no list of such values ({error})") from error
