"""The records of a run: the metrics of each step as numbers on the host, read one step late so that no step waits for them.

The only place that moves a number off the device.
"""

from collections.abc import Callable

from torch import Tensor

Record = dict[str, float]
SHOWN_UNKNOWN = ("loss", "grad_norm", "completions/")  # null in a record where not known; other numbers are left out


class Recorder:
    """Turns the metrics of steps into records; has a lifetime: the step that is not read yet, and the history."""

    def __init__(self, derive: Callable[[Record], Record] = dict):
        self.derive, self.pending, self.history = derive, None, []

    def push(self, step: int, metrics: dict[str, Tensor | float]) -> Record | None:
        """Hand over the metrics of a step; returns the record of the step before."""
        # `.item()` on this step's metrics would wait for this step: those of the step before are ready by now.
        record = self.flush()
        self.pending = {"step": step} | metrics
        return record

    def flush(self) -> Record | None:
        """The record of the step that was pushed last, after `derive`; None where it was read already."""
        if self.pending is None:
            return None
        record = self.derive({key: value.item() if isinstance(value, Tensor) else value for key, value in self.pending.items()})
        self.pending = None
        self.history.append(record)
        return record

    def note(self, record: Record) -> None:
        """Add a record of plain numbers (an evaluation)."""
        self.history.append(record)


def reported(record: Record) -> Record:
    """The record without numbers of which nothing was counted, and with the margin of rates that were counted apart."""
    reported = {key: value for key, value in record.items() if value == value or key.startswith(SHOWN_UNKNOWN)}
    if "rewards/margins" not in reported and {"rewards/chosen", "rewards/rejected"} <= reported.keys():
        reported["rewards/margins"] = reported["rewards/chosen"] - reported["rewards/rejected"]
    return reported
