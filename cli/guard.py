"""What a command may write over: only what treetune made, and never a folder that holds what the command reads. Imports no torch."""

import glob
import json
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from treetune.cli import parse
from treetune.cli.errors import BadInput
from treetune.cli.options import table
from treetune.cli.options.commands import Merge, Preprocess, Rollout, Score
from treetune.cli.options.serve import Serve
from treetune.core import drafts, lock, owned
from treetune.core.rollout import builtin
from treetune.core.run import marker

# Options of runs that name files and folders to read; of mappings in `datasets`, these fields.
PLACES = ("model", "from_config", "ref_model", "lora_model_dir", "data", "val_data", "datasets", "test_datasets", "dataset_prepared_path",
          "vllm_python", "resume", "chat_template")  # fmt: skip
FUNCTIONS = ("format", "prompt_transform", "rollout_func", "reward_funcs")  # file.py:function?options, or a folder
FIELDS = ("path", "data_files", "type", "chat_template")
PAGE = owned.PAGE
LOG = "# treetune: output of a vLLM server\n"
NAMED = 3  # foreign files that a message names


def check(config: Any, config_file: str | None) -> None:
    """Raise BadInput, before anything is read or written, for an output that would replace what treetune did not make."""
    if hasattr(config, "run"):
        if config.run.output_dir is not None:
            lock.check(Path(config.run.output_dir))
        check_run(config, config_file)
    if isinstance(config, Merge):
        require_free(config.output, "folder")
    if isinstance(config, Rollout | Score) and config.output is not None:
        require_free(config.output, "file")
    if isinstance(config, Preprocess) and config.html is not None:
        require_own(Path(config.html), PAGE, "--html")
        if marker.marked(Path(config.html).parent) and Path(config.html).name in marker.FILES:
            raise BadInput(f"{config.html} belongs to a run: give --html another name")
    if isinstance(config, Serve) and config.log is not None:
        require_own(Path(config.log), LOG, "--log")


def check_run(config: Any, config_file: str | None = None) -> None:
    """Raise BadInput where the run folder that the options name cannot be one, or may not be overwritten."""
    options = config.run
    if options.output_dir is None:
        return
    root = Path(options.output_dir)
    if os.path.lexists(root) and not root.is_dir():
        raise BadInput(f"output_dir {root} is a {'link that leads nowhere' if root.is_symlink() else 'file'}; expected a folder")
    if options.overwrite and marker.holds_files(root) and not any(one.kind == marker.PREVIOUS for one in drafts.inside(root)):
        check_overwrite(root, list(inputs(config, config_file)))
    if options.resume is not None:
        check_results(root, inputs(config, config_file))


def check_results(root: Path, read: Iterable[tuple[str, Path]]) -> None:
    """Raise BadInput where a run that is continued reads what its result would replace; `read` is as of `inputs`."""
    for option, path in read:
        for name in marker.RESULTS:
            if path.resolve().is_relative_to(root.resolve() / name):
                raise BadInput(f"{root / name} would be replaced by the run, which reads {path} ({option}): move that away")


def check_overwrite(root: Path, read: list[tuple[str, Path]]) -> None:
    """Raise BadInput unless a folder is a run's, holds nothing else, and is not one that must stay; `read` is as of `inputs`."""
    name = f"{root} is not overwritten"
    if root.is_symlink():
        raise BadInput(f"{name}: it is a link; name {root.resolve()} itself")
    if (kept := _must_stay(root)) is not None:
        raise BadInput(f"{name}: it is {kept}; name a folder of its own for the run")
    found = marker.read(root)
    if found is None:
        raise BadInput(f"{name}: it was not made by treetune (it has no {marker.NAME}); name another folder")
    for option, path in read:
        if path.resolve().is_relative_to(root.resolve()):
            raise BadInput(f"{name}: it holds {path}, which the run reads ({option}); move that away, or name another folder")
    if others := marker.foreign(root, found):
        more = f" and {len(others) - NAMED} more" if len(others) > NAMED else ""
        raise BadInput(f"{name}: no run made {', '.join(map(str, others[:NAMED]))}{more}; move that away, or name another folder")


def check_anew(root: Path, config: Any) -> None:
    """Raise BadInput where a run without a checkpoint cannot begin anew: what it made, which goes, holds what others made, or an input."""
    old = marker.read(root)
    going = [root / name for name in marker.names(old)]
    places = [root.resolve(), *(one.resolve() for one in going)]
    reads = [
        path for _, path in inputs(config) if path.resolve() == places[0] or any(path.resolve().is_relative_to(one) for one in places[1:])
    ]
    others = [path for path in marker.foreign(root, old) if any(path.is_relative_to(one) for one in going)]
    if reads or others:
        what = f"no run made {others[0]}" if others else f"it holds {reads[0]}, which the run reads"
        raise BadInput(f"{root} has no checkpoint to resume, and does not begin anew: {what}; move that away, or name another folder")


def _must_stay(root: Path) -> str | None:
    """What a folder is that no run may replace, in words; compared by device and number, so that another name does not help."""
    for what, folder in (("the working folder", Path.cwd()), ("the home folder", _home())):
        for path in (folder, *folder.parents):
            if path.exists() and os.path.samefile(path, root):
                return what if path == folder else f"a parent of {what}"
    return None


def _home() -> Path:
    try:
        return Path.home()
    except RuntimeError:  # nobody's
        return Path("/")


def inputs(config: Any, config_file: str | None = None) -> Iterator[tuple[str, Path]]:
    """(option, path) of everything on this machine that a run reads, and of the base models that its adapters name."""
    values = parse.flatten(config)
    named = [(option, text) for option in PLACES for text in _texts(values.get(option))]
    doors = [name for name, option in table.options(type(config)).items() if option.door is not None]
    functions = [(option, text) for option in (*FUNCTIONS, *doors) for text in map(_file, _texts(values.get(option)))]
    named += [(option, text) for option, text in functions if text not in builtin.BUILTIN]
    if config_file is not None:
        named.append(("config", config_file))
    for option, text in named:
        flag = f"--{option.replace('_', '-')}"
        path = None if "{" in text and option == "chat_template" else _existing(text)
        if path is not None:
            yield flag, path
            yield from ((f"the base of {flag}", base) for base in _bases(path))
            yield from ((flag, link) for link in _links(path, text))


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


def _existing(text: str) -> Path | None:
    """The file or folder that a text names; of a pattern, the folder that it begins with."""
    fixed = re.split(r"[*?\[]", text)[0]
    if fixed != text:
        fixed = os.path.dirname(fixed) or "."
    path = os.path.expanduser(fixed)
    return Path(path) if fixed and os.path.exists(path) else None


def _links(path: Path, text: str) -> Iterator[Path]:
    """What matches a pattern, and links below a folder: they may lead anywhere."""
    if re.search(r"[*?\[]", text):
        yield from map(Path, glob.iglob(os.path.expanduser(text), recursive=True))
    elif path.is_dir():
        for folder, inner, names in os.walk(path):
            yield from (link for name in (*inner, *names) if (link := Path(folder, name)).is_symlink())


def _bases(path: Path) -> Iterator[Path]:
    """The base models on this machine that an adapter folder, or a run folder with one, names."""
    for file in (path / "adapter_config.json", path / "adapter" / "adapter_config.json"):
        try:
            base = json.loads(file.read_text(encoding="utf-8")).get("base_model_name_or_path")
        except (OSError, ValueError, AttributeError, RecursionError):
            continue
        if isinstance(base, str) and os.path.exists(base):
            yield Path(base)


def require_free(path: str | Path, what: str) -> None:
    """Raise BadInput where there is anything at the path of an output, a link that leads nowhere among it."""
    if os.path.lexists(path):
        fix = "give --output another name, or remove it" if what == "file" else "name a folder that does not"
        raise BadInput(f"{path} exists: {fix}")


def require_own(path: Path, beginning: str, option: str) -> None:
    """Raise BadInput where there is anything but a file of ours, which begins so."""
    if not os.path.lexists(path):
        return
    own = False
    if path.is_file() and not path.is_symlink():
        with open(path, "rb") as file:
            own = file.read(len(beginning)) == beginning.encode()
    if not own:
        raise BadInput(f"{path} exists and treetune did not write it: give {option} another name, or remove it")
