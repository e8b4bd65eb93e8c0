"""Host arrays of every kind are used where they lie, and refused by name where they cannot be."""

import array
import ctypes

import pytest

import moe
from moe import _memory

try:
    import numpy as np
except ImportError:
    np = None

needs_numpy = pytest.mark.skipif(np is None, reason="numpy is not installed")
T, D = 8, 6


@pytest.fixture
def layer(make):
    return make()


def values(count):
    return array.array("f", [((7 * i) % 13 - 6) / 5 for i in range(count)])


def expected(layer):
    """y for values(T * D), as bytes."""
    y = array.array("f", bytes(4 * T * D))
    layer.forward(moe.Pass(layer), values(T * D), y=y)
    return y.tobytes()


def shaped(raw, *shape):
    return memoryview(raw).cast("B").cast("f", shape)


def carriers():
    """The same numbers in every kind of memory, with a function that reads them back."""
    yield "array.array", lambda n: array.array("f", bytes(4 * n)), bytes
    yield "bytearray", lambda n: shaped(bytearray(4 * n), n // D, D), bytes
    yield "ctypes", lambda n: ((ctypes.c_float * D) * (n // D))(), bytes
    if np is not None:
        yield "numpy", lambda n: np.zeros((n // D, D), "float32"), lambda a: a.tobytes()
        yield "DLPack", lambda n: OnlyDLPack(np.zeros((n // D, D), "float32")), (
            lambda a: a.array.tobytes()
        )


class OnlyDLPack:
    """An array that shows itself by DLPack and nothing else, as before DLPack 1.0."""

    def __init__(self, array, device=(1, 0)):
        self.array = array
        self.device = device

    def __dlpack__(self):
        return self.array.__dlpack__()

    def __dlpack_device__(self):
        return self.device


class NewDLPack(OnlyDLPack):
    """The same with versions."""

    def __dlpack__(self, *, max_version=None, **_):
        return self.array.__dlpack__(max_version=max_version)


@pytest.mark.parametrize("name", [name for name, *_ in carriers()])
def test_x_and_y_in_every_kind_of_memory(layer, name):
    (fresh, read), = [(fresh, read) for known, fresh, read in carriers() if known == name]
    x, y = fresh(T * D), fresh(T * D)
    target = x.array if isinstance(x, OnlyDLPack) else x
    memory = memoryview(target).cast("B")
    memory[:] = values(T * D).tobytes()
    memory.release()
    assert layer.forward(moe.Pass(layer), x, y=y) is y
    assert read(y) == expected(layer)


def test_readonly_input_is_legal_and_readonly_output_is_not(layer):
    x = shaped(values(T * D).tobytes(), T, D)
    assert x.readonly
    assert bytes(layer.forward(moe.Pass(layer), x)) == expected(layer)
    with pytest.raises(ValueError, match="^y is read-only"):
        layer.forward(moe.Pass(layer), x, y=shaped(bytes(4 * T * D), T, D))


@needs_numpy
def test_row_strides_are_passed_through(layer):
    wide = np.full((2 * T, D + 5), np.nan, "float32")
    x = wide[::2, 2 : 2 + D]
    x[...] = np.frombuffer(values(T * D), "float32").reshape(T, D)
    out = np.full((T, 3, D), np.nan, "float32")
    layer.forward(moe.Pass(layer), x, y=out[:, 1])
    assert out[:, 1].tobytes() == expected(layer)
    assert np.isnan(out[:, [0, 2]]).all()


@needs_numpy
def test_leading_dimensions_are_folded_where_they_are_even(layer):
    x = np.frombuffer(values(T * D), "float32").reshape(2, 4, D)
    y = layer.forward(moe.Pass(layer), x)
    assert y.shape == (2, 4, D) and y.tobytes() == expected(layer)
    uneven = np.zeros((2, 5, D), "float32")[:, :4]
    with pytest.raises(ValueError, match="x: .* not a matrix of evenly spaced rows"):
        layer.forward(moe.Pass(layer), uneven)


@needs_numpy
@pytest.mark.parametrize("x, message", [
    (lambda: np.zeros((T, D)), "x holds float64, shape .8, 6.; wanted float32"),
    (lambda: np.zeros((T, D), ">f4"), "x holds format '>f'"),
    (lambda: np.zeros((T, D + 1), "float32"), "x has shape .8, 7.; its last dimension must be 6"),
    (lambda: np.zeros((D, T), "float32").T, "x: elements of a row lie 8 apart"),
    (lambda: np.broadcast_to(np.zeros(D, "float32"), (T, D)), "x: rows of 6 elements lie 0 el"),
    (lambda: np.zeros((T, D), "float32")[::-1], "x: rows of 6 elements lie -6 el"),
    (lambda: [[0.0] * D] * T, "x must be an array .buffer protocol or DLPack., not list"),
    (lambda: OnlyDLPack(np.zeros((T, D), "float32"), (2, 3)), "x is on device type 2 number 3"),
])  # fmt: skip
def test_what_cannot_be_used_is_refused_by_name(layer, x, message):
    with pytest.raises((TypeError, ValueError), match=message):
        layer.forward(moe.Pass(layer), x())


@needs_numpy
def test_other_arrays_are_refused_by_name(layer):
    x = np.zeros((T, D), "float32")
    step = moe.Pass(layer)
    for keyword, value, message in [
        ("y", np.zeros((T, D)), "y holds float64"),
        ("y", np.zeros((T - 1, D), "float32"), r"y has shape \(7, 6\): 7 rows; wanted 8"),
        ("noise", np.zeros((T, 3), "float32"), "noise has shape .* must be 4"),
        ("token_mask", np.ones(T), "token_mask holds float64, .* wanted uint8 or bool"),
        ("token_mask", np.ones(T + 1, bool), r"token_mask has shape \(9,\); wanted \(8,\)"),
        ("group_begin", np.zeros(2, "int32"), "group_begin holds int32"),
        ("losses_out", np.zeros(3, "float32"), r"losses_out has shape \(3,\); wanted \(16,\)"),
    ]:
        with pytest.raises((TypeError, ValueError), match=message):
            layer.forward(step, x, **{keyword: value})
    layer.forward(step, x)
    with pytest.raises(ValueError, match="dy has shape .* 7 rows; wanted 8"):
        layer.backward(step, np.zeros((T - 1, D), "float32"))
    with pytest.raises(ValueError, match="dx has shape"):
        layer.backward(step, x, dx=np.zeros((T, D - 1), "float32"))


@needs_numpy
def test_overlapping_arrays_are_refused(layer):
    memory = np.zeros((T, D), "float32")
    step = moe.Pass(layer)
    with pytest.raises(ValueError, match="x and y overlap"):
        layer.forward(step, memory, y=memory)
    layer.forward(step, memory)
    with pytest.raises(ValueError, match="dx and dy overlap"):
        layer.backward(step, memory, dx=memory)


@needs_numpy
def test_dlpack_capsules_are_given_back_once():
    released = []

    class Watched(np.ndarray):
        def __del__(self):
            released.append(1)

    for kind in (OnlyDLPack, NewDLPack):
        released.clear()
        source = np.zeros((T, D), "float32").view(Watched)
        try:
            memory = _memory.describe("x", kind(source), ["float32"], writable=True)
        except TypeError:
            pytest.skip("this numpy has no versioned DLPack")
        assert memory.address == source.ctypes.data and memory.shape == (T, D)
        assert memory.strides == (D, 1)
        del source
        assert not released, "the memory must live as long as it is described"
        del memory
        assert released == [1]


@needs_numpy
def test_readonly_flag_of_versioned_dlpack():
    source = np.zeros(4, "float32")
    source.flags.writeable = False
    try:
        np.zeros(1).__dlpack__(max_version=(1, 0))
    except TypeError:
        pytest.skip("this numpy has no versioned DLPack")
    memory = _memory.describe("x", NewDLPack(source), ["float32"])
    assert not memory.writable
    with pytest.raises(ValueError, match="dy is read-only"):
        _memory.describe("dy", NewDLPack(source), ["float32"], writable=True)


def test_a_bytearray_in_use_cannot_be_resized(layer):
    raw = bytearray(values(T * D).tobytes())
    step = moe.Pass(layer)
    layer.forward(step, shaped(raw, T, D))
    with pytest.raises(BufferError):
        raw.extend(b"more")
    step.close()
    raw.extend(b"more")


def test_parameters_are_views_of_the_librarys_memory(layer):
    w = layer.parameters["experts.w1"]
    view = memoryview(w.data)
    assert w.shape == view.shape == (4, 6, 5) and view.format in ("f", "<f") and not view.readonly
    before = view[2, 3, 4]
    view[2, 3, 4] = before + 1
    assert memoryview(layer.experts.parameters["w1"].data)[2, 3, 4] == pytest.approx(before + 1)


@needs_numpy
def test_views_go_on_through_dlpack(layer):
    data = layer.parameters["gate.weight"].data
    again = np.from_dlpack(data)
    assert again.ctypes.data == data.ctypes.data


@needs_numpy
def test_bound_parameters_with_strides_and_lists(make):
    layer = make()
    y0 = layer.forward(moe.Pass(layer), values(T * D))
    parameters = layer.parameters
    w1, w2, gate = (parameters[n] for n in ("experts.w1", "experts.w2", "gate.weight"))
    transposed = np.ascontiguousarray(np.asarray(w1.data).transpose(0, 2, 1)).transpose(0, 2, 1)
    per_expert = [np.array(part) for part in np.asarray(w2.data)]
    frozen = np.array(gate.data)
    frozen.flags.writeable = False
    gradients = [np.zeros_like(part) if e % 2 else None for e, part in enumerate(per_expert)]
    w1.bind(transposed, np.zeros((4, 6, 5), "float32"))
    w2.bind(per_expert, gradients)
    gate.bind(frozen)
    for p in (w1, w2, gate):
        np.asarray(layer.parameters[p.name].data)
        assert not p.owned
    assert w1.data is transposed and w2.data is per_expert and gate.grad is None
    step = moe.Pass(layer)
    y = layer.forward(step, values(T * D))
    assert bytes(y) == bytes(y0)
    layer.backward(step, np.ones((T, D), "float32"))
    assert w1.grad.any() and any(g.any() for g in gradients if g is not None)
    w1.unbind()
    assert w1.owned and not w1.grad.any()
    with pytest.raises(ValueError, match="grad of experts.w1 is read-only"):
        w1.bind(transposed, frozen_of(transposed))
    with pytest.raises(ValueError, match=r"data of experts.w1 has shape .6, 5.; wanted .4, 6, 5."):
        w1.bind(np.zeros((6, 5), "float32"))
    with pytest.raises(ValueError, match="list of 3; wanted 4 experts"):
        w2.bind(per_expert[:3])
    with pytest.raises(TypeError, match="data of experts.w2, expert 1, holds float64"):
        w2.bind([per_expert[0], per_expert[1].astype("float64"), *per_expert[2:]])


def frozen_of(array):
    copy = array.copy()
    copy.flags.writeable = False
    return copy


def test_workspace_of_the_host(layer):
    need = moe.memory(layer.gate, layer.experts, tokens=T, threads=2).pass_bytes
    raw = bytearray(need + 64)
    start = -ctypes.addressof(ctypes.c_char.from_buffer(raw)) % 64
    step = moe.Pass(layer, workspace=memoryview(raw)[start : start + need])
    assert bytes(layer.forward(step, values(T * D))) == expected(layer)
    with pytest.raises(moe.BufferTooSmall):
        layer.forward(step, values(100 * T * D))
