"""How a command fails: bad input (exit code 2, one line, nothing written) or a run that failed (exit code 1)."""

import contextlib
import sys
from pathlib import Path

from treetune.core import fields


class BadInput(Exception):
    """Something the user gave is wrong; the message says what, where and how to fix it."""


class RunFailed(Exception):
    """The run started and could not go on."""


@contextlib.contextmanager
def checking_input(what: str = "an option or an input"):
    """Inside, options and inputs are read: what they make go wrong is the user's to fix, and becomes BadInput.

    ValueErrors and what the file system refuses say what is wrong. Any other error was not foreseen: its line names `what`, or what
    `fields.reading` knows better, and where a traceback is to be had.
    """
    try:
        yield
    except BrokenPipeError:
        raise
    except (ValueError, *_file_errors()) as error:
        raise BadInput(str(error)) from error
    except fields.UNFORESEEN as error:
        raise BadInput(fields.unforeseen(what, error)) from error


@contextlib.contextmanager
def running(root: Path):
    """Inside, a full disk becomes BadInput and a full memory RunFailed; `root` is the run, whose checkpoints are always whole."""
    try:
        yield
    except BrokenPipeError:
        raise
    except _file_errors() as error:
        raise BadInput(f"could not write to {root}: {error}; its checkpoints are intact: free some space, then --resume auto") from error
    except _memory_errors() as error:
        fix = "lower micro_batch_size or sequence_len, or turn on gradient_checkpointing"
        raise RunFailed(f"out of memory: {fix} ({(str(error) or 'MemoryError').splitlines()[0]})") from error


def _file_errors() -> tuple[type[Exception], ...]:
    """What the file system raises, and the safetensors writer when the disk is full; a package that was not imported raises nothing."""
    found = sys.modules.get("safetensors")
    return (OSError,) if found is None else (OSError, found.SafetensorError)


def _memory_errors() -> tuple[type[Exception], ...]:
    found = sys.modules.get("torch")
    return (MemoryError,) if found is None else (MemoryError, found.OutOfMemoryError)
