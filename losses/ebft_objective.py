"""The objective of energy-based fine-tuning on strided rollouts: policy gradient on generated tokens, cross-entropy on the documents.

N generated tokens of B sequences, one per rollout; M scored tokens of the documents. Both are scored in one stream (see
`core.strided.grow`), whose batch holds the advantage of each rollout, its reward and the parts of that [B].
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from treetune.core.state import Batch, LogprobBeside, Metric, Metrics, Objective, Params, Plan, Terms, TokenStats
from treetune.losses import ebft, reduce

BY_ROLLOUT = {"ebft/mean_reward": "ebft_reward", "ebft/alignment": "alignment", "ebft/diversity": "diversity", "ebft/cfm_loss": "cfm"}


def objective(logprob: LogprobBeside, *, rl_coef: float = 1.0, ce_coef: float = 0.0, want: Sequence[str] = ("entropy",)) -> Objective:
    """rl_coef mean_i(-A_i log p_i) + ce_coef mean_j(-log p_j), i over all generated tokens of the step, j over the documents' tokens.

    logprob: statistics of the generated tokens [N], and of the documents' [M] or None where only the first are trained.
    A is the advantage of the token's rollout, a constant. log p_i is at the temperature of sampling, log p_j at 1. A term of coefficient
    0 is left out; both terms are reported where log-probs are given. The metrics of rollouts are means over all rollouts of the step, and
    nan, unknown, for a step without any.
    Errors: ValueError where both coefficients are 0, and for a cross-entropy term without its log-probs.
    """
    coefs = {name: coef for name, coef in (("rl", rl_coef), ("ce", ce_coef)) if coef != 0}
    if not coefs:
        raise ValueError("rl_coef=0 and ce_coef=0: nothing would train; give one of them a value")

    def counts(batch: Batch) -> Terms:
        tokens = {"rl": batch["seq_lens"].sum(), "ce": batch["seq_lens"].new_full((), batch["prompt_at"].shape[0])}
        return {name: tokens[name] for name in coefs}

    def terms(params: Params, frozen: Params, batch: Batch, plan: Plan) -> tuple[Terms, Metrics]:
        generated, document = logprob(params, frozen, batch, plan, want=tuple(want))
        means = {"rl": _policy(generated.logp, batch)} | ({} if document is None else {"ce": _cross_entropy(document.logp)})
        if missing := [name for name in coefs if name not in means]:
            raise ValueError(f"{missing[0]}_coef={coefs[missing[0]]} without log-probs of the documents' tokens; read `prompt_at` too")
        return {name: coef * means[name][0] for name, coef in coefs.items()}, _metrics(generated, means, list(coefs), batch)

    return Objective(counts, terms)


def _policy(logp: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
    return ebft.policy_term(logp, batch["advantage"].to(reduce.upcast(logp).dtype), batch["seq"], batch["seq_lens"])


def _cross_entropy(logp: Tensor) -> tuple[Tensor, Tensor]:
    count = torch.full((), logp.shape[0], device=logp.device)
    return ebft.cross_entropy_term(logp, torch.zeros_like(logp, dtype=torch.int64), count[None])


def _metrics(generated: TokenStats, means: dict[str, tuple[Tensor, Tensor]], trained: Sequence[str], batch: Batch) -> Metrics:
    """Metrics of the rollouts and of the documents; means: (sum, count) by term, of which `trained` are in the loss."""
    metrics = {f"ebft/{name}_loss": Metric(top.detach() / count.clamp(min=1), count) for name, (top, count) in means.items()}
    rollouts = batch["seq_lens"] > 0
    metrics |= {name: reduce.masked_mean(batch[key], rollouts) for name, key in BY_ROLLOUT.items()}
    blocks, prompts, one = batch["num_blocks"], batch["num_prompts"], torch.ones_like(batch["num_blocks"])
    metrics |= {"ebft/num_blocks": Metric(blocks, one, "sum"), "ebft/anchor_offset": Metric(batch["anchor_offset"], prompts)}
    metrics["ebft/advantages_std"] = Metric(batch["advantages_std"], blocks)
    tokens = torch.stack([means[name][1] for name in trained]).sum()
    metrics |= {"num_tokens": Metric(reduce.real_tokens(batch), one, "sum"), "supervised_tokens": Metric(tokens, one, "sum")}
    if generated.entropy is not None:
        count = means["rl"][1]
        metrics["entropy"] = Metric(generated.entropy.detach().float().sum() / count.clamp(min=1), count)
    return metrics
