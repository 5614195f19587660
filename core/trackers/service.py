"""A tracker as the options of a run describe it. Imports no torch."""

from typing import Any, NamedTuple


class Service(NamedTuple):
    """A tracker as the options of a run describe it.

    module: of `core.trackers`, with open_run(run, **options). id: of the run there, where the user names one. destination: the options
    that say in whose account and project it is, so that another is another run. rewinds: whether steps can be told again. keeps: the
    folders that it copies, "checkpoint" and "end". made_here: whether the id is made here and not by the tracker.
    """

    name: str
    module: str
    options: dict[str, Any]
    id: str | None = None
    destination: tuple[str, ...] = ()
    rewinds: bool = False
    keeps: tuple[str, ...] = ()
    made_here: bool = True
