"""How a run ends that could not go on."""


class RunFailed(Exception):
    """The run started and could not go on; the message says why, and what repairs it."""
