"""Uploads of a run to the hub, by a thread of its own: training waits for none but the last, and no failure of one ends it.

What is uploaded is staged in a draft inside the run folder: weights as of a checkpoint, and files of the checkpoint as links, which outlive
its deletion. The draft goes when the run ends, or when the next process takes the folder.
"""

import queue
import shutil
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from treetune.core import drafts, durable, hub_repos, manifest
from treetune.core.hub_repos import Repo, Unsent
from treetune.core.records import JsonRecord as Record
from treetune.core.run import cards
from treetune.core.run.observers import Observer

END, EVERY, LAST, ALL = "end", "every_save", "checkpoint", "all_checkpoints"
LATEST, CHECKPOINTS = "last-checkpoint", "checkpoints"  # folders of a repository


class Item(NamedTuple):
    """What is uploaded at once: a folder, and the message of its commit."""

    folder: Path
    message: str


class Uploads(Observer):
    """Uploads of a run to a repository; has a lifetime: the thread, what waits for it, and the draft.

    Of checkpoints that come while an upload is under way only the newest is kept, except under all_checkpoints.
    """

    def __init__(self, repo: Repo, strategy: str, root: Path, warn: Callable[[str], None]):
        self.repo, self.strategy, self.warn = repo, strategy, warn
        self.draft = drafts.name(root / "hub")
        self.evaluations: list[Record] = []
        self._waiting: list[Item] = []
        self._told: queue.SimpleQueue[str] = queue.SimpleQueue()
        self._changed, self._closed, self._busy = threading.Condition(), False, False
        self._thread: threading.Thread | None = None

    def evaluation(self, record: Record) -> None:
        """Keep the numbers for the cards of weights on the way."""
        self.evaluations.append(record)

    def staged(self, step: int) -> Path:
        """The folder for the weights of a checkpoint."""
        return self.draft / f"step_{step:06d}"

    def offer(self, step: int, folder: Path) -> None:
        """Upload the weights of a checkpoint when the thread is free."""
        self._put(Item(folder, f"Step {step}"))

    def saved(self, path: Path, step: int | None) -> None:
        """Upload a checkpoint, where the strategy says so."""
        if step is None or self.strategy not in (LAST, ALL):
            return
        name = LATEST if self.strategy == LAST else f"{CHECKPOINTS}/{path.name}"
        stage = self.draft / f"checkpoint_{step:06d}"
        try:
            link(path, stage / name)
        except OSError as error:
            self.warn(f"the checkpoint of step {step} is not uploaded: {error}")
            return
        self._put(Item(stage, f"Checkpoint of step {step}"))

    def step(self, record: Record) -> None:
        """Say what has become of uploads: the thread itself tells nobody, since observers are called from one."""
        self._tell()

    def _tell(self) -> None:
        while not self._told.empty():
            self.warn(self._told.get())

    def _put(self, item: Item) -> None:
        self._tell()
        with self._changed:
            if self.strategy != ALL:
                kind = item.folder.name.partition("_")[0]
                for older in [waiting for waiting in self._waiting if waiting.folder.name.partition("_")[0] == kind]:
                    self._waiting.remove(older)
                    shutil.rmtree(older.folder, ignore_errors=True)
            self._waiting.append(item)
            if self._thread is None:
                self._thread = threading.Thread(target=self._work, name="treetune hub", daemon=True)
                self._thread.start()
            self._changed.notify_all()

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or self._closed)
                if not self._waiting:
                    return
                item, self._busy = self._waiting.pop(0), True
            try:
                hub_repos.upload(self.repo, item.folder, item.message)
            except Unsent as error:
                self._told.put(f"{item.message} is not on the hub ({error}); the run goes on")
            finally:
                shutil.rmtree(item.folder, ignore_errors=True)
                with self._changed:
                    self._busy = False
                    self._changed.notify_all()

    def finish(self, folder: Path) -> str:
        """Upload what a run has left, behind all that still waits but earlier weights; why it is not on the hub, empty where it is."""
        with self._changed:
            if self.strategy != ALL:
                self._waiting = [item for item in self._waiting if not item.folder.name.startswith("step_")]
        self.close()
        stage = self.draft / "result"
        try:
            stage_result(folder, stage, self.repo.id)
            hub_repos.upload(self.repo, stage, f"End of training: {folder.name}")
        except (Unsent, OSError, ValueError) as error:
            return str(error)
        finally:
            shutil.rmtree(self.draft, ignore_errors=True)
        return ""

    def close(self) -> None:
        """Return when nothing is being uploaded any more; what waits is uploaded first."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        if self._thread is not None:
            while self._thread.is_alive():  # in pieces, so that a signal is seen
                self._thread.join(0.2)
        self._tell()

    def abandon(self) -> None:
        """Forget what waits: the run has failed, and its error is not to wait for a network."""
        with self._changed:
            self._waiting, self._closed = [], True
            self._changed.notify_all()
        if not self._busy:
            shutil.rmtree(self.draft, ignore_errors=True)


def _files(folder: Path) -> list[str]:
    """The files of a folder and of those in it, by their paths there."""
    return [path.relative_to(folder).as_posix() for path in sorted(folder.rglob("*")) if path.is_file()]


def link(source: Path, target: Path, names: Sequence[str] | None = None, *, soft: bool = False) -> None:
    """Make a second folder of the same files, linked where the file system can, else copied. names: only those, of all.

    soft: by links that go where the files go, for a folder that nobody deletes from meanwhile.
    """
    for name in _files(source) if names is None else names:
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        durable.link((source / name).resolve(), target / name, soft=soft)


def stage_result(folder: Path, stage: Path, place: str, *, soft: bool = False) -> None:
    """Make a folder of what treetune wrote into another, with a card that names the repository, unless its owner has edited it.

    soft: as of `link`. Errors: ValueError for files that are not as they were written.
    """
    listed = list(manifest.read(folder)) + [manifest.NAME] if manifest.check(folder) else None
    theirs = cards.edited(folder)
    facts = cards.read(folder)
    link(folder, stage, [name for name in listed or _files(folder) if name != cards.CARD], soft=soft)
    if theirs or not facts:
        if (folder / cards.CARD).is_file():
            shutil.copyfile(folder / cards.CARD, stage / cards.CARD)
    else:
        (stage / cards.CARD).write_text(cards.text(facts, place=place), encoding="utf-8")
