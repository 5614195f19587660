"""What a counted step means on devices: memory by term, and seconds by term.

Seconds of an op are the longest of its FLOPs, its bytes and its launches, each over the rate that is reached of them; a GPU is never faster
than Python launches. All are estimates.
"""

import dataclasses
from typing import Any, NamedTuple

import torch

from treetune.cli import memory_rows
from treetune.cli.methods.method import Method
from treetune.cli.options import meshes
from treetune.cli.options.meshes import Placing
from treetune.cli.planning import abstract_run, strided_step, traffic
from treetune.cli.planning.abstract_run import Axes, Costs, Counted, Shapes
from treetune.cli.planning.traffic import GRADIENT
from treetune.core import grad
from treetune.core.config import table
from treetune.models import loading, memory, quantised
from treetune.models.census import MESSAGE, Cost
from treetune.models.devices import Device
from treetune.models.memory import Setup

OPS = 30  # of a layer, when a sampler computes a token
ELSEWHERE = {"activation_offloading": "none", "layer_offloading": "none"}


class Place(NamedTuple):
    """Where a run would be: a device, how many of it, and what is split among them.

    sharding: as of the option. copies: of what is split, which ranks along `replicate` hold. tensor, context: ranks that split layers, and
    that share streams.
    """

    device: Device
    ranks: int = 1
    sharding: str = "none"
    copies: int = 1
    tensor: int = 1
    context: int = 1

    @property
    def parts(self) -> int:
        """Into how many parts is split what is split along `data`."""
        return self.ranks // (self.copies * self.tensor * self.context)

    @property
    def shares(self) -> int:
        """Into how many parts the weights are split."""
        return self.tensor * (self.parts if self.sharding == "full" else 1)

    @property
    def axes(self) -> Axes:
        """The mesh, for a count."""
        return Axes(self.tensor, self.copies, self.context, self.parts, self.sharding)


def place(device: Device, run: Placing) -> Place:
    """A device as often as the options of a run say."""
    count, axes = meshes.processes(run), {}
    if count > 1:
        axes = meshes.sizes(run)
    return Place(device, count, meshes.sharding(run), axes.get("replicate", 1), axes.get("tensor", 1), axes.get("context", 1))


class Estimate(NamedTuple):
    """Bytes by term at the peak of one device, seconds of a step by term, and tokens of a step on all devices."""

    memory: dict[str, int]
    seconds: dict[str, float]
    tokens: int

    @property
    def peak(self) -> int:
        """The most bytes at once."""
        return sum(self.memory.values())

    @property
    def step(self) -> float:
        """Seconds of a step."""
        return sum(self.seconds.values())


class Run(NamedTuple):
    """A run to estimate: its method, its config, and its model by compute dtype."""

    method: Method
    config: Any
    family: str
    cfg: Any

    def shapes(self, device: Device) -> Shapes:
        """The model as it is on a device."""
        kind = torch.device("cuda" if device.gpu else "cpu")
        return abstract_run.shapes(self.family, self.cfg, loading.compute_dtype(self.config.model.dtype, kind))


def counted(run: Run, place: Place) -> Counted:
    """The step of a run on one of its devices; what is elsewhere is counted as if it were there."""
    optim = dataclasses.replace(run.config.optim, **ELSEWHERE)
    if optim.gradient_checkpointing == "offload":
        optim = dataclasses.replace(optim, gradient_checkpointing="full")
    config = dataclasses.replace(run.config, optim=optim)
    if getattr(getattr(config, "reference", None), "ref_model", None) is not None:
        # Another model would be read; the one that the run starts from stands for it.
        config = dataclasses.replace(config, reference=dataclasses.replace(config.reference, ref_model=None))
    return abstract_run.count(run.method, config, run.shapes(place.device), gpu=place.device.gpu, axes=place.axes)


def estimate(run: Run, seen: Counted, place: Place) -> Estimate:
    """The memory and the time of a run whose step was counted."""
    model = run.shapes(place.device)
    steps = run.config.optim.gradient_accumulation_steps
    return Estimate(_memory(run, seen, place, model), _seconds(run, seen, place, model), seen.tokens * steps * place.parts * place.copies)


def setup(run: Run, place: Place, **changed: Any) -> Setup:
    """What the formulas of `models.memory` take of a run."""
    values, optim = table.flatten(run.config), dataclasses.replace(run.config.optim, **changed)
    tokens, rows, slots = memory_rows.sizes(values)
    return Setup(
        tokens,
        rank=values["lora_r"] if values.get("adapter") == "lora" else 0,
        scheme=quantised.of(run.config.model),
        remat=optim.remat,
        device="cuda" if place.device.gpu else "cpu",
        rows=rows,
        slots=slots,
        nucleus=(values.get("top_p") or 1.0) < 1,
        master=loading.DTYPES[optim.master_dtype].itemsize,
        layers=optim.layer_offloading,
    )


def _memory(run: Run, seen: Counted, place: Place, model: Shapes) -> dict[str, int]:
    names = {"weights": "weights", "adapter": "adapter", "other": "other models", "optimiser": "optimiser states"}
    held = {title: seen.trees[name] for name, title in names.items()}
    if run.config.optim.optimizer.startswith("paged_") and place.device.gpu:
        held["optimiser states"] = 0
    if run.config.run.async_save and run.config.run.saves_per_epoch != 0 and not place.device.gpu:
        held["copies to save"] = seen.saved  # in host memory, while the next step is computed
    split = place.parts if place.sharding == "gradients" else 1
    gradients = min(GRADIENT * seen.own / split, max(0, seen.peak - sum(seen.trees.values())))
    activations = max(0, seen.peak - sum(seen.trees.values()) - gradients)
    with_, without = setup(run, place), setup(run, place, **ELSEWHERE)
    if with_.remat != without.remat or with_.layers != without.layers:
        before, after = (memory.table(model.abstract, model.cfg, one) for one in (without, with_))
        activations = max(0, activations - (before.activations - after.activations) - max(0, before.layer - after.layer))
        held["weights"] -= (before.weights - after.weights) / place.shares
    terms = held | {"gradients": gradients} | _working(run, seen, place, model, activations)
    sampler = memory.cache(model.cfg, with_.rows, with_.slots) / place.tensor + memory.draws(model.cfg, with_.rows, with_.nucleus)
    sampler += memory.dense_weights(model.abstract, model.cfg, with_)
    if seen.rollouts[1]:
        sampler = strided_step.sampler(model.cfg, seen.rollouts, nucleus=with_.nucleus) / place.tensor
    if (with_.rows or seen.rollouts[1]) and sampler > gradients + activations:
        terms |= {"gradients": 0, "activations": 0, "sampler": sampler}
    return {name: round(value) for name, value in terms.items() if value >= 1}


def _working(run: Run, seen: Counted, place: Place, model: Shapes, activations: float) -> dict[str, float]:
    """What there is of a micro-batch beside gradients, of which layers that are whole for a moment are a term of their own."""
    if place.sharding != "full" or place.parts == 1:
        return {"activations": activations}
    trained = table.flatten(run.config).get("adapter") != "lora"
    form: Any = {"trained": trained, "copied": not place.device.gpu, "scheme": quantised.of(run.config.model)}
    here = traffic.present(model, place.parts, adapter=seen.trees["adapter"] * place.parts, **form)
    here = min(activations, here / place.tensor)
    return {"activations": activations - here, "gathered layers": here}


def _seconds(run: Run, seen: Counted, place: Place, model: Shapes) -> dict[str, float]:
    steps, device = run.config.optim.gradient_accumulation_steps, place.device
    low = model.cfg.dtype.itemsize < 4
    micro, update = (_by_term(costs, device, low) for costs in (seen.micro, seen.update))
    terms = {name: steps * value for name, value in micro.items()} | {"update": sum(update.values())}
    terms["communication"] = _communication(run, seen, place, model, sum(micro.values()))
    terms["sampling"] = _sampling(run, seen, place, model)
    return {name: value for name, value in terms.items() if value > 0}


def _by_term(costs: Costs, device: Device, low: bool) -> dict[str, float]:
    """Seconds of products, attention, passes over memory, and of Python where it cannot keep up."""
    peak, terms, launches = device.low if low else device.wide, {"products": 0.0, "attention": 0.0, "passes": 0.0}, 0.0
    for name, cost in costs.items():
        if name.startswith(MESSAGE):
            continue
        kind = "attention" if "attention" in name else "products" if cost.flops > 0 else "passes"
        rate = peak * (device.attention if kind == "attention" else device.products)
        moved = cost.bytes / (device.bandwidth * device.passes)
        terms[kind] += max(cost.flops / rate, moved, cost.launches * device.launch)
        launches += cost.launches
    return terms | {"launching": max(0.0, launches * device.host - sum(terms.values()))}


def _communication(run: Run, seen: Counted, place: Place, model: Shapes, computing: float) -> float:
    """Seconds in which a device waits for messages, `computing` those of a micro-batch."""
    if place.ranks == 1:
        return 0.0
    device, optim, again = place.device, run.config.optim, grad.recomputes(run.config.optim.remat)
    within, trained = _within_layers(run, seen, device), seen.trained / place.tensor
    if place.parts * place.copies == 1:
        return within
    share, gradients, steps = (place.parts - 1) / place.parts, GRADIENT * trained, optim.gradient_accumulation_steps
    # What ranks with the same parts send one another, once a step: a sum is twice as many bytes as there are.
    same = place.copies
    copies = within if same == 1 else within + device.latency + 2 * gradients / place.parts * (same - 1) / same / device.link
    if place.sharding != "full":
        weights = trained * loading.DTYPES[optim.master_dtype].itemsize if place.sharding != "none" else 0
        # Parts of sums are half as many bytes as sums, and are taken of every micro-batch.
        times, size = (steps, gradients) if place.sharding == "gradients" else (1, 2 * gradients)
        layers = len(model.abstract["layers"])
        waited = times * traffic.beside(size * share / device.link + layers * device.latency, computing, layers, again=again)
        return copies + waited + weights * share / device.link
    if place.parts == 1:
        return copies
    volumes = traffic.sharded(run, model, seen.trees["adapter"] * place.parts, trained)
    volumes = volumes._replace(gathered=volumes.gathered / place.tensor, outside=volumes.outside / place.tensor)
    return copies + steps * traffic.waited(volumes, device, place.parts, computing, again=again)


def _within_layers(run: Run, seen: Counted, device: Device) -> float:
    """Seconds of a step of the messages that layers wait for, as they were counted: of ranks that split them, or share their tokens."""
    seconds = 0.0
    for axis in ("tensor", "context"):
        for costs, times in ((seen.micro, run.config.optim.gradient_accumulation_steps), (seen.update, 1)):
            cost = costs.get(MESSAGE + axis, Cost())
            seconds += times * (cost.launches * device.latency + cost.bytes / device.link)
    return max(0.0, seconds)


def _sampling(run: Run, seen: Counted, place: Place, model: Shapes) -> float:
    """Seconds in which the completions of a step are sampled: for each token of the longest all weights are read once."""
    values = table.flatten(run.config)
    n, longest = values.get("num_generations") or 0, values.get("max_completion_length") or 0
    if not (n and longest):
        return 0.0
    parts = (values.get("steps_per_generation") or 1) * (values.get("num_iterations") or 1)
    rows = values["micro_batch_size"] * values["gradient_accumulation_steps"] * (values.get("steps_per_generation") or 1) * n
    device, cfg = place.device, model.cfg
    flops = 2 * traffic.numbers(model.abstract) * rows / ((device.low if cfg.dtype.itemsize < 4 else device.wide) * device.products)
    cache = memory.cache(cfg, rows, (values.get("max_prompt_len") or values.get("sequence_len") or 0) + longest // 2)
    read = (seen.trees["weights"] + cache) / (device.bandwidth * device.passes)
    return longest * max(flops, read, OPS * cfg.num_layers * max(device.host, device.launch)) / parts
