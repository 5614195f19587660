"""The layers of one pass over a model that are there at a time: the one that was asked for last, and the next in the direction of the pass.

How a layer comes is a matter of who makes the window: from host memory or files (`layer_offload`), or from the ranks that have it
(`gathers`).
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol, TypeGuard


class Present(Protocol):
    """A layer that is there, or on its way."""

    def wait(self) -> Mapping[str, Any]:
        """The leaves by path, for what the device does from now on."""
        ...


class Window:
    """At most two of `count` layers: the one that was asked for last, and the next; `bring` begins to bring one of a number.

    Behind the last layer the pass turns round: those two stay for the backward pass, unless `turn` says otherwise.
    """

    def __init__(self, count: int, bring: Callable[[int], Present]):
        self.count, self.bring = count, bring
        self.present: dict[int, Present] = {}
        self.last = -1

    def start(self) -> None:
        """Begin to bring the first layer."""
        if self.count and 0 not in self.present:
            self.present[0] = self.bring(0)

    def take(self, index: int) -> Mapping[str, Any]:
        """The leaves of a layer, by path; those of the next one begin to come."""
        if index != self.last:
            self._move(index, self._next(index))
        return self.present[index].wait()

    def turn(self, *, back: bool = False) -> None:
        """The pass has gone over all layers. back: the last one stays for the way back; else none does."""
        end = self.count - 1
        self.present = {end: self.present[end]} if back and end in self.present else {}
        self.last = self.count

    def _next(self, index: int) -> int:
        end = self.count - 1
        onwards = index > self.last or (index == 0 and self.last >= end)  # of a model that reads one document after another
        return index + 1 if onwards and index < end else index - 1

    def _move(self, index: int, beside: int) -> None:
        self.last = index
        for gone in self.present.keys() - {index, beside}:
            del self.present[gone]
        for wanted in (index, beside):
            if 0 <= wanted < self.count and wanted not in self.present:
                self.present[wanted] = self.bring(wanted)


class Coming(NamedTuple):
    """A leaf that comes with its layer; `shard.gather` makes a tensor on the device of it."""

    window: Window
    layer: int
    path: str

    def here(self) -> Any:
        """The leaf on the device."""
        return self.window.take(self.layer)[self.path]


def coming(leaf: Any) -> TypeGuard[Coming]:
    """Whether a leaf is on its way."""
    return isinstance(leaf, Coming)
