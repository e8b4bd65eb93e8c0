"""The arguments of forward and backward: arrays in, structs for the library out.

Widths and dtype come from the object that is called, so that every array is checked here by name
before the library sees its address.
"""

from __future__ import annotations

from typing import Any, Dict, List, Mapping, NamedTuple, Optional, Tuple

from . import _abi, _config, _device, _memory, _views
from ._constants import LOSS_SLOTS, STAT_SLOTS, Backward, Forward, Loss
from ._library import InvalidState


class Dims(NamedTuple):
    """What a call's arrays must fit: the widths are 0 where there is no such array."""

    dtype: str
    d_model: int  # of x
    d_out: int  # of y
    d_gate: int  # of gate_x
    num_experts: int
    groups: int = 0  # groups of a primary gate
    device: Optional[int] = None  # the GPU they are on; None: the host

    @property
    def real(self) -> str:
        """The dtype of logits, noise, weights, losses and their gradients."""
        return _memory.real(self.dtype)

    def dtype_of(self, name: str) -> str:
        """The dtype of an argument: tokens and their gradients are of the layer's own."""
        tokens = ("x", "gate_x", "y", "dx", "dy", "d_gate_x")
        return self.dtype if name in tokens else self.real


_FORWARD_FIELDS = ("flags", "tokens", "token_first", "step", "plan_use", "top_k", "capacity")


class ForwardCall:
    """One forward's arguments; `keep` holds the memory that must stay until they are used."""

    def __init__(self, dims: Dims, fields: Mapping[str, Any], arrays: Tuple[str, ...]) -> None:
        for name in fields:
            if name not in _FORWARD_FIELDS:
                raise _config.unknown("moe_forward_args", name, _FORWARD_FIELDS + arrays)
        self.dims = dims
        self.args = _config.make(_abi.ForwardArgs, fields)
        self.keep: List[Any] = []
        self.remembered: Dict[str, _memory.Memory] = {}  # what the pass will look at again
        self.tokens: Optional[int] = int(fields["tokens"]) if "tokens" in fields else None
        self.y: Any = None

    def matrix(self, name: str, source: Any, width: int, field: str = "") -> None:
        """An input of T rows; the first one says what T is."""
        if source is None:
            return
        if width == 0:
            raise ValueError(f"{name} is given and this call has no use for it")
        memory, count, stride = _memory.matrix(
            name, source, self.dims.dtype_of(name), self.tokens, width, device=self.dims.device
        )
        self.tokens = count
        setattr(self.args, name, memory.address)
        setattr(self.args, (field or name) + "_stride", stride)
        self.keep.append(memory)
        if name in ("x", "gate_x"):
            self.remembered[name] = memory

    def options(
        self,
        token_mask: Any,
        group_begin: Any,
        token_key: Any,
        loss_weights: Any,
        losses_out: Any,
        stats_out: Any,
    ) -> None:
        """The arrays that are no matrices; `tokens` is known by now. group_begin and loss_weights
        are the host's everywhere."""
        args, keep, device = self.args, self.keep, self.dims.device
        tokens = self.tokens = self.tokens or 0
        args.tokens = tokens
        if token_mask is not None:
            wanted = ["uint8", "bool"]
            keep.append(_memory.vector("token_mask", token_mask, wanted, tokens, device=device))
            args.token_mask = keep[-1].address
        if group_begin is not None:
            keep.append(_memory.vector("group_begin", group_begin, ["int64"], None))
            args.group_begin = keep[-1].address
            args.groups = keep[-1].size - 1
        if token_key is not None:
            keep.append(_memory.vector("token_key", token_key, ["int64"], tokens, device=device))
            args.token_key = keep[-1].address
        if loss_weights is not None:
            keep.append(loss_vector("loss_weights", loss_weights, "float64", 0.0))
            args.loss_weights = keep[-1].address
        for name, source, slots in (
            ("losses_out", losses_out, LOSS_SLOTS),
            ("stats_out", stats_out, STAT_SLOTS),
        ):
            if source is not None:
                wanted = [self.dims.real]
                keep.append(_memory.vector(name, source, wanted, slots, True, device))
                setattr(args, name, keep[-1].address)

    def output(self, y: Any, like: Any) -> None:
        """Where y goes: the caller's array, or a new one shaped as x."""
        args, dims = self.args, self.dims
        if y is None:
            if args.flags & Forward.RECOMPUTE:
                return
            if args.flags & Forward.ADD:
                raise ValueError("y must be given with Forward.ADD")
            shape = tuple(getattr(like, "shape", ()))
            rows = shape[:-1] if len(shape) > 1 else (self.tokens or 0,)
            y = _new("y", like, (*rows, dims.d_out), dims)
        memory, _, stride = _memory.matrix(
            "y", y, dims.dtype, self.tokens, dims.d_out, True, dims.device
        )
        self.keep.append(memory)
        args.y, args.y_stride = memory.address, stride
        self.y = y


class BackwardCall:
    """One backward's arguments, for a forward of `tokens` tokens."""

    def __init__(self, dims: Dims, tokens: int, flags: int) -> None:
        self.dims = dims
        self.tokens = tokens
        self.args = _config.make(_abi.BackwardArgs, {"flags": flags})
        self.keep: List[Any] = []
        self.dx: Any = None
        self.has_moved = False

    def matrix(
        self, name: str, source: Any, width: int, writable: bool, field: str = ""
    ) -> Optional[_memory.Memory]:
        """An array of T rows, in or out."""
        if source is None:
            return None
        if width == 0:
            raise ValueError(f"{name} is given and this call has no use for it")
        dims = self.dims
        memory, _, stride = _memory.matrix(
            name, source, dims.dtype_of(name), self.tokens, width, writable, dims.device
        )
        self.keep.append(memory)
        setattr(self.args, name, memory.address)
        setattr(self.args, (field or name) + "_stride", stride)
        return memory

    def moved(self, name: str, source: Any, width: int, before: bool) -> None:
        """x or gate_x at a new address; `before`: whether the forward had it."""
        if source is not None and not before:
            raise InvalidState(f"{name} is given and the forward had none")
        self.has_moved = self.has_moved or source is not None
        self.matrix(name, source, width, False)

    def options(self, loss_grad: Any, entry_weight_grad: Any, entries: int, writable: bool) -> None:
        """The vectors."""
        if loss_grad is not None:
            real, device = self.dims.real, self.dims.device
            self.keep.append(loss_vector("loss_grad", loss_grad, real, 1.0, device))
            self.args.loss_grad = self.keep[-1].address
        if entry_weight_grad is not None:
            wanted = [self.dims.real]
            memory = _memory.vector(
                "entry_weight_grad", entry_weight_grad, wanted, entries, writable, self.dims.device
            )
            self.keep.append(memory)
            self.args.entry_weight_grad = memory.address

    def remember(self, kept: Dict[str, Any]) -> None:
        """The pass looks at an x that moved from now on."""
        if self.has_moved:
            kept.setdefault("moved", []).append(self.keep)

    def gradient(
        self, dx: Any, width: int, like: Optional[Tuple[int, ...]], dy: Any = None
    ) -> None:
        """Where dx goes: the caller's array, a new one of dy's kind, or nowhere."""
        if self.args.flags & Backward.SKIP_DX or width == 0:
            return
        if dx is None:
            if self.args.flags & Backward.ADD_DX:
                raise ValueError("dx must be given with Backward.ADD_DX")
            shape = like if like and len(like) > 1 else (self.tokens, width)
            dx = _new("dx", dy, tuple(shape), self.dims)
        self.matrix("dx", dx, width, True)
        self.dx = dx


def _new(name: str, like: Any, shape: Tuple[int, ...], dims: Dims) -> Any:
    if dims.device is not None:
        return _device.new_like(name, like, shape)
    return _views.zeros(shape, dims.dtype)


def loss_vector(
    name: str, source: Any, dtype: str, default: float, device: Optional[int] = None
) -> _memory.Memory:
    """A number for each loss: an array of all slots, or a mapping from a loss to its number."""
    if not isinstance(source, Mapping):
        return _memory.vector(name, source, [dtype], LOSS_SLOTS, device=device)
    if device is not None:
        raise TypeError(f"{name} must be an array on the GPU: the call reads it there")
    array = _views.zeros((LOSS_SLOTS,), dtype)
    for slot in range(len(Loss)):
        array[slot] = default
    for loss, value in source.items():
        try:
            slot = Loss[loss.upper()] if isinstance(loss, str) else Loss(loss)
        except (KeyError, ValueError):
            known = ", ".join(member.lower() for member in Loss.__members__)
            raise ValueError(f"{name} has no loss {loss!r}; there are {known}") from None
        array[slot] = value
    return _memory.describe(name, array, [dtype])
