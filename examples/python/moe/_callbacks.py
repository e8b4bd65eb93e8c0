"""Python callables as the library's callbacks: parallel-for, allocator, log.

An exception in a callback is kept for the call it happened in: parallel reports a failure and alloc
gives NULL, so that the call fails, and check() raises the call's error with the exception as its
cause. The callbacks live in the context's Handle, which everything made from the context keeps.
"""

from __future__ import annotations

import sys
from typing import Any, Callable, Dict, List, Optional, Tuple

from . import _abi
from ._handle import inside_callback
from ._library import note_exception

# Returned to the library when the callable raised.
RAISED = 1

Parallel = Callable[[int, Callable[[int], None]], Optional[int]]
Alloc = Callable[[int, int], Optional[int]]
Free = Callable[[int, int], None]
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


def log_callback(log: Log) -> Any:
    """A log function of (level, text)."""

    def callback(_user: Any, level: int, text: Optional[bytes]) -> None:
        try:
            with inside_callback():
                log(level, (text or b"").decode(errors="replace"))
        except BaseException as error:  # noqa: B902
            note_exception(error)

    return _abi.LogFn(callback)


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
        try:
            allocate, release = alloc
        except (TypeError, ValueError):
            raise TypeError("alloc must be a pair of callables (alloc, free)") from None
        if not callable(allocate) or not callable(release):
            raise TypeError("alloc must be a pair of callables (alloc, free)")
        config.alloc = kept["alloc"] = _alloc_callback(allocate)
        config.free = kept["free"] = _free_callback(release)
    if log is not None:
        if not callable(log):
            raise TypeError(f"log must be a callable, not {log!r}")
        config.log = kept["log"] = log_callback(log)
    return kept



