"""`treetune quantize`: a model folder with linear layers in 4 or 8 bits, as transformers and vLLM read it."""

from pathlib import Path
from typing import cast

import torch

from treetune.cli.options.commands import Quantize
from treetune.cli.screen import Screen
from treetune.core.quant import Kind, Scheme
from treetune.core.run.errors import checking_input
from treetune.models import fetch, heads, loading, quantising
from treetune.models import tokenizer as tokenizers


def run(config: Quantize, given: frozenset[str]) -> int:
    """Load, quantise, compare, save; the exit code."""
    screen, scheme = Screen(), Scheme(cast(Kind, config.quant), config.quant_double, experts=False)
    with checking_input():
        path = fetch.resolve(config.model, say=screen.line, revision=config.revision)
        if path.is_dir() and heads.kind(path) is not None:
            raise ValueError(f"{config.model} is a reward model, which is not written quantised: name a language model")
        model, _ = loading.load_model(config.model, revision=config.revision, dtype="float32", device=torch.device("cpu"), say=screen.line)
        quantising.check(model, scheme, config.model)
        tokenizer = tokenizers.load_tokenizer(config.model, revision=config.revision, say=screen.line)
        dtype, output = loading.DTYPES[config.save_dtype], Path(config.output)
        written = quantising.write(output, model, scheme, dtype, tokenizer, config.model, config.revision)
        screen.line(quantising.describe(written))
    screen.line(f"saved {output}")
    return 0
