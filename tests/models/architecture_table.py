"""The outcome of every architecture: each is made small, saved, loaded, certified, in a process of its own.

python tests/models/architecture_table.py                  # print the table
python tests/models/architecture_table.py --write          # write it into docs/models.md
python tests/models/architecture_table.py gemma3 mixtral   # the measures of some
"""

import argparse
import collections
import importlib.util
import os
import pickle
import re
import select
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

HERE = Path(__file__).parent
PAGE = HERE.parents[1] / "docs" / "models.md"
BEGIN, END = "<!-- architectures: begin -->", "<!-- architectures: end -->"
OUTCOMES = ("native", "bridged", "one document at a time", "refused")
TIMEOUT_S = 60.0


class Result(NamedTuple):
    """An architecture, its outcome, the reason for it, and the lines of its certificate; another outcome is a failure."""

    model_type: str
    outcome: str
    reason: str = ""
    lines: tuple[str, ...] = ()
    seconds: float = 0.0


def small_models():
    """The module with the small configs, which tests cannot import by name."""
    if "architectures" not in sys.modules:
        spec = importlib.util.spec_from_file_location("architectures", HERE / "architectures.py")
        sys.modules["architectures"] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules["architectures"])
    return sys.modules["architectures"]


def certify(model_type: str, folder: Path) -> Result:
    """The outcome of one architecture, its small model saved to a folder."""
    from treetune.models import certificate

    models = small_models()
    if model_type in models.ABSENT:
        return Result(model_type, "refused", models.ABSENT[model_type])
    models.save(model_type, folder)
    result = certificate.certify(folder, certificate.seeded_documents(models.VOCABULARY))
    reason = re.sub(rf"(?:the model )?{re.escape(str(folder))}(?:/config\.json)?:? ?", "", result.reason)
    if "TREETUNE_TRACEBACK" in reason:
        return Result(model_type, "fails: an unforeseen error", reason)
    if worse := certificate.differences(result):
        return Result(model_type, f"fails: {', '.join(row.name for row in worse)}", reason, tuple(certificate.describe(result)))
    return Result(model_type, result.outcome, reason, tuple(certificate.describe(result)))


def apart(model_type: str, timeout_s: float = TIMEOUT_S) -> Result:
    """`certify` in a forked process, which has the imports already; one that ends otherwise or takes longer is a failure."""
    begun, folder = time.monotonic(), Path(tempfile.mkdtemp())
    reader, writer = os.pipe()
    if (child := os.fork()) == 0:
        _answer(model_type, folder, writer)
    os.close(writer)
    try:
        ready, _, _ = select.select([reader], [], [], timeout_s)
        with os.fdopen(reader, "rb") as pipe:
            answer = pipe.read() if ready else b""
        if not ready:
            os.kill(child, 9)
        os.waitpid(child, 0)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    result = (
        pickle.loads(answer) if answer else Result(model_type, f"fails: no answer within {timeout_s:g} s" if not ready else "fails: ended")
    )
    return result._replace(seconds=time.monotonic() - begun)


def _answer(model_type: str, folder: Path, writer: int) -> None:
    try:
        result = certify(model_type, folder)
    except Exception as error:  # the table has no exceptions: one is a failure that it shows
        result = Result(model_type, f"fails: {type(error).__name__}", " ".join(str(error).split())[:300])
    with os.fdopen(writer, "wb") as pipe:
        pipe.write(pickle.dumps(result))
    os._exit(0)


def counts(results: list[Result]) -> dict[str, int]:
    """How many have each outcome."""
    found = collections.Counter(result.outcome for result in results)
    return {name: found[name] for name in OUTCOMES} | {name: n for name, n in found.items() if name not in OUTCOMES}


def table(results: list[Result]) -> str:
    """The table of docs/models.md."""
    said = ", ".join(f"{n} {name}" for name, n in counts(results).items())
    lines = [f"{len(results)} architectures: {said}.", "", "| model_type | outcome | reason |", "|---|---|---|"]
    return "\n".join([*lines, *(f"| {r.model_type} | {r.outcome} | {r.reason.replace('|', '/')} |" for r in results)])


def recorded(page: str) -> dict[str, str]:
    """{model_type: outcome} of the table in a page."""
    rows = page.partition(BEGIN)[2].partition(END)[0].splitlines()
    cells = [[cell.strip() for cell in row.strip("|").split("|")] for row in rows if row.startswith("| ")]
    return {name: outcome for name, outcome, _ in cells if name != "model_type"}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("types", nargs="*")
    parser.add_argument("--write", action="store_true")
    args = parser.parse_args()
    import torch
    import transformers
    from transformers import AutoModelForCausalLM  # noqa: F401  here, so that no process imports it again

    from treetune.models import certificate  # noqa: F401

    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    results = []
    for model_type in args.types or small_models().model_types():
        results.append(apart(model_type))
        result = results[-1]
        print(f"{result.seconds:5.1f} s  {result.model_type:24} {result.outcome}  {result.reason}", flush=True)
        for line in result.lines if args.types else [line for line in result.lines if line.startswith("DIFFERENCE")]:
            print(f"         {line}", flush=True)
    print(counts(results))
    if args.write:
        before, _, rest = PAGE.read_text().partition(BEGIN)
        PAGE.write_text(before + BEGIN + "\n" + table(results) + "\n" + END + rest.partition(END)[2])


if __name__ == "__main__":
    main()
