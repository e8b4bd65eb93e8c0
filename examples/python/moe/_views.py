"""Memory given to the host: views of what the library owns, and new arrays for results.

A view is a numpy array where numpy is installed, otherwise a memoryview; both go on through DLPack
or the buffer protocol without a copy. A view keeps the library's object alive.
"""

from __future__ import annotations

import ctypes
import importlib
from typing import Any, Dict, Optional, Sequence, Tuple

from . import _memory
from ._handle import Handle, device_of


def _optional(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError:
        return None


numpy = _optional("numpy")
_CTYPES: Dict[str, Any] = {
    "float32": ctypes.c_float,
    "float64": ctypes.c_double,
    "int32": ctypes.c_int32,
    "int64": ctypes.c_int64,
    "uint8": ctypes.c_uint8,
    "int8": ctypes.c_int8,
    "uint16": ctypes.c_uint16,
    "int16": ctypes.c_int16,
    "uint32": ctypes.c_uint32,
    "uint64": ctypes.c_uint64,
    "bool": ctypes.c_bool,
    "float16": ctypes.c_uint16,  # its bits
}
_FORMATS: Dict[str, Any] = {"float32": "f", "float64": "d", "int32": "i", "int64": "q",
                            "uint8": "B", "int8": "b", "uint16": "H", "int16": "h", "uint32": "I",
                            "uint64": "Q", "bool": "?", "float16": "e"}  # fmt: skip


class _Export:
    """Stands for one view; the Handle sees by it whether somebody still looks."""

    def __init__(self, handle: Handle) -> None:
        self.handle = handle


def size_of(shape: Sequence[int], dtype: str) -> int:
    """Bytes of an array."""
    return _count(shape) * ctypes.sizeof(_CTYPES[_memory.BITS.get(dtype, dtype)])


def _count(shape: Sequence[int]) -> int:
    count = 1
    for length in shape:
        count *= length
    return count


def view(
    handle: Handle,
    address: Optional[int],
    shape: Tuple[int, ...],
    dtype: str,
    writable: bool,
    track: bool = False,
) -> Any:
    """Contiguous memory of `handle` as an array.

    With `track` the handle counts the view among its exports: memory that a later call may move.
    Memory on a GPU is a DeviceArray.
    """
    count = _count(shape)
    if not address or count == 0:
        return zeros(shape, dtype)
    if device_of(handle) is not None:
        from ._device import DeviceArray

        there = DeviceArray(handle, address, shape, dtype, writable)
        if track:
            handle.exports.add(there)
        return there
    dtype = _memory.BITS.get(dtype, dtype)
    raw = (_CTYPES[dtype] * count).from_address(address)
    export = _Export(handle)
    raw._export = export  # everything derived from `raw` keeps it, and it keeps the handle
    if track:
        handle.exports.add(export)
    if numpy is not None:
        array = numpy.ndarray(shape, dtype, buffer=raw)
        array.flags.writeable = writable
        return array
    flat = memoryview(raw).cast("B")
    cast = flat.cast(_FORMATS[dtype], shape) if len(shape) else flat.cast(_FORMATS[dtype])
    return cast if writable else cast.toreadonly()


def borrowed(address: Optional[int], shape: Tuple[int, ...], dtype: str, writable: bool) -> Any:
    """Memory that somebody else keeps alive as an array; None if there is none."""
    dtype = _memory.BITS.get(dtype, dtype)
    if not address:
        return None
    if _count(shape) == 0:
        return zeros(shape, dtype)
    raw = (_CTYPES[dtype] * _count(shape)).from_address(address)
    if numpy is not None:
        array = numpy.ndarray(shape, dtype, buffer=raw)
        array.flags.writeable = writable
        return array
    cast = memoryview(raw).cast("B").cast(_FORMATS[dtype], shape)
    return cast if writable else cast.toreadonly()


def copy(handle: Handle, address: Optional[int], shape: Tuple[int, ...], dtype: str) -> Any:
    """The same elements in an array of their own, of the host; from a GPU behind the work of the
    last call of the pass, if the handle is of one."""
    dtype = _memory.BITS.get(dtype, dtype)
    array = zeros(shape, dtype)
    if address and _count(shape):
        if device_of(handle) is None:
            ctypes.memmove(address_of(array), address, size_of(shape, dtype))
        else:
            from ._device import copy as fetch

            pass_ = handle.kept.get("pass", handle)
            stream = pass_.kept.get("stream")
            fetch(address_of(array), address, size_of(shape, dtype), stream)
    return array


def zeros(shape: Tuple[int, ...], dtype: str) -> Any:
    """A new array: numpy's, or a memoryview of a bytearray."""
    dtype = _memory.BITS.get(dtype, dtype)
    if numpy is not None:
        return numpy.zeros(shape, dtype)
    size = size_of(shape, dtype)
    if size == 0:  # memoryview casts no empty array to several dimensions
        return memoryview(bytearray()).cast(_FORMATS[dtype])
    return memoryview(bytearray(size)).cast(_FORMATS[dtype], shape)


def address_of(array: Any) -> int:
    """Where an array made by zeros() lies."""
    if numpy is not None:
        return int(array.ctypes.data)
    return ctypes.addressof(ctypes.c_char.from_buffer(array.cast("B")))

