"""moe.Comm over MPI: two processes against one rank, by mpi4py's communicator and by its number."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import moe

pytest.importorskip("numpy")

PROGRAM = """
import sys
from mpi4py import MPI
import numpy as np
import moe

library, path = sys.argv[1:]
context, world = moe.Context(threads=1), MPI.COMM_WORLD
rank = world.rank
assert world.size == 2, world.size
E, T, D = 4, 6, 8
x = np.random.default_rng(1).standard_normal((2 * T, D))


def layer_of(experts, comm=None):
    gate = moe.Gate(context, d_model=D, num_experts=E, top_k=2, dtype="float64")
    pool = moe.Experts(context, d_model=D, d_hidden=5, num_experts=experts, dtype="float64")
    layer = moe.Layer(gate, pool, comm=comm)
    layer.init_parameters(5)
    return layer


whole = layer_of(E)
expected = whole.forward(moe.Pass(whole), x, group_begin=np.array([0, T, 2 * T]))
with moe.Comm.from_mpi(context, world, timeout=30) as comm:
    assert (comm.rank, comm.size) == (rank, 2)
    layer = layer_of(1 if rank == 0 else E - 1, comm)
    y = layer.forward(moe.Pass(layer), x[rank * T : (rank + 1) * T])
    assert y.tobytes() == expected[rank * T : (rank + 1) * T].tobytes()
    if path:
        moe.io.save(path, {"": layer})
        if rank == 0:
            moe.io.save(path + ".one", {"": whole})
            assert open(path, "rb").read() == open(path + ".one", "rb").read()
with moe.Comm.from_mpi(context, world.py2f(), mpi=library, timeout=30) as comm:
    comm.barrier()
for bad, error in ((MPI.COMM_NULL, moe.InvalidArgument), ("world", TypeError), (2**40, ValueError)):
    try:
        moe.Comm.from_mpi(context, bad)
    except error:
        continue
    raise AssertionError(bad)
try:
    moe.Comm.from_mpi(context, world, timeout=-1)
except moe.InvalidArgument as error:
    assert "timeout is -1" in str(error), error
try:
    moe.Comm.from_mpi(context, world, mpi="another")
except ImportError as error:
    assert "is loaded already" in str(error), error
sys.stdout.write(f"rank {rank} of two on {MPI.Get_library_version().split()[0]}\\n")
"""


def start(mpi, tmp_path):
    """How two processes are started, and the environment in which mpi4py finds this MPI."""
    environment = {"MPI4PY_MPIABI": mpi}
    if mpi == "openmpi":
        root = ["--allow-run-as-root"] if os.getuid() == 0 else []
        return ["mpirun.openmpi", *root, "--oversubscribe", "-n", "2"], environment, ""
    # mpi4py's wheel looks for the library by the name that the MPICH ABI gives it.
    for place in Path("/usr/lib").glob("*/libmpich.so.12"):
        os.symlink(place, tmp_path / "libmpi.so.12")
    return ["mpiexec.mpich", "-n", "2"], environment, str(tmp_path)


@pytest.mark.parametrize("mpi, says", [("openmpi", "Open"), ("mpich", "MPICH")])
def test_two_processes_are_one_rank(mpi, says, libraries, tmp_path):
    pytest.importorskip("mpi4py")
    library = libraries / f"libmoe_mpi_{mpi}.so"
    command, environment, place = start(mpi, tmp_path)
    if shutil.which(command[0]) is None or not library.exists():
        pytest.skip(f"no {command[0]} or no {library}")
    try:
        path = tmp_path / "a.safetensors" if moe.io.library_path() else ""
    except ImportError:
        path = ""
    paths = [str(Path(moe.__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    environment = {
        **os.environ, **environment, "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        "LD_LIBRARY_PATH": os.pathsep.join(filter(None, (place, str(libraries)))),
    }  # fmt: skip
    loads = subprocess.run([sys.executable, "-c", "from mpi4py import MPI"], env=environment,
                           capture_output=True, text=True, timeout=60)  # fmt: skip
    if loads.returncode:
        pytest.skip(f"mpi4py does not load on {mpi}: {loads.stderr.strip().splitlines()[-1]}")
    done = subprocess.run(
        [*command, sys.executable, "-c", PROGRAM, library, path], env=environment,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
    for rank in range(2):
        assert f"rank {rank} of two on {says}" in done.stdout


def test_without_mpi4py_the_mpi_must_be_given(context):
    if "mpi4py.MPI" in sys.modules:
        pytest.skip("mpi4py is loaded in this process")
    with pytest.raises(TypeError, match="mpi must be given"):
        moe.Comm.from_mpi(context, 0)
    with pytest.raises(ImportError, match="libmoe_mpi_nonesuch not found: it is not beside"):
        moe.Comm.from_mpi(context, 0, mpi="nonesuch")
    with pytest.raises(ImportError, match="cannot load the library /nowhere/libmoe_mpi.so"):
        moe.Comm.from_mpi(context, 0, mpi="/nowhere/libmoe_mpi.so")


def test_mpi_that_is_not_initialised_is_said(script, libraries):
    found = sorted(libraries.glob("libmoe_mpi_*.so"))
    if not found:
        pytest.skip(f"no libmoe_mpi in {libraries}")
    text = script(
        "import sys, moe\n"
        "try: moe.Comm.from_mpi(moe.Context(threads=1), 0, mpi=sys.argv[1])\n"
        "except moe.InvalidState as error: print(error)\n",
        str(found[0]),
    )
    assert "MPI is not initialised" in text
