"""`treetune eval`: loss, perplexity and accuracy over all supervised tokens of a data set."""

import math
import time
from collections.abc import Mapping
from dataclasses import asdict
from functools import partial

import torch

from treetune.cli import row_settings
from treetune.cli.errors import checking_input
from treetune.cli.methods import sft
from treetune.cli.options.commands import Eval
from treetune.cli.screen import Screen
from treetune.core import param
from treetune.core.config import checks
from treetune.core.data import corpus, dataset, kinds, pack
from treetune.core.run import evaluation, memory, ranks
from treetune.core.state import TrainState
from treetune.models import Model, loading, policy, target
from treetune.models.batches import batcher


def run(config: Eval, given: frozenset[str]) -> int:
    """Evaluate and print; the exit code. Under torchrun the rows are shared out and every rank reports the same."""
    with checking_input():
        device = loading.select_device(config.model.device)
        processes = ranks.join_ranks(device)
        screen = Screen(quiet=processes.rank > 0)
        chosen = target.choose(config.adapter.adapter, named="model" in given, **asdict(config.model))
        tokenizer = target.load_tokenizer(chosen, say=screen.line)
        rows = row_settings.documents(config.data)
        docs, _, lines, *_ = corpus.read_and_encode(kinds.TEXT, rows, tokenizer, refuse=partial(checks.refuse_unused, given))
        model, lora = target.load_model(chosen, say=screen.line)
        dataset.check_fits(docs, config.data.sequence_len, vocab_size=model.cfg.vocab_size, max_positions=model.cfg.max_positions)
    for line in lines:
        screen.line(line)
    params = {} if lora is None else {"lora": lora.tree}
    state = TrainState(params, {"model": model.params}, {}, {}, torch.tensor(0, device=device))
    sizes = policy.Policy(model.family, model.cfg, {}, {}, policy.without_tree(lora))
    objective = sft.objective(policy.logprob(sizes), sft.LossOptions(), report=("entropy",))
    lengths = {"sequence_len": config.data.sequence_len, "micro_batch_size": config.micro_batch_size}
    batching = dataset.batching(packing=config.data.sample_packing, **lengths)
    collate = batcher(model.cfg, device, (pack.collate,))
    evaluate = evaluation.of_documents(objective, docs, collate, batching, ranks=processes)
    assert evaluate is not None, "rows that give no document are refused"
    start = time.perf_counter()
    metrics = {key: value.item() for key, value in evaluate(state).items()}
    screen.table("", _rows(chosen.name, model, metrics, time.perf_counter() - start, device))
    return 0


def _rows(name: str, model: Model, metrics: Mapping[str, float], seconds: float, device: torch.device) -> dict[str, str]:
    return {
        "model": f"{name}, {param.count(model.params) / 1e6:.1f} M parameters",
        "loss": f"{metrics['loss']:.6f} nats per supervised token",
        "perplexity": f"{math.exp(min(metrics['loss'], 700.0)):.4f}",  # e^709 is the largest float64
        "accuracy": f"{metrics['mean_token_accuracy']:.4f} (the likeliest token is the target)",
        "entropy": f"{metrics['entropy']:.4f} nats per supervised token",
        "tokens": f"{int(metrics['supervised_tokens'])} supervised of {int(metrics['num_tokens'])}",
        "speed": f"{metrics['supervised_tokens'] / seconds:.0f} supervised tokens/s, peak memory {memory.peak_gib(device):.1f} GiB",
    }
