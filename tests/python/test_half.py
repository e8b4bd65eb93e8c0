"""Layers of 16 bits: which arrays they take, and that results are those of float32 to an ulp or so."""

import moe
import numpy as np
import pytest

T, D, F, E = 13, 6, 8, 4


def to_bits(x, dtype):
    """Rounded to nearest even: float16, or the bits of bfloat16 in uint16."""
    if dtype == "float16":
        return x.astype("float16")
    u = np.ascontiguousarray(x, "float32").view("uint32")
    return ((u + 0x7FFF + ((u >> 16) & 1)) >> 16).astype("uint16")


def to_float(x):
    return x.astype("float32") if x.dtype == "float16" else (
        x.astype("uint32") << 16).view("float32")  # fmt: skip


def make(dtype):
    context = moe.Context(threads=1)
    own = {"d_model": D, "num_experts": E, "dtype": dtype}
    gate = moe.Gate(context, top_k=2, z_weight=0.01, **own)
    layer = moe.Layer(gate, moe.Experts(context, d_hidden=F, activation="swiglu", **own))
    layer.init_parameters(3)
    return layer


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_training_step_is_that_of_float32_on_rounded_numbers(dtype):
    rng = np.random.default_rng(0)
    ulp = 2.0**-8 if dtype == "bfloat16" else 2.0**-11
    half, wide = make(dtype), make("float32")
    for name, p in half.parameters.items():
        wide.parameters[name].data[...] = to_float(p.data)
        assert p.grad.dtype == np.float32
    x, dy = (to_bits(rng.standard_normal((T, D), "float32"), dtype) for _ in range(2))
    found = []
    for layer, a, b in ((half, x, dy), (wide, to_float(x), to_float(dy))):
        pass_ = moe.Pass(layer)
        y = layer.forward(pass_, a)
        dx = layer.backward(pass_, b)
        arrays = pass_.plan.arrays()
        assert arrays.weight_of_entry.dtype == np.float32
        grads = {name: p.grad.copy() for name, p in layer.parameters.items()}
        found.append((y, dx, arrays.weight_of_entry.copy(), arrays.expert_of_entry.copy(), grads))
    (y, dx, weights, experts, grads), (y32, dx32, weights32, experts32, grads32) = found
    assert np.array_equal(weights, weights32) and np.array_equal(experts, experts32)
    assert y.dtype == x.dtype
    for got, want in ((to_float(y), y32), (to_float(dx), dx32),
                      *((grads[name], grads32[name]) for name in grads)):  # fmt: skip
        assert np.linalg.norm(got - want) <= 8 * ulp * np.linalg.norm(want)


def test_arrays_of_other_dtypes_are_refused():
    layer = make("bfloat16")
    pass_ = moe.Pass(layer)
    for bad in ("float32", "float64", "float16"):
        with pytest.raises(TypeError, match="wanted bfloat16 or uint16"):
            layer.forward(pass_, np.zeros((T, D), bad))
    with pytest.raises(TypeError, match="losses_out holds uint16"):
        layer.forward(pass_, np.zeros((T, D), "uint16"), losses_out=np.zeros(16, "uint16"))


def test_bindings_take_gradients_of_either_kind():
    layer = make("float16")
    w1 = layer.parameters["experts.w1"]
    data = w1.data.copy()
    for kind in ("float16", "float32"):
        grad = np.zeros(w1.shape, kind)
        w1.bind(data, grad)
        assert w1.record.grad_dtype == moe.DType["F16" if kind == "float16" else "F32"]
        x = np.ones((T, D), "float16")
        pass_ = moe.Pass(layer)
        layer.forward(pass_, x)
        layer.backward(pass_, x)
        assert np.any(grad != 0)
    with pytest.raises(TypeError, match="holds float32"):
        w1.bind(data.astype("float32"), grad)
    weight = layer.parameters["gate.weight"]
    weight.bind(weight.data.astype("float32"), np.zeros(weight.shape, "float32"))
    assert weight.dtype == "float32"


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_rows_of_16_bits_go_through_a_plan_of_float32(dtype):
    plan = moe.Plan(moe.Context(threads=1))
    plan.build(np.array([[1, 0], [0, 1]], "int32"), np.array([[1, 2], [0.5, 4]], "float32"),
               num_experts=2)  # fmt: skip
    tokens = to_bits(np.arange(6, dtype="float32").reshape(2, 3), dtype)
    rows = plan.dispatch_forward(tokens)
    assert rows.dtype == tokens.dtype and rows.shape == (4, 3)
    want = to_bits(to_float(tokens) * np.array([[3], [4.5]], "float32"), dtype)
    assert np.array_equal(plan.combine_forward(rows), want)
