"""How a command fails: bad input (exit code 2, one line, nothing written) or a run that failed (exit code 1)."""

import contextlib


class BadInput(Exception):
    """Something the user gave is wrong; the message says what, where and how to fix it."""


class RunFailed(Exception):
    """The run started and could not go on."""


@contextlib.contextmanager
def checking_input():
    """Inside, a ValueError or a missing file is the user's to fix: it becomes BadInput."""
    try:
        yield
    except (ValueError, FileNotFoundError, NotADirectoryError, PermissionError) as error:
        raise BadInput(str(error)) from error
