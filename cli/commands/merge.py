"""`treetune merge`: a plain model folder from a model and an adapter, checked on a probe before it is kept."""

import dataclasses
from pathlib import Path
from typing import NamedTuple

import torch

from treetune.cli.commands import target
from treetune.cli.errors import checking_input
from treetune.cli.options.commands import Merge
from treetune.cli.options.model import ModelOptions
from treetune.cli.screen import Screen
from treetune.core.lora import Lora
from treetune.core.state import Params
from treetune.models import Model, heads, hf, loading, merging, reward_model
from treetune.models import tokenizer as tokenizers


class Loaded(NamedTuple):
    """What is to be merged: a model, the adapter on it, and the head of scores that comes with a reward model's adapter."""

    model: Model
    lora: Lora
    head: Params | None


def run(config: Merge, given: frozenset[str]) -> int:
    """Merge, compare, save; the exit code."""
    screen, output = Screen(), Path(config.output)
    with checking_input():
        options = ModelOptions(dtype="float32", device="cpu", revision=config.revision)
        options = options if config.model is None else dataclasses.replace(options, model=config.model)
        chosen = target.choose(options, config.adapter, given)
        tokenizer = target.load_tokenizer(chosen, say=screen.line)
        loaded = _load(chosen, config.adapter, screen)
        dtype, head = loading.DTYPES[config.save_dtype], loaded.head
        merged = merging.merge(loaded.model, loaded.lora, tokenizer, dtype=dtype, head=head)
        _report(merged, "logit" if head is None else "score", config.max_logit_diff, screen)
        if head is None:
            generation = tokenizers.generation_config(chosen.options.model, tokenizer, revision=chosen.options.revision)
            hf.save(output, merged.model, tokenizer=tokenizer, generation=generation)
        else:
            heads.save(output, merged.model, head, tokenizer=tokenizer)
    screen.line(f"saved {output}")
    return 0


def _load(chosen: target.Target, adapter: str, screen: Screen) -> Loaded:
    device, name, revision = torch.device("cpu"), chosen.options.model, chosen.options.revision
    if heads.kind(tokenizers.adapter_folder(adapter)) is None:
        model, lora = target.load_model(chosen, device, say=screen.line)
        head = None
    else:
        model, lora, head, _ = reward_model.load(
            name, adapter_path=adapter, revision=revision, dtype=chosen.options.dtype, device=device, say=screen.line
        )
    assert lora is not None, "an adapter was named"
    return Loaded(model, lora, head)


def _report(merged: merging.Merged, output: str, bound: float, screen: Screen) -> None:
    """Print the difference. Errors: ValueError where it is above the bound."""
    largest, mean, kl = merged.difference
    screen.line(f"probe of {merged.probe_tokens} tokens: largest {output} difference {largest:.2e}, mean {mean:.2e}, KL {kl:.2e} nats")
    if not largest <= bound:
        raise ValueError(
            f"the merged {output}s differ by up to {largest:.3g}, more than max_logit_diff {bound}: not saved; "
            "keep the adapter apart, save in float32, or raise the bound"
        )
