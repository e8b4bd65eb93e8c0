"""Cost, the gradient check, and the small functions for hosts that route by themselves."""

from __future__ import annotations

import ctypes
from typing import Any, Callable, List, NamedTuple, Optional, Tuple, Union

from . import _abi, _callbacks, _config, _memory, _views
from ._constants import DType, Status
from ._handle import refuse_inside_callback
from ._library import Error, check, library, new
from .objects import Experts, Gate, Layer

GateLike = Union[Gate, _abi.GateConfig, None]
ExpertsLike = Union[Experts, _abi.ExpertsConfig, None]
LayerLike = Union[Layer, _abi.LayerConfig, None]


class Memory(NamedTuple):
    """What a layer takes, in bytes and elements."""

    parameter_bytes: int
    gradient_bytes: int
    parameter_count: int
    pass_bytes: int
    active_parameters: int


class Flops(NamedTuple):
    """Floating-point operations; a multiply-add is 2."""

    forward_flops: int
    backward_flops: int


class GradientReport(NamedTuple):
    """What check_gradients found; moe/check.h says what each is."""

    tensors: int
    probes: int
    disagreements: int
    kinks: int
    worst: float
    worst_name: Optional[str]
    worst_index: int
    worst_gradient: float
    worst_difference: float


class GradientsDisagree(Error, AssertionError):
    """A gradient disagrees with the difference of forwards; `report` has the numbers."""

    report: GradientReport


def gate_config(**fields: Any) -> _abi.GateConfig:
    """A gate's config without a gate, for memory() and flops()."""
    return _config.make(_abi.GateConfig, fields)


def experts_config(**fields: Any) -> _abi.ExpertsConfig:
    """A pool's config without a pool."""
    return _config.make(_abi.ExpertsConfig, fields)


def layer_config(**fields: Any) -> _abi.LayerConfig:
    """A layer's config without a layer."""
    return _config.make(_abi.LayerConfig, fields)


_PARTS = ("gate", "experts", "layer", "shared", "residual")


def _ask(function: str, fields: Any, *parts: Any) -> _abi.Cost:
    query = _config.make(_abi.CostQuery, fields, _PARTS)
    for name, part in zip(_PARTS, parts):
        config = part.config if isinstance(part, (Gate, Experts, Layer)) else part
        if config is not None:
            setattr(query, name, ctypes.pointer(config))
    cost = new(_abi.Cost)
    refuse_inside_callback()
    check(getattr(library(), function)(ctypes.byref(query), ctypes.byref(cost)))
    return cost


def memory(
    gate: GateLike = None,
    experts: ExpertsLike = None,
    layer: LayerLike = None,
    *,
    shared: ExpertsLike = None,
    residual: ExpertsLike = None,
    **fields: Any,
) -> Memory:
    """The memory a layer of these parts (objects or configs) takes, before it is taken.

    Keywords are the fields of moe_cost_query: tokens, groups, top_k, flags (Forward), threads.
    """
    cost = _ask("moe_layer_memory", fields, gate, experts, layer, shared, residual)
    return Memory(*(getattr(cost, name) for name in Memory._fields))


def flops(
    gate: GateLike = None,
    experts: ExpertsLike = None,
    layer: LayerLike = None,
    *,
    shared: ExpertsLike = None,
    residual: ExpertsLike = None,
    **fields: Any,
) -> Flops:
    """The arithmetic of forward and backward; arguments as of memory()."""
    cost = _ask("moe_layer_flops", fields, gate, experts, layer, shared, residual)
    return Flops(cost.forward_flops, cost.backward_flops)


def cv_squared(v: Any, *, ddof: int = 0, dv: Any = None) -> float:
    """CV^2 of a vector: Var(v) / (mean(v)^2 + 1e-10). `dv`, if given, receives its gradient."""
    source = _memory.vector("v", v, ["float32", "float64"], None)
    value = ctypes.c_double()
    out = None
    if dv is not None:
        target = _memory.vector("dv", dv, [source.dtype], source.size, True)
        out = target.address
    dtype = DType.F32 if source.dtype == "float32" else DType.F64
    ddof = _config.number("ddof", ddof, ctypes.c_int32)
    check(
        library().moe_cv_squared(
            ctypes.byref(value), out, source.address, source.size, ddof, int(dtype)
        )
    )
    return value.value


def selection_bias_step(bias: Any, counts: Any, rate: float = 0.001, *, out: Any = None) -> Any:
    """Balancing without a loss: bias_e + rate sign(mean(counts) - counts_e).

    bias    [E] float32 or float64
    counts  [E] int64, entries of each expert
    out     where the result goes, may be bias; None: a new array
    """
    source = _memory.vector("bias", bias, ["float32", "float64"], None)
    numbers = _memory.vector("counts", counts, ["int64"], source.size)
    out = _views.zeros((source.size,), source.dtype) if out is None else out
    target = _memory.vector("out", out, [source.dtype], source.size, True)
    dtype = DType.F32 if source.dtype == "float32" else DType.F64
    place = ctypes.cast(numbers.address, ctypes.POINTER(ctypes.c_int64))
    check(
        library().moe_selection_bias_step(
            target.address, source.address, place, source.size,
            _config.number("rate", rate, ctypes.c_double), int(dtype),
        )
    )  # fmt: skip
    return out


def noise4(
    seed: int,
    *,
    layer_id: int = 0,
    stream_id: int = 0,
    step: int = 0,
    token: int = 0,
    block: int = 0,
) -> Tuple[float, float, float, float]:
    """The normal numbers a noisy gate uses for experts 4*block .. 4*block+3 of a token."""
    out = (ctypes.c_float * 4)()
    wide, narrow = ctypes.c_int64, ctypes.c_int32
    check(
        library().moe_noise4(
            out,
            _config.number("seed", seed, ctypes.c_uint64),
            _config.number("layer_id", layer_id, narrow),
            _config.number("stream_id", stream_id, narrow),
            _config.number("step", step, wide),
            _config.number("token", token, wide),
            _config.number("block", block, wide),
        )
    )
    return out[0], out[1], out[2], out[3]


def check_gradients(
    layer: Layer, *, report: Optional[Callable[[int, str], None]] = None, **fields: Any
) -> GradientReport:
    """Compare every gradient of a layer with central differences of its own forward.

    Keywords are the fields of moe_gradient_check: tokens, groups, probes, seed, step, tolerance,
    parameters ("drawn" or "current"), train. report(level, text) receives the report line by line.
    Raises GradientsDisagree if a gradient is wrong.
    """
    request = _config.make(_abi.GradientCheck, fields, ("report",))
    if report is not None:
        request.report = _callbacks.log_callback(report)
    found = new(_abi.GradientReport)
    refuse_inside_callback()
    handle = layer.handle
    status = library().moe_check_gradients(
        handle.value, ctypes.byref(request), ctypes.byref(found)
    )
    try:
        check(status)
    except Error as error:
        if status == Status.WRONG_GRADIENT:
            wrong = GradientsDisagree(str(error), error.status, error.name)
            wrong.report = _report(found)
            raise wrong from error.__cause__
        raise
    return _report(found)


def _report(found: _abi.GradientReport) -> GradientReport:
    values: List[Any] = [getattr(found, name) for name in GradientReport._fields]
    return GradientReport._make(v.decode() if isinstance(v, bytes) else v for v in values)
