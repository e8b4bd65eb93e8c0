"""moe.Comm over NCCL: one rank, and two processes with a GPU each against one that has all. They
run where libmoe_nccl and GPUs are, which may be those of tests/emulation: MOE_CUDA_LIB and
MOE_NCCL_LIB name the libraries."""

import ctypes
import os
import subprocess
import sys
from pathlib import Path

import pytest

import moe

np = pytest.importorskip("numpy")
from on_device import There  # noqa: E402

PROGRAM = """
import ctypes, os, sys, time
import numpy as np
import moe
from on_device import There

rank, path = int(sys.argv[1]), sys.argv[2]
moe.load_cuda(os.environ.get("MOE_CUDA_LIB"))
nccl = moe.load_nccl(os.environ.get("MOE_NCCL_LIB"))  # NCCL's symbols are found through it
assert nccl.cudaSetDevice(rank) == 0


class Id(ctypes.Structure):
    _fields_ = [("internal", ctypes.c_char * 128)]


name = Id()
if rank == 0:
    assert nccl.ncclGetUniqueId(ctypes.byref(name)) == 0
    with open(path + ".new", "wb") as file:
        file.write(bytes(name))
    os.rename(path + ".new", path)
while not os.path.exists(path):
    time.sleep(0.01)
with open(path, "rb") as file:
    name = Id.from_buffer_copy(file.read())
host = ctypes.c_void_p()
nccl.ncclCommInitRank.argtypes = [ctypes.c_void_p, ctypes.c_int, Id, ctypes.c_int]
assert nccl.ncclCommInitRank(ctypes.byref(host), 2, name, rank) == 0

context = moe.CudaContext()
E, T, D = 4, 6, 8
x = np.random.default_rng(1).standard_normal((2 * T, D), dtype="float32")


def forward(experts, x, comm=None, **keywords):
    gate = moe.Gate(context, d_model=D, num_experts=E, top_k=2)
    pool = moe.Experts(context, d_model=D, d_hidden=5, num_experts=experts)
    layer = moe.Layer(gate, pool, comm=comm)
    layer.init_parameters(5)
    y = There(0 * x)
    layer.forward(moe.Pass(layer), There(x), y=y, **keywords)
    return y.host()


expected = forward(E, x, group_begin=np.array([0, T, 2 * T]))[rank * T : (rank + 1) * T]
for duplicate in (False, True):
    with moe.Comm.from_nccl(context, host, duplicate=duplicate, timeout=30) as comm:
        assert (comm.rank, comm.size) == (rank, 2)
        comm.barrier()
        y = forward(1 if rank == 0 else E - 1, x[rank * T : (rank + 1) * T], comm)
        assert np.allclose(y, expected, rtol=1e-6, atol=1e-6), abs(y - expected).max()
        assert abs(y).max() > 0
assert nccl.ncclCommDestroy(host) == 0
sys.stdout.write(f"rank {rank} of two\\n")
"""


@pytest.fixture(scope="module")
def nccl(gpu):
    """libmoe_nccl, or the reason why there is none."""
    try:
        return moe.load_nccl(os.environ.get("MOE_NCCL_LIB"))
    except ImportError as error:
        if os.environ.get("MOE_NCCL_LIB"):
            raise
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def alone(nccl):
    """An NCCL communicator of one rank, on the current device."""
    comm = ctypes.c_void_p()
    status = nccl.ncclCommInitAll(ctypes.byref(comm), 1, (ctypes.c_int * 1)(0))
    assert status == 0, status
    yield comm
    assert nccl.ncclCommDestroy(comm) == 0


@pytest.mark.parametrize("duplicate", [False, True])
def test_one_rank_is_no_group(gpu, alone, duplicate):
    x = np.random.default_rng(1).standard_normal((5, 8), dtype="float32")

    def forward(comm):
        gate = moe.Gate(gpu, d_model=8, num_experts=3, top_k=2)
        layer = moe.Layer(gate, moe.Experts(gpu, d_model=8, d_hidden=6, num_experts=3), comm=comm)
        layer.init_parameters(3)
        y = There(0 * x)
        layer.forward(moe.Pass(layer), There(x), y=y)
        return y.host()

    with moe.Comm.from_nccl(gpu, alone.value, duplicate=duplicate, timeout=30) as comm:
        assert (comm.rank, comm.size) == (0, 1)
        comm.barrier()
        comm.poll()
        y = forward(comm)
    assert y.tobytes() == forward(None).tobytes() and abs(y).max() > 0


def test_the_stream_of_the_caller_is_used(gpu, nccl, alone):
    place, graph = ctypes.c_void_p(), ctypes.c_void_p()
    assert nccl.cudaStreamCreateWithFlags(ctypes.byref(place), 1) == 0
    assert nccl.cudaStreamBeginCapture(place, 1) == 0
    with pytest.raises(moe.InvalidState, match="captured"):
        moe.Comm.from_nccl(gpu, alone, stream=place.value)
    assert nccl.cudaStreamEndCapture(place, ctypes.byref(graph)) == 0
    assert nccl.cudaGraphDestroy(graph) == 0
    with moe.Comm.from_nccl(gpu, alone, stream=place.value, warm_up=False) as comm:
        comm.barrier()
    assert nccl.cudaStreamDestroy(place) == 0


def test_what_is_no_communicator_is_refused(gpu, alone, context):
    for bad, error in (("world", TypeError), (-1, ValueError), (0, moe.InvalidArgument),
                       (ctypes.c_void_p(), moe.InvalidArgument)):  # fmt: skip
        with pytest.raises(error, match="comm"):
            moe.Comm.from_nccl(gpu, bad)
    with pytest.raises(moe.InvalidArgument, match="timeout is -1"):
        moe.Comm.from_nccl(gpu, alone, timeout=-1)
    with pytest.raises(TypeError, match="timeout must be a number"):
        moe.Comm.from_nccl(gpu, alone, timeout="long")
    with pytest.raises(TypeError, match="stream must be a cudaStream_t"):
        moe.Comm.from_nccl(gpu, alone, stream="mine")
    with pytest.raises(moe.InvalidArgument, match="context"):
        moe.Comm.from_nccl(context, alone)


def test_another_library_is_refused(nccl):
    assert moe.load_nccl() is nccl
    with pytest.raises(ImportError, match="/nowhere/libmoe_nccl.so: .* is loaded already"):
        moe.load_nccl("/nowhere/libmoe_nccl.so")


def test_a_library_that_is_not_there_is_said(gpu, script):
    text = script(
        "import sys, moe\n"
        "moe.load_cuda(sys.argv[1] or None)\n"
        "try: moe.load_nccl('/nowhere/libmoe_nccl.so')\n"
        "except ImportError as error: print(error)\n",
        os.environ.get("MOE_CUDA_LIB", ""),
    )
    assert "cannot load the library /nowhere/libmoe_nccl.so" in text


def test_two_processes_are_one_rank(nccl, tmp_path):
    count = ctypes.c_int()
    assert nccl.cudaGetDeviceCount(ctypes.byref(count)) == 0
    if count.value < 2:
        pytest.skip(f"{count.value} GPU here, two are needed")
    places = [Path(moe.__file__).parents[1], Path(__file__).parent, os.environ.get("PYTHONPATH")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(str(p) for p in places if p)}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", PROGRAM, str(rank), str(tmp_path / "id")], env=environment,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip
        for rank in range(2)
    ]
    try:
        said = [process.communicate(timeout=100)[0] for process in ranks]
    finally:
        for process in ranks:
            process.kill()
    for rank, process in enumerate(ranks):
        assert process.returncode == 0, said
        assert f"rank {rank} of two" in said[rank]
