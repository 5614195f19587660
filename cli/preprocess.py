"""`treetune preprocess`: what a training run would read, token by token, before it trains.

Encodes every row as `sft` does and reports what became of them; `--debug` and `--html` show the tokens themselves.
"""

import time
from pathlib import Path

from rich.text import Text

from treetune.cli import corpus, parse, report, rundir, setup
from treetune.cli.configs import Preprocess
from treetune.cli.errors import checking_input
from treetune.cli.screen import Screen
from treetune.core.data import formats, loader
from treetune.core.data.formats import Report
from treetune.core.data.spans import Doc

BINS, BAR = 12, 40
PAGE = """<!doctype html><meta charset="utf-8"><title>{{ name }}</title><style>{{ style }}</style>
<h1>{{ name }}</h1>
<table>{% for key, value in rows.items() %}<tr><th align="left">{{ key }}</th><td>{{ value }}</td></tr>{% endfor %}</table>
<h2>Lengths</h2><pre>{{ histogram }}</pre>
<h2>Documents</h2><p><span class="on">supervised</span>, <span class="half">at another weight</span>, <span class="off">read only</span></p>
{% for row, tokens in documents %}<p>row {{ row }}</p>
<pre>{% for text, kind in tokens %}<span class="{{ kind }}">{{ text }}</span>{% endfor %}</pre>
{% endfor %}"""


def histogram(lengths: list[int], *, bins: int = BINS) -> list[str]:
    """One line per range of lengths (tokens): range, documents, and a bar."""
    low, high = min(lengths), max(lengths)
    width = max(1, -(-(high - low + 1) // bins))
    counts = [0] * (-(-(high - low + 1) // width))
    for length in lengths:
        counts[(length - low) // width] += 1
    edges = [low + i * width for i in range(len(counts))]
    lines = zip(edges, counts, strict=True)
    return [f"{edge:>6}-{edge + width - 1:<6} {count:>7} {'#' * round(BAR * count / max(counts))}" for edge, count in lines]


def efficiency(lengths: list[int], budget: int, *, seed: int) -> float:
    """Share of the token budget that the packed documents of an epoch fill."""
    plan = loader.epoch_plan(lengths, budget=budget, seed=seed)
    return sum(lengths) / (len(plan) * budget)


def summary(docs: list[Doc], config: Preprocess) -> dict[str, str]:
    """Counts over all documents."""
    lengths = corpus.lengths(docs)
    supervised = sum(int((doc.weight > 0).sum()) for doc in docs)
    budget = config.micro_batch_size * config.data.sequence_len
    rows = {
        "documents": f"{len(docs)}, {min(lengths)} to {max(lengths)} tokens, mean {sum(lengths) / len(docs):.1f}",
        "tokens": f"{sum(lengths)}, of which {supervised} supervised ({100 * supervised / sum(lengths):.1f} %)",
    }
    if config.data.sample_packing:
        full = efficiency(lengths, budget, seed=config.seed)
        rows["packing"] = (
            f"{100 * full:.1f} % full at {budget} tokens per micro-batch ({config.micro_batch_size} x {config.data.sequence_len})"
        )
    return rows


def by_role(reports: list[Report]) -> str:
    """Tokens and supervised tokens by who wrote them, over all data sets."""
    return ", ".join(f"{role} {tokens} ({trained} supervised)" for role, tokens, trained in formats.merged(reports).roles if tokens)


def coloured(doc: Doc, tokenizer) -> Text:
    """The document's text: supervised tokens green, those at another weight yellow, the rest dim."""
    styles = {"on": "black on green", "half": "black on yellow", "off": "dim"}
    _, tokens = report.document(doc, tokenizer)
    return Text.assemble(*((text, styles[kind]) for text, kind in tokens))


def page(config: Preprocess, docs: list[Doc], tokenizer, rows: dict[str, str]) -> str:
    """The report as one HTML page."""
    import jinja2

    shown = [report.document(doc, tokenizer) for doc in docs[: config.html_rows]]
    lines = "\n".join(histogram(corpus.lengths(docs)))
    template = jinja2.Environment(autoescape=True).from_string(PAGE)
    return template.render(name=" ".join(config.data.data), style=report.STYLE, rows=rows, histogram=lines, documents=shown)


def run(config: Preprocess, given: frozenset[str]) -> int:
    """Encode, report, show; the exit code."""
    screen, start = Screen(), time.perf_counter()
    with checking_input():
        parse.refuse_ignored(given, {} if config.html else {"html_rows": "there is no --html"})
        words = setup.load_words(config.model, config.vocabulary, say=screen.line)
        tokenizer = words.tokenizer
        with screen.counting("rows") as progress:
            docs, _, lines, reports = corpus.read_and_encode(
                config.data, tokenizer, given=given, processes=config.dataset_processes, progress=progress
            )
        rows = summary(docs, config) | {"by role": by_role(reports)}
        if config.html:
            rundir.write(Path(config.html), page(config, docs, tokenizer, rows))
    for line in lines:
        screen.line(line)
    screen.table("", rows | {"time": f"{time.perf_counter() - start:.1f} s"})
    screen.line("\n".join(histogram(corpus.lengths(docs))))
    for doc in docs[: config.debug]:
        screen.line(f"\nrow {doc.row}", "bold")
        screen.console.print(coloured(doc, tokenizer))
    if config.html:
        screen.line(f"wrote {config.html}")
    return 0
