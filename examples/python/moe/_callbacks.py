"""Python callables as the library's callbacks: parallel-for, allocator, log, experts.

An exception in a callback is kept for the call it happened in: parallel reports a failure and alloc
gives NULL, so that the call fails, and check() raises the call's error with the exception as its
cause. The callbacks live in the context's Handle, which everything made from the context keeps.
"""

from __future__ import annotations

import ctypes
from typing import Any, Callable, Dict, List, Optional, Tuple

from . import _abi, _memory, _views
from ._constants import DType
from ._handle import inside_callback
from ._library import new, note_exception

# Returned to the library when the callable raised.
RAISED = 1

Parallel = Callable[[int, Callable[[int], None]], Optional[int]]
Alloc = Callable[[int, int], Optional[int]]
Free = Callable[[int, int], None]
CudaAlloc = Callable[[int, int, Optional[int]], Optional[int]]
CudaFree = Callable[[int, int, Optional[int]], None]
Log = Callable[[int, str], None]


def executor_parallel(executor: Any) -> Parallel:
    """A parallel-for that runs tasks on a concurrent.futures.Executor, and in the caller.

    Each future takes the next task until none is left. Tasks run without the GIL.
    """

    def parallel(count: int, task: Callable[[int], None]) -> int:
        numbers = iter(range(count))  # next() is atomic under the GIL

        def work() -> None:
            for index in numbers:
                task(index)

        helpers = min(count, getattr(executor, "_max_workers", count)) - 1
        futures: List[Any] = []
        try:
            for _ in range(helpers):
                futures.append(executor.submit(work))
            work()
        finally:
            # No task may run once this has returned, whatever happened.
            for _ in numbers:
                pass
            for future in futures:
                if not future.cancel():
                    future.exception()
        return 0

    return parallel


def _parallel_callback(parallel: Parallel) -> Any:
    def callback(_user: Any, count: int, task: Any, argument: Any) -> int:
        def run(index: int) -> None:
            task(argument, index)

        try:
            with inside_callback():
                result = parallel(count, run)
            return 0 if result is None else int(result)
        except BaseException as error:  # noqa: B902 - nothing may pass through C
            note_exception(error)
            return RAISED

    return _abi.ParallelFn(callback)


def _alloc_callback(alloc: Alloc) -> Any:
    def callback(_user: Any, size: int, alignment: int) -> Optional[int]:
        try:
            with inside_callback():
                return alloc(size, alignment)
        except BaseException as error:  # noqa: B902
            note_exception(error)
            return None

    return _abi.AllocFn(callback)


def _free_callback(free: Free) -> Any:
    def callback(_user: Any, memory: int, size: int) -> None:
        try:
            with inside_callback():
                free(memory, size)
        except BaseException as error:  # noqa: B902
            note_exception(error)

    return _abi.FreeFn(callback)


def install_cuda(
    config: _abi.CudaConfig, alloc: Optional[Tuple[CudaAlloc, CudaFree]]
) -> Dict[str, Any]:
    """Put an allocator of device memory into a config; the result must live as long as the
    context."""
    if alloc is None:
        return {}
    allocate, release = _pair_of(alloc)

    def give(_user: Any, size: int, alignment: int, stream: Optional[int]) -> Optional[int]:
        try:
            with inside_callback():
                return allocate(size, alignment, stream)
        except BaseException as error:  # noqa: B902
            note_exception(error)
            return None

    def take_back(_user: Any, memory: int, size: int, stream: Optional[int]) -> None:
        try:
            with inside_callback():
                release(memory, size, stream)
        except BaseException as error:  # noqa: B902
            note_exception(error)

    config.alloc, config.free = _abi.CudaAllocFn(give), _abi.CudaFreeFn(take_back)
    return {"device_alloc": config.alloc, "device_free": config.free}


def _pair_of(alloc: Any) -> Tuple[Any, Any]:
    try:
        allocate, release = alloc
    except (TypeError, ValueError):
        raise TypeError("alloc must be a pair of callables (alloc, free)") from None
    if not callable(allocate) or not callable(release):
        raise TypeError("alloc must be a pair of callables (alloc, free)")
    return allocate, release


def log_callback(log: Log) -> Any:
    """A log function of (level, text)."""

    def callback(_user: Any, level: int, text: Optional[bytes]) -> None:
        try:
            with inside_callback():
                log(level, (text or b"").decode(errors="replace"))
        except BaseException as error:  # noqa: B902
            note_exception(error)

    return _abi.LogFn(callback)


# ---- the host's own experts ---------------------------------------------------------------------


class ExpertCall:
    """One expert's rows. The arrays are the library's memory: not to be used after the call.

    expert      its number in the pool
    rows        how many, at least 1
    x           [rows,D] in
    out         [rows,O] out of a forward, in to a backward
    dout        [rows,O] in to a backward, None in a forward
    dx          [rows,D] out of a backward, to be set; None: not wanted
    workspace   [rows,workspace_per_row] uint8: what a forward leaves there its backward finds
    parameters  in a backward: whether gradients of your parameters are wanted: add them
    """

    def __init__(self, call: _abi.ExpertCall, d_model: int, d_out: int, kept: int) -> None:
        rows = self.rows = int(call.rows)
        self.expert = int(call.expert)
        self.parameters = bool(call.parameters)
        dtype = _memory.NAMES[DType(call.dtype)]
        backward = bool(call.dout)
        self.x = _views.borrowed(call.x, (rows, d_model), dtype, False)
        self.out = _views.borrowed(call.out, (rows, d_out), dtype, not backward)
        self.dout = _views.borrowed(call.dout, (rows, d_out), dtype, False)
        self.dx = _views.borrowed(call.dx, (rows, d_model), dtype, True)
        self.workspace = _views.borrowed(call.workspace if kept else None, (rows, kept), "uint8",
                                         not backward)  # fmt: skip


Expert = Callable[[ExpertCall], Optional[int]]


def _expert_callback(function: Expert, d_model: int, d_out: int, kept: int) -> Any:
    # Unlike in the callbacks of a context the library may be called here: it holds no lock.
    def callback(_user: Any, address: int) -> int:
        try:
            call = _abi.ExpertCall.from_address(address)
            result = function(ExpertCall(call, d_model, d_out, kept))
            return 0 if result is None else int(result)
        except BaseException as error:  # noqa: B902
            note_exception(error)
            return RAISED

    return _abi.ExpertFn(callback)


def expert_callbacks(
    config: _abi.ExpertsConfig, functions: Any, workspace_per_row: int
) -> _abi.ExpertCallbacks:
    """Put the host's experts into a pool's config; the result must live as long as the pool."""
    pair = functions if isinstance(functions, (tuple, list)) else (functions, None)
    if len(pair) != 2 or not callable(pair[0]) or not (pair[1] is None or callable(pair[1])):
        raise TypeError("callbacks must be a callable, or a pair of them (forward, backward)")
    d_out = config.d_out if config.d_out > 0 else config.d_model
    callbacks = new(_abi.ExpertCallbacks)
    callbacks.workspace_per_row = workspace_per_row
    sizes = (int(config.d_model), int(d_out), workspace_per_row)
    callbacks.forward = _expert_callback(pair[0], *sizes)
    if pair[1] is not None:
        callbacks.backward = _expert_callback(pair[1], *sizes)
    config.callbacks = ctypes.pointer(callbacks)
    return callbacks


def install(
    config: _abi.ContextConfig,
    parallel: Any,
    alloc: Optional[Tuple[Alloc, Free]],
    log: Optional[Log],
) -> Dict[str, Any]:
    """Put the callables into a context's config; the result must live as long as the context."""
    kept: Dict[str, Any] = {}
    if parallel is not None:
        if hasattr(parallel, "submit"):
            kept["executor"] = parallel
            if config.threads == 0:
                config.threads = getattr(parallel, "_max_workers", 0)
            parallel = executor_parallel(parallel)
        elif not callable(parallel):
            raise TypeError(f"parallel must be a callable or an executor, not {parallel!r}")
        config.parallel = kept["parallel"] = _parallel_callback(parallel)
    if alloc is not None:
        allocate, release = _pair_of(alloc)
        config.alloc = kept["alloc"] = _alloc_callback(allocate)
        config.free = kept["free"] = _free_callback(release)
    if log is not None:
        if not callable(log):
            raise TypeError(f"log must be a callable, not {log!r}")
        config.log = kept["log"] = log_callback(log)
    return kept



