"""Terms on the routers of experts, per scored token: [N, E] in, [N] out, float32 at least.

N scored tokens of B sequences, E experts, k experts of each token; logits are the router's of one layer.
"""

import torch
from torch import Tensor

from treetune.losses import reduce


def load_balance(logits: Tensor, seq: Tensor, seq_lens: Tensor, *, top_k: int) -> Tensor:
    """E sum_e f_e p_e of each token: p its softmax over experts, f_e the assignments to e of its sequence over the tokens of it.

    Its mean over the tokens of a sequence is the loss of the source within that sequence: k where all experts are used alike, up to E
    where the same few are. f is a constant. Within a sequence and not a micro-batch, so that neither packing nor the split of a step
    changes it. Source: Fedus et al. (Switch), arXiv 2101.03961, eq. 4 to 6; by sequence: DeepSeek-V3, arXiv 2412.19437, eq. 17.
    """
    chosen = logits.detach().topk(top_k, dim=-1).indices
    counts = torch.zeros_like(logits, dtype=torch.float32).scatter(1, chosen, 1.0)  # whole numbers: their sums are exact in any order
    totals = torch.zeros(seq_lens.shape[0], logits.shape[1], device=logits.device).index_add(0, seq, counts)
    share = totals / seq_lens.clamp(min=1)[:, None]  # [B, E]
    return logits.shape[1] * (share[seq] * reduce.upcast(logits).softmax(-1)).sum(-1)


def z_loss(logits: Tensor) -> Tensor:
    """log(sum_e exp logit_e)^2 of each token, which keeps logits small. Source: Zoph et al. (ST-MoE), arXiv 2202.08906, eq. 5."""
    return reduce.upcast(logits).logsumexp(-1).square()
