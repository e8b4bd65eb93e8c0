"""Pass: one micro-batch in flight, and what is known after its forward."""

from __future__ import annotations

import ctypes
from typing import TYPE_CHECKING, Any, Dict, NamedTuple, Optional, Union

from . import _abi, _config, _memory, _views
from ._constants import FROM_CONFIG, DType, Tensor, Time
from ._handle import Handle, Object, device_of
from ._library import InvalidState, library, new
from .plan import PassPlan, Plan

if TYPE_CHECKING:
    from .objects import Experts, Gate, Layer


class Losses(NamedTuple):
    """The losses of a forward, each multiplied by its weight."""

    total: float
    importance: float
    load: float
    switch: float
    gshard: float
    z: float
    sequence: float
    threshold: float


class Stats(NamedTuple):
    """The statistics of a forward; moe/pass.h says what each is."""

    tokens: float
    entries: float
    rows: float
    dropped: float
    touched: float
    cv_importance: float
    cv_load: float
    max_over_mean: float
    load_entropy: float
    gate_entropy: float


class Report(NamedTuple):
    """What the last forward, and the last backward after it, took; seconds are by what they went
    into: gate, pack, exchange, experts, combine. moe/pass.h says what each is."""

    forward_seconds: Dict[str, float]
    backward_seconds: Dict[str, float]
    rows_sent: int
    rows_received: int
    rounds: int
    forward_bytes_sent: int
    backward_bytes_sent: int
    forward_bytes_received: int
    backward_bytes_received: int
    rows_to_nodes: int
    forward_bytes_to_nodes: int
    backward_bytes_to_nodes: int


class Pass(Object):
    """What a forward leaves for its backward. Reused step after step; one thread at a time.

    target     the layer, gate or pool it serves
    workspace  memory of the program for all the pass keeps, where the context computes, 64-byte
               aligned; None: the context's
    """

    def __init__(self, target: Union["Layer", "Gate", "Experts"], *, workspace: Any = None) -> None:
        kind = target.kind
        if kind not in ("layer", "gate", "experts"):
            raise TypeError(f"a pass is for a Layer, Gate or Experts, not {target!r}")
        self.target = target
        config = new(_abi.PassConfig)
        handle = Handle("pass")
        handle.kept["target"] = target.handle
        handle.kept["generation"] = 0
        if workspace is not None:
            sizes = _memory.SIZES
            memory = _memory.describe(
                "workspace", workspace, list(sizes), True, device_of(target.handle)
            )
            if tuple(memory.strides) != _memory.contiguous(memory.shape):
                raise ValueError("workspace must be contiguous")
            config.workspace = memory.address
            config.workspace_bytes = memory.size * sizes[memory.dtype]
            handle.kept["workspace"] = memory
        function = "moe_pass_create" + ("" if kind == "layer" else f"_for_{kind}")
        self._handle = handle.create(function, target.handle.value, ctypes.byref(config))

    def forward(self, *arguments: Any, **keywords: Any) -> Any:
        """The target's forward on this pass."""
        return self.target.forward(self, *arguments, **keywords)

    def backward(self, *arguments: Any, **keywords: Any) -> Any:
        """The target's backward on this pass."""
        return self.target.backward(self, *arguments, **keywords)

    def reserve(
        self, max_tokens: int, max_groups: int = 1, max_top_k: int = FROM_CONFIG
    ) -> None:
        """Allocate for batches up to this size; what the pass held is lost."""
        numbers = {"max_tokens": max_tokens, "max_groups": max_groups, "max_top_k": max_top_k}
        handle = self.handle
        with handle.busy.alone("the pass"):
            handle.refuse_exports("reserve")
            int64 = ctypes.c_int64
            self.call(
                "moe_pass_reserve",
                *(_config.number(name, value, int64) for name, value in numbers.items()),
            )
            handle.kept["generation"] += 1
            handle.kept.pop("tokens", None)
            handle.kept["remembered"] = {}

    def trim(self) -> None:
        """Give back memory that the pass does not need for what it holds: all but the routing after
        a forward with Forward.PLAN_ONLY. Ends `plan`, which can be asked for again."""
        handle = self.handle
        with handle.busy.alone("the pass"):
            handle.refuse_exports("trim")
            self.call("moe_pass_trim")
            handle.kept["generation"] += 1

    @property
    def bytes(self) -> int:
        """Bytes of memory the pass holds."""
        handle = self.handle
        with handle.busy.shared("the pass"):
            return int(library().moe_pass_bytes(handle.value))

    @property
    def plan(self) -> Plan:
        """The routing of the last forward, until the next one."""
        return self._shown("moe_pass_plan")

    @property
    def primary_plan(self) -> Plan:
        """The primary routing of a hierarchical gate: groups in place of experts."""
        return self._shown("moe_pass_primary_plan")

    def _shown(self, function: str) -> Plan:
        handle = self.handle
        with handle.busy.shared("the pass"):
            value = ctypes.c_void_p()
            self.call(function, ctypes.byref(value))
            assert value.value is not None
            return PassPlan(handle, context_of(handle), value.value)

    @property
    def losses(self) -> Losses:
        """The losses of the last forward."""
        losses = new(_abi.Losses)
        with self.handle.busy.shared("the pass"):
            self.call("moe_pass_losses", ctypes.byref(losses))
        return Losses(losses.total, *losses.value[: len(Losses._fields) - 1])

    @property
    def stats(self) -> Stats:
        """The statistics of the last forward."""
        stats = new(_abi.Stats)
        with self.handle.busy.shared("the pass"):
            self.call("moe_pass_stats", ctypes.byref(stats))
        return Stats(*stats.value[: len(Stats._fields)])

    @property
    def report(self) -> Report:
        """Where the time of the last forward and backward went, and what travelled."""
        report = new(_abi.PassReport)
        with self.handle.busy.shared("the pass"):
            self.call("moe_pass_get_report", ctypes.byref(report))
        values = (getattr(report, name) for name in Report._fields)
        return Report._make(v if isinstance(v, int) else _by_name(v) for v in values)

    def tensor(self, what: Union[Tensor, str], *, copy: bool = True) -> Any:
        """A tensor of the last forward: a member of Tensor or its name, "counts".

        With copy=False it is a read-only view of the pass's memory (a DeviceArray on a GPU), and
        the next forward or reserve is refused while it lives.
        """
        if isinstance(what, str):
            if what.upper() not in Tensor.__members__:
                known = ", ".join(name.lower() for name in Tensor.__members__)
                raise ValueError(f"there is no tensor {what!r}; there are {known}")
            what = Tensor[what.upper()]
        handle = self.handle
        with handle.busy.shared("the pass"):
            view = new(_abi.TensorView)
            self.call("moe_pass_tensor", int(what), ctypes.byref(view))
            shape = tuple(view.shape[: view.dims])
            dtype = _memory.NAMES[DType(view.dtype)]
            if copy:
                return _views.copy(handle, view.data, shape, dtype)
            return _views.view(handle, view.data, shape, dtype, False, track=True)

    def close(self) -> None:
        """Give the pass up now. What others still use of it, views included, lives on; but a call
        between its start and its finish ends, and with it the group of ranks, as by a failure."""
        handle = self._handle
        super().close()
        if handle is None or handle.flight is None or len(handle.exports):
            return
        try:
            give_back = handle.busy.take_alone("the pass")
        except InvalidState:
            return  # a call of another thread has it, and is the last
        try:
            handle.kept["generation"] += 1  # a plan that somebody has looks into it no longer
            handle.dispose()
        finally:
            give_back()

    def __enter__(self) -> "Pass":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<moe.Pass {'closed' if self.closed else 'for a ' + self.target.kind}>"


def _by_name(seconds: Any) -> Dict[str, float]:
    return {time.name.lower(): float(seconds[time]) for time in Time}


def context_of(handle: Optional[Handle]) -> Handle:
    """The context a handle was made from, through its parents."""
    while handle is not None and handle.kind != "context":
        kept = handle.kept
        handle = kept.get("context") or kept.get("target") or kept.get("experts")
    assert handle is not None
    return handle
