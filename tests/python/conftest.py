"""What the tests of the Python package share.

The package under test is the installed one if there is one, else the one of the tree, which then
takes the library from lib/. Tests run without numpy too; those that need it say so.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "examples" / "python"

try:
    import moe
except ImportError:
    sys.path.insert(0, str(PACKAGE))
    import moe


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: builds the library; deselect with -m 'not slow'")


@pytest.fixture(scope="session")
def root():
    """The source tree."""
    return ROOT


@pytest.fixture(scope="session")
def context():
    """One context with two threads for every test that wants nothing special."""
    return moe.Context(threads=2)


@pytest.fixture(scope="session")
def libraries():
    """Where make puts the libraries, those of MPI among them."""
    return Path(os.environ.get("MOE_LIB", ROOT / "lib"))


@pytest.fixture(scope="session")
def io():
    """moe.io, where libmoe_io was built. MOE_CHECK_ALL=1: it must have been."""
    try:
        moe.io.library_path()
    except ImportError as error:
        if os.environ.get("MOE_CHECK_ALL"):
            raise
        pytest.skip(str(error))
    return moe.io


@pytest.fixture(scope="session")
def safetensors():
    """The package of that name, with numpy."""
    pytest.importorskip("safetensors.numpy")
    import safetensors

    return safetensors


@pytest.fixture(scope="session")
def gpu():
    """A context on the device, or the reason why there is none."""
    try:
        moe.load_cuda(os.environ.get("MOE_CUDA_LIB"))
        return moe.CudaContext()
    except (ImportError, moe.DeviceFailed, moe.NotSupported) as error:
        if os.environ.get("MOE_CUDA_LIB"):
            raise
        pytest.skip(str(error))


@pytest.fixture(scope="session")
def script():
    """Runs Python source in a process of its own and gives what it printed."""

    def run(source, *arguments, timeout=60):
        environment = dict(os.environ)
        paths = [str(Path(moe.__file__).parents[1]), environment.get("PYTHONPATH", "")]
        environment["PYTHONPATH"] = os.pathsep.join(path for path in paths if path)
        environment["PYTHONFAULTHANDLER"] = "1"
        done = subprocess.run(
            [sys.executable, "-c", source, *arguments],
            env=environment, capture_output=True, text=True, timeout=timeout,
        )  # fmt: skip
        assert done.returncode == 0, f"exit {done.returncode}\n{done.stdout}\n{done.stderr}"
        assert done.stderr == "", done.stderr
        return done.stdout

    return run


@pytest.fixture
def make(context):
    """Makes a small layer with its parameters drawn: make(gate={...}, experts={...})."""

    def layer(gate=(), experts=(), context=context, **fields):
        gate = {"d_model": 6, "num_experts": 4, "top_k": 2, "init_std": 0.5, **dict(gate)}
        experts = {"d_model": 6, "d_hidden": 5, "num_experts": gate["num_experts"], **dict(experts)}
        made = moe.Layer(moe.Gate(context, **gate), moe.Experts(context, **experts), **fields)
        made.init_parameters(3)
        return made

    return layer
