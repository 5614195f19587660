"""`treetune check`: the certificate of a model, measured, shown and kept."""

import torch

from treetune.cli.options.commands import Check
from treetune.cli.screen import Screen
from treetune.core.run.errors import checking_input
from treetune.models import certificate, fetch, products


def run(config: Check, given: frozenset[str]) -> int:
    """Measure, print, keep; the exit code: 0 all within limits, 1 a difference, 2 refused."""
    screen = Screen()
    with checking_input():
        path = fetch.resolve(config.model, say=screen.line, revision=config.revision)
        if path.suffix == ".gguf":
            raise ValueError(f"{path} is a .gguf file, which transformers reads in another way: expected a model folder")
        products.settle(torch.float32, torch.device("cpu"))  # what a run on a CPU computes with
        with screen.busy(f"checking {path}"):
            result = certificate.certify(path)
    for line in certificate.describe(result):
        screen.line(line)
    if result.outcome == certificate.REFUSED:
        return 2
    certificate.keep(result)
    screen.line(f"kept in {certificate.place(result.digest)}")
    return 0 if result.passed else 1
