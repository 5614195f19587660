"""How a command fails: bad input (exit code 2, one line, nothing written) or a run that failed (exit code 1)."""

import contextlib
from pathlib import Path


class BadInput(Exception):
    """Something the user gave is wrong; the message says what, where and how to fix it."""


class RunFailed(Exception):
    """The run started and could not go on."""


@contextlib.contextmanager
def checking_input():
    """Inside, a ValueError and what the file system refuses are the user's to fix: they become BadInput."""
    try:
        yield
    except BrokenPipeError:
        raise
    except (ValueError, *_file_errors()) as error:
        raise BadInput(str(error)) from error


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
    from safetensors import SafetensorError  # what its writer raises when the disk is full

    return OSError, SafetensorError


def _memory_errors() -> tuple[type[Exception], ...]:
    from torch import OutOfMemoryError

    return MemoryError, OutOfMemoryError
