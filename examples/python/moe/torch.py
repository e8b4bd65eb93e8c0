"""The layer as a PyTorch module: parameters are torch Parameters, autograd does the rest.

    layer = MoELayer(64, 256, num_experts=8, top_k=2,
                     gate={"kind": "noisy_top_k", "importance_weight": 0.1, "load_weight": 0.1})
    y, losses, stats, _ = layer(x)          # x [..., 64]
    (task_loss(y) + losses.sum()).backward()

The parameters are the library's own, bound in every call to where the tensors are at that moment:
nothing is copied. On CPU, in float32 and float64, bfloat16 and float16, and on NVIDIA GPUs, all but
float64, where libmoe_cuda is; PyTorch 1.13 and later.
"""

from __future__ import annotations

import copy
import threading
import weakref
from typing import Any, Callable, Dict, Iterator, List, Mapping, NamedTuple, Optional, Tuple

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint as _torch_checkpoint

from ._constants import LOSS_SLOTS, Forward, Loss
from ._library import InvalidState
from ._torch_cuda import device_of
from ._torch_engine import DTYPES, Call, Config, Engine, Lease, default_context, initial_values
from ._torch_inputs import check_tensor, matrix, rows, set_plan, vector
from .context import Context
from .functions import selection_bias_step
from .plan import Plan

__all__ = ["MoELayer", "MoEOutput", "checkpoint"]


class MoEOutput(NamedTuple):
    """What a layer returns."""

    y: torch.Tensor  # [..., d_out]
    losses: torch.Tensor  # [16] weighted auxiliary losses by moe.Loss; add what you want to yours
    stats: torch.Tensor  # [16] statistics by moe.Stat; not differentiable
    plan: Optional[Plan] = None  # a copy of the routing, with keep_plan=True


# ---- checkpoints --------------------------------------------------------------------------------


class _Recorder:
    """The passes of a checkpointed function's first run, for its later runs."""

    def __init__(self) -> None:
        self.leases: List[Tuple["MoELayer", Lease, Call]] = []
        self.next: Optional[int] = None  # None: the first run

    def replay(self, layer: "MoELayer", x: torch.Tensor) -> Tuple[Lease, Call]:
        """What the first run had at this place."""
        assert self.next is not None
        if self.next >= len(self.leases) or self.leases[self.next][0] is not layer:
            raise RuntimeError(
                "a checkpointed function called its MoE layers in another order when it was "
                "computed again"
            )
        _, lease, call = self.leases[self.next]
        self.next += 1
        return lease, call


class _Active(threading.local):
    recorder: Optional[_Recorder] = None


_active = _Active()


def checkpoint(
    function: Callable[..., Any], *args: Any, use_reentrant: bool = False, **keywords: Any
) -> Any:
    """torch.utils.checkpoint.checkpoint for functions that contain MoE layers.

    The first run keeps each layer's routing, and when autograd runs the function again every layer
    takes the routing it had: it never routes anew, whatever happened to x or the gate meanwhile,
    and its noise and losses are those of the first run. Calls inside a checkpointed function just
    run theirs: the outermost one keeps the routing and computes all of it again.
    """
    if not torch.is_grad_enabled() or _active.recorder is not None:
        return function(*args, **keywords)
    recorder = _Recorder()
    runs = 0

    def run(*run_args: Any) -> Any:
        nonlocal runs
        recorder.next = None if runs == 0 else 0
        runs += 1
        before, _active.recorder = _active.recorder, recorder
        try:
            return function(*run_args, **keywords)
        finally:
            _active.recorder = before

    return _torch_checkpoint(run, *args, use_reentrant=use_reentrant)


# ---- autograd -----------------------------------------------------------------------------------


class _Run(torch.autograd.Function):
    """One forward and its backward. Inputs are x, gate_x, logits, the plan's weights, and then the
    parameters in the library's order."""

    @staticmethod
    def forward(ctx: Any, engine: Engine, call: Call, lease: Lease, flags: int, x: Any, gate_x: Any,
                logits: Any, weights: Any, *parameters: Any) -> Any:  # fmt: skip
        y = x.new_empty((x.shape[0], engine.d_out))
        losses, stats = engine.forward(lease, call, x, gate_x, logits, parameters, y, flags)
        losses, stats = losses.clone(), stats.clone()
        ctx.engine, ctx.call, ctx.lease = engine, call, lease
        ctx.has = [t is not None for t in (gate_x, logits, weights)]
        ctx.save_for_backward(
            x, *(t for t in (gate_x, logits, weights) if t is not None), *parameters
        )
        ctx.mark_non_differentiable(stats)
        ctx.set_materialize_grads(False)
        lease.node = weakref.ref(ctx)
        return y, losses, stats

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Any, d_losses: Any, _d_stats: Any) -> Any:
        engine, call, lease = ctx.engine, ctx.call, ctx.lease
        saved = list(ctx.saved_tensors)  # refuses tensors that were changed in place
        x = saved.pop(0)
        gate_x, logits, weights = (saved.pop(0) if has else None for has in ctx.has)
        parameters = saved
        need = ctx.needs_input_grad[4:]
        if not lease.complete:  # only the routing was kept
            engine.forward(lease, call, x, gate_x, logits, parameters, None, int(Forward.RECOMPUTE))
        if dy is None:
            dy = x.new_zeros((x.shape[0], engine.d_out))
        if d_losses is None:
            d_losses = x.new_zeros(LOSS_SLOTS, dtype=engine.real)
        outputs: Dict[str, Optional[torch.Tensor]] = {
            "dx": torch.empty_like(x, memory_format=torch.contiguous_format) if need[0] else None,
            "d_gate_x": _empty(gate_x, need[1]),
            "d_logits": _empty(logits, need[2]),
            "weights": _empty(weights, need[3]),
        }
        grads = [_empty(p, wanted) for p, wanted in zip(parameters, need[4:])]
        engine.backward(
            lease, x, gate_x, parameters, rows(dy), d_losses.contiguous(), outputs, grads
        )
        return (None, None, None, None, *outputs.values(), *grads)


def _empty(like: Optional[torch.Tensor], wanted: bool) -> Optional[torch.Tensor]:
    if like is None or not wanted:
        return None
    return torch.empty(like.shape, dtype=like.dtype, device=like.device)


# ---- the module ---------------------------------------------------------------------------------


class MoELayer(nn.Module):
    """A Mixture-of-Experts layer: y = sum over the chosen experts of weight * expert(x).

    d_model, d_hidden, num_experts, top_k
                 as in moe_experts_config and moe_gate_config
    activation   a name of moe.Activation
    preset       a name of moe.presets(): where all fields that are not given come from
    gate         further fields of moe_gate_config (kind, losses' weights, capacity...);
                 d_model=0 for a gate without weights, whose logits every call brings;
                 None for no gate: every call brings ids and weights
    experts      further fields of moe_experts_config (bias, d_out, glu_order, weight_layout...)
    shared, residual
                 fields of the pool of shared experts, and of the residual branch, where they
                 differ from the experts'; they have one expert. None: no such pool
    output, layer_id
                 as in moe_layer_config
    layer        further fields of moe_layer_config (shared_gate, residual_mix, dropped)
    storage      "prepacked": experts compute from a packed copy of their weights, which takes their
                 memory once more and is renewed when a tensor was written to; None: "row_major",
                 packed in every call
    checkpoint   True: keep the routing of a forward and compute activations anew in the backward
    seed         of the first values, which are the library's: the same numbers everywhere
    context      a moe.Context; None: one that all layers of a device share
    dtype        torch.float32, float64, bfloat16 or float16; None: torch's default. In 16 bits
                 logits, noise, weights and losses are float32, and a gate's parameters may be
    device       where the parameters are at first; the layer computes where they are

    On a GPU every call is put on PyTorch's current stream, and memory is PyTorch's. A forward waits
    once for the rows of each expert, unless layer={"exchange": "padded", "padded_rows": C} with a
    gate of capacity C: then a step can be captured by torch.cuda.graph. In a graph the number of
    the step is what it was in the capture, and so is the noise.

    Parameters are registered as gate.weight, experts.w1 and so on, the library's own names; what
    is not trained, as gate.selection_bias, is a buffer.

    With storage="prepacked" a forward or backward looks at the versions that PyTorch counts of the
    tensors: optimizers, load_state_dict and everything else that writes to a tensor in place are
    seen. What writes past them (through tensor.data, numpy or a pointer) must call
    weights_changed().

    In training mode a gate with noise of any kind draws it by the number of a step and the token's
    place. The number comes from PyTorch's generator, as dropout's randomness does:
    torch.manual_seed repeats it, and torch.utils.checkpoint, which restores the generator, draws it
    again.

    PyTorch and the library each have threads of their own for the same cores. Where PyTorch's spin
    while they wait, both get slower: OMP_WAIT_POLICY=passive in the environment, or
    torch.set_num_threads(1), ends that.
    """

    def __init__(
        self,
        d_model: int,
        d_hidden: int,
        num_experts: int,
        top_k: Optional[int] = None,
        *,
        activation: Optional[str] = None,
        preset: Optional[str] = None,
        gate: Optional[Mapping[str, Any]] = {},
        experts: Mapping[str, Any] = {},
        shared: Optional[Mapping[str, Any]] = None,
        residual: Optional[Mapping[str, Any]] = None,
        output: Optional[str] = None,
        layer_id: int = 0,
        layer: Mapping[str, Any] = {},
        storage: Optional[str] = None,
        checkpoint: bool = False,
        seed: int = 0,
        context: Optional[Context] = None,
        dtype: Optional[torch.dtype] = None,
        device: Any = None,
    ) -> None:
        super().__init__()
        if storage not in (None, "row_major", "prepacked"):
            raise ValueError(f"storage is {storage!r}; it can be 'row_major' or 'prepacked': the "
                             "tensors are row-major")  # fmt: skip
        for fields in (gate or {}, experts, shared or {}, residual or {}, layer):
            for name in ("dtype", "parameters"):
                if name in fields:
                    raise TypeError(f"{name} is not a field to give: the module's tensors say it")
        of_gate = None
        if gate is not None:
            of_gate = {"d_model": d_model, "num_experts": num_experts, **_given(top_k=top_k),
                       **gate}  # fmt: skip
        of_experts = {"d_model": d_model, "d_hidden": d_hidden, "num_experts": num_experts,
                      **_given(activation=activation, storage=storage), **experts}  # fmt: skip
        pools = {name: None if pool is None else {**of_experts, "num_experts": 1, **pool}
                 for name, pool in (("shared", shared), ("residual", residual))}  # fmt: skip
        of_layer = {**_given(output=output), "layer_id": layer_id, **layer}
        self._config = Config(preset, of_gate, of_experts, of_layer, pools)
        self._context = context
        self._engines: Dict[Tuple[torch.dtype, torch.device], Engine] = {}
        self._making = threading.Lock()
        self.checkpoint = checkpoint
        dtype = dtype or torch.get_default_dtype()
        place = device_of(device)
        engine = self._engine(dtype, place)
        self.gate, self.experts = nn.Module(), nn.Module()
        for name in self._config.pools:
            self.add_module(name, nn.Module())
        self._names = list(engine.shapes)
        for name, shape in engine.shapes.items():
            owner, own = self._place(name)
            value = torch.empty(shape, dtype=engine.dtypes[name], device=place)
            if name in engine.buffers:
                owner.register_buffer(own, value)
            else:
                owner.register_parameter(own, nn.Parameter(value))
        self.reset_parameters(seed)

    # ---- parameters -----------------------------------------------------------------------------

    def _engine(self, dtype: torch.dtype, device: Any = None) -> Engine:
        if dtype not in DTYPES:
            raise TypeError(
                f"the parameters are {dtype}; the library has torch.float32 and float64, and "
                "torch.bfloat16 and float16"
            )
        device = device_of(device)
        with self._making:
            key = dtype, device
            if key not in self._engines:
                context = self._context
                number = getattr(context, "device", None)
                if context is not None and number != device.index:
                    raise ValueError(f"the parameters are on {device}; the context is {context!r}")
                context = context or default_context(device)
                self._engines[key] = Engine(self._config, context, dtype, device)
            return self._engines[key]

    @property
    def context(self) -> Context:
        """Where the work runs."""
        if self._context is not None:
            return self._context
        return default_context(device_of(self.tensors()[0].device))

    def _dtype(self, tensors: List[torch.Tensor]) -> torch.dtype:
        """The layer's dtype: the experts', for a gate's parameters may be of another."""
        others = [t.dtype for name, t in zip(self._names, tensors) if not name.startswith("gate.")]
        return others[0] if others else tensors[0].dtype

    def _place(self, name: str) -> Tuple[nn.Module, str]:
        """The module that has a parameter of the library, and the name it has there."""
        part, dot, own = name.rpartition(".")
        return (getattr(self, part), own) if dot else (self, own)

    def tensors(self) -> List[torch.Tensor]:
        """The parameters and buffers in the library's order."""
        return [getattr(*self._place(name)) for name in self._names]

    def update_selection_bias(self, routed: Any, rate: float = 0.001) -> None:
        """Balancing without a loss: selection_bias_e += rate sign(mean(counts) - counts_e).

        routed  [E] int64 entries of each expert, summed over micro-batches and ranks; or the plan
                of one forward, as of keep_plan=True
        """
        bias = getattr(self.gate, "selection_bias", None)
        if bias is None:
            raise InvalidState("the gate has no selection_bias: gate={'selection_bias': 1}")
        if bias.is_cuda:
            return self._update_there(bias, routed, rate)
        if isinstance(routed, Plan):
            ids = torch.as_tensor(routed.arrays().expert_of_entry).long()
            routed = torch.bincount(ids[ids >= 0], minlength=bias.numel())
        selection_bias_step(bias, routed, rate, out=bias)

    def _update_there(self, bias: torch.Tensor, routed: Any, rate: float) -> None:
        """The same on a GPU, without waiting where the counts are there."""
        if isinstance(routed, Plan):
            ids = torch.as_tensor(routed.arrays().expert_of_entry).long()
            routed = torch.bincount(ids[ids >= 0], minlength=bias.numel())
        counts = routed.to(bias.device).double()
        with torch.no_grad():
            bias += (rate * torch.sign(counts.mean() - counts)).to(bias.dtype)

    def weights_changed(self) -> None:
        """Tell of weights that were written past PyTorch: see `storage`."""
        for engine in list(self._engines.values()):
            with engine.lock:
                engine.weights_changed()

    def reset_parameters(self, seed: int = 0) -> None:
        """Write the library's first values for `seed` into the parameters."""
        tensors = self.tensors()
        values = initial_values(self._config, self._dtype(tensors), seed)
        with torch.no_grad():
            for name, tensor in zip(self._names, tensors):
                tensor.copy_(values[name])

    def __getstate__(self) -> Dict[str, Any]:
        # Handles are made anew where they are needed; a context given by the program stays in this
        # process.
        state = self.__dict__.copy()
        state["_engines"], state["_making"], state["_context"] = {}, None, None
        return state

    def __setstate__(self, state: Dict[str, Any]) -> None:
        super().__setstate__(state)
        self._making = threading.Lock()

    def __deepcopy__(self, memo: Dict[int, Any]) -> "MoELayer":
        twin = type(self).__new__(type(self))
        memo[id(self)] = twin
        twin.__setstate__(copy.deepcopy(self.__getstate__(), memo))
        twin._context = self._context
        return twin

    # ---- forward --------------------------------------------------------------------------------

    def forward(
        self,
        x: torch.Tensor,
        *,
        gate_x: Optional[torch.Tensor] = None,
        logits: Optional[torch.Tensor] = None,
        ids: Optional[torch.Tensor] = None,
        weights: Optional[torch.Tensor] = None,
        mask: Optional[torch.Tensor] = None,
        group_begin: Optional[torch.Tensor] = None,
        noise: Optional[torch.Tensor] = None,
        noise_primary: Optional[torch.Tensor] = None,
        token_key: Optional[torch.Tensor] = None,
        step: Optional[int] = None,
        token_first: int = 0,
        top_k: Optional[int] = None,
        capacity: Optional[int] = None,
        plan: Optional[Plan] = None,
        keep_plan: bool = False,
    ) -> MoEOutput:
        """Route x [..., d_model], run the experts and combine.

        gate_x       [..., d of the gate] what the gate sees instead of x
        logits       [..., E] of the program instead of the gate's own
        ids, weights [..., K] routing of the program: experts (-1: none) and their weights
        mask         [...] bool, False for padding: no expert, in no loss, y = 0
        group_begin  [G+1] int64 on the CPU, first token of each group, for capacity and losses by
                     group
        noise        [..., E] standard normal numbers instead of the library's
        noise_primary
                     [..., groups] the same for the primary gate of a hierarchical one
        token_key    [...] int64, what a hash gate draws the experts from
        step, token_first
                     numbers of the step and of the first token, for the noise. With the same step
                     and token_first set, micro-batches draw what the whole batch would
        top_k, capacity
                     of this call instead of the configuration's
        plan         a moe.Plan whose selection is taken; weights and losses are computed
        keep_plan    return a copy of the routing

        x, gate_x, logits, weights and all parameters get gradients, of their dtype. Rows are read
        where they lie if their elements are side by side. Under autocast, inputs are converted to
        the parameters' dtype.
        """
        parameters = self.tensors()
        dtype, device = self._dtype(parameters), parameters[0].device
        engine = self._engine(dtype, device)
        for name, tensor in zip(self._names, parameters):
            own = tensor.dtype if engine.accepts(name, tensor.dtype) else dtype
            check_tensor(name, tensor, own, False, device)
            if tensor.shape != engine.shapes[name]:  # the library sees an address only
                want = engine.shapes[name]
                raise ValueError(f"{name} has shape {tuple(tensor.shape)}; wanted {want}")
        shape = x.shape[:-1]
        call = Call()
        recorder = _active.recorder
        replay = recorder is not None and recorder.next is not None
        x = matrix("x", x, engine.d_model, shape, dtype, device)
        gate_x = matrix("gate_x", gate_x, engine.d_gate, shape, dtype, device)
        logits = matrix("logits", logits, engine.num_experts, shape, engine.real, device)
        if replay:
            assert recorder is not None
            lease, call = recorder.replay(self, x)
        else:
            lease = engine.take()
            call.token_first = token_first
            if step is not None:
                call.step = step
            elif self.training and engine.draws_noise and noise is None:
                call.step = int(torch.randint(2**32, ()))
            call.top_k, call.capacity = top_k, capacity
            call.flags = int(Forward.TRAIN) if self.training else 0
            call.noise = matrix("noise", noise, engine.num_experts, shape, engine.real, device)
            call.noise_primary = matrix(
                "noise_primary", noise_primary, engine.groups, shape, engine.real, device
            )
            call.token_key = vector("token_key", token_key, torch.int64, x.shape[0], device)
            call.mask = vector("mask", mask, torch.bool, x.shape[0], device)
            call.group_begin = vector("group_begin", group_begin, torch.int64, None)
            set_plan(call, engine, x.shape[0], ids, weights, plan)
        weights = None if weights is None else weights.reshape(-1)
        y, losses, stats = self._run(
            engine, call, lease, recorder, replay, x, gate_x, logits, weights, parameters
        )
        kept = lease.pass_.plan.copy() if keep_plan and lease.pass_ is not None else None
        if replay and not y.requires_grad:  # no backward will come that would let it go
            lease.let_go()
        return MoEOutput(y.reshape(*shape, engine.d_out), losses, stats, kept)

    def _run(self, engine: Engine, call: Call, lease: Lease, recorder: Optional[_Recorder],
             replay: bool, x: Any, gate_x: Any, logits: Any, weights: Any,
             parameters: List[torch.Tensor]) -> Any:  # fmt: skip
        inputs = (x, gate_x, logits, weights, *parameters)
        wanted = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in inputs)
        flags = 0
        if replay:
            flags = int(Forward.RECOMPUTE)
        elif recorder is not None:
            recorder.leases.append((self, lease, call))
            lease.recorded = True
            flags = int(Forward.PLAN_ONLY)
        elif not wanted:
            flags = int(Forward.NO_SAVE)
        elif self.checkpoint:
            flags = int(Forward.PLAN_ONLY)
        return _Run.apply(engine, call, lease, flags, *inputs)

    def extra_repr(self) -> str:
        """The configuration, as given."""
        parts: List[Iterator[Tuple[str, Any]]] = [iter(self._config.experts.items())]
        if self._config.gate is not None:
            gate, experts = self._config.gate, self._config.experts
            parts.append((k, v) for k, v in gate.items() if k not in experts)
        return ", ".join(f"{name}={value}" for part in parts for name, value in part)


def _given(**fields: Any) -> Dict[str, Any]:
    return {name: value for name, value in fields.items() if value is not None}


def loss(losses: torch.Tensor, name: str) -> torch.Tensor:
    """One of a layer's losses by its name, "load"."""
    if name.upper() not in Loss.__members__:
        known = ", ".join(member.lower() for member in Loss.__members__)
        raise ValueError(f"there is no loss {name!r}; there are {known}")
    return losses[Loss[name.upper()]]
