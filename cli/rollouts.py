"""Between groups of completions and the model: sampling from the trainer's own weights, documents, and the trainer's log-probs.

P prompts, G completions of each, n tokens of a completion.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from treetune.cli import finish, setup
from treetune.cli.options.rollout import RolloutOptions
from treetune.core.data import prompts, trees
from treetune.core.data.prompts import Prompt
from treetune.core.rollout.group import Completion, Group, Sampled, Sampler
from treetune.core.state import TrainState
from treetune.models import Model, bare, decode

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
            out += completions(drawn, len(some), n, set(ends), tokenizer)
        return Sampled(out, int(policy.step))

    return draw


def plain(draw: Draw, options: RolloutOptions, *, n: int) -> Sampler:
    """One completion after each prompt, n times."""

    def sample(policy: Any, asked: Sequence[Prompt], numbers: Sequence[int]) -> Sampled:
        return draw(policy, [one.tokens.tolist() for one in asked], numbers, n=n, max_tokens=options.max_completion_length)

    return sample


def completions(drawn: decode.Samples, prompts_: int, n: int, ends: set[int], tokenizer: Any) -> list[list[Completion]]:
    """The rows of the sampler as completions of each prompt."""
    lens, tokens, logp = drawn.lens.tolist(), drawn.tokens.cpu().numpy(), drawn.logp.cpu().numpy()
    rows = [completion(tokens[i, :size], logp[i, :size], ends, tokenizer) for i, size in enumerate(lens)]
    return [rows[p * n : (p + 1) * n] for p in range(prompts_)]


def completion(tokens: np.ndarray, logp: np.ndarray, ends: set[int], tokenizer: Any) -> Completion:
    """One completion of sampled ids, with the text that rewards see."""
    ids = tokens.tolist()
    text = tokenizer.decode(ids, skip_special_tokens=True)
    trained = np.ones(len(ids), bool)
    return Completion(np.asarray(tokens, np.int32), np.asarray(logp, np.float32), trained, bool(ids) and ids[-1] in ends, text)


def document(group: Group, *, mask_truncated: bool = False, truth: tuple[np.ndarray, np.ndarray] | None = None) -> trees.TreeDoc:
    """A group as a document: the prompt once, a branch for each completion, its advantage, and log-probs beside its tokens.

    truth: tokens and weights of the true reply, one more branch; then completions are of kind 0 and it is of kind 1.
    """
    kept = [one.trained & (one.stopped or not mask_truncated) for one in group.completions]
    pairs = [(one.tokens, weight.astype(np.float32)) for one, weight in zip(group.completions, kept, strict=True)]
    extras = {} if group.advantage is None else {"advantage": tuple(group.advantage.tolist())}
    if truth is not None:
        extras = {name: (*values, 0.0) for name, values in extras.items()} | {"kind": (0,) * len(pairs) + (1,)}
        pairs.append(truth)
    doc = prompts.group(group.prompt, pairs, extras)
    values = {"sampler_logp": [one.logp for one in group.completions], "old_logp": group.old_logp}
    return doc._replace(values={name: _laid(doc, parts) for name, parts in values.items() if parts is not None})


def _laid(doc: trees.TreeDoc, parts: Sequence[np.ndarray]) -> np.ndarray:
    """Numbers of the completions beside the tokens of their document, 0 where there is none: float32 [n]."""
    laid, start = np.zeros(len(doc.tokens), np.float32), int((doc.branch == 0).sum())
    numbers = np.concatenate(parts)
    laid[start : start + len(numbers)] = numbers
    return laid


def scorer(logprob: Callable, make: Callable, micro: int) -> Callable[[TrainState, list[Group]], list[Group]]:
    """relogp(state, groups) -> groups with the trainer's log-probs of their trained tokens under the state's weights (0 elsewhere).

    logprob as of an objective, make as of a step, micro: groups in a forward pass.
    """

    @torch.no_grad()
    def relogp(state: TrainState, groups: list[Group]) -> list[Group]:
        done = []
        for i in range(0, len(groups), micro):
            some = [group._replace(old_logp=None) for group in groups[i : i + micro]]
            docs = [document(group) for group in some]
            batch, plan = make(range(len(docs)), docs, seed=None)
            found = np.asarray(logprob(state.params, state.frozen, batch, plan).logp.float().cpu())
            done += _with_old(some, found)
        return done

    return relogp


def _with_old(groups: list[Group], found: np.ndarray) -> list[Group]:
    """Log-probs of the read rows, which come in the order of the groups' trained tokens, laid beside all tokens."""
    out, start = [], 0
    for group in groups:
        laid = []
        for one in group.completions:
            values, count = np.zeros(len(one.tokens), np.float32), int(one.trained.sum())
            values[one.trained] = found[start : start + count]
            laid.append(values)
            start += count
        out.append(group._replace(old_logp=tuple(laid)))
    return out
