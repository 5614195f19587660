"""What is wrong with a run, from its records, its status, its log and its config: causes with what was seen and what to change.

Reads what a run leaves and loads nothing: it works on a run that goes on, has failed, or was killed. Imports no torch.
"""

import json
import math
import statistics
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from treetune.core.run import errors, health, journal, runs
from treetune.core.run.health import sampled
from treetune.core.run.runs import PastRun


class Finding(NamedTuple):
    """Something that is wrong: its name, what was seen, and what to change, the first thing first."""

    cause: str
    seen: str
    fix: tuple[str, ...]


PREFIXES = 200  # beginnings of a history that the rules are asked about, where a run has no record of its health
EARLY = 10  # evaluations or steps before which nothing is called flat
FLAT = 0.005  # relative fall of a held-out loss that is none
TINY, HOPELESS = 30, 1000  # times below the usual learning rate that are tiny where nothing is learned, and in any case; above: too high
GROUPS, TAIL = 10, 1 << 20  # groups that show a collapse, and bytes of samples.jsonl that are looked at
FAINT = 1e-6  # scale of an adapter that adds nothing
NO_SYNC = ("the server has ", "was lost: the server still has", "was not given to the server", "weights for the server were damaged")
NAMES = {
    "no_gradient": "dead leaves", "plateau": "flat loss", "vanished": "memorised rows", "both_fall": "both sides fall",
    "overfit": "overfitting",
    "no_reward": "zero reward", "entropy_collapse": "collapsed entropy", "far_from_reference": "far from the reference",
    "stale_sampler": "lost sync with the sampler", "lost_weight": "lost sync with the sampler",
}  # fmt: skip


def diagnose(run: PastRun, *, usual_rate: float | None = None, memory_gib: float | None = None) -> list[Finding]:
    """What is wrong with a run, what ended it first; nothing for a healthy one.

    usual_rate: the peak learning rate of its method. memory_gib: of the machine, for a run that was killed.
    """
    findings = [*_ended(run, memory_gib, usual_rate), *_template(run), *_dead(run), *_rate(run, usual_rate), *_flat(run, usual_rate)]
    first: dict[str, Finding] = {}
    for one in [*findings, *_collapsed(run), *_health(run)]:
        first.setdefault(one.cause, one)
    if {"zero reward", "collapsed entropy"} & first.keys():  # what has no reward, or one completion only, has no signal either
        first.pop("no signal", None)
    return list(first.values())


def warnings(run: PastRun) -> list[str]:
    """Warnings of the run's log that no finding is made of, without those of health rules, each once."""
    told = {f"{event.seen}: {event.fix}" for event in run.status.health}
    lines = dict.fromkeys(journal.log(run.root, journal.WARNING))
    return [line for line in lines if line not in told and not line.startswith("chat template ") and line not in run.status.advice]


def _ended(run: PastRun, memory_gib: float | None, usual: float | None) -> Iterator[Finding]:
    """Why a run that did not come to its end stopped."""
    reason = run.reason
    if run.state == runs.CRASHED:
        yield _killed(run, memory_gib)
    elif run.state == journal.FAILED and errors.NO_MEMORY.search(reason):
        general = ("lower micro_batch_size or sequence_len, or turn on gradient_checkpointing",)
        yield Finding("out of memory", reason, run.status.advice or general)
    elif "not finite" in reason or any(_bad(record) for record in run.steps[-3:]):
        yield _not_finite(run, usual)
    elif any(text in reason for text in NO_SYNC):
        fix = ("sync whole generations again: --resume auto", "check that nobody else changes the server, and that it has this model")
        yield Finding("lost sync with the sampler", reason, fix)
    elif "get no gradient" in reason:
        yield Finding("dead leaves", reason, _alive(run))
    elif "No space left" in reason:
        yield Finding("full disk", reason, ("free some space, then --resume auto", "lower save_total_limit"))
    elif "train/loss was above" in reason:
        yield Finding("loss watchdog", reason, ("lower learning_rate, or lengthen the warm-up", "look for malformed rows before that step"))
    elif run.state == journal.FAILED:
        line_of_error = next(
            (line.strip() for line in reversed(journal.log(run.root, journal.ERROR)) if line.strip().startswith("File ")), ""
        )
        yield Finding("error", reason + (f" ({line_of_error})" if line_of_error else ""), ("the traceback is in run.log",))


def _bad(record: dict) -> bool:
    return bool(record.get("skipped")) and record.get("loss_scale", 1) <= 1 or not math.isfinite(record["train/loss"])


def _killed(run: PastRun, memory_gib: float | None) -> Finding:
    held = next((record["memory_gib"] for record in reversed(run.steps) if math.isfinite(record.get("memory_gib", math.nan))), None)
    if held is not None and memory_gib is not None and held > 0.7 * memory_gib and run.config.get("device") != "cuda":
        taken = f"{held:.1f} of {memory_gib:.1f} GiB in use"
        seen = f"its process was killed after step {run.step} with {taken}: the system does so when memory ends"
        return Finding("out of memory", seen, run.status.advice or ("lower micro_batch_size, or turn on gradient_checkpointing",))
    seen = f"{run.reason or 'its process has ended'}, after step {run.step}"
    return Finding("killed", seen, ("continue with --resume auto", "look into the system's log: memory, time limits, a restart"))


def _not_finite(run: PastRun, usual: float | None) -> Finding:
    config, rows = run.config, "rows [" in run.reason
    fixes = ["look at the rows that it names: treetune preprocess --debug"] * rows
    if config.get("dtype") == "float16":
        fixes.append("use dtype bfloat16, whose numbers are not bounded at 65504")
    norms = [value for _, value in run.series("grad_norm") if math.isfinite(value)]
    if norms and (grown := max(norms[-5:])) > 10 * (middle := statistics.median(norms)):
        fixes.append(f"the gradient grew before (grad_norm {grown:.3g}, usually {middle:.3g}): lower max_grad_norm")
    peak = _peak(run)
    if usual is not None and peak > TINY * usual:
        fixes.insert(0, f"lower learning_rate: it was {peak:.3g}, where {usual:.3g} is usual")
    else:
        fixes.append(f"lower learning_rate (it was {peak:.3g}) 2 to 10 times, or lengthen the warm-up")
    return Finding("not finite (NaN)", run.reason or f"the numbers of step {run.step} are not finite", tuple(fixes))


def _peak(run: PastRun) -> float:
    return max((value for _, value in run.series("learning_rate")), default=math.nan)


def _template(run: PastRun) -> Iterator[Finding]:
    """The template that the run itself found foreign to the tokenizer."""
    for line in journal.log(run.root, journal.WARNING):
        if line.startswith("chat template "):
            seen, _, fix = line.partition("; ")
            yield Finding("wrong template", seen, (fix,))


def _dead(run: PastRun) -> Iterator[Finding]:
    """Leaves without a gradient at the end of a run that learns from rows, and of one in which nothing at all has a gradient."""
    last = run.steps[-5:]
    if len(last) < 2 or any(sampled(record) for record in last):
        return
    dead = [record.get("dead_leaves", 0) for record in last]
    if min(dead) > 0 and all(record["train/loss"] != 0 for record in last):
        yield Finding("dead leaves", f"{int(min(dead))} trainable leaves had no gradient in the last {len(last)} steps", _alive(run))


def _alive(run: PastRun) -> tuple[str, ...]:
    """What may give leaves without a gradient one."""
    config, alpha = run.config, run.config.get("lora_alpha")
    scaled = config.get("adapter") == "lora" and isinstance(alpha, int | float) and alpha < FAINT * (config.get("lora_r") or 1)
    targets = config.get("lora_target_modules") or config.get("unfrozen_parameters")
    named = f" (they are {runs.shown(targets)})" if targets else ""
    return (
        *([f"raise lora_alpha, which is {alpha:g}: it scales what the adapter adds"] if scaled else []),
        f"leave out what the loss does not reach: check lora_target_modules, lora_modules_to_save and unfrozen_parameters{named}",
        "check that rows have supervised tokens: treetune preprocess --debug 3",
    )


def _rate(run: PastRun, usual: float | None) -> Iterator[Finding]:
    peak = _peak(run)
    if usual is not None and 0 <= peak < usual / HOPELESS and len(run.steps) > 1:
        yield _tiny(peak, usual, "")


def _tiny(peak: float, usual: float, seen: str) -> Finding:
    why = f"learning_rate is {peak:.3g} at its peak, where {usual:.3g} is usual"
    return Finding("tiny learning rate", f"{why}{'; ' * bool(seen)}{seen}", (f"raise learning_rate to about {usual:.3g}",))


def _flat(run: PastRun, usual: float | None) -> Iterator[Finding]:
    """A loss that has not fallen, and what of the config explains it."""
    seen, peak = _unchanged(run), _peak(run)
    if not seen:
        return
    if usual is not None and peak < usual / TINY:
        yield _tiny(peak, usual, seen)
        return
    limit, norms = run.config.get("max_grad_norm"), [value for _, value in run.series("grad_norm") if math.isfinite(value)]
    if limit and norms and statistics.median(norms) > 100 * limit:
        fix = (f"raise max_grad_norm: gradients of {statistics.median(norms):.3g} are clipped to {limit:g}",)
    elif run.config.get("lr_rules"):
        fix = (f"check lr_rules, which scale the learning rate: {runs.shown(run.config['lr_rules'])}", health.RULES["plateau"][1])
    else:
        fix = (health.RULES["plateau"][1], "look at what is supervised: treetune preprocess --debug 3")
    yield Finding("flat loss", seen, fix)


def _unchanged(run: PastRun) -> str:
    """What says that the loss has not fallen; empty where it has, or where nothing can be said."""
    if any(sampled(record) for record in run.steps[:1]) or run.step < EARLY:
        return ""
    held_out = [value for _, value in run.series("eval/loss") if math.isfinite(value)]
    if len(held_out) > 1 and held_out[0] > 0.05:
        flat = abs(held_out[0] - held_out[-1]) <= FLAT * held_out[0]
        return f"eval/loss was {held_out[0]:.4f} before and is {held_out[-1]:.4f} after {run.step} steps" if flat else ""
    losses = [value for _, value in run.series("train/loss") if math.isfinite(value)]
    part = len(losses) // 4
    if part < EARLY or statistics.mean(losses[:part]) < 0.05:
        return ""
    first, last = losses[:part], losses[-part:]
    noise = math.hypot(statistics.stdev(first), statistics.stdev(last)) / math.sqrt(part)
    flat = statistics.mean(first) - statistics.mean(last) <= 2 * noise
    return (
        f"train/loss was {statistics.mean(first):.4f} in the first {part} steps and {statistics.mean(last):.4f} in the last" if flat else ""
    )


def _collapsed(run: PastRun) -> Iterator[Finding]:
    """Completions of a prompt that are all the same: such steps have no advantage, and report no entropy."""
    groups: dict[tuple, set[str]] = {}
    sizes: Counter[tuple] = Counter()
    for record in _last_samples(run.root):
        key = record.get("step"), record.get("prompt")
        groups.setdefault(key, set()).add(str(record.get("answer")))
        sizes[key] += 1
    several = [texts for key, texts in groups.items() if sizes[key] > 1][-GROUPS:]
    if len(several) == GROUPS and all(len(texts) == 1 and texts != {""} for texts in several):
        seen = f"in the last {GROUPS} groups all completions of a prompt are the same text"
        yield Finding("collapsed entropy", seen, (health.RULES["entropy_collapse"][1],))


def _last_samples(root: Path) -> Iterator[dict]:
    """The last scored completions of a run; the line that the beginning of the part cuts is left out."""
    try:
        with open(root / "samples.jsonl", "rb") as file:
            file.seek(max(0, file.seek(0, 2) - TAIL))
            lines = file.read().split(b"\n")
    except OSError:
        return
    for line in lines:
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if isinstance(record, dict) and "rewards" in record:
            yield record


def _health(run: PastRun) -> Iterator[Finding]:
    """The health rules that fired, as the run recorded them, and as its records show them."""
    events = [(event.step, event.rule, event.seen, event.fix) for event in run.status.health]
    known = {rule for _, rule, _, _ in events}
    events += [(step, *event) for step, event in _replayed(run.history, known)]
    for step, rule, seen, fix in events:
        yield Finding(NAMES.get(rule, rule.replace("_", " ")), f"{seen} (step {step})", (fix,))


def _replayed(history: Sequence[dict], quiet: set[str]) -> Iterator[tuple[int, health.Event]]:
    """Health rules on beginnings of a history, each the first time that it fires."""
    apart = max(1, len(history) // PREFIXES)
    ends = sorted({*range(1, min(len(history), health.WINDOW) + 1), *range(apart, len(history), apart), len(history)} - {0})
    for end in ends:
        for event in health.events(list(history[:end]), quiet=quiet):
            quiet.add(event.rule)
            yield int(history[end - 1]["step"]), event
