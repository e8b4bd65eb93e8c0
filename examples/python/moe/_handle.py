"""Handles of the library and their lifetimes.

A Handle owns one reference of the library's own counting and gives it up when Python has no use for
it any more. Children keep their parents' Handles, views of library memory keep the Handle they look
into, so that the order in which the garbage collector finds them does not matter.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import sys
import threading
import weakref
from collections import deque
from typing import Any, Callable, Deque, Dict, Iterator, List, Optional

from ._library import InvalidState, check, function, pending_count, raise_pending_since

# A destroy may not happen inside a callback, but the garbage collector runs there as anywhere: such
# handles wait here for the next call.
_deferred: Deque["Handle"] = deque()

_ENDS = {"file": "moe_file_close"}  # of kinds whose end is not called destroy


class _Inside(threading.local):
    depth = 0


_inside = _Inside()


@contextlib.contextmanager
def inside_callback() -> Iterator[None]:
    """Marks that this thread is in a callback of the library."""
    _inside.depth += 1
    try:
        yield
    finally:
        _inside.depth -= 1


def refuse_inside_callback() -> None:
    """Callbacks may not call the library: it may hold locks, and would wait for itself."""
    if _inside.depth:
        raise InvalidState("a callback must not call the library")


def destroy_deferred() -> None:
    """Destroy what had to wait, unless this is a callback as well."""
    while _deferred and not _inside.depth:
        try:
            handle = _deferred.popleft()
        except IndexError:
            return
        handle.destroy()


class Busy:
    """Who is using an object: any number of calls, or one change (a binding) and nothing else."""

    def __init__(self) -> None:
        self._reset()

    def _reset(self) -> None:
        # The collector may end a started call, which gives this back, wherever this thread is.
        self._lock = threading.RLock()
        self._users = 0
        self._alone = False
        self._pid = os.getpid()

    def _after_fork(self) -> None:
        # The calls that the parent's other threads were in do not exist in the child.
        if self._pid != os.getpid():
            self._reset()

    def take(self, what: str) -> Callable[[], None]:
        """Share the object until the function that is returned is called."""
        self._after_fork()
        with self._lock:
            if self._alone:
                raise InvalidState(f"{what} is in use by another call")
            self._users += 1
        return functools.partial(self._give_back, self._lock)

    def _give_back(self, taken: Any) -> None:
        self._after_fork()
        with self._lock:
            if taken is self._lock:  # else it was taken before a fork, and is forgotten
                self._users -= 1

    def take_alone(self, what: str) -> Callable[[], None]:
        """The same, and nobody else may have it."""
        self._after_fork()
        with self._lock:
            if self._users or self._alone:
                raise InvalidState(f"{what} is in use by another call")
            self._alone = True
        return functools.partial(self._give_back_alone, self._lock)

    def _give_back_alone(self, taken: Any) -> None:
        self._after_fork()
        with self._lock:
            if taken is self._lock:
                self._alone = False

    @contextlib.contextmanager
    def shared(self, what: str) -> Iterator[None]:
        give_back = self.take(what)
        try:
            yield
        finally:
            give_back()

    @contextlib.contextmanager
    def alone(self, what: str) -> Iterator[None]:
        give_back = self.take_alone(what)
        try:
            yield
        finally:
            give_back()


class Flight:
    """A call of a pass between its start and its finish: the objects it uses, and its memory."""

    def __init__(self, direction: str, result: Any, keep: Any, used: List["Handle"]) -> None:
        self.direction = direction  # "forward" or "backward"
        self.worked = False
        self.result = result
        self.keep = keep
        self._taken = [handle.busy.take(f"the {handle.kind}") for handle in used]

    def end(self) -> None:
        """Give everything back."""
        while self._taken:
            self._taken.pop()()
        self.keep = None


class Handle:
    """One object of the library.

    `kept` holds what must live as long: parents' handles, callbacks, memory bound to it. `exports`
    holds the views of its memory that somebody still has. `flight` is the started call of a pass. A
    borrowed handle is destroyed by the object it belongs to.
    """

    def __init__(self, kind: str, borrowed: bool = False) -> None:
        self.kind = kind
        self.borrowed = borrowed
        self.value: Optional[int] = None
        self.kept: Dict[str, Any] = {}
        self.exports: "weakref.WeakSet[Any]" = weakref.WeakSet()
        self.busy = Busy()
        self.flight: Optional[Flight] = None

    def create(self, name: str, *arguments: Any) -> "Handle":
        """Call a create function; its first argument is where the handle goes."""
        refuse_inside_callback()
        destroy_deferred()
        value = ctypes.c_void_p()
        status = function(name)(ctypes.byref(value), *arguments)
        self.value = value.value
        check(status)
        return self

    def refuse_exports(self, what: str) -> None:
        """Refuse a call that may move memory somebody has a view of."""
        if len(self.exports):
            raise InvalidState(f"{what}: {len(self.exports)} views of the {self.kind} are in use")

    def destroy(self) -> None:
        """Give up the library's object; at once, whoever else may still have this handle."""
        value, self.value = self.value, None
        if value and not self.borrowed:
            before = pending_count()
            function(_ENDS.get(self.kind, f"moe_{self.kind}_destroy"))(value)
            self.end_flight()  # after it: until then the library may look at all of that
            raise_pending_since(before)

    def end_flight(self) -> None:
        """The started call is over, however it ended."""
        flight, self.flight = self.flight, None
        if flight is not None:
            flight.end()

    # A weakref.finalize could not do this: inside a callback the handle must outlive its own
    # finalizer together with all it keeps, and only __del__ can resurrect it. It runs before any
    # part of a cycle is cleared. When the interpreter goes down nothing is destroyed: others may
    # still look at the memory, and the system takes it back anyway.
    def __del__(self) -> None:
        if self.value is not None and sys is not None and not sys.is_finalizing():
            self.dispose()

    def dispose(self) -> None:
        """Destroy now, or after the callback that this is in."""
        if _inside.depth:
            _deferred.append(self)
        else:
            self.destroy()


def device_of(handle: Optional[Handle]) -> Optional[int]:
    """The GPU that what was made from a handle's context is on; None: the host."""
    while handle is not None and handle.kind != "context":
        kept = handle.kept
        parents = (kept[n] for n in ("context", "target", "experts", "pass") if n in kept)
        handle = next(parents, None)
    return None if handle is None else handle.kept.get("device")


class Object:
    """A Python object around a Handle: closing, and refusing use after that."""

    _handle: Optional[Handle] = None

    @property
    def handle(self) -> Handle:
        handle = self._handle
        if handle is None:
            raise InvalidState(f"this {type(self).__name__} has been closed")
        return handle

    @property
    def closed(self) -> bool:
        """Whether close() has been called."""
        return self._handle is None

    def close(self) -> None:
        """Give the object up now. What others still use of it, views included, lives on."""
        self._handle = None

    def call(self, name: str, *arguments: Any) -> None:
        """Call a function of the library on this object and raise its error."""
        handle = self.handle  # held here: a close() in another thread does not pull it away
        refuse_inside_callback()
        if _deferred:
            destroy_deferred()
        check(function(name)(handle.value, *arguments))
