"""A layer's forward and backward in three calls each: start, work and finish.

What a call was given stays alive, and gate, pools and layer are shared, from its start to its
finish: a Flight, which belongs to the pass and ends with it.
"""

from __future__ import annotations

import ctypes
from typing import Any, Callable, Optional

from ._computing import Computing
from ._constants import Status
from ._handle import Flight, Handle, destroy_deferred, refuse_inside_callback
from ._library import check, function
from .passes import Pass
from .plan import Plan


class Phased(Computing):
    """The phases of a layer."""

    def forward_start(
        self, pass_: Pass, x: Any = None, *, plan: Optional[Plan] = None, **keywords: Any
    ) -> None:
        """Begin a forward: this rank's rows are on their way. Arguments as of forward().

        Then come forward_work and forward_finish, and between them what other work there is, such
        as the calls of other passes: in the same order on every rank. Until it is finished the pass
        takes no other call but close(), which ends the group as a failure does; what the call was
        given is kept, must stay unchanged, and cannot be bound anew.
        """
        made = self._forward_call(x, plan=plan, **keywords)
        handle = pass_.handle
        with self._in_call(handle, plan):
            handle.refuse_exports("forward")
            own = plan is None or plan.handle.busy is handle.busy
            self._start(
                handle, "forward", made.y, made if own else (made, plan),
                lambda: self._run_forward("forward_start", handle, made),
            )  # fmt: skip

    def forward_work(self, pass_: Pass) -> None:
        """Wait for rows, run this rank's experts on them and send the results back."""
        self._go_on(pass_, "forward", "work")

    def forward_finish(self, pass_: Pass) -> Any:
        """Wait for the results and return y. Does the work as well if forward_work did not."""
        return self._go_on(pass_, "forward", "finish")

    def backward_start(self, pass_: Pass, dy: Any = None, **keywords: Any) -> None:
        """Begin a backward: dy is on its way. Arguments as of backward(), all else as of
        forward_start(). There is one at a time for each gate and each pool."""
        made = self._backward_call(pass_, dy, **keywords)
        handle = pass_.handle
        with self._in_call(handle, None):
            made.remember(handle.kept)
            arguments = self.handle.value, handle.value, ctypes.byref(made.args)
            self._start(
                handle, "backward", made.dx, made,
                lambda: _call("moe_layer_backward_start", *arguments),
            )  # fmt: skip

    def backward_work(self, pass_: Pass) -> None:
        """Wait for dy of rows, run the experts' backward on them and send dx back."""
        self._go_on(pass_, "backward", "work")

    def backward_finish(self, pass_: Pass) -> Any:
        """Wait for dx, write what is left to write and return dx."""
        return self._go_on(pass_, "backward", "finish")

    def _start(
        self, handle: Handle, direction: str, result: Any, keep: Any, call: Callable[[], int]
    ) -> None:
        refuse_inside_callback()
        flight = Flight(direction, result, keep, self._used())
        before = handle.flight  # of a pass in a call already: the library refuses another
        if before is None:
            handle.flight = flight  # now, so that an interrupt after the call frees no memory
        status = call()
        if status != Status.OK:
            flight.end()
            handle.flight = before
        elif before is not None:
            handle.end_flight()
            handle.flight = flight
        check(status)

    def _go_on(self, pass_: Pass, direction: str, phase: str) -> Any:
        handle = pass_.handle
        with self._in_call(handle, None):
            flight = handle.flight
            # What the library refuses for one of these leaves the started call as it is.
            refused = (
                flight is None
                or flight.direction != direction
                or handle.kept["target"] is not self.handle
                or (flight.worked and phase == "work")
            )
            status = _call(f"moe_layer_{direction}_{phase}", self.handle.value, handle.value)
            if flight is not None and not refused:
                if phase == "work" and status == Status.OK:
                    flight.worked = True
                else:
                    handle.end_flight()
            check(status)
            return flight.result if flight is not None and phase == "finish" else None


def _call(name: str, *arguments: Any) -> int:
    refuse_inside_callback()
    destroy_deferred()
    status: int = function(name)(*arguments)
    return status
