"""What a checkpoint was made with, and whether a run may go on from it: options, documents, weights, tokenizer.

A record of all that is in every checkpoint, so that a resumed run is compared with the checkpoint and not with files that were edited
since. Options are compared before anything is loaded; what they stand for, by its fingerprints, before anything is written.
"""

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from treetune.core import ckpt, fields, import_path, masking
from treetune.core.data import cache, fingerprint, template_date
from treetune.core.rollout import builtin
from treetune.core.run import folder, resume_rules
from treetune.core.state import Params

KEY = "provenance"  # of a checkpoint's meta
DOCUMENTS = {
    "train": "other documents to train on than it was made with, though no option says so: rows were edited",
    "held out": "other held-out documents than it was made with, though no option says so: rows were edited",
    "order": "other steps of the documents than it was made with",
}
LENGTHS = {"max_steps", "num_epochs"}
REWARD_MODEL = "reward model "
WORDS = {"tokenizer": "the tokenizer numbers or splits texts otherwise", "stop tokens": "other tokens end an answer"}


class Provenance(NamedTuple):
    """What a run is made with; fingerprints are texts. {} where a method has nothing of the kind."""

    command: str
    options: dict[str, Any]  # every option as JSON, with what was left open
    processes: int
    documents: dict[str, str] = {}  # "train", "held out", "order"
    weights: dict[str, str] = {}  # "model" as the run started, "adapter", "reference", reward models
    words: dict[str, str] = {}  # "tokenizer", "template", "stop tokens", "date" (as chat templates write it)
    code: dict[str, str] = {}  # files of the user's own functions
    functions: dict[str, str] = {}  # by option: those files and names, wherever they are


class Options(NamedTuple):
    """The options of a run, and what is known of them.

    values, defaults: by option, of this run and of none. unused: options that it does not look at. rules: what a resumed run may change.
    resolve(values) -> values with what was left open. functions: options that name functions, of which `doors` also take built-in names.
    """

    command: str
    values: dict[str, Any]
    defaults: dict[str, Any]
    unused: dict[str, str]
    rules: resume_rules.Rules
    resolve: Callable[[dict[str, Any]], dict[str, Any]]
    functions: tuple[str, ...]
    doors: frozenset[str]


class Earlier(NamedTuple):
    """The checkpoint that a run goes on from. `provenance`: what it was made with, as far as that is known."""

    path: Path
    meta: dict
    provenance: Provenance
    old: bool  # written before checkpoints had a record: `provenance` has the options of the run's config.yaml


class Origin(NamedTuple):
    """What a run is made with, the checkpoint that it goes on from, and the fingerprint of earlier versions over its frozen weights."""

    options: Options
    now: Provenance
    before: Earlier | None = None
    base_digest: str = ""


def begin(run: folder.RunDir, options: Options, *, processes: int, say: Callable[[str], None]) -> Origin:
    """The record of a run whose model and rows nobody has looked at yet.

    Errors: ValueError, one line, for options that the checkpoint cannot be continued with, whatever they would read or load.
    """
    values = {name: _plain(value) for name, value in options.values.items()}
    origin = with_functions(Origin(options, Provenance(options.command, options.resolve(values), processes)), (), {})
    return origin if run.resume is None else origin._replace(before=_earlier(run.resume, origin, say))


def _plain(value: Any) -> Any:
    """A value as JSON, without passwords of addresses."""
    return json.loads(masking.mask_secrets(json.dumps(value, default=str)))


def with_weights(origin: Origin, weights: dict[str, str], base_digest: Callable[[], str]) -> Origin:
    """The record with fingerprints of what the run starts from: "model", and "adapter" and "reference" where there are any.

    base_digest() is the fingerprint of earlier versions, which only their checkpoints are asked for.
    """
    old = origin.before is not None and origin.before.old
    return origin._replace(now=origin.now._replace(weights=weights), base_digest=base_digest() if old else "")


def weights_digest(params: Params, *facts: Any) -> str:
    """Fingerprint of weights, and of what is computed with them."""
    return fingerprint.values(ckpt.leaf_digest(params), *facts)


def with_words(origin: Origin, tokenizer: Any, stop: Iterable[int] = ()) -> Origin:
    """The record with fingerprints of the vocabulary, of the chat template, and of the tokens that end what is sampled."""
    template = fingerprint.values(tokenizer.chat_template)
    words = {"tokenizer": cache.vocabulary_digest(tokenizer), "template": template, "stop tokens": " ".join(map(str, sorted(stop)))}
    return origin._replace(now=origin.now._replace(words=words | {"date": template_date.chosen()}))


def date(origin: Origin) -> str:
    """The date for chat templates: that of the checkpoint that the run goes on from, else today."""
    return (origin.before.provenance.words.get("date") if origin.before else None) or template_date.today()


def with_functions(origin: Origin, names: Iterable[str | None], models: Mapping[str, str]) -> Origin:
    """The record with the files of the user's own functions, where they are found without importing them, and reward models.

    What an option of functions stands for is what is in their files, the names in there and their options, wherever the files are.
    """
    options = origin.now.options
    names = [*names, *import_path.named({name: options[name] for name in origin.options.doors & options.keys()})]
    places = {name: _source(name.split("?")[0]) for name in names if name and name.split("?")[0] not in builtin.BUILTIN}
    code = {name: hashlib.sha256(path.read_bytes()).hexdigest() for name, path in places.items() if path is not None}
    scorers = {name.removeprefix(REWARD_MODEL): [text] for name, text in models.items()}
    fingerprints = scorers | {
        name: [text, re.split(r"[:.]", name.split("?")[0])[-1], name.partition("?")[2]] for name, text in code.items()
    }
    wanted = {
        key: options[key]
        for key in origin.options.functions
        if key in options and (key not in origin.options.doors or import_path.named({key: options[key]}))
    }
    functions = {key: fingerprint.values([fingerprints.get(name, name) for name in _listed(value)]) for key, value in wanted.items()}
    return origin._replace(now=origin.now._replace(code=code, weights=origin.now.weights | dict(models), functions=functions))


def _listed(value: Any) -> list[str]:
    return [value] if isinstance(value, str) else list(value or ())


def _source(name: str) -> Path | None:
    """The file of module.function or file.py:function."""
    return import_path.source(name.rpartition(":" if ":" in name else ".")[0])


def _earlier(path: Path, origin: Origin, say: Callable[[str], None]) -> Earlier:
    """The checkpoint to resume from, by its options alone one that can be."""
    meta = json.loads((path / "state.json").read_text(encoding="utf-8"))  # its digest was checked when the checkpoint was chosen
    now, rules = origin.now, origin.options.rules
    earlier = Earlier(path, meta, _read(meta[KEY], path), False) if KEY in meta else _guessed(path, meta, origin, say)
    if earlier.provenance.command != now.command:
        raise ValueError(f"{path} was made by treetune {earlier.provenance.command}: continue it with that command, not {now.command}")
    _raise(path, resume_rules.judge(_changes(earlier, origin), now.options, rules, same=lambda what: None).refused)
    return earlier


def _read(value: Any, path: Path) -> Provenance:
    """The record in a checkpoint. Errors: ValueError for a damaged one."""
    source = fields.mapping(value, f"{path}/state.json: {KEY}")
    named = {name: fields.inner(source, name, default=fields.Fields({}, "")).values for name in Provenance._fields[3:]}
    return Provenance(
        fields.text(source, "command"),
        fields.inner(source, "options").values,
        fields.integer(source, "processes", least=1),
        **{name: {key: str(text) for key, text in texts.items()} for name, texts in named.items()},
    )


def _guessed(path: Path, meta: dict, origin: Origin, say: Callable[[str], None]) -> Earlier:
    """What is known of a checkpoint of an earlier version, whose options are in the run's config.yaml only."""
    import yaml

    file = path.resolve().parent.parent / "config.yaml"
    try:
        options = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        options = None
    if not isinstance(options, dict):
        say(f"{path} was written by an earlier version and {_shorter(file)} cannot be read: which options changed is not known")
        return Earlier(path, meta, origin.now, True)
    say(f"{path} was written by an earlier version: its options are taken from {_shorter(file)}")
    defaults = origin.options.defaults
    options = {name: _plain(options.get(name, defaults[name])) for name in defaults}
    return Earlier(path, meta, origin.now._replace(options=origin.options.resolve(options)), True)


def _changes(earlier: Earlier, origin: Origin) -> list[resume_rules.Change]:
    options = origin.options
    return resume_rules.changes(
        earlier.provenance.options, origin.now.options, options.rules, defaults=options.defaults, ignored=options.unused
    )


def check(origin: Origin, *, documents: dict[str, str], stream: str) -> tuple[dict, list[str]]:
    """The record as a checkpoint's meta, and what changed since the one that the run goes on from, a line each.

    documents: their fingerprints. stream: the one of earlier versions, over their lengths.
    Errors: ValueError, one line, for what the checkpoint cannot be continued with.
    """
    now = origin.now._replace(documents=documents)
    meta = {KEY: now._asdict()}
    return meta, [] if origin.before is None else _compared(origin.before, origin._replace(now=now), stream)


def _compared(earlier: Earlier, origin: Origin, stream: str) -> list[str]:
    now, rules = origin.now, origin.options.rules
    same = _old_same(earlier.meta, stream, origin) if earlier.old else _same(earlier.provenance, now)
    verdict = resume_rules.judge(changed := _changes(earlier, origin), now.options, rules, same=same)
    named = {what for one in changed for what in rules[one.name].judged_by}
    problems = verdict.refused + [text for what, text in _unnamed(earlier, now).items() if what not in named and same(what) is False]
    lines = verdict.listed
    if not earlier.old:
        problems += [text for what, text in WORDS.items() if earlier.provenance.words.get(what) != now.words.get(what)]
        lines += _quietly_changed(earlier.provenance, now)
    if earlier.provenance.processes != now.processes:
        lines.append(f"{now.processes} processes instead of {earlier.provenance.processes}")
    _raise(earlier.path, problems)
    return lines


def _same(before: Provenance, now: Provenance) -> Callable[[str], bool]:
    def same(what: str) -> bool:
        earlier, current = (side.documents | side.weights | side.functions for side in (before, now))
        return earlier.get(what) == current.get(what)

    return same


def _old_same(meta: dict, stream: str, origin: Origin) -> Callable[[str], bool]:
    """Lengths, order and frozen weights are all that such a checkpoint can be asked about."""

    def same(what: str) -> bool:
        if what == "order":
            return meta.get("stream") == stream
        if what in ("train", "held out", *origin.options.functions):
            return False
        return meta.get("base_digest") == origin.base_digest != ""

    return same


def _unnamed(earlier: Earlier, now: Provenance) -> dict[str, str]:
    """What to say of fingerprints that differ where no option does."""
    if earlier.old:
        other = {"order": "other data, packing or batch options"}
        return other | ({"model": "another base model"} if earlier.meta.get("base_digest") else {})
    shared = earlier.provenance.weights.keys() & now.weights.keys()  # a reward model from another place is judged by its option
    roles = {what: "base model" if what == "model" else what for what in earlier.provenance.weights | now.weights}
    roles = {what: name for what, name in roles.items() if what in shared or not what.startswith(REWARD_MODEL)}
    return DOCUMENTS | {what: f"another {name}: its weights are not those it was made with" for what, name in roles.items()}


def _quietly_changed(before: Provenance, now: Provenance) -> list[str]:
    """Files and templates that changed in what no fingerprint above holds."""
    out = [f"{name}: the file of this function changed" for name, text in now.code.items() if before.code.get(name, text) != text]
    return out + ["the chat template changed, the documents did not"] * (before.words.get("template") != now.words.get("template"))


def _raise(path: Path, problems: list[str]) -> None:
    if problems:
        file = path.resolve().parent.parent / "config.yaml"
        fix = "resume with what it was made with" + (f" (--config {_shorter(file)} has its options)" if file.is_file() else "")
        raise ValueError(f"{path} cannot be continued with {'; '.join(problems)}: {fix}, or start a new run")


def _shorter(path: Path) -> Path:
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path


def reached(path: Path, step: int, total: int, changed: list[str], rules: resume_rules.Rules) -> None:
    """Errors: ValueError for a checkpoint beyond the last step of the run, and at it for changes that only further steps would see."""
    if step > total:
        raise ValueError(
            f"{path} is at step {step} and this run ends at {total}: raise max_steps or num_epochs, or name another checkpoint"
        )
    names = {text: text.partition(" ")[0] for text in changed}
    if step == total and not LENGTHS & set(names.values()):
        if idle := [text for text, name in names.items() if name in rules and not rules[name].lasting]:
            raise ValueError(f"{path} is at the last step of the run, so {idle[0]} would have no effect: raise max_steps or num_epochs")
