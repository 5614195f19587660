"""report.html: what a run did, its curves, what was trained token by token, and answers with their rewards."""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from treetune.core import drafts, masking
from treetune.core.data.spans import Doc
from treetune.core.data.trees import TreeDoc
from treetune.core.run import curves, page
from treetune.core.run.observers import Observer

BEST, WORST = 3, 2  # completions of a prompt to show, where there are more
LOSS = {
    "supervised tokens": "nats per supervised token",
    "pairs": "mean over pairs",
    "completions": "mean over completions",
    "tokens and pairs": "mean over chosen tokens, plus the odds-ratio term's over pairs",
    "steps": "nats per judged step",
}


def write(
    run_dir: Path,
    *,
    history: Sequence[dict],
    rows: Mapping[str, str],
    docs: Sequence[Doc | TreeDoc],
    tokenizer: Any,
    read: str | None,
    unit: str,
) -> None:
    """Write report.html into a run folder, with the samples of its samples.jsonl.

    history: records of metrics.jsonl; rows: facts for the head of the page, by name; docs: documents to show as they are trained;
    read: `kinds.DatasetSpec.read` of their kind; unit: what the loss is a mean over.
    """
    steps = [record["step"] for record in history if "train/loss" in record]
    samples, groups = _answers(run_dir / "samples.jsonl", {steps[0], steps[len(steps) // 2], steps[-1]} if steps else set())
    values = page.documents(docs, tokenizer, read) | {"samples": samples, "groups": groups}
    values["rows"] = {name: masking.mask_secrets(value) for name, value in rows.items()}
    values["charts"] = curves.charts(history, loss=LOSS.get(unit, f"mean over {unit.rstrip(',')}"))
    drafts.write(run_dir / "report.html", page.render("run.jinja", name=run_dir.name, **values))


def _answers(path: Path, steps: set[int]) -> tuple[list, list[dict]]:
    """Sample answers by prompt, and for each of the steps the completions of one prompt, the one with the widest advantages."""
    samples: dict[str, list] = {}
    scored: dict[int, dict[str, list]] = {}
    for record in _records(path):
        if "rewards" not in record:
            samples.setdefault(record["prompt"], []).append((record["step"], record["answer"]))
        elif record["step"] in steps:
            scored.setdefault(record["step"], {}).setdefault(record["prompt"], []).append(record)
    return list(samples.items()), [_group(step, prompts) for step, prompts in sorted(scored.items())]


def _records(path: Path) -> Iterator[dict]:
    """Records one by one, because a long run leaves more completions than fit in memory; lines that are no record are skipped."""
    if not path.exists():
        return
    with open(path, encoding="utf-8", errors="replace", newline="\n") as file:
        for line in file:
            try:
                record = json.loads(line)
            except json.JSONDecodeError:
                continue
            if isinstance(record, dict) and {"step", "prompt", "answer"} <= record.keys():
                yield record


def _group(step: int, prompts: dict[str, list[dict]]) -> dict:
    """The completions of the prompt whose advantages differ most, best first."""
    prompt = max(prompts, key=lambda text: _spread(prompts[text]))
    ordered = sorted(prompts[prompt], key=lambda record: -_number(record.get("advantage")))
    extremes = ordered if len(ordered) <= BEST + WORST else ordered[:BEST] + ordered[-WORST:]
    return {"step": step, "prompt": prompt, "completions": [_completion(one) for one in extremes], "more": len(ordered) - len(extremes)}


def _spread(records: list[dict]) -> float:
    values = [_number(record.get("advantage")) for record in records]
    return max(values) - min(values)


def _number(value: Any) -> float:
    return value if isinstance(value, int | float) and math.isfinite(value) else 0.0


def _completion(record: dict) -> dict:
    """A completion as the template takes it."""
    advantage = _number(record.get("advantage"))
    rewards = [(name, "no opinion" if value is None else f"{value:.4g}") for name, value in record["rewards"].items()]
    about = f"{record['tokens']} tokens" if "tokens" in record else ""
    about += "" if record.get("stopped", True) else ", cut off"
    label = "on" if advantage > 0 else "bad" if advantage < 0 else "off"
    return {"label": label, "advantage": f"{advantage:+.2f}", "rewards": rewards, "about": about, "answer": record["answer"]}


class Report(Observer):
    """report.html of a run, written when all is saved; its head has what the run is and what it reached."""

    essential = True

    def __init__(self, run_dir: Path, *, docs: Sequence[Doc | TreeDoc], tokenizer: Any, read: str | None, unit: str):
        self.run_dir, self.docs, self.tokenizer, self.read, self.unit = run_dir, docs, tokenizer, read, unit
        self.about: dict[str, str] = {}

    def start(self, total_steps: int, step: int, about: Mapping[str, str]) -> None:
        """Keep what the run is."""
        self.about = dict(about)

    def summary(self, rows: Mapping[str, str], history: Sequence[Mapping[str, Any]]) -> None:
        """Write the page."""
        shown = {"docs": self.docs, "tokenizer": self.tokenizer, "read": self.read, "unit": self.unit}
        write(self.run_dir, history=[dict(record) for record in history], rows=self.about | dict(rows), **shown)
