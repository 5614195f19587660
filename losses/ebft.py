"""Energy-based fine-tuning: hidden states to features, features of rollouts and ground truth to rewards, rewards to terms.

L chosen layers of width H; x [N, D] features of the rows of B sequences, end to end and without padding, with seq [N] and
seq_lens [B] as in `reduce`. P groups (a prompt, or an anchor of a document), n rollouts of each: phi [P, n, D], y [P, D] the
ground truth's; y may also be [P, n, D], one for each rollout. Scores and advantages are [P, n] in float64.
A frozen network makes the features, so `scores`, whitening and advantages carry no gradient: it flows through log-probs alone.
Source: Jelassi et al., Matching features, not tokens: energy-based fine-tuning of language models, arXiv 2603.12248.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from treetune.losses import advantage, policy, reduce, sft

SMALL = 1e-5  # singular values at most this share of the largest are dropped


class Scores(NamedTuple):
    """reward, alignment and diversity [P, n], cfm [P]; float64, no gradient; alignment and diversity hold their factor 2."""

    reward: Tensor
    alignment: Tensor
    diversity: Tensor
    cfm: Tensor


def layers(fractions: Sequence[float], num_layers: int) -> tuple[int, ...]:
    """floor(fraction * num_layers): 0 is the embeddings and k the output of block k; a layer named twice counts twice."""
    if num_layers < 1 or not fractions or not all(0 <= fraction <= 1 for fraction in fractions):
        raise ValueError(
            f"feature layers {list(fractions)} of {num_layers} layers: expected at least one depth from 0 to 1, as 0.25 0.5 0.75"
        )
    return tuple(int(fraction * num_layers) for fraction in fractions)


def raw(hidden: Sequence[Tensor]) -> Tensor:
    """The layers side by side, as they are: L times [N, H] -> [N, L H], float32 at least."""
    return torch.cat([reduce.upcast(x) for x in hidden], dim=-1)


def per_layer(hidden: Sequence[Tensor]) -> Tensor:
    """Each layer of length 1 at each token, so that every layer has the same say: L times [N, H] -> [N, L H] of length sqrt(L)."""
    return torch.cat([unit(x) for x in hidden], dim=-1)


def joint(hidden: Sequence[Tensor]) -> Tensor:
    """The layers side by side, together of length 1 at each token: L times [N, H] -> [N, L H]."""
    return unit(raw(hidden))


def unit(x: Tensor) -> Tensor:
    """x / max(|x|, 1e-12) along the last dim: [..., D] -> [..., D]; zero stays zero. For pooled features that are not whitened."""
    return F.normalize(reduce.upcast(x), dim=-1)


def last_token(x: Tensor, seq: Tensor, seq_lens: Tensor) -> Tensor:
    """The features of the last row of each sequence: [N, D] -> [B, D]; zeros for a sequence without rows, here and below."""
    return _picked(x, seq, seq_lens, (seq_lens - 1)[:, None])


def mean_pooling(x: Tensor, seq: Tensor, seq_lens: Tensor) -> Tensor:
    """The mean over the rows of each sequence: [N, D] -> [B, D]."""
    return completion_mean(x, seq, seq_lens, torch.zeros_like(seq_lens))


def completion_mean(x: Tensor, seq: Tensor, seq_lens: Tensor, prompt_lens: Tensor) -> Tensor:
    """The mean over the rows after the first prompt_lens [B] of each sequence: [N, D] -> [B, D]."""
    _check_rows(x, seq, seq_lens)
    if prompt_lens.shape != seq_lens.shape:
        raise ValueError(f"prompt_lens {tuple(prompt_lens.shape)} for {seq_lens.shape[0]} sequences; expected one length for each")
    place = torch.arange(len(x), device=x.device) - (seq_lens.cumsum(0) - seq_lens)[seq]
    rows = torch.where((place >= prompt_lens[seq])[:, None], reduce.upcast(x), 0.0)
    sums = rows.new_zeros(len(seq_lens), x.shape[1]).index_add(0, seq, rows)
    return sums / (seq_lens - prompt_lens).clamp(min=1)[:, None]


def concat(x: Tensor, seq: Tensor, seq_lens: Tensor) -> Tensor:
    """The rows at a quarter, half and three quarters of each sequence, side by side: [N, D] -> [B, 3 D]."""
    return _picked(x, seq, seq_lens, torch.stack([seq_lens // 4, seq_lens // 2, 3 * seq_lens // 4], dim=1))


def whiten_features(phi: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """(phi W, y W), W = V S^-1 V^T of phi = Q S V^T, per group and without a mean: [P, n, D], [P, D] -> the same.

    y is projected onto the span of the rollouts, so its alignment says which sibling is nearest: its squared cosines sum to 1.
    Distinct rollouts become orthonormal, so diversity only counts duplicates: a pair of them has product 1/2, m have 1/m.
    W is never built. ValueError for one rollout (its alignment would be 2 or -2) and for features that are not finite.
    """
    _, inverse, right, phi64 = _svd(phi, y)
    y = (y.detach().double()[:, None] @ right.mT * inverse[:, None]) @ right
    return ((phi64 @ right.mT * inverse[:, None]) @ right).to(_float(phi)), y[:, 0].to(_float(phi))


def whiten_rows(phi: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """(M phi, |M 1| y), M = Q S^-1 Q^T [n, n] of phi = Q S V^T: [P, n, D], [P, D] -> [P, n, D] both; errors as `whiten_features`.

    phi comes out as there, but y keeps its direction, so alignment is absolute. M on n copies of y scales each; where that
    factor is negative its sign is dropped, because alignment would turn around with it.
    """
    left, inverse, _, phi64 = _svd(phi, y)
    rows = (left * inverse[:, None]) @ left.mT
    copies = rows.sum(-1, keepdim=True).abs() * y.detach().double()[:, None]
    return (rows @ phi64).to(_float(phi)), copies.to(_float(phi))


def alignment(phi: Tensor, y: Tensor) -> Tensor:
    """2 cos(phi_j, y): [P, n, D], [P, D] -> [P, n] within [-2, 2]; lengths below 1e-8 count as 1e-8, so zero has alignment 0."""
    _check_groups(phi, y)
    return 2 * F.cosine_similarity(phi.double(), _each(y).double(), dim=-1, eps=1e-8)


def diversity(phi: Tensor) -> Tensor:
    """2 / (n - 1) sum_{k != j} <phi_j, phi_k>, how alike a rollout is to its siblings: [P, n, D] -> [P, n]; 0 for one rollout."""
    phi = phi.double()
    others = 1 - torch.eye(phi.shape[1], dtype=phi.dtype, device=phi.device)
    return 2 * (phi @ phi.mT * others).sum(-1) / max(phi.shape[1] - 1, 1)


def cfm(phi: Tensor, y: Tensor) -> Tensor:
    """|mean_j phi_j - y|^2, conditional feature matching: [P, n, D], [P, D] -> [P]; of y [P, n, D] the mean over j is taken."""
    _check_groups(phi, y)
    return (phi.double().mean(1) - _each(y).double().mean(1)).square().sum(-1)


def scores(phi: Tensor, y: Tensor, *, alignment_coef: float = 1.0, diversity_coef: float = 1.0) -> Scores:
    """reward = alignment_coef * alignment - diversity_coef * diversity, with its parts: [P, n, D], [P, D] -> `Scores`.

    ValueError for features that are not finite. Source: eq. 7, with the cosine in place of the product with y.
    """
    _check_groups(phi, y)
    _check_finite(phi, y)
    phi, y = phi.detach(), y.detach()
    near, alike = alignment(phi, y), diversity(phi)
    return Scores(alignment_coef * near - diversity_coef * alike, near, alike, cfm(phi, y))


def rloo(rewards: Tensor) -> Tensor:
    """`advantage.rloo`, and the reward itself for one rollout, which has no siblings: [P, n] -> [P, n]."""
    return advantage.rloo(rewards) if rewards.shape[-1] > 1 else advantage.reinforce(rewards)


def rloo_paired(scored: Scores, *, alignment_coef: float = 1.0, diversity_coef: float = 1.0) -> Tensor:
    """`rloo` whose baseline of j holds no pair with j: of diversity d it is (sum_k d_k - 2 d_j) / (n - 2), 0 for n <= 2: -> [P, n].

    With d in it, the baseline of `rloo` depends on rollout j, so that its gradient is biased; this one's is not.
    """
    d, n = scored.diversity.detach().double(), scored.diversity.shape[1]
    baseline = (d.sum(1, keepdim=True) - 2 * d) / (n - 2) if n > 2 else torch.zeros_like(d)
    # Groups of equal rollouts are exactly 0, not what rounding leaves.
    apart = torch.where(advantage.flat(d)[:, None], 0.0, d - baseline) if n > 2 else d
    return rloo(alignment_coef * scored.alignment) - diversity_coef * apart


def group_norm(rewards: Tensor) -> Tensor:
    """(r - m_g) / (s_g + 1e-8), s over n - 1, and the reward itself for one rollout: [P, n] -> [P, n]."""
    return advantage.group_scaled(rewards, eps=1e-8) if rewards.shape[-1] > 1 else advantage.reinforce(rewards)


def reinforce(rewards: Tensor) -> Tensor:
    """The reward: [P, n] -> [P, n]."""
    return advantage.reinforce(rewards)


def policy_term(logp: Tensor, gain: Tensor, seq: Tensor, seq_lens: Tensor, *, weight: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """(sum, count) of -A log p over generated tokens: logp [N] at the sampling temperature, gain [B] the advantages A.

    weight [N] is 1 for generated tokens where the stream scores others too, whose sequences may have any advantage.
    """
    return reduce.by_token(policy.reinforce(gain.detach()[seq], logp), seq, seq_lens, weight=weight)


def cross_entropy_term(logp: Tensor, seq: Tensor, seq_lens: Tensor, *, weight: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """(sum, count) of -log p over the document's tokens: logp [N] at temperature 1; weight [N] as in `policy_term`."""
    return reduce.by_token(sft.nll(logp), seq, seq_lens, weight=weight)


def total(rl: tuple[Tensor, Tensor], ce: tuple[Tensor, Tensor], *, rl_coef: float = 1.0, ce_coef: float = 0.0) -> Tensor:
    """rl_coef * rl + ce_coef * ce of two (sum, count), 0-d; a term of count 0 is 0 with a graph. ValueError where no coef is set."""
    if rl_coef == 0 and ce_coef == 0:
        raise ValueError("rl_coef=0 and ce_coef=0: nothing would train; give one of them a value")
    means = [coef * top / torch.where(count > 0, count, 1) for coef, (top, count) in ((rl_coef, rl), (ce_coef, ce)) if coef != 0]
    return sum(means[1:], means[0])


def _picked(x: Tensor, seq: Tensor, seq_lens: Tensor, place: Tensor) -> Tensor:
    """Rows at place [B, J] of their sequences, side by side: [N, D] -> [B, J D]; zeros where a sequence has none."""
    _check_rows(x, seq, seq_lens)
    if len(x) == 0:
        return reduce.upcast(x).new_zeros(len(seq_lens), place.shape[1] * x.shape[1])
    index = (seq_lens.cumsum(0) - seq_lens)[:, None] + place.clamp(min=0)
    rows = reduce.upcast(x[index.clamp(max=len(x) - 1)])
    return torch.where((seq_lens > 0)[:, None, None], rows, 0.0).flatten(1)


def _svd(phi: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(Q [P, n, r], 1 / s [P, r], V^T [P, r, D], phi) in float64, r = min(n, D); 0 for s that are too small."""
    _check_groups(phi, y)
    if phi.shape[1] < 2 or y.ndim != 2:
        raise ValueError(
            f"whitening {phi.shape[1]} rollouts per prompt with ground truth {tuple(y.shape)}: expected at least 2 and [P, D]; "
            "sample more, or switch use_whitening off"
        )
    _check_finite(phi, y)
    phi64 = phi.detach().double()
    # float64: rollouts of a group are often nearly equal, and their smallest singular values are what whitening divides by.
    left, s, right = torch.linalg.svd(phi64, full_matrices=False)
    return left, torch.where(s > SMALL * s[:, :1], 1 / (s + 1e-12), 0.0), right, phi64


def _each(y: Tensor) -> Tensor:
    """y with an axis of rollouts: [P, D] -> [P, 1, D]."""
    return y if y.ndim == 3 else y[:, None]


def _float(x: Tensor) -> torch.dtype:
    return reduce.upcast(x[:0]).dtype


def _check_rows(x: Tensor, seq: Tensor, seq_lens: Tensor) -> None:
    if x.ndim != 2 or seq.shape != x.shape[:1] or seq_lens.ndim != 1:
        raise ValueError(f"features {tuple(x.shape)}, seq {tuple(seq.shape)}, seq_lens {tuple(seq_lens.shape)}: expected [N, D], [N], [B]")


def _check_groups(phi: Tensor, y: Tensor) -> None:
    if phi.ndim != 3 or phi.shape[1] == 0 or y.shape not in ((phi.shape[0], phi.shape[2]), phi.shape):
        raise ValueError(f"features {tuple(phi.shape)} and ground truth {tuple(y.shape)}: expected [P, n, D] and [P, D], n at least 1")


def _check_finite(phi: Tensor, y: Tensor) -> None:
    bad = {"rollouts": phi, "the ground truth": y}
    for name, x in bad.items():
        if not x.isfinite().all():
            index = torch.nonzero(~x.isfinite())[0].tolist()
            raise ValueError(f"the features of {name} are not finite at {index}; look at the feature network, or use a wider dtype")
