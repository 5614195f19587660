"""Which checkpoint a run resumes from: one whose files are as they were written."""

from pathlib import Path

from treetune.core import ckpt


def newest(root: Path) -> tuple[Path | None, tuple[str, ...]]:
    """The newest sound checkpoint under `root`, None where there is no checkpoint at all, and what there is to say about it.

    Raises ValueError where there are checkpoints and none is sound: to start again from nothing is the user's decision.
    """
    checkpoint, faults = ckpt.newest_sound(root)
    if checkpoint is None and faults:
        more = f" ({len(faults)} checkpoints, none is sound)" if len(faults) > 1 else ""
        raise ValueError(f"{faults[0]}{more}: nothing to resume from in {root}; start anew with --overwrite, or in another --output-dir")
    skipped = tuple(f"{fault}: skipped" for fault in faults)
    return checkpoint, skipped + (_unverified(checkpoint) if checkpoint is not None else ())


def require(path: Path) -> tuple[str, ...]:
    """What there is to say about a checkpoint that the user has named. Raises ValueError, with a better one, where it is not sound."""
    try:
        ckpt.read_meta(path)
    except ValueError as error:
        near = (ckpt.newest_sound(root)[0] for root in (path.parent, path / "checkpoints", path))
        other = next((checkpoint for checkpoint in near if checkpoint is not None), None)
        raise ValueError(f"{error}{'' if other is None else f'; the newest sound one is {other}'}") from error
    return _unverified(path)


def _unverified(path: Path) -> tuple[str, ...]:
    if ckpt.read_meta(path)["format"] != ckpt.UNVERIFIED:
        return ()
    return (f"{path} was saved by an older version, without a manifest: its files are used without a check",)
