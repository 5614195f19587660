"""What a command may write over: only what treetune made, and never a folder that holds what the command reads. Imports no torch."""

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from treetune.cli.errors import BadInput
from treetune.cli.options.commands import Merge, Preprocess, Rollout, Score
from treetune.cli.options.serve import Serve
from treetune.core import drafts, lock, owned
from treetune.core.config import table
from treetune.core.rollout import builtin
from treetune.core.run import guard, marker

# Options of runs that name files and folders to read; of mappings in `datasets`, these fields.
PLACES = ("model", "from_config", "ref_model", "lora_model_dir", "data", "val_data", "datasets", "test_datasets", "dataset_prepared_path",
          "vllm_python", "resume", "chat_template")  # fmt: skip
FUNCTIONS = ("format", "prompt_transform", "rollout_func", "reward_funcs")  # file.py:function?options, or a folder
FIELDS = ("path", "data_files", "type", "chat_template")
PAGE = owned.PAGE
LOG = "# treetune: output of a vLLM server\n"


def check(config: Any, config_file: str | None) -> None:
    """Raise BadInput, before anything is read or written, for an output that would replace what treetune did not make."""
    if hasattr(config, "run"):
        if config.run.output_dir is not None:
            lock.check(Path(config.run.output_dir))
        check_run(config, config_file)
    if isinstance(config, Merge):
        guard.require_free(config.output, "folder")
    if isinstance(config, Rollout | Score) and config.output is not None:
        guard.require_free(config.output, "file")
    if isinstance(config, Preprocess) and config.html is not None:
        guard.require_own(Path(config.html), PAGE, "--html")
        if marker.marked(Path(config.html).parent) and Path(config.html).name in marker.FILES:
            raise BadInput(f"{config.html} belongs to a run: give --html another name")
    if isinstance(config, Serve) and config.log is not None:
        guard.require_own(Path(config.log), LOG, "--log")


def check_run(config: Any, config_file: str | None = None) -> None:
    """Raise BadInput where the run folder that the options name cannot be one, or may not be overwritten."""
    options = config.run
    if options.output_dir is None:
        return
    root = Path(options.output_dir)
    if os.path.lexists(root) and not root.is_dir():
        raise BadInput(f"output_dir {root} is a {'link that leads nowhere' if root.is_symlink() else 'file'}; expected a folder")
    if options.overwrite and marker.holds_files(root) and not any(one.kind == marker.PREVIOUS for one in drafts.inside(root)):
        guard.check_overwrite(root, list(inputs(config, config_file)))
    if options.resume is not None:
        guard.check_results(root, inputs(config, config_file))


def inputs(config: Any, config_file: str | None = None) -> Iterator[tuple[str, Path]]:
    """(option, path) of everything on this machine that a run reads, and of the base models that its adapters name."""
    values = table.flatten(config)
    named = [(option, text) for option in PLACES for text in _texts(values.get(option))]
    doors = [name for name, option in table.options(type(config)).items() if option.door is not None]
    functions = [(option, text) for option in (*FUNCTIONS, *doors) for text in map(_file, _texts(values.get(option)))]
    named += [(option, text) for option, text in functions if text not in builtin.BUILTIN]
    if config_file is not None:
        named.append(("config", config_file))
    for option, text in named:
        flag = f"--{option.replace('_', '-')}"
        path = None if "{" in text and option == "chat_template" else guard.existing(text)
        if path is not None:
            yield flag, path
            yield from ((f"the base of {flag}", base) for base in guard.bases(path))
            yield from ((flag, link) for link in guard.links(path, text))


def _texts(value: Any) -> Iterator[str]:
    """The texts in an option's value."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for field in FIELDS:
            yield from map(_file, _texts(value.get(field)))
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _texts(item)


def _file(text: str) -> str:
    """The file of a function's name."""
    text = text.partition("?")[0]
    return text.rpartition(":")[0] if re.search(r"\.py:\w+$", text) else text


def check_restart(root: Path, config: Any) -> None:
    """Errors: ValueError where a run without a checkpoint cannot begin anew in a folder."""
    guard.check_restart(root, [path for _, path in inputs(config)])
