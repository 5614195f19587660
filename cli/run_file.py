"""The file of a run as options of a command: a file of ours or of axolotl's, here or at an address. Imports no torch.

A file of a run is read by every command: one that does not train takes what it has an option for, and the model or the adapter that the
run left.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from treetune.cli.axolotl import flags, translate
from treetune.cli.axolotl.file import Values
from treetune.cli.methods import METHODS
from treetune.core.config import reading, suggestions, table
from treetune.core.config.table import Option
from treetune.core.data import yamltext, yamlvalues
from treetune.core.data.yamltext import Written

ADDRESS = ("http://", "https://")
ENDINGS = (".yaml", ".yml")
SECONDS = 20.0  # to fetch a file
METHOD = "method"  # the key of our files that names the training command
MODEL = ("model", "revision", "dtype", "device", "quant", "quant_double")
VOCABULARY = ("special_tokens", "tokens")
ROWS = ("datasets", "data", "format", "split", "max_rows", "sequence_len", "overlong", "sample_packing", "chat_template",
        "dataset_exact_deduplication", "dataset_prepared_path", "default_system_message", "roles_to_train", "train_on_eos",
        "train_on_inputs")  # fmt: skip
# What other commands take from the file of a training run, where they have such an option.
TAKEN = {
    "preprocess": (*MODEL, *VOCABULARY, *ROWS, "micro_batch_size", "seed"),
    "eval": (*MODEL, *ROWS, "micro_batch_size"),
    "generate": MODEL, "chat": MODEL, "merge": MODEL, "serve": MODEL, "check": MODEL,
    "score": (*MODEL, *ROWS),
}  # fmt: skip
APART = {"preprocess": ("push_dataset_to_hub",)}  # keys of axolotl's runs that only the command has, not the training of the file
ROWS_OF = {"dpo": "dpo", "orpo": "dpo", "simpo": "dpo", "cpo": "dpo", "kto": "kto", "reward": "reward", "prm": "prm"}


class RunFile(NamedTuple):
    """What a file says to a command: typed values by option, and lines to print. foreign: whether the file is axolotl's."""

    values: dict[str, Any]
    lines: tuple[str, ...] = ()
    foreign: bool = False


def is_file(text: str) -> bool:
    """Whether an argument names such a file."""
    return text.partition("?")[0].endswith(ENDINGS) or text.startswith(ADDRESS)


def load(path: str) -> dict[str, Written]:
    """The keys of a file. Errors: ValueError, one line, for what cannot be read."""
    return _load(path)[0]


def _load(path: str) -> tuple[dict[str, Written], list[str]]:
    """The keys of a file, and lines about what axolotl's own reader lets pass in its files, which ours does not."""
    faults: list[str] = []
    written = yamltext.read(_fetch(path) if path.startswith(ADDRESS) else yamltext.text_of(path), path, faults)
    if faults and not translate.is_foreign(written):
        raise ValueError(faults[0])
    twice = [text for text in faults if "is given twice" in text]
    return written, [text.removeprefix(f"{path} ").replace("; keep one", "; the last one counts") for text in twice]


def _fetch(address: str) -> str:
    import httpx

    try:
        with httpx.stream("GET", address, timeout=SECONDS, follow_redirects=True) as answer:
            answer.raise_for_status()
            data = b""
            for part in answer.iter_bytes():
                data += part
                if len(data) > yamltext.SIZE_MAX:
                    raise ValueError(f"config file {address} has more than {yamltext.SIZE_MAX} bytes")
        return data.decode("utf-8-sig")
    except (httpx.HTTPError, httpx.InvalidURL, UnicodeDecodeError) as error:
        raise ValueError(f"config file {address} cannot be read: {' '.join(str(error).split()) or type(error).__name__}") from error


def method_of(written: Mapping[str, Written], path: str) -> str:
    """The training command that a file is for. Errors: ValueError for one that says nothing of it."""
    if translate.is_foreign(written):
        return translate.method_of(written, path)
    if METHOD not in written:
        return translate.method_of(written, path) if "datasets" in written and "model" not in written else _unnamed(path)
    name = yamlvalues.plain(written[METHOD])
    if name not in METHODS:
        raise ValueError(f"{path}: method must be one of {', '.join(METHODS)}, got {yamlvalues.shown(written[METHOD])}")
    return name


def _unnamed(path: str) -> str:
    raise ValueError(f"{path} does not say how to train: write method: sft into it (or {', '.join(list(METHODS)[1:])})")


def foreign_flags(argv: list[str], path: str | None, options: Mapping[str, Option]) -> tuple[list[str], Values]:
    """The arguments behind a file of axolotl's without those that are its keys and no options, and these keys with their values."""
    if path is None or not translate.is_foreign(_load(path)[0]):
        return argv, {}
    return flags.taken(argv, options)


def read(path: str, command: str, options: Mapping[str, Option], *, over: Values | None = None, hint: str = "") -> RunFile:
    """What a file says to a command that has these options. over: keys that flags give it.

    Errors: ValueError, one line, naming the file and what is wrong in it.
    """
    written, faults = _load(path)
    written = flags.over(written, over or {})
    own = not translate.is_foreign(written) and not set(written) - set(options)
    if command in METHODS or command not in TAKEN or own:
        run = _own(written, path, command, options, hint)
        return run._replace(lines=(*run.lines, *(f"  {text}" for text in faults)))
    if not translate.is_foreign(written) and METHOD not in written:
        raise ValueError(f"{path}: {suggestions.all_of([name for name in written if name not in options], options)}{hint}")
    method = method_of(written, path)
    apart = {name: value for name, value in written.items() if name in APART.get(command, ()) and value.value is not None}
    rest = {name: value for name, value in written.items() if name not in apart}
    run = _own(rest, path, method, table.options(METHODS[method].config), hint)
    run = run._replace(values=run.values | reading.from_written(apart, options, path))
    return _for_command(run, command, method, options, written, path)


def _own(written: Mapping[str, Written], path: str, command: str, options: Mapping[str, Option], hint: str) -> RunFile:
    if translate.is_foreign(written):
        meant = translate.translate(written, command, options, path)
        lines = [*meant.notes]
        lines += [f"in our names: {'; '.join(meant.read)}"] if meant.read else []
        lines += [f"needs nothing here: {', '.join(meant.needless)}"] if meant.needless else []
        lines += [f"not for treetune {command}: {', '.join(meant.left)}"] if meant.left else []
        head = f"{path}: axolotl's keys, read as treetune {command}"
        return RunFile(meant.values, (head, *(f"  {line}" for line in lines)), True)
    if METHOD in written and METHOD not in options:
        named = yamlvalues.plain(written[METHOD])
        if command in METHODS and named != command:
            raise ValueError(f"{path} is a file of treetune {named}: start it with treetune train, or take out its line method")
        written = {name: value for name, value in written.items() if name != METHOD}
    return RunFile(reading.from_written(written, options, path, hint=hint))


def _for_command(
    run: RunFile, command: str, method: str, options: Mapping[str, Option], written: Mapping[str, Written], path: str
) -> RunFile:
    """What a command that does not train takes of a run's file."""
    kept = {name: value for name, value in run.values.items() if name in options and name in (*TAKEN[command], *APART.get(command, ()))}
    if command == "serve" and "vllm" in written:
        section = written["vllm"].value or {}
        kept |= reading.from_written({name: value for name, value in section.items() if name in options}, options, f"{path}: vllm")
    if command == "preprocess":
        kept["method"] = ROWS_OF.get(method, "sft")
    if "adapter" in options:
        kept |= _result(run.values, command)
    named = ", ".join(f"{name} {kept[name]}" for name in ("adapter", "model", "output") if name in kept)
    return RunFile(kept, (f"{path}: a file of treetune {method}; taken from it: {named or ', '.join(kept) or 'nothing'}",), run.foreign)


def _result(values: Mapping[str, Any], command: str) -> dict[str, Any]:
    """The model or the adapter that the run of a file left in its folder, where it has; else what it started from."""
    folder = values.get("output_dir")
    adapted = values.get("adapter", "lora") != "none"
    if folder is not None and command == "merge":
        return {"adapter": folder, "output": str(Path(folder) / "merged")}
    if folder is not None and adapted and (Path(folder) / "adapter").is_dir():
        return {"adapter": folder}
    if folder is not None and (Path(folder) / "model").is_dir():
        return {"model": folder}
    start = values.get("lora_model_dir")
    return {} if start is None else {"adapter": start}
