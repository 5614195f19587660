"""`treetune eval`: loss, perplexity and accuracy over all supervised tokens of a data set."""

import time
from dataclasses import asdict
from functools import partial

from treetune.cli import row_settings
from treetune.cli.options.commands import Eval
from treetune.cli.screen import Screen
from treetune.core import param
from treetune.core.config import checks
from treetune.core.data import corpus, dataset, kinds, pack
from treetune.core.run import evaluation, memory, ranks
from treetune.core.run.errors import checking_input
from treetune.losses import sft_objective
from treetune.models import loading, policy, target
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
    sizes, state = policy.inference(model, lora)
    objective = sft_objective.objective(policy.logprob(sizes), want=("top1", "entropy"))
    lengths = {"sequence_len": config.data.sequence_len, "micro_batch_size": config.micro_batch_size}
    batching = dataset.batching(packing=config.data.sample_packing, **lengths)
    evaluate = evaluation.of_documents(objective, docs, batcher(model.cfg, device, (pack.collate,)), batching, ranks=processes)
    assert evaluate is not None, "rows that give no document are refused"
    start = time.perf_counter()
    metrics = {key: value.item() for key, value in evaluate(state).items()}
    rate = metrics["supervised_tokens"] / (time.perf_counter() - start)
    table = {"model": f"{chosen.name}, {param.count(model.params) / 1e6:.1f} M parameters"} | evaluation.describe(metrics)
    table["speed"] = f"{rate:.0f} supervised tokens/s, peak memory {memory.peak_gib(device):.1f} GiB"
    screen.table("", table)
    return 0
