"""Model families by name, and the one call that every loss is built on: log-probs of the read rows of a stream."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol, Unpack

import torch
from torch import Tensor

from treetune.core import gathers, layer_offload, machine, quant, shard, tree
from treetune.core import lora as lora_trees
from treetune.core.fields import Fields
from treetune.core.lora import Lora
from treetune.core.param import Params
from treetune.models import (
    decoder_attention,
    dense,
    gemma,
    gemma2,
    gpt_oss,
    granite,
    llama,
    mixtral,
    olmo2,
    phi3,
    qwen2,
    qwen3,
    qwen3_moe,
    smollm3,
    tensor_rules,
)
from treetune.models.dense import Cache, Config, LogitMap, Out, Training
from treetune.ops import attention, context_parallel, magnitude, tensor_parallel
from treetune.ops.context_parallel import Part
from treetune.ops.linear_logprob import TokenStats, linear_logprob
from treetune.ops.split_logprob import split_logprob


class Family(Protocol):
    """What a family's module provides; `dense` has it all but the names and the config.json."""

    @property
    def HF_TYPES(self) -> tuple[str, ...]:
        """The values of `model_type` in config.json that it computes."""
        ...

    @property
    def HF_KEYS(self) -> Mapping[str, str]:
        """{path of a leaf: key in transformers' files}, with `{}` for the number of the layer."""
        ...

    def config(self, hf: Fields) -> Config:
        """The sizes in a Hugging Face config.json."""
        ...

    def to_hf(self, cfg: Config) -> dict[str, Any]:
        """The config.json of a model: the inverse of `config`."""
        ...

    def abstract(self, cfg: Config, *, dtype: torch.dtype = torch.float32) -> Params:
        """The tree of `Param`s: shapes, axes and initial values."""
        ...

    def forward(
        self,
        weights: Params,
        batch: dict,
        plan: attention.Plan | None,
        cfg: Config,
        *,
        lora: Lora | None = None,
        cache: Cache | None = None,
        collect: Sequence[int] = (),
        **training: Unpack[Training],
    ) -> Out:
        """Hidden states of a packed stream."""
        ...

    def read(self, hidden: Tensor, batch: dict, cfg: Config, lora: Lora | None = None) -> Tensor:
        """The rows `at` of the hidden states, as `head` takes them."""
        ...

    def head(self, weights: Params, cfg: Config, lora: Lora | None = None) -> Tensor:
        """The output matrix, with its bias and the B of an adapter on it as further columns."""
        ...

    def widen(self, hidden: Tensor, cfg: Config, lora: Lora | None = None, key: Tensor | None = None) -> Tensor:
        """Hidden states with what meets those columns beside them."""
        ...

    def logit_map(self, cfg: Config) -> LogitMap:
        """Scale and soft-cap of the product of hidden states and output matrix."""
        ...


class Families(dict[str, Family]):
    """The native families by name; any other name is a `model_type` of transformers, whose own modules compute it."""

    def __missing__(self, kind: str) -> Family:
        from treetune.models import bridge

        return bridge.family(kind)

    def __contains__(self, kind: object) -> bool:
        from treetune.models import bridge

        return super().__contains__(kind) or (isinstance(kind, str) and bridge.knows(kind))


MODELS: dict[str, Family] = Families({
    "llama": llama, "qwen2": qwen2, "qwen3": qwen3, "phi3": phi3, "smollm3": smollm3, "granite": granite, "olmo2": olmo2, "gemma": gemma,
    "gemma2": gemma2, "mixtral": mixtral, "qwen3_moe": qwen3_moe, "gpt_oss": gpt_oss,
})  # fmt: skip


class Model(NamedTuple):
    """A model is a function of a tree: which family, its sizes, its weights."""

    family: str
    cfg: Config
    params: Params


def whole(model: Model) -> Params:
    """The weights gathered, each in the dtype that the model computes with it in."""
    # Quantised leaves are made dense by each layer.
    dtypes = wide(model)

    def one(path: str, leaf: Any) -> Any:
        return leaf if quant.quantised(leaf) else shard.gather(leaf, dtypes.get(path, model.cfg.dtype))

    return tree.from_items((path, one(path, leaf)) for path, leaf in tree.items(model.params))


def to_sample(model: Model) -> Params:
    """The weights as `whole`, with quantised leaves on a CPU dense, in order, as far as they take a quarter of the memory that is free.

    Those of layers that are away stay so, and so do leaves of which ranks have parts: layers gather them.

    A sampler reads every leaf once a token; made dense each time they would take longer than the products. Other devices make them fast.
    """
    dtypes, device = wide(model), model.params["embed_tokens"].device
    weights = model.params if in_parts(model) else whole(model)
    left = machine.free_memory() // 4 if any(quant.quantised(leaf) for leaf in tree.leaves(weights)) else 0

    def one(path: str, leaf: Any) -> Any:
        nonlocal left
        dtype = dtypes.get(path, model.cfg.dtype)
        if not quant.quantised(leaf) or leaf.multiplied or device.type != "cpu":
            return leaf
        if gathers.travels(leaf) or layer_offload.far(leaf, device):
            return leaf
        if (size := leaf.numel() * dtype.itemsize) > left:
            return leaf
        left -= size
        return shard.gather(leaf, dtype)

    return tree.from_items((path, one(path, leaf)) for path, leaf in tree.items(weights))


def in_parts(model: Model) -> bool:
    """Whether a model is computed from the parts that ranks have: not where the passes that a stream takes depend on its documents."""
    return not model.cfg.keeps_ids and any(shard.mesh_of(leaf) is not None for leaf in tree.leaves(model.params))


def wide(model: Model) -> Mapping[str, torch.dtype]:
    """The dtypes of leaves that are not computed with in that of the model: a family of transformers' modules may have such."""
    return getattr(MODELS[model.family], "wide", lambda cfg: {})(model.cfg)


def settled(low: Lora, weights: Params) -> Lora:
    """An adapter to sample with: whole leaves, no dropout, and of magnitudes what they are over the norms of the rows."""
    leaves, base, split = shard.gather_all(low.tree), dict(tree.items(weights)), tensor_rules.split_of(weights)
    pairs, known = lora_trees.pairs(leaves), []
    for path, length in lora_trees.magnitudes(leaves).items():
        weight = shard.gather(layer_offload.brought(base[path], length.device))
        across = split if tensor_rules.dimension(path) == 1 else None
        norms = magnitude.split_norms(weight, *pairs[path], low.scale, across)
        known.append((f"{path}.{lora_trees.SETTLED}", length / norms))
    if known:
        leaves = tree.from_items(
            [(path, leaf) for path, leaf in tree.items(leaves) if not path.endswith(f".{lora_trees.MAGNITUDE}")] + known
        )
    return low._replace(dropout=0.0, tree=leaves)


def bare(model: Model) -> Model:
    """The model without weights: what a function that lives as long as a run may keep, because the run's state holds the weights."""
    return model._replace(params={})


def logprobs(
    family: str,
    cfg: Config,
    weights: Params,
    batch: dict,
    plan: attention.Plan | None = None,
    *,
    lora: Lora | None = None,
    temperature: float = 1.0,
    want: tuple[str, ...] = (),
    **training: Unpack[Training],
) -> TokenStats:
    """Log-probs (nats, float32) of `targets` [N] read at rows `at` [N] of the stream, and the statistics in `want`.

    Only the read rows reach the head. The plan is computed here when absent.
    """
    model = MODELS[family]
    # A plan is made from a batch on the host; with one on the device this waits for it, so a training loop brings its own.
    plan = decoder_attention.plan(batch, cfg) if plan is None else plan
    hidden = model.forward(weights, batch, plan, cfg, lora=lora, **training | {"output": True}).hidden
    return _Head(model, cfg, weights, lora, plan).read(hidden, batch, temperature, want)


class _Head:
    """The output matrix of a model, or the rows of it that this rank has, gathered once for several reads.

    Ranks that share a stream share what is read of it, too.
    """

    def __init__(self, model: Family, cfg: Config, weights: Params, lora: Lora | None, plan: attention.Plan):
        self.model, self.cfg, self.lora, self.sharing = model, cfg, lora, plan.part and plan.part.split
        self.rule, self.vocabulary, self.split = model.logit_map(cfg), cfg.vocab_size, tensor_rules.split_of(weights)
        self.weight = model.head(weights, cfg, lora)

    def read(self, hidden: Tensor, batch: dict, temperature: float, want: tuple[str, ...] = ()) -> TokenStats:
        """Log-probs of `targets` [N] and the statistics in `want`, of rows `at` [N] of the hidden states [T, D]."""
        at, targets = batch["at"], batch["targets"]
        part = Part(self.sharing, len(at)) if self.sharing and len(at) else None
        rows = self.model.read(hidden, batch | {"at": context_parallel.own(part, at)}, self.cfg, self.lora)
        own = self._stats(rows, context_parallel.own(part, targets), temperature, want)
        return own if part is None else _joined(part, own)

    def _stats(self, rows: Tensor, targets: Tensor, temperature: float, want: tuple[str, ...]) -> TokenStats:
        options = _logit_options(self.rule, temperature)
        if self.split is None:
            return linear_logprob(rows, self.weight, targets, **options, want=want)
        (rows,) = tensor_parallel.enter(self.split, rows)
        return split_logprob(rows, self.weight, targets, split=self.split, vocabulary=self.vocabulary, **options, want=want)


def _joined(part: Part, own: TokenStats) -> TokenStats:
    """Statistics [N] of all rows, of which each rank has made those of its own [n]."""
    names = [name for name, value in own._asdict().items() if value is not None]
    made = [getattr(own, name) for name in names]
    wide = next(value.dtype for value in made if value.is_floating_point())
    every = zip(context_parallel.joined(part, *(value.to(wide) for value in made)), made, strict=True)
    whole = [value if mine.requires_grad else value.detach().to(mine.dtype) for value, mine in every]
    return TokenStats(**dict(zip(names, whole, strict=True)))


def _logit_options(rule: LogitMap, temperature: float) -> dict[str, Any]:
    """The options of `linear_logprob` for logits c tanh(s z / c) at a temperature t.

    They are (c / s) tanh(z / (c / s)) / (t / s): a scale costs no product and no rounding of its own.
    """
    softcap = None if rule.softcap is None else rule.softcap / rule.scale
    return {"softcap": softcap, "temperature": temperature / rule.scale}


def logprobs_routed(
    family: str,
    cfg: Config,
    weights: Params,
    batch: dict,
    plan: attention.Plan | None = None,
    *,
    temperature: float = 1.0,
    lora: Lora | None = None,
    want: tuple[str, ...] = (),
    **training: Unpack[Training],
) -> tuple[TokenStats, list[Tensor]]:
    """`logprobs`, and the logits [N, E] of the router of each layer with experts at the read rows: one forward pass."""
    model = MODELS[family]
    plan = decoder_attention.plan(batch, cfg) if plan is None else plan
    out = model.forward(weights, batch, plan, cfg, lora=lora, **training | {"routing": True, "output": True})
    stats = _Head(model, cfg, weights, lora, plan).read(out.hidden, batch, temperature, want)
    return stats, [logits[batch["at"]] for logits in out.routing]


def logprobs_beside(
    family: str,
    cfg: Config,
    weights: Params,
    batch: dict,
    plan: attention.Plan,
    *,
    temperature: float,
    lora: Lora | None = None,
    want: tuple[str, ...] = (),
    **training: Unpack[Training],
) -> tuple[TokenStats, TokenStats]:
    """`logprobs` of `targets` [N] at a temperature, and of `prompt_targets` [M] at rows `prompt_at` and temperature 1: one forward pass.

    The statistics in `want` are those of `targets`.
    """
    model = MODELS[family]
    hidden = model.forward(weights, batch, plan, cfg, lora=lora, **training | {"output": True}).hidden
    head = _Head(model, cfg, weights, lora, plan)
    prompts = batch | {"at": batch["prompt_at"], "targets": batch["prompt_targets"]}
    return head.read(hidden, batch, temperature, want), head.read(hidden, prompts, 1.0)


def document_logits(model: Model, tokens: Tensor, *, lora: Lora | None = None) -> Tensor:
    """Logits [T, V] in float32 of one document of token ids [T]: for checks and small prompts only."""
    batch, family, cfg = dense.single(tokens), MODELS[model.family], model.cfg
    hidden = family.forward(model.params, batch, decoder_attention.plan(batch, cfg), cfg, lora=lora).hidden
    product = family.widen(hidden, cfg, lora) @ family.head(model.params, cfg, lora).T
    product = tensor_parallel.gathered(tensor_rules.split_of(model.params), product, cfg.vocab_size)
    return dense.map_logits(product.float(), family.logit_map(cfg))
