"""A llama of one document in plain torch, as the papers write it: slow, dense, every product and mask spelt out.

T tokens, D hidden, H heads, K key/value heads, d head dim. Weights [out, in]; an adapter {"A": [r, in], "B": [out, r]} beside each.
Differentiable in all leaves, in the dtype of the weights.
"""

import math

import torch
from torch import Tensor


def linear(x: Tensor, weight: Tensor, pair: dict | None, scale: float) -> Tensor:
    """x W^T + s (x A^T) B^T, the sum of two separate products."""
    return x @ weight.T if pair is None else x @ weight.T + scale * ((x @ pair["A"].T) @ pair["B"].T)


def norm(x: Tensor, scale: Tensor, eps: float) -> Tensor:
    return x / (x.pow(2).mean(-1, keepdim=True) + eps).sqrt() * scale


def rotate(x: Tensor, theta: float) -> Tensor:
    """x [T, H, d]: the pair (i, i + d/2) of each head turns by position / theta^(2i/d), as a complex number."""
    size, _, d = x.shape
    angle = torch.arange(size, dtype=torch.float64)[:, None] / theta ** (torch.arange(0, d, 2, dtype=torch.float64) / d)
    turned = torch.complex(x[..., : d // 2].double(), x[..., d // 2 :].double()) * torch.polar(torch.ones_like(angle), angle)[:, None]
    return torch.cat([turned.real, turned.imag], -1).to(x.dtype)


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Softmax over the past, one head after another; q [T, H, d], k and v [T, K, d]."""
    size, heads, d = q.shape
    future = torch.ones(size, size, dtype=torch.bool).triu(1)
    out = []
    for head in range(heads):
        shared = head // (heads // k.shape[1])
        scores = (q[:, head] @ k[:, shared].T / math.sqrt(d)).masked_fill(future, -math.inf)
        out.append(scores.softmax(-1) @ v[:, shared])
    return torch.stack(out, 1)


def layer(x: Tensor, w: dict, ab: dict, cfg, scale: float) -> Tensor:
    def project(value, name):
        return linear(value, w[name], ab.get(name), scale)

    h = norm(x, w["input_norm"], cfg.norm_eps)
    q, k, v = (project(h, name).view(len(x), -1, cfg.head_dim) for name in ("q_proj", "k_proj", "v_proj"))
    mixed = attention(rotate(q, cfg.rope_theta), rotate(k, cfg.rope_theta), v)
    x = x + project(mixed.reshape(len(x), -1), "o_proj")
    h = norm(x, w["post_norm"], cfg.norm_eps)
    gate = project(h, "gate_proj")
    return x + project(gate * torch.sigmoid(gate) * project(h, "up_proj"), "down_proj")


def logits(weights: dict, cfg, tokens: Tensor, adapter: dict | None = None, scale: float = 1.0) -> Tensor:
    """[T, V] of one document of token ids [T]."""
    layers = (adapter or {}).get("layers", [])
    x = weights["embed_tokens"][tokens]
    for i, w in enumerate(weights["layers"]):
        x = layer(x, w, layers[i] if i < len(layers) else {}, cfg, scale)
    return norm(x, weights["norm"], cfg.norm_eps) @ weights.get("lm_head", weights["embed_tokens"]).T


def mean_nll(weights: dict, cfg, documents, adapter: dict | None = None, scale: float = 1.0) -> Tensor:
    """Weighted mean of -log p over the scored tokens of documents with `tokens` and `weight`, one document at a time."""
    top, bottom = 0.0, 0.0
    for doc in documents:
        logp = logits(weights, cfg, torch.tensor(doc.tokens), adapter, scale).log_softmax(-1)
        for i, weight in enumerate(doc.weight):
            if weight:
                top = top - weight * logp[i - 1, doc.tokens[i]]
                bottom += weight
    return top / bottom
