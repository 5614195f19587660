"""`treetune eval`: loss, perplexity and accuracy over all supervised tokens of a data set, and metrics of answers to its prompts."""

import json
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from treetune.cli import answering, row_settings
from treetune.cli.answering import Interview
from treetune.cli.methods.rewarding import Place
from treetune.cli.options.evaluate import Eval
from treetune.cli.screen import Screen
from treetune.core import param
from treetune.core.config import checks
from treetune.core.data import corpus, dataset, kinds, pack
from treetune.core.run import evaluation, folder, memory, ranks
from treetune.core.run.answers import Answerer, Measure
from treetune.core.run.errors import checking_input
from treetune.core.run.observers import Observers
from treetune.core.state import TrainState
from treetune.losses import sft_objective
from treetune.models import loading, policy, target
from treetune.models.batches import batcher
from treetune.models.policy import Policy
from treetune.models.target import Target


class EvalScreen(Screen):
    """The console of the command, which keeps the answers that it is told of, as in samples.jsonl without the step of a run."""

    def __init__(self, *, quiet: bool):
        super().__init__(quiet=quiet)
        self.answers: list[dict[str, Any]] = []

    def samples(self, answers: Sequence[dict[str, Any]]) -> None:
        """Keep the answers."""
        self.answers += [{name: value for name, value in answer.items() if name != "step"} for answer in answers]


class Loaded(NamedTuple):
    """What is evaluated: documents, a line about each data set, and a policy with the state that holds its weights."""

    docs: list[Any]
    lines: list[str]
    policy: Policy
    state: TrainState
    parameters: int


def run(config: Eval, given: frozenset[str]) -> int:
    """Evaluate, print, and write; the exit code. Under torchrun the rows are shared out and every rank reports the same."""
    with ExitStack() as stack:
        with checking_input():
            device = loading.select_device(config.model.device)
            place = Place(device, ranks.join_ranks(device))
            screen = EvalScreen(quiet=place.ranks.rank > 0)
            chosen = target.choose(config.adapter.adapter, named="model" in given, **asdict(config.model))
            loaded = _load(config, chosen, given, screen)
            asked = _ask(config, chosen, loaded, place, screen, stack)
        for line in loaded.lines:
            screen.line(line)
        table, rate = _of_rows(config, loaded, place)
        if asked is not None:
            answer, measure = asked
            with checking_input():
                metrics = measure(answer(loaded.state))
            table |= {name: f"{value:.6f}" for name, value in metrics.items()}
    _show(screen, config.answers.eval_table_size)
    first = {"model": f"{chosen.name}, {loaded.parameters / 1e6:.1f} M parameters"}
    speed = f"{rate:.0f} supervised tokens/s, peak memory {memory.peak_gib(device):.1f} GiB"
    screen.table("", first | table | {"speed": speed} | _write(config, screen, place.ranks.rank))
    return 0


def _load(config: Eval, chosen: Target, given: frozenset[str], screen: Screen) -> Loaded:
    """The rows and the model. Errors: ValueError naming file, row and fix; BadInput for options that would be ignored."""
    tokenizer = target.load_tokenizer(chosen, say=screen.line)
    rows, refuse = row_settings.documents(config.data), partial(checks.refuse_unused, given)
    docs, _, lines, *_ = corpus.read_and_encode(kinds.TEXT, rows, tokenizer, refuse=refuse)
    model, lora = target.load_model(chosen, say=screen.line)
    dataset.check_fits(docs, config.data.sequence_len, vocab_size=model.cfg.vocab_size, max_positions=model.cfg.max_positions)
    sizes, state = policy.inference(model, lora)
    return Loaded(docs, lines, sizes._replace(tokenizer=tokenizer), state, param.count(model.params))


def _ask(
    config: Eval, chosen: Target, loaded: Loaded, place: Place, screen: EvalScreen, stack: ExitStack
) -> tuple[Answerer, Measure] | None:
    stop_ids = target.stop_ids(chosen, loaded.policy.tokenizer)
    sources = (loaded.policy, loaded.docs, stop_ids, place, Observers((screen,)))
    return answering.asked(Interview(config.answers, config.model, *sources), stack)


def _of_rows(config: Eval, loaded: Loaded, place: Place) -> tuple[dict[str, str], float]:
    """The metrics of the rows themselves, and supervised tokens a second."""
    objective = sft_objective.objective(policy.logprob(loaded.policy), want=("top1", "entropy"))
    lengths = {"sequence_len": config.data.sequence_len, "micro_batch_size": config.micro_batch_size}
    batching = dataset.batching(packing=config.data.sample_packing, **lengths)
    collate = batcher(loaded.policy.cfg, place.device, (pack.collate,))
    evaluate = evaluation.of_documents(objective, loaded.docs, collate, batching, ranks=place.ranks)
    assert evaluate is not None, "rows that give no document are refused"
    start = time.perf_counter()
    metrics = {key: value.item() for key, value in evaluate(loaded.state).items()}
    return evaluation.describe(metrics), metrics["supervised_tokens"] / (time.perf_counter() - start)


def _show(screen: EvalScreen, count: int) -> None:
    """Print the first answers."""
    for answer in screen.answers[:count]:
        screen.line(f"held-out row {answer['row']}", "bold")
        for name in ("prompt", "answer", "reference"):
            screen.line(f"  {name}: {answer[name].strip() or '(blank)'}")


def _write(config: Eval, screen: EvalScreen, rank: int) -> dict[str, str]:
    """Write all answers, if asked to; a row of the table."""
    if config.output is None or rank > 0:
        return {}
    text = "".join(json.dumps(answer, ensure_ascii=False) + "\n" for answer in screen.answers)
    with checking_input():
        return {"saved": str(folder.write_new(Path(config.output), text))}
