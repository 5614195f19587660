"""Terms on the routers of experts beside any objective that is made from a log-prob function, from the same forward pass.

N scored tokens of a micro-batch, L layers with experts, E experts.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple, NoReturn, Protocol

from torch import Tensor

from treetune.core.state import Batch, Logprob, Metric, Metrics, Objective, Params, Plan, Terms, TokenStats
from treetune.losses import routing


class LogprobRouted(Protocol):
    """A `Logprob` that gives the routers' logits at the scored positions, too: [N, E] of each layer with experts."""

    def __call__(
        self, params: Params, frozen: Params, batch: Batch, plan: Plan, /, *, want: tuple[str, ...] = ()
    ) -> tuple[TokenStats, Sequence[Tensor]]:
        """TokenStats of `targets` [N], and logits [N, E] by layer."""
        ...


class Router(NamedTuple):
    """The weights of the terms, and the experts that a token goes to."""

    top_k: int
    aux_coef: float = 0.0
    z_coef: float = 0.0


def objective(logprob: LogprobRouted, make: Callable[[Logprob], Objective], router: Router) -> Objective:
    """The terms of make(logprob), and for each router term its weight times its mean over layers and scored tokens of the step.

    make: from a logprob to an objective that calls it once. Tokens of prompts are read and not scored, so a prompt that completions
    share counts as one that each has for itself: not at all.
    """
    plain = make(_no_logprob)
    coefs = {name: coef for name, coef in (("router_aux", router.aux_coef), ("router_z", router.z_coef)) if coef}

    def counts(batch: Batch) -> Terms:
        return plain.counts(batch) | dict.fromkeys(coefs, batch["seq_lens"].sum())

    def terms(params: Params, frozen: Params, batch: Batch, plan: Plan) -> tuple[Terms, Metrics]:
        layers: list[Tensor] = []

        def recorded(*args, want: tuple[str, ...] = ()) -> TokenStats:
            stats, logits = logprob(*args, want=want)
            layers.extend(logits)
            return stats

        numerators, metrics = make(recorded).terms(params, frozen, batch, plan)
        sums, count = _sums(layers, batch, router.top_k), batch["seq_lens"].sum()
        means = {f"{name}_loss": Metric(value.detach() / count.clamp(min=1), count) for name, value in sums.items()}
        return numerators | {name: coef * sums[name] for name, coef in coefs.items()}, metrics | means

    return Objective(counts, terms)


def _sums(layers: Sequence[Tensor], batch: Batch, top_k: int) -> Terms:
    """The sums of both terms over the scored tokens, each averaged over the layers."""
    balance = [routing.load_balance(logits, batch["seq"], batch["seq_lens"], top_k=top_k).sum() for logits in layers]
    z = [routing.z_loss(logits).sum() for logits in layers]
    return {name: sum(terms[1:], terms[0]) / len(layers) for name, terms in (("router_aux", balance), ("router_z", z))}


def _no_logprob(*_: object, **__: object) -> NoReturn:
    raise AssertionError("denominators need no log-probs")
