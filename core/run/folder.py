"""The folder of a run: where it is, who has it, what may be in it, and what a resumed run starts from.

One process has a run folder at a time (`hold`). A run that is overwritten steps aside into a draft inside the folder and goes once the new
one has made its first step (`settle`); until then a failure, or the next process after a crash, puts it back.
"""

import contextlib
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from treetune.core import ckpt, drafts, durable, lock, owned, records
from treetune.core.run import guard, marker, resumable

RUNS = Path("runs")


class RunDir(NamedTuple):
    """Paths of a run, the checkpoint that it resumes from (None for a new run), and what there is to say about the choice."""

    root: Path
    resume: Path | None
    notes: tuple[str, ...] = ()

    @property
    def checkpoints(self) -> Path:
        """Folder of the checkpoints."""
        return self.root / "checkpoints"

    @property
    def metrics(self) -> Path:
        """One JSON object per step or evaluation."""
        return self.root / "metrics.jsonl"

    @property
    def samples(self) -> Path:
        """One JSON object per sampled answer."""
        return self.root / "samples.jsonl"


class Request(NamedTuple):
    """Which folder a run asks for.

    name: of the method; without an output_dir the run gets the next free runs/NAME-NNN. resume: "auto" or the path of a checkpoint.
    read() -> (flag, path) of what the run reads, which may not lie in what it replaces.
    """

    name: str
    output_dir: str | None = None
    resume: str | None = None
    overwrite: bool = False
    read: Callable[[], guard.Inputs] = tuple


def alone(take: Callable[[], RunDir]) -> RunDir:
    """`share` of a process that is the only one."""
    return take()


@contextlib.contextmanager
def hold(request: Request, *, share: Callable[[Callable[[], RunDir]], RunDir] = alone) -> Iterator[RunDir]:
    """The run folder of a request, made if need be and held against other processes; left as it was unless `create` is called.

    share(take) calls `take` on one rank and gives all ranks what it returns or raises. Raises ValueError when there is no such checkpoint,
    when the folder holds files that may not be replaced, and when another process has it, with its host and number.
    """
    with contextlib.ExitStack() as stack:
        yield share(lambda: _take(request, stack))


def _take(request: Request, stack: contextlib.ExitStack) -> RunDir:
    root = _root(request)
    if root is None:
        root = _next(request.name, stack)
    elif _sound(root):
        lock.check(root)
        _choose(root, request)
    _make(root, stack)
    stack.callback(lock.Lock(root).release)
    _recover(root)
    run = _choose(root, request)
    stack.callback(_put_back, root)
    return run


def _root(request: Request) -> Path | None:
    """The folder that the request names, or None for the next free one."""
    if request.output_dir:
        return Path(request.output_dir)
    if request.resume == "auto":
        old = _numbered(request.name)
        return old[-1] if old else RUNS / f"{request.name}-001"
    if request.resume is not None:
        resumable.require(Path(request.resume))
        return _shorter(Path(request.resume).resolve().parent.parent)
    return None


def _shorter(path: Path) -> Path:
    """The path as seen from the working folder, if it is below it."""
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) and path != Path.cwd() else path


def _numbered(name: str) -> list[Path]:
    candidates = RUNS.glob(f"{name}-*") if RUNS.is_dir() else []
    return sorted(
        (path for path in candidates if re.fullmatch(rf"{name}-[0-9]+", path.name)), key=lambda path: int(path.name.split("-")[-1])
    )


def _next(name: str, stack: contextlib.ExitStack) -> Path:
    """The next free folder, which this process makes: of several at once, each gets another."""
    if os.path.lexists(RUNS) and not RUNS.is_dir():
        raise ValueError(f"{RUNS} is a file; expected a folder of runs: move it away, or give --output-dir")
    _make(RUNS, stack)
    old = _numbered(name)
    number = int(old[-1].name.split("-")[-1]) + 1 if old else 1
    while True:
        root = RUNS / f"{name}-{number:03d}"
        try:
            root.mkdir()
        except FileExistsError:
            number += 1
            continue
        stack.callback(_unmake, root)
        return root


def _make(path: Path, stack: contextlib.ExitStack) -> None:
    """Make a folder and its parents; those that are still empty at the end go again."""
    for folder in reversed([path, *path.parents]):
        with contextlib.suppress(FileExistsError):
            folder.mkdir()
            stack.callback(_unmake, folder)


def _unmake(folder: Path) -> None:
    with contextlib.suppress(OSError):
        folder.rmdir()


def _sound(root: Path) -> bool:
    """Whether a folder is not in the middle of being overwritten, so that it can be judged before it is held."""
    return not any(one.kind == marker.PREVIOUS for one in drafts.inside(root))


def _choose(root: Path, request: Request) -> RunDir:
    """What to do in a folder. Raises ValueError where it holds files that the request does not cover."""
    if request.output_dir is not None:
        guard.check_run(root, request.read, overwrite=request.overwrite, resumes=request.resume is not None)
    if folders := [name for name in marker.FILES if (root / name).is_dir()]:
        raise ValueError(f"{root / folders[0]} is a folder, and a run writes a file of that name: move it away, or name another folder")
    if request.resume not in (None, "auto"):
        return _from_checkpoint(Path(request.resume), root)
    if request.resume == "auto":
        return _newest(root, request)
    if not request.overwrite and marker.holds_files(root) and marker.read(root) is None:
        raise ValueError(f"{root} already holds files that no run made; name another folder")
    if not request.overwrite and marker.holds_files(root):
        raise ValueError(f"{root} already holds files; continue it with --resume auto, replace it with --overwrite, or name another folder")
    return RunDir(root, None)


def _newest(root: Path, request: Request) -> RunDir:
    """Continue from the newest sound checkpoint of a run, or begin where there is none."""
    run_marker = marker.read(root) if marker.holds_files(root) else marker.Marker("", ())
    if run_marker is None:
        raise ValueError(f"{root} holds files and no run to resume (it has no {marker.NAME}); name another folder")
    run = RunDir(root, *resumable.newest(root / "checkpoints"))
    others = [root / name for name in marker.RESULTS if name not in run_marker.makes and os.path.lexists(root / name)]
    if run.resume is None and others:
        raise ValueError(f"{root} holds no checkpoint to resume and {others[0]}, which no run made; name another folder")
    if run.resume is None and marker.holds_files(root):
        guard.check_restart(root, request.read())
    return run


def _from_checkpoint(path: Path, root: Path) -> RunDir:
    """Continue from a named checkpoint, in the run that it belongs to or in a new folder."""
    notes = resumable.require(path)
    home = path.resolve().parent.parent
    if root.resolve() != home and marker.holds_files(root):
        raise ValueError(f"{root} already holds files and {path} is not of that run; name another --output-dir, or leave it out")
    if root.resolve() == home and (path.resolve().parent.name != "checkpoints" or marker.read(home) is None):
        raise ValueError(f"{path} does not lie in a run folder; give --output-dir")
    return RunDir(root, path, notes)


def create(run: RunDir, config: str, *, makes: tuple[str, ...]) -> None:
    """Mark the folder as that of a run, which makes these of `marker.RESULTS`, and write the resolved config.

    A run that was there and is not resumed steps aside.
    """
    old = marker.read(run.root)
    if old is not None and run.resume is None:
        _set_aside(run.root, old)
        old = None
    if old is None or old.run == "":  # new, or of a version before
        marker.write(run.root, marker.new(makes))
    write(run.root / "config.yaml", config)
    run.checkpoints.mkdir(exist_ok=True)


def _set_aside(root: Path, old: marker.Marker) -> None:
    """Move what a run made into a draft inside its folder, the marker first: see `_bring_back` for what a crash leaves."""
    aside = drafts.name(root / "run", marker.PREVIOUS)
    aside.mkdir()
    for name in marker.names(old):
        if os.path.lexists(root / name):
            os.rename(root / name, aside / name)


def settle(run: RunDir) -> None:
    """Delete the run that stepped aside: the new one has begun well."""
    for one in _previous(run.root):
        gone = drafts.name(run.root / "run", drafts.GONE)
        os.rename(one.path, gone)
        drafts.delete(gone)


def _previous(root: Path) -> list[drafts.Draft]:
    return [one for one in drafts.inside(root) if one.kind == marker.PREVIOUS]


def _put_back(root: Path) -> None:
    """Put back a run that stepped aside for one that did not begin."""
    for one in _previous(root):
        _bring_back(root, one.path)


def _bring_back(root: Path, aside: Path) -> None:
    """Delete what the new run made and give the old one its names; may be called again after a crash at any moment.

    A marker in the folder is the new run's: the old one leaves first and comes back last. Without a marker, all there is the old run's.
    """
    if any(aside.iterdir()):
        new = marker.read(root) if marker.marked(root) else None
        for name in reversed(marker.names(new)) if new is not None else ():
            _clear(root / name)
        for path in sorted(aside.iterdir(), key=lambda path: path.name == marker.NAME):
            _merge(path, root / path.name)
    with contextlib.suppress(OSError):
        aside.rmdir()


def _clear(path: Path) -> None:
    """Delete one of the names that a run makes."""
    if path.is_symlink() or not path.is_dir():
        path.unlink(missing_ok=True)
    elif path.name in ("checkpoints", "engine"):
        for inner in path.iterdir():
            owned.remove(inner, owned.CHECKPOINT if path.name == "checkpoints" else owned.MODEL)
        _unmake(path)
    else:
        owned.remove(path, owned.EVENTS if path.name == marker.TENSORBOARD else owned.MODEL)


def _merge(source: Path, target: Path) -> None:
    """Rename, into a folder of that name where something foreign kept one."""
    if source.is_dir() and target.is_dir():
        for path in source.iterdir():
            _merge(path, target / path.name)
        source.rmdir()
    else:
        os.rename(source, target)


def _recover(root: Path) -> None:
    """Undo what a killed process left half done in a folder that this one holds, and delete its drafts."""
    _put_back(root)
    ckpt.recover(root / "checkpoints")
    for folder in (root, root / "engine"):
        owned.restore(folder, owned.MODEL, locked=True)
        for one in drafts.inside(folder):
            locked = one.name in (marker.NAME, *marker.FILES, *marker.RESULTS, "run") or folder != root
            if one.kind != marker.PREVIOUS and drafts.abandoned(one, locked=locked):
                drafts.delete(one.path)


def leave(path: Path, save: Callable[[Path], None]) -> None:
    """Write a result of a run, which gets its name, in place of an earlier one, once it is whole; save(draft) writes the folder."""
    draft = drafts.name(path)
    try:
        save(draft)
        owned.replace(draft, path, owned.MODEL)
        durable.fsync(path.parent)
    finally:
        drafts.delete(draft)


def rewind(run: RunDir, step: int) -> tuple[list[dict], list[str]]:
    """Forget what the run did after `step`: records, sample answers, checkpoints. Returns the records up to there, and what was broken."""
    broken = []
    if run.samples.exists():  # a sample answer at `step` was the ending, which comes again; the evaluation there does not
        samples = records.truncate(run.samples, step, keep=lambda record: "rewards" in record or "row" in record)
        broken += [records.describe(run.samples, samples.broken)] if samples.broken else []
    for later in ckpt.numbered(run.checkpoints):
        if int(later.name.removeprefix("step_")) > step:
            ckpt.remove(later)
    metrics = records.truncate(run.metrics, step, numbers=True)
    return metrics.records, broken + ([records.describe(run.metrics, metrics.broken)] if metrics.broken else [])


def write(path: Path, text: str) -> None:
    """Write a small file in one piece: it is either the old or the new one at any moment."""
    drafts.write(path, text)


def write_new(path: Path, text: str) -> Path:
    """Write a file where there is none; one that has appeared meanwhile stays, and this one gets the next free name. The path written."""
    path.parent.mkdir(parents=True, exist_ok=True)
    drafts.sweep(path.parent)
    draft = drafts.name(path)
    try:
        drafts.write(draft, text)
        return _link(draft, path)
    finally:
        draft.unlink(missing_ok=True)


def _link(draft: Path, path: Path) -> Path:
    """A second name for a draft: `path`, or one with a number, never that of another file."""
    number, target = 1, path
    while True:
        try:
            os.link(draft, target)
            return target
        except FileExistsError:
            number += 1
            target = path.with_name(f"{path.stem}-{number}{path.suffix}")
        except OSError:  # a file system without links
            if not os.path.lexists(target):
                os.rename(draft, target)
                return target
            number += 1
            target = path.with_name(f"{path.stem}-{number}{path.suffix}")
