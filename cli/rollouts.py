"""The trainer's own weights as a sampler; groups as documents are in core/rollout/documents.py."""

from collections.abc import Callable, Sequence
from typing import Any

from treetune.cli import finish, setup
from treetune.cli.options.rollout import RolloutOptions
from treetune.core.data.prompts import Prompt
from treetune.core.rollout.documents import completion, completions, document, old_logprobs
from treetune.core.rollout.group import Sampled, Sampler
from treetune.core.state import TrainState
from treetune.models import Model, bare, decode

__all__ = ["Draw", "completion", "completions", "document", "local", "plain", "scorer"]

ROWS = 64  # completions that are sampled together: their keys and values are in memory at a time


Draw = Callable[..., Sampled]  # (policy, ids of prompts, their numbers, n=completions of each, max_tokens=)


def local(model: Model, used: Any, options: RolloutOptions, *, stop: Sequence[int], tokenizer: Any, seed: int) -> Draw:
    """Drawing from the weights of the state that is given, which is the policy itself: the importance ratio is 1."""
    ends = sorted({*stop, *options.stop_token_ids})
    model, used = bare(model), setup.without_tree(used)
    how = {"temperature": options.temperature, "top_p": options.top_p, "top_k": options.top_k, "min_p": options.min_p}

    def draw(policy: TrainState, ids: Sequence[Sequence[int]], numbers: Sequence[int], *, n: int, max_tokens: int) -> Sampled:
        now, lora = finish.current(policy, model, used)
        out, step = [], max(1, ROWS // n)
        for i in range(0, len(ids), step):
            some = ids[i : i + step]
            drawn = decode.sample(
                now, some, n=n, lora=lora, max_new_tokens=max_tokens, stop=ends, seed=seed, ids=list(numbers[i : i + step]), **how
            )
            out += completions(drawn, n=n, stop_ids=set(ends), tokenizer=tokenizer)
        return Sampled(out, int(policy.step))

    return draw


def plain(draw: Draw, options: RolloutOptions, *, n: int) -> Sampler:
    """One completion after each prompt, n times."""

    def sample(policy: Any, asked: Sequence[Prompt], numbers: Sequence[int]) -> Sampled:
        return draw(policy, [one.tokens.tolist() for one in asked], numbers, n=n, max_tokens=options.max_completion_length)

    return sample


def scorer(logprob: Callable, make: Callable, micro: int) -> Callable:
    """relogp(state, groups) -> groups with the trainer's log-probs of their trained tokens under the state's weights (0 elsewhere)."""
    return old_logprobs(logprob, lambda docs: make(range(len(docs)), docs, seed=None), groups_per_batch=micro)
