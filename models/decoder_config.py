"""The sizes of a decoder, with the switches that tell its families apart, and the leaves that follow from them.

D hidden, H heads, K key/value heads, d head dim, F mlp width, L layers, V vocabulary.
"""

import math
from dataclasses import dataclass, field
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from treetune.core.param import Param, Params
from treetune.models import moe, rope_scaling
from treetune.models.moe import Experts
from treetune.models.rope_scaling import Rope, Scaling
from treetune.ops.tensor_parallel import Split


@dataclass(frozen=True)
class Config:
    """Sizes of a dense decoder. `dtype` is the dtype it computes in, whatever its leaves are stored in."""

    vocab_size: int
    hidden_size: int
    mlp_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    rope_scaling: Scaling | None = None
    max_positions: int = 2048
    tied: bool = False
    qkv_bias: bool = False
    o_bias: bool = False
    qk_norm: bool = False
    window: int | None = None
    layer_windows: tuple[int | None, ...] = ()  # one for each layer, instead of `window` on all
    attn_softcap: float | None = None
    attn_sinks: bool = False
    head_bias: bool = False
    init_std: float = 0.02
    dtype: torch.dtype = torch.float32
    rope_part: float = 1.0  # of each head, from its first feature, that turns
    window_rope: Rope | None = None  # of layers with a window, where they have other rotary positions
    nope_layers: tuple[int, ...] = ()  # without rotary positions
    # RMSNorm of n = x / rms(x): "llama" w cast(n), "olmo" cast(w n), "gemma" cast((1 + w) n)
    norm: Literal["llama", "olmo", "gemma"] = "llama"
    pre_norms: bool = True  # before attention and mlp
    out_norms: bool = False  # of what attention and mlp add to the residual stream
    qk_norm_whole: bool = False  # `qk_norm` over all heads together
    activation: Literal["silu", "gelu"] = "silu"  # of the gate; gelu in its tanh approximation
    embed_sqrt: bool = False  # embeddings times sqrt(hidden_size), rounded to the dtype that the model computes in
    embed_scale: float = 1.0
    attn_scale: float | None = None  # of q k^T; None: head_dim^-0.5
    residual_scale: float = 1.0  # of what attention and mlp add to the residual stream
    logit_scale: float = 1.0
    logit_softcap: float | None = None
    experts: Experts | None = None  # of the layers that have some
    context: Split | None = field(default=None, compare=False, repr=False)  # the ranks that share each stream of a run, if several do

    @property
    def rope(self) -> Rope:
        """Base and scaling of the rotary positions, but for those of `window_rope`."""
        return Rope(self.rope_theta, self.rope_scaling)

    @property
    def shared_positions(self) -> int:
        """Positions that prompts with their continuations may have: up to them the keys of a prompt serve all of its continuations."""
        return min(rope_scaling.shared_positions(rope, self.max_positions) for rope in (self.rope, self.window_rope or self.rope))

    @property
    def rotary_dim(self) -> int:
        """The features of each head that turn."""
        return int(self.head_dim * self.rope_part)

    def __post_init__(self) -> None:
        if self.layer_windows and len(self.layer_windows) != self.num_layers:
            raise ValueError(f"layer_windows has {len(self.layer_windows)} windows; expected {self.num_layers}, one for each layer")

    @property
    def windows(self) -> tuple[int | None, ...]:
        """The distinct windows of the layers, in tokens."""
        return tuple(dict.fromkeys(self.layer_windows or (self.window,)))

    def window_of(self, layer: int) -> int | None:
        """The window of a layer, in tokens; None: it sees all tokens before it."""
        return self.layer_windows[layer] if self.layer_windows else self.window

    @property
    def query_scale(self) -> float:
        """What the products of queries and keys are multiplied by."""
        return self.head_dim**-0.5 if self.attn_scale is None else self.attn_scale

    @property
    def embed_factor(self) -> float:
        """What embeddings are multiplied by before any noise on them: Gemma's scale is rounded to float32, then to the compute dtype."""
        return float(torch.tensor(self.hidden_size**0.5, dtype=torch.float32).to(self.dtype)) if self.embed_sqrt else 1.0

    @property
    def alone(self) -> str:
        """Why documents go through the model one at a time; empty where they are packed."""
        return ""

    @property
    def keeps_ids(self) -> bool:
        """Whether the sampler's cache holds the ids of tokens in place of keys and values."""
        return bool(self.alone)

    @property
    def plain_attention(self) -> bool:
        """Whether no layer has a soft-cap or sinks."""
        return self.attn_softcap is None and not self.attn_sinks

    @property
    def caches(self) -> tuple[tuple[int, int, int], ...]:
        """What is kept of a token for each layer: key/value heads, their key width and value width."""
        return ((self.num_kv_heads, self.head_dim, self.head_dim),) * self.num_layers


def abstract(cfg: Config, *, dtype: torch.dtype = torch.float32) -> Params:
    """The tree of `Param`s of a model: shapes, axes and initial values."""
    # What adds to the residual stream starts smaller by the number of additions, so that its variance does not grow with depth.
    normal, deep = f"normal:{cfg.init_std}", f"normal:{cfg.init_std / math.sqrt(2 * cfg.num_layers)}"
    leaf = partial(Param, dtype=dtype)
    tree_ = {
        "embed_tokens": leaf((cfg.vocab_size, cfg.hidden_size), axes=("vocab", "embed"), init=normal, op="embedding"),
        "layers": [_abstract_layer(cfg, index, leaf, normal, deep) for index in range(cfg.num_layers)],
        "norm": leaf((cfg.hidden_size,), axes=("embed",), init=_neutral(cfg)),
    }
    if not cfg.tied:
        tree_["lm_head"] = leaf((cfg.vocab_size, cfg.hidden_size), axes=("vocab", "embed"), init=normal, op="head")
    return tree_


def _neutral(cfg: Config) -> str:
    """The weight of a norm that scales nothing."""
    return "zeros" if cfg.norm == "gemma" else "ones"


def _abstract_layer(cfg: Config, index: int, leaf, normal: str, deep: str) -> Params:
    d, q, kv = cfg.hidden_size, cfg.num_heads * cfg.head_dim, cfg.num_kv_heads * cfg.head_dim
    norm = leaf((d,), axes=("embed",), init=_neutral(cfg))
    layer = {
        "input_norm": norm,
        "q_proj": leaf((q, d), axes=("heads", "embed"), init=normal, op="linear"),
        "k_proj": leaf((kv, d), axes=("kv_heads", "embed"), init=normal, op="linear"),
        "v_proj": leaf((kv, d), axes=("kv_heads", "embed"), init=normal, op="linear"),
        "o_proj": leaf((d, q), axes=("embed", "heads"), init=deep, op="linear"),
        "post_norm": norm,
        **_abstract_mlp(cfg, index, leaf, normal, deep),
    }
    if not cfg.pre_norms:
        del layer["input_norm"], layer["post_norm"]
    if cfg.out_norms:
        layer |= {"attn_out_norm": norm, "mlp_out_norm": norm}
    if cfg.qkv_bias:
        sizes = {"q_bias": (q, "heads"), "k_bias": (kv, "kv_heads"), "v_bias": (kv, "kv_heads")}
        layer |= {name: leaf((size,), axes=(axis,), init="zeros") for name, (size, axis) in sizes.items()}
    if cfg.o_bias:
        layer["o_bias"] = leaf((d,), axes=("embed",), init="zeros")
    if cfg.qk_norm:
        whole = {"q_norm": (q, "heads"), "k_norm": (kv, "kv_heads")}
        sizes = whole if cfg.qk_norm_whole else dict.fromkeys(whole, (cfg.head_dim, "head_dim"))
        layer |= {name: leaf((size,), axes=(axis,), init=_neutral(cfg)) for name, (size, axis) in sizes.items()}
    if cfg.attn_sinks:
        layer["sinks"] = leaf((cfg.num_heads,), axes=("heads",), init="zeros")
    return layer


def _abstract_mlp(cfg: Config, index: int, leaf, normal: str, deep: str) -> Params:
    if cfg.experts is not None and index in cfg.experts.layers:
        return moe.abstract(cfg.experts, cfg.hidden_size, leaf, normal, deep)
    return {
        "gate_proj": leaf((cfg.mlp_size, cfg.hidden_size), axes=("mlp", "embed"), init=normal, op="linear"),
        "up_proj": leaf((cfg.mlp_size, cfg.hidden_size), axes=("mlp", "embed"), init=normal, op="linear"),
        "down_proj": leaf((cfg.hidden_size, cfg.mlp_size), axes=("embed", "mlp"), init=deep, op="linear"),
    }


def inv_freq(cfg: Config, device: torch.device) -> Tensor:
    """Rotary frequencies [r/2] in radians per position, float32."""
    return rope_scaling.inv_freq(cfg.rope, cfg.rotary_dim, device)
