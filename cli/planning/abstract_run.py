"""A run without its numbers: the very step that would run, on tensors that have shapes only, counted op by op."""

import contextlib
import dataclasses
import re
from collections.abc import Iterator
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
    UnsupportedFakeTensorException,
)

from treetune.cli import assembly
from treetune.cli.methods.method import Method, Parts, Setting
from treetune.cli.options import optim
from treetune.cli.planning import absent_ranks, documents, strided_step
from treetune.core import ckpt_parts, grad, optim_parts, quant, shard, step, tree
from treetune.core.data.prompts import Prompt
from treetune.core.param import Param, Params
from treetune.core.partition import Partition
from treetune.core.run.ranks import Ranks
from treetune.core.state import TrainState
from treetune.models import MODELS, Model, batches, memory, policy, quantised, tensor_rules
from treetune.models.adapter import Base
from treetune.models.census import Census, Cost
from treetune.models.dense import Config
from treetune.models.policy import Policy
from treetune.ops import backend

CPU = torch.device("cpu")
Costs = dict[str, Cost]
LAYERS = 2, 3  # periods of layers that are counted of a deep model


class Shapes(NamedTuple):
    """The model of a run: its family, its sizes in the compute dtype of a device, and the leaves that they mean."""

    family: str
    cfg: Config
    abstract: Params


class Axes(NamedTuple):
    """The ranks of a run, from the outermost axis of their mesh: how many, and what is split along `data` (as of --sharding)."""

    tensor: int = 1
    replicate: int = 1
    context: int = 1
    data: int = 1
    sharding: str = "none"

    @property
    def sizes(self) -> dict[str, int]:
        """Those with several ranks."""
        return {name: size for name, size in zip(self._fields[:-1], self[:-1], strict=True) if size > 1}


ONE = Axes()


class Counted(NamedTuple):
    """What a step takes of one rank, the one that has most. micro: the cost of a micro-batch by op; update: what there is once a step.

    peaks: the most memory in each part of the step. trees: bytes of the state by part. trained: numbers that
    train, on all ranks together; own: those of this rank. saved: bytes that it writes into a checkpoint.
    tokens: of a micro-batch, branches included. rollouts: T, R, G of `strided_step`.
    """

    micro: Costs
    update: Costs
    peaks: dict[str, float]
    trees: dict[str, float]
    trained: float
    own: float
    saved: float
    tokens: int
    rollouts: tuple[int, int, int]

    @property
    def peak(self) -> int:
        """The most memory at once."""
        return round(max(self.peaks.values()))


class _Rows(NamedTuple):
    """The data of a run whose rows are not read."""

    train: list[Any]
    val: list[Any]


# What methods look at of prompts before a run.
ROWS = _Rows([Prompt(np.zeros(1, np.int32), "", None, {"between": [], "truth": []}, 0)], [])


def shapes(family: str, cfg: Config, dtype: torch.dtype) -> Shapes:
    """The model in a compute dtype."""
    cfg = dataclasses.replace(cfg, dtype=dtype)
    return Shapes(family, cfg, MODELS[family].abstract(cfg, dtype=dtype))


def count(method: Method, config: Any, model: Shapes, *, gpu: bool, axes: Axes = ONE) -> Counted:
    """A step of two micro-batches, or of the one that it has, as a GPU or this CPU would compute it, one of so many.

    Errors: ValueError as those of the run itself.
    """
    period = _period(model.cfg) if dict.__contains__(MODELS, model.family) else 0  # layers of modules may be of any kind
    few = [period * part for part in LAYERS]
    with _of_modules(model.family):
        if period and model.cfg.num_layers > few[1] + period and not _by_layer(config):
            less, more = (_count(method, config, _cut(model, layers), gpu, axes) for layers in few)
            return _extrapolated(less, more, few, model.cfg.num_layers)
        return _count(method, config, model, gpu, axes)


@contextlib.contextmanager
def _of_modules(family: str) -> Iterator[None]:
    """Raise ValueError where modules of transformers decide by numbers what they compute."""
    try:
        yield
    except (DataDependentOutputException, DynamicOutputShapeException, UnsupportedFakeTensorException) as error:
        if dict.__contains__(MODELS, family):
            raise
        raise ValueError(
            f"a {family} model is computed by modules of transformers, which look at numbers that a plan does not have "
            f"({str(error).splitlines()[0]}): treetune info MODEL tells the memory of a run"
        ) from None


def _count(method: Method, config: Any, model: Shapes, gpu: bool, axes: Axes) -> Counted:
    number = min(2, config.optim.gradient_accumulation_steps)
    _warm(quantised.of(config.model), config.optim.optimizer)
    with absent_ranks.joined(axes.sizes, copies=not gpu) as ranks:
        with FakeTensorMode(allow_non_fake_inputs=True, allow_fallback_kernels=False) as mode:
            parts, state, optimizer = _assemble(method, config, model, ranks, axes.sharding)
            seen, trees = Census(_local(state)), _trees(state)
        saved = sum(part.values.nbytes for part in ckpt_parts.own(state, 0).parts.values())
        micro, rollouts = _micro_batch(method, config, parts, parts.policy.cfg), (0, 0, 0)
        if method.data == "strided":
            prepare, rollouts = strided_step.prepared(cast(Any, parts.prepare).args[0], micro)
            parts = parts._replace(prepare=prepare)
        marks: list[Costs] = []

        def terms(*inputs: Any) -> Any:
            marks.append(dict(seen.by))
            seen.live.enter("forward")
            out = parts.objective.terms(*inputs)
            seen.live.enter("backward")
            return out

        def update(*inputs: Any) -> Any:
            marks.append(dict(seen.by))
            seen.live.enter("update")
            return optimizer.update(*inputs)

        splits = {"mesh": ranks.mesh, "split_gradients": axes.sharding == "gradients" and ranks.mesh is not None}
        clip = config.optim.max_grad_norm or None
        objective, updating = parts.objective._replace(terms=terms), optimizer._replace(update=update)
        run = step.make_step(objective, updating, schedule=_rate, clip=clip, prepare=parts.prepare, **splits)
        with absent_ranks.telling(ranks, seen.sent), mode, seen, backend.counting(seen.told, gpu=gpu):
            run(state, [micro] * number)
    before, first = marks[0], _less(marks[1], marks[0])
    each = _sum(first, before, 1 / number)
    rest = _sum(seen.by, each, -number)
    leaves = tree.leaves(state.params)
    trained, own = sum(leaf.numel() for leaf in leaves), sum(shard.local(leaf).numel() for leaf in leaves)
    seen.live.enter("after")
    return Counted(each, rest, dict(seen.live.peaks), trees, trained, own, saved, _tokens(micro) + rollouts[1] * rollouts[2], rollouts)


def _local(part: Any) -> list[torch.Tensor]:
    """What of some trees is on this rank."""
    return [shard.local(tensor) for tensor in grad.tensors(part)]


def _period(cfg: Any) -> int:
    """After how many layers their kinds begin again; 0 where it is not known."""
    if not isinstance(cfg, Config):
        return 0
    experts = () if cfg.experts is None else cfg.experts.layers
    kinds = [(cfg.window_of(i), i in cfg.nope_layers, i in experts) for i in range(cfg.num_layers)]
    return next(p for p in range(1, cfg.num_layers + 1) if all(kinds[i] == kinds[i - p] for i in range(p, cfg.num_layers)))


def _by_layer(config: Any) -> bool:
    """Whether options name layers by their numbers."""
    options = getattr(config, "adapter", None)
    if options is None:
        return False
    names = (*options.lora_target_modules, *options.lora_rank_pattern, *options.unfrozen_parameters, *options.lora_modules_to_save)
    return bool(options.lora_layers) or any(re.search(r"layers?\D{0,3}\d", name) for name in names)


def _cut(model: Shapes, layers: int) -> Shapes:
    """The model with fewer layers."""
    cfg = model.cfg
    experts = cfg.experts
    if experts is not None:
        experts = dataclasses.replace(experts, layers=tuple(i for i in experts.layers if i < layers))
    few = {"num_layers": layers, "layer_windows": cfg.layer_windows[:layers], "experts": experts}
    cfg = dataclasses.replace(cfg, **few, nope_layers=tuple(i for i in cfg.nope_layers if i < layers))
    return Shapes(model.family, cfg, MODELS[model.family].abstract(cfg, dtype=cfg.dtype))


def _extrapolated(less: Counted, more: Counted, few: list[int], layers: int) -> Counted:
    """The counts of a model of so many layers: every further layer adds the same."""
    times = (layers - few[1]) / (few[1] - few[0])

    def along(before: Any, after: Any) -> Any:
        if isinstance(after, dict):
            return {name: along(before.get(name, Cost() if isinstance(value, Cost) else 0), value) for name, value in after.items()}
        return Cost(*map(along, before, after)) if isinstance(after, Cost) else after + times * (after - before)

    micro, update, peaks, trees, trained, own, saved = (along(*pair) for pair in zip(less[:-2], more[:-2], strict=True))
    return Counted(micro, update, peaks, trees, trained, own, saved, more.tokens, more.rollouts)


def _warm(scheme: quant.Scheme | None, optimizer: str) -> None:
    """Make the tables that are kept for the life of the process, which must hold numbers."""
    if scheme is not None:
        quant.dense(quant.quantise(torch.ones(64, 64), scheme))
    memory.state_bytes(optim.build(optim.OptimOptions(optimizer=optimizer)))


def _tokens(micro: Any) -> int:
    """Tokens of all streams of a micro-batch."""
    streams = [micro] if isinstance(micro[0], dict) else micro
    return sum(batch["tokens"].shape[0] for batch, _ in streams)


def _less(costs: Costs, before: Costs) -> Costs:
    return _sum(costs, before, -1)


def _sum(costs: Costs, others: Costs, times: float) -> Costs:
    names = dict.fromkeys([*costs, *others])
    return {name: costs.get(name, Cost()).plus(others.get(name, Cost()), times) for name in names}


def _rate(number: torch.Tensor) -> torch.Tensor:
    return torch.tensor(1e-3)


def _assemble(method: Method, config: Any, model: Shapes, ranks: Ranks, sharding: str) -> tuple[Parts, TrainState, Any]:
    """The method, the state and the optimiser of a rank, as `cli.assembly` makes them."""
    home = tensor_rules.home(ranks.mesh, sharding)
    tensor_rules.check(model.cfg, home, "this model")
    start = assembly.sharing_streams(ranks.mesh, _policy(method, config, model, home))
    parts = method.parts(config, start, Setting(CPU, ranks, ROWS, [], _nothing, _nothing))
    parts = parts._replace(policy=policy.place(parts.policy, ranks.mesh, sharding))
    optimizer = optim.build(config.optim)
    if sharding in ("moments", "gradients") and ranks.mesh is not None:
        optimizer = optim_parts.parted(optimizer, shard.splitting(ranks.mesh))
    params = parts.policy.params
    return parts, TrainState(params, parts.policy.frozen, optimizer.init(params), parts.extra, torch.tensor(0)), optimizer


def _nothing(text: str) -> None:
    pass


def _policy(method: Method, config: Any, model: Shapes, home: Partition | None) -> Policy:
    scheme = quantised.of(config.model)
    chosen = set() if scheme is None else quantised.paths(model.abstract, scheme)

    def made(path: str, leaf: Param) -> Any:
        if scheme is None or path not in chosen:
            return _empty(path, leaf, home)
        whole = _quantised(leaf, scheme)
        return whole if home is None else home.split(path, whole)

    leaves = [(path, made(path, leaf)) for path, leaf in tree.items(model.abstract)]
    base = Model(model.family, model.cfg, tree.from_items(leaves))
    options = getattr(config, "adapter", None)
    if options is None or options.adapter == "none":
        names = () if options is None else options.unfrozen_parameters
        return policy.full(base, names, torch.bfloat16 if config.optim.master_dtype == "bfloat16" else torch.float32)
    # Every start has the sizes of the plain one.
    spec = assembly.adapter_spec(options)._replace(init="default", start=None)
    return policy.adapt(base, spec, base=Base("", ""), seed=0, head=method.head)


def _empty(path: str, leaf: Param, home: Partition | None) -> torch.Tensor:
    """A leaf, or this rank's part of it."""
    box = None if home is None else home.box(path, leaf.shape)
    if home is None or box is None:
        return torch.empty(leaf.shape, dtype=leaf.dtype)
    shape = [range(*one.indices(size)) for one, size in zip(box, leaf.shape, strict=False)]
    part = torch.empty([*map(len, shape), *leaf.shape[len(box) :]], dtype=leaf.dtype)
    return home.joined(path, part, leaf.shape)


def _quantised(leaf: Param, scheme: quant.Scheme) -> quant.Quantised:
    """A quantised leaf of unknown codes."""
    shape = torch.Size(leaf.shape)
    codes, scale, nested, offset = _coded(shape, scheme)
    return quant.Quantised(scheme.kind, shape, leaf.dtype, codes, scale, nested, offset, quant.NO_ORIGIN)


def _coded(shape: torch.Size, scheme: quant.Scheme) -> tuple[Any, Any, Any, Any]:
    """Codes, scale, nested scale and offset of a leaf."""
    if scheme.kind == "int4":
        *rows, width = shape
        return torch.empty(*rows, -(-width // 2), dtype=torch.uint8), torch.empty(*rows, -(-width // quant.BLOCK)), None, None
    if scheme.kind not in quant.FOUR_BITS:
        codes = torch.int8 if scheme.kind == "int8" else torch.float8_e4m3fn
        return torch.empty(shape, dtype=codes), torch.empty(shape[:-1]), None, None
    blocks = -(-shape.numel() // quant.BLOCK)
    codes = torch.empty(-(-shape.numel() // 2), dtype=torch.uint8)
    if not scheme.double:
        return codes, torch.empty(blocks), None, None
    return codes, torch.empty(blocks, dtype=torch.uint8), torch.empty(-(-blocks // quant.NESTED_BLOCK)), torch.empty(())


def _trees(state: TrainState) -> dict[str, float]:
    """Bytes of the state by part; what is shared counts once, where it comes first."""
    seen: set[int] = set()

    def bytes_of(part: Any) -> float:
        new = {tensor.untyped_storage()._cdata: tensor.untyped_storage().nbytes() for tensor in _local(part)}
        own = sum(size for key, size in new.items() if key not in seen)
        seen.update(new)
        return own

    weights = [state.frozen.get("model", {}), state.params.get("model", {}), state.params.get("head", {})]
    return {
        "weights": bytes_of(weights),
        "adapter": bytes_of(state.params.get("lora", {})),
        "other": bytes_of([state.frozen, state.extra]),
        "optimiser": bytes_of(state.opt),
    }


def _micro_batch(method: Method, config: Any, parts: Parts, cfg: Config) -> Any:
    """The largest micro-batch of the run, as its loader gives it."""
    return batches.batcher(cfg, CPU, parts.collates)(documents.of_config(method, config))
