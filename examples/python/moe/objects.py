"""Gate, Experts and Layer: what is trained, with forward and backward on a Pass."""

from __future__ import annotations

import contextlib
import ctypes
import math
from typing import Any, Dict, Iterable, Iterator, List, Optional, Sequence, Tuple

from . import _abi, _callbacks, _config, _memory, _views
from ._arguments import Dims
from ._computing import Computing
from ._constants import NO_EXPERTS, DType, ExpertsKind, GateKind, Values
from ._device import stream_of
from ._handle import Handle, device_of
from ._library import library, new
from ._phases import Phased
from .context import Comm, Context
from .parameter import Parameter, ParameterOwner, _normal_strides

class Gate(Computing, ParameterOwner):
    """The gating network. Keywords are the fields of moe_gate_config: num_experts (required),
    d_model, top_k, kind, score, order, the loss weights, capacity..., dtype, parameters.

    config  where the other fields come from, as of preset() or gate_config(); None: the defaults
    """

    kind = "gate"

    def __init__(
        self, context: Context, config: Optional[_abi.GateConfig] = None, **fields: Any
    ) -> None:
        config = _config.make(_abi.GateConfig, fields, base=config)
        handle = Handle("gate")
        handle.kept["context"] = context.handle
        self._handle = handle.create(
            "moe_gate_create", context.handle.value, ctypes.byref(config)
        )
        config = self.config
        dtype = _memory.NAMES[DType(config.dtype)]
        groups = config.expert_groups if config.kind == GateKind.HIERARCHICAL else 0
        self.dims = Dims(
            dtype, 0, 0, config.d_model, config.num_experts, groups, device_of(handle)
        )

    @property
    def config(self) -> _abi.GateConfig:
        """A copy of the config the gate was made with."""
        config = new(_abi.GateConfig)
        self.call("moe_gate_get_config", ctypes.byref(config))
        return config

    def update_selection_bias(self, counts: Any, rate: float = 0.001) -> None:
        """Balancing without a loss: selection_bias_e += rate sign(mean(counts) - counts_e).

        counts  [E] int64 of the host, entries of each expert: pass.tensor("counts"), summed over
                micro-batches
        """
        memory = _memory.vector("counts", counts, ["int64"], self.dims.num_experts)
        place = ctypes.cast(memory.address, ctypes.POINTER(ctypes.c_int64))
        rate = _config.number("rate", rate, ctypes.c_double)
        with self.handle.busy.alone("the gate"):
            self.call("moe_gate_update_selection_bias", place, rate)

    def __repr__(self) -> str:
        return f"<moe.Gate {'closed' if self.closed else _config.describe(self.config)}>"


class Experts(Computing, ParameterOwner):
    """A pool of experts. Keywords are the fields of moe_experts_config: d_model, d_hidden and
    num_experts (required), d_out, kind, activation, bias, weight_layout, dtype...

    config             where the other fields come from, as of preset(); None: the defaults
    callbacks          your own experts: forward(call), or a pair (forward, backward) of functions
                       of an ExpertCall, called expert by expert; None or 0 is success
    workspace_per_row  bytes a row that they keep from forward to backward
    """

    kind = "experts"

    def __init__(
        self,
        context: Context,
        config: Optional[_abi.ExpertsConfig] = None,
        *,
        callbacks: Any = None,
        workspace_per_row: int = 0,
        **fields: Any,
    ) -> None:
        if callbacks is not None:
            fields.setdefault("kind", ExpertsKind.CALLBACK)
        config = _config.make(_abi.ExpertsConfig, fields, ("callbacks",), config)
        handle = Handle("experts")
        handle.kept["context"] = context.handle
        if callbacks is not None:
            kept = _config.number("workspace_per_row", workspace_per_row, ctypes.c_int64)
            handle.kept["callbacks"] = _callbacks.expert_callbacks(config, callbacks, kept)
        elif workspace_per_row:
            raise TypeError("workspace_per_row is given without callbacks")
        elif config.callbacks:  # another pool's, which keeps their Python functions
            raise TypeError("the config is of a pool with callbacks: give them again")
        self._handle = handle.create(
            "moe_experts_create", context.handle.value, ctypes.byref(config)
        )
        self._measure()

    @classmethod
    def of_parts(cls, parts: Sequence["Experts"]) -> "Experts":
        """One pool of several: the experts of the first part come first. Its parameters are the
        parts', "0.w1", "1.w1"..."""
        handles = [part.handle for part in parts]
        handle = Handle("experts")
        handle.kept["parts"] = handles
        if handles:
            handle.kept["context"] = handles[0].kept["context"]
        values = (ctypes.c_void_p * len(handles))(*(part.value for part in handles))
        made = cls.__new__(cls)
        made._handle = handle.create("moe_experts_create_parts", values, len(handles))
        made._measure()
        return made

    def _measure(self) -> None:
        config = self.config
        d_out = config.d_out if config.d_out > 0 else config.d_model
        dtype = _memory.NAMES[DType(config.dtype)]
        count = 0 if config.num_experts == NO_EXPERTS else config.num_experts
        device = device_of(self.handle)
        self.dims = Dims(dtype, config.d_model, d_out, 0, count, device=device)

    def _used(self) -> List[Handle]:
        return [self.handle, *self.handle.kept.get("parts", ())]

    def _parameters(self, prefix: str = "") -> Dict[str, Parameter]:
        # Memory bound to a part is the part's, whichever pool it is bound through.
        if "parts" not in self.handle.kept:
            return super()._parameters(prefix)
        found: Dict[str, Parameter] = {}
        for number, handle in enumerate(self.handle.kept["parts"]):
            part = Experts.__new__(Experts)
            part._handle = handle
            found.update(part._parameters(f"{prefix}{number}."))
        return found

    @property
    def config(self) -> _abi.ExpertsConfig:
        """A copy of the config the pool was made with."""
        config = new(_abi.ExpertsConfig)
        self.call("moe_experts_get_config", ctypes.byref(config))
        return config

    def weights_changed(self) -> None:
        """Tell the pool that weight data changed, so that packed copies are renewed."""
        with self.handle.busy.shared("the experts"):
            self.call("moe_experts_weights_changed")

    def _find(self, name: str, grad: bool) -> Tuple[int, Tuple[int, ...], str]:
        """Number, shape and dtype of a parameter, or of its gradient."""
        index = library().moe_experts_parameter_find(self.handle.value, name.encode())
        if index < 0:
            raise KeyError(f"the pool has no parameter {name!r}")
        record = new(_abi.ParameterRecord)
        self.call("moe_experts_parameter", index, ctypes.byref(record))
        code = record.grad_dtype if grad else record.data_dtype
        return index, tuple(record.shape[: record.dims]), _memory.NAMES[DType(code)]

    def export_parameter(
        self, name: str, grad: bool = False, first: int = 0, count: Optional[int] = None
    ) -> Any:
        """A copy of a parameter, or of its gradient, of `count` experts from number `first` on (None:
        all others), in its shape: the same in every storage mode."""
        index, shape, dtype = self._find(name, grad)
        first = _config.number("first", first, ctypes.c_int64)
        count = shape[0] - first if count is None else count
        count = _config.number("count", count, ctypes.c_int64)
        array = _views.zeros((max(count, 0), *shape[1:]), dtype)
        place = _views.address_of(array) if count > 0 else None
        with self.handle.busy.shared("the experts"):
            what = Values.GRADIENT if grad else Values.DATA
            self.call("moe_experts_export", index, int(what), first, count, place)
        return array

    def import_parameter(
        self, name: str, values: Any, grad: bool = False, first: int = 0
    ) -> None:
        """Set a parameter, or its gradient, of some experts from number `first` on.

        values  contiguous array [count, ...] of its dtype, as export_parameter gives it. Data must
                be the library's memory
        """
        index, shape, dtype = self._find(name, grad)
        first = _config.number("first", first, ctypes.c_int64)
        memory = _memory.describe(f"values of {name}", values, _memory.accepted(dtype))
        if memory.shape[1:] != shape[1:] or len(memory.shape) != len(shape):
            raise ValueError(f"values of {name} have shape {memory.shape}; wanted {shape}")
        if any(_normal_strides(memory)):
            raise ValueError(f"values of {name} must be contiguous")
        with self.handle.busy.alone("the experts"):
            what = Values.GRADIENT if grad else Values.DATA
            count = memory.shape[0]
            self.call("moe_experts_import", index, int(what), first, count, memory.address)

    def zero_touched_gradients(self, *, stream: Any = None) -> None:
        """As zero_gradients, but of those experts alone that were touched since the last time: as
        good if nobody else writes to the gradients of the others."""
        with contextlib.ExitStack() as stack:
            for used in self._used():
                stack.enter_context(used.busy.shared("the experts"))
            self.call("moe_experts_zero_touched_gradients", stream_of(stream))

    def touched(self) -> Any:
        """[E] uint8: 1 for each expert that has received gradients since they were zeroed."""
        count = self.dims.num_experts
        touched = _views.zeros((count,), "uint8")
        memory = _memory.vector("touched", touched, ["uint8"], count, True)
        place = ctypes.cast(memory.address, ctypes.POINTER(ctypes.c_uint8))
        with self.handle.busy.shared("the experts"):
            self.call("moe_experts_touched", place, None)
        return touched

    def __repr__(self) -> str:
        return f"<moe.Experts {'closed' if self.closed else _config.describe(self.config)}>"


class Layer(Phased, ParameterOwner):
    """Gate, experts and what surrounds them. Keywords are the fields of moe_layer_config: output,
    layer_id, shared_gate, residual_mix, dropped, parameters, and with a comm expert_slices,
    max_received, padded_rows, exchange, received, loss_batch, exchange_chunks.

    gate       None: every forward brings a plan with weights
    experts    the pool; may serve several layers
    config     where the other fields come from, as of preset(); None: the defaults
    shared     a pool of experts that every token visits
    residual   the pool of a residual branch
    comm       None: one rank; else every rank makes its layer, with some of the experts each
    placement  with a comm: the number of each expert (or slice) of the pool among those of all
               ranks, any sequence of integers; None: in order of rank
    node_comm  with a comm: the ranks of this rank's node, and
    rail_comm  those with its number in their nodes: rows go to each node once; None: straight
    """

    kind = "layer"

    def __init__(
        self,
        gate: Optional[Gate] = None,
        experts: Optional[Experts] = None,
        config: Optional[_abi.LayerConfig] = None,
        *,
        shared: Optional[Experts] = None,
        residual: Optional[Experts] = None,
        comm: Optional[Comm] = None,
        placement: Optional[Iterable[int]] = None,
        node_comm: Optional[Comm] = None,
        rail_comm: Optional[Comm] = None,
        **fields: Any,
    ) -> None:
        if experts is None:
            raise TypeError("a layer needs experts")
        given = {"gate": gate, "experts": experts, "shared": shared, "residual": residual,
                 "comm": comm, "node_comm": node_comm, "rail_comm": rail_comm}  # fmt: skip
        config = _config.make(_abi.LayerConfig, fields, [*given, "placement"], config)
        # Another layer's numbers are of its own pool, so a base config's are never taken.
        config.placement = _placement(placement, experts) if placement is not None else None
        handle = Handle("layer")
        for name, part in given.items():
            setattr(config, name, part.handle.value if part is not None else None)
            if part is not None:
                handle.kept[name] = part.handle
        self._handle = handle.create("moe_layer_create", ctypes.byref(config))
        self.gate = gate
        self.experts = experts
        self.shared = shared
        self.residual = residual
        self.dims = experts.dims._replace(num_experts=0)  # logits and noise are for a gate
        if gate is not None:
            self.dims = self.dims._replace(
                d_gate=gate.dims.d_gate, groups=gate.dims.groups, num_experts=gate.dims.num_experts
            )

    def _used(self) -> List[Handle]:
        kept = self.handle.kept
        used = [self.handle]
        for name in ("gate", "experts", "shared", "residual"):
            if name in kept:
                used += [kept[name], *kept[name].kept.get("parts", ())]
        return used

    @property
    def config(self) -> _abi.LayerConfig:
        """A copy of the config the layer was made with; its handles are borrowed."""
        config = new(_abi.LayerConfig)
        self.call("moe_layer_get_config", ctypes.byref(config))
        if config.placement:
            numbers = self.expert_numbers
            config.placement = (ctypes.c_int64 * len(numbers))(*numbers)
        return config

    @property
    def expert_numbers(self) -> List[int]:
        """The number of each expert of the pool among those of all ranks; with expert_slices that
        of each slice: slice s of expert e is number e * expert_slices + s."""
        handle, count = self.handle, self.experts.dims.num_experts
        number = library().moe_layer_expert_number
        return [int(number(handle.value, i)) for i in range(count)]

    def _parts(self) -> Iterator[Tuple[str, ParameterOwner]]:
        # Through objects of the layer's own, so that a gate or pool the program has closed still
        # shows its parameters here.
        kept = self.handle.kept
        kinds: Dict[str, Any] = {"gate": Gate, "experts": Experts, "shared": Experts,
                                 "residual": Experts}  # fmt: skip
        for name, kind in kinds.items():
            if name in kept:
                part = kind.__new__(kind)
                part._handle = kept[name]
                yield name, part

    @property
    def parameters(self) -> Dict[str, Parameter]:
        """The parameters of gate, experts and layer by name, in the library's order:
        "gate.weight", "experts.w1", "shared_gate"..."""
        found: Dict[str, Parameter] = {}
        for name, part in self._parts():
            found.update(part._parameters(name + "."))
        own = Layer.__new__(Layer)
        own._handle = self.handle
        return {name: found.get(name, p) for name, p in own._parameters().items()}

    def _zero(self, which: str, stream: Any) -> None:
        with contextlib.ExitStack() as stack:
            for used in self._used():
                stack.enter_context(used.busy.shared(f"the {used.kind}"))
            self.call(f"moe_layer_zero_{which}", stream_of(stream))

    def zero_gradients(self, *, stream: Any = None) -> None:
        """Set every gradient to zero and forget which experts were touched."""
        self._zero("gradients", stream)

    def zero_touched_gradients(self, *, stream: Any = None) -> None:
        """The same, but of pools those experts alone that were touched since the last time."""
        self._zero("touched_gradients", stream)

    def gradient_norm(self, *, stream: Any = None) -> float:
        """The norm of the gradient over all ranks, after reduce_gradients."""
        squared = ctypes.c_double()
        self.call("moe_layer_gradient_norm", ctypes.byref(squared), stream_of(stream))
        return math.sqrt(squared.value)

    def reduce_gradients(self) -> None:
        """Sum the gradients of all but the routed experts over the ranks, in order of rank."""
        self.call("moe_layer_reduce_gradients", None)

    def init_parameters(self, seed: int) -> None:
        """Give every owned parameter its first value; bound data is never written."""
        seed = _config.number("seed", seed, ctypes.c_uint64)
        with contextlib.ExitStack() as stack:
            for used in self._used():
                stack.enter_context(used.busy.shared(f"the {used.kind}"))
            self.call("moe_layer_init_parameters", seed)

    def __repr__(self) -> str:
        return f"<moe.Layer {'closed' if self.closed else _config.describe(self.config)}>"


def _placement(placement: Iterable[int], experts: Experts) -> Any:
    """The numbers of a pool's experts as the library takes them."""
    try:
        given = list(placement)
    except TypeError:
        raise TypeError(f"placement must be a sequence of integers, not {placement!r}") from None
    count = experts.dims.num_experts
    if len(given) != count:
        raise ValueError(
            f"placement is {given}: {len(given)} numbers; the pool has {count} experts"
        )
    int64 = ctypes.c_int64
    numbers = [_config.number(f"placement[{i}]", value, int64) for i, value in enumerate(given)]
    return (int64 * count)(*numbers)
