"""Model families by name, and the one call that every loss is built on: log-probs of the read rows of a stream."""

from types import ModuleType
from typing import NamedTuple

from treetune.core.lora import Lora
from treetune.core.param import Params
from treetune.models import llama, qwen2, qwen3
from treetune.models.dense import Neftune
from treetune.ops import attention
from treetune.ops.linear_logprob import TokenStats, linear_logprob

MODELS: dict[str, ModuleType] = {"llama": llama, "qwen2": qwen2, "qwen3": qwen3}


class Model(NamedTuple):
    """A model is a function of a tree: which family, its sizes, its weights."""

    family: str
    cfg: llama.Config
    params: Params


def bare(model: Model) -> Model:
    """The model without weights: what a function that lives as long as a run may keep, because the run's state holds the weights."""
    return model._replace(params={})


def logprobs(
    family: str,
    cfg: llama.Config,
    weights: Params,
    batch: dict,
    plan: attention.Plan | None = None,
    *,
    lora: Lora | None = None,
    temperature: float = 1.0,
    want: tuple[str, ...] = (),
    noise: Neftune | None = None,
    remat: str | None = None,
) -> TokenStats:
    """Log-probs (nats, float32) of `targets` [N] read at rows `at` [N] of the stream, and the statistics in `want`.

    Only the read rows reach the head. The plan is computed here when absent.
    """
    model = MODELS[family]
    plan = attention.plan(batch, window=cfg.window, dtype=cfg.dtype) if plan is None else plan
    hidden = model.forward(weights, batch, plan, cfg, lora=lora, noise=noise, remat=remat).hidden
    rows, weight = model.read(hidden, batch, lora), model.head(weights, cfg, lora)
    return linear_logprob(rows, weight, batch["targets"], temperature=temperature, want=want)


def logprobs_beside(
    family: str,
    cfg: llama.Config,
    weights: Params,
    batch: dict,
    plan: attention.Plan,
    *,
    temperature: float,
    want: tuple[str, ...] = (),
    **how,
) -> tuple[TokenStats, TokenStats]:
    """`logprobs` of `targets` [N] at a temperature, and of `prompt_targets` [M] at rows `prompt_at` and temperature 1: one forward pass.

    how: lora, noise, remat of `logprobs`. The statistics in `want` are those of `targets`.
    """
    model, lora = MODELS[family], how.get("lora")
    hidden, weight = model.forward(weights, batch, plan, cfg, **how).hidden, model.head(weights, cfg, lora)
    own = linear_logprob(model.read(hidden, batch, lora), weight, batch["targets"], temperature=temperature, want=want)
    rows = model.read(hidden, batch | {"at": batch["prompt_at"]}, lora)
    return own, linear_logprob(rows, weight, batch["prompt_targets"])
