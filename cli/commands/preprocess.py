"""`treetune preprocess`: what a training run would read, token by token, before it trains.

Encodes every row as `--method` does and reports what became of them; `--debug` and `--html` show the tokens themselves.
"""

import dataclasses
import time
from collections.abc import Sequence
from pathlib import Path

from rich.text import Text

from treetune.cli import corpus, guard, parse, rundir, setup
from treetune.cli.configs import Preprocess
from treetune.cli.errors import checking_input
from treetune.cli.options.shared import SAMPLES
from treetune.cli.screen import Screen
from treetune.core import masking
from treetune.core.data import formats, kinds, loader, passages, trees
from treetune.core.data.formats import Report
from treetune.core.run import page

BINS, BAR = 12, 40
STYLES = {"on": "black on green", "bad": "black on red", "half": "black on yellow", "off": "dim"}  # by label of a passage
MARKS = {"on": ("[[", "]]"), "bad": ("{{", "}}"), "half": ("((", "))"), "off": ("", "")}
METHODS = {"sft": "text", "dpo": "pairs", "kto": "unpaired", "reward": "ranked", "prm": "steps"}


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


def summary(docs: corpus.Docs, config: Preprocess) -> dict[str, str]:
    """Counts over all documents."""
    lengths = corpus.lengths(docs)
    rows = {
        "documents": f"{len(docs)}, {min(lengths)} to {max(lengths)} tokens, mean {sum(lengths) / len(docs):.1f}",
        "tokens": f"{sum(lengths)}, {learned(docs, kinds.KINDS[METHODS[config.method]])}",
    }
    if isinstance(docs[0], trees.TreeDoc) and docs[0].branch[-1]:
        rows["prompts"] = shared(docs)
    if config.data.sample_packing:
        budget = corpus.batching(config.data, config.micro_batch_size, longest=max(lengths))["budget"]
        full = efficiency(lengths, budget, seed=config.seed)
        per = "the longest document" if budget == max(lengths) else f"{config.micro_batch_size} x {config.data.sequence_len}"
        rows["packing"] = f"{100 * full:.1f} % full at {budget} tokens per micro-batch ({per})"
    return rows


def learned(docs: corpus.Docs, kind: kinds.Kind) -> str:
    """What is learned of the documents: their supervised tokens, or what a head gives at some of them."""
    if kind.read == "last":
        return f"with a score to learn at the end of each of {sum(len(trees.branches(doc)) for doc in docs)} completions"
    supervised = sum(int((doc.weight > 0).sum()) for doc in docs)
    if kind.read == "classes":
        return f"with {supervised} judged steps, {sum(int((doc.classes == 1).sum()) for doc in docs)} of them good"
    return f"of which {supervised} supervised ({100 * supervised / sum(corpus.lengths(docs)):.1f} %)"


def shared(docs: Sequence[trees.TreeDoc]) -> str:
    """What it saves that each prompt is there once for all its completions."""
    once, copied = sum(len(doc.tokens) for doc in docs), sum(sum(trees.side_lengths(doc)) for doc in docs)
    longest = max(max(trees.side_lengths(doc)) for doc in docs)
    return f"shared by their completions: {once} tokens instead of {copied}; the longest prompt with one completion has {longest}"


def by_role(reports: list[Report]) -> str:
    """Tokens and supervised tokens by who wrote them, over all data sets."""
    return ", ".join(f"{role} {tokens} ({trained} supervised)" for role, tokens, trained in formats.merged(reports).roles if tokens)


def coloured(pieces: passages.Pieces) -> Text:
    """The pieces for a terminal with colours."""
    return Text.assemble(*((masking.escape_controls("".join(texts)), STYLES[label]) for label, texts in passages.join_runs(pieces)))


def marked(pieces: passages.Pieces) -> str:
    """The pieces with marks around what is not read only, for a terminal without colours."""
    return "".join(f"{MARKS[label][0]}{''.join(texts)}{MARKS[label][1]}" for label, texts in passages.join_runs(pieces))


def legend(parts: Sequence[passages.Passage]) -> str:
    """What the marks of these passages mean, in a line."""
    labels = {label for part in parts for _, label in part.pieces}
    return ", ".join(f"{MARKS[label][0]}{meaning}{MARKS[label][1]}" for label, meaning in passages.MEANINGS.items() if label in labels)


def show(screen: Screen, shown: list[passages.Passage], row: int, *, colours: bool) -> None:
    """A document on the screen, in colours or with marks."""
    screen.line(f"\nrow {row}", "bold")
    for passage in shown:
        if passage.title:
            screen.line(passage.title, "bold")
        screen.text(coloured(passage.pieces) if colours else marked(passage.pieces))


def ignored(config: Preprocess) -> dict[str, str]:
    """{option: why this command would not look at it}."""
    out = {} if config.html else {"html_rows": "there is no --html"}
    alone = kinds.KINDS[METHODS[config.method]].in_parts is None
    return out | ({"dataset_processes": f"with {config.method} rows depend on each other, so one process reads them"} if alone else {})


def run(config: Preprocess, given: frozenset[str]) -> int:
    """Encode, report, show; the exit code."""
    screen, start = Screen(), time.perf_counter()
    with checking_input():
        parse.refuse_ignored(given, ignored(config))
        if "data" not in given:
            config = dataclasses.replace(config, data=dataclasses.replace(config.data, data=(SAMPLES[config.method],)))
        kind = kinds.KINDS[METHODS[config.method]]
        words = setup.load_words(config.model, config.vocabulary, say=screen.line)
        tokenizer = words.tokenizer
        with screen.counting("rows") as progress:
            docs, _, lines, reports, _ = corpus.read_and_encode(
                config.data, tokenizer, given=given, kind=kind, processes=config.dataset_processes, progress=progress
            )
        rows = summary(docs, config) | ({"by role": by_role(reports)} if kind.read is None else {})
        if config.html:
            guard.require_own(Path(config.html), guard.PAGE, "--html")
            shown = page.documents(docs[: config.html_rows], tokenizer, kind.read)
            lines_ = "\n".join(histogram(corpus.lengths(docs)))
            text = page.render("rows.jinja", name=" ".join(config.data.data), rows=rows, histogram=lines_, **shown)
            Path(config.html).parent.mkdir(parents=True, exist_ok=True)
            rundir.write(Path(config.html), text)
    for line in lines:
        screen.line(line)
    screen.table("", rows | {"time": f"{time.perf_counter() - start:.1f} s"})
    screen.line("\n".join(histogram(corpus.lengths(docs))))
    shown = [(doc.row, passages.split(doc, tokenizer, kind.read)) for doc in docs[: config.debug]]
    if shown and not screen.colours:
        screen.line(f"\n{legend([one for _, parts in shown for one in parts])}; the rest is read only")
    for row, parts in shown:
        show(screen, parts, row, colours=screen.colours)
    if config.html:
        screen.line(f"wrote {config.html}")
    return 0
