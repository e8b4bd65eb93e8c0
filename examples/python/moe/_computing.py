"""What gate, pool and layer have in common: a forward and a backward on a pass."""

from __future__ import annotations

import contextlib
import ctypes
from typing import Any, Iterator, List, Optional

from ._arguments import BackwardCall, Dims, ForwardCall
from ._constants import Forward, Status
from ._device import stream_of
from ._handle import Handle, Object, destroy_deferred, refuse_inside_callback
from ._library import InvalidState, check, function
from .passes import Pass
from .plan import Plan

_ARRAYS = ("y", "gate_x", "logits_in", "noise", "noise_primary", "token_mask", "group_begin",
           "token_key", "plan", "loss_weights", "losses_out", "stats_out")  # fmt: skip
# After these the pass does not hold what it held before.
_CHANGED = (Status.OK, Status.CALLBACK, Status.TIMEOUT, Status.TRANSPORT)


class Computing(Object):
    """The common half of gate, pool and layer."""

    kind = ""
    dims: Dims

    def _used(self) -> List[Handle]:
        """The handles whose parameters a call reads."""
        return [self.handle]

    def new_pass(self, *, workspace: Any = None) -> Pass:
        """A pass for this object."""
        return Pass(self, workspace=workspace)  # type: ignore[arg-type]

    @contextlib.contextmanager
    def _in_call(self, handle: Handle, plan: Optional[Plan]) -> Iterator[None]:
        with contextlib.ExitStack() as stack:
            stack.enter_context(handle.busy.alone("the pass"))
            for used in self._used():
                stack.enter_context(used.busy.shared(f"the {used.kind}"))
            if plan is not None and plan.handle.busy is not handle.busy:  # else its own
                stack.enter_context(plan.handle.busy.shared("the plan"))
            yield

    # ---- forward ----

    def forward(
        self,
        pass_: Pass,
        x: Any = None,
        *,
        y: Any = None,
        gate_x: Any = None,
        logits_in: Any = None,
        noise: Any = None,
        noise_primary: Any = None,
        token_mask: Any = None,
        group_begin: Any = None,
        token_key: Any = None,
        plan: Optional[Plan] = None,
        loss_weights: Any = None,
        losses_out: Any = None,
        stats_out: Any = None,
        stream: Any = None,
        **fields: Any,
    ) -> Any:
        """Run forward and return y: the array given, or a new one. A gate returns None.

        Arrays have the meaning of moe_forward_args and are never copied: x [T,D] (leading
        dimensions are folded into T), y [T,O], gate_x, logits_in and noise [T,E], noise_primary
        [T,groups], token_mask [T] uint8 or bool, group_begin [G+1] int64, token_key [T] int64,
        losses_out and stats_out [16]. loss_weights is [16] float64 or a mapping from a loss's
        name to its weight, 0 for the rest. fields are flags (Forward), tokens, token_first, step,
        plan_use, top_k, capacity.

        On a GPU arrays are there, but for group_begin and loss_weights, and y must be given unless
        x is a tensor. stream is a cudaStream_t or an object with one, as PyTorch's; None: the
        legacy default stream.

        The pass keeps x and gate_x alive until its next forward: they must stay unchanged until
        the backward.
        """
        made = self._forward_call(
            x, y=y, gate_x=gate_x, logits_in=logits_in, noise=noise, noise_primary=noise_primary,
            token_mask=token_mask, group_begin=group_begin, token_key=token_key, plan=plan,
            loss_weights=loss_weights, losses_out=losses_out, stats_out=stats_out, stream=stream,
            **fields,
        )  # fmt: skip
        handle = pass_.handle
        with self._in_call(handle, plan):
            handle.refuse_exports("forward")
            check(self._run_forward("forward", handle, made))
        return made.y

    def _forward_call(
        self,
        x: Any = None,
        *,
        y: Any = None,
        gate_x: Any = None,
        logits_in: Any = None,
        noise: Any = None,
        noise_primary: Any = None,
        token_mask: Any = None,
        group_begin: Any = None,
        token_key: Any = None,
        plan: Optional[Plan] = None,
        loss_weights: Any = None,
        losses_out: Any = None,
        stats_out: Any = None,
        stream: Any = None,
        **fields: Any,
    ) -> ForwardCall:
        """The arguments of a forward, checked."""
        dims = self.dims
        made = ForwardCall(dims, fields, _ARRAYS)
        made.args.stream = stream_of(stream)
        made.matrix("x", x, dims.d_model or dims.d_gate)
        made.matrix("gate_x", gate_x, dims.d_gate)
        made.matrix("logits_in", logits_in, dims.num_experts, "logits")
        made.matrix("noise", noise, dims.num_experts)
        made.matrix("noise_primary", noise_primary, dims.groups)
        if made.tokens is None and plan is not None:
            made.tokens = plan.tokens
        made.options(token_mask, group_begin, token_key, loss_weights, losses_out, stats_out)
        if plan is not None:
            made.args.plan = plan.handle.value
        if dims.d_out:
            made.output(y, x)
        elif y is not None:
            raise ValueError("y is given and a gate has no output")
        return made

    def _run_forward(self, name: str, handle: Handle, made: ForwardCall) -> int:
        """Call a forward, or the start of one; what the pass remembers follows its status."""
        refuse_inside_callback()
        destroy_deferred()
        call = function(f"moe_{self.kind}_{name}")
        status: int = call(self.handle.value, handle.value, ctypes.byref(made.args))
        # With any other error the pass is as it was, and still looks at the x it had.
        if status in _CHANGED:
            handle.kept["generation"] += 1
            handle.kept["remembered"] = made.remembered
            handle.kept["had"] = tuple(made.remembered)
            handle.kept["tokens"] = made.tokens
            handle.kept["stream"] = made.args.stream
            handle.kept.pop("moved", None)
            if made.args.flags & (Forward.NO_SAVE | Forward.TRAIN) == Forward.NO_SAVE:
                handle.kept["remembered"] = {}  # no backward will look
        return status

    # ---- backward ----

    def backward(
        self,
        pass_: Pass,
        dy: Any = None,
        *,
        dx: Any = None,
        d_gate_x: Any = None,
        d_logits_out: Any = None,
        entry_weight_grad: Any = None,
        loss_grad: Any = None,
        x: Any = None,
        gate_x: Any = None,
        flags: int = 0,
        stream: Any = None,
    ) -> Any:
        """Run backward on the last forward of `pass_`; returns dx: the array given, or a new one,
        or None with Backward.SKIP_DX. Parameter gradients are added where the parameters say.

        Arrays have the meaning of moe_backward_args: dy [T,O] in; dx, d_gate_x, d_logits_out [T,E]
        out; entry_weight_grad [N] out, in for a gate. loss_grad is [16] of the layer's dtype or a
        mapping from a loss's name to its factor, 1 for the rest. x and gate_x only if they moved.
        stream as of forward().
        """
        made = self._backward_call(
            pass_, dy, dx=dx, d_gate_x=d_gate_x, d_logits_out=d_logits_out,
            entry_weight_grad=entry_weight_grad, loss_grad=loss_grad, x=x, gate_x=gate_x,
            flags=flags, stream=stream,
        )  # fmt: skip
        handle = pass_.handle
        with self._in_call(handle, None):
            made.remember(handle.kept)
            self.call(f"moe_{self.kind}_backward", handle.value, ctypes.byref(made.args))
        return made.dx

    def _backward_call(
        self,
        pass_: Pass,
        dy: Any = None,
        *,
        dx: Any = None,
        d_gate_x: Any = None,
        d_logits_out: Any = None,
        entry_weight_grad: Any = None,
        loss_grad: Any = None,
        x: Any = None,
        gate_x: Any = None,
        flags: int = 0,
        stream: Any = None,
    ) -> BackwardCall:
        """The arguments of a backward, checked."""
        dims, kept = self.dims, pass_.handle.kept
        tokens = kept.get("tokens")
        if tokens is None:
            raise InvalidState("backward needs a forward on this pass first")
        made = BackwardCall(dims, tokens, flags)
        made.args.stream = stream_of(stream)
        made.matrix("dy", dy, dims.d_out, False)
        made.matrix("d_gate_x", d_gate_x, dims.d_gate, True)
        made.matrix("d_logits_out", d_logits_out, dims.num_experts, True, "d_logits")
        width = dims.d_model or dims.d_gate
        made.moved("x", x, width, "x" in kept["had"])
        made.moved("gate_x", gate_x, dims.d_gate, "gate_x" in kept["had"])
        # A gate writes its gradient by x to one of the two.
        only_gate = dims.d_model == 0 and d_gate_x is not None
        before = kept["remembered"].get("x")
        made.gradient(dx, 0 if only_gate else width, before.shape if before else None, dy)
        entries = pass_.plan.entries if entry_weight_grad is not None else 0
        made.options(loss_grad, entry_weight_grad, entries, self.kind != "gate")
        return made

    def __enter__(self) -> Any:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
