"""Context, CudaContext, World and Comm: where work runs, and groups of ranks."""

from __future__ import annotations

import ctypes
import os
import sys
from typing import Any, Optional, Tuple

from . import _abi, _callbacks, _config
from ._constants import CUDA_CURRENT, Isa
from ._device import stream_of
from ._handle import Handle, Object
from ._library import check, function, library, load_mpi, load_nccl


class Context(Object):
    """Backend, threads, instruction set, allocator and log; most programs make one.

    Keywords are the fields of moe_context_config: backend, isa, threads, log_level. Callbacks:

    parallel  callable(count, task) that calls task(i) once for each i in range(count), from any
              threads, and returns when all have; None or 0 is success. Or an executor of
              concurrent.futures, on which the tasks run. `threads` must say how many run at once;
              for an executor it is the number of its workers unless given
    alloc     pair of callables: alloc(size, alignment) -> address or None, free(address, size)
    log       callable(level, text)
    """

    def __init__(
        self,
        *,
        parallel: Any = None,
        alloc: Optional[Tuple[_callbacks.Alloc, _callbacks.Free]] = None,
        log: Optional[_callbacks.Log] = None,
        **fields: Any,
    ) -> None:
        config = _config.make(_abi.ContextConfig, fields, ("parallel", "alloc", "log"))
        handle = Handle("context")
        handle.kept.update(_callbacks.install(config, parallel, alloc, log))
        self._handle = handle.create("moe_context_create", ctypes.byref(config))

    @property
    def threads(self) -> int:
        """How many tasks run at once, the caller's thread included."""
        return int(library().moe_context_threads(self.handle.value))

    @property
    def isa(self) -> Isa:
        """The instruction set in use."""
        return Isa(library().moe_context_isa(self.handle.value))

    @property
    def backend(self) -> int:
        """The backend, a member of Backend."""
        return int(library().moe_context_backend(self.handle.value))

    def __enter__(self) -> "Context":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        if self.closed:
            return "<moe.Context closed>"
        return f"<moe.Context threads={self.threads} isa={self.isa.name.lower()}>"


class CudaContext(Context):
    """A context on an NVIDIA GPU, by libmoe_cuda. Keywords are the fields of moe_cuda_config:
    wait_seconds, check_pointers, and

    device     the ordinal; None: the current one
    tf32       True: products of float32 may round their factors to TF32
    workspace  bytes of device memory of each pass for cuBLAS
    alloc      pair of callables for device memory: alloc(bytes, alignment, stream) -> address or
               None, free(address, bytes, stream)
    host_alloc, log, log_level
               of the host's memory and log, as of Context

    What is made from it takes arrays of the GPU: PyTorch's CUDA tensors and what has the CUDA array
    interface or DLPack. What it shows is a DeviceArray, what it copies is the host's.
    """

    def __init__(
        self,
        device: Optional[int] = None,
        *,
        tf32: bool = False,
        workspace: Optional[int] = None,
        alloc: Optional[Tuple[_callbacks.CudaAlloc, _callbacks.CudaFree]] = None,
        host_alloc: Optional[Tuple[_callbacks.Alloc, _callbacks.Free]] = None,
        log: Optional[_callbacks.Log] = None,
        log_level: Any = None,
        **fields: Any,
    ) -> None:
        fields = {"device": CUDA_CURRENT if device is None else device, "tf32": int(tf32), **fields}
        if workspace is not None:
            fields["cublas_workspace_bytes"] = workspace
        config = _config.make(_abi.CudaConfig, fields, ("workspace", "alloc", "host_alloc", "log"))
        host_fields = {} if log_level is None else {"log_level": log_level}
        host = _config.make(_abi.ContextConfig, host_fields)
        handle = Handle("context")
        handle.kept.update(_callbacks.install(host, None, host_alloc, log))
        handle.kept.update(_callbacks.install_cuda(config, alloc))
        config.host = ctypes.pointer(host)
        self._handle = handle.create("moe_cuda_context_create", ctypes.byref(config))
        handle.kept["device"] = int(function("moe_cuda_device")(handle.value))

    def poll(self) -> None:
        """Raise DeviceFailed if the device is known to have failed; never waits."""
        self.call("moe_cuda_poll")

    @property
    def device(self) -> int:
        """The ordinal of the GPU."""
        return int(function("moe_cuda_device")(self.handle.value))

    def __repr__(self) -> str:
        return f"<moe.CudaContext {'closed' if self.closed else f'device={self.device}'}>"


class World(Object):
    """Ranks in this process: each is a Comm of its own, for a thread of its own."""

    def __init__(self, context: Context, size: int) -> None:
        handle = Handle("world")
        handle.kept["context"] = context.handle
        self._handle = handle.create("moe_world_create", context.handle.value, size)

    def comm(self, context: Context, rank: int, timeout: float = 60) -> "Comm":
        """The communicator of one rank; no wait of it is longer than timeout seconds."""
        return Comm(context, world=self, rank=rank, timeout=timeout)


def _loaded_mpi() -> str:
    """The name of the MPI that mpi4py has loaded: "openmpi" or "mpich"."""
    # Not imported here: importing it would initialise MPI.
    mpi4py = sys.modules.get("mpi4py.MPI")
    if mpi4py is None:
        raise TypeError('mpi must be given ("openmpi", "mpich" or a path): mpi4py is not loaded')
    text = str(mpi4py.Get_library_version())
    if text.startswith("Open MPI"):
        return "openmpi"
    if text.startswith(("MPICH", "Intel(R) MPI", "MVAPICH")):  # one binary interface
        return "mpich"
    raise TypeError(f"mpi must be given (a name or a path): mpi4py runs on {text.splitlines()[0]}")


class Comm(Object):
    """An expert-parallel group: of one rank, one rank of a World, over MPI, or of GPUs over NCCL.
    Every rank makes the same calls in the same order."""

    def __init__(
        self, context: Context, world: Optional[World] = None, rank: int = 0, timeout: float = 60
    ) -> None:
        handle = Handle("comm")
        handle.kept["context"] = context.handle
        if world is None:
            self._handle = handle.create("moe_comm_create_self", context.handle.value)
            return
        handle.kept["world"] = world.handle
        self._handle = handle.create(
            "moe_comm_create_in_world", world.handle.value, context.handle.value, rank, timeout
        )

    @classmethod
    def from_mpi(
        cls, context: Context, comm: Any, *, mpi: Optional[str] = None, timeout: float = 60
    ) -> "Comm":
        """The ranks of an MPI communicator, each of which makes this call.

        comm     a communicator of mpi4py, or the Fortran handle of any (MPI_Comm_c2f); duplicated
        mpi      whose library libmoe_mpi_* is used: "openmpi", "mpich", another name it was built
                 with, or its path; None: that of mpi4py
        timeout  seconds that any wait may take

        Close it before MPI_Finalize.
        """
        number = comm.py2f() if hasattr(comm, "py2f") else comm
        number = _config.number("comm", number, ctypes.c_int32)
        load_mpi(os.fspath(mpi) if mpi is not None else _loaded_mpi())
        options = _config.make(_abi.MpiOptions, {"timeout": timeout})
        handle = Handle("comm")
        handle.kept["context"] = context.handle
        made = cls.__new__(cls)
        made._handle = handle.create(
            "moe_comm_create_mpi_f", context.handle.value, number, ctypes.byref(options)
        )
        return made

    @classmethod
    def from_nccl(
        cls,
        context: CudaContext,
        comm: Any,
        *,
        duplicate: bool = False,
        warm_up: bool = True,
        stream: Any = None,
        timeout: float = 60,
    ) -> "Comm":
        """The ranks of an NCCL communicator, each of which makes this call.

        context    on the device of the communicator
        comm       the ncclComm_t as a number or a ctypes.c_void_p; stays the caller's, who keeps it
                   until the group is closed, or with duplicate until this call returns
        duplicate  True: the group has a communicator of its own; a failure lets its streams go on
        warm_up    False: connections are made by the first exchange and not here
        stream     for exchanges of the host's memory; None: one of the group's own
        timeout    seconds that any wait may take

        By libmoe_nccl, see load_nccl().
        """
        if isinstance(comm, ctypes.c_void_p):
            comm = comm.value or 0
        address = _config.number("comm", comm, ctypes.c_uint64)
        fields = {"timeout": timeout, "duplicate": int(duplicate), "warm_up": int(warm_up)}
        load_nccl()
        config = _config.make(_abi.NcclConfig, fields)
        config.comm, config.stream = address or None, stream_of(stream)
        handle = Handle("comm")
        handle.kept.update(context=context.handle, stream=stream)
        made = cls.__new__(cls)
        made._handle = handle.create(
            "moe_comm_create_nccl", context.handle.value, ctypes.byref(config)
        )
        return made

    def barrier(self) -> None:
        """Wait until every rank has made this call."""
        check(library().moe_comm_barrier(self.handle.value))

    def poll(self) -> None:
        """Raise Transport if the communicator or another rank is known to have failed."""
        check(library().moe_comm_poll(self.handle.value))

    def abort(self) -> None:
        """Make the waits of all ranks end."""
        library().moe_comm_abort(self.handle.value)

    @property
    def rank(self) -> int:
        """The number of this rank, from 0."""
        return int(library().moe_comm_rank(self.handle.value))

    @property
    def size(self) -> int:
        """The number of ranks."""
        return int(library().moe_comm_size(self.handle.value))

    def __enter__(self) -> "Comm":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
