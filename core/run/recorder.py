"""The records of a run: the metrics of each step as numbers on the host, read one step late so that no step waits for them.

The only place that moves a number off the device.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

Record = dict[str, float]
SHOWN_UNKNOWN = ("loss", "grad_norm", "completions/")  # null in a record where not known; other numbers are left out


class Leaving(NamedTuple):
    """Numbers of a step on their way to the host: of those of a GPU the dtypes, the copy of them all, and what waits for it."""

    values: dict[str, Tensor | float | torch.dtype]
    copy: Tensor  # float64, in the order of the values
    wait: Callable[[], object]


def leaving(values: Mapping[str, Tensor | float]) -> Leaving:
    """Send the numbers of a GPU to the host, all in one copy, without waiting for it."""
    away = {key: value.detach() for key, value in values.items() if isinstance(value, Tensor) and on_gpu(value)}
    copy, wait = send(torch.stack([value.double() for value in away.values()])) if away else (torch.empty(0), bool)
    return Leaving({**values, **{key: value.dtype for key, value in away.items()}}, copy, wait)


def arrived(step: Leaving) -> Record:
    """The numbers on the host."""
    step.wait()
    numbers = iter(step.copy.tolist())
    return {key: _number(value, numbers) for key, value in step.values.items()}


def _number(value: Tensor | float | torch.dtype, numbers: Iterator[float]) -> float:
    if isinstance(value, torch.dtype):
        return next(numbers) if value.is_floating_point else int(next(numbers))
    return value.item() if isinstance(value, Tensor) else value


def on_gpu(value: Tensor) -> bool:
    """Whether reading a number would wait for all that its device has still to do."""
    return value.is_cuda


def send(values: Tensor) -> tuple[Tensor, Callable[[], object]]:
    """A copy on the host that is whole once the function beside it has returned."""
    # Of what is queued before it and nothing after: `.item()` would wait for the step that was queued since, and the device then for us.
    copy = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
    copy.copy_(values, non_blocking=True)
    event = torch.cuda.Event()
    event.record()
    return copy, event.synchronize


class Recorder:
    """Turns the metrics of steps into records; has a lifetime: the step that is not read yet, and the history."""

    def __init__(self, derive: Callable[[Record], Record] = dict):
        self.derive, self.history = derive, []
        self.pending: Leaving | None = None

    def push(self, step: int, metrics: dict[str, Tensor | float]) -> Record | None:
        """Hand over the metrics of a step; returns the record of the step before."""
        # Reading this step's metrics would wait for this step: those of the step before are there by now.
        record = self.flush()
        self.pending = leaving({"step": step} | metrics)
        return record

    def flush(self) -> Record | None:
        """The record of the step that was pushed last, after `derive`; None where it was read already."""
        if self.pending is None:
            return None
        record = self.derive(arrived(self.pending))
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
