"""Files: safetensors, checkpoints of layers, weights of published models.

    with moe.io.File("model.safetensors.index.json") as file:      # or a file, or a directory
        moe.io.import_(layer, file, "mixtral", block=3)
        w = file["lm_head.weight"]                                 # a mapping of names to arrays
    moe.io.save("run.safetensors", {"layers.3.": layer, "step": step}, metadata={"by": "me"})
    moe.io.load("run.safetensors", {"layers.3.": layer, "step": step})

Over libmoe_io, which is loaded by the first call; ImportError says what is missing where it was not
built. docs/checkpoints.md has the formats and the names. On several ranks all of them make a call.
"""

from __future__ import annotations

import contextlib
import ctypes
import difflib
import os
from collections.abc import Mapping as MappingABC
from typing import (
    Any,
    Callable,
    Dict,
    Iterable,
    Iterator,
    List,
    Mapping,
    NamedTuple,
    Optional,
    Tuple,
    Union,
)

from . import _abi, _callbacks, _config, _io_memory
from ._constants import SAME, Family, FileDType, Glu, WeightLayout
from ._handle import Handle, Object, destroy_deferred, refuse_inside_callback
from ._library import check, function, io_library_path, new
from .context import Comm
from .objects import Layer

Path = Union[str, "os.PathLike[str]"]

__all__ = [
    "Entry", "Family", "File", "FileDType", "LoadReport", "TensorNames", "Values", "export",
    "family_names", "import_", "library_path", "load", "save", "upcycle",
]  # fmt: skip


def library_path() -> str:
    """The file libmoe_io was loaded from; ImportError if there is none."""
    return io_library_path()


def _text(what: str, text: Any) -> bytes:
    """Text for the library, which would end it at a NUL."""
    if not isinstance(text, str):
        raise TypeError(f"{what} must be a str, not {text!r}")
    if "\0" in text:
        raise ValueError(f"{what} is {text!r}: NUL is not possible")
    return text.encode(errors="surrogateescape")


def _path(path: Path) -> bytes:
    return _text("path", os.fsdecode(path))


def _run(name: str, *arguments: Any) -> None:
    """A call that is of no object."""
    refuse_inside_callback()
    destroy_deferred()
    check(function(name)(*arguments))


# ---- safetensors --------------------------------------------------------------------------------


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
        found = function("moe_file_metadata_find")(handle.value, _text("key", key))
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
        self._handle = Handle("file").create("moe_file_open", _path(path))

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
        return int(function("moe_file_find")(self.handle.value, _text("name", name)))

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
def _opened(file: Union[File, Path]) -> Iterator[File]:
    """A file as it is, or opened for as long as it is used."""
    if isinstance(file, File):
        yield file
    else:
        with File(file) as own:
            yield own


# ---- checkpoints --------------------------------------------------------------------------------


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
            item.name = _text("the name of an item", name)
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
                    name + key, source, [parameter.dtype], parameter.shape, self.writable
                )
                # None of an empty array's elements is looked at, but NULL would leave it out.
                places[i] = memory.address or ctypes.addressof(places)
                self.keep.append(memory)
        return places

    def _tensor(self, item: _abi.CheckpointItem, name: str, source: Any) -> None:
        memory = _io_memory.describe(name, source, _io_memory.HOST, None, self.writable)
        if len(memory.shape) > _abi.FILE_MAX_DIMS:
            raise ValueError(f"{name} has shape {memory.shape}: at most {_abi.FILE_MAX_DIMS} dims")
        item.data = memory.address
        item.dims = len(memory.shape)
        item.shape[: item.dims] = memory.shape
        item.dtype = _io_memory.CODES[memory.dtype]
        self.keep.append(memory)


@contextlib.contextmanager
def _alone(layers: Iterable[Layer]) -> Iterator[None]:
    """No other call on these layers, their pools and gates meanwhile."""
    used = {id(handle): handle for layer in layers for handle in layer._used()}
    with contextlib.ExitStack() as stack:
        for handle in used.values():
            stack.enter_context(handle.busy.alone(f"the {handle.kind}"))
        yield


def _save_options(
    metadata: Optional[Mapping[str, str]], store_dtype: Any, comm: Optional[Comm]
) -> _abi.SaveOptions:
    options = new(_abi.SaveOptions)
    given = dict(metadata or {})
    strings = ctypes.c_char_p * len(given)
    options.metadata_keys = strings(*(_text("a metadata key", key) for key in given))
    options.metadata_values = strings(*(_text(f"metadata {key}", given[key]) for key in given))
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
    options = _save_options(metadata, store_dtype, comm)
    with _alone(made.layers):
        _run("moe_checkpoint_save", _path(path), made.structs, len(made.structs),
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
    with _alone(made.layers):
        _run("moe_checkpoint_load", _path(path), made.structs, len(made.structs),
             ctypes.byref(options), ctypes.byref(found))  # fmt: skip
    return LoadReport(found.loaded, found.missing, found.unexpected)


# ---- models of other programs -------------------------------------------------------------------


class TensorNames(NamedTuple):
    """Names of a block's tensors: {layer} stands for its number, {expert} for an expert's; None:
    there is none. The fields are those of moe_tensor_names."""

    gate: Optional[str] = None
    gate_bias: Optional[str] = None
    selection_bias: Optional[str] = None
    w1: Optional[str] = None
    w3: Optional[str] = None
    w13: Optional[str] = None
    w2: Optional[str] = None
    b1: Optional[str] = None
    b3: Optional[str] = None
    b13: Optional[str] = None
    b2: Optional[str] = None
    shared_w1: Optional[str] = None
    shared_w3: Optional[str] = None
    shared_w2: Optional[str] = None
    shared_gate: Optional[str] = None
    weight_layout: Union[WeightLayout, str] = WeightLayout.OUT_IN
    glu_order: Union[Glu, str] = Glu.GATE_UP


def _family(family: Union[Family, str]) -> int:
    return int(_config.member("family", family, Family))


def family_names(family: Union[Family, str]) -> TensorNames:
    """The names of a family, to be changed (._replace) and handed to import_() or export()."""
    names = new(_abi.TensorNames)
    _run("moe_family_names", ctypes.byref(names), _family(family))
    fields: Dict[str, Any] = {field: getattr(names, field) for field in TensorNames._fields}
    for field, value in fields.items():
        fields[field] = value.decode() if isinstance(value, bytes) else value
    fields["weight_layout"] = WeightLayout(names.weight_layout)
    fields["glu_order"] = Glu(names.glu_order)
    return TensorNames(**fields)


def _names(names: Optional[TensorNames]) -> Any:
    """A pointer to the struct, or None."""
    if names is None:
        return None
    fields = names._asdict()
    made = _config.make(
        _abi.TensorNames, {field: fields.pop(field) for field in ("weight_layout", "glu_order")}
    )
    for field, text in fields.items():
        setattr(made, field, None if text is None else _text(field, text))
    return ctypes.pointer(made)


def _family_or_names(family: Any, names: Optional[TensorNames]) -> int:
    if family is None and names is None:
        raise TypeError("a family or names must be given")
    return 0 if family is None else _family(family)


def import_(
    layer: Layer,
    file: Union[File, Path],
    family: Union[Family, str, None] = None,
    block: int = 0,
    *,
    names: Optional[TensorNames] = None,
    lenient: bool = False,
    write_bound: bool = False,
) -> None:
    """Copy one block of a published model into a layer, converted to its dtype and layout.

    file         a File, or its path
    family       "mixtral", "qwen3_moe" (OLMoE too), "qwen2_moe", "deepseek_v3", "gpt_oss"; not
                 looked at if names are given
    block        what {layer} stands for
    lenient      parameters without a tensor and tensors without a parameter are passed over
    write_bound  parameters that are bound to memory of yours are written

    Only weights: what the gate does with its logits is the config's business, see moe.preset().
    """
    number = _family_or_names(family, names)
    flags = {"lenient": lenient, "write_bound": write_bound}
    options = _config.make(_abi.ImportOptions, flags)
    options.names = _names(names)
    block = _config.number("block", block, ctypes.c_int64)
    with _opened(file) as opened, _alone([layer]):
        handle = opened.handle
        layer.call("moe_import", handle.value, number, block, ctypes.byref(options))


def export(
    path: Path,
    layer: Layer,
    family: Union[Family, str, None] = None,
    block: int = 0,
    *,
    names: Optional[TensorNames] = None,
    metadata: Optional[Mapping[str, str]] = None,
    store_dtype: Any = None,
    comm: Optional[Comm] = None,
) -> None:
    """Save a layer under the names of a family, for its own program or import_(); arguments as of
    import_() and save(). A parameter for which the names have nothing is refused."""
    number = _family_or_names(family, names)
    options = _save_options(metadata, store_dtype, comm)
    block = _config.number("block", block, ctypes.c_int64)
    with _alone([layer]):
        _run("moe_export", _path(path), layer.handle.value, number, block, _names(names),
             ctypes.byref(options))  # fmt: skip


# ---- from a dense network -----------------------------------------------------------------------

_DENSE = ("w1", "w3", "w2", "b1", "b3", "b2")
_NOISE = ("width", "noise_std", "noise_fraction", "output_scale", "seed")


def _dense_memory(args: _abi.UpcycleArgs, layer: Layer, given: Mapping[str, Any]) -> List[Any]:
    """The dense network's arrays; their width is the first dimension of w1, or the last."""
    outputs, inputs = layer.experts.dims.d_out, layer.experts.dims.d_model
    in_out = args.weight_layout == WeightLayout.IN_OUT
    w1 = _io_memory.describe("w1", given["w1"], _io_memory.HOST[:4])
    if len(w1.shape) != 2:
        raise ValueError(f"w1 has shape {w1.shape}; wanted a matrix")
    width = w1.shape[1] if in_out else w1.shape[0]
    shapes = {"w1": (width, inputs), "w3": (width, inputs), "w2": (outputs, width)}
    if in_out:
        shapes = {name: (last, first) for name, (first, last) in shapes.items()}
    lengths = {"b1": (width,), "b3": (width,), "b2": (outputs,)}
    args.width, args.dtype = width, _io_memory.CODES[w1.dtype]
    kept = []
    for name, source in given.items():
        wanted: Tuple[int, ...] = shapes[name] if name in shapes else lengths[name]
        kept.append(_io_memory.describe(name, source, [w1.dtype], wanted))
        setattr(args, name, kept[-1].address)
    return kept


def upcycle(
    layer: Layer,
    *,
    w1: Any,
    w2: Any,
    w3: Any = None,
    b1: Any = None,
    b3: Any = None,
    b2: Any = None,
    file: Union[File, Path, None] = None,
    weight_layout: Union[WeightLayout, str] = WeightLayout.OUT_IN,
    write_bound: bool = False,
    **fields: Any,
) -> None:
    """Make every expert of a layer a copy, or a slice, of a dense feed-forward network.

    w1..b2         w1, w3 [H,D], w2 [O,H], b1, b3 [H], b2 [O]: contiguous arrays of one floating-
                   point type; or, with `file`, the names of its tensors
    file           a File, or its path
    weight_layout  "in_out": matrices are the other way round
    write_bound    parameters that are bound to memory of yours are written

    fields are those of moe_upcycle_args: noise_std, noise_fraction, output_scale, seed. H is the
    experts' width, or G times as much: then expert e gets slice e mod G.
    """
    for name in fields:
        if name not in _NOISE:
            raise _config.unknown("moe_upcycle_args", name, _NOISE)
    options = {"weight_layout": weight_layout, "write_bound": write_bound, **fields}
    args = _config.make(_abi.UpcycleArgs, options)
    everything = dict(zip(_DENSE, (w1, w3, w2, b1, b3, b2)))
    given = {name: source for name, source in everything.items() if source is not None}
    with contextlib.ExitStack() as stack:
        kept: List[Any] = []
        if file is None:
            kept = _dense_memory(args, layer, given)
        else:
            for name, text in given.items():
                setattr(args, name + "_name", _text(name, text))
            kept.append(stack.enter_context(_opened(file)).handle)
            args.file = kept[0].value
        stack.enter_context(_alone([layer]))
        layer.call("moe_upcycle", ctypes.byref(args))
