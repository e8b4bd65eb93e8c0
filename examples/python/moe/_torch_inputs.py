"""Checking the tensors of a call of moe.torch, and the routing that a program brings."""

from __future__ import annotations

from typing import Any, Optional

import torch

from ._constants import PlanUse
from ._torch_cuda import wait_for
from ._torch_engine import Call, Engine
from .plan import Plan


def rows(tensor: torch.Tensor) -> torch.Tensor:
    """A matrix whose rows the library can read where they are; only others are copied."""
    rows, width = tensor.shape
    fits = width <= 1 or tensor.stride(1) == 1
    return tensor if fits and (rows <= 1 or tensor.stride(0) >= width) else tensor.contiguous()


def check_tensor(
    name: str, tensor: torch.Tensor, dtype: torch.dtype, convert: bool, device: torch.device
) -> torch.Tensor:
    """The tensor, on this device and of this dtype; under autocast `convert` makes it so."""
    if tensor.device != device:
        raise ValueError(f"{name} is on {tensor.device}; the layer's parameters are on {device}")
    if tensor.dtype != dtype:
        if convert and _autocast(device):
            return tensor.to(dtype)
        raise TypeError(f"{name} is {tensor.dtype}; the layer's parameters are {dtype}")
    return tensor


def _autocast(device: torch.device) -> bool:
    try:
        return torch.is_autocast_enabled(device.type)
    except TypeError:  # before it took a device
        cpu = device.type == "cpu"
        return torch.is_autocast_cpu_enabled() if cpu else torch.is_autocast_enabled()


def matrix(
    name: str,
    tensor: Optional[torch.Tensor],
    width: int,
    shape: Any,
    dtype: torch.dtype,
    device: torch.device,
) -> Any:
    """Rows of `width` elements, one for each token of `shape`; None stays None."""
    if tensor is None:
        return None
    tensor = check_tensor(name, tensor, dtype, True, device)
    if tensor.dim() < 1 or tensor.shape[-1] != width or tensor.shape[:-1] != shape:
        want = tuple(shape) + (width,)
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}; wanted {want}")
    return rows(tensor.reshape(shape.numel(), width))


def vector(
    name: str,
    tensor: Optional[torch.Tensor],
    dtype: torch.dtype,
    count: Optional[int],
    device: torch.device = torch.device("cpu"),
) -> Any:
    """A contiguous vector, of `count` elements if that is given; None stays None."""
    if tensor is None:
        return None
    if tensor.dtype != dtype or tensor.device != device:
        raise TypeError(f"{name} is {tensor.dtype} on {tensor.device}; wanted {dtype} on {device}")
    if count is not None and tensor.numel() != count:
        raise ValueError(f"{name} has {tensor.numel()} elements; there are {count} tokens")
    return tensor.reshape(-1).contiguous()


def set_plan(call: Call, engine: Engine, tokens: int, ids: Optional[torch.Tensor],
              weights: Optional[torch.Tensor], plan: Optional[Plan]) -> None:  # fmt: skip
    """The routing that the program brings: a plan for its selection, or ids and weights."""
    if (ids is None) != (weights is None):
        raise TypeError("ids and weights go together")
    if plan is not None and ids is not None:
        raise TypeError("plan clashes with ids and weights")
    if plan is not None:
        call.plan, call.plan_use = plan, PlanUse.IDS
    if ids is None or weights is None:
        return
    check_tensor("weights", weights, engine.real, False, engine.device)
    if ids.device != engine.device:
        raise ValueError(f"ids are on {ids.device}, the layer's parameters on {engine.device}")
    if ids.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"ids are {ids.dtype}; wanted torch.int32 or torch.int64")
    if ids.shape != weights.shape or (ids.numel() % tokens if tokens else ids.numel()):
        raise ValueError(
            f"ids have shape {tuple(ids.shape)}, weights {tuple(weights.shape)}, "
            f"for {tokens} tokens"
        )
    count = ids.numel() // tokens if tokens else 1
    ids = ids.detach().reshape(tokens, count)
    if call.mask is not None:  # padding goes nowhere
        ids = ids.masked_fill(~call.mask[:, None], -1)
    made = Plan(engine.context)
    ids, given = ids.contiguous(), weights.detach().reshape(tokens, count).contiguous()
    wait_for(engine.device)  # the library reads them on the default stream
    made.build(ids, given, num_experts=engine.num_experts)
    call.plan, call.plan_use = made, PlanUse.IDS_AND_WEIGHTS
