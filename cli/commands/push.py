"""`treetune push`: what a run has left, or a merged model, to a repository of the Hugging Face hub, with its card."""

import tempfile
from pathlib import Path

from treetune.cli.options.commands import Push
from treetune.cli.screen import Screen
from treetune.core import hub_repos, manifest
from treetune.core.hub_repos import Repo, Unsent
from treetune.core.run import cards, uploads
from treetune.core.run.errors import RunFailed, checking_input

WEIGHTS = "adapter_model.safetensors"
RESULTS = {"adapter": "adapter_config.json", "model": "config.json"}  # folders in a run folder, and what tells what they are


def run(config: Push, given: frozenset[str]) -> int:
    """Check, make the repository, upload; the exit code."""
    screen = Screen()
    with checking_input():
        folder = result_folder(Path(config.path).expanduser())
        if config.merged is not None:
            folder = _merged(Path(config.merged).expanduser(), folder)
        manifest.check(folder)
        repo = hub_repos.prepare(Repo(config.repo, config.revision, config.private), "REPO")
        with tempfile.TemporaryDirectory(prefix="treetune-push-") as made:
            stage = Path(made) / "files"
            uploads.stage_result(folder, stage, repo.id, soft=True)
            screen.line(f"uploading {folder} to {hub_repos.address(repo)}")
            try:
                address = hub_repos.upload(repo, stage, f"Upload {folder.name}")
            except Unsent as error:
                raise RunFailed(f"{folder} is not on the hub: {error}; the same command goes on where it stopped") from error
    screen.line(f"uploaded {folder} to {address}")
    return 0


def result_folder(path: Path) -> Path:
    """The adapter or model folder that a path means: itself, or the one in a run folder. Errors: ValueError where there is none."""
    for name, config in RESULTS.items():
        if (path / name / config).is_file():
            return path / name
    if any((path / config).is_file() for config in RESULTS.values()):
        return path
    raise ValueError(f"{path} holds no adapter and no model; expected a run folder that has ended, or the folder of one of them")


def _merged(merged: Path, adapter: Path) -> Path:
    """A merged model of an adapter. Errors: ValueError for another, or one whose error was not measured."""
    facts = cards.read(merged)
    if "merge" not in facts:
        raise ValueError(f"{merged} has no measured merge error in {cards.FACTS}: make it with treetune merge {adapter} FOLDER")
    if not (adapter / WEIGHTS).is_file() or facts["merge"].get("adapter") != manifest.entry(adapter / WEIGHTS).sha256:
        raise ValueError(f"{merged} is not the merged model of {adapter}: merge that one (treetune merge), or name the run of this one")
    return merged
