"""Conventions by name, and configurations in words: moe/preset.h."""

from __future__ import annotations

import ctypes
from typing import Any, Dict, NamedTuple, Optional

from . import _abi, _config
from ._constants import Status
from ._handle import refuse_inside_callback
from ._library import check, library, new
from .context import Comm, Context
from .functions import ExpertsLike, GateLike, LayerLike
from .objects import Experts, Gate, Layer

# What gate and pool must have in common.
_EVERYWHERE = ("d_model", "num_experts", "dtype", "parameters")


class Preset(NamedTuple):
    """The three configs of a model family. Give them to Gate, Experts and Layer, with fields of
    your own: moe.Gate(context, preset.gate, z_weight=0.001)."""

    gate: _abi.GateConfig
    experts: _abi.ExpertsConfig
    layer: _abi.LayerConfig

    def make(
        self,
        context: Context,
        *,
        shared: Optional[Experts] = None,
        residual: Optional[Experts] = None,
        comm: Optional[Comm] = None,
    ) -> Layer:
        """A gate, a pool and the layer of both."""
        gate, experts = Gate(context, self.gate), Experts(context, self.experts)
        return Layer(gate, experts, self.layer, shared=shared, residual=residual, comm=comm)


def preset(name: str, **fields: Any) -> Preset:
    """The conventions of a paper or a system; presets() has the names.

    fields are sizes and whatever else is to be set. d_model, num_experts, dtype and parameters go
    to every config that has them, any other field to the one that has it; one that several have
    ("bias") is refused: set it where the config is used. d_model, d_hidden and num_experts have no
    default.
    """
    made = Preset(new(_abi.GateConfig), new(_abi.ExpertsConfig), new(_abi.LayerConfig))
    refuse_inside_callback()
    check(library().moe_preset(name.encode(), *(ctypes.byref(config) for config in made)))
    known = {part: _config.names(type(config)) for part, config in zip(made._fields, made)}
    for field, value in fields.items():
        owners = [part for part, names in known.items() if field in names]
        if not owners:
            raise _config.unknown("a preset", field, [n for names in known.values() for n in names])
        if len(owners) > 1 and field not in _EVERYWHERE:
            raise TypeError(f"{field} is a field of {' and '.join(owners)}: set it in one of them")
        for part in owners:
            _config.set_fields(getattr(made, part), {field: value})
    return made


def presets() -> Dict[str, str]:
    """The names of all presets, each with its source: paper and equations, or system and file."""
    lib = library()
    return {
        lib.moe_preset_name(i).decode(): lib.moe_preset_source(i).decode()
        for i in range(lib.moe_preset_count())
    }


def describe(
    gate: GateLike = None, experts: ExpertsLike = None, layer: LayerLike = None
) -> str:
    """Configurations in words, with their formulas: of objects or of configs, not of none at all.

    A Layer alone is described with its gate and its pool.
    """
    if isinstance(layer, Layer):
        gate = layer.gate if gate is None else gate
        experts = layer.experts if experts is None else experts
    configs = [
        part.config if isinstance(part, (Gate, Experts, Layer)) else part
        for part in (gate, experts, layer)
    ]
    pointers = [ctypes.byref(config) if config is not None else None for config in configs]
    size = ctypes.c_int64()
    refuse_inside_callback()
    status = library().moe_describe(None, 0, ctypes.byref(size), *pointers)
    if status != Status.BUFFER_TOO_SMALL:
        check(status)
    text = ctypes.create_string_buffer(size.value)
    check(library().moe_describe(text, size.value, ctypes.byref(size), *pointers))
    return text.value.decode()
