"""Contexts on a GPU: arrays, streams, errors. They run where libmoe_cuda and a device are, which
may be the ones of tests/emulation: MOE_CUDA_LIB names the library."""

import array
import ctypes
import os

import pytest

import moe
from moe import _abi, _library

np = pytest.importorskip("numpy")
from on_device import There  # noqa: E402

T, D, F, E = 12, 8, 6, 4


def numbers(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape, dtype="float32")


def make(context, dtype="float32", **layer):
    gate = moe.Gate(context, d_model=D, num_experts=E, top_k=2, init_std=0.5, dtype=dtype)
    experts = moe.Experts(context, d_model=D, d_hidden=F, num_experts=E, bias=1, dtype=dtype)
    made = moe.Layer(gate, experts, **layer)
    made.init_parameters(3)
    return made


def step(layer, x, dy, y, dx, **keywords):
    """A forward and a backward."""
    pass_ = moe.Pass(layer)
    layer.forward(pass_, x, y=y, **keywords)
    layer.backward(pass_, dy, dx=dx, flags=moe.Backward.OVERWRITE, **keywords)
    return pass_


@pytest.fixture
def stream(gpu):
    """A stream of the test's own, as PyTorch shows one."""
    place, runtime = ctypes.c_void_p(), moe.load_cuda()
    assert runtime.cudaStreamCreateWithFlags(ctypes.byref(place), 1) == 0

    class Stream:
        cuda_stream = place.value

    yield Stream
    assert runtime.cudaStreamDestroy(place) == 0


def test_the_context_says_what_it_is(gpu):
    assert gpu.backend == moe.Backend.CUDA and gpu.device == 0
    assert repr(gpu) == "<moe.CudaContext device=0>"
    gpu.poll()
    assert moe.load_cuda() is moe.load_cuda()


def test_a_step_is_that_of_the_cpu(gpu, stream, context):
    x, dy = numbers(1, T, D), numbers(2, T, D)
    here, there = make(context), make(gpu)
    y, dx, y_here, dx_here = There(0 * x), There(0 * x), 0 * x, 0 * x
    pass_ = step(there, There(x), There(dy), y, dx, stream=stream)
    mine = step(here, x, dy, y_here, dx_here)
    assert np.allclose(y.host(), y_here, atol=1e-5) and np.allclose(dx.host(), dx_here, atol=1e-5)
    assert (pass_.plan.arrays().expert_of_entry == mine.plan.arrays().expert_of_entry).all()
    assert (pass_.tensor("counts") == mine.tensor("counts")).all()
    assert pass_.stats == pytest.approx(mine.stats, abs=1e-5)
    for name, parameter in there.parameters.items():
        own = here.parameters[name]
        assert isinstance(parameter.data, moe.DeviceArray)
        assert (parameter.data.host() == own.data).all(), name
        assert np.allclose(parameter.grad.host(stream), own.grad, atol=1e-5), name


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_sixteen_bits_go_in_and_out(gpu, context, dtype):
    stored = "uint16" if dtype == "bfloat16" else "float16"
    x = numbers(1, T, D)
    x = (x.view("uint32") >> 16).astype("uint16") if stored == "uint16" else x.astype(stored)
    here, there = make(context, dtype), make(gpu, dtype)
    y, dx, y_here, dx_here = There(0 * x), There(0 * x), 0 * x, 0 * x
    step(there, There(x), There(x), y, dx)
    step(here, x, x, y_here, dx_here)

    def wide(a):
        return (a.astype("uint32") << 16).view("float32") if stored == "uint16" else a

    assert np.allclose(wide(y.host()), wide(y_here), atol=0.05)
    assert np.allclose(wide(dx.host()), wide(dx_here), atol=0.05)
    w1 = there.parameters["experts.w1"]
    assert w1.dtype == dtype and w1.data.host().dtype == stored and w1.grad.dtype == "float32"


def test_arrays_must_be_where_the_context_computes(gpu, context):
    x = numbers(1, T, D)
    there, here = make(gpu), make(context)
    with pytest.raises(TypeError, match="x must be an array on the GPU .* not ndarray of the host"):
        there.forward(moe.Pass(there), x)
    with pytest.raises(ValueError, match="x is on a GPU; the library computes on the CPU"):
        here.forward(moe.Pass(here), There(x))
    with pytest.raises(ValueError, match="y must be given"):
        there.forward(moe.Pass(there), There(x))
    with pytest.raises(TypeError, match="data of experts.w2 must be an array on the GPU"):
        there.parameters["experts.w2"].bind(np.zeros((E, F, D), "float32"))
    with pytest.raises(TypeError, match="loss_grad must be an array on the GPU"):
        pass_ = moe.Pass(there)
        there.forward(pass_, There(x), y=There(x))
        there.backward(pass_, There(x), dx=There(x), loss_grad={"load": 2})
    with pytest.raises(moe.InvalidArgument, match="stream must be NULL"):
        here.forward(moe.Pass(here), x, stream=8)
    with pytest.raises(TypeError, match="stream must be a cudaStream_t"):
        here.forward(moe.Pass(here), x, stream="main")


def test_memory_of_the_program_is_bound_and_read(gpu, context):
    layer = make(gpu)
    weight, gradient = There(numbers(5, E, F, D)), There(np.zeros((E, F, D), "float32"))
    layer.parameters["experts.w2"].bind(weight, gradient)
    x = There(numbers(1, T, D))
    step(layer, x, x, There(0 * x.values), There(0 * x.values))
    assert gradient.host().any() and layer.parameters["experts.w2"].data is weight
    gate = layer.parameters["gate.weight"].data
    gate.set(np.zeros((D, E), "float32"))
    assert not gate.host().any()
    with pytest.raises(ValueError, match="wanted contiguous"):
        gate.set(np.zeros((E, D), "float32"))


def test_plans_of_the_program_move_rows_there(gpu):
    with pytest.raises(TypeError, match="expert_ids must be an array on the GPU"):
        moe.Plan(gpu).build(array.array("i", [1, 0, 1]), num_experts=2)
    ids, begin = There(np.array([1, 0, 1], "int32")), There(np.arange(4))
    plan = moe.Plan(gpu).build(ids, token_begin=begin, num_experts=2)
    tokens, rows = There(numbers(1, 3, D)), There(np.zeros((3, D), "float32"))
    plan.dispatch_forward(tokens, rows)
    assert (rows.host() == tokens.values[[1, 0, 2]]).all()
    assert (plan.arrays().token_of_row == [1, 0, 2]).all()
    assert isinstance(plan.arrays(copy=False).token_of_row, moe.DeviceArray)


def test_the_programs_allocator_serves_and_gets_all_back(gpu):
    live, runtime = {}, moe.load_cuda()

    def give(size, alignment, stream):
        place = ctypes.c_void_p()
        assert alignment <= 256 and stream is None
        assert runtime.cudaMalloc(ctypes.byref(place), ctypes.c_size_t(size)) == 0
        live[place.value] = size
        return place.value

    def take_back(address, size, stream):
        assert live.pop(address) == size and stream is None
        assert runtime.cudaFree(ctypes.c_void_p(address)) == 0

    context = moe.CudaContext(0, alloc=(give, take_back), workspace=1 << 20, wait_seconds=5.0)
    layer = make(context)
    x = There(numbers(1, T, D))
    step(layer, x, x, There(0 * x.values), There(0 * x.values))
    assert live
    del layer, context
    assert not live


def test_what_a_context_cannot_be_is_refused(gpu):
    with pytest.raises(moe.InvalidArgument, match="device"):
        moe.CudaContext(1000)
    with pytest.raises(TypeError, match="moe_cuda_config has no field 'threads'"):
        moe.CudaContext(threads=2)
    with pytest.raises(TypeError, match="alloc must be a pair"):
        moe.CudaContext(alloc=print)
    with pytest.raises(moe.NotSupported):
        make(gpu, "float64")
    assert _library.new(_abi.CudaConfig).device == moe._constants.CUDA_CURRENT
