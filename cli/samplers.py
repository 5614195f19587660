"""Who samples a run's completions: the trainer itself, a vLLM server, or a rollout function of the user's on top of either."""

import contextlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from treetune.cli import custom_rollout, engine, rollouts, setup
from treetune.cli.errors import RunFailed
from treetune.core import tree
from treetune.core.rollout import sync, vllm
from treetune.core.rollout.group import Sampler
from treetune.core.state import TrainState
from treetune.models import Model


class Samplers(NamedTuple):
    """sample: num_generations completions of each prompt. held: those for evaluation. The rest as in `engine.Drawers`."""

    sample: Sampler
    held: Sampler
    snapshot: Callable[[Any], Any]
    start: Callable[[TrainState], None]
    between: Callable[[TrainState, dict, int], TrainState] | None
    close: Callable[[], None]
    metrics: Callable[[], dict]


def describe(config: Any) -> str:
    """Who samples, and how."""
    if not config.engine.use_vllm:
        return "the trainer's own weights" + (", a generation ahead" if config.pipeline.async_prefetch else "")
    where, every = f"{config.engine.vllm_server_host}:{config.engine.vllm_server_port}", config.pipeline.vllm_sync_interval
    return f"vLLM at {where}, which gets the weights " + ("after every step" if every == 1 else f"every {every} steps")


def build(
    config: Any,
    model: Model,
    trees: setup.Trees,
    tokenizer: Any,
    *,
    on: torch.device,
    root: Path,
    seeds: Sequence[int],
    say: Callable,
    around: Callable[[Callable], Callable] = lambda wrap: wrap,
    held: int = 1,
) -> Samplers:
    """The sampler that the options name; seeds for training and for evaluation, which takes `held` completions of each prompt.

    around: from what makes a sampler of who draws, as `rollouts.plain` does, to what makes the one that is used.
    """
    stop = setup.stop_ids(config.model, tokenizer)
    if config.engine.use_vllm:
        drawn = engine.build(config, model, trees, tokenizer, stop=stop, on=on, root=root, seeds=seeds, say=say)
    else:
        how = {"stop": stop, "tokenizer": tokenizer}
        pair = [rollouts.local(model, trees.lora, config.rollout, seed=seed, **how) for seed in seeds]
        drawn = engine.Drawers(*pair, snapshot)
    wrap = rollouts.plain
    if config.rollout.rollout_func is not None:
        wrap = custom_rollout.wrapper(config.rollout.rollout_func, tokenizer, model.cfg)
    made = around(wrap)
    sample = made(drawn.train, config.rollout, n=config.rollout.num_generations)
    return Samplers(sample, made(drawn.held, config.rollout, n=held), *drawn[2:])


def snapshot(state: TrainState) -> TrainState:
    """The state with trained weights of its own: the optimiser changes the others in place. The frozen ones are shared."""
    return state._replace(params=tree.map(lambda leaf: leaf.detach().clone(), state.params))


@contextlib.contextmanager
def ending():
    """Inside, what a server, a reward or a rollout function cannot go on from ends the run with one line."""
    try:
        yield
    except (ValueError, sync.SyncError, vllm.Lost, vllm.Unreachable) as error:
        raise RunFailed(f"{error}; once that is repaired, --resume auto goes on from the last checkpoint") from error
