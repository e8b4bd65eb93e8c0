"""Memory of a GPU: arrays that show where it is, streams, and copies to the host.

Nothing here needs a package: arrays speak the CUDA array interface, and copies go through the
runtime that libmoe_cuda has loaded.
"""

from __future__ import annotations

import ctypes
from typing import Any, Dict, Optional, Tuple

from . import _views
from ._handle import Handle
from ._library import DeviceFailed, load_cuda

# The array interface has no bfloat16: its bits are 16-bit integers.
_TYPES: Dict[str, str] = {"float32": "<f4", "float64": "<f8", "float16": "<f2", "bfloat16": "<i2",
                          "int32": "<i4", "int64": "<i8", "uint8": "|u1"}  # fmt: skip
_COPY_DEFAULT = 4  # cudaMemcpyDefault: the runtime knows which side is where


def stream_of(stream: Any) -> Optional[int]:
    """A stream as the library takes it: a number, or an object of PyTorch or CuPy that has one."""
    if stream is None:
        return None
    for name in ("cuda_stream", "ptr"):
        if hasattr(stream, name):
            stream = getattr(stream, name)
    if not isinstance(stream, int) or stream < 0:
        raise TypeError(f"stream must be a cudaStream_t or have .cuda_stream, not {stream!r}")
    return stream or None


def _runtime(name: str, *arguments: Any) -> None:
    runtime = load_cuda()  # the symbols of what it is linked with are found through it
    status = getattr(runtime, name)(*arguments)
    if status != 0:
        words = runtime.cudaGetErrorString
        words.restype = ctypes.c_char_p
        raise DeviceFailed(f"{name}: {words(status).decode()}")


def copy(target: int, source: int, size: int, stream: Optional[int]) -> None:
    """Copy bytes between any two places, behind what is on the stream; they are there after it."""
    _runtime("cudaStreamSynchronize", ctypes.c_void_p(stream))
    arguments = ctypes.c_void_p(target), ctypes.c_void_p(source), ctypes.c_size_t(size)
    _runtime("cudaMemcpy", *arguments, _COPY_DEFAULT)


class DeviceArray:
    """Memory of the library on a GPU, contiguous. It keeps what it looks into.

    It has the CUDA array interface, so that torch.as_tensor(array, device="cuda") and cupy.asarray
    are the same memory; bfloat16 shows as int16 there: .view(torch.bfloat16).
    """

    def __init__(
        self, handle: Handle, address: int, shape: Tuple[int, ...], dtype: str, writable: bool
    ) -> None:
        self._handle = handle
        self.address = address
        self.shape = shape
        self.dtype = dtype
        self.writable = writable

    @property
    def __cuda_array_interface__(self) -> Dict[str, Any]:
        return {
            "shape": self.shape,
            "typestr": _TYPES[self.dtype],
            "data": (self.address, not self.writable),
            "version": 3,
        }

    def _bytes(self) -> int:
        return _views.size_of(self.shape, self.dtype)

    def host(self, stream: Any = None) -> Any:
        """A copy in the host's memory, of what is there after all that is on the stream."""
        array = _views.zeros(self.shape, self.dtype)
        if self._bytes():
            target = _views.address_of(array)
            copy(target, self.address, self._bytes(), stream_of(stream))
        return array

    def set(self, source: Any, stream: Any = None) -> None:
        """Copy an array of the host here, after all that is on the stream."""
        from . import _memory

        if not self.writable:
            raise ValueError("this array is read-only")
        memory = _memory.describe("source", source, [self.dtype])
        if memory.shape != self.shape or memory.strides != _memory.contiguous(self.shape):
            raise ValueError(f"source has shape {memory.shape}; wanted contiguous {self.shape}")
        if self._bytes():
            copy(self.address, memory.address, self._bytes(), stream_of(stream))

    def __len__(self) -> int:
        return self.shape[0]

    def __repr__(self) -> str:
        return f"<moe.DeviceArray {self.shape} {self.dtype} at {self.address:#x}>"


def new_like(name: str, like: Any, shape: Tuple[int, ...]) -> Any:
    """An array for a result, of the program's kind and on its device."""
    if hasattr(like, "new_zeros"):  # PyTorch
        return like.new_zeros(shape)
    raise ValueError(f"{name} must be given: the package makes no arrays on a GPU")
