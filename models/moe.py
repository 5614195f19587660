"""The sparse MLP: a router sends each token to k of E experts, and their answers are summed with its weights.

T tokens, D hidden, E experts, k experts of a token, F width of an expert, N = T k rows sorted by expert.
y_t = sum_j p_tj W_down,e silu(W_gate,e x_t) * (W_up,e x_t), e the j-th expert of token t; leaves are stacked by expert.
p is the softmax of the router's logits over all experts, of which k are kept, or over those k alone, which is the same renormalised.
No token is dropped and nothing depends on other tokens, so packing changes nothing.
Source: Shazeer et al., arXiv 1701.06538; Jiang et al. (Mixtral), arXiv 2401.04088, section 2.1.
"""

from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

from treetune.core.lora import Lora
from treetune.core.param import Param, Params
from treetune.ops import backend, clamped_swiglu, grouped_linear, lora_linear, routing, swiglu, tensor_parallel
from treetune.ops.tensor_parallel import Split


@dataclass(frozen=True)
class Experts:
    """Sizes of the sparse layers, whose numbers are `layers`.

    normalised: the weights of a token's experts sum to 1. biased: router and experts have biases. clamp: alpha and limit of a clamped
    SwiGLU (`ops.clamped_swiglu`), for which rows of gates and of values alternate.
    """

    count: int
    top_k: int
    width: int
    layers: tuple[int, ...]
    normalised: bool = True
    biased: bool = False
    clamp: tuple[float, float] | None = None


class Leaf(Protocol):
    """Makes the `Param` of a leaf in the dtype of a model."""

    def __call__(self, shape: tuple[int, ...], *, axes: tuple[str, ...], init: str, op: Literal["router", "experts", ""]) -> Param:
        """A leaf of this shape."""
        ...


def abstract(experts: Experts, hidden: int, leaf: Leaf, normal: str, deep: str) -> Params:
    """The leaves of a sparse MLP: router [E, D], experts.gate_up_proj [E, 2 F, D], gates first, and experts.down_proj [E, D, F]."""
    count, width = experts.count, experts.width
    layer: Params = {
        "router": leaf((count, hidden), axes=("expert", "embed"), init=normal, op="router"),
        "experts": {
            "gate_up_proj": leaf((count, 2 * width, hidden), axes=("expert", "mlp", "embed"), init=normal, op="experts"),
            "down_proj": leaf((count, hidden, width), axes=("expert", "embed", "mlp"), init=deep, op="experts"),
        },
    }
    if experts.biased:
        layer["router_bias"] = leaf((count,), axes=("expert",), init="zeros", op="")
        layer["experts"] |= {
            "gate_up_bias": leaf((count, 2 * width), axes=("expert", "mlp"), init="zeros", op=""),
            "down_bias": leaf((count, hidden), axes=("expert", "embed"), init="zeros", op=""),
        }
    return layer


def choose(logits: Tensor, experts: Experts) -> tuple[Tensor, Tensor]:
    """The k experts of each token and their weights [T, k] (float32, float64 for float64), best first, from the router's logits [T, E]."""
    top, chosen = logits.topk(experts.top_k, dim=-1)
    wide = backend.stat_dtype(logits)
    if experts.normalised:
        return chosen, top.to(wide).softmax(-1)
    return chosen, logits.to(wide).softmax(-1).gather(-1, chosen)


def mlp(
    h: Tensor, w: Params, adapters: Params, experts: Experts, lora: Lora | None = None, split: Split | None = None
) -> tuple[Tensor, Tensor]:
    """y [T, D] of h [T, D], and the router's logits [T, E]; `w` and `adapters` are those of a layer, `lora` says their scale.

    With a split each rank has some of the experts, next to one another, and computes what they say of all tokens.
    Errors: ValueError for dropout in adapters on router or experts.
    """
    if lora and lora.dropout and ("router" in adapters or "experts" in adapters):
        raise ValueError(f"the adapter has dropout {lora.dropout} and sits on experts or routers, where dropout is not computed")
    scale = lora.scale if lora else 1.0
    (logits,) = lora_linear.lora_linears(h, [w["router"]], [adapters.get("router")], scale=scale)
    logits = logits + w["router_bias"] if experts.biased else logits
    chosen, weights = choose(logits, experts)
    h, weights = tensor_parallel.enter(split, h, weights)
    own = w["experts"]["gate_up_proj"].shape[0]
    if split is not None:
        chosen = (chosen - split.rank * own) % experts.count  # its own first
    way, ab = routing.route(chosen, experts.count), adapters.get("experts", {})
    ends = way.ends[:own]
    rows = _of_own(routing.dispatch(h, way, experts.top_k), ends, split)
    gate_up = _project(rows, "gate_up", w["experts"], ab, ends, scale)
    answers = _of_own(_project(_gated(gate_up, experts), "down", w["experts"], ab, ends, scale), ends, split)
    return tensor_parallel.leave(split, routing.combine(answers, weights, way)), logits


def _of_own(rows: Tensor, ends: Tensor, split: Split | None) -> Tensor:
    """Rows [N, D] with zeros in those of experts of other ranks, which come last and which nothing has computed."""
    if split is None:
        return rows
    return torch.where((torch.arange(rows.shape[0], device=rows.device) < ends[-1])[:, None], rows, 0)


def _gated(gate_up: Tensor, experts: Experts) -> Tensor:
    if experts.clamp is not None:
        return clamped_swiglu.clamped_swiglu(gate_up, alpha=experts.clamp[0], limit=experts.clamp[1])
    return swiglu.swiglu(*gate_up.chunk(2, dim=-1))


def _project(rows: Tensor, name: str, w: Params, ab: Params, ends: Tensor, scale: float) -> Tensor:
    y = grouped_linear.grouped_linear(rows, w[f"{name}_proj"], ends, ab.get(f"{name}_proj"), scale=scale)
    return grouped_linear.grouped_bias(y, w[f"{name}_bias"], ends) if f"{name}_bias" in w else y
