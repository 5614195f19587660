"""Options of energy-based fine-tuning: features, rewards, anchors. Importing this imports no torch.

Names and defaults are those of the documents (`feature_layers`, `embed_method`, `generate_max_len`, ...).
"""

from dataclasses import dataclass
from typing import Literal

from treetune.cli.options.rollout import LossName, PolicyLoss, RolloutOptions
from treetune.cli.options.shared import SAMPLES, AnyRows, HeldOut, OptimOptions

STRIDED_ONLY = (
    "stride", "context_length", "generate_max_len", "n_samples_per_prompt", "rl_coef", "advantage_estimator", "min_completion_prefix",
)  # fmt: skip
STRUCTURED_ONLY = ("adaptive_max_tokens", "gt_length_multiplier")
TEMPERATURES = {"structured": 1.0, "strided": 0.6}


@dataclass(frozen=True)
class EbftData(HeldOut, AnyRows):
    """Data. A config file may have `datasets`, a list of mappings with `path`, `type` and options, instead of `data`."""

    data: tuple[str, ...] = (SAMPLES["sft"],)
    format: str = "auto"
    """Transform of the rows: ebft_opencode.transform, ebft_chat_multiturn.transform, ebft_pretrain.transform, ..., or an import path of
    your own; auto goes by mode and columns and prints it. docs/ebft.md lists them."""
    sequence_len: int = 512
    """Longest document (strided) or prompt with its true reply (structured), in tokens; a longer prompt with reply is dropped."""
    overlong: Literal["drop", "truncate", "error"] = "truncate"
    """What to do with a longer strided document that has a prompt; raw text is always split."""
    chat_template_kwargs: tuple[str, ...] = ()
    """NAME=VALUE for the chat template, such as enable_thinking=false; in a file also a mapping."""


@dataclass(frozen=True)
class EbftOptions:
    """Feature matching. alignment and diversity hold their factor 2, in rewards and in metrics."""

    mode: Literal["structured", "strided"] = "structured"
    """structured: prompts with a true reply, whole replies are sampled. strided: documents, short rollouts from every stride-th token."""
    feature_layers: tuple[float, ...] = (0.25, 0.5, 0.75)
    """Depths of the hidden states that are compared, from 0 (embeddings) to 1 (after the last norm)."""
    embed_method: Literal["last_token", "mean_pooling", "completion_mean", "concat"] = "last_token"
    """How the tokens of a text become one vector: the last; the mean; the mean of the completion (in strided mode there is no other part);
    those at a quarter, half and three quarters side by side."""
    feature_norm: Literal["per_layer", "joint", "raw"] | None = None
    """Length 1 at each token for each layer, for all together, or neither; if not given, per_layer in strided mode, and in structured mode
    raw (where pooled vectors get length 1 unless whitened)."""
    use_whitening: bool = False
    """Whiten the features of the rollouts of a prompt or anchor; diversity then only counts duplicates. The paper advises it."""
    whitening_space: Literal["features", "rows"] = "features"
    """features: the truth is projected onto the span of the rollouts, alignment compares siblings; rows: alignment is absolute."""
    alignment_coef: float = 1.0
    """Weight of alignment, 2 cos(rollout, truth)."""
    diversity_coef: float = 1.0
    """Weight of diversity, twice the mean product with the other rollouts, which is subtracted."""
    ce_coef: float = 0.0
    """Weight of the cross-entropy of the true tokens; 0.03 is balanced, 0.1 dominates."""
    feature_device: Literal["auto", "cpu"] = "auto"
    """Where the frozen network is: beside the model (free with an adapter, whose base it is), or a copy in main memory."""
    adaptive_max_tokens: bool = True
    """Structured: sample at most gt_length_multiplier times the longest true reply of a batch (at least 64 tokens), and never more than
    max_completion_length."""
    gt_length_multiplier: float = 1.5
    """Structured: that factor; at least 0.1."""
    stride: int = 8
    """Strided: tokens from one anchor to the next."""
    context_length: int = 8
    """Strided: tokens before the first anchor; a rollout sees all of its document up to its anchor."""
    generate_max_len: int = 8
    """Strided: tokens of a rollout, and of the true block that it is compared with."""
    n_samples_per_prompt: int = 4
    """Strided: rollouts from each anchor."""
    rl_coef: float = 1.0
    """Strided: weight of the policy-gradient loss."""
    advantage_estimator: Literal["rloo", "group_norm", "reinforce", "rloo_paired"] = "rloo"
    """Strided: reward less the mean of the other rollouts; less the mean and divided by the deviation; as it is; as rloo, with a baseline
    that leaves out the pairs that a rollout is part of."""
    min_completion_prefix: int = 0
    """Strided: tokens of a completion before its first anchor."""


@dataclass(frozen=True)
class EbftRollout(RolloutOptions):
    """Sampling. Strided mode takes temperature and top_p."""

    num_generations: int = 4
    """Structured: completions of each prompt."""
    temperature: float | None = None
    """Divides the logits, while sampling and while training alike; if not given 1 in structured mode and 0.6 in strided."""


@dataclass(frozen=True)
class EbftLoss(PolicyLoss):
    """Loss of structured mode. The start of a run prints what a name stands for."""

    loss: LossName = "grpo"
    """Method: what is clipped, what the loss is a mean over, and how rewards become advantages; docs/online.md has a table."""


@dataclass(frozen=True)
class EbftOptim(OptimOptions):
    """Optimisation."""

    learning_rate: float | None = None
    """Peak learning rate; if not given, 1e-5 with an adapter and 1e-6 without."""
    lr_scheduler: Literal["cosine", "linear", "constant"] = "constant"
    """Shape of the learning rate after the warm-up."""
    micro_batch_size: int = 2
    """Prompts with their completions (structured), or documents or, packed, sequence_len's worth of their tokens (strided), in one pass."""
