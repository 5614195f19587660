"""`treetune preprocess`: what a training run would read, token by token, before it trains.

Encodes every row as `--method` does and reports what became of them; `--debug` and `--html` show the tokens themselves.
"""

import dataclasses
import tempfile
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from treetune.cli import row_settings
from treetune.cli.options.commands import Preprocess
from treetune.cli.options.data import SAMPLES
from treetune.cli.screen import Screen
from treetune.core import hub_repos, option_pairs, owned
from treetune.core.config import checks
from treetune.core.data import corpus, dataset, document_rows, kinds, overview, passages
from treetune.core.hub_repos import Repo, Unsent
from treetune.core.run import guard, page, published
from treetune.core.run.errors import RunFailed, checking_input
from treetune.models import loading
from treetune.models.tokenizer import set_up_tokenizer

METHODS = {"sft": "text", "dpo": "pairs", "kto": "unpaired", "reward": "ranked", "prm": "steps"}  # to names of kinds


def run(config: Preprocess, given: frozenset[str]) -> int:
    """Encode, report, show; the exit code."""
    screen, start = Screen(), time.perf_counter()
    kind = kinds.KINDS[METHODS[config.method]]
    with checking_input():
        checks.refuse_unused(given, unused_options(config))
        if "data" not in given and not config.data.datasets:
            config = dataclasses.replace(config, data=dataclasses.replace(config.data, data=(SAMPLES[config.method],)))
        tokenizer = _tokenizer(config, screen)
        repo = None
        if (name := config.push_dataset_to_hub) is not None:
            repo = hub_repos.prepare(Repo(name, private=config.hub_private_repo, kind="dataset"), "push_dataset_to_hub")
        encoded = _encode(config, given, kind, tokenizer, screen)
        rows, histogram = _describe(config, encoded, kind), "\n".join(overview.histogram(dataset.lengths(encoded.docs)))
        if config.html:
            guard.require_own(Path(config.html), owned.PAGE, "--html")
            shown = page.documents(encoded.docs[: config.html_rows], tokenizer, kind.read)
            page.write_documents(
                Path(config.html),
                shown,
                name=" ".join(row_settings.names(config.data.datasets or config.data.data)),
                rows=rows,
                histogram=histogram,
            )
    for line in encoded.lines:
        screen.line(line)
    screen.table("", rows | {"time": f"{time.perf_counter() - start:.1f} s"})
    screen.line(histogram)
    _show([(doc.row, passages.split(doc, tokenizer, kind.read)) for doc in encoded.docs[: config.debug]], screen)
    if config.html:
        screen.line(f"wrote {config.html}")
    if repo is not None:
        screen.line(f"uploaded {len(encoded.docs)} documents to {_push(repo, config, encoded, rows)}")
    return 0


def _push(repo: Repo, config: Preprocess, encoded: corpus.EncodedRows, rows: dict[str, str]) -> str:
    """Upload documents as rows of tokens and labels; the address. Errors: RunFailed where they do not arrive."""
    with tempfile.TemporaryDirectory(prefix="treetune-push-") as made:
        document_rows.write(Path(made) / "train.jsonl", encoded.docs)
        about = {"method": config.method, "tokenizer of": loading.base_name(str(config.model.model))} | rows
        (Path(made) / "README.md").write_text(document_rows.card(repo.id, published.cleared(about)), encoding="utf-8")
        try:
            return hub_repos.upload(repo, Path(made), f"Upload {len(encoded.docs)} documents")
        except Unsent as error:
            raise RunFailed(f"the documents are not on the hub: {error}; the same command uploads them") from error


def unused_options(config: Preprocess) -> dict[str, str]:
    """Options that this command would not look at, and why."""
    unused = {} if config.html else {"html_rows": "there is no --html"}
    alone = kinds.KINDS[METHODS[config.method]].in_parts is None
    return unused | ({"dataset_processes": f"with {config.method} rows depend on each other, so one process reads them"} if alone else {})


def _tokenizer(config: Preprocess, screen: Screen) -> Any:
    model, revision, words = config.model.model, config.model.revision, config.vocabulary
    special_tokens = option_pairs.named_texts(words.special_tokens, "special-tokens")
    asked = {"other": words.tokenizer_config, "special_tokens": special_tokens, "tokens": words.tokens}
    setup = set_up_tokenizer(model, revision=revision, **asked, say=screen.line)
    loading.check_configs(model, revision=revision)
    return setup.tokenizer


def _encode(config: Preprocess, given: frozenset[str], kind: kinds.DatasetSpec, tokenizer: Any, screen: Screen) -> corpus.EncodedRows:
    rows, refuse = row_settings.documents(config.data), partial(checks.refuse_unused, given)
    with screen.counting("rows") as progress:
        working = {"processes": config.dataset_processes, "progress": progress}
        return corpus.read_and_encode(kind, rows, tokenizer, refuse=refuse, **working)


def _describe(config: Preprocess, encoded: corpus.EncodedRows, kind: kinds.DatasetSpec) -> dict[str, str]:
    rows = overview.describe(encoded.docs, kind)
    if config.data.sample_packing:
        sizes = {"sequence_len": config.data.sequence_len, "micro_batch_size": config.micro_batch_size}
        rows["packing"] = overview.describe_packing(encoded.docs, **sizes, seed=config.seed)
    if kind.read is None:
        rows["by role"] = overview.describe_roles(encoded.reports)
    return rows


def _show(docs: Sequence[tuple[int, list[passages.Passage]]], screen: Screen) -> None:
    """Documents on the screen, each with its row."""
    if docs and not screen.colours:
        screen.line(f"\n{passages.legend([part for _, parts in docs for part in parts])}; the rest is read only")
    for row, parts in docs:
        screen.line(f"\nrow {row}", "bold")
        for part in parts:
            if part.title:
                screen.line(part.title, "bold")
            screen.passage(part.pieces)
