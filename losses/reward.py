"""Losses of reward models: scalar scores of pairs, classes of steps; float32 at least.

P pairs, N steps of C classes.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from treetune.losses.reduce import upcast


def bradley_terry(chosen: Tensor, rejected: Tensor, *, margin: float | Tensor = 0.0) -> Tensor:
    """-log sig(chosen - rejected - margin): scores [P] -> [P], nats; margin is a number or [P].

    Source: Ouyang et al., arXiv 2203.02155, eq. 1; the margin: Touvron et al. (Llama 2), arXiv 2307.09288, eq. 2.
    """
    margin = upcast(margin) if isinstance(margin, Tensor) else margin
    return -F.logsigmoid(upcast(chosen) - upcast(rejected) - margin)


def centring(chosen: Tensor, rejected: Tensor) -> Tensor:
    """(chosen + rejected)^2, [P]: keeps scores around 0, which Bradley-Terry leaves open. Source: Eisenstein et al., arXiv 2312.09244."""
    return (upcast(chosen) + upcast(rejected)).square()


def process_reward(logits: Tensor, classes: Tensor) -> Tensor:
    """-log softmax(logits)[class] at the last token of each step: logits [N, C], classes [N] int64 -> [N], nats.

    Source: Uesato et al., arXiv 2211.14275.
    """
    return -torch.log_softmax(upcast(logits), -1).gather(-1, classes[:, None])[:, 0]
