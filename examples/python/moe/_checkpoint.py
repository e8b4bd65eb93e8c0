"""Checkpoints of layers: moe/io.h, second part."""

from __future__ import annotations

import contextlib
import ctypes
import difflib
from typing import Any, Callable, Iterable, Iterator, List, Mapping, NamedTuple, Optional

from . import _abi, _callbacks, _config, _io_memory
from ._constants import FILE_MAX_DIMS, SAME
from ._file import Path, path_bytes, run, utf8
from ._library import new
from .context import Comm
from .objects import Layer


class Values(NamedTuple):
    """Arrays that are shaped as the parameters of a layer, such as an optimizer's moments.

    arrays  by the parameters' names; contiguous, of their local shapes and dtypes. What is not
            there, or None, is left out: on every rank the same
    """

    layer: Layer
    arrays: Mapping[str, Any]


class LoadReport(NamedTuple):
    """What a load found: entries read, entries that the file lacks, and those that nothing has."""

    loaded: int
    missing: int
    unexpected: int


class _Items:
    """The items of a checkpoint as the library wants them; `keep` lives as long as the call."""

    def __init__(self, items: Mapping[str, Any], writable: bool) -> None:
        self.layers: List[Layer] = []
        self.keep: List[Any] = []
        self.writable = writable
        self.structs = (_abi.CheckpointItem * len(items))()
        for i, (name, source) in enumerate(items.items()):
            item = new(_abi.CheckpointItem)
            item.name = utf8("the name of an item", name)
            if isinstance(source, Values):
                self._layer(item, source.layer)
                item.values = self._values(name, source)
            elif isinstance(source, Layer):
                self._layer(item, source)
            else:
                self._tensor(item, name, source)
            self.structs[i] = item
            self.keep.append(item)

    def _layer(self, item: _abi.CheckpointItem, layer: Layer) -> None:
        self.layers.append(layer)
        item.layer = layer.handle.value

    def _values(self, name: str, values: Values) -> Any:
        parameters = values.layer.parameters
        for key in values.arrays:
            if key not in parameters:
                close = difflib.get_close_matches(key, list(parameters), n=1)
                hint = f"; did you mean {close[0]}?" if close else ""
                raise ValueError(f"{name}: the layer has no parameter {key!r}{hint}")
        places = (ctypes.c_void_p * len(parameters))()
        for i, (key, parameter) in enumerate(parameters.items()):
            source = values.arrays.get(key)
            if source is not None:
                memory = _io_memory.describe(
                    name + key, source, [parameter.dtype], parameter.array_shape, self.writable
                )
                # None of an empty array's elements is looked at, but NULL would leave it out.
                places[i] = memory.address or ctypes.addressof(places)
                self.keep.append(memory)
        return places

    def _tensor(self, item: _abi.CheckpointItem, name: str, source: Any) -> None:
        memory = _io_memory.describe(name, source, _io_memory.HOST, None, self.writable)
        if len(memory.shape) > FILE_MAX_DIMS:
            raise ValueError(f"{name} has shape {memory.shape}: at most {FILE_MAX_DIMS} dims")
        item.data = memory.address
        item.dims = len(memory.shape)
        item.shape[: item.dims] = memory.shape
        item.dtype = _io_memory.CODES[memory.dtype]
        self.keep.append(memory)


@contextlib.contextmanager
def alone(layers: Iterable[Layer]) -> Iterator[None]:
    """No other call on these layers, their pools and gates meanwhile."""
    used = {id(handle): handle for layer in layers for handle in layer._used()}
    with contextlib.ExitStack() as stack:
        for handle in used.values():
            stack.enter_context(handle.busy.alone(f"the {handle.kind}"))
        yield


def save_options(
    metadata: Optional[Mapping[str, str]], store_dtype: Any, comm: Optional[Comm]
) -> _abi.SaveOptions:
    options = new(_abi.SaveOptions)
    given = dict(metadata or {})
    strings = ctypes.c_char_p * len(given)
    options.metadata_keys = strings(*(utf8("a metadata key", key) for key in given))
    options.metadata_values = strings(*(utf8(f"metadata {key}", given[key]) for key in given))
    options.metadata_count = len(given)
    options.store_dtype = SAME
    if store_dtype is not None:
        options.store_dtype = _io_memory.CODES[_io_memory.dtype_name("store_dtype", store_dtype)]
    options.comm = comm.handle.value if comm is not None else None
    return options


def save(
    path: Path,
    items: Mapping[str, Any],
    *,
    metadata: Optional[Mapping[str, str]] = None,
    store_dtype: Any = None,
    comm: Optional[Comm] = None,
) -> None:
    """Save a checkpoint into one safetensors file, whole or not at all.

    items        by name: a Layer (a prefix, "layers.3."), Values of a layer (a prefix as well), or
                 a contiguous array
    metadata     strings of your own
    store_dtype  float32, float64, bfloat16 or float16 for all floating-point numbers; None: their
                 own
    comm         None: the layers' own

    The bytes are the same for any number of ranks and any layout of the pools.
    """
    made = _Items(items, False)
    options = save_options(metadata, store_dtype, comm)
    with alone(made.layers):
        run("moe_checkpoint_save", path_bytes(path), made.structs, len(made.structs),
             ctypes.byref(options))  # fmt: skip


def load(
    path: Path,
    items: Mapping[str, Any],
    *,
    lenient: bool = False,
    convert: bool = False,
    write_bound: bool = False,
    report: Optional[Callable[[int, str], None]] = None,
    comm: Optional[Comm] = None,
) -> LoadReport:
    """Load what save(), or another program, has made into layers and writable arrays.

    items        as of save()
    lenient      what the file lacks stays as it is, what nothing has is passed over
    convert      from other floating-point types, and between int32 and int64
    write_bound  parameters that are bound to memory of yours are written
    report       callable(level, text): a line for each entry that is missing or left over

    All is checked before anything is written.
    """
    made = _Items(items, True)
    flags = {"lenient": lenient, "convert": convert, "write_bound": write_bound}
    options = _config.make(_abi.LoadOptions, flags)
    if report is not None:
        options.report = _callbacks.log_callback(report)
    options.comm = comm.handle.value if comm is not None else None
    found = new(_abi.LoadReport)
    with alone(made.layers):
        run("moe_checkpoint_load", path_bytes(path), made.structs, len(made.structs),
             ctypes.byref(options), ctypes.byref(found))  # fmt: skip
    return LoadReport(found.loaded, found.missing, found.unexpected)
