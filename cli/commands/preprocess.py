"""`treetune preprocess`: what a training run would read, token by token, before it trains.

Encodes every row as `--method` does and reports what became of them; `--debug` and `--html` show the tokens themselves.
"""

import dataclasses
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from treetune.cli import highlight, row_settings
from treetune.cli.errors import checking_input
from treetune.cli.options.commands import Preprocess
from treetune.cli.options.data import SAMPLES
from treetune.cli.screen import Screen
from treetune.core import drafts, option_pairs, owned
from treetune.core.config import checks
from treetune.core.data import corpus, dataset, formats, kinds, overview, passages
from treetune.core.run import guard, page
from treetune.models import loading
from treetune.models.tokenizer import set_up_tokenizer

METHODS = {"sft": "text", "dpo": "pairs", "kto": "unpaired", "reward": "ranked", "prm": "steps"}  # to names of kinds


class Encoded(NamedTuple):
    """Documents of all rows, a line for each data set, and what there is to say of them, by name."""

    docs: dataset.Docs
    lines: list[str]
    rows: dict[str, str]
    tokenizer: Any


def run(config: Preprocess, given: frozenset[str]) -> int:
    """Encode, report, show; the exit code."""
    screen, start = Screen(), time.perf_counter()
    kind = kinds.KINDS[METHODS[config.method]]
    with checking_input():
        checks.refuse_unused(given, unused_options(config))
        if "data" not in given:
            config = dataclasses.replace(config, data=dataclasses.replace(config.data, data=(SAMPLES[config.method],)))
        encoded = _encode(config, given, kind, screen)
        if config.html:
            _write_page(Path(config.html), config, encoded, kind)
    for line in encoded.lines:
        screen.line(line)
    screen.table("", encoded.rows | {"time": f"{time.perf_counter() - start:.1f} s"})
    screen.line("\n".join(overview.histogram(dataset.lengths(encoded.docs))))
    _show([(doc.row, passages.split(doc, encoded.tokenizer, kind.read)) for doc in encoded.docs[: config.debug]], screen)
    if config.html:
        screen.line(f"wrote {config.html}")
    return 0


def unused_options(config: Preprocess) -> dict[str, str]:
    """Options that this command would not look at, and why."""
    unused = {} if config.html else {"html_rows": "there is no --html"}
    alone = kinds.KINDS[METHODS[config.method]].in_parts is None
    return unused | ({"dataset_processes": f"with {config.method} rows depend on each other, so one process reads them"} if alone else {})


def _encode(config: Preprocess, given: frozenset[str], kind: kinds.DatasetSpec, screen: Screen) -> Encoded:
    special_tokens = option_pairs.named_texts(config.vocabulary.special_tokens, "special-tokens")
    model, revision, tokens = config.model.model, config.model.revision, config.vocabulary.tokens
    tokenizer = set_up_tokenizer(model, revision=revision, special_tokens=special_tokens, tokens=tokens, say=screen.line).tokenizer
    loading.check_configs(model, revision=revision)
    with screen.counting("rows") as progress:
        docs, _, lines, reports, _ = corpus.read_and_encode(
            kind,
            row_settings.documents(config.data),
            tokenizer,
            refuse=partial(checks.refuse_unused, given),
            processes=config.dataset_processes,
            progress=progress,
        )
    rows, lengths = overview.describe(docs, kind), dataset.lengths(docs)
    if config.data.sample_packing:
        sizes = {"sequence_len": config.data.sequence_len, "micro_batch_size": config.micro_batch_size}
        budget = dataset.batching(packing=True, **sizes, longest=max(lengths))["budget"]
        formula = f"{config.micro_batch_size} x {config.data.sequence_len}"
        rows["packing"] = overview.describe_packing(lengths, budget, seed=config.seed, formula=formula)
    if kind.read is None:
        rows["by role"] = overview.describe_roles(
            formats.merge_text_reports([report for report in reports if isinstance(report, formats.TextReport)])
        )
    return Encoded(docs, lines, rows, tokenizer)


def _write_page(path: Path, config: Preprocess, encoded: Encoded, kind: kinds.DatasetSpec) -> None:
    guard.require_own(path, owned.PAGE, "--html")
    values = page.documents(encoded.docs[: config.html_rows], encoded.tokenizer, kind.read)
    histogram = "\n".join(overview.histogram(dataset.lengths(encoded.docs)))
    text = page.render("rows.jinja", name=" ".join(config.data.data), rows=encoded.rows, histogram=histogram, **values)
    path.parent.mkdir(parents=True, exist_ok=True)
    drafts.write(path, text)


def _show(docs: Sequence[tuple[int, list[passages.Passage]]], screen: Screen) -> None:
    """Documents on the screen, each with its row: in colours, or with marks where there are none."""
    if docs and not screen.colours:
        screen.line(f"\n{highlight.legend([part for _, parts in docs for part in parts])}; the rest is read only")
    for row, parts in docs:
        screen.line(f"\nrow {row}", "bold")
        for part in parts:
            if part.title:
                screen.line(part.title, "bold")
            screen.text(highlight.colour(part.pieces) if screen.colours else highlight.mark(part.pieces))
