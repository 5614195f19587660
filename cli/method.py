"""What distinguishes one way of training from another, for `training.train` to put together with all that they share."""

from collections.abc import Callable
from typing import Any, NamedTuple

from treetune.cli import setup
from treetune.core.data import kinds, pack
from treetune.core.state import Objective, TrainState

Collate = Callable[..., dict]  # (documents, budget=, pad=) -> batch


def plain(docs: list, **options: Any) -> dict:
    """The stream of documents without branches."""
    return pack.collate(docs, **options)


class Parts(NamedTuple):
    """A method put together for one model.

    trees, extra: what trains, what is frozen, and the method's own state. streams: the batches that documents become, one (Batch, Plan)
    each; with several, `prepare` makes micro-batches of them. prepare(state, micro_batches) adds what is global to a step.
    between(state, metrics, step) -> state runs after each step. enrich(state, docs, make) -> docs computes once what every epoch needs.
    """

    trees: setup.Trees
    objective: Objective
    held: Objective  # for evaluation: without noise, and with all that is worth reporting
    streams: tuple[Collate, ...] = (plain,)
    extra: dict = {}
    prepare: Callable | None = None
    between: Callable | None = None
    enrich: Callable | None = None


class Method(NamedTuple):
    """kind: of rows that it reads. rates: peak learning rate with an adapter and without. shown: metrics worth a place on the screen."""

    kind: kinds.DatasetSpec
    build: Callable[..., Parts]  # (config, model, trees, on=device, mesh=, say=)
    rates: tuple[float, float]
    shown: tuple[str, ...] = ()
    unit: str = "pairs"  # what the loss is a mean over
    head: bool = False  # whether a head of scores trains with the model
    perplexity: bool = False  # whether the loss is a mean of -log p, so that its exponential means something
    goal: str = "loss"  # the metric of evaluations that says which checkpoint is best: one named loss falls, any other rises


def supervised(config: Any, model: Any, trees: setup.Trees, **_: Any) -> Parts:
    """Supervised fine-tuning and pretraining."""
    remat = "full" if config.optim.gradient_checkpointing else None
    logprob = setup.logprob(model, trees.lora, neftune=config.loss.neftune_noise_alpha, remat=remat)
    held = setup.objective(setup.logprob(model, trees.lora), type(config.loss)())
    return Parts(trees, setup.objective(logprob, config.loss), held)


def in_turn(functions: list[Callable], state: TrainState, metrics: dict, step: int) -> TrainState:
    """Several functions as the one that runs between steps."""
    for between in functions:
        state = between(state, metrics, step)
    return state


SUPERVISED = Method(kinds.KINDS["text"], supervised, (2e-4, 2e-5), (), "supervised tokens", perplexity=True)
