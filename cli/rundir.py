"""The folder of a run: where it is, what may be in it, and what a resumed run starts from."""

import json
import os
import re
import shutil
from pathlib import Path
from typing import NamedTuple

from treetune.cli.options import RunOptions
from treetune.core import ckpt


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

    Raises ValueError when there is nothing to resume, or when the folder already holds a run and may not be replaced.
    """
    if options.resume not in (None, "auto"):
        path = Path(options.resume)
        ckpt.read_meta(path)
        root = Path(options.output_dir) if options.output_dir else path.resolve().parent.parent
        return RunDir(root, path)
    old = _numbered(command)
    if options.resume == "auto":
        root = Path(options.output_dir) if options.output_dir else (old[-1] if old else Path("runs") / f"{command}-001")
        found = ckpt.steps(root / "checkpoints")
        return RunDir(root, found[-1] if found else None)
    number = int(old[-1].name.split("-")[-1]) + 1 if old else 1
    root = Path(options.output_dir) if options.output_dir else Path("runs") / f"{command}-{number:03d}"
    if root.exists() and any(root.iterdir()) and not options.overwrite:
        raise ValueError(f"{root} already holds files; continue it with --resume auto, replace it with --overwrite, or name another folder")
    return RunDir(root, None)


def create(run: RunDir, config: str, *, overwrite: bool) -> None:
    """Make the folder and write the resolved config; an old run is deleted only when that was asked for."""
    if run.resume is None and overwrite and run.root.exists():
        if not (run.root / "config.yaml").exists():
            raise ValueError(f"{run.root} was not made by treetune (it has no config.yaml); not deleting it")
        shutil.rmtree(run.root)
    run.checkpoints.mkdir(parents=True, exist_ok=True)
    write(run.root / "config.yaml", config)


def write(path: Path, text: str) -> None:
    """Write a small file in one piece: it is either the old or the new one at any moment."""
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    draft.write_text(text)
    os.replace(draft, path)


def append(path: Path, record: dict) -> None:
    """Append one JSON object as a line."""
    with open(path, "a") as file:
        file.write(json.dumps(record, ensure_ascii=False) + "\n")
