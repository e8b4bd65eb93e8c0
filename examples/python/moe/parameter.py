"""Parameters of a gate, a pool or a layer: their records, their memory, and binding.

A parameter's data and gradient are arrays without a copy: views of the library's memory for owned
parameters (DeviceArrays on a GPU), the program's own arrays for bound ones.
"""

from __future__ import annotations

import ctypes
from typing import Any, Dict, List, Optional, Sequence, Tuple

from . import _abi, _memory, _views
from ._constants import DType, Kind, Shard
from ._device import stream_of
from ._handle import Object, device_of
from ._library import library, new


class _Bound:
    """What a parameter is bound to: the host's objects, and the Memory that keeps them."""

    def __init__(self, data: Any, grad: Any, memory: List[Any]) -> None:
        self.data = data
        self.grad = grad
        self.memory = memory


def _normal_strides(memory: _memory.Memory) -> List[int]:
    """Strides with those of dimensions of length 1, which mean nothing, made ordinary; all 0 if the
    array is contiguous."""
    plain = _memory.contiguous(memory.shape)
    strides = [s if n > 1 else p for s, n, p in zip(memory.strides, memory.shape, plain)]
    return [0] * len(plain) if memory.size == 0 or tuple(strides) == plain else strides


class Parameter:
    """One parameter of a gate or a pool, as the library sees it at this moment."""

    def __init__(self, owner: "ParameterOwner", index: int, prefix: str) -> None:
        self._owner = owner
        self._index = index
        record = self.record
        self.local_name: str = record.name.decode()
        self.name = prefix + self.local_name
        self.shape: Tuple[int, ...] = tuple(record.shape[: record.dims])

    @property
    def record(self) -> _abi.ParameterRecord:
        """The library's record, read anew."""
        record = new(_abi.ParameterRecord)
        owner = self._owner
        owner.call(f"moe_{owner.kind}_parameter", self._index, ctypes.byref(record))
        return record

    @property
    def dtype(self) -> str:
        """The element type of the data: "float32", "float64", "bfloat16" or "float16"."""
        return _memory.NAMES[DType(self.record.data_dtype)]

    @property
    def size(self) -> int:
        """The number of elements; of an opaque parameter more than its shape has."""
        return int(self.record.element_count)

    @property
    def kind(self) -> Kind:
        """How it is trained."""
        return Kind(self.record.kind)

    @property
    def sharding(self) -> Shard:
        """How it is spread over ranks."""
        return Shard(self.record.sharding)

    @property
    def trainable(self) -> bool:
        """Whether a gradient is computed when there is memory for it."""
        return bool(self.record.trainable)

    @property
    def opaque(self) -> bool:
        """Whether the order of the elements is the library's own: data and grad are then flat, to be
        updated element by element; Experts.export_parameter gives them in the shape."""
        return bool(self.record.opaque)

    @property
    def array_shape(self) -> Tuple[int, ...]:
        """The shape of data and grad, and of an optimizer's arrays beside them."""
        return (self.size,) if self.opaque else self.shape

    @property
    def owned(self) -> bool:
        """Whether the data is the library's memory."""
        return bool(self.record.owned)

    def _array(self, which: str) -> Any:
        with self._owner.handle.busy.shared(self._owner.kind):
            bound: Optional[_Bound] = self._owner.handle.kept.get("bound " + self.local_name)
            if bound is not None:
                return getattr(bound, which)
            record = self.record
            address = getattr(record, which)
            if not address:
                return None
            dtype = _memory.NAMES[DType(getattr(record, which + "_dtype"))]
            return _views.view(self._owner.handle, address, self.array_shape, dtype, True)

    @property
    def data(self) -> Any:
        """The values: a view of the library's memory, or what was bound; None if nothing is."""
        return self._array("data")

    @property
    def grad(self) -> Any:
        """The gradient, likewise; None if none is wanted."""
        return self._array("grad")

    def bind(self, data: Any, grad: Any = None) -> None:
        """Use memory of the host. It is kept alive until the next bind().

        data  array of this shape and dtype, any strides, may be read-only; or a list or tuple with
              one array for each expert, each of shape[1:]. bfloat16 may be the bits in uint16; a
              gate's may be float32 too
        grad  the same for the gradient, writable; None: not wanted. In a list some may be None.
              float32 beside data of 16 bits, or of 16 bits too
        """
        binding = new(_abi.Binding)
        memory: List[Any] = []
        self._fill(binding, "data", data, memory)
        if grad is not None:
            self._fill(binding, "grad", grad, memory)
        self._bind(binding, _Bound(data, grad, memory))

    def unbind(self) -> None:
        """Go back to the object's own memory, whose contents are what they were."""
        self._bind(None, None)

    def _bind(self, binding: Optional[_abi.Binding], bound: Optional[_Bound]) -> None:
        owner = self._owner
        with owner.handle.busy.alone(f"the {owner.kind} of {self.name}"):
            owner.call(
                f"moe_{owner.kind}_bind",
                self._index,
                ctypes.byref(binding) if binding is not None else None,
            )
            owner.handle.kept["bound " + self.local_name] = bound

    def _fill(self, binding: _abi.Binding, which: str, source: Any, memory: List[Any]) -> None:
        """One half of a binding, data or gradient."""
        writable = which == "grad"
        name = f"{which} of {self.name}"
        strides = getattr(binding, which + "_stride")
        if not isinstance(source, (list, tuple)):
            array = self._checked(name, source, self.shape, writable)
            memory.append(array)
            setattr(binding, which, array.address)
            setattr(binding, which + "_dtype", self._code(array.dtype))
            strides[: len(array.shape)] = _normal_strides(array)
            return
        if len(source) != self.shape[0]:
            raise ValueError(f"{name} is a list of {len(source)}; wanted {self.shape[0]} experts")
        pointers = (ctypes.c_void_p * len(source))()
        first: Optional[List[int]] = None
        for e, one in enumerate(source):
            if one is None and writable:
                continue
            array = self._checked(f"{name}, expert {e},", one, self.shape[1:], writable)
            memory.append(array)
            pointers[e] = array.address
            code, own = self._code(array.dtype), _normal_strides(array)
            if first is None:
                first = own
                setattr(binding, which + "_dtype", code)
            elif code != getattr(binding, which + "_dtype"):
                raise TypeError(f"{name}: expert {e} has another dtype than the first")
            elif own != first:
                raise ValueError(f"{name}: expert {e} has other strides than the first")
        if first is not None and any(first):
            strides[1 : 1 + len(first)] = first
            strides[0] = 1  # not used, but all 0 would mean contiguous
        memory.append(pointers)
        setattr(binding, which + "_per_expert", pointers)

    def _checked(
        self, name: str, source: Any, shape: Tuple[int, ...], writable: bool
    ) -> _memory.Memory:
        own = self._element()
        wanted = _memory.accepted(own)
        if (writable or self._owner.kind == "gate") and _memory.real(own) != own:
            wanted.append(_memory.real(own))
        array = _memory.describe(name, source, wanted, writable, device_of(self._owner.handle))
        if array.shape != shape:
            raise ValueError(f"{name} has shape {array.shape}; wanted {shape}")
        return array

    def _element(self) -> str:
        """The object's dtype, which a gate's parameters need not have."""
        gate = self._owner.kind == "gate"
        return _memory.NAMES[DType(self._owner.config.dtype)] if gate else self.dtype

    def _code(self, dtype: str) -> int:
        """The library's number of an array's dtype; bits are of the object's."""
        if dtype in _memory.BITS.values():
            dtype = self._element()
        return next(int(code) for code, name in _memory.NAMES.items() if name == dtype)

    def __repr__(self) -> str:
        where = "owned" if self.owned else "bound"
        return f"<moe.Parameter {self.name} {self.shape} {self.dtype} {where}>"


class ParameterOwner(Object):
    """A gate or a pool: what has parameters of its own."""

    kind = ""

    def _parameters(self, prefix: str = "") -> Dict[str, Parameter]:
        count = getattr(library(), f"moe_{self.kind}_parameter_count")(self.handle.value)
        made: Sequence[Parameter] = [Parameter(self, i, prefix) for i in range(count)]
        return {parameter.name: parameter for parameter in made}

    @property
    def parameters(self) -> Dict[str, Parameter]:
        """The parameters by name, in the library's order."""
        return self._parameters()

    def zero_gradients(self, *, stream: Any = None) -> None:
        """Set every gradient to zero and forget which experts were touched."""
        with self.handle.busy.shared(self.kind):
            self.call(f"moe_{self.kind}_zero_gradients", stream_of(stream))

    def init_parameters(self, seed: int) -> None:
        """Give every owned parameter its first value; bound data is never written."""
        from ._config import number

        with self.handle.busy.shared(self.kind):
            self.call(f"moe_{self.kind}_init_parameters", number("seed", seed, ctypes.c_uint64))
