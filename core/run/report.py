"""report.html: what a run did, its curves, what was trained token by token, and answers with their rewards.

While the run goes on, the page is written again now and then, and beside it live.js, which brings an open page up to date in place.
"""

import contextlib
import json
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from treetune.core import drafts, masking, records
from treetune.core.data.spans import Doc
from treetune.core.data.trees import TreeDoc
from treetune.core.records import JsonRecord as Record
from treetune.core.run import answer_table, curves, page
from treetune.core.run.answer_table import Table
from treetune.core.run.health import Event
from treetune.core.run.lines import clock
from treetune.core.run.observers import Observer

LIVE = "live.js"
EVERY_S = 5.0  # between two writings of a page that is live
SHARE = 50  # of a run's time, at most one part in so many goes into writing it
RECENT = 20  # steps that say how long the next ones take
BEST, WORST = 3, 2  # completions of a prompt to show, where there are more
LOSS = {
    "supervised tokens": "nats per supervised token",
    "pairs": "mean over pairs",
    "completions": "mean over completions",
    "tokens and pairs": "mean over chosen tokens, plus the odds-ratio term's over pairs",
    "steps": "nats per judged step",
}


def write(path: Path, *, parts: Mapping[str, str], trained: str, live: bool = False) -> None:
    """Write the page of a run. parts: HTML by the id of its place; trained: HTML of the documents; live: whether it follows the run."""
    script = (page.FOLDER / LIVE).read_text(encoding="utf-8") if live else ""
    drafts.write(path, page.render("run.jinja", name=path.parent.name, trained=trained, live=script, **parts))


def _answers(path: Path, steps: set[int]) -> tuple[list, list[dict]]:
    """Sample answers by prompt, and for each of the steps the completions of one prompt, the one with the widest advantages."""
    samples: dict[str, list] = {}
    scored: dict[int, dict[str, list]] = {}
    for record in _records(path):
        if answer_table.is_answer(record):
            continue
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
    """report.html of a run: from its start on, and for the last time when all is saved. Its head has what the run is and reached."""

    essential = True

    def __init__(self, run_dir: Path, *, docs: Sequence[Doc | TreeDoc], tokenizer: Any, read: str | None, unit: str):
        self.run_dir, self.docs, self.tokenizer, self.read, self.unit = run_dir, docs, tokenizer, read, unit
        self.rows: dict[str, str] = {}
        self.history: list[Record] = []
        self.events: list[tuple[int, str, str]] = []
        self.latest: list[dict[str, Any]] = []
        self.asked: Table | None = None
        self.trained, self.total, self.due = "", 0, 0.0

    def start(self, total_steps: int, step: int, about: Mapping[str, str]) -> None:
        """Write the page of a run that begins, or goes on."""
        self.rows, self.total = dict(about), total_steps
        self.history = records.read(self.run_dir / "metrics.jsonl", numbers=True).records if step else []
        self.trained = page.part("trained.jinja", **page.documents(self.docs, self.tokenizer, self.read))
        self._follow()

    def step(self, record: Record) -> None:
        """Keep the record, and write the page if it is time."""
        self.history.append(record)
        self._follow()

    def evaluation(self, record: Record) -> None:
        """Keep the record, and write the page if it is time."""
        self.step(record)

    def samples(self, answers: Sequence[dict[str, Any]]) -> None:
        """Keep the answers, of which a page that is live shows the last."""
        if answers and answer_table.is_answer(answers[0]):
            self.asked = answer_table.build(answers, [answers[0]["step"]])
        else:
            self.latest = list(answers)

    def health(self, event: Event) -> None:
        """Keep what a health rule saw."""
        self.events.append((int(self.history[-1]["step"]) if self.history else 0, event.seen, event.fix))

    def end(self, stopped: str | None, history: Sequence[Record]) -> None:
        """Write the last page of a run that failed: nothing comes after it."""
        if stopped is not None and stopped.startswith("failed"):
            with contextlib.suppress(OSError):  # of a full disk, which may be what the run failed of
                self._finish({"state": stopped})

    def summary(self, rows: Mapping[str, str], history: Sequence[Record]) -> None:
        """Write the last page."""
        self._finish(rows)

    def _follow(self) -> None:
        """Write the page and what brings an open one up to date, unless that was a moment ago: it takes a small share of the time."""
        start = time.monotonic()
        if start < self.due:
            return
        parts = self._parts({"state": self._state()} | self.rows, *_shown(self.latest), self.asked)
        update = f"treetune({json.dumps({'stamp': time.time(), 'parts': parts})})\n"
        with contextlib.suppress(OSError):  # on a full disk the run goes on as long as its records and checkpoints do
            write(self.run_dir / "report.html", parts=parts, trained=self.trained, live=True)
            drafts.write(self.run_dir / LIVE, update)
        now = time.monotonic()
        self.due = now + max(EVERY_S, SHARE * (now - start))

    def _state(self) -> str:
        step, steps = int(self.history[-1]["step"]) if self.history else 0, [one for one in self.history if "step_seconds" in one]
        recent = [one["step_seconds"] for one in steps[-RECENT:]]
        eta = f", about {clock(sum(recent) / len(recent) * (self.total - step))} to go" if recent else ""
        return f"running: step {step} of {self.total}{eta}; written at {time.strftime('%H:%M:%S')}"

    def _finish(self, rows: Mapping[str, str]) -> None:
        """The page as it stays: with the answers of its beginning, its middle and its end."""
        steps = [record["step"] for record in self.history if "train/loss" in record]
        chosen = {steps[0], steps[len(steps) // 2], steps[-1]} if steps else set()
        path = self.run_dir / "samples.jsonl"
        asked = answer_table.build(_records(path), [int(record["step"]) for record in self.history if "eval/seconds" in record])
        parts = self._parts(self.rows | dict(rows), *_answers(path, chosen), asked)
        write(self.run_dir / "report.html", parts=parts, trained=self.trained)
        (self.run_dir / LIVE).unlink(missing_ok=True)

    def _parts(self, rows: Mapping[str, str], samples: list, groups: list[dict], asked: Table | None) -> dict[str, str]:
        """HTML by the id of its place."""
        facts = {name: masking.mask_secrets(value) for name, value in rows.items()}
        charts = curves.charts(self.history, loss=LOSS.get(self.unit, f"mean over {self.unit.rstrip(',')}"))
        now = page.part("{{ standing(rows, notes, charts) }}", rows=facts, notes=self.events, charts=charts)
        answers = page.part("{{ asked_table(asked) }}{{ replies(groups, samples) }}", groups=groups, samples=samples, asked=asked)
        return {"now": now, "answers": answers}


def _shown(latest: Sequence[dict[str, Any]]) -> tuple[list, list[dict]]:
    """The last answers, as `_answers` gives them."""
    if not latest:
        return [], []
    if "rewards" in latest[0]:
        return [], [_group(int(latest[0]["step"]), {latest[0]["prompt"]: list(latest)})]
    return [(one["prompt"], [(one["step"], one["answer"])]) for one in latest], []
