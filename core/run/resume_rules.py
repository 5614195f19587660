"""What a resumed run may change: a rule for each option, and the comparison of two sets of options. Imports no torch."""

import json
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from treetune.core import import_path, masking

REFUSED, LISTED, DOCUMENTS, ORDER, WEIGHTS, FUNCTION, START = "refused", "listed", "documents", "order", "weights", "function", "start"


class Rule(NamedTuple):
    """What becomes of another value on resuming, and why.

    refused: an error. listed: it takes effect and is printed. documents, order, weights, function: refused unless what the option stands
    for has the same fingerprints (`judged_by`), and then listed. start: says how the run is started, and is not compared.
    lasting: a run that has no step left still looks at the option.
    """

    verdict: str
    reason: str
    judged_by: tuple[str, ...] = ()
    lasting: bool = False


Rules = Mapping[str, Rule]  # by option


class Change(NamedTuple):
    """An option whose value is another than in the checkpoint."""

    name: str
    before: Any
    after: Any

    def __str__(self) -> str:
        return f"{self.name} {shown(self.before)} -> {shown(self.after)}"


class Verdict(NamedTuple):
    """What stands in the way of resuming, and what may change; texts for people."""

    refused: list[str]
    listed: list[str]


def shown(value: Any) -> str:
    """A value in a line, at most 60 characters of it."""
    if value is None:
        return "none"
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, list) and value and all(isinstance(item, str | int | float) for item in value):
        text = " ".join(item if isinstance(item, str) else shown(item) for item in value)
    else:
        text = value if isinstance(value, str) and value else json.dumps(value, default=str)
    text = masking.mask_secrets(text if text.isprintable() else json.dumps(text))
    return text if len(text) <= 60 else text[:56] + " ..."


def changes(
    before: Mapping[str, Any], after: Mapping[str, Any], rules: Rules, *, defaults: Mapping[str, Any], ignored: Mapping[str, str]
) -> list[Change]:
    """Options with other values, but for those that say how a run is started and those that this run does not look at.

    defaults: values of options that the checkpoint does not know, because they are newer than it.
    """
    pairs = [Change(name, before.get(name, defaults.get(name)), value) for name, value in after.items()]
    return [one for one in pairs if one.before != one.after and rules[one.name].verdict != START and one.name not in ignored]


def judge(differences: list[Change], after: Mapping[str, Any], rules: Rules, *, same: Callable[[str], bool | None]) -> Verdict:
    """The verdict on changed options. same(what) -> whether documents ("train", "held out"), their "order" or weights ("model", ...) are
    those of the checkpoint; None where nobody knows yet, and then nothing is said about the option.
    """
    refused, listed = [], []
    for one in differences:
        reason = _reason(one, after, rules[one.name], same)
        if reason:
            refused.append(f"{one.name} {shown(one.after)} instead of {shown(one.before)} ({reason})")
        elif reason is not None:
            listed.append(str(one))
    return Verdict(refused, listed)


def _reason(one: Change, after: Mapping[str, Any], rule: Rule, same: Callable[[str], bool | None]) -> str | None:
    """Why a change is refused; nothing where it is not; None where that cannot be said yet."""
    if conflict := _without_effect(one, after):
        return conflict
    functions = all(import_path.named({"": value}) for value in (one.before, one.after))
    if rule.verdict == LISTED or rule.verdict == REFUSED and not (rule.judged_by and functions):
        return rule.reason if rule.verdict == REFUSED else ""
    unchanged = [same(what) for what in rule.judged_by]
    if False in unchanged:
        return rule.reason
    return None if None in unchanged else ""


def _without_effect(one: Change, after: Mapping[str, Any]) -> str:
    """Why this value would change nothing, or cannot go on from the checkpoint's."""
    if one.name == "num_epochs" and after.get("max_steps") is not None:
        return "it would have no effect: max_steps is given"
    if one.name == "momentum" and (not one.before or not one.after):
        return "the checkpoint holds moments with momentum only"
    return ""
