"""How a command or a run fails: bad input (exit code 2, one line, nothing written) or a run that failed (exit code 1)."""

import contextlib
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from treetune.core import fields


class RunFailed(Exception):
    """The run started and could not go on; the message says why, and what repairs it."""


class BadInput(ValueError):
    """Something the user gave is wrong; the message says what, where and how to fix it."""


@contextlib.contextmanager
def checking_input(what: str = "an option or an input") -> Iterator[None]:
    """Inside, options and inputs are read: what they make go wrong is the user's to fix, and becomes BadInput.

    ValueErrors and what the file system refuses say what is wrong. Any other error was not foreseen: its line names `what`, or what
    `fields.reading` knows better, and where a traceback is to be had.
    """
    try:
        yield
    except BrokenPipeError:
        raise
    except Exception as error:
        if out_of_memory(error):
            raise RunFailed(f"out of memory: take a smaller model, or give the process more ({_first_line(error)})") from error
        if lost := _lost_rank(error):
            raise RunFailed(f"{lost}: start the run again") from error
        if isinstance(error, (ValueError, *_file_errors())):
            raise BadInput(str(error)) from error
        if isinstance(error, fields.UNFORESEEN):
            raise BadInput(fields.unforeseen(what, error)) from error
        raise


GENERAL = "lower micro_batch_size or sequence_len, or turn on gradient_checkpointing"


@contextlib.contextmanager
def running(root: Path, advise: Callable[[], str] = lambda: GENERAL) -> Iterator[None]:
    """Inside, a full disk becomes BadInput and a full memory RunFailed.

    root: the run, whose checkpoints are always whole. advise() -> what to do where memory has run out.
    """
    try:
        yield
    except BrokenPipeError:
        raise
    except Exception as error:
        if out_of_memory(error):
            raise RunFailed(f"out of memory: {_advice(advise)} ({_first_line(error)})") from error
        if lost := _lost_rank(error):
            raise RunFailed(f"{lost}: continue with --resume auto") from error
        if not isinstance(error, _file_errors()):
            raise
        if type(error).__name__ == "SaveError":  # of core.ckpt, which imports torch: it says all there is to say
            raise BadInput(str(error)) from error
        raise BadInput(f"could not write to {root}: {error}; its checkpoints are intact: free some space, then --resume auto") from error


# What gloo and NCCL say when a rank is gone, or does not answer within the time-out.
LOST_RANK = re.compile(
    r"connection (closed|reset) by peer|timed out (waiting|connecting)|connectFullMesh failed|NCCL (communicator was aborted|.*timeout)",
    re.IGNORECASE,
)


def _lost_rank(error: Exception) -> str:
    """What has become of another rank, where an error says that something has; empty for others."""
    words = LOST_RANK.search(str(error)) if isinstance(error, RuntimeError) else None
    return f"another rank has ended or hangs ({words.group().lower()})" if words else ""


def _advice(advise: Callable[[], str]) -> str:
    try:
        return advise()
    # Memory has run out already, and the message about that must not be lost to whatever goes wrong while it is written.
    except Exception:
        return GENERAL


# What torch, oneDNN, the loader of libraries and the system say when there is no memory: torch has an exception of its own for CUDA only.
NO_MEMORY = re.compile(
    r"can't allocate memory|not enough memory|cannot allocate memory|could not create a (primitive|memory)|can't start new thread"
    r"|bad_alloc|failed to map segment|out of memory",
    re.IGNORECASE,
)


def out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory has run out."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":  # torch's, which may not be imported
        return True
    return isinstance(error, RuntimeError | ImportError | OSError) and NO_MEMORY.search(str(error)) is not None


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]


def _file_errors() -> tuple[type[Exception], ...]:
    """What the file system raises, and the safetensors writer when the disk is full; a package that was not imported raises nothing."""
    found = sys.modules.get("safetensors")
    return (OSError,) if found is None else (OSError, found.SafetensorError)
