"""Flags that are keys of axolotl's, behind one of its files: `--base-model m`, `--load-in-4bit`, `--trl.beta=0.1`. Imports no torch."""

from collections.abc import Mapping

from treetune.cli.axolotl import keys
from treetune.cli.axolotl.file import Values
from treetune.cli.axolotl.values import FUNCTIONS
from treetune.core.config.table import Option
from treetune.core.data import yamltext
from treetune.core.data.yamltext import Written

CHOOSE = ("rl", "reward_model", "process_reward_model", "pretraining_dataset")  # keys that say which method it is
SECTIONS = ("trl.", "ebft.", "vllm.")
KEYS = keys.RENAMED.keys() | FUNCTIONS.keys() | keys.NOTHING.keys() | keys.MISSING.keys() | {*CHOOSE, "batch_size"}


def taken(argv: list[str], options: Mapping[str, Option]) -> tuple[list[str], Values]:
    """The arguments that are flags of a command with these options, and the others as axolotl's file would hold them.

    A key of a section that is an option (`--trl.num-generations 4`) is the flag of that name.
    """
    rest: list[str] = []
    out: Values = {}
    texts: list[str] | None = None  # what stands behind a key of axolotl's
    name = ""
    for arg in argv:
        if not arg.startswith("--"):
            (rest if texts is None else texts).append(arg)
            continue
        if texts is not None:
            out |= _pair(name, texts)
        flag, equals, text = arg.partition("=")
        name = flag[2:].replace("-", "_")
        bare = next((name.removeprefix(section) for section in SECTIONS if name.startswith(section)), name)
        if not _is_key(bare, options):
            texts = None
            rest.append(arg if bare == name else f"--{bare.replace('_', '-')}{equals}{text}")
        else:
            name, texts = bare, [text] if equals else []
    return rest, out if texts is None else out | _pair(name, texts)


def _is_key(name: str, options: Mapping[str, Option]) -> bool:
    plain = name.removeprefix("no_")
    if name in options or plain in options:
        return False
    return bool({name, plain} & KEYS) or name.startswith(keys.KERNEL_STARTS)


def _pair(name: str, texts: list[str]) -> Values:
    """A key and its value: none is true, or false behind no_; several are a list."""
    if not texts:
        off = name.startswith("no_") and name not in KEYS
        return {name.removeprefix("no_") if off else name: Written(not off)}
    items = [_scalar(text) for text in texts]
    return {name: items[0] if len(items) == 1 else Written(items)}


def _scalar(text: str) -> Written:
    """A text as YAML reads it behind a key; the text itself where it is none."""
    try:
        return yamltext.read(f"key: {text}", "")["key"]
    except (ValueError, KeyError):
        return Written(text, text)


def over(written: Mapping[str, Written], given: Values) -> dict[str, Written]:
    """The keys of a file with those of flags in the places of their own, in a section where it has them there."""
    out = dict(written)
    for name, value in given.items():
        held = [key for key in ("trl", "ebft", "vllm") if key in out and isinstance(out[key].value, dict) and name in out[key].value]
        if held:
            out[held[0]] = Written(out[held[0]].value | {name: value})
        else:
            out[name] = value
    return out
