"""Safetensors files of libmoe_io: moe/io.h, first part; and text for its calls."""

from __future__ import annotations

import contextlib
import ctypes
import os
from collections.abc import Mapping as MappingABC
from typing import Any, Iterator, List, Mapping, NamedTuple, Optional, Tuple, Union

from . import _abi, _io_memory
from ._handle import Handle, Object, destroy_deferred, refuse_inside_callback
from ._library import check, function, new

Path = Union[str, "os.PathLike[str]"]


def utf8(what: str, text: Any) -> bytes:
    """Text for the library, which would end it at a NUL."""
    if not isinstance(text, str):
        raise TypeError(f"{what} must be a str, not {text!r}")
    if "\0" in text:
        raise ValueError(f"{what} is {text!r}: NUL is not possible")
    return text.encode(errors="surrogateescape")


def path_bytes(path: Path) -> bytes:
    """A path as the system has it."""
    return utf8("path", os.fsdecode(path))


def run(name: str, *arguments: Any) -> None:
    """A call that is of no object."""
    refuse_inside_callback()
    destroy_deferred()
    check(function(name)(*arguments))


class Entry(NamedTuple):
    """One tensor of a file. dtype is numpy's name or, where it has none, that of ml_dtypes:
    "bfloat16", "float8_e4m3fn". Its bytes are at `offset` of the file at `path`."""

    name: str
    shape: Tuple[int, ...]
    dtype: str
    bytes: int
    path: str
    offset: int


class _Metadata(MappingABC):  # type: ignore[type-arg]
    """The metadata strings of a file by key."""

    def __init__(self, file: "File") -> None:
        self._file = file

    def __len__(self) -> int:
        return int(function("moe_file_metadata_count")(self._file.handle.value))

    def __iter__(self) -> Iterator[str]:
        key, value = ctypes.c_char_p(), ctypes.c_char_p()
        for i in range(len(self)):
            self._file.call("moe_file_metadata", i, ctypes.byref(key), ctypes.byref(value))
            yield (key.value or b"").decode()

    def __getitem__(self, key: str) -> str:
        handle = self._file.handle
        found = function("moe_file_metadata_find")(handle.value, utf8("key", key))
        if found is None:
            raise KeyError(key)
        text: bytes = found
        return text.decode()

    def __repr__(self) -> str:
        return repr(dict(self))


class File(Object, MappingABC):  # type: ignore[type-arg]
    """An open .safetensors file, a sharded checkpoint by its .index.json, or a directory with one
    of the two: a mapping from names, in their order, to arrays that are read when asked for.

    Headers are checked whole before this returns; CorruptData names what does not hold. Any number
    of threads may read one file.
    """

    def __init__(self, path: Path) -> None:
        self.path = os.fsdecode(path)
        self._handle = Handle("file").create("moe_file_open", path_bytes(path))

    def __len__(self) -> int:
        return int(function("moe_file_count")(self.handle.value))

    def __iter__(self) -> Iterator[str]:
        for i in range(len(self)):
            yield self._entry(i).name

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and "\0" not in name and self._find(name) >= 0

    def __getitem__(self, name: str) -> Any:
        return self.read(name)

    def _find(self, name: str) -> int:
        return int(function("moe_file_find")(self.handle.value, utf8("name", name)))

    def _index(self, name: str) -> int:
        index = self._find(name)
        if index < 0:
            raise KeyError(f"{self.path} has no tensor {name!r}")
        return index

    def _entry(self, index: int) -> Entry:
        record = new(_abi.FileRecord)
        handle = self.handle  # the record's strings are its
        self.call("moe_file_entry", index, ctypes.byref(record))
        made = Entry(
            record.name.decode(), tuple(record.shape[: record.dims]),
            _io_memory.NAMES[record.dtype], record.bytes, os.fsdecode(record.path), record.offset,
        )  # fmt: skip
        del handle
        return made

    def entry(self, name: str) -> Entry:
        """Shape, dtype and place of a tensor, without reading it."""
        return self._entry(self._index(name))

    def entries(self) -> List[Entry]:
        """The same of all tensors, in order of name."""
        return [self._entry(i) for i in range(len(self))]

    def read(
        self,
        name: str,
        first: int = 0,
        count: Optional[int] = None,
        *,
        dtype: Any = None,
        out: Any = None,
    ) -> Any:
        """A tensor, or `count` of its first dimension from `first` on; `out` or a new array.

        dtype  what is wanted, "float32" or a type of numpy: the tensor's own, or converted among
               float32, float64, bfloat16 and float16, and between int32 and int64. None: that of
               `out`, or the tensor's own, but bfloat16 as float32. Bits of bfloat16 are in uint16,
               8-bit floats in uint8
        out    contiguous array of the shape wanted
        """
        index = self._index(name)
        entry = self._entry(index)
        length = entry.shape[0] if entry.shape else 1
        count = length - first if count is None else count
        if first < 0 or count < 0 or first + count > length or (not entry.shape and count != 1):
            raise ValueError(
                f"first is {first} and count {count}, the first dimension of {name} is {length}"
            )
        shape = (count, *entry.shape[1:]) if entry.shape else ()
        if dtype is None and out is None:
            dtype = "float32" if entry.dtype == "bfloat16" else entry.dtype
        allowed = list(_io_memory.CODES)
        if dtype is not None:
            wanted = _io_memory.dtype_name("dtype", dtype)
            allowed = [wanted, _io_memory.BITS.get(wanted, wanted)]
        if out is None:
            out = _io_memory.zeros(name, shape, dtype)
        memory = _io_memory.describe("out", out, allowed, shape, True)
        code = _io_memory.CODES[memory.dtype if dtype is None else wanted]
        self.call("moe_file_read", index, memory.address, first, count, code)
        return out

    @property
    def metadata(self) -> Mapping[str, str]:
        """The metadata strings; of a sharded checkpoint those of its index."""
        return _Metadata(self)

    # A file is one object, and comparing it reads nothing.
    __eq__ = object.__eq__
    __hash__ = object.__hash__

    def __enter__(self) -> "File":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        state = "closed" if self.closed else f"{len(self)} tensors"
        return f"<moe.io.File {self.path!r} {state}>"


@contextlib.contextmanager
def opening(file: Union[File, Path]) -> Iterator[File]:
    """A file as it is, or opened for as long as it is used."""
    if isinstance(file, File):
        yield file
    else:
        with File(file) as own:
            yield own
