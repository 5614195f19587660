"""Outputs that exist already: what may be written over is what treetune made, and never what the command reads. Imports no torch."""

import glob
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from treetune.core import drafts, owned
from treetune.core.run import marker

NAMED = 3  # foreign files that a message names
Inputs = Iterable[tuple[str, Path]]  # (flag, path) of what a run reads


def check_run(root: Path, read: Callable[[], Inputs], *, overwrite: bool, resumes: bool) -> None:
    """Raise ValueError where a folder that a run asks for cannot be one, or may not be overwritten."""
    if os.path.lexists(root) and not root.is_dir():
        raise ValueError(f"output_dir {root} is a {'link that leads nowhere' if root.is_symlink() else 'file'}; expected a folder")
    if overwrite and marker.holds_files(root) and not any(one.kind == marker.PREVIOUS for one in drafts.inside(root)):
        check_overwrite(root, read())
    if resumes:
        check_results(root, read())


def check_results(root: Path, read: Inputs) -> None:
    """Raise ValueError where a run that is continued reads what its result would replace."""
    for option, path in read:
        for name in marker.RESULTS:
            if path.resolve().is_relative_to(root.resolve() / name):
                raise ValueError(f"{root / name} would be replaced by the run, which reads {path} ({option}): move that away")


def check_overwrite(root: Path, read: Inputs) -> None:
    """Raise ValueError unless a folder is a run's, holds nothing else and nothing that is read, and is not one that must stay."""
    name = f"{root} is not overwritten"
    if root.is_symlink():
        raise ValueError(f"{name}: it is a link; name {root.resolve()} itself")
    if (protected := _must_stay(root)) is not None:
        raise ValueError(f"{name}: it is {protected}; name a folder of its own for the run")
    run_marker = marker.read(root)
    if run_marker is None:
        raise ValueError(f"{name}: it was not made by treetune (it has no {marker.NAME}); name another folder")
    for option, path in read:
        if path.resolve().is_relative_to(root.resolve()):
            raise ValueError(f"{name}: it holds {path}, which the run reads ({option}); move that away, or name another folder")
    if others := marker.foreign(root, run_marker):
        more = f" and {len(others) - NAMED} more" if len(others) > NAMED else ""
        raise ValueError(f"{name}: no run made {', '.join(map(str, others[:NAMED]))}{more}; move that away, or name another folder")


def check_restart(root: Path, read: Inputs) -> None:
    """Raise ValueError where a run without a checkpoint cannot begin anew: what it made, which goes, holds what is not its own."""
    old = marker.read(root)
    assert old is not None
    going = [root / name for name in marker.names(old)]
    places = [root.resolve(), *(one.resolve() for one in going)]
    reads = [path for _, path in read if path.resolve() == places[0] or any(path.resolve().is_relative_to(one) for one in places[1:])]
    others = [path for path in marker.foreign(root, old) if any(path.is_relative_to(one) for one in going)]
    if reads or others:
        what = f"no run made {others[0]}" if others else f"it holds {reads[0]}, which the run reads"
        raise ValueError(f"{root} has no checkpoint to resume, and does not begin anew: {what}; move that away, or name another folder")


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


def inputs(read: Iterable[tuple[str, str]]) -> Iterator[tuple[str, Path]]:
    """(flag, path) of what these texts name on this machine, with links inside, and of the base models that adapters name."""
    for flag, text in read:
        if (path := _existing(text)) is not None:
            yield flag, path
            yield from ((f"the base of {flag}", base) for base in _bases(path))
            yield from ((flag, link) for link in _links(path, text))


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


def require_new_file(name: str, flag: str) -> None:
    """Raise ValueError where there is anything at the path of an output, a link that leads nowhere among it."""
    if os.path.lexists(name):
        raise ValueError(f"{name} exists: give {flag} another name, or remove it")


def require_new_folder(name: str, flag: str) -> None:
    """Raise ValueError where there is anything at the path of an output, which is the only one of its command."""
    if os.path.lexists(name):
        raise ValueError(f"{name} exists: name a folder that does not")


def require_page(name: str, flag: str) -> None:
    """Raise ValueError where there is anything but a page of ours, or the page of a run."""
    require_own(Path(name), owned.PAGE, flag)
    if marker.marked(Path(name).parent) and Path(name).name in marker.FILES:
        raise ValueError(f"{name} belongs to a run: give {flag} another name")


def require_log(name: str, flag: str) -> None:
    """Raise ValueError where there is anything but a log of ours."""
    require_own(Path(name), owned.LOG, flag)


def require_own(path: Path, beginning: str, option: str) -> None:
    """Raise ValueError where there is anything but a file of ours, which begins so."""
    if not os.path.lexists(path):
        return
    ours = False
    if path.is_file() and not path.is_symlink():
        with open(path, "rb") as file:
            ours = file.read(len(beginning)) == beginning.encode()
    if not ours:
        raise ValueError(f"{path} exists and treetune did not write it: give {option} another name, or remove it")
