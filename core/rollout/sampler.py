"""Who writes the completions of a run: an engine (the trainer's own weights, or a server), and how a prompt is played on it.

P prompts, n completions of each.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, Protocol

from treetune.core import tree
from treetune.core.data.prompts import Prompt
from treetune.core.rollout import documents, sync, vllm
from treetune.core.rollout.group import Completion, PromptSampler, Sampled
from treetune.core.run.errors import RunFailed
from treetune.core.state import TrainState

ROWS = 64  # completions that are sampled together: their keys and values are in memory at a time


class TokenSampler(Protocol):
    """Continues token ids under a policy; `numbers` name the randomness of each prompt."""

    def __call__(self, policy: Any, ids: Sequence[Sequence[int]], numbers: Sequence[int], /, *, n: int, max_tokens: int) -> Sampled:
        """n completions of at most max_tokens tokens after each prompt."""
        ...


class Rollout(Protocol):
    """How a prompt is played (one reply, several turns, an environment): makes a sampler of prompts out of one of token ids."""

    def __call__(self, draw: TokenSampler, /, *, n: int, max_tokens: int) -> PromptSampler:
        """n completions of each prompt; max_tokens: longest reply."""
        ...


class Engine(Protocol):
    """What draws tokens, and how it gets the weights. It may own a server and threads: call `close` when done."""

    def draw(self, policy: Any, ids: Sequence[Sequence[int]], numbers: Sequence[int], /, *, n: int, max_tokens: int) -> Sampled:
        """Completions to train on, from the weights that the engine holds."""
        ...

    def draw_evaluation(self, policy: Any, ids: Sequence[Sequence[int]], numbers: Sequence[int], /, *, n: int, max_tokens: int) -> Sampled:
        """Completions to evaluate, from the weights of `policy` and with randomness of their own."""
        ...

    def join(self, policy: Any, /) -> None:
        """Take part in what other ranks still draw, where they sample together; this one has no more to draw."""
        ...

    def refresh(self, policy: TrainState, /) -> None:
        """Have the weights of the state for what is evaluated next."""
        ...

    def snapshot(self, state: TrainState) -> Any:
        """What a thread may sample from while `state` trains on."""
        ...

    def start(self, state: TrainState) -> None:
        """Give the engine the weights that a run starts with."""
        ...

    def after_step(self, state: TrainState, metrics: dict[str, Any], step: int) -> TrainState:
        """Give the engine the weights after a step, where it is their turn."""
        ...

    def metrics(self) -> dict[str, float]:
        """Numbers about the engine since the last call."""
        ...

    def close(self) -> None:
        """End what the engine started."""
        ...


class Join(Protocol):
    """Takes part in what other ranks still draw."""

    def __call__(self, policy: Any, /) -> None:
        """Return when no rank draws any more."""
        ...


def _alone(policy: Any, /) -> None:
    """Nothing: a rank with whole weights samples by itself."""


class LocalEngine(NamedTuple):
    """The trainer's own weights, which are always the newest; with two samplers, since evaluation has a seed of its own."""

    draw: TokenSampler
    draw_evaluation: TokenSampler
    join: Join = _alone

    def refresh(self, policy: TrainState, /) -> None:
        """Nothing to do: the state is the argument of every draw."""

    def snapshot(self, state: TrainState) -> TrainState:
        """The state with a copy of the trained weights; the frozen ones are shared."""
        # The optimiser updates weights in place, so a thread that samples from the live ones would mix two policies.
        return state._replace(params=tree.map(lambda leaf: leaf.detach().clone(), state.params))

    def start(self, state: TrainState) -> None:
        """Nothing to do: the state is the argument of every draw."""

    def after_step(self, state: TrainState, metrics: dict[str, Any], step: int) -> TrainState:
        """The state as it is."""
        return state

    def metrics(self) -> dict[str, float]:
        """None."""
        return {}

    def close(self) -> None:
        """Nothing to end."""


class Sampler(NamedTuple):
    """An engine, and the samplers of prompts on it: for training, and for evaluation."""

    engine: Engine
    train: PromptSampler
    evaluation: PromptSampler


def build(engine: Engine, rollout: Rollout, *, n: int, evaluation_n: int, max_tokens: int) -> Sampler:
    """The sampler of a run: n completions of each prompt to train on, evaluation_n to evaluate, with replies of at most max_tokens."""
    train = rollout(engine.draw, n=n, max_tokens=max_tokens)
    evaluation = rollout(engine.draw_evaluation, n=evaluation_n, max_tokens=max_tokens)

    def evaluate(policy: Any, prompts: Sequence[Prompt], numbers: Sequence[int], /) -> Sampled:
        engine.refresh(policy)
        return evaluation(policy, prompts, numbers)

    return Sampler(engine, _with_others(train, engine), _with_others(evaluate, engine))


def _with_others(sample: PromptSampler, engine: Engine) -> PromptSampler:
    """A sampler of prompts that returns when no rank draws any more: how often one draws depends on its own prompts."""

    def play(policy: Any, prompts: Sequence[Prompt], numbers: Sequence[int], /) -> Sampled:
        sampled = sample(policy, prompts, numbers)
        engine.join(policy)
        return sampled

    return play


def describe(*, ahead: bool) -> str:
    """Who samples where no server does. ahead: completions come from a copy of the weights, a generation ahead."""
    return "the trainer's own weights" + (", a generation ahead" if ahead else "")


def single_turn(draw: TokenSampler, /, *, n: int, max_tokens: int) -> PromptSampler:
    """The rollout of n replies after each prompt."""

    def sample(policy: Any, prompts: Sequence[Prompt], numbers: Sequence[int], /) -> Sampled:
        return draw(policy, [prompt.tokens.tolist() for prompt in prompts], numbers, n=n, max_tokens=max_tokens)

    return sample


class LocalSample(Protocol):
    """The model's own sampling, of R = n * prompts rows, prompt by prompt."""

    def __call__(
        self, state: TrainState, ids: Sequence[Sequence[int]], numbers: Sequence[int], /, *, n: int, max_tokens: int
    ) -> documents.TokenSamples:
        """Tokens and log-probs from the weights of the state."""
        ...


def local(sample: LocalSample, *, stop_ids: Sequence[int], tokenizer: Any) -> TokenSampler:
    """A sampler of the weights of the state that it is given, which is the policy itself: the importance ratio is 1."""

    def draw(policy: TrainState, ids: Sequence[Sequence[int]], numbers: Sequence[int], /, *, n: int, max_tokens: int) -> Sampled:
        rows: list[list[Completion]] = []
        size = max(1, ROWS // n)
        for i in range(0, len(ids), size):
            samples = sample(policy, ids[i : i + size], numbers[i : i + size], n=n, max_tokens=max_tokens)
            rows += documents.completions(samples, n=n, stop_ids=set(stop_ids), tokenizer=tokenizer)
        return Sampled(rows, int(policy.step))

    return draw


@contextlib.contextmanager
def fatal_errors() -> Iterator[None]:
    """Turn unrecoverable server, reward and rollout errors into RunFailed."""
    try:
        yield
    except (ValueError, sync.SyncError, vllm.Lost, vllm.Unreachable) as error:
        raise RunFailed(f"{error}; once that is repaired, --resume auto goes on from the last checkpoint") from error


Wrapper = Callable[[Rollout], Rollout]  # a rollout with more around it, such as later turns
