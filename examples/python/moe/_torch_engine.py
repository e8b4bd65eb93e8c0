"""The library's side of moe.torch: handles, passes and calls over the memory of torch tensors.

An Engine is the layer of one configuration, dtype and device. Its parameters are bound, in every
call, to where the tensors are at that moment; a lock keeps the calls of two threads apart. A Lease
is a pass in somebody's hands: it goes back to the engine when nothing can ask for its backward any
more.
"""

from __future__ import annotations

import copy
import ctypes
import threading
import weakref
from typing import Any, Dict, List, Mapping, Optional, Sequence, Tuple

import torch

from . import _abi
from ._constants import (
    LOSS_SLOTS,
    STAT_SLOTS,
    Backward,
    ChoiceNoise,
    Drop,
    DType,
    Forward,
    GateKind,
    Parameters,
    PlanUse,
    SecondChoice,
    Storage,
)
from ._handle import destroy_deferred, refuse_inside_callback
from ._library import InvalidState, check, library, new
from ._preset import preset
from ._torch_cuda import cuda_context, is_capturing, stream_of
from .context import Context
from .objects import Experts, Gate, Layer
from .passes import Pass
from .plan import Plan

DTYPES = {torch.float32: DType.F32, torch.float64: DType.F64, torch.bfloat16: DType.BF16,
          torch.float16: DType.F16}  # fmt: skip
_TORCH = {int(code): dtype for dtype, code in DTYPES.items()}

_context: Optional[Context] = None
_context_lock = threading.Lock()


def default_context(device: torch.device = torch.device("cpu")) -> Context:
    """The context that layers share unless they are given one: all cores, or the GPU."""
    global _context
    if device.type == "cuda":
        return cuda_context(device.index)
    with _context_lock:
        if _context is None:
            _context = Context()
        return _context


def address(tensor: Optional[torch.Tensor]) -> Optional[int]:
    """Where a tensor's memory is; None for none."""
    return None if tensor is None else tensor.data_ptr() or None


def row_stride(tensor: torch.Tensor) -> int:
    """The row stride for the library: 0 for the ordinary one, which one row always has."""
    return tensor.stride(0) if tensor.shape[0] > 1 else 0


class Config:
    """How a layer is made: a preset, and keyword arguments of Gate, Experts and Layer. gate None,
    preset None or a pool None: there is none."""

    def __init__(
        self,
        preset: Optional[str],
        gate: Optional[Mapping[str, Any]],
        experts: Mapping[str, Any],
        layer: Mapping[str, Any],
        pools: Mapping[str, Optional[Mapping[str, Any]]],
    ) -> None:
        self.preset = preset
        self.gate = None if gate is None else dict(gate)
        self.experts = dict(experts)
        self.layer = dict(layer)
        self.pools = {name: dict(pool) for name, pool in pools.items() if pool is not None}

    def make(self, context: Context, dtype: DType, parameters: Parameters) -> Layer:
        """The layer, with parameters where `parameters` says."""
        own = {"dtype": dtype, "parameters": parameters}
        base = None if self.preset is None else preset(self.preset)
        of_gate, of_experts, of_layer = base if base is not None else (None, None, None)
        gate = None if self.gate is None else Gate(context, of_gate, **self.gate, **own)
        experts = Experts(context, of_experts, **self.experts, **own)
        pools: Dict[str, Any] = {name: Experts(context, of_experts, **pool, **own)
                                 for name, pool in self.pools.items()}  # fmt: skip
        return Layer(gate, experts, of_layer, parameters=parameters, **pools, **self.layer)


def _draws(gate: _abi.GateConfig) -> bool:
    """Whether a forward in training depends on the number of its step."""
    return bool(
        gate.kind in (GateKind.NOISY_TOP_K, GateKind.HIERARCHICAL)
        or gate.choice_noise != ChoiceNoise.NONE
        or gate.second_choice == SecondChoice.RANDOM
        or gate.drop_policy == Drop.RANDOM
        or gate.jitter
    )


class Lease:
    """A pass in flight. `node` is the autograd node that may call its backward."""

    def __init__(self, engine: "Engine") -> None:
        self.pass_: Optional[Pass] = None
        self.complete = False  # activations are there: a backward can run
        self.results: Tuple[torch.Tensor, torch.Tensor] = ()  # type: ignore[assignment]
        self.node: Optional["weakref.ref[Any]"] = None
        self.recorded = False  # a checkpoint will come back for it
        self.frugal = False  # memory matters more than time: only the routing waits
        self.plan: Optional[Plan] = None  # the routing, when activations have been let go
        self.used = False  # has had a backward
        self.captured = False  # a graph may replay it at any time
        self._engine = engine

    def give_back(self) -> None:
        """Return the pass, for others to use, or let it go."""
        pass_, self.pass_ = self.pass_, None
        if pass_ is not None and self.captured:
            self._engine.captured.append(pass_)
        elif pass_ is not None and not self.frugal:
            self._engine.passes.append(pass_)

    def let_go(self) -> None:
        """Keep the routing and free the activations, although the graph may live on: a program's
        loss holds every node of its graph until the last one has had its backward."""
        pass_ = self.pass_
        if self.frugal and pass_ is not None:
            self.plan, self.pass_, self.complete = pass_.plan.copy(), None, False

    def __del__(self) -> None:
        self.give_back()


class Call:
    """The arguments of one forward that are no differentiable tensors."""

    def __init__(self) -> None:
        self.flags = 0
        self.step = 0
        self.token_first = 0
        self.mask: Optional[torch.Tensor] = None
        self.group_begin: Optional[torch.Tensor] = None
        self.noise: Optional[torch.Tensor] = None
        self.noise_primary: Optional[torch.Tensor] = None
        self.token_key: Optional[torch.Tensor] = None
        self.plan: Optional[Plan] = None
        self.plan_use = PlanUse.IDS_AND_WEIGHTS
        self.top_k: Optional[int] = None
        self.capacity: Optional[int] = None


class Engine:
    """The library's layer for one configuration, dtype and device."""

    def __init__(
        self, config: Config, context: Context, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.dtype = dtype
        self.device = device
        # Of logits, noise, weights and losses.
        self.real = torch.float32 if dtype in (torch.bfloat16, torch.float16) else dtype
        self.context = context
        self.layer = config.make(context, DTYPES[dtype], Parameters.BOUND)
        self.lock = threading.Lock()
        self.passes: List[Pass] = []  # append and pop are atomic
        self.captured: List[Pass] = []  # of graphs, for as long as this lives
        self._leases: "weakref.WeakSet[Lease]" = weakref.WeakSet()
        self._leases_lock = threading.Lock()
        self.shapes: Dict[str, Tuple[int, ...]] = {
            name: p.shape for name, p in self.layer.parameters.items()
        }
        # The library's own choice; in 16 bits a gate's buffer and thresholds stay float32.
        self.dtypes = {
            name: _TORCH[p.record.data_dtype] for name, p in self.layer.parameters.items()
        }
        self._bindings = [new(_abi.Binding) for _ in self.shapes]
        pools = (self.layer.experts, self.layer.shared, self.layer.residual)
        self._packed = [
            pool for pool in pools if pool and pool.config.storage == Storage.PREPACKED
        ]
        self._seen: List[Tuple[int, int]] = []  # where tensors were, and their versions
        experts = self.layer.experts
        assert experts is not None
        self.d_model, self.d_out = experts.dims.d_model, experts.dims.d_out
        self.num_experts = experts.dims.num_experts
        self.d_gate, self.groups = self.layer.dims.d_gate, self.layer.dims.groups
        gate = self.layer.gate
        self.draws_noise = gate is not None and _draws(gate.config)
        self.buffers = {name for name, p in self.layer.parameters.items() if not p.trainable}

    def accepts(self, name: str, dtype: torch.dtype) -> bool:
        """Whether a parameter may be of this dtype: a gate's also of what is computed with."""
        return dtype == self.dtype or (name.startswith("gate.") and dtype == self.real)

    # ---- passes ---------------------------------------------------------------------------------

    def take(self) -> Lease:
        """A pass, from those that came back or new."""
        with self._leases_lock:
            self._reclaim()
            lease = Lease(self)
            self._leases.add(lease)
        try:
            lease.pass_ = self.passes.pop()
        except IndexError:
            lease.pass_ = Pass(self.layer)
        return lease

    def _reclaim(self) -> None:
        """Take passes back whose graph autograd has freed although somebody still holds its output:
        such a node has no saved tensors any more. (They are not unpacked by looking.)"""
        for lease in list(self._leases):
            node = lease.node() if lease.node is not None else None
            if not lease.used or lease.recorded or node is None:
                continue
            try:
                getattr(node, "_raw_saved_tensors", None)
            except RuntimeError:
                lease.give_back()

    # ---- calls ----------------------------------------------------------------------------------

    def _bind(
        self, data: Sequence[torch.Tensor], grads: Sequence[Optional[torch.Tensor]]
    ) -> None:
        handle = self.layer.handle.value
        for i, (binding, tensor, grad) in enumerate(zip(self._bindings, data, grads)):
            binding.data = address(tensor)
            binding.grad = address(grad)
            binding.data_dtype = int(DTYPES[tensor.dtype])
            binding.grad_dtype = int(DTYPES[tensor.dtype if grad is None else grad.dtype])
            plain = tensor.is_contiguous()
            for d in range(tensor.dim()):
                binding.data_stride[d] = 0 if plain else tensor.stride(d)
            check(library().moe_layer_bind(handle, i, ctypes.byref(binding)))
        if self._packed:
            self._note_changes(data)

    def _note_changes(self, data: Sequence[torch.Tensor]) -> None:
        """Have packed copies renewed if a tensor is another one than in the last call, or was written
        to since. Tensors of inference mode do not say."""
        silent = any(tensor.is_inference() for tensor in data)
        seen = [] if silent else [(tensor.data_ptr(), tensor._version) for tensor in data]
        if silent or seen != self._seen:
            self.weights_changed()
        self._seen = seen

    def weights_changed(self) -> None:
        """Have packed copies renewed."""
        for pool in self._packed:
            check(library().moe_experts_weights_changed(pool.handle.value))

    def _enter(self) -> None:
        refuse_inside_callback()
        destroy_deferred()

    def forward(
        self,
        lease: Lease,
        call: Call,
        x: torch.Tensor,
        gate_x: Optional[torch.Tensor],
        logits: Optional[torch.Tensor],
        parameters: Sequence[torch.Tensor],
        y: Optional[torch.Tensor],
        flags: int,
    ) -> Tuple[torch.Tensor, torch.Tensor]:
        """Run forward on the lease's pass; returns losses and statistics."""
        again = bool(flags & Forward.RECOMPUTE)
        pass_, plan, plan_use = lease.pass_, call.plan, call.plan_use
        if pass_ is None:  # its activations were let go: a new pass, the old routing
            assert again
            pass_, flags = Pass(self.layer), flags & ~int(Forward.RECOMPUTE)
            if plan is None:
                plan, plan_use = lease.plan, PlanUse.IDS
            if y is None:  # nobody asks for it, but only a recompute can do without
                y = x.new_empty((x.shape[0], self.d_out))
        args = _forward_arguments(call, x, gate_x, logits, y)
        args.flags = call.flags | flags
        args.stream = stream_of(self.device)
        lease.captured = lease.captured or is_capturing(self.device)
        if plan is not None and not flags & Forward.RECOMPUTE:
            args.plan, args.plan_use = plan.handle.value, int(plan_use)
        if not again:  # a kept routing has its K and capacity, losses and statistics stay
            if call.top_k is not None:
                args.top_k = call.top_k
            if call.capacity is not None:
                args.capacity = call.capacity
            losses = torch.zeros(LOSS_SLOTS, dtype=self.real, device=self.device)
            stats = torch.zeros(STAT_SLOTS, dtype=self.real, device=self.device)
            args.losses_out, args.stats_out = address(losses), address(stats)
            lease.results = (losses, stats)
        with self.lock:
            self._enter()
            self._bind(parameters, [None] * len(parameters))
            check(library().moe_layer_forward(
                self.layer.handle.value, pass_.handle.value, ctypes.byref(args)))  # fmt: skip
            if flags & Forward.PLAN_ONLY:
                lease.frugal = True
                check(library().moe_pass_trim(pass_.handle.value))
        lease.pass_ = pass_
        lease.complete = not flags & (Forward.PLAN_ONLY | Forward.NO_SAVE)
        return lease.results

    def backward(
        self,
        lease: Lease,
        x: torch.Tensor,
        gate_x: Optional[torch.Tensor],
        parameters: Sequence[torch.Tensor],
        dy: torch.Tensor,
        loss_grad: torch.Tensor,
        outputs: Mapping[str, Optional[torch.Tensor]],
        grads: Sequence[Optional[torch.Tensor]],
    ) -> None:
        """Run backward: into `outputs` (dx, d_gate_x, d_logits, weights) and `grads`, all set."""
        pass_ = lease.pass_
        if pass_ is None:
            raise InvalidState("the pass of this backward has been given back")
        args = new(_abi.BackwardArgs)
        args.flags = Backward.OVERWRITE
        args.stream = stream_of(self.device)
        inputs = [outputs[name] for name in ("dx", "d_gate_x", "d_logits")]
        if all(t is None for t in inputs):
            args.flags |= Backward.SKIP_DX
        if all(t is None for t in grads):
            args.flags |= Backward.SKIP_PARAMETERS
        args.dy, args.dy_stride = address(dy), row_stride(dy)
        args.dx, args.d_gate_x, args.d_logits_out = (address(t) for t in inputs)
        args.entry_weight_grad = address(outputs["weights"])
        args.loss_grad = address(loss_grad)
        args.x, args.x_stride = address(x), x.stride(0) if x.shape[0] else 0
        if gate_x is not None:
            args.gate_x, args.gate_x_stride = address(gate_x), gate_x.stride(0) if x.shape[0] else 0
        with self.lock:
            self._enter()
            self._bind(parameters, grads)
            check(library().moe_layer_backward(
                self.layer.handle.value, pass_.handle.value, ctypes.byref(args)))  # fmt: skip
        lease.used = True
        lease.let_go()


def _forward_arguments(
    call: Call,
    x: torch.Tensor,
    gate_x: Optional[torch.Tensor],
    logits: Optional[torch.Tensor],
    y: Optional[torch.Tensor],
) -> _abi.ForwardArgs:
    """What every forward of a call gets, the recompute too."""
    args = new(_abi.ForwardArgs)
    args.tokens, args.token_first, args.step = x.shape[0], call.token_first, call.step
    args.x, args.x_stride = address(x), row_stride(x)
    args.y = address(y)
    if gate_x is not None:
        args.gate_x, args.gate_x_stride = address(gate_x), row_stride(gate_x)
    if logits is not None:
        args.logits_in, args.logits_stride = address(logits), row_stride(logits)
    if call.noise is not None:
        args.noise, args.noise_stride = address(call.noise), row_stride(call.noise)
    if call.noise_primary is not None:
        args.noise_primary = address(call.noise_primary)
        args.noise_primary_stride = row_stride(call.noise_primary)
    args.token_key = address(call.token_key)
    args.token_mask = address(call.mask)
    if call.group_begin is not None:
        args.group_begin, args.groups = address(call.group_begin), len(call.group_begin) - 1
    return args


def initial_values(config: Config, dtype: torch.dtype, seed: int) -> Dict[str, torch.Tensor]:
    """The parameters' first values by the library's rule, on the CPU: the same numbers
    everywhere."""
    config = copy.copy(config)  # what is said of rows has no meaning there
    config.layer = {k: v for k, v in config.layer.items() if k not in ("exchange", "padded_rows")}
    config.experts = {k: v for k, v in config.experts.items() if k != "storage"}
    config.pools = {
        name: {k: v for k, v in pool.items() if k != "storage"}
        for name, pool in config.pools.items()
    }
    layer = config.make(default_context(), DTYPES[dtype], Parameters.OWNED_NO_GRAD)
    layer.init_parameters(seed)
    values = {}
    for name, p in layer.parameters.items():
        own = _TORCH[p.record.data_dtype]
        raw = (ctypes.c_char * (p.size * dtype_size(own))).from_address(p.record.data)
        values[name] = torch.frombuffer(raw, dtype=own).reshape(p.shape).clone()
    return values


def dtype_size(dtype: torch.dtype) -> int:
    """Bytes of an element."""
    return torch.empty((), dtype=dtype).element_size()
