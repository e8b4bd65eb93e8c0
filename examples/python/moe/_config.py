"""Filling the library's config structs from keyword arguments.

A keyword is a field of the C struct. Numbers are checked for the field's range, which ctypes alone
would cut off silently; fields that hold a constant also take its name in any case
("noisy_top_k"), and the names are looked up in the enumerations here.
"""

from __future__ import annotations

import ctypes
import difflib
import enum
import operator
from ctypes import Structure
from typing import Any, Dict, Iterable, List, Mapping, Optional, Type, TypeVar

from . import _constants as c
from ._abi import ExpertsConfig, GradientCheck, c_name
from ._library import new

_S = TypeVar("_S", bound=Structure)

# Which enumeration a field holds; but for _OWN_ENUMS the same name means the same in every struct.
ENUMS: Dict[str, Type[enum.IntEnum]] = {
    "backend": c.Backend,
    "isa": c.Isa,
    "log_level": c.Log,
    "kind": c.GateKind,
    "score": c.Score,
    "order": c.Order,
    "dtype": c.DType,
    "id_dtype": c.DType,
    "choice_noise": c.ChoiceNoise,
    "second_choice": c.SecondChoice,
    "loss_scope": c.LossScope,
    "secondary": c.Secondary,
    "sequence_score": c.Score,
    "sequence_counts": c.SequenceCounts,
    "capacity_kind": c.Capacity,
    "capacity_rounding": c.Round,
    "drop_policy": c.Drop,
    "parameters": c.Parameters,
    "activation": c.Activation,
    "glu_order": c.Glu,
    "weight_layout": c.WeightLayout,
    "storage": c.Storage,
    "output": c.Output,
    "weight_position": c.WeightOn,
    "dropped": c.Dropped,
    "plan_use": c.PlanUse,
    "exchange": c.Exchange,
    "received": c.Received,
    "loss_batch": c.Batch,
}
# Where a field of that name holds another one.
_OWN_ENUMS: Dict[Type[Structure], Dict[str, Type[enum.IntEnum]]] = {
    GradientCheck: {**ENUMS, "parameters": c.Check},
    ExpertsConfig: {**ENUMS, "kind": c.ExpertsKind},
}
_DTYPE_NAMES = {"float32": "F32", "float64": "F64", "bfloat16": "BF16", "float16": "F16",
                "int32": "I32", "int64": "I64"}  # fmt: skip
DTYPES = {name: int(c.DType[member]) for name, member in _DTYPE_NAMES.items()}
_INTEGERS = {
    ctypes.c_int32: (-(2**31), 2**31 - 1),
    ctypes.c_int64: (-(2**63), 2**63 - 1),
    ctypes.c_uint64: (0, 2**64 - 1),
}


def _named(field: str, text: str, group: Type[enum.IntEnum]) -> int:
    word = _DTYPE_NAMES.get(text, text).upper()
    if word not in group.__members__:
        known = ", ".join(name.lower() for name in group.__members__)
        raise ValueError(f"{field} is {text!r}; it can be {known}")
    return int(group[word])


def member(field: str, value: Any, group: Type[enum.IntEnum]) -> int:
    """A constant given by its name, or as a number."""
    if isinstance(value, str):
        return _named(field, value, group)
    return int(number(field, value, ctypes.c_int32))


def number(field: str, value: Any, kind: Any) -> Any:
    """`value` as a number for a field of this ctypes kind, or an error that names the field."""
    if kind is ctypes.c_double:
        try:
            return float(value)
        except (TypeError, ValueError):
            raise TypeError(f"{field} must be a number, not {value!r}") from None
    try:
        whole = operator.index(value)
    except TypeError:
        raise TypeError(f"{field} must be an integer, not {value!r}") from None
    low, high = _INTEGERS[kind]
    if not low <= whole <= high:
        raise ValueError(f"{field} is {whole}; it must be from {low} to {high}")
    return whole


def _enums(struct: Type[Structure]) -> Mapping[str, Type[enum.IntEnum]]:
    return _OWN_ENUMS.get(struct, ENUMS)


def _fields(struct: Type[Structure]) -> Dict[str, Any]:
    kinds: List[Any] = list(struct._fields_)
    return {
        name: kind
        for name, kind in kinds
        if name not in ("struct_size", "reserved", "reserved2")
        and (kind in _INTEGERS or kind is ctypes.c_double)
    }


def unknown(what: str, name: str, known: Iterable[str]) -> TypeError:
    """The error for a keyword that is no field."""
    close = difflib.get_close_matches(name, list(known), n=3)
    hint = f"; did you mean {' or '.join(close)}?" if close else ""
    return TypeError(f"{what} has no field {name!r}{hint}")


def set_fields(config: Structure, values: Mapping[str, Any], others: Iterable[str] = ()) -> None:
    """Set fields of a struct by name. `others` are keywords the caller itself knows."""
    fields = _fields(type(config))
    for name, value in values.items():
        if name not in fields:
            raise unknown(c_name(type(config)), name, [*fields, *others])
        if isinstance(value, str):
            enums = _enums(type(config))
            if name not in enums:
                raise TypeError(f"{name} must be a number, not {value!r}")
            value = _named(name, value, enums[name])
        setattr(config, name, number(name, value, fields[name]))


def names(struct: Type[Structure]) -> List[str]:
    """The fields that a keyword can set."""
    return list(_fields(struct))


def make(
    struct: Type[_S],
    values: Mapping[str, Any],
    others: Iterable[str] = (),
    base: Optional[_S] = None,
) -> _S:
    """A struct with its defaults, or the contents of `base`, and the given fields."""
    if base is None:
        config = new(struct)
    elif isinstance(base, struct):
        config = struct.from_buffer_copy(base)
    else:
        raise TypeError(f"a config must be a {c_name(struct)}, not {base!r}")
    set_fields(config, values, others)
    return config


def describe(config: Structure) -> str:
    """The numbers of a struct as text, for repr()."""
    parts = []
    for name in _fields(type(config)):
        value = getattr(config, name)
        group = _enums(type(config)).get(name)
        known = group is not None and value in [int(member) for member in group]
        parts.append(f"{name}={group(value).name.lower() if group and known else value}")
    return ", ".join(parts)
