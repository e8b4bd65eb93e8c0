"""PyTorch's memory and streams for contexts on a GPU."""

from __future__ import annotations

import threading
from typing import Any, Dict, Optional

import torch

from .context import CudaContext

_contexts: Dict[int, CudaContext] = {}
_lock = threading.Lock()


def cuda_context(index: int) -> CudaContext:
    """The context of a device that layers share, made at its first use; its memory is PyTorch's.

    The caching allocator gives memory out again for the stream it was of, with work on that still
    running. The library wants memory that is free on every stream, so it has a stream of its own
    here, on which nothing ever runs.
    """
    with _lock:
        if index not in _contexts:
            place = torch.cuda.Stream(index)

            def allocate(size: int, _alignment: int, _stream: Optional[int]) -> int:
                return int(torch.cuda.caching_allocator_alloc(size, index, place))

            def release(address: int, _size: int, _stream: Optional[int]) -> None:
                torch.cuda.caching_allocator_delete(address)

            _contexts[index] = CudaContext(index, alloc=(allocate, release))
        return _contexts[index]


def stream_of(device: torch.device) -> Optional[int]:
    """PyTorch's current stream of a device; None for the CPU."""
    if device.type != "cuda":
        return None
    return torch.cuda.current_stream(device).cuda_stream or None


def is_capturing(device: torch.device) -> bool:
    """Whether the current stream is being captured in a graph."""
    return device.type == "cuda" and bool(torch.cuda.is_current_stream_capturing())


def wait_for(device: torch.device) -> None:
    """Wait for the current stream, before the library reads tensors on another one."""
    if device.type == "cuda":
        torch.cuda.current_stream(device).synchronize()


def device_of(device: Any) -> torch.device:
    """A device with its number."""
    device = torch.device("cpu" if device is None else device)
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"device is {device}; the library computes on cpu and cuda")
    return device
