"""A certificate: what was measured of a model against transformers' plain forward and against itself, and the outcome.

It is kept as `$TREETUNE_HOME/certificates/KEY.json`, by the digest of the model and the versions of what computed it.
"""

import contextlib
import hashlib
import json
import math
import os
from collections.abc import Iterator, Sequence
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

import torch

from treetune.core import fields, param
from treetune.models import Model, bridge, certificate_checks, fetch, hf, identity, loading, plain_model, quantised
from treetune.models.certificate_checks import Check, Measure, Subject
from treetune.models.fetch import Say, silent

FORMAT = 1  # of the file; another one is measured again
PASS, DIFFERENCE, STATED, LEFT_OUT = "PASS", "DIFFERENCE", "stated", "not measured"
NATIVE, BRIDGED, ALONE, REFUSED = "native", "bridged", "one document at a time", "refused"
TEXTS = (
    "The quick brown fox jumps over the lazy dog, and nobody asks why.",
    "A farmer has 17 sheep and buys 25 more. How many sheep are there now? 17 + 25 = 42.",
    "def area(width, height):\n    return width * height\n",
)
LENGTHS = (24, 17, 11)  # tokens of the documents where there is no tokenizer
LONGEST = 64  # tokens of a document, so that the work is bounded
FORWARD_TREES = 2  # of a first run: our model and that of transformers
GRADIENT_TREES = 5  # float32 trees of weights in memory: two models, two gradients, and what is computed on the way
WIDE_TREES = 10  # with two models and two gradients in float64
FIRST_RUN = 10**9  # parameters up to which a first run measures gradients, too
LATER = "left out before a run of so large a model; treetune check measures gradients"
UNDECIDED = "rounding or error: float64, which would tell, does not fit into memory"


class Row(NamedTuple):
    """One measure: its name, the largest difference, its limit (None: no limit), the verdict, the dtype, and what it was measured on."""

    name: str
    measure: float
    limit: float | None
    verdict: str
    dtype: str
    note: str


class Certificate(NamedTuple):
    """The rows of a model and its outcome: native, bridged, one document at a time, or refused for a reason.

    digest: `identity.digest` of the model as it is checked; empty where it is refused.
    """

    model: str
    digest: str
    family: str
    outcome: str
    reason: str
    rows: tuple[Row, ...]

    @property
    def passed(self) -> bool:
        """Whether the model loads, and no measure is over its limit."""
        return self.outcome != REFUSED and not differences(self)


def differences(certificate: Certificate) -> list[Row]:
    """The rows over their limit."""
    return [row for row in certificate.rows if row.verdict == DIFFERENCE]


def needed(model: Model) -> bool:
    """Whether a model has a certificate: native families have tests of their own."""
    return isinstance(model.cfg, bridge.Config)


def ensure(path: Path, model: Model, digest: str, *, say: Say = silent) -> None:
    """Say in a line how a model of transformers' modules was certified, by the certificate that is kept, or else by one made here.

    digest: its `identity.digest`. Raises ValueError where a measure is over its limit.
    """
    result = recall(digest)
    if result is None and not _fits(model, FORWARD_TREES):
        say(f"certificate: none, two float32 copies of {path} do not fit into memory; treetune check certifies it where they do")
        return
    if result is None:
        result = certify(path, gradients=param.count(model.params) <= FIRST_RUN)
        keep(result)
    if worse := differences(result):
        row = worse[0]
        raise ValueError(
            f"{path} is not computed as transformers computes it: {row.name} {row.measure:.3g}, expected at most {row.limit:g}; "
            f"treetune check {path} shows all measures"
        )
    say(f"certificate: {result.outcome}, {sum(row.verdict == PASS for row in result.rows)} measures within their limits")


def certify(path: Path, documents: Sequence[Sequence[int]] | None = None, *, gradients: bool = True) -> Certificate:
    """Measure the model of a folder on three documents, by default those of its tokenizer or seeded ids, with or without gradients.

    Raises ValueError where transformers cannot load the folder; a model that is refused here has a certificate that says so.
    """
    try:
        model = quantised.dense(loading.load_model(path, dtype="float32", device=torch.device("cpu"))[0])
    except ValueError as error:
        return Certificate(str(path), "", "", REFUSED, str(error), ())
    chosen = tuple(list(ids) for ids in documents) if documents else example_documents(path, model)
    rows = tuple(measure_rows(path, model, chosen, gradients=gradients))
    return Certificate(str(path), identity.digest(model), model.family, *outcome(model), rows)


def outcome(model: Model) -> tuple[str, str]:
    """How the model is computed, and why where that is one document at a time."""
    if not isinstance(model.cfg, bridge.Config):
        return NATIVE, ""
    return (ALONE, model.cfg.alone) if model.cfg.alone else (BRIDGED, "")


def measure_rows(path: Path, model: Model, documents: tuple[list[int], ...], *, gradients: bool = True) -> Iterator[Row]:
    """The rows of all checks, in float32; what rounding may have brought over its limit is measured again in float64."""
    with fields.reading(f"transformers' model of {path}"):
        subject = Subject(model, plain_model.load(path), documents)
    wide: list[Subject] = []
    for check in certificate_checks.CHECKS:
        if check.gradients and not (gradients and _fits(model, GRADIENT_TREES)):
            yield _unmeasured(check, LEFT_OUT, "gradients of both models do not fit into memory" if gradients else LATER)
            continue
        try:
            yield from _rows(check, subject, wide, path)
        except ValueError as error:  # a part of what models do, such as sampling, is refused by name
            yield _unmeasured(check, REFUSED, str(error))


def _fits(model: Model, trees: int) -> bool:
    """Whether memory has room for as many float32 trees of weights as this."""
    return trees * 4 * param.count(model.params) < hf.memory_bytes()


def _unmeasured(check: Check, verdict: str, reason: str) -> Row:
    return Row(check.measure.__name__.replace("_", " "), math.nan, None, verdict, "", reason)


def _rows(check: Check, subject: Subject, wide: list[Subject], path: Path) -> list[Row]:
    rows = [_judge(measure, "float32") for measure in check.measure(subject)]
    if not check.doubled or all(row.verdict != DIFFERENCE for row in rows):
        return rows
    if not _fits(subject.model, WIDE_TREES):
        return [row._replace(verdict=LEFT_OUT, note=UNDECIDED) if row.verdict == DIFFERENCE else row for row in rows]
    if not wide:
        double = quantised.dense(hf.load(path, dtype=torch.float64))
        wide.append(Subject(double, plain_model.load(path, dtype=torch.float64), subject.documents))
    again = [_judge(measure, "float64") for measure in check.measure(wide[0])]
    return [new if old.verdict == DIFFERENCE else old for old, new in zip(rows, again, strict=True)]


def _judge(measure: Measure, dtype: str) -> Row:
    # Written so that what is not a number does not pass.
    verdict = STATED if measure.limit is None else PASS if measure.value <= measure.limit else DIFFERENCE
    return Row(measure.name, measure.value, measure.limit, verdict, dtype, measure.note)


def example_documents(path: Path, model: Model) -> tuple[list[int], ...]:
    """Three texts in the tokens of the model's folder, or seeded ids where it has no tokenizer."""
    longest = min(LONGEST, model.cfg.max_positions // 2)
    if not any((path / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "tokenizer_config.json")):
        return seeded_documents(model.cfg.vocab_size, longest)
    words = hf.tokenizer(path)
    return tuple(words(text)["input_ids"][:longest] for text in TEXTS)


def seeded_documents(vocab_size: int, longest: int = LONGEST) -> tuple[list[int], ...]:
    """Token ids in the upper part of the vocabulary: special ids, such as padding, are mostly low, and embeddings treat some as nothing."""
    generator = torch.Generator().manual_seed(0)
    sizes = [min(size, longest) for size in LENGTHS]
    return tuple(torch.randint(vocab_size // 8, vocab_size, (size,), generator=generator).tolist() for size in sizes)


def describe(certificate: Certificate) -> list[str]:
    """The lines of a table: a verdict first, then what was measured."""
    if certificate.outcome == REFUSED:
        return [f"REFUSED  {certificate.model}: {certificate.reason}"]
    worse = differences(certificate)
    result = f"{len(worse)} of {len(certificate.rows)} measures over their limit" if worse else "all measures within their limits"
    return [*map(_line, certificate.rows), f"{certificate.model}: {certificate.outcome} (family {certificate.family}), {result}"]


def _line(row: Row) -> str:
    limit = "" if row.limit is None else f"<= {row.limit:g}"
    return f"{row.verdict:12}  {row.name:27}  {row.measure:<8.3g}  {limit:8}  {row.dtype:7}  {row.note}".rstrip()


def recall(digest: str) -> Certificate | None:
    """The certificate that is kept of the model with this digest and the versions in use."""
    try:
        stored = json.loads(place(digest).read_text())
        rows = tuple(Row(*row) for row in stored.pop("rows"))
        return Certificate(**{name: stored[name] for name in Certificate._fields if name != "rows"}, rows=rows)
    except (OSError, ValueError, KeyError, TypeError):
        return None


def keep(certificate: Certificate) -> None:
    """Write the certificate of a model that loads; where nothing can be written, each start measures."""
    path = place(certificate.digest)
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        draft.write_text(json.dumps(certificate._asdict() | {"versions": versions()}, indent=1))
        draft.replace(path)


def place(digest: str) -> Path:
    """The file of a certificate."""
    key = hashlib.sha256(" ".join([digest, *versions().values()]).encode()).hexdigest()
    return fetch.home() / "certificates" / f"{key[:16]}.json"


def versions() -> dict[str, str]:
    """What a certificate depends on besides the weights."""
    return {"format": str(FORMAT)} | {name: metadata.version(name) for name in ("treetune", "transformers", "torch")}
