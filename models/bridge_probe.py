"""What a model of transformers computes, from a few tokens through its skeleton with stand-ins for its weights.

A stand-in is a cheap function of each token by itself: a linear layer gives sin of a weighted sum of its input, so no weight of its size is
made, and the run is at the true sizes. Two documents go through it packed, and each by itself through the same stand-ins with transformers'
own attention and masks. Where both agree, and nothing of one document reaches the other, the model may be packed.
T tokens, D hidden, V vocabulary.
"""

import functools
from collections import OrderedDict
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from treetune.models import bridge_attention, bridge_modules, bridge_skeleton
from treetune.models.bridge_attention import CALL, Heads
from treetune.models.bridge_skeleton import Skeleton
from treetune.models.dense import LogitMap
from treetune.ops import attention

SIZE = 7  # tokens of each of the two documents: more than the taps of any short convolution
TOLERANCE = 1e-4  # of states of size 1, in float32
OWN_LOOPS = ("DbrxExperts", "JetMoeParallelExperts", "LongcatFlashExperts")  # experts outside of transformers' interface
CHOICES = ("keep_window_size", "num_hashes")  # attributes of attention that chooses its keys by their values
NOTE = -1  # the key of a hook: those of torch count from 0
MADE = 1 << 22  # a parameter of more elements is not made: the module that holds it gets a stand-in


class Facts(NamedTuple):
    """alone: why documents go through the model one at a time, empty where they may be packed. logits: of the output matrix; bias: whether
    it has one. For each layer its window, and heads and widths (K, d, e) of keys and values of each of its calls of attention. softcap,
    sinks: of any layer. called: paths of the linear layers that are called, and not read for their weight. whole: whether more than a scale
    stands between the base model and the output matrix, so that states are read behind it. unread: paths of what text does not come by, as
    the weights of a model that sees. short: positions up to which all documents turn alike, where longer ones turn otherwise.
    """

    alone: str
    logits: LogitMap
    bias: bool
    windows: tuple[int | None, ...] = ()
    widths: tuple[tuple[tuple[int, int, int], ...], ...] = ()
    softcap: float | None = None
    sinks: bool = False
    called: frozenset[str] = frozenset()
    whole: bool = False
    unread: frozenset[str] = frozenset()
    short: int | None = None


@functools.lru_cache(maxsize=8)
def facts(kind: str, text: str) -> Facts:
    """The facts of a config. Errors: ValueError for a model that is none of ours even one document at a time, with the reason."""
    documents = [torch.arange(SIZE) + 3, torch.arange(SIZE) * 2 + 5]
    plain = _StandIns(_plain_skeleton(kind, text, False), set(), set())
    _check_choices(plain.skeleton)
    whole, runs = False, _plain(plain, documents)
    if _differ(runs[0].read, _ratio(runs[0]) * runs[0].states):
        whole, plain = True, _StandIns(_plain_skeleton(kind, text, True), set(), set())
        runs = _plain(plain, documents)
    unread = _unread(plain, documents[0])
    bias, logits = plain.skeleton.head.bias is not None, _logit_map(runs[0], type(plain.skeleton.model).__name__)
    try:
        seen = _packed(_StandIns(_with_plans(kind, text, whole), set(), set()), documents, [run.states for run in runs])
    except _Alone as reason:
        return Facts(
            str(reason), logits, bias, called=frozenset(plain.called), whole=whole, unread=unread, short=_short(plain.skeleton.base)
        )
    calls = [call for layer in seen for call in layer]
    return Facts(
        "",
        logits,
        bias,
        tuple(layer[0].window for layer in seen),
        tuple(tuple((call.k.shape[1], call.k.shape[2], call.v.shape[2]) for call in layer) for layer in seen),
        next((call.softcap for call in calls if call.softcap is not None), None),
        any(call.sinks is not None for call in calls),
        frozenset(plain.called),
        whole,
        unread,
    )


class _StandIns(NamedTuple):
    """What fills modules in place of weights: forward functions of `others` by the id of a module, attention; the linear layers called, and
    the ids of all modules called.
    """

    skeleton: Skeleton
    called: set[str]
    entered: set[int]
    others: Mapping[int, Callable[..., Any]] = {}
    attend: Any = None


class _Alone(Exception):
    """Why documents are not packed."""


def _check_choices(skeleton: Skeleton) -> None:
    """Raise ValueError for sparse attention that chooses its keys: equal scores fall otherwise in texts of another length."""
    name = type(skeleton.model).__name__
    for path, module in skeleton.base.named_modules():
        if path.rpartition(".")[2] == "indexer":
            raise ValueError(f"{name} chooses the keys of its attention by an indexer ({path}), which is not computed")
        if odd := [field for field in CHOICES if hasattr(module, field)]:
            raise ValueError(f"{name} chooses the keys of its attention ({path}.{odd[0]}), which is not computed")


def _check_experts(skeleton: Skeleton) -> None:
    """Raise _Alone for experts with a loop of their own, whose products have as many rows as tokens of all documents come to an expert."""
    for path, module in skeleton.base.named_modules():
        if type(module).__name__ in OWN_LOOPS:
            raise _Alone(f"{type(module).__name__} ({path}) multiplies tokens of different documents together, which rounds them otherwise")


def _plain_skeleton(kind: str, text: str, whole: bool) -> Skeleton:
    try:
        return bridge_skeleton.skeleton(kind, text, torch.float32, True, bridge_skeleton.CPU, whole)
    except ValueError:
        raise
    except Exception as error:  # whatever the model's own code raises
        raise ValueError(f"transformers builds no model of this config.json of {kind}: {_one_line(error)}") from error


def _with_plans(kind: str, text: str, whole: bool) -> Skeleton:
    try:
        return bridge_skeleton.skeleton(kind, text, torch.float32, False, bridge_skeleton.CPU, whole)
    except Exception as error:  # whatever the model's own code raises
        raise _Alone(f"{kind} takes no attention function of another name: {_one_line(error)}") from error


def _one_line(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:200]


class _Logits(NamedTuple):
    """states [T, D] of the base model, the input [T, D] of the output matrix, and logits [T, n] where its product is GRID [n]."""

    states: Tensor
    read: Tensor
    logits: Tensor


GRID = torch.tensor([-1e6, -80.0, -30.0, -5.0, -1.0, -0.1, 0.0, 0.1, 1.0, 5.0, 30.0, 80.0, 1e6])


def _plain(stand_ins: _StandIns, documents: list[Tensor]) -> list[_Logits]:
    """A run of each document by itself."""
    name = type(stand_ins.skeleton.model).__name__
    try:
        runs = [_logits(stand_ins, tokens) for tokens in documents]
        later = _logits(stand_ins, torch.cat([documents[0][:-1], documents[0][:1]]))
        _reached(stand_ins, documents[0])
    except Exception as error:  # whatever the model's own code raises
        raise ValueError(f"{name} does not run on text alone, or does not train in evaluation mode: {_one_line(error)}") from error
    if _differ(later.states[:-1], runs[0].states[:-1]):
        raise ValueError(f"{name} lets a token see later ones: it is no causal language model under this config.json")
    return runs


def _reached(stand_ins: _StandIns, tokens: Tensor) -> set[int]:
    """The ids of the leaves that a backward pass reaches."""
    copies: dict[int, Any] = {}
    with torch.enable_grad():
        base = bridge_modules.copied(stand_ins.skeleton.base, partial(_fill, stand_ins), copies)
        for leaf in base.parameters():
            leaf.requires_grad_()
        base(input_ids=tokens[None], use_cache=False)[0].sum().backward()
    leaves = [(leaf, copies[id(module)]._parameters[name]) for module, name, leaf in _own_leaves(stand_ins.skeleton.base)]
    return {id(leaf) for leaf, copy in leaves if copy.grad is not None}


def _unread(stand_ins: _StandIns, tokens: Tensor) -> frozenset[str]:
    """The paths of the leaves outside of layers that text does not come by, in a model that reads other media, too."""
    skeleton = stand_ins.skeleton
    if not bridge_skeleton.has_media(skeleton.model):
        return frozenset()
    inside = {id(module) for module in (*skeleton.layers.modules(), skeleton.embedding, skeleton.head)}
    reached, outside = _reached(stand_ins, tokens), [own for own in _own_leaves(skeleton.model) if id(own[0]) not in inside]
    # Of a module with a stand-in, no gradient tells; it is one that is called.
    read = {id(leaf) for module, _, leaf in _own_leaves(skeleton.model) if id(module) in inside} | reached
    read |= {id(leaf) for module, _, leaf in outside if id(module) in stand_ins.entered and _replaced(module)}
    return frozenset(skeleton.paths[id(leaf)] for _, _, leaf in outside if id(leaf) not in read)


def _own_leaves(module: nn.Module) -> list[tuple[nn.Module, str, Tensor]]:
    return [(part, name, leaf) for part in module.modules() for name, leaf in part._parameters.items() if leaf is not None]


def _replaced(module: nn.Module) -> bool:
    """Whether a module gets a stand-in."""
    return bridge_skeleton.is_linear(module) or any(leaf.numel() > MADE for leaf in module._parameters.values() if leaf is not None)


def _logits(stand_ins: _StandIns, tokens: Tensor) -> _Logits:
    seen: dict[str, Tensor] = {}
    skeleton = stand_ins.skeleton

    def output(x: Tensor) -> Tensor:
        seen["read"] = x[0]
        return GRID.expand(*x.shape[:-1], -1)

    with torch.no_grad():
        model = bridge_modules.copied(skeleton.model, partial(_fill, stand_ins._replace(others={id(skeleton.head): output})))
        logits = model(input_ids=tokens[None], use_cache=False).logits
        if skeleton.base is skeleton.model:
            return _Logits(seen["read"], seen["read"], logits[0].float())
        states = bridge_modules.copied(skeleton.base, partial(_fill, stand_ins))(input_ids=tokens[None], use_cache=False)[0]
    return _Logits(states[0], seen["read"], logits[0].float())


def _ratio(run: _Logits) -> float:
    """The scale between the states of the base model and what the output matrix reads."""
    return float((run.read * run.states).sum() / (run.states * run.states).sum())


def _logit_map(run: _Logits, name: str) -> LogitMap:
    """c tanh(s z / c) or s z from its values on the grid."""
    values = run.logits[0].double()
    unit, most = float(values[GRID == 1.0]), float(values[-1])
    if abs(most - unit * 1e6) <= 1e-3 * abs(most):
        scale, cap = unit, None
    else:
        scale, cap = float(most * torch.atanh(torch.tensor(unit / most, dtype=torch.float64))), most
    expected = scale * GRID.double() if cap is None else cap * torch.tanh(scale * GRID.double() / cap)
    if not torch.allclose(values, expected, rtol=1e-4, atol=1e-4):
        raise ValueError(f"{name} makes its logits in a way that is neither a scale nor a soft-cap")
    return LogitMap(scale * _ratio(run), cap)


def _packed(stand_ins: _StandIns, documents: list[Tensor], plain: list[Tensor]) -> list[list[Heads]]:
    """The calls of attention of each layer. Errors: _Alone where the stream of two documents is not the two by themselves."""
    skeleton = stand_ins.skeleton
    name = type(skeleton.base).__name__
    if not bridge_skeleton.takes_positions(skeleton.base):
        raise _Alone(f"{name} takes no positions")
    if any(rope.get("rope_type") in ("dynamic", "longrope") for rope in _ropes(skeleton.base)):
        raise _Alone(f"the rotary positions of {name} change with the length of a document")
    calls: list[list[Heads]] = [[] for _ in skeleton.layers]
    try:
        states = _stream(stand_ins, documents, calls)
        changed = _stream(stand_ins, [documents[1].flip(0), documents[1]], [[] for _ in calls])
    except bridge_attention.OwnMask as error:
        raise ValueError(f"{error}, which may depend on later tokens of longer texts") from error
    except Exception as error:  # whatever the model's own code raises
        raise _Alone(f"{name} over a packed stream: {error if isinstance(error, ValueError) else _one_line(error)}") from error
    _check_calls(calls, name)
    if _differ(changed[SIZE:], states[SIZE:]):
        raise _Alone(f"{name} carries something from one document to the next")
    if _differ(states, torch.cat(plain)):
        raise _Alone(f"{name} computes something else over a packed stream")
    _check_experts(skeleton)
    return calls


def _ropes(base: nn.Module) -> list[dict[str, Any]]:
    """The rotary positions of all modules: the config of a part, such as the text model of a multimodal one, may have its own."""
    configs = {id(config): config for module in base.modules() if (config := getattr(module, "config", None)) is not None}
    ropes = [rope for config in configs.values() if isinstance(rope := getattr(config, "rope_parameters", None), dict)]
    return ropes + [part for rope in ropes for part in rope.values() if isinstance(part, dict)]


def _short(base: nn.Module) -> int | None:
    """Positions up to which all documents turn alike, where longer ones turn by other factors."""
    lengths = [rope.get("original_max_position_embeddings") for rope in _ropes(base) if rope.get("rope_type") == "longrope"]
    return min((length for length in lengths if length), default=None)


def _check_calls(calls: list[list[Heads]], name: str) -> None:
    """Raise _Alone unless every layer calls attention, and sees as far back in each of its calls."""
    for number, layer in enumerate(calls):
        windows = {call.window for call in layer}
        if not layer:
            raise _Alone(f"layer {number} of {name} keeps a state, or has an attention of its own")
        if len(windows) > 1:
            raise _Alone(f"layer {number} of {name} calls attention {len(layer)} times, of {len(windows)} windows")


def _stream(stand_ins: _StandIns, documents: list[Tensor], calls: list[list[Heads]]) -> Tensor:
    cu = torch.tensor([0, *torch.tensor([len(tokens) for tokens in documents]).cumsum(0)], dtype=torch.int32)
    positions = torch.cat([torch.arange(len(tokens)) for tokens in documents])
    stream = {"tokens": positions, "positions": positions, "cu_docs": cu}

    def attend(heads: Heads, layer: int) -> Tensor:
        calls[layer].append(heads)
        plan = attention.plan(stream, windows=(heads.window,), plain=False)
        return attention.attention(heads.q, heads.k, heads.v, plan, scale=heads.scale, softcap=heads.softcap, sinks=heads.sinks)

    def once(copy: Any, layer: int, *args: Any, **options: Any) -> Any:
        if calls[layer]:
            raise ValueError(f"layer {layer} of {type(stand_ins.skeleton.base).__name__} runs several times")
        return type(copy).forward(copy, *args, **options)

    seen = bridge_modules.Reader()
    copies: dict[int, Any] = {id(stand_ins.skeleton.head): seen}
    for number, layer in enumerate(stand_ins.skeleton.layers):
        copy = bridge_modules.copied(layer, partial(_fill, stand_ins._replace(attend=partial(attend, layer=number))))
        copies[id(layer)] = copy
        copy.__dict__["forward"] = partial(once, copy, number)
    with torch.no_grad():
        base = bridge_modules.copied(stand_ins.skeleton.base, partial(_fill, stand_ins), copies)
        states = base(input_ids=torch.cat(documents)[None], position_ids=positions[None], use_cache=False)[0]
    return states[0] if seen.states is None else seen.states[0]


def _differ(a: Tensor, b: Tensor) -> bool:
    return bool((a - b).abs().max() > TOLERANCE * b.abs().max().clamp_min(1.0)) or not bool(torch.isfinite(a).all())


def _fill(stand_ins: _StandIns, module: Any, copy: Any) -> None:
    """Fill a copy of a module with stand-ins."""
    skeleton, inside, own = stand_ins.skeleton, copy.__dict__, [leaf for leaf in module._parameters.values() if leaf is not None]
    number, large = min((_number(skeleton, leaf) for leaf in own), default=0), any(leaf.numel() > MADE for leaf in own)
    if id(module) in stand_ins.others:
        inside["forward"] = stand_ins.others[id(module)]
    elif bridge_skeleton.is_linear(module):
        inside["forward"], large = partial(_linear, stand_ins, module), True
    elif large:
        inside["forward"] = partial(_lookup, module.weight, number) if isinstance(module, nn.Embedding) else partial(_same_shape, number)
    make: Callable[..., Tensor] = _rows if large else _made
    inside["_parameters"] = {name: leaf if leaf is None else make(skeleton, leaf) for name, leaf in module._parameters.items()}
    inside[CALL] = stand_ins.attend
    note = partial(_note, stand_ins.entered, id(module))
    inside["_forward_pre_hooks"] = OrderedDict(module._forward_pre_hooks) | {NOTE: note}


def _note(entered: set[int], number: int, *_: Any) -> None:
    entered.add(number)


def _linear(stand_ins: _StandIns, module: Any, x: Tensor) -> Tensor:
    stand_ins.called.add(stand_ins.skeleton.paths[id(module.weight)])
    return _token_wise(module.out_features, _number(stand_ins.skeleton, module.weight), x)


def _number(skeleton: Skeleton, leaf: Tensor) -> int:
    return skeleton.numbers[skeleton.paths[id(leaf)]]


def _rows(skeleton: Skeleton, leaf: Tensor) -> Tensor:
    """One value along each row, so of no size in memory: for what reads the weight of a module that has a stand-in."""
    column = (_noise(leaf.shape[0], _number(skeleton, leaf)) / leaf.shape[-1]).to(leaf.dtype)
    return column.view(-1, *(1,) * (leaf.ndim - 1)).expand(leaf.shape)


def _made(skeleton: Skeleton, leaf: Tensor) -> Tensor:
    """Values near 1 for vectors, of both signs for all others: a function of the number of the leaf."""
    wave = _noise(leaf.numel(), _number(skeleton, leaf)).view(leaf.shape)
    wave = 1 + 0.2 * wave if leaf.ndim < 2 else wave * leaf.shape[-1] ** -0.5
    return wave.to(leaf.dtype)


def _noise(size: int, number: int) -> Tensor:
    """Irregular values from -1 to 1, float32 [size]."""
    return torch.sin(1e3 * torch.sin(torch.arange(size, dtype=torch.float64) + number)).float()


def _token_wise(outputs: int, number: int, x: Tensor) -> Tensor:
    """[..., I] -> [..., O]: a wave of one weighted sum of each token's own input."""
    sums = (x.float() * _noise(x.shape[-1], number)).sum(-1, keepdim=True) * x.shape[-1] ** -0.5
    return torch.sin(sums + torch.pi * _noise(outputs, number + 1)).to(x.dtype)


def _same_shape(number: int, x: Tensor, *_: Any, **__: Any) -> Tensor:
    return _token_wise(x.shape[-1], number, x)


def _lookup(weight: Tensor, number: int, tokens: Tensor) -> Tensor:
    return torch.sin(tokens[..., None] * 1.3 + torch.pi * _noise(weight.shape[1], number)).to(weight.dtype)
