"""The checkpoints of a run as they are made: what is on the disk before each, who is told of it, which of them stay."""

from treetune.core import async_save, ckpt, durable, exchange
from treetune.core.run import best, folder
from treetune.core.run.observers import Observers
from treetune.core.run.progress import Progress
from treetune.core.state import TrainState


class Saves:
    """Checkpoints in a run folder; a class because one may still be on its way to the disk.

    keep: how many of the newest stay, all without it. goal: the metric of the best one, which stays besides. Observers are told of a
    checkpoint, and others go, when it is whole: at once, or, `asynchronous`, in a later call from the thread of the run.
    """

    def __init__(self, run: folder.RunDir, observers: Observers, *, keep: int | None, goal: str, asynchronous: bool):
        self.run, self.observers, self.keep, self.goal = run, observers, keep, goal
        self.saver = async_save.Saver(asynchronous=asynchronous)
        self._of = Progress(), 0

    def begin(self, state: TrainState, meta: dict, progress: Progress) -> None:
        """Save a state; progress: of the run at its step. Errors: as of `wait`."""
        self.wait()
        if exchange.rank() == 0:
            self._flush_records()
        # As of now: a better evaluation, whose checkpoint is not there yet, must not cost the one that was best so far.
        self._of = progress, int(state.step)
        self.saver.begin(self.run.checkpoints, state, meta)
        self.settle()

    def wait(self) -> None:
        """Return when all is on the disk. Errors: ckpt.SaveError where a checkpoint could not be written."""
        self.saver.wait()
        self.settle()

    def finish(self) -> None:
        """Return when nothing is being written any more, whatever came of it."""
        self.saver.settle()
        self.settle()

    @property
    def failed(self) -> bool:
        """Whether a checkpoint is known not to have been written."""
        return self.saver.failed

    def settle(self) -> None:
        """Tell of a checkpoint that is whole by now, and drop those beyond the limit, never the best."""
        path = self.saver.written()
        if path is None:
            return
        progress, step = self._of
        self.observers.saved(path, step)
        if exchange.rank() == 0:
            checkpoint = best.checkpoint(self.run, progress)
            ckpt.prune(self.run.checkpoints, self.keep, best=checkpoint)
            if checkpoint is not None:
                best.write(self.run, checkpoint, self.goal, progress.best)

    def _flush_records(self) -> None:
        """On the disk before the checkpoint that a resume continues them from."""
        for path in (self.run.metrics, self.run.samples):
            if path.exists():
                durable.fsync(path)
        durable.fsync(self.run.root)
