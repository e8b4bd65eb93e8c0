"""Weights from elsewhere: models under their own names, and dense networks; moe/io.h, the rest."""

from __future__ import annotations

import contextlib
import ctypes
from typing import Any, Dict, List, Mapping, NamedTuple, Optional, Tuple, Union

from . import _abi, _config, _io_memory
from ._checkpoint import alone, save_options
from ._constants import Family, Glu, WeightLayout
from ._file import File, Path, opening, path_bytes, run, utf8
from ._library import new
from .context import Comm
from .objects import Layer


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
    run("moe_family_names", ctypes.byref(names), _family(family))
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
        setattr(made, field, None if text is None else utf8(field, text))
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
    with opening(file) as opened, alone([layer]):
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
    options = save_options(metadata, store_dtype, comm)
    block = _config.number("block", block, ctypes.c_int64)
    with alone([layer]):
        run("moe_export", path_bytes(path), layer.handle.value, number, block, _names(names),
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
                setattr(args, name + "_name", utf8(name, text))
            kept.append(stack.enter_context(opening(file)).handle)
            args.file = kept[0].value
        stack.enter_context(alone([layer]))
        layer.call("moe_upcycle", ctypes.byref(args))
