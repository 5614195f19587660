"""Marks in the annotation of an option's field, beside its range: when it is unused, what it names, and what it does on resuming.

    momentum: Annotated[float, BELOW_ONE, STEP_SIZE, unused_unless("optimizer", "sgd", reason="{optimizer} has adam_beta1 instead")] = 0.0

An option that a command does not have leaves no other option unused. Importing this imports no torch.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from treetune.core import option_pairs
from treetune.core.run.resume_rules import DOCUMENTS, FUNCTION, LISTED, ORDER, REFUSED, START, WEIGHTS, Rule

Values = Mapping[str, Any]  # option -> value, of all options of a command
JUDGES = {DOCUMENTS: ("train", "held out"), ORDER: ("order",), WEIGHTS: ("model",)}


class Unused(NamedTuple):
    """When the run does not look at the option: reason(values) -> why, empty where it does."""

    reason: Callable[[Values], str]


def unused_if(option: str, *values: Any, reason: str) -> Unused:
    """Unused where the other option has one of the values, or is set at all if none are given; {option} in the reason is its value."""
    return Unused(lambda all_: reason.format(**all_) if option in all_ and _has(all_[option], values) else "")


def unused_unless(option: str, *values: Any, reason: str) -> Unused:
    """Unused where the other option has none of the values, or is not set at all if none are given."""
    return Unused(lambda all_: reason.format(**all_) if option in all_ and not _has(all_[option], values) else "")


def _has(value: Any, values: tuple) -> bool:
    return value in values if values else bool(value)


def _judged(verdict: str, reason: str, *judged_by: str) -> Rule:
    return Rule(verdict, reason, judged_by or JUDGES[verdict], lasting=True)


def refused(reason: str) -> Rule:
    """Another value cannot continue the run."""
    return Rule(REFUSED, reason)


def listed(reason: str, *, lasting: bool = False) -> Rule:
    """Another value takes effect, and is printed."""
    return Rule(LISTED, reason, lasting=lasting)


def function(reason: str, option: str) -> Rule:
    """Another value is refused unless the functions that it names are the same."""
    return Rule(FUNCTION, reason, (option,))


class EqualsTexts(NamedTuple):
    """The option holds texts with an equals sign: read(texts, option) raises ValueError for what is none.

    named: or a mapping in a file, of names to texts. values: to anything that is JSON.
    """

    read: Callable[[tuple[str, ...], str], Any]
    named: bool = False
    values: bool = False


class Switch(NamedTuple):
    """An option of choices that may also be written as one that is on or off: --option, --no-option, and true or false in a file."""

    on: str
    off: str


NAMED_TEXTS = EqualsTexts(option_pairs.named_texts, named=True)
NAMED_VALUES = NAMED_TEXTS._replace(values=True)
REGEX_NUMBERS = EqualsTexts(option_pairs.rules)


class Secret(NamedTuple):
    """The option holds a key or a password: it is written into no file, no record and no line."""


class Place(NamedTuple):
    """The option names something: a file, a folder, a model, a function. kind: what, a key of the checks in `places`.

    instead: the option that is read in place of this one where it is set.
    """

    kind: str
    instead: str = ""


ROW_SETS, ROW_FILES, HELD_OUT_FILES = Place("rows"), Place("rows", instead="datasets"), Place("rows", instead="test_datasets")
MODEL, MODEL_SHAPE, ADAPTER, CHECKPOINT = Place("model"), Place("model shape"), Place("adapter"), Place("checkpoint")
TEMPLATE, FUNCTION_PATH, PROGRAM, ANY_PATH = Place("template"), Place("function"), Place("program"), Place("anything")
RUN_FOLDER, PREPARED_ROWS, NEW_FOLDER = Place("run folder"), Place("prepared rows"), Place("new folder")
NEW_FILE, PAGE, LOG = Place("new file"), Place("page"), Place("log")

SECRET = Secret()
STARTED = Rule(START, "says how the run is started")
MODEL_WEIGHTS = _judged(WEIGHTS, "the trained weights belong to the model that they started from")
ROWS_READ = _judged(DOCUMENTS, "decides which documents are read, and which of their tokens are supervised")
ROWS_AND_ORDER = _judged(DOCUMENTS, ROWS_READ.reason, "train", "held out", "order")
STEP_ROWS = _judged(ORDER, "decides which documents a step reads")
ADAPTER_WEIGHTS = _judged(WEIGHTS, "the adapter was trained on from this one", "adapter")
REFERENCE_WEIGHTS = _judged(WEIGHTS, "the losses so far are distances from this reference", "reference")
TOKEN_IDS = refused("decides the ids of the rows and the shape of the model")
TRAINED = refused("decides what trains")
ADAPTER_SCALE = refused("scales everything that the adapter has learned")
OBJECTIVE = refused("decides what the loss is, which curves, early stopping and the best checkpoint compare")
REWARD = refused("decides what a reward is, which curves and the best checkpoint compare")
SAMPLED_FROM = refused("decides what is sampled from, which log-probs and rewards so far are of")
STORED = refused("decides how a stored generation is dealt to steps")
REFERENCE_PACE = listed("sets how fast the reference follows from here on")
GENERATIONS = listed("says how the generations to come are made")
COMPLETIONS = listed("bounds the completions of the steps to come")
CORRECTION = listed("corrects the samples of the steps to come for who makes them, which may change")
SAMPLER = listed("says who samples, and where it is")
STEP_SIZE = listed("sets how large the steps to come are")
RUN_LENGTH = listed("sets how long the run is")
RESOURCES = listed("trades time for memory, on the machine at hand")
MACHINE = listed(RESOURCES.reason, lasting=True)
SHOWN = listed("says what is shown, evaluated and kept, and when a run stops")
ANSWER = listed(SHOWN.reason, lasting=True)
