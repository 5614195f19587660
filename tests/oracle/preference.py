"""Preference losses as the papers write them, over padded logits [B, T, V] and labels [B, T] with -100: nothing shared with the package.

B rows, T tokens of the longest one, V words. A row is (ids, labels); position t of the logits scores label t + 1.
Log-ratios u = S - R of sums over a row, R the reference's; n counts scored tokens; chosen and rejected rows come as two batches.
"""

import math

import torch
from torch import Tensor


def padded(rows: list[tuple[list[int], list[int]]]) -> tuple[Tensor, Tensor, Tensor]:
    """(ids, attention mask, labels), each [B, T], padded on the right."""
    width = max(len(ids) for ids, _ in rows)
    ids = torch.tensor([row + [0] * (width - len(row)) for row, _ in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row, _ in rows])
    labels = torch.tensor([row + [-100] * (width - len(row)) for _, row in rows])
    return ids, mask, labels


def network(cfg, leaves: dict[str, Tensor], dtype: torch.dtype):
    """transformers' llama with these weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = LlamaConfig(
        vocab_size=cfg.vocab_size, hidden_size=cfg.hidden_size, intermediate_size=cfg.mlp_size, num_hidden_layers=cfg.num_layers,
        num_attention_heads=cfg.num_heads, num_key_value_heads=cfg.num_kv_heads, head_dim=cfg.head_dim, rms_norm_eps=cfg.norm_eps,
        rope_parameters={"rope_type": "default", "rope_theta": cfg.rope_theta}, tie_word_embeddings=cfg.tied,
        max_position_embeddings=cfg.max_positions, attn_implementation="eager", pad_token_id=None,
    )  # fmt: skip
    model = LlamaForCausalLM(sizes).to(dtype)
    missing, unexpected = model.load_state_dict(leaves, strict=False)
    assert not unexpected and set(missing) <= {"lm_head.weight"}, (missing, unexpected)
    return model.train()


def log_probs(model, rows) -> tuple[Tensor, Tensor]:
    """(log-prob of each label, whether it counts), [B, T - 1]."""
    ids, mask, labels = padded(rows)
    logits = model(input_ids=ids, attention_mask=mask).logits[:, :-1]
    labels = labels[:, 1:]
    counts = labels != -100
    logp = logits.log_softmax(-1).gather(-1, torch.where(counts, labels, 0)[..., None])[..., 0]
    return torch.where(counts, logp, 0.0), counts


def softplus(x: Tensor) -> Tensor:
    return torch.logaddexp(x, torch.zeros_like(x))


def dpo(u_c, u_r, n_c, n_r, beta):
    return softplus(-beta * (u_c - u_r))


def ipo(u_c, u_r, n_c, n_r, beta):
    return (u_c / n_c - u_r / n_r - 1 / (2 * beta)) ** 2


def hinge(u_c, u_r, n_c, n_r, beta):
    return torch.clamp(1 - beta * (u_c - u_r), min=0)


def apo_zero(u_c, u_r, n_c, n_r, beta):
    return 1 - 1 / (1 + torch.exp(-beta * u_c)) + 1 / (1 + torch.exp(-beta * u_r))


def kto(u, good, z0, beta, w_good=1.0, w_bad=1.0):
    values = []
    for x, fine in zip(u, good, strict=True):
        values.append(w_good * (1 - torch.sigmoid(beta * (x - z0))) if fine else w_bad * (1 - torch.sigmoid(beta * (z0 - x))))
    return torch.stack(values)


def bco(u, good, delta, beta):
    """-log sigma of the reward above the mean reward so far, or below it."""
    return torch.stack([softplus(-(beta * x - delta) if fine else beta * x - delta) for x, fine in zip(u, good, strict=True)])


def kto_baseline(u_foreign) -> float:
    """max(0, mean), in Python floats."""
    values = u_foreign.tolist()
    return max(0.0, math.fsum(values) / len(values))


def simpo(s_c, s_r, n_c, n_r, beta, gamma):
    return softplus(-(beta * (s_c / n_c - s_r / n_r) - gamma))


def cpo(s_c, s_r, n_c, n_r, beta):
    return softplus(-beta * (s_c - s_r))


def orpo(s_c, s_r, n_c, n_r, beta):
    """-beta log sigma(log odds ratio), odds p / (1 - p) of the mean log-prob."""
    a_c, a_r = s_c / n_c, s_r / n_r
    odds = torch.log(torch.exp(a_c) / (1 - torch.exp(a_c))) - torch.log(torch.exp(a_r) / (1 - torch.exp(a_r)))
    return beta * softplus(-odds)


def nll(logp: Tensor, counts: Tensor) -> Tensor:
    """Mean over the tokens that count."""
    return -logp.sum() / counts.sum()


def bradley_terry(r_c, r_r, margin=0.0):
    return softplus(-(r_c - r_r - margin))
