"""Plan: one routing, and dispatch and combine around the host's own experts."""

from __future__ import annotations

import ctypes
from typing import Any, Dict, List, NamedTuple, Optional, Tuple

from . import _abi, _config, _memory, _views
from ._constants import DType, Status
from ._device import copy as fetch
from ._device import new_like, stream_of
from ._handle import Handle, Object, device_of, refuse_inside_callback
from ._library import InvalidState, check, library, new
from .context import Context


class PlanArrays(NamedTuple):
    """The arrays of a plan; moe/plan.h says what is in each."""

    token_begin: Any
    expert_of_entry: Any
    weight_of_entry: Any
    row_of_entry: Any
    slot_of_entry: Any
    expert_begin: Any
    token_of_row: Any
    entry_of_row: Any
    group_begin: Any


class Plan(Object):
    """Which token goes to which expert with what weight. A new plan is empty (T = 0, E = 1)."""

    def __init__(self, context: Context) -> None:
        self._context = context.handle
        handle = Handle("plan")
        handle.kept["context"] = self._context
        self._handle = handle.create("moe_plan_create", self._context.value)

    # ---- making ----

    def build(
        self,
        expert_ids: Any,
        weights: Any = None,
        *,
        token_begin: Any = None,
        token_mask: Any = None,
        group_begin: Any = None,
        token_priority: Any = None,
        **fields: Any,
    ) -> "Plan":
        """Make this the plan of a routing of the host's own; everything is copied. On a GPU arrays
        are there, but for group_begin, and what writes to them must be done.

        expert_ids   [N] or [T,K] int32 or int64; -1: none
        weights      the same shape, float32 or float64; None: all 1
        token_begin  [T+1] int64, entries of each token; not needed if every token has top_k
        token_mask   [T] uint8 or bool, 0: the token gets no rows
        group_begin  [G+1] int64
        token_priority  [T] of the weights' dtype, for drop_policy="batch_priority"
        fields       num_experts (required), top_k, tokens, dtype (without weights), capacity,
                     drop_policy, renormalize_after_drop, and for drop_policy="random" seed, step
                     and token_first
        """
        allowed = ("num_experts", "top_k", "tokens", "dtype", "capacity", "drop_policy",
                   "renormalize_after_drop", "seed", "step", "token_first")  # fmt: skip
        for name in fields:
            if name not in allowed:
                raise _config.unknown("moe_plan_args", name, allowed)
        args = _config.make(_abi.PlanArgs, fields)
        keep: List[Any] = []
        device = device_of(self.handle)
        ids = _flat(keep, "expert_ids", expert_ids, ["int32", "int64"], None, device)
        args.expert_ids = ids.address
        args.id_dtype = DType.I32 if ids.dtype == "int32" else DType.I64
        if weights is not None:
            wanted = ["float32", "float64"]
            if "dtype" in fields:
                wanted = [_memory.NAMES[DType(args.dtype)]]
            memory = _flat(keep, "weights", weights, wanted, ids.size, device)
            args.weights = memory.address
            args.dtype = DType.F32 if memory.dtype == "float32" else DType.F64
        if token_begin is not None:
            args.token_begin = _flat(
                keep, "token_begin", token_begin, ["int64"], None, device
            ).address
            args.tokens = keep[-1].size - 1
            _check_last("token_begin", keep[-1], ids.size, device)
        else:
            _entries_by_shape(args, ids, fields)
        if token_mask is not None:
            masks = ["uint8", "bool"]
            args.token_mask = _flat(
                keep, "token_mask", token_mask, masks, args.tokens, device
            ).address
        if group_begin is not None:
            args.group_begin = _flat(keep, "group_begin", group_begin, ["int64"], None).address
            args.groups = keep[-1].size - 1
        if token_priority is not None:
            wanted = [_memory.NAMES[DType(args.dtype)]]
            name = "token_priority"
            args.token_priority = _flat(
                keep, name, token_priority, wanted, args.tokens, device
            ).address
        self._replace("moe_plan_build", ctypes.byref(args))
        return self

    def load(self, saved: Any) -> "Plan":
        """Make this the plan that save() wrote, after checking all of it."""
        memory = _memory.vector("saved", saved, ["uint8"], None)
        self._replace("moe_plan_load", memory.address, memory.size)
        return self

    def copy(self) -> "Plan":
        """A plan of its own with the same contents."""
        made = Plan.__new__(Plan)
        made._context = self._context
        handle = Handle("plan")
        handle.kept["context"] = self._context
        made._handle = handle.create("moe_plan_create", self._context.value)
        mine = self.handle
        with mine.busy.shared("the plan"):
            made._replace("moe_plan_copy", mine.value)
        return made

    def _replace(self, function: str, *arguments: Any) -> None:
        handle = self.handle
        with handle.busy.alone("the plan"):
            handle.refuse_exports(function)
            self.call(function, *arguments)

    # ---- reading ----

    def _view(self) -> _abi.PlanView:
        view = new(_abi.PlanView)
        self.call("moe_plan_get", ctypes.byref(view))
        return view

    @property
    def tokens(self) -> int:
        """T."""
        return int(self._view().tokens)

    @property
    def entries(self) -> int:
        """N."""
        return int(self._view().entries)

    @property
    def rows(self) -> int:
        """R."""
        return int(self._view().rows)

    @property
    def num_experts(self) -> int:
        """E."""
        return int(self._view().num_experts)

    @property
    def groups(self) -> int:
        """G."""
        return int(self._view().groups)

    @property
    def dtype(self) -> str:
        """The element type of the weights."""
        return _memory.NAMES[DType(self._view().dtype)]

    def arrays(self, *, copy: bool = True) -> PlanArrays:
        """The plan's arrays.

        With copy=False they are read-only views of the library's memory (on a GPU DeviceArrays),
        and whatever would change the plan (build, load, the next forward of its pass) is refused
        while one of them lives.
        """
        handle = self.handle
        with handle.busy.shared("the plan"):
            view = self._view()
            made: List[Any] = []
            for name, (shape, dtype) in _layout(view).items():
                address = getattr(view, name)
                if copy:
                    made.append(_views.copy(handle, address, shape, dtype))
                else:
                    made.append(_views.view(handle, address, shape, dtype, False, track=True))
            return PlanArrays(*made)

    def check(self) -> None:
        """Check every invariant; CorruptData names the first that is broken."""
        with self.handle.busy.shared("the plan"):
            self.call("moe_plan_check")

    def save(self) -> bytes:
        """The plan as bytes: the same for the same plan on every machine."""
        handle = self.handle
        refuse_inside_callback()
        with handle.busy.shared("the plan"):
            size = ctypes.c_int64()
            status = library().moe_plan_save(handle.value, None, 0, ctypes.byref(size))
            if status != Status.BUFFER_TOO_SMALL:
                check(status)
            buffer = ctypes.create_string_buffer(size.value)
            self.call("moe_plan_save", buffer, size.value, ctypes.byref(size))
            return buffer.raw

    # ---- dispatch and combine ----

    # On a GPU `stream` is as of a layer's forward, and what is returned must be given unless the
    # input is a tensor.

    def dispatch_forward(self, tokens_in: Any, rows_out: Any = None, *, stream: Any = None) -> Any:
        """Gather: rows_out[r] = tokens_in[token_of_row[r]]. Returns rows_out [R,width]."""
        given = {"tokens_in": tokens_in}
        return self._move("moe_dispatch_forward", given, "rows_out", rows_out, stream)

    def dispatch_backward(
        self, rows_in: Any, tokens_out: Any = None, *, flags: int = 0, stream: Any = None
    ) -> Any:
        """The adjoint of dispatch: each token's sum over its rows. Returns tokens_out."""
        given = {"rows_in": rows_in}
        return self._move("moe_dispatch_backward", given, "tokens_out", tokens_out, stream, flags)

    def combine_forward(
        self, rows_in: Any, tokens_out: Any = None, *, flags: int = 0, stream: Any = None
    ) -> Any:
        """The weighted sum of each token's rows; flags are Rows. Returns tokens_out [T,width]."""
        given = {"rows_in": rows_in}
        return self._move("moe_combine_forward", given, "tokens_out", tokens_out, stream, flags)

    def combine_backward(
        self,
        tokens_in: Any,
        rows_in: Any = None,
        rows_out: Any = None,
        entry_weight_grad: Any = None,
        *,
        flags: int = 0,
        stream: Any = None,
    ) -> Any:
        """The adjoint of combine: rows_out[r] = weight * tokens_in[token_of_row[r]].

        tokens_in          [T,width] gradient by the combined tokens
        rows_in            [R,width] the forward's rows; needed for entry_weight_grad
        entry_weight_grad  [N] out: the gradient by each weight, or None
        """
        given = {"tokens_in": tokens_in}
        if rows_in is not None:
            given["rows_in"] = rows_in
        name = "moe_combine_backward"
        return self._move(name, given, "rows_out", rows_out, stream, flags, entry_weight_grad)

    def _move(
        self,
        function: str,
        given: Dict[str, Any],
        out_name: str,
        out: Any,
        stream: Any = None,
        flags: int = 0,
        entry_weight_grad: Any = None,
    ) -> Any:
        with self.handle.busy.shared("the plan"):
            view, device = self._view(), device_of(self.handle)
            real = _memory.NAMES[DType(view.dtype)]
            dtype = _rows_dtype(real, given, out)
            args = _config.make(_abi.RowsArgs, {"flags": flags, "dtype": _config.DTYPES[dtype]})
            args.stream = stream_of(stream)
            keep: List[Any] = []
            lengths = {"tokens": view.tokens, "rows": view.rows}
            for name, source in given.items():
                memory = _memory.describe(name, source, _memory.accepted(dtype), False, device)
                if args.width == 0:
                    if len(memory.shape) < 2:
                        raise ValueError(f"{name} has shape {memory.shape}; wanted [rows, width]")
                    args.width = memory.shape[-1]
                _put(args, name, memory, dtype, lengths[name.split("_")[0]], args.width, False)
                keep.append(memory)
            if out is None:
                if flags & 1:
                    raise ValueError(f"{out_name} must be given with Rows.ADD")
                shape = (lengths[out_name.split("_")[0]], int(args.width))
                if device is None:
                    out = _views.zeros(shape, dtype)
                else:
                    out = new_like(out_name, next(iter(given.values())), shape)
            target = _memory.describe(out_name, out, _memory.accepted(dtype), True, device)
            length = lengths[out_name.split("_")[0]]
            keep.append(_put(args, out_name, target, dtype, length, args.width, True))
            if entry_weight_grad is not None:
                wanted = _memory.vector(
                    "entry_weight_grad", entry_weight_grad, [real], view.entries, True, device
                )
                args.entry_weight_grad = wanted.address
                keep.append(wanted)
            self.call(function, ctypes.byref(args))
            return out

    def __enter__(self) -> "Plan":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        if self.closed:
            return "<moe.Plan closed>"
        view = self._view()
        return f"<moe.Plan tokens={view.tokens} entries={view.entries} rows={view.rows}>"


class PassPlan(Plan):
    """The plan of a pass's last forward. The next forward ends it; copy() makes one to keep."""

    def __init__(self, pass_handle: Handle, context: Handle, value: int) -> None:
        self._context = context
        self._pass = pass_handle
        self._generation = pass_handle.kept["generation"]
        handle = Handle("plan", borrowed=True)
        handle.value = value
        handle.kept["pass"] = pass_handle
        handle.busy = pass_handle.busy
        handle.exports = pass_handle.exports
        self._handle = handle

    @property
    def handle(self) -> Handle:
        """As of every object; also refuses a plan that a later forward has replaced."""
        if self._handle is not None and self._pass.kept["generation"] != self._generation:
            raise InvalidState("this plan ended with a later call on its pass; copy() keeps one")
        return super().handle


def _flat(
    keep: List[Any],
    name: str,
    source: Any,
    dtypes: List[str],
    size: Optional[int],
    device: Optional[int] = None,
) -> _memory.Memory:
    """A contiguous array of any shape; the Memory is put in `keep`."""
    memory = _memory.describe(name, source, dtypes, device=device)
    plain = _memory.contiguous(memory.shape)
    same = all(n <= 1 or s == p for n, s, p in zip(memory.shape, memory.strides, plain))
    if memory.size and not same:
        raise ValueError(f"{name}: strides {memory.strides}; it must be contiguous")
    if size is not None and memory.size != size:
        raise ValueError(f"{name} has {memory.size} elements; wanted {size}")
    keep.append(memory)
    return memory


def _check_last(name: str, memory: _memory.Memory, entries: int, device: Optional[int]) -> None:
    """token_begin says how far the library reads; it must not be beyond the ids' end."""
    if memory.size < 1:
        raise ValueError(f"{name} is empty; wanted [T+1]")
    place = memory.address + 8 * (memory.size - 1)
    if device is None:
        last = ctypes.c_int64.from_address(place).value
    else:
        fetched = ctypes.c_int64()
        fetch(ctypes.addressof(fetched), place, 8, None)
        last = fetched.value
    if last != entries:
        raise ValueError(f"the last element of {name} is {last}; expert_ids has {entries} elements")


def _entries_by_shape(args: Any, ids: _memory.Memory, fields: Dict[str, Any]) -> None:
    """T and K from the shape [T,K], or from a flat array and one of them."""
    if "top_k" not in fields:
        args.top_k = ids.shape[-1] if len(ids.shape) > 1 else 1
    if "tokens" not in fields:
        args.tokens = ids.size // args.top_k if args.top_k > 0 else 0
    if args.tokens * args.top_k != ids.size:
        raise ValueError(
            f"expert_ids has {ids.size} elements; tokens * top_k is {args.tokens} * {args.top_k}"
        )


def _rows_dtype(real: str, given: Dict[str, Any], out: Any) -> str:
    """The dtype of tokens and rows: that of the first array, if the plan's weights go with it."""
    source = next(iter(given.values()), out)
    found = getattr(getattr(source, "dtype", None), "name", None) or str(
        getattr(source, "dtype", "")
    ).replace("torch.", "")
    found = next((name for name, bits in _memory.BITS.items() if bits == found), found)
    return found if real == "float32" and found in ("bfloat16", "float16") else real


def _put(
    args: Any, name: str, source: Any, dtype: str, rows: int, width: int, writable: bool
) -> _memory.Memory:
    memory, _, stride = _memory.matrix(name, source, dtype, rows, width, writable)
    setattr(args, name, memory.address)
    setattr(args, name + "_stride", stride)
    return memory


def _layout(view: _abi.PlanView) -> Dict[str, Tuple[Tuple[int, ...], str]]:
    entries, rows = (view.entries,), (view.rows,)
    return {
        "token_begin": ((view.tokens + 1,), "int64"),
        "expert_of_entry": (entries, "int32"),
        "weight_of_entry": (entries, _memory.NAMES[DType(view.dtype)]),
        "row_of_entry": (entries, "int64"),
        "slot_of_entry": (entries, "int64"),
        "expert_begin": ((view.num_experts + 1,), "int64"),
        "token_of_row": (rows, "int64"),
        "entry_of_row": (rows, "int64"),
        "group_begin": ((view.groups + 1,), "int64"),
    }
