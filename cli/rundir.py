"""The folder of a run: where it is, what may be in it, and what a resumed run starts from."""

import json
import os
import re
import shutil
from pathlib import Path
from typing import NamedTuple

from treetune.cli.options import RunOptions
from treetune.core import ckpt, observe


class RunDir(NamedTuple):
    """Paths of a run, and the checkpoint that it resumes from (None for a new run)."""

    root: Path
    resume: Path | None

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


def _numbered(command: str) -> list[Path]:
    found = Path("runs").glob(f"{command}-*") if Path("runs").is_dir() else []
    return sorted((path for path in found if re.fullmatch(rf"{command}-\d+", path.name)), key=lambda path: int(path.name.split("-")[-1]))


def choose(command: str, options: RunOptions) -> RunDir:
    """The run folder for these options; nothing is written yet.

    Raises ValueError when there is no such checkpoint, or when the folder already holds files that may not be replaced.
    """
    if options.resume not in (None, "auto"):
        return _from_checkpoint(Path(options.resume), options)
    old = _numbered(command)
    if options.resume == "auto":
        root = Path(options.output_dir) if options.output_dir else (old[-1] if old else Path("runs") / f"{command}-001")
        found = ckpt.steps(root / "checkpoints")
        if not found and _holds_files(root) and not _is_run(root):
            raise ValueError(f"{root} holds files and no run to resume; name another folder")
        return RunDir(root, found[-1] if found else None)
    number = int(old[-1].name.split("-")[-1]) + 1 if old else 1
    root = Path(options.output_dir) if options.output_dir else Path("runs") / f"{command}-{number:03d}"
    if options.overwrite and _holds_files(root) and not _is_run(root):
        raise ValueError(f"{root} was not made by treetune (it has no config.yaml); not deleting it")
    if not options.overwrite and _holds_files(root):
        raise ValueError(f"{root} already holds files; continue it with --resume auto, replace it with --overwrite, or name another folder")
    return RunDir(root, None)


def _from_checkpoint(path: Path, options: RunOptions) -> RunDir:
    """Continue from a named checkpoint, in the run that it belongs to or in a new folder."""
    ckpt.read_meta(path)
    home = path.resolve().parent.parent
    root = Path(options.output_dir) if options.output_dir else home
    if root.resolve() != home and _holds_files(root):
        raise ValueError(f"{root} already holds files and {path} is not of that run; name another --output-dir, or leave it out")
    if root == home and not _is_run(home):
        raise ValueError(f"{path} does not lie in a run folder; give --output-dir")
    return RunDir(root, path)


def _holds_files(root: Path) -> bool:
    return root.exists() and any(root.iterdir())


def _is_run(root: Path) -> bool:
    return (root / "config.yaml").exists()


def create(run: RunDir, config: str, *, overwrite: bool) -> None:
    """Make the folder and write the resolved config; an old run is deleted only when that was asked for."""
    if run.resume is None and overwrite and run.root.exists():
        shutil.rmtree(run.root)
    run.root.mkdir(parents=True, exist_ok=True)
    write(run.root / "config.yaml", config)
    run.checkpoints.mkdir(exist_ok=True)
    if run.resume is None:  # a run that died before its first checkpoint may have left some
        run.metrics.unlink(missing_ok=True)
        run.samples.unlink(missing_ok=True)


def rewind(run: RunDir, step: int) -> list[dict]:
    """Forget what the run did after `step`: records, sample answers, checkpoints. Returns the records up to there."""
    if run.samples.exists():
        observe.truncate(
            run.samples, step, keep=lambda record: "rewards" in record
        )  # an answer at `step` was the ending, which comes again
    for later in ckpt.steps(run.checkpoints):
        if int(later.name.removeprefix("step_")) > step:
            shutil.rmtree(later)
    best = run.root / "best.json"
    if best.exists() and not (run.checkpoints / json.loads(best.read_text())["checkpoint"]).exists():
        best.unlink()
    return observe.truncate(run.metrics, step)


def write(path: Path, text: str) -> None:
    """Write a small file in one piece: it is either the old or the new one at any moment."""
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    draft.write_text(text, encoding="utf-8")
    os.replace(draft, path)


def append(path: Path, record: dict) -> None:
    """Append one JSON object as a line."""
    with open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps(record, ensure_ascii=False) + "\n")
