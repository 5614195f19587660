"""Calls made ahead of time in one background thread: sampling while the trainer trains, scoring while the rest is sampled."""

import queue
import threading
import weakref
from collections.abc import Callable, Collection, Hashable
from concurrent.futures import Future
from typing import Any


class Prefetch:
    """One thread that makes the calls it is given, in their order, and keeps each result until it is forgotten.

    call: a sampler or a score, which the thread alone runs: it must neither read weights that the caller changes meanwhile nor take
    part in collectives of ranks. A call is known by its key, so that giving it again makes nothing twice.
    The thread ends with `close`, or when the object is dropped, after the call it is in; the end of the program does not wait for it.
    """

    def __init__(self, call: Callable[..., Any]):
        self._made: dict[Hashable, Future] = {}
        self._todo: queue.SimpleQueue = queue.SimpleQueue()
        # The thread holds none of `self`, or dropping the object would not end it.
        self._end = weakref.finalize(self, _stop, self._todo, self._made)
        threading.Thread(target=_work, args=(call, self._todo), daemon=True, name="prefetch").start()

    def __contains__(self, key: Hashable) -> bool:
        return key in self._made

    def put(self, key: Hashable, *args) -> None:
        """Makes call(*args) after the calls before it, unless one with this key is made already. Errors: ValueError when closed."""
        if not self._end.alive:
            raise ValueError(f"a call was given to a prefetch that is closed: {key}")
        if key not in self._made:
            self._made[key] = Future()
            self._todo.put((self._made[key], args))

    def get(self, key: Hashable) -> Any:
        """Waits for the result of a call. An error of the call is raised here as it was there; the call can then be put again."""
        future = self._made[key]
        if future.exception() is not None:
            del self._made[key]
        return future.result()

    def keep(self, keys: Collection[Hashable]) -> None:
        """Forgets all calls but these; one that has not begun is not made."""
        for key in set(self._made) - set(keys):
            self._made.pop(key).cancel()

    def close(self) -> None:
        """Ends the thread after the call it is in, without waiting for it; no other call is made."""
        self._end()


def _work(call: Callable[..., Any], todo: queue.SimpleQueue) -> None:
    while (item := todo.get()) is not None:
        future, args = item
        if not future.set_running_or_notify_cancel():
            continue
        try:
            future.set_result(call(*args))
        except BaseException as error:  # all of them: `get` raises it again, and a thread that died would leave its caller waiting
            future.set_exception(error)
        del item, future, args  # an idle thread keeps no result alive


def _stop(todo: queue.SimpleQueue, futures: dict[Hashable, Future]) -> None:
    for future in futures.values():
        future.cancel()
    todo.put(None)
