"""An adapter folded into its model, and how far that moves what the model computes."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from treetune.core import lora, quant, shard, tree
from treetune.core.lora import Lora
from treetune.core.state import Params
from treetune.models import Model, dense, families, heads, hf, processor, quant_config, reward_model, target
from treetune.models import tokenizer as tokenizers
from treetune.models.dense import Config
from treetune.models.fetch import Say, silent
from treetune.models.target import Target

PROBE = (
    "A farmer has 17 sheep and buys 25 more. How many sheep are there now? 17 + 25 = 42.\n"
    "def area(width, height):\n    return width * height\n"
    "The quick brown fox jumps over the lazy dog, and nobody asks why."
)
LARGEST, LARGEST_KL = 0.05, 0.01  # difference of an output; mean KL (nats) of weights in bfloat16, as of a GGUF file of them


class Difference(NamedTuple):
    """How far two sets of logits are apart: largest and mean absolute difference, and mean KL (nats)."""

    largest: float
    mean: float
    kl: float


class Merged(NamedTuple):
    """A model with an adapter folded in, and how its outputs on the probe differ from those of the model with the adapter.

    head: of a reward model, whose scores are the outputs.
    """

    model: Model
    difference: Difference
    probe_tokens: int
    head: Params | None = None


def load(chosen: Target, *, say: Say = silent) -> tuple[Model, Lora, Params | None]:
    """What is to be merged: a model, the adapter on it, and the head of scores that comes with a reward model's adapter."""
    assert chosen.adapter is not None, "an adapter is to be merged"
    if heads.kind(tokenizers.adapter_folder(chosen.adapter)) is None:
        (model, lora), head = target.load_model(chosen, say=say), None
    else:
        model, lora, head, _ = reward_model.load(chosen, say=say)
    assert lora is not None, "the folder holds an adapter"
    return model, lora, head


def compare(logits: Tensor, other: Tensor) -> Difference:
    """Differences of logits [T, V] against logits [T, V]."""
    gap, logp, logq = (logits - other).abs(), logits.log_softmax(-1), other.log_softmax(-1)
    return Difference(gap.max().item(), gap.mean().item(), (logp.exp() * (logp - logq)).sum(-1).mean().item())


@torch.no_grad()
def merge(model: Model, adapter: Lora, tokenizer: Callable[..., Any], *, dtype: torch.dtype, head: Params | None = None) -> Merged:
    """The model with the adapter folded into leaves of `dtype`, compared on the probe text. head: of a reward model, whose scores count."""
    folded = lora.merge(model.params, adapter.tree, adapter.scale)
    merged = model._replace(params=tree.map(lambda leaf: shard.gather(leaf, dtype), folded))
    return compared(Merged(merged, Difference(0, 0, 0), 0, head), model, adapter, tokenizer, head)


def unquantised(merged: Merged, chosen: Target, tokenizer: Callable[..., Any], *, say: Say = silent) -> Merged | None:
    """The merged model compared with the adapter on the base before it was quantised; None where it was not, or its files are so."""
    if chosen.scheme is None or quant_config.of_name(chosen.model, chosen.revision) is not None:
        return None
    model, adapter, head = load(chosen._replace(scheme=None), say=say)
    return compared(merged, model, adapter, tokenizer, head)


@torch.no_grad()
def compared(merged: Merged, model: Model, adapter: Lora, tokenizer: Callable[..., Any], head: Params | None = None) -> Merged:
    """The merged model with its difference from a model with the adapter."""
    ids = probe_ids(tokenizer, model.cfg)
    upcast = merged.model._replace(params=tree.map(_wide, merged.model.params), cfg=model.cfg)
    difference = compare(_outputs(model, ids, head, adapter), _outputs(upcast, ids, head))
    return merged._replace(difference=difference, probe_tokens=len(ids))


def _wide(leaf: Any) -> Tensor:
    return quant.dense(leaf, torch.float32) if quant.quantised(leaf) else leaf.float()


def describe(merged: Merged) -> str:
    """The difference on the probe, in a line."""
    largest, mean, kl = merged.difference
    largest_of = f"largest {_output(merged)} difference {largest:.2e}"
    return f"probe of {merged.probe_tokens} tokens: {largest_of}, mean {mean:.2e}, KL {kl:.2e} nats"


def check(merged: Merged, bound: float | None, dtype: str) -> None:
    """Errors: ValueError where the outputs on the probe are not those of model and adapter.

    bound: of the largest difference. If None it is LARGEST, but of logits of weights that are rounded to bfloat16 the mean KL may be
    LARGEST_KL: rounding moves single logits by some tenths, and what the model says by far less.
    """
    largest, _, kl = merged.difference
    by_kl = bound is None and dtype == "bfloat16" and merged.head is None
    bound = LARGEST_KL if by_kl else LARGEST if bound is None else bound
    if (kl if by_kl else largest) <= bound:
        return
    kind = _output(merged)
    said = f"{kind}s are off by a mean KL of {kl:.3g} nats" if by_kl else f"{kind}s differ by up to {largest:.3g}"
    raise ValueError(
        f"the merged {said}, more than {bound}: not saved; keep the adapter apart, save in float32, or raise the bound of single {kind}s: "
        f"--max-logit-diff {math.ceil(largest * 10) / 10 if math.isfinite(largest) else 'N'}"
    )


def _output(merged: Merged) -> str:
    return "logit" if merged.head is None else "score"


def save(merged: Merged, path: Path, chosen: Target, tokenizer: Any) -> None:
    """Write the folder of the merged model. Errors: ValueError where there is one."""
    if merged.head is not None:
        heads.save(path, merged.model, merged.head, tokenizer=tokenizer)
        return
    generation = tokenizers.generation_config(chosen.model, tokenizer, revision=chosen.revision)
    beside = processor.read(chosen.model, revision=chosen.revision)
    hf.save(path, merged.model, tokenizer=tokenizer, generation=generation, beside=beside)


def probe_ids(tokenizer: Callable[..., Any], cfg: Config) -> Tensor:
    """Token ids of the probe text, and every 997th id of the vocabulary after it."""
    ids = tokenizer(PROBE, add_special_tokens=False)["input_ids"] + list(range(0, cfg.vocab_size, 997))
    return torch.tensor(ids[: cfg.max_positions])


def _outputs(model: Model, ids: Tensor, head: Params | None, adapter: Lora | None = None) -> Tensor:
    """Logits [T, V] at each token of the probe, or with a head its scores [T, C]."""
    if head is None:
        return families.document_logits(model, ids, lora=adapter)
    batch = dense.single(ids) | {"at": torch.arange(len(ids))}
    return heads.scores(model.family, model.cfg, model.params, head, batch, lora=adapter)
