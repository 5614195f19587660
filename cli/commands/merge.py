"""`treetune merge`: a plain model folder from a model and an adapter, checked on a probe before it is kept."""

from pathlib import Path
from typing import NamedTuple

import torch

from treetune.cli import bases, setup
from treetune.cli.commands import score
from treetune.cli.configs import Merge
from treetune.cli.errors import checking_input
from treetune.cli.options.shared import ModelOptions
from treetune.cli.screen import Screen
from treetune.core import lora, tree
from treetune.core.state import Params
from treetune.models import Model, dense, heads, hf

PROBE = (
    "A farmer has 17 sheep and buys 25 more. How many sheep are there now? 17 + 25 = 42.\n"
    "def area(width, height):\n    return width * height\n"
    "The quick brown fox jumps over the lazy dog, and nobody asks why."
)


class Difference(NamedTuple):
    """How far two sets of logits are apart: largest and mean absolute difference, and mean KL in nats."""

    largest: float
    mean: float
    kl: float


def compare(one: torch.Tensor, other: torch.Tensor) -> Difference:
    """Differences of logits [T, V] against logits [T, V]."""
    gap, logp, logq = (one - other).abs(), one.log_softmax(-1), other.log_softmax(-1)
    return Difference(gap.max().item(), gap.mean().item(), (logp.exp() * (logp - logq)).sum(-1).mean().item())


class Loaded(NamedTuple):
    """What is to be merged: a model, the adapter on it, and the head of scores that comes with a reward model's adapter."""

    model: Model
    lora: lora.Lora
    head: Params | None


def load(options: ModelOptions, path: str, tokenizer, screen: Screen) -> Loaded:
    """The model and the adapter, of a language model or of a reward model."""
    if heads.kind(setup.adapter_folder(path)) is None:
        return Loaded(*bases.load_adapted(options, path, on=torch.device("cpu"), say=screen.line), None)
    judge = score.load(options, path, tokenizer, on=torch.device("cpu"), say=screen.line)
    return Loaded(judge.model, judge.lora, judge.head)


def outputs(model: Model, ids: torch.Tensor, head: Params | None, used: lora.Lora | None = None) -> torch.Tensor:
    """What the model says at each token of the probe: logits [T, V], or scores [T, C]."""
    if head is None:
        return dense.probe(model.params, ids, model.cfg, lora=used)
    batch = dense.single(ids) | {"at": torch.arange(len(ids))}
    return heads.scores(model.family, model.cfg, model.params, head, batch, lora=used)


def merged(model: Model, used: lora.Lora, dtype: torch.dtype) -> Model:
    """The model with the adapter folded in, its leaves in `dtype`."""
    folded = lora.merge(model.params, used.tree, used.scale)
    return model._replace(params=tree.map(lambda leaf: leaf.to(dtype), folded))


def probe_ids(tokenizer, cfg: dense.Config) -> torch.Tensor:
    """Token ids of the probe text, and every 997th id of the vocabulary after it."""
    ids = tokenizer(PROBE, add_special_tokens=False)["input_ids"] + list(range(0, cfg.vocab_size, 997))
    return torch.tensor(ids[: cfg.max_positions])


def run(config: Merge, given: frozenset[str]) -> int:
    """Merge, compare, save; the exit code."""
    screen, output = Screen(), Path(config.output)
    with checking_input():
        options = bases.with_base(ModelOptions(dtype="float32", device="cpu", revision=config.revision), config.adapter, given)
        options = options if config.model is None else setup.renamed(options, config.model)
        tokenizer = setup.load_tokenizer(options, config.adapter, say=screen.line)
        model, used, head = load(options, config.adapter, tokenizer, screen)
        plain = merged(model, used, setup.DTYPES[config.save_dtype])
        with torch.no_grad():
            ids = probe_ids(tokenizer, model.cfg)
            wide = plain._replace(params=tree.map(lambda leaf: leaf.float(), plain.params))
            found = compare(outputs(model, ids, head, used), outputs(wide, ids, head))
        what = "logit" if head is None else "score"
        screen.line(
            f"probe of {len(ids)} tokens: largest {what} difference {found.largest:.2e}, mean {found.mean:.2e}, KL {found.kl:.2e} nats"
        )
        if not found.largest <= config.max_logit_diff:
            raise ValueError(
                f"the merged {what}s differ by up to {found.largest:.3g}, more than max_logit_diff {config.max_logit_diff}: not saved; "
                "keep the adapter apart, save in float32, or raise the bound"
            )
        if head is None:
            hf.save(output, plain, tokenizer=tokenizer, generation=setup.generation_config(options, tokenizer))
        else:
            heads.save(output, plain, head, tokenizer=tokenizer)
    screen.line(f"saved {output}")
    return 0
