"""Memory of the program: where an array lies, what it holds, and whether the library may use it.

describe() takes anything with the buffer protocol (numpy arrays, memoryview, array.array,
bytearray, ctypes arrays) or with DLPack (PyTorch, JAX, CuPy's host arrays). It never copies. The
Memory it gives keeps the array alive and, for buffers, locked against resizing. For a context on a
GPU it takes PyTorch's CUDA tensors and anything with the CUDA array interface or DLPack on such a
device, and nothing of the host.
"""

from __future__ import annotations

import ctypes
from typing import Any, List, Optional, Sequence, Tuple

from ._constants import DType

Shape = Tuple[int, ...]

NAMES = {
    DType.F32: "float32",
    DType.F64: "float64",
    DType.BF16: "bfloat16",
    DType.F16: "float16",
    DType.I32: "int32",
    DType.I64: "int64",
}
# What numpy has no type for lies in arrays of this one, bit for bit.
BITS = {"bfloat16": "uint16"}
SIZES = {"float32": 4, "float64": 8, "bfloat16": 2, "float16": 2, "int32": 4, "int64": 8,
         "uint8": 1, "bool": 1}  # fmt: skip


def real(dtype: str) -> str:
    """What a layer of this dtype computes with: its logits, weights and losses are of that."""
    return "float32" if dtype in ("bfloat16", "float16") else dtype


def accepted(dtype: str) -> List[str]:
    """The dtypes of arrays that can hold this one."""
    return [dtype, BITS[dtype]] if dtype in BITS else [dtype]


class Memory:
    """An array of the program; strides count elements."""

    def __init__(
        self, address: int, shape: Shape, strides: Shape, dtype: str, writable: bool, keep: Any
    ) -> None:
        self.address = address
        self.shape = shape
        self.strides = strides
        self.dtype = dtype
        self.writable = writable
        self.keep = keep

    @property
    def size(self) -> int:
        """The number of elements."""
        count = 1
        for length in self.shape:
            count *= length
        return count

    def row_stride(self, name: str, width: int) -> Tuple[int, int]:
        """This array as rows of `width` elements: how many, and the elements between them.

        Leading dimensions are folded into one; that needs them to be evenly spaced. A flat array
        is cut into rows.
        """
        shape, strides = self.shape, self.strides
        if len(shape) == 1 and width > 0 and shape[0] % width == 0 and strides[0] == 1:
            return shape[0] // width, width
        if not shape or shape[-1] != width:
            raise ValueError(f"{name} has shape {shape}; its last dimension must be {width}")
        if width > 1 and strides[-1] != 1:
            raise ValueError(
                f"{name}: elements of a row lie {strides[-1]} apart; they must be contiguous"
            )
        rows, stride = 1, 0
        for length, step in zip(reversed(shape[:-1]), reversed(strides[:-1])):
            if length != 1:
                if rows > 1 and step != stride * rows:
                    raise ValueError(
                        f"{name}: shape {shape} with strides {strides} is not a matrix of evenly "
                        "spaced rows"
                    )
                stride = step if rows == 1 else stride
            rows *= length
        if rows > 1 and stride < width:
            raise ValueError(f"{name}: rows of {width} elements lie {stride} elements apart")
        return rows, stride if rows > 1 else width


# ---- the buffer protocol ------------------------------------------------------------------------


class _PyBuffer(ctypes.Structure):
    _fields_ = [
        ("buf", ctypes.c_void_p),
        ("obj", ctypes.c_void_p),
        ("len", ctypes.c_ssize_t),
        ("itemsize", ctypes.c_ssize_t),
        ("readonly", ctypes.c_int),
        ("ndim", ctypes.c_int),
        ("format", ctypes.c_char_p),
        ("shape", ctypes.POINTER(ctypes.c_ssize_t)),
        ("strides", ctypes.POINTER(ctypes.c_ssize_t)),
        ("suboffsets", ctypes.POINTER(ctypes.c_ssize_t)),
        ("internal", ctypes.c_void_p),
    ]


_RECORDS_RO = 0x18 | 0x04  # strides and format, writable or not
_get_buffer = ctypes.pythonapi.PyObject_GetBuffer
_get_buffer.argtypes = [ctypes.py_object, ctypes.POINTER(_PyBuffer), ctypes.c_int]
_get_buffer.restype = ctypes.c_int
_release_buffer = ctypes.pythonapi.PyBuffer_Release
_release_buffer.argtypes = [ctypes.POINTER(_PyBuffer)]
_release_buffer.restype = None


class _Buffer:
    """A buffer that is held until this object goes."""

    def __init__(self, source: Any) -> None:
        self.view = _PyBuffer()
        self.held = False
        _get_buffer(source, ctypes.byref(self.view), _RECORDS_RO)  # raises what the source raises
        self.held = True

    def __del__(self, release: Any = _release_buffer, byref: Any = ctypes.byref) -> None:
        if self.held:
            self.held = False
            release(byref(self.view))


def _format_dtype(text: str, itemsize: int) -> str:
    code = text[1:] if text[:1] in "@=<" else text
    if code in ("i", "l", "q", "n"):
        return f"int{8 * itemsize}"
    if code in ("I", "L", "Q", "N", "H"):
        return f"uint{8 * itemsize}"
    known = {"f": "float32", "d": "float64", "e": "float16", "B": "uint8", "c": "uint8",
             "b": "int8", "h": "int16", "?": "bool", "Zf": "complex64"}  # fmt: skip
    return known.get(code, f"format {text!r}")


def _from_buffer(name: str, source: Any) -> Memory:
    try:
        buffer = _Buffer(source)
    except (BufferError, ValueError) as error:
        raise type(error)(f"{name}: {error}") from None
    view = buffer.view
    dims = view.ndim
    shape = tuple(view.shape[i] for i in range(dims))
    size = view.itemsize
    text = view.format.decode() if view.format else "B"
    strides = contiguous(shape)  # what no strides mean
    if view.strides and size:
        steps = [view.strides[i] for i in range(dims)]
        if any(step % size for step in steps):
            raise ValueError(f"{name}: strides of {steps} bytes split elements of {size}")
        strides = tuple(step // size for step in steps)
    dtype = _format_dtype(text, size)
    return Memory(view.buf or 0, shape, strides, dtype, not view.readonly, buffer)


# ---- DLPack -------------------------------------------------------------------------------------


class _DLTensor(ctypes.Structure):
    _fields_ = [
        ("data", ctypes.c_void_p),
        ("device_type", ctypes.c_int32),
        ("device_id", ctypes.c_int32),
        ("ndim", ctypes.c_int32),
        ("code", ctypes.c_uint8),
        ("bits", ctypes.c_uint8),
        ("lanes", ctypes.c_uint16),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
    ]


class _DLVersioned(ctypes.Structure):
    _fields_ = [
        ("major", ctypes.c_uint32),
        ("minor", ctypes.c_uint32),
        ("manager", ctypes.c_void_p),
        ("deleter", ctypes.c_void_p),
        ("flags", ctypes.c_uint64),
        ("tensor", _DLTensor),
    ]


_HOST_DEVICES = (1, 3)  # kDLCPU, and kDLCUDAHost: page-locked memory of the host
_CODES = {0: "int", 1: "uint", 2: "float", 4: "bfloat", 5: "complex", 6: "bool"}
_capsule_pointer = ctypes.pythonapi.PyCapsule_GetPointer
_capsule_pointer.argtypes = [ctypes.py_object, ctypes.c_char_p]
_capsule_pointer.restype = ctypes.c_void_p
_capsule_is = ctypes.pythonapi.PyCapsule_IsValid
_capsule_is.argtypes = [ctypes.py_object, ctypes.c_char_p]
_capsule_is.restype = ctypes.c_int


def _capsule_of(name: str, source: Any, device: Optional[int]) -> Any:
    kind, number = source.__dlpack_device__()
    if device is None and int(kind) not in _HOST_DEVICES:
        raise ValueError(
            f"{name} is on device type {int(kind)} number {number}; the library computes on the CPU"
        )
    if device is not None and int(kind) == _CUDA_DEVICES[0] and number != device:
        raise ValueError(f"{name} is on device {number}; the context is on device {device}")
    # -1: the producer does not wait; the order is that of the call's stream.
    stream = {} if device is None else {"stream": -1}
    try:
        try:
            return source.__dlpack__(max_version=(1, 0), **stream)
        except TypeError:
            return source.__dlpack__(**stream)  # from before DLPack 1.0
    except (BufferError, RuntimeError) as error:
        raise type(error)(f"{name}: {error}") from error


def _from_dlpack(name: str, source: Any, device: Optional[int] = None) -> Memory:
    # The capsule is looked into and never renamed, so that its own destructor calls the deleter
    # when the Memory that keeps it goes.
    capsule = _capsule_of(name, source, device)
    writable = True
    if _capsule_is(capsule, b"dltensor_versioned"):
        address = _capsule_pointer(capsule, b"dltensor_versioned")
        versioned = _DLVersioned.from_address(address)
        if versioned.major != 1:
            raise BufferError(f"{name}: DLPack {versioned.major}.{versioned.minor} is not known")
        writable = not versioned.flags & 1
        tensor = versioned.tensor
    else:
        tensor = _DLTensor.from_address(_capsule_pointer(capsule, b"dltensor"))
    shape = tuple(tensor.shape[i] for i in range(tensor.ndim))
    if tensor.strides:
        strides = tuple(tensor.strides[i] for i in range(tensor.ndim))
    else:
        strides = contiguous(shape)
    dtype = _CODES.get(tensor.code, f"code {tensor.code} ") + str(tensor.bits)
    if tensor.lanes != 1:
        dtype += f"x{tensor.lanes}"
    if dtype == "bool8":
        dtype = "bool"
    address = (tensor.data or 0) + tensor.byte_offset
    return Memory(address, shape, strides, dtype, writable, (capsule, source))


# ---- memory of a GPU ----------------------------------------------------------------------------

_CUDA_DEVICES = (2, 13)  # kDLCUDA, and kDLCUDAManaged


def _from_tensor(name: str, source: Any, device: int) -> Memory:
    """PyTorch's, whose array interface knows no bfloat16."""
    if source.requires_grad:
        raise BufferError(f"{name} requires a gradient; give its .detach()")
    if source.device.index != device:
        raise ValueError(f"{name} is on {source.device}; the context is on device {device}")
    dtype = str(source.dtype).rpartition(".")[2]
    shape, strides = tuple(source.shape), tuple(source.stride())
    return Memory(source.data_ptr(), shape, strides, dtype, True, source)


def _from_interface(name: str, source: Any) -> Memory:
    """The CUDA array interface. It does not say which device: the library looks."""
    described = source.__cuda_array_interface__
    shape = tuple(described["shape"])
    text = described["typestr"]
    size, steps = int(text[2:]), described.get("strides")
    if any(step % size for step in steps or ()):
        raise ValueError(f"{name}: strides of {steps} bytes split elements of {size}")
    strides = tuple(step // size for step in steps) if steps else contiguous(shape)
    kinds = {"f": "float", "i": "int", "u": "uint", "c": "complex"}
    if text[0] != ">" and text[1] in kinds:
        dtype = f"{kinds[text[1]]}{8 * size}"
        dtype = "uint16" if dtype == "int16" else dtype  # bits of bfloat16, as of DeviceArray
    else:
        dtype = {"|b1": "bool", "<V2": "bfloat16"}.get(text, f"format {text!r}")
    address, read_only = described["data"]
    return Memory(address or 0, shape, strides, dtype, not read_only, source)


def _from_device(name: str, source: Any, device: int) -> Memory:
    if getattr(source, "is_cuda", False) and hasattr(source, "data_ptr"):
        return _from_tensor(name, source, device)
    if getattr(source, "__cuda_array_interface__", None) is not None:
        return _from_interface(name, source)
    if hasattr(source, "__dlpack__") and hasattr(source, "__dlpack_device__"):
        kind, number = source.__dlpack_device__()
        if int(kind) in _CUDA_DEVICES:
            return _from_dlpack(name, source, device)
    raise TypeError(
        f"{name} must be an array on the GPU (a CUDA tensor, the CUDA array interface or DLPack), "
        f"not {type(source).__name__} of the host: the context is on device {device}"
    )


# ---- what the rest of the package calls ---------------------------------------------------------


def contiguous(shape: Sequence[int]) -> Shape:
    """The strides of a row-major array of this shape."""
    strides: List[int] = []
    step = 1
    for length in reversed(shape):
        strides.insert(0, step)
        step *= length
    return tuple(strides)


def describe(
    name: str,
    source: Any,
    dtypes: Sequence[str],
    writable: bool = False,
    device: Optional[int] = None,
) -> Memory:
    """Where `source` lies, if it holds one of `dtypes` and may be written when that is wanted.
    device  the GPU it must be on; None: it must be the host's
    """
    if isinstance(source, Memory):
        memory = source
    elif device is not None:
        memory = _from_device(name, source, device)
    else:
        try:
            memory = _from_buffer(name, source)
        except TypeError:
            if not (hasattr(source, "__dlpack__") and hasattr(source, "__dlpack_device__")):
                if hasattr(source, "__cuda_array_interface__"):
                    raise ValueError(
                        f"{name} is on a GPU; the library computes on the CPU"
                    ) from None
                raise TypeError(
                    f"{name} must be an array (buffer protocol or DLPack), not "
                    f"{type(source).__name__}"
                ) from None
            memory = _from_dlpack(name, source)
    if memory.dtype not in dtypes:
        wanted = " or ".join(dtypes)
        raise TypeError(f"{name} holds {memory.dtype}, shape {memory.shape}; wanted {wanted}")
    if writable and not memory.writable:
        raise ValueError(f"{name} is read-only and would be written to")
    return memory


def vector(
    name: str,
    source: Any,
    dtypes: Sequence[str],
    length: Optional[int],
    writable: bool = False,
    device: Optional[int] = None,
) -> Memory:
    """A contiguous array of `length` elements, in one dimension."""
    memory = describe(name, source, dtypes, writable, device)
    if len(memory.shape) != 1 or (length is not None and memory.shape[0] != length):
        wanted = "one dimension" if length is None else f"({length},)"
        raise ValueError(f"{name} has shape {memory.shape}; wanted {wanted}")
    if memory.shape[0] > 1 and memory.strides[0] != 1:
        raise ValueError(f"{name}: elements lie {memory.strides[0]} apart; must be contiguous")
    return memory


def matrix(
    name: str,
    source: Any,
    dtype: str,
    rows: Optional[int],
    width: int,
    writable: bool = False,
    device: Optional[int] = None,
) -> Tuple[Memory, int, int]:
    """Rows of `width` elements: the memory, how many rows, and the stride between them."""
    memory = describe(name, source, accepted(dtype), writable, device)
    count, stride = memory.row_stride(name, width)
    if rows is not None and count != rows:
        raise ValueError(f"{name} has shape {memory.shape}: {count} rows; wanted {rows}")
    return memory, count, stride
