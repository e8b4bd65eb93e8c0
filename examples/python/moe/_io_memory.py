"""Element types of files, and host arrays that hold them.

numpy has no bfloat16 and no 8-bit floats: their bits go into uint16 and uint8. Arrays of types that
know them are read and written too: PyTorch's by DLPack, those of ml_dtypes by their bits.
"""

from __future__ import annotations

import enum
from typing import Any, Dict, Optional, Sequence, Tuple

from . import _memory, _views
from ._constants import DType, FileDType

NAMES: Dict[int, str] = {
    **{int(dtype): name for dtype, name in _memory.NAMES.items()},
    FileDType.BOOL: "bool",
    FileDType.U8: "uint8",
    FileDType.I8: "int8",
    FileDType.U16: "uint16",
    FileDType.I16: "int16",
    FileDType.U32: "uint32",
    FileDType.U64: "uint64",
    FileDType.F8_E4M3: "float8_e4m3fn",
    FileDType.F8_E5M2: "float8_e5m2",
    FileDType.F8_E8M0: "float8_e8m0fnu",
    FileDType.C64: "complex64",
}
CODES: Dict[str, int] = {name: int(code) for code, name in NAMES.items()}
# What holds the bits of the types that numpy lacks.
BITS = {"bfloat16": "uint16", "float8_e4m3fn": "uint8", "float8_e5m2": "uint8",
        "float8_e8m0fnu": "uint8"}  # fmt: skip
# What can be saved and converted.
HOST = [_memory.NAMES[dtype] for dtype in DType]


def dtype_name(what: str, dtype: Any) -> str:
    """The name of an element type that is given by name, as a constant or as a type of numpy."""
    if isinstance(dtype, enum.IntEnum):
        return NAMES[dtype]
    if not isinstance(dtype, str):
        try:
            dtype = _views.numpy.dtype(dtype).name
        except (AttributeError, TypeError):
            raise TypeError(f"{what} must be the name of a dtype, not {dtype!r}") from None
    if dtype not in CODES:
        raise ValueError(f"{what} is {dtype!r}; it can be {', '.join(CODES)}")
    return str(dtype)


def zeros(what: str, shape: Tuple[int, ...], dtype: Any) -> Any:
    """A new array for elements of this type, or for their bits; of numpy's own type if given so."""
    name = dtype_name(what, dtype)
    if _views.numpy is not None:
        plain = isinstance(dtype, (str, enum.IntEnum))
        return _views.numpy.zeros(shape, BITS.get(name, name) if plain else dtype)
    if name in ("float16", "complex64"):
        raise TypeError(f"{what}: an array of {name} needs numpy, or give out=")
    return _views.zeros(shape, BITS.get(name, name))


def describe(
    what: str,
    source: Any,
    dtypes: Sequence[str],
    shape: Optional[Tuple[int, ...]] = None,
    writable: bool = False,
) -> _memory.Memory:
    """A contiguous host array of one of `dtypes`, of this shape if one is wanted."""
    name = str(getattr(getattr(source, "dtype", None), "name", ""))
    if name in BITS and hasattr(source, "view"):  # of ml_dtypes, which no buffer carries
        memory = _memory.describe(what, source.view(BITS[name]), [BITS[name]], writable)
        memory.dtype, memory.keep = name, (memory.keep, source)
        source = memory
    memory = _memory.describe(what, source, dtypes, writable)
    if shape is not None and memory.shape != shape:
        raise ValueError(f"{what} has shape {memory.shape}; wanted {shape}")
    steps = zip(memory.shape, memory.strides, _memory.contiguous(memory.shape))
    if memory.size and any(n > 1 and step != plain for n, step, plain in steps):
        raise ValueError(
            f"{what}: shape {memory.shape} with strides {memory.strides} is not contiguous"
        )
    return memory
