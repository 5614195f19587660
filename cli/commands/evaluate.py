"""`treetune eval`: loss, perplexity and accuracy over all supervised tokens of a data set."""

import math
import time

import torch

from treetune.cli import bases, corpus, setup, training
from treetune.cli.configs import Eval
from treetune.cli.errors import checking_input
from treetune.cli.options.shared import LossOptions
from treetune.cli.screen import Screen, peak_memory_gib
from treetune.core import param
from treetune.core.state import TrainState


def run(config: Eval, given: frozenset[str]) -> int:
    """Evaluate and print; the exit code. Under torchrun the rows are shared out and every rank reports the same."""
    with checking_input():
        on = setup.device(config.model.device)
        ranks = setup.ranks(on)
        screen = Screen(quiet=ranks.rank > 0)
        options = bases.with_base(config.model, config.adapter.adapter, given)
        tokenizer = setup.load_tokenizer(options, config.adapter.adapter, say=screen.line)
        docs, _, lines, *_ = corpus.read_and_encode(config.data, tokenizer, given=given)
        model, used = bases.load_adapted(options, config.adapter.adapter, on=on, say=screen.line)
        corpus.check_fits(docs, config.data.sequence_len, model.cfg)
    for line in lines:
        screen.line(line)
    params = {} if used is None else {"lora": used.tree}
    state = TrainState(params, {"model": model.params}, {}, {}, torch.tensor(0, device=on))
    objective = setup.objective(setup.logprob(model, used), LossOptions(), report=("entropy",))
    evaluate = training.evaluator(objective, docs, training.maker(model, on), ranks, corpus.batching(config.data, config.micro_batch_size))
    start = time.perf_counter()
    found = {key: value.item() for key, value in evaluate(state).items()}
    screen.table("", _rows(setup.pair_name(options, config.adapter.adapter), model, found, time.perf_counter() - start, on))
    return 0


def _rows(name: str, model, found: dict, seconds: float, on: torch.device) -> dict[str, str]:
    return {
        "model": f"{name}, {param.count(model.params) / 1e6:.1f} M parameters",
        "loss": f"{found['loss']:.6f} nats per supervised token",
        "perplexity": f"{math.exp(min(found['loss'], 700.0)):.4f}",
        "accuracy": f"{found['mean_token_accuracy']:.4f} (the likeliest token is the target)",
        "entropy": f"{found['entropy']:.4f} nats per supervised token",
        "tokens": f"{int(found['supervised_tokens'])} supervised of {int(found['num_tokens'])}",
        "speed": f"{found['supervised_tokens'] / seconds:.0f} supervised tokens/s, peak memory {peak_memory_gib(on):.1f} GiB",
    }
