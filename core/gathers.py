"""Leaves of which ranks have parts, gathered a layer at a time while the layer before computes; their gradients are summed and scattered.

A leaf is a DTensor that is split along the mesh axis `data`. Those of a layer travel as one message, each in the dtype that it is used in;
the gradients of the trained ones come back as one message, summed in float32 (float64 for leaves of that), while the pass goes on.
"""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from treetune.core import layer_offload, messages, quant, quant_split, shard, tree, window
from treetune.core.param import Params

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import DTensor

AXIS = "data"  # of the mesh: its ranks have parts of a leaf
SMALL = 8  # a message of less than one in so many of the numbers under way does not wait for them

Leaves = dict[str, Any]  # DTensors, and quantised leaves of such
# The dtype that leaves are computed in, by path where they differ; None is each leaf's own.
Computed = torch.dtype | Mapping[str, torch.dtype] | None


def travels(leaf: Any) -> bool:
    """Whether a leaf is split along `data`, by rows; of a quantised one its codes."""
    leaf = leaf.codes if quant.quantised(leaf) else leaf
    if window.coming(leaf) or not shard.distributed(leaf):
        return False
    names = leaf.device_mesh.mesh_dim_names or ()
    return AXIS in names and leaf.placements[names.index(AXIS)].is_shard(0)


def _by_mesh(leaves: Mapping[str, DTensor]) -> dict[DeviceMesh, list[str]]:
    """The paths of the leaves that travel together."""
    by_mesh: dict[DeviceMesh, list[str]] = {}
    for path, leaf in leaves.items():
        by_mesh.setdefault(leaf.device_mesh, []).append(path)
    return by_mesh


def _plan(leaves: Sequence[DTensor], dtypes: Sequence[torch.dtype]) -> messages.Layout:
    kinds = tuple((dtype, quant_split.own_box(leaf)[0]) for leaf, dtype in zip(leaves, dtypes, strict=True))
    return messages.layout(kinds, leaves[0].device_mesh[AXIS].size())


def _sent(leaves: Sequence[DTensor], dtypes: Sequence[torch.dtype]) -> messages.Gather:
    """The message of leaves of one mesh. Parts that are away are copied to the device for it, and go into it from there."""
    with torch.no_grad():
        parts = [shard.local(leaf) for leaf in leaves]
    mesh, plan = leaves[0].device_mesh, _plan(leaves, dtypes)
    device, group = _device_of(mesh), mesh.get_group(AXIS)
    away = layer_offload.those_away(parts, device)
    if not away:
        return messages.Gather(parts, plan, group)
    lane = layer_offload.way(device)
    message = messages.Gather(parts, plan, group, device, lane.beside)
    lane.drop(away)
    return message


def _device_of(device_mesh: DeviceMesh) -> torch.device:
    """The device of this rank on a mesh."""
    kind = device_mesh.device_type
    return torch.device(kind, torch.cuda.current_device()) if kind == "cuda" else torch.device(kind)


def _sent_as(leaf: DTensor, dtype: torch.dtype | None) -> torch.dtype:
    """The dtype that a leaf travels in: its own for integers, which a cast could change."""
    return dtype if dtype is not None and leaf.is_floating_point() else leaf.dtype


class Passage:
    """The layers of a model for one pass over them and back; `layers` are the leaves of each that travel, with their dtypes.

    When a layer is taken, the next in the direction of the pass begins to travel.
    """

    def __init__(self, layers: Sequence[tuple[Leaves, dict[str, torch.dtype]]]):
        self.layers = layers
        self.sums = _collecting.get()
        # Not a method: a cycle would keep whole layers, and gradients, until Python looks for cycles.
        self.window = window.Window(len(layers), lambda index: _Travelling(*layers[index]))
        self.window.start()

    def whole(self, index: int, *trees: Params) -> tuple[Params, ...]:
        """The trees of a layer, in the order in which the passage was given them, with whole tensors for the leaves that travel."""
        leaves, _ = self.layers[index]
        gathered = {path: leaf for path, leaf in self.window.take(index).items() if path in leaves}
        grad = torch.is_grad_enabled()
        trained = [path for path, leaf in leaves.items() if grad and not quant.quantised(leaf) and leaf.requires_grad]
        if trained:
            take = lambda: [self.window.take(index)[path] for path in trained]  # noqa: E731
            gathered |= zip(trained, _Whole.apply(take, self.sums, *(leaves[path] for path in trained)), strict=True)
        for path, leaf in gathered.items():
            gathered[path] = _remembered(leaf, window.Coming(self.window, index, path))
        return tuple(_replaced(part, f"{number}.", gathered) for number, part in enumerate(trees))

    def turn(self, *, back: bool = False) -> None:
        """The pass has gone over all layers. back: the last one stays for the way back, on which the others are gathered again."""
        self.window.turn(back=back)


def _remembered(leaf: Any, coming: window.Coming) -> Any:
    """A whole leaf, known as one that comes again; instead of a quantised one what says so, of which `shard.gather` makes it dense."""
    if not quant.quantised(leaf):
        return shard.remember(leaf, coming)
    if not leaf.multiplied:
        return coming
    shard.remember(leaf.codes, coming._replace(path=_piece(coming.path, "codes")))
    return leaf


def _replaced(part: Params, prefix: str, gathered: Mapping[str, Tensor]) -> Params:
    leaves = iter([gathered.get(prefix + path, leaf) for path, leaf in tree.items(part)])
    return tree.map(lambda _: next(leaves), part)


def passage(layers: Iterable[Sequence[tuple[Params, Computed]]]) -> Passage | None:
    """The passage over layers, each some trees with the dtype that their leaves are computed in; None where no leaf travels."""
    if not (dist.is_available() and dist.is_initialized()):
        return None  # without a look at layers, which may be made when they are asked for
    every = []
    for parts in layers:
        leaves: Leaves = {}
        dtypes: dict[str, torch.dtype] = {}
        for number, (part, dtype) in enumerate(parts):
            for path, leaf in tree.items(part):
                if travels(leaf):
                    own = dtype.get(path) if isinstance(dtype, Mapping) else dtype
                    leaves[f"{number}.{path}"], dtypes[f"{number}.{path}"] = leaf, _sent_as(leaf, own)
        every.append((leaves, dtypes))
    return Passage(every) if any(leaves for leaves, _ in every) else None


def most(leaves: Iterable[Any], passes: int) -> int:
    """Passes of the rank that makes most of them, of those that have parts of the leaves: a collective; `passes` where none is in parts."""
    mesh = next((mesh for leaf in leaves if (mesh := shard.mesh_of(leaf)) is not None), None)
    if mesh is None:
        return passes
    return int(shard.all_reduce(torch.tensor(passes, device=mesh.device_type), "max", mesh, mesh.mesh_dim_names or ()))


class _Travelling:
    """A layer on its way: one message, or one for each mesh that its leaves are split over. Of quantised leaves the codes travel."""

    def __init__(self, leaves: Leaves, dtypes: dict[str, torch.dtype]):
        self.leaves: dict[str, Any] = {}
        self.quantised = {path: leaf for path, leaf in leaves.items() if quant.quantised(leaf)}
        sent = {path: leaf for path, leaf in leaves.items() if path not in self.quantised}
        sent |= {_piece(path, name): part for path, leaf in self.quantised.items() for name, part in quant_split.pieces(leaf).items()}
        kinds = {path: dtypes[path] if path in dtypes else leaf.dtype for path, leaf in sent.items()}
        groups = _by_mesh(sent).values()
        self.pending_messages = [(paths, _sent([sent[path] for path in paths], [kinds[path] for path in paths])) for paths in groups]

    def wait(self) -> Mapping[str, Any]:
        """The whole leaves by path, and the tensors of those that are quantised."""
        if not self.pending_messages:
            return self.leaves
        while self.pending_messages:
            paths, message = self.pending_messages.pop(0)
            self.leaves |= zip(paths, message.wait(), strict=True)
        for path, leaf in self.quantised.items():
            parts = {name: self.leaves[_piece(path, name)] for name in quant_split.pieces(leaf)}
            self.leaves[path] = whole = quant_split.joined(leaf, parts)
            self.leaves[_piece(path, "codes")] = whole.codes
        return self.leaves


def _piece(path: str, name: str) -> str:
    """The name of a tensor of a quantised leaf among those that travel."""
    return f"{path} {name}"


def together(leaves: Sequence[DTensor]) -> list[Tensor]:
    """Leaves of one mesh that take no gradient, whole along `data`, by a message of their own where they are split there."""
    return _sent(leaves, [leaf.dtype for leaf in leaves]).wait() if travels(leaves[0]) else [shard.local(leaf) for leaf in leaves]


class _Begun(NamedTuple):
    """A leaf of no layer on its way. version: of its part, which an update would have changed since."""

    message: messages.Gather
    dtype: torch.dtype
    version: int


_BEGUN = "_begun"  # an attribute of the leaf, with which what is never asked for goes


def begin(leaf: Any, dtype: torch.dtype | None) -> None:
    """Begin to gather a leaf that `gather` will be asked for, if it travels."""
    if travels(leaf):
        sent_as = _sent_as(leaf, dtype)
        setattr(leaf, _BEGUN, _Begun(_sent([leaf], [sent_as]), sent_as, shard.local(leaf)._version))


def _begun(leaf: DTensor, dtype: torch.dtype) -> messages.Gather:
    """The message of a leaf in a dtype, begun before or now."""
    begun: _Begun | None = getattr(leaf, _BEGUN, None)
    if begun is not None:
        delattr(leaf, _BEGUN)
    fits = begun is not None and begun.dtype == dtype and begun.version == shard.local(leaf)._version
    return begun.message if begun is not None and fits else _sent([leaf], [dtype])


def gather(leaf: DTensor, dtype: torch.dtype | None) -> Tensor:
    """A whole leaf in a dtype, by a message of its own; its gradient is summed in float32 and scattered."""
    take = lambda: _begun(leaf, _sent_as(leaf, dtype)).wait()  # noqa: E731
    if torch.is_grad_enabled() and leaf.requires_grad:
        return _Whole.apply(take, _collecting.get(), leaf)[0]
    return take()[0]


class _Whole(torch.autograd.Function):
    """take() -> the whole tensors of trained leaves; their gradients go to `sums`, or back to autograd where nobody collects them."""

    @staticmethod
    def forward(ctx: Any, take: Callable[[], list[Tensor]], sums: Sums | None, *leaves: DTensor) -> tuple[Tensor, ...]:
        ctx.leaves, ctx.sums = leaves, sums
        if sums is not None:
            sums.expect(leaves)
        ctx.set_materialize_grads(False)
        # Aliases: the tensors themselves are given again, to another pass through the layer.
        return tuple(whole.view_as(whole) for whole in take())

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple:
        parts: list[Tensor | None] = [None] * len(grads)
        by_path = dict(zip(map(str, range(len(grads))), ctx.leaves, strict=True))
        for paths in _by_mesh(by_path).values():
            places = [int(path) for path in paths]
            own = [ctx.leaves[place] for place in places]
            sums: Sums | None = ctx.sums if ctx.sums is not None and ctx.sums.takes(own) else None
            if sums is not None:
                sums.make_room(sum(leaf.numel() for leaf in own))
            message = _Scattered(own, _summed([grads[place] for place in places], own))
            if sums is not None:
                sums.push(message)
            else:
                for place, leaf, part in zip(places, own, message.wait(), strict=True):
                    parts[place] = shard.rewrap(part.to(leaf.dtype), leaf)
        return None, None, *parts


def _summed(grads: Sequence[Tensor | None], leaves: Sequence[DTensor]) -> messages.Sum:
    dtype = torch.float64 if any(leaf.dtype == torch.float64 for leaf in leaves) else torch.float32
    group, device = leaves[0].device_mesh.get_group(AXIS), leaves[0].device
    return messages.Sum(grads, _plan(leaves, [dtype] * len(leaves)), group, device)


class _Scattered(NamedTuple):
    """Gradients on their way to the ranks that have the parts of their leaves."""

    leaves: Sequence[DTensor]
    message: messages.Sum

    def wait(self) -> list[Tensor]:
        """This rank's parts."""
        parts = self.message.wait()
        _sum_beyond(self.message.own, self.leaves[0].device_mesh)
        return parts


def _sum_beyond(part: Tensor, mesh: DeviceMesh) -> None:
    """Add up, in place, what ranks have that hold the same part and saw other tokens: along the other axes of the leaf's mesh."""
    for name in mesh.mesh_dim_names or ():
        if name != AXIS and name in shard.SUMMED and mesh[name].size() > 1:
            dist.all_reduce(part, group=mesh.get_group(name))


class Add(Protocol):
    """What gradients go to."""

    def __call__(self, i: int, part: Tensor, /, *, last: bool) -> None:
        """Take a part of the gradient of a leaf by its number. last: no further part of it comes in this pass."""
        ...


class Sums:
    """Gradients that come while a backward pass goes on; each is handed to `add` when it has come."""

    def __init__(self, leaves: Sequence[Tensor], add: Add):
        self.numbers = {id(leaf): number for number, leaf in enumerate(leaves)}
        self.add = add
        self.pending: deque[_Scattered] = deque()
        self.uses: dict[int, int] = {}  # of leaves, by number, from which gradients are still to come
        self.open = self.forward = True

    def expect(self, leaves: Sequence[Tensor]) -> None:
        """Leaves are used; what a backward pass computes again is no further use."""
        if self.forward and self.takes(leaves):
            for number in [self.numbers[id(leaf)] for leaf in leaves]:
                self.uses[number] = self.uses.get(number, 0) + 1

    def takes(self, leaves: Sequence[Tensor]) -> bool:
        """Whether all leaves are among those whose gradients are collected."""
        return self.open and all(id(leaf) in self.numbers for leaf in leaves)

    def make_room(self, numbers: int) -> None:
        """Wait for those on their way where a message of so many numbers follows: what travels is as large as a layer in float32.

        Not for a small one, such as a norm behind the head.
        """
        if numbers * SMALL >= sum(leaf.numel() for sent in self.pending for leaf in sent.leaves):
            self.finish()

    def push(self, sent: _Scattered) -> None:
        """One more on its way."""
        self.pending.append(sent)

    def finish(self) -> None:
        """Wait for all that are on their way, and hand them on."""
        while self.pending:
            scattered = self.pending.popleft()
            for leaf, part in zip(scattered.leaves, scattered.wait(), strict=True):
                number = self.numbers[id(leaf)]
                left = self.uses[number] = self.uses.get(number, 0) - 1
                self.add(number, part, last=left == 0)


_collecting: ContextVar[Sums | None] = ContextVar("sums", default=None)


@contextlib.contextmanager
def collecting(leaves: Sequence[Tensor], add: Add) -> Iterator[Sums]:
    """Inside, gradients of leaves that travel are not given to autograd: `add` has had all of them, in order, at the end.

    `forward` of what it gives becomes False when the forward pass is over.
    """
    sums = Sums(leaves, add)
    token = _collecting.set(sums)
    try:
        yield sums
        sums.finish()
    finally:
        # After an exception nothing is waited for: the ranks that it would come from may have stopped as well.
        sums.open = False
        sums.pending.clear()
        _collecting.reset(token)
