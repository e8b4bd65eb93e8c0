"""Finding and loading the libraries, and their errors as exceptions.

library() gives the loaded library with every prototype set; function(name) a function of it or of a
module library; check(status) turns a status into an exception; new(struct) makes a struct with its
defaults. Calls run without the GIL, as ctypes.CDLL releases it. Nothing here reads the environment.
"""

from __future__ import annotations

import ctypes
import os
import sys
import threading
from pathlib import Path
from typing import Any, Dict, List, Mapping, NoReturn, Optional, Tuple, Type, TypeVar, Union

from . import _abi
from ._constants import Status
from ._prototypes import (
    CUDA_PROTOTYPES,
    IO_PROTOTYPES,
    MPI_PROTOTYPES,
    NCCL_PROTOTYPES,
    PROTOTYPES,
)

NEEDED_VERSION = (0, 1, 0)
SYSTEM_NAME = "libmoe.so.0"

# ---- errors -------------------------------------------------------------------------------------


class Error(Exception):
    """A call of the library failed. `status` is the number, `name` its C name."""

    def __init__(self, message: str, status: int = int(Status.INTERNAL), name: str = "") -> None:
        super().__init__(message)
        self.status = status
        self.name = name


class InvalidArgument(Error, ValueError):
    """An argument or a field has a value that is not allowed."""


class OutOfMemory(Error, MemoryError):
    """The allocator returned no memory."""


class InvalidState(Error, RuntimeError):
    """The object is not in a state that allows this call."""


class NotSupported(Error, NotImplementedError):
    """Known, but not available in this build or on this backend."""


class SizeOverflow(Error, OverflowError):
    """A size does not fit in 63 bits or in the address space."""


class BufferTooSmall(Error, ValueError):
    """Memory supplied by the host is too small."""


class CorruptData(Error, ValueError):
    """Saved data is damaged or breaks an invariant."""


class CallbackFailed(Error, RuntimeError):
    """A callback reported failure; its exception, if it raised one, is the __cause__."""


class SystemRefused(Error, OSError):
    """The operating system refused a resource, such as a thread."""

    def __str__(self) -> str:
        return str(self.args[0])


class DeviceFailed(Error, RuntimeError):
    """A device or its runtime failed, or there is none."""


ERRORS: Dict[int, Type[Error]] = {
    Status.INVALID_ARGUMENT: InvalidArgument,
    Status.OUT_OF_MEMORY: OutOfMemory,
    Status.INVALID_STATE: InvalidState,
    Status.NOT_SUPPORTED: NotSupported,
    Status.OVERFLOW: SizeOverflow,
    Status.BUFFER_TOO_SMALL: BufferTooSmall,
    Status.CORRUPT_DATA: CorruptData,
    Status.CALLBACK: CallbackFailed,
    Status.SYSTEM: SystemRefused,
    Status.DEVICE: DeviceFailed,
}

# ---- loading ------------------------------------------------------------------------------------

_lock = threading.Lock()
_loaded: Optional[ctypes.CDLL] = None
_loaded_path = ""


def _candidates() -> List[str]:
    """Where the library may be: in the package, in the tree the package lies in, in an installed
    package that this one hides, as it does from a program in its directory, in the system."""
    here = Path(__file__).resolve().parent
    found = [here / "libmoe.so"]
    if len(here.parents) > 2:
        root = here.parents[2]
        if (root / "include" / "moe" / "moe.h").exists():
            found.append(root / "lib" / "libmoe.so")
    found += [Path(entry or ".").resolve() / "moe" / "libmoe.so" for entry in sys.path]
    return [str(path) for path in found if path.exists()] + [SYSTEM_NAME]


def _check_version(cdll: ctypes.CDLL, path: str) -> None:
    try:
        number_of, text_of = cdll.moe_version_number, cdll.moe_version_string
    except AttributeError:
        raise ImportError(f"{path} is no libmoe: it has no moe_version_number") from None
    number_of.restype, number_of.argtypes = ctypes.c_int32, []
    text_of.restype, text_of.argtypes = ctypes.c_char_p, []
    major, minor, patch = NEEDED_VERSION
    if number_of() < major * 10000 + minor * 100 + patch:
        raise ImportError(
            f"{path} is libmoe {text_of().decode()}; this package needs "
            f"{major}.{minor}.{patch} or newer"
        )


_Prototypes = Mapping[str, Tuple[Any, List[Any]]]


def _set_prototypes(cdll: ctypes.CDLL, path: str, prototypes: _Prototypes) -> ctypes.CDLL:
    for name, (result, arguments) in prototypes.items():
        try:
            function = getattr(cdll, name)
        except AttributeError:
            raise ImportError(f"{path} has no function {name}; is it of an older tree?") from None
        function.restype = result
        function.argtypes = arguments
    return cdll


def _open(path: str) -> ctypes.CDLL:
    try:
        cdll = ctypes.CDLL(path)
    except OSError as error:
        raise ImportError(f"cannot load the library {path}: {error}") from error
    _check_version(cdll, path)
    return _set_prototypes(cdll, path, PROTOTYPES)


def load(path: Union[str, "os.PathLike[str]", None] = None) -> ctypes.CDLL:
    """Load the library: from `path`, or from the first place that has it.

    The places are the package itself, lib/ of the source tree the package lies in, a package moe in
    another place of sys.path, and the system's libmoe.so.0. The library is loaded once; a second
    path is refused.
    """
    global _loaded, _loaded_path
    with _lock:
        if _loaded is not None:
            if path is not None and os.path.realpath(path) != os.path.realpath(_loaded_path):
                raise ImportError(f"{os.fspath(path)}: {_loaded_path} is loaded already")
            return _loaded
        places = [os.fspath(path)] if path is not None else _candidates()
        if path is None and len(places) == 1:
            try:
                ctypes.CDLL(SYSTEM_NAME)
            except OSError as error:
                raise ImportError(
                    f"libmoe not found: not in {Path(__file__).resolve().parent}, and the system "
                    f"has no {SYSTEM_NAME} ({error}). Run pip install, or make in the source tree, "
                    "or give a path to moe.load()"
                ) from error
        _loaded = _open(places[0])
        _loaded_path = places[0]
        return _loaded


def library() -> Any:
    """The loaded library; the first call loads it."""
    return _loaded if _loaded is not None else load()


def library_path() -> str:
    """The file the library was loaded from."""
    library()
    return _loaded_path


def version() -> str:
    """The version of the loaded library."""
    text: bytes = library().moe_version_string()
    return text.decode()


def constant(name: str) -> int:
    """A constant of the C headers by its name, "MOE_GATE_NOISY_TOP_K"."""
    value = ctypes.c_int64()
    check(library().moe_constant(ctypes.byref(value), name.encode()))
    return value.value


# ---- module libraries ---------------------------------------------------------------------------

_module_lock = threading.Lock()
_io: Optional[ctypes.CDLL] = None
_io_path = ""
_mpi: Optional[ctypes.CDLL] = None
_mpi_path = ""
_NO_IO = (
    "It is built where jansson is: install that (Debian: apt-get install libjansson-dev "
    "pkg-config), then run pip install again, or make in the source tree"
)
_NO_MPI = "make builds it in the source tree where that MPI's mpicc is; a path will do as well"
_NO_CUDA = (
    "make builds it in the source tree where the CUDA toolkit is; give its path to moe.load_cuda()"
)
_NO_NCCL = (
    "make builds it in the source tree where the CUDA toolkit and nccl.h are; give its path to "
    "moe.load_nccl()"
)


def _find_module(name: str) -> str:
    """Where a module library is: beside libmoe, or its soname, for the system to find."""
    soname = f"{name}.so.{SYSTEM_NAME.rsplit('.', 1)[1]}"
    path = library_path()
    if os.sep in path:
        for file in (f"{name}.so", soname):
            beside = os.path.join(os.path.dirname(path), file)
            if os.path.exists(beside):
                return beside
    return soname


def _open_module(path: str, prototypes: _Prototypes, advice: str) -> ctypes.CDLL:
    try:
        cdll = ctypes.CDLL(path)
    except OSError as error:
        if os.sep in path:
            raise ImportError(f"cannot load the library {path}: {error}") from error
        raise ImportError(
            f"{path.split('.')[0]} not found: it is not beside {library_path()}, and the system "
            f"cannot load {path} ({error}). {advice}"
        ) from error
    return _set_prototypes(cdll, path, prototypes)


def io_library() -> Any:
    """libmoe_io; the first call loads it."""
    global _io, _io_path
    if _io is not None:  # without the lock: finalizers come here
        return _io
    path = _find_module("libmoe_io")
    with _module_lock:
        if _io is None:
            _io = _open_module(path, IO_PROTOTYPES, _NO_IO)
            _io_path = path
        return _io


def io_library_path() -> str:
    """The file libmoe_io was loaded from."""
    io_library()
    return _io_path


def _is_at(cdll: ctypes.CDLL, path: str) -> bool:
    """Whether the library at a path is this one; nothing is loaded."""
    try:
        return bool(ctypes.CDLL(path, os.RTLD_NOLOAD | os.RTLD_NOW)._handle == cdll._handle)
    except OSError:
        return False


def load_mpi(name: str) -> None:
    """Load libmoe_mpi_NAME, or the library at a path. A process has one MPI: another is refused."""
    global _mpi, _mpi_path
    library()  # first, so that the module finds this one
    path = name if os.sep in name else _find_module(f"libmoe_mpi_{name}")
    with _module_lock:
        if _mpi is None:
            _mpi = _open_module(path, MPI_PROTOTYPES, _NO_MPI)
            _mpi_path = path
        elif not _is_at(_mpi, path):
            raise ImportError(f"{path}: {_mpi_path} is loaded already")


_Path = Union[str, "os.PathLike[str]", None]


class _Module:
    """A module library that is loaded once; a second path is refused."""

    def __init__(self, name: str, prototypes: _Prototypes, advice: str) -> None:
        self.name, self.prototypes, self.advice = name, prototypes, advice
        self.loaded: Optional[ctypes.CDLL] = None
        self.path = ""

    def load(self, path: _Path) -> ctypes.CDLL:
        if self.loaded is not None and path is None:  # without the lock: finalizers come here
            return self.loaded
        library()  # first, so that the module finds this one
        place = _find_module(self.name) if path is None else os.fspath(path)
        with _module_lock:
            if self.loaded is None:
                self.loaded = _open_module(place, self.prototypes, self.advice)
                self.path = place
            elif not _is_at(self.loaded, place):
                raise ImportError(f"{place}: {self.path} is loaded already")
            return self.loaded


_cuda = _Module("libmoe_cuda", CUDA_PROTOTYPES, _NO_CUDA)
_nccl = _Module("libmoe_nccl", NCCL_PROTOTYPES, _NO_NCCL)


def load_cuda(path: _Path = None) -> Any:
    """Load libmoe_cuda: from `path`, from beside libmoe, or by its soname from the system. Once: a
    second path is refused."""
    return _cuda.load(path)


def load_nccl(path: _Path = None) -> Any:
    """Load libmoe_nccl, and libmoe_cuda before it, in the same way."""
    load_cuda()
    return _nccl.load(path)


def cuda_library_path() -> str:
    """The file libmoe_cuda was loaded from."""
    load_cuda()
    return _cuda.path


def function(name: str) -> Any:
    """A function of libmoe or of a module library. Of MPI's after load_mpi()."""
    if name in CUDA_PROTOTYPES:
        return getattr(load_cuda(), name)
    if name in NCCL_PROTOTYPES:
        return getattr(load_nccl(), name)
    if name in IO_PROTOTYPES:
        return getattr(io_library(), name)
    return getattr(_mpi if name in MPI_PROTOTYPES else library(), name)


# ---- calling ------------------------------------------------------------------------------------


class _Pending(threading.local):
    """Exceptions that callbacks of this thread's running call have raised."""

    def __init__(self) -> None:
        self.errors: List[BaseException] = []


_pending = _Pending()


def note_exception(error: BaseException) -> None:
    """Keep an exception of a callback for the check() after the call."""
    _pending.errors.append(error)


def pending_count() -> int:
    """How many exceptions of callbacks are waiting in this thread."""
    return len(_pending.errors)


def raise_pending_since(count: int) -> None:
    """Raise what callbacks added after pending_count() was `count`, for calls without a status."""
    added = _pending.errors[count:]
    del _pending.errors[count:]
    if added:
        raise added[0]


def _raise(status: int, cause: Optional[BaseException]) -> NoReturn:
    lib = library()
    name = lib.moe_status_name(status).decode()
    message = lib.moe_last_error().decode(errors="replace") or lib.moe_status_text(status).decode()
    raise ERRORS.get(status, Error)(message, status, name) from cause


def check(status: int) -> None:
    """Raise what a call that returned `status` has to say. Call it in the same thread right after.

    An exception raised by a callback becomes the cause; if the call succeeded nonetheless, it is
    raised itself. KeyboardInterrupt and SystemExit are always raised themselves.
    """
    cause: Optional[BaseException] = None
    if _pending.errors:
        cause = _pending.errors[0]
        _pending.errors.clear()
        if status == 0 or not isinstance(cause, Exception):
            raise cause
    if status != 0:
        _raise(status, cause)


_S = TypeVar("_S", bound=ctypes.Structure)


def new(struct: Type[_S]) -> _S:
    """A struct with every default in it."""
    value = struct()
    init = function(_abi.c_name(struct) + "_init")
    check(init(ctypes.byref(value), ctypes.sizeof(value)))
    return value
